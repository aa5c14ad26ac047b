"""Many jobs for an endpoint, each answered once, into a journal that a run which was killed goes on from."""

import asyncio
import datetime
import itertools
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from miracle_jax import __version__, reading, responses, storage
from miracle_jax.endpoint import Endpoint, Job, Settings
from miracle_jax.errors import SHOWN, UserError, refuse
from miracle_jax.journal import DONE, Journal, read_journal

LONGEST_SHOWN = 60
"""Characters of a setting that is quoted."""
EVERY = 60.0
"""Seconds between two lines about the progress where there is no terminal for a bar."""


class Totals:
    """What became of the jobs in all runs, and what that took."""

    def __init__(self, settings: Settings, number: int):
        self.settings, self.number = settings, number
        self.done: set[str] = set()
        self.failed: dict[str, tuple[str, dict[str, int]]] = {}
        """Reason and counts by id."""
        self.counts: Counter[str] = Counter()

    def add(self, record: Mapping[str, Any]) -> None:
        counts = {name: responses.count(record, name) for name in responses.COUNTS}
        _, before = self.failed.pop(record["id"], ("", {}))
        self.counts.update(counts)
        self.counts.subtract(before)  # the new record's counts have them too
        if record["status"] == DONE:
            self.done.add(record["id"])
        else:
            self.failed[record["id"]] = record["reason"], counts

    @property
    def cost(self) -> float:
        """USD."""
        return self.settings.cost(self.counts["prompt_tokens"], self.counts["completion_tokens"])

    @property
    def spent(self) -> bool:
        return 0 < self.settings.budget <= self.cost

    def line(self) -> str:
        """Failures, tokens and cost so far."""
        asked, answered = self.counts["prompt_tokens"], self.counts["completion_tokens"]
        paid = f", ${self.cost:,.2f}" if self.settings.price_in or self.settings.price_out else ""
        return f"{len(self.failed):,} failed, {asked:,} + {answered:,} tokens{paid}"

    def __str__(self) -> str:
        jobs = len(self.done) + len(self.failed)
        again = self.counts["requests"] - jobs
        text = [f"{len(self.done):,} of {self.number:,} done, {self.line()}"]
        text += [f"{self.counts['requests']:,} requests, {again:,} of them beyond one a job"]
        reasons = Counter(reason.split(": ")[0] for reason, _ in self.failed.values())
        text += [f"failed: {number:,} {reason}" for reason, number in reasons.most_common(SHOWN)]
        if self.failed:
            text.append("ask for what failed again with --again failed")
        if self.spent:
            left = self.number - jobs
            text.append(f"the budget of ${self.settings.budget:,.2f} is spent; {left:,} jobs have not been asked")
        return "\n".join(text)


INTACT = "what has been answered is intact"


def facts(settings: Settings) -> dict[str, Any]:
    """What all answers depend on, and when and with what they were first asked for."""
    import openai

    versions = {"miracle_jax": __version__, "openai": openai.__version__, "python": platform.python_version()}
    begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "begun": begun, "endpoint": settings.endpoint, "model": settings.model, "seed": settings.seed,
        "sampling": settings.parameters(), "versions": versions,
    }  # fmt: skip


def pin(
    path: Path, facts: dict[str, Any], journal: Path, free: Collection[str] = (), growing: Collection[str] = ()
) -> None:
    """Writes what the answers in a journal depend on.

    free: facts that may be others when a run goes on; an empty one stays as it was. growing: numbers that may grow.
    Raises UserError, which lists the differences, where the answers that are there depend on something else. Where no
    job has been answered, only refused, whatever is to be mended in the flags may be.
    """
    if journal.exists() and any(record["status"] == DONE or record["text"] for record in read_journal(journal)):
        before = reading.json_object(path)
        free = {*free, "begun", "versions"}
        differences = _differences(_flat(before, free), _flat(facts, free), growing)
        refuse(differences, f"{path.parent} cannot be gone on with; give another --out")
        kept = {"begun", *(name for name in free if not facts[name])}
        facts = facts | {name: before[name] for name in kept if name in before}
    with storage.disk_errors(str(path), INTACT), storage.replacing(path) as file:
        file.write(json.dumps(facts, indent=1).encode() + b"\n")


def _flat(facts: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """The facts that count, with those of the sampling one by one."""
    sampling = facts.get("sampling")
    counted = {name: value for name, value in facts.items() if name not in free and name != "sampling"}
    return counted | (sampling if isinstance(sampling, dict) else {"sampling": sampling})


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], growing: Collection[str]) -> list[str]:
    found = []
    for name in dict.fromkeys([*now, *before]):
        one, two = before.get(name), now.get(name)
        brief = all(isinstance(v, str | int | float | None) and len(str(v)) < LONGEST_SHOWN for v in (one, two))
        shown = f"{one!r} there, {two!r} here" if brief else "not the same as there"
        if name in growing and type(one) is int:
            found += [f"{name}: {shown}; it can only grow"] if one > two else []
        elif one != two:
            found.append(f"{name}: {shown}")
    return found


def run(endpoint: Endpoint, jobs: Iterable[Job], number: int, path: Path) -> Totals:
    """Asks for all jobs that have no record in the journal yet; with --again failed, also for those that failed.

    Args:
      jobs: each with an id of its own; a few at a time are taken from it.
      number: of them.
      path: of the journal, in a folder that is locked.
    Raises UserError where the run has to stop; whatever has been answered is in the journal.
    """
    settings, totals = endpoint.settings, Totals(endpoint.settings, number)
    with Journal(path) as journal:
        for record in read_journal(path):
            totals.add(record)
        earlier = totals.failed.copy() if settings.again else {}

        def unanswered() -> Iterator[tuple[Job, Mapping[str, int] | None]]:
            for job in jobs:
                if job.id in earlier:
                    yield job, earlier[job.id][1]
                elif job.id not in totals.done and job.id not in totals.failed:
                    yield job, None

        some = itertools.islice(unanswered(), settings.limit or None)
        with _Progress(totals, len(totals.done) + len(totals.failed) - len(earlier)) as progress:
            asyncio.run(_ask(endpoint, some, journal, totals, progress))
    return totals


async def _ask(endpoint: Endpoint, jobs: Iterator, journal: Journal, totals: Totals, progress: "_Progress") -> None:
    async def work() -> None:
        for job, before in jobs:
            record = await endpoint.answer(job, before)
            journal.append(record)
            totals.add(record)
            progress.step()
            endpoint.check_alive(record["reason"])
            if totals.settings.budget and record["text"] and not record["completion_tokens"]:
                raise UserError("the endpoint does not say what its answers cost (usage), so no --budget can be kept")
            if totals.spent:
                return

    if totals.spent:
        return
    async with endpoint:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(totals.settings.in_flight, totals.number)):
                    group.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, totals: Totals, ended: int):
        import tqdm

        self._totals, self._ended, self._first = totals, ended, ended
        self._began = self._said = time.monotonic()
        self._bar = tqdm.tqdm(
            total=totals.number, initial=ended, unit="job", file=sys.stderr, disable=None, dynamic_ncols=True
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def step(self) -> None:
        self._ended += 1
        self._bar.set_postfix_str(self._totals.line(), refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and now - self._said >= EVERY:
            self._said, number = now, self._totals.number
            minutes = (number - self._ended) * (now - self._began) / (self._ended - self._first) / 60
            line = f"{self._ended:,} of {number:,}, {self._totals.line()}, about {minutes:,.0f} min to go"
            print(line, file=sys.stderr, flush=True)
