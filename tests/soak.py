"""Hours of answering in minutes: `generate` over 20,000 contexts, killed, interrupted, and watched.

    python -m tests.soak [--contexts 20000] [--checked 6144]

Trains the model of configs/tiny.py for 30 steps, which is enough to cost what a trained one costs or more (it rarely
ends a reply before the limit), repeats the bundled corpus until there are --contexts of it, and answers them by the
real command. That is killed (SIGKILL) after a tenth of them and interrupted (SIGINT, as by Ctrl-C) after a fifth; the
same command then goes on to the end. It fails unless every context is answered once and in order, the first --checked
lines (the interruptions are among them) are to the byte those of a command that nobody interrupted, and memory stays
flat.

Resident memory is read from /proc, so it needs Linux.
"""

import argparse
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from miracle_jax import dataset

FLAT = 64.0
"""MB by which the last process may grow from its second tenth to its end. Compiled programs, some MB each, come early
on; a leak of a kB a reply would be 16 MB."""


def contexts(path: Path, number: int) -> None:
    """Writes that many contexts to answer, numbered, from the bundled training dialogues."""
    lines = [line for _, file in dataset.bundled("train") for line in Path(file).read_text().splitlines()]
    with path.open("w") as file:
        for i, line in enumerate(itertools.islice(itertools.cycle(lines), number)):
            record = json.loads(line)
            context = {"id": str(i), "input": record["input"], "output": record["output"][:-1]}
            file.write(json.dumps(context) + "\n")


def resident(pid: int) -> float:
    """MB of memory that a process has in use."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    if not pages:
        raise FileNotFoundError("it has just ended")
    return pages * 4096 / 1e6


def answered(out: Path) -> int:
    """Lines of the part file, or of the whole one."""
    files = [*out.parent.glob(f".{out.name}.*.part"), *out.parent.glob(out.name)]
    return files[0].read_bytes().count(b"\n") if files else 0


def answer(run: Path, data: Path, out: Path, stop: int = 0, by: signal.Signals | None = None):
    """One process. Returns (its exit status, [(seconds since its start, replies there are, resident MB)]).

    stop, by: the number of replies at which it gets a signal.
    """
    command = [sys.executable, "-m", "miracle_jax.generate", str(run), "--data", str(data), "--out", str(out)]
    began, samples = time.perf_counter(), []
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.25)
            try:
                samples.append((time.perf_counter() - began, answered(out), resident(process.pid)))
            except FileNotFoundError:  # it ended just now, or its file got its name
                continue
            if by and samples[-1][1] >= stop:
                process.send_signal(by)
                process.wait()
    return process.returncode, samples


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--contexts", type=int, default=20_000)
    parser.add_argument("--checked", type=int, default=6_144)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), given.contexts, given.checked)


def soak(folder: Path, number: int, checked: int) -> None:
    run, data, out = folder / "run", folder / "contexts.jsonl", folder / "replies.jsonl"
    train = [sys.executable, "-m", "miracle_jax.train", "--config", "configs/tiny.py", "--workdir", str(run)]
    subprocess.run([*train, "--train.steps", "30"], check=True, stdout=subprocess.DEVNULL)
    contexts(data, number)

    print("| process | ended by | replies, from and to | seconds to the first new replies | resident MB at them, at the"
          " end, most | replies a second |\n|---|---|---|---|---|---|")  # fmt: skip
    plan = [(number // 10, signal.SIGKILL), (number // 5, signal.SIGINT), (0, None)]
    there = 0
    for name, (stop, by) in enumerate(plan, 1):
        status, samples = answer(run, data, out, stop, by)
        ended = by.name if by else "finishing"
        expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, None: 0}[by]
        assert status == expected, f"process {name} ended with {status}, not {expected}"
        first = next(sample for sample in samples if sample[1] > there)
        last = samples[-1]
        rate = (last[1] - first[1]) / max(last[0] - first[0], 1e-9)
        print(f"| {name} | {ended} | {there} to {last[1]} | {first[0]:.1f} | {first[2]:.0f}, {last[2]:.0f}, "
              f"{max(sample[2] for sample in samples):.0f} | {rate:.0f} |", flush=True)  # fmt: skip
        there = answered(out)

    lines = out.read_bytes().splitlines(keepends=True)
    ids = [json.loads(line)["id"] for line in lines]
    assert ids == [str(i) for i in range(number)], "a context is answered twice, or not at all"
    print(f"\nevery one of {number} contexts is answered once, in order")

    early = [mb for _, replies, mb in samples if replies < there and replies <= number * 0.3]
    late = [mb for _, replies, mb in samples if replies >= number * 0.9]
    growth = max(late) - max(early)
    print(f"memory of the last process from 30 % of the replies to the end: {growth:+.0f} MB")
    assert growth < FLAT, f"memory is not flat: {growth:.0f} MB"

    few = folder / "first.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:checked]))
    status, _ = answer(run, few, folder / "uninterrupted.jsonl")
    assert status == 0 and (folder / "uninterrupted.jsonl").read_bytes() == b"".join(lines[:checked])
    print(f"the first {checked} lines are to the byte those of a command that was not interrupted")


if __name__ == "__main__":
    main()
