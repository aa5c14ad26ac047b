"""Ends trainings at random moments, spoils checkpoints, and compares what comes out with an undisturbed training.

    python -m tests.chaos --runs 20 [--processes 2] [--seed 0]

Every run is the real command on tests/micro.py. It is ended one to three times, by SIGKILL or SIGTERM, while it starts,
in a step, while a checkpoint is being written, as a validation begins or in stage 2, and started again each time; in
every third run its newest checkpoint is damaged before that. Of several processes one gets the signal, all only while
they start, and the others have to end by themselves. In the end its parameters, its optimizer's state and model.json
have to be those of the undisturbed run, to the bit. Exits with status 1 if they are not, or if a process ended with
another status than it should.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests import micro, processes

STEPS, SAVE_EVERY, EVAL_EVERY = 400, 40, 100
FLAGS = [
    "--train.steps", str(STEPS), "--train.save-every", str(SAVE_EVERY), "--train.eval-every", str(EVAL_EVERY),
    "--train.log-every", "1", "--data.buckets", "32", "40", "16",
]  # fmt: skip
MOMENTS = ("start", "step", "save", "validation", "stage 2")
PATIENCE = 240.0
"""Seconds in which a process has to say something, or to end."""


class Failure(Exception):
    """What should not have happened."""


@dataclass
class Ending:
    """How a process was ended."""

    signal: signal.Signals
    moment: str
    status: int
    others: list[int]
    """The statuses of the processes that got no signal."""
    seconds: float
    """From the signal to the exit of the last process."""
    step: int
    """The last one that it logged."""


@dataclass
class Tally:
    """What is counted over all runs."""

    endings: list[Ending] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    """Steps that were taken again after a SIGKILL, where no checkpoint was damaged."""
    repeated: int = 0
    damaged: int = 0
    to_first_step: list[float] = field(default_factory=list)
    """Seconds from the start of a process to the end of the first step after its checkpoint."""
    goodput: list[float] = field(default_factory=list)
    difference: float = 0.0


class Training:
    """A training by the real command, in one process or several, which can be ended and started again."""

    def __init__(self, folder: Path, flags: list[str], cache: Path, number: int):
        self.number, self.processes = number, []
        self.run = micro.Run(folder / "run", [*flags, *FLAGS])
        folder.mkdir()
        self.log = folder / "output.txt"
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip
        self.began, self.before, self.heard = 0.0, None, (0, 0.0)

    def start(self) -> None:
        self.before = self.metrics()
        self.began = time.monotonic()
        self.heard = (0, self.began)
        with self.log.open("wb") as log:
            for place in processes.places(self.number):
                command = [*self.run.command, *(place if self.number > 1 else [])]
                self.processes.append(
                    subprocess.Popen(command, cwd=micro.ROOT, env=self.environment, stdout=log, stderr=log)
                )

    def running(self) -> bool:
        if (size := self.log.stat().st_size) > self.heard[0]:
            self.heard = (size, time.monotonic())
        if time.monotonic() - self.heard[1] > PATIENCE:
            self.kill()
            raise Failure(f"hung:\n{self.said()}")
        time.sleep(0.002)
        return any(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.ended()

    def ended(self) -> list[int]:
        """Waits for all processes; their statuses."""
        statuses = [process.wait(PATIENCE) for process in self.processes]
        self.processes.clear()
        return statuses

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def step(self) -> int:
        """The last one logged."""
        with contextlib.suppress(FileNotFoundError), (self.run.workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 3000, 0))
            for line in reversed(file.read().splitlines()):
                with contextlib.suppress(ValueError, KeyError):
                    if (row := json.loads(line))["split"] == "train":
                        return row["step"]
        return 0

    def saving(self) -> bool:
        return any("checkpoint-tmp" in path.name for path in (self.run.workdir / "checkpoints").glob("*"))

    def checkpoints(self) -> list[Path]:
        found = (self.run.workdir / "checkpoints").glob("[0-9]*")
        return sorted((path for path in found if path.name.isdecimal()), key=lambda path: int(path.name))

    def metrics(self) -> int | None:
        """Changes when a process has taken over the metrics of the one before."""
        with contextlib.suppress(FileNotFoundError):
            return (self.run.workdir / "metrics.jsonl").stat().st_ino
        return None

    def started(self) -> bool:
        """Whether it has said what it starts from, and `step` tells of it."""
        return "device(s)" in self.said() and (self.before is None or self.metrics() != self.before)

    def resumed_from(self) -> int:
        found = re.search(r"resuming from .*/checkpoints/(\d+)", self.said())
        return int(found[1]) if found else 0

    def to_first_step(self) -> float:
        """Waits for the first step after what it starts from; the seconds since the start."""
        while self.running():
            if self.started() and self.step() > self.resumed_from():
                return time.monotonic() - self.began
        return float("nan")  # there was none left

    def end(self, how: signal.Signals, moment: str, draw: random.Random, usual_start: float) -> Ending:
        """Ends the process at a moment."""
        delay = draw.uniform(0, usual_start if moment == "start" else 1)
        target = None
        while self.running():
            if moment == "start":
                if self.started():
                    moment = "step"
                elif time.monotonic() > self.began + delay:
                    break
            if target is None and self.started():
                target = draw.randint(min(self.step() + 1, STEPS), STEPS)
                if moment == "validation":
                    target = min(-(-target // EVAL_EVERY) * EVAL_EVERY, STEPS)
            if target is None:
                continue
            if moment in ("step", "validation") and self.step() >= target:
                break
            if moment == "save" and self.step() >= target and self.saving():
                break
            if moment == "stage 2" and f"validation at step {STEPS}" in self.said():
                time.sleep(delay)
                break
        if any(process.poll() for process in self.processes):
            raise Failure(f"ended by itself, statuses {self.ended()}:\n{self.said()}")
        began, which = time.monotonic(), draw.randrange(self.number)
        for i, process in enumerate(self.processes):
            if i == which or moment == "start":  # they would wait for one that never came, for five minutes
                process.send_signal(how)
        statuses = self.ended()
        others = statuses[:which] + statuses[which + 1 :]
        return Ending(how, moment, statuses[which], others, time.monotonic() - began, self.step())

    def finish(self) -> None:
        while self.running():
            pass
        if any(statuses := self.ended()):
            raise Failure(f"statuses {statuses}:\n{self.said()}")


def allowed(ending: Ending) -> bool:
    """Whether a process may end so. 0: it was done before the signal came; SIGTERM itself: Python was starting."""
    if ending.status == 0:
        return True
    if ending.signal == signal.SIGKILL:
        return ending.status == -signal.SIGKILL and all(ending.others) and 2 not in ending.others  # a user's mistake
    statuses = {ending.status, *ending.others}
    return statuses <= ({75, -signal.SIGTERM} if ending.moment == "start" else {75})


def spoil(checkpoint: Path, draw: random.Random) -> str:
    """Damages a file of a checkpoint. Returns what was done."""
    names = ("checksums.json", "_METADATA", "manifest.ocdbt")
    files = [path for path in checkpoint.rglob("*") if path.name in names or path.parent.name == "d"]
    path = draw.choice(sorted(files))
    how = draw.choice(("cut", "changed", "deleted"))
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return f"{path.relative_to(checkpoint)} {how}"


def parameters(training: Training) -> dict:
    """All that a training leaves: the model and the last state."""
    import jax
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:

        def read(path):
            def shape(stored):
                return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=here)

            return reader.restore(path, jax.tree.map(shape, reader.metadata(path).item_metadata.tree))

        return {part: read(training.run.workdir / part) for part in ("model", f"checkpoints/{STEPS}")}


def largest_difference(one: dict, other: dict) -> float:
    """Over all arrays; infinite where a NaN or a shape differs."""
    import jax

    if jax.tree.structure(one) != jax.tree.structure(other):
        return float("inf")

    def difference(a, b):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.tobytes() == b.tobytes():
            return 0.0
        return float(np.nan_to_num(np.abs(a.astype(np.float64) - b).max(), nan=np.inf)) or np.finfo(np.float64).tiny

    return max(jax.tree.leaves(jax.tree.map(difference, one, other)))


def disturbed(number: int, training: Training, kills: int, draw: random.Random, usual_start: float, tally: Tally):
    """A training that is ended `kills` times; in every third run a checkpoint is damaged as soon as there are two."""
    spoiled = number % 3 != 0
    ended, damage, newest = None, "", 0

    def look():
        """What the process that was started after an ending goes on from."""
        nonlocal ended, damage
        while not training.started() and training.running():
            pass
        if ended is None or not training.started():
            return
        start = training.resumed_from()
        if ended.step < STEPS:
            tally.to_first_step.append(training.to_first_step())
        lost = max(ended.step - start, 0)
        tally.repeated += lost
        if damage and (start >= newest or not (training.run.workdir / f"checkpoints/damaged-{newest}").exists()):
            raise Failure(f"{damage} was not noticed:\n{training.said()}")
        if ended.signal == signal.SIGKILL and not damage:
            tally.lost.append(lost)
        elif lost and not damage:
            raise Failure(f"run {number}: {lost} steps lost after SIGTERM:\n{training.said()}")
        print(f"run {number}: went on from {start}", flush=True)
        ended, damage = None, ""

    training.start()
    for kill in range(kills):
        moment = draw.choice(MOMENTS if spoiled or kill else ("step", "save", "validation"))
        if moment != "start":
            look()
        ending = training.end(draw.choice((signal.SIGKILL, signal.SIGTERM)), moment, draw, usual_start)
        tally.endings.append(ending)
        statuses = " ".join(map(str, [ending.status, *ending.others]))
        text = f"{ending.signal.name} in {ending.moment} at step {ending.step}, status {statuses}"
        print(f"run {number}: {text}, {ending.seconds:.2f} s", flush=True)
        if not allowed(ending):
            raise Failure(training.said())
        if ended is None or ending.moment != "start":
            ended = ending
        checkpoints = training.checkpoints()
        if not spoiled and len(checkpoints) > 1:
            damage, newest, spoiled = spoil(checkpoints[-1], draw), int(checkpoints[-1].name), True
            tally.damaged += 1
            print(f"run {number}: {checkpoints[-1].name}/{damage}", flush=True)
        training.start()
    look()
    training.finish()


def share_of_goodput(training: Training) -> float:
    found = re.search(r"goodput (\d+)%", training.said())
    return int(found[1]) / 100 if found else float("nan")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    draw, tally = random.Random(options.seed), Tally()
    with tempfile.TemporaryDirectory(prefix="miracle-jax-chaos-") as name:
        folder = Path(name)
        flags = micro.write_corpus(folder)

        # ---- Undisturbed
        undisturbed = Training(folder / "undisturbed", flags, folder / "cache", options.processes)
        undisturbed.start()
        cold = [undisturbed.to_first_step()]
        undisturbed.finish()
        wanted, facts = parameters(undisturbed), (undisturbed.run.workdir / "model.json").read_bytes()

        # ---- Disturbed
        usual_start = 10.0
        for number in range(options.runs):
            training = Training(folder / str(number), flags, folder / "cache", options.processes)
            kills = draw.randint(1, 3) if options.runs > 3 else 1
            disturbed(number, training, kills, draw, usual_start, tally)
            usual_start = statistics.median(tally.to_first_step) if tally.to_first_step else usual_start
            tally.goodput.append(share_of_goodput(training))
            difference = largest_difference(parameters(training), wanted)
            tally.difference = max(tally.difference, difference)
            if difference or (training.run.workdir / "model.json").read_bytes() != facts:
                raise Failure(f"run {number} ended with other parameters, by up to {difference}")

        # ---- With an empty compilation cache
        for number in range(2 if options.runs > 3 else 0):
            training = Training(folder / f"cold-{number}", flags, folder / f"cache-{number}", options.processes)
            training.start()
            cold.append(training.to_first_step())
            training.kill()

    # ---- Figures
    kills = [e for e in tally.endings if e.status]
    terms = [e.seconds for e in kills if e.status == 75]
    alone = [e.seconds for e in kills if e.status == -signal.SIGKILL and e.others]
    starts = [seconds for seconds in tally.to_first_step if seconds == seconds]
    moments = ", ".join(f"{sum(e.moment == m for e in kills)} in {m}" for m in MOMENTS)
    by_signal = ", ".join(
        f"{sum(e.signal == s for e in kills)} {s.name}" for s in (signal.SIGKILL, signal.SIGTERM)
    )
    print(f"""
| | |
|---|---|
| runs, all equal to the undisturbed one to the bit | {options.runs} |
| times ended | {len(kills)} ({by_signal}; {moments}) |
| newest checkpoint damaged before a start, noticed and passed over | {tally.damaged} |
| largest difference of a parameter or the optimizer's state | {tally.difference:g} |
| seconds from SIGTERM to exit (status 75), median and largest | {middle(terms)} |
| seconds from SIGKILL of one process to the exit of the others, median and largest | {middle(alone)} |
| seconds from start to the first resumed step, warm compilation cache | {middle(starts)} |
| the same from the beginning with an empty compilation cache | {middle(cold)} |
| steps lost at SIGKILL, median and largest; a checkpoint is due every {SAVE_EVERY} | {middle(tally.lost, 0)} |
| steps taken again, of {STEPS * options.runs} | {tally.repeated} |
| goodput of the runs, median | {statistics.median(tally.goodput):.0%} |""")


def middle(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} and {max(values):.{digits}f}" if values else "none"


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        print(failure, file=sys.stderr)
        sys.exit(1)
