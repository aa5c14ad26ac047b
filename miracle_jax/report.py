"""What a run tells: a progress bar or log lines, metrics.jsonl, training.png, and trackers that are off by default."""

import datetime
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from miracle_jax import compiled, config, goodput, reading, storage
from miracle_jax.errors import UserError


class Report:
    """Where numbers go. Only the first process writes."""

    def __init__(self, workdir: str | Path, settings: config.Train, start: int, total: int):
        """start: steps already done (a resumed run); total: steps of stage 1."""
        self.first = jax.process_index() == 0
        self.path = Path(workdir) / "metrics.jsonl"
        self.batch_size = settings.batch_size
        self.total = total
        self.last = (start, time.perf_counter())
        self.last_progress = start
        self.programs, self.told = 0, set()  # that were spoken of
        interactive = self.first and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if interactive else None
        if self.first:
            self._forget_after(start)
        self.trackers = self._trackers(Path(workdir), settings) if self.first else []

    def _forget_after(self, step: int) -> None:
        """Drops what a stopped run logged after its last checkpoint, but for the time spent: those steps run again."""
        if self.path.exists():
            rows = reading.metrics(self.path)
            rows = [goodput.repeated(row, step) if row.get("split") == goodput.SPLIT else row for row in rows]
            kept = [row for row in rows if row["step"] <= step]
            with storage.disk_errors(str(self.path)), storage.replacing(self.path) as file:
                file.write("".join(json.dumps(row) + "\n" for row in kept).encode())

    def _trackers(self, workdir: Path, settings: config.Train) -> list:
        trackers = []
        if settings.tensorboard:
            tensorboard = _optional("tensorboardX", "train.tensorboard", "tensorboard")
            writer = tensorboard.SummaryWriter(str(workdir / "tensorboard"))
            trackers.append(
                lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()] + [writer.flush()]
            )
        if settings.trackio:
            trackio = _optional("trackio", "train.trackio", "trackio")
            trackio.init(project="miracle-jax", name=workdir.name)
            trackers.append(lambda step, values: trackio.log(values, step=step))
        return trackers

    def progress(self, step: int) -> None:
        """Moves the bar to `step`; called every step, touches no device."""
        if self.bar is not None:
            self.bar.update(step - self.last_progress)
        self.last_progress = step

    def training(self, step: int, values: dict[str, float]) -> float:
        """One log interval of stage 1: the mean losses since the last one, and the speed. Returns its seconds."""
        before, then = self.last
        now = time.perf_counter()
        rate = (step - before) / max(now - then, 1e-9)
        self.last = (step, now)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(f"{rate * self.batch_size:.0f} examples/s  {shown}", refresh=False)
        else:
            left = datetime.timedelta(seconds=round((self.total - step) / rate))
            self.say(f"step {step}/{self.total}  {shown}  {rate * self.batch_size:.0f} examples/s  ETA {left}")
        self.write("train", step, values | {"examples_per_second": rate * self.batch_size})
        return now - then

    def pause(self) -> float:
        """Start of something that must not count as training time; hand the result to `resume`."""
        return time.perf_counter()

    def resume(self, paused: float) -> None:
        step, then = self.last
        self.last = (step, then + time.perf_counter() - paused)

    def compiled(self, shape: tuple[int, ...]) -> None:
        """Says what was compiled since the last call, if it took a second. shape: widths of the batch just seen."""
        programs, self.programs = compiled.PROGRAMS[self.programs :], len(compiled.PROGRAMS)
        for program in programs:
            if program.seconds >= 1.0 or program.name == "train_step":
                of = ""
                if program.name == "train_step":
                    of = f" for lengths {shape}"
                    of += ", packed otherwise," if shape in self.told else ""
                    self.told.add(shape)
                how = "read from the cache" if program.kept else "compiled"
                self.say(f"{program.name}{of} {how} in {program.seconds:.1f} s")

    def write(self, split: str, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and feeds the trackers; nothing if there are no values."""
        if not self.first or not values:
            return
        line = json.dumps({"step": step, "split": split} | values)
        with storage.disk_errors(str(self.path)), self.path.open("a") as file:
            file.write(line + "\n")
        for track in self.trackers:
            track(step, {f"{split}/{name}": value for name, value in values.items()})

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self.first:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def plot(self) -> None:
        """Draws training.png from metrics.jsonl: every loss, training and validation."""
        if not self.first or not self.path.exists():
            return
        from matplotlib.figure import Figure  # no pyplot: it would look for a display

        rows = reading.metrics(self.path)
        panels = {
            "reconstruction (nats a token)": ["reconstruct", "reconstruct_posterior", "reconstruct_prior"],
            "KL with its floor (nats)": ["kl", "kl_floored"],
            "classification (nats a label)": ["classify"],
            "attribute distance": ["gap"],
        }
        figure = Figure(figsize=(11, 7), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            for split in ("train", "validation"):
                for name in names:
                    points = [(r["step"], r[name]) for r in rows if r.get("split") == split and name in r]
                    if points:
                        axes.plot(
                            *zip(*points, strict=True),
                            "o-" if split == "validation" else "-",
                            ms=3,
                            label=f"{split} {name}",
                        )
            axes.set(title=title, xlabel="step")
            if axes.lines:
                axes.legend()
        with storage.replacing(self.path.with_name("training.png")) as file:
            figure.savefig(file, format="png", dpi=120)


def training_seconds(metrics: Path, batch_size: int) -> float:
    """What the steps that a metrics.jsonl tells of took, also those before the run was resumed; without validations and
    checkpoints."""
    rows = [row for row in reading.metrics(metrics) if row.get("split") == "train"]
    rows = [row for row in rows if row.get("examples_per_second", 0) > 0]
    steps = np.diff([row["step"] for row in rows], prepend=0)
    return float(np.sum(steps * batch_size / [row["examples_per_second"] for row in rows]))


def _optional(module: str, flag: str, extra: str):
    try:
        return __import__(module)
    except ImportError:
        raise UserError(f"{flag} is on but {module} is not installed; pip install 'miracle-jax[{extra}]'") from None
