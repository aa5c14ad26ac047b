"""Where the time of a run goes, and what share of it is goodput: steps that count.

Seconds are kept by account: `start` (data, shapes), `restore` (or the first parameters), `compile`, `steps`, `data`
(batches that the devices waited for), `validation`, `save`, `heads` (warm-up and stage 2). metrics.jsonl gets what was
added since the last line at every log interval, also over resumptions; there `repeated` are steps that a killed process
took after its last checkpoint. What it had not yet logged when it was killed is not known.
"""

import contextlib
import time
from collections import defaultdict
from pathlib import Path

from miracle_jax import compiled, reading

SPLIT = "goodput"
"""Of the lines in metrics.jsonl."""


class Ledger:
    """The seconds of a process; at any time one account is open."""

    def __init__(self):
        self.account = "start"
        """The open one. Set anew, what has passed since it was opened goes to the new one."""
        self._seconds = defaultdict(float)
        self._since, self._programs = time.perf_counter(), len(compiled.PROGRAMS)

    def open(self, account: str) -> str:
        """What comes from here on belongs to `account`. Returns the one that was open."""
        now, programs = time.perf_counter(), compiled.PROGRAMS[self._programs :]
        compiling = sum(program.seconds for program in programs)
        self._seconds["compile"] += compiling
        self._seconds[self.account] += max(now - self._since - compiling, 0.0)
        self._since, self._programs = now, self._programs + len(programs)
        before, self.account = self.account, account
        return before

    @contextlib.contextmanager
    def of(self, account: str):
        """The block belongs to `account`."""
        before = self.open(account)
        try:
            yield
        finally:
            self.open(before)

    def take(self) -> dict[str, float]:
        """What was added since the last call."""
        self.open(self.account)
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return {account: round(spent, 4) for account, spent in seconds.items() if round(spent, 4)}


def repeated(row: dict, step: int) -> dict:
    """A line of metrics.jsonl as it counts in a run that resumes from `step`."""
    if row["step"] <= step:
        return row
    row = row | {"step": step, "repeated": row.get("repeated", 0.0) + row.get("steps", 0.0)}
    row.pop("steps", None)
    return row


def total(metrics: Path) -> dict[str, float]:
    """Seconds by account of all processes of a run, the largest first."""
    seconds = defaultdict(float)
    for row in reading.metrics(metrics):
        if row.get("split") == SPLIT:
            for account, spent in row.items():
                if account not in ("step", "split"):
                    seconds[account] += spent
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def sentence(seconds: dict[str, float]) -> str:
    """What `total` gives, for people."""
    everything = sum(seconds.values())
    rest = ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items() if name != "steps")
    useful = seconds.get("steps", 0.0)
    return f"goodput {useful / max(everything, 1e-9):.0%}: {useful:.1f} of {everything:.1f} s in steps; {rest}"
