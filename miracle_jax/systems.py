"""What is compared: systems that answer a test set, be they runs of ours in several variants or files of replies.

Axis letters: N replies, A attributes.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from miracle_jax import cluster, config, dataset, generate, mesh, reading, report, storage
from miracle_jax.attributes import UNKNOWN, Schema
from miracle_jax.errors import UserError
from miracle_jax.model import Model
from miracle_jax.predictions import LONGEST_REPLY, read_answers
from miracle_jax.scores import Scores

REFERENCES = "references"
"""The system that is the test set's own replies."""
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0, 128.0)
"""Of the energy, in the curve of its strength. The released code's slip amounts to 128 (its batch size)."""
DRAWS = (1, 2, 4, 8, 16)
"""Latents a context, of which the one of lowest energy speaks, in that curve."""


@dataclass(frozen=True)
class TestSet:
    """The contexts to answer, and what is wanted of the replies."""

    __test__ = False  # pytest would take it for a test

    schema: Schema
    ids: tuple[str, ...]
    """Of all instances of the file."""
    chosen: dict[str, dataset.Instance]
    """By id."""

    @property
    def labels(self) -> np.ndarray:
        """(N, A) aspect ids, -1 where unknown."""
        return np.array([instance.labels for instance in self.chosen.values()])

    def tasks(self, wanted: np.ndarray, ids: Sequence[str]) -> list[dict]:
        """A task an id, with the wanted aspects (N, A) as its personality."""
        return [
            generate.task_of(0, dataclasses.replace(self.chosen[i], id=i), self.schema.describe(row))
            for i, row in zip(ids, wanted.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Variant:
    """A way in which a run answers."""

    name: str
    sample: config.Sample
    samples: int = 1
    asked: tuple[bool, ...] = ()
    """Which attributes are controlled."""
    judged: tuple[bool, ...] = ()
    """Which attributes count."""
    strength: tuple[str, str, float] | None = None
    """Its place in a curve: (run, "lambda", 4.0)."""


@dataclass
class System:
    """Replies to a test set, and what is known of how they came about."""

    name: str
    replies: list[str]
    """To every chosen instance, with its own labels."""
    wanted: np.ndarray
    """(N, A) aspect ids that count, -1 for none."""
    everything: list[str] | None = None
    """To every instance with every personality, the personalities of an instance together."""
    facts: dict = field(default_factory=dict)
    strength: tuple[str, str, float] | None = None
    scores: Scores | None = None
    counterfactual: np.ndarray | None = None
    """(instances, personalities, A), as `scores.accuracy`."""


def read_test_set(data: str, schema: Schema, per_personality: int, seed: int) -> TestSet:
    """The instances of a file, as `choose` chooses them. data: as `dataset.labelled_source` reads it."""
    instances = dataset.read_files(dataset.labelled_source(data, schema), schema)
    ids = [instance.id or str(number) for number, instance in enumerate(instances)]
    if repeated := sorted(i for i, times in Counter(ids).items() if times > 1):
        raise UserError(f"{data} has several instances with the id {', '.join(repeated[:20])}; number them anew")
    unknown = [i for i, instance in zip(ids, instances, strict=True) if instance.labels == schema.unknown]
    if unknown:
        raise UserError(f"{data}: no aspect of id {unknown[0]} is known, so nothing tells what to ask for; remove it")
    long = [i for i, instance in zip(ids, instances, strict=True) if len(instance.replies[-1]) > LONGEST_REPLY]
    if long:
        raise UserError(f"{data}: the reply of id {long[0]} has more than {LONGEST_REPLY:,} characters; cut it")
    numbered = dict(zip(ids, instances, strict=True))
    return TestSet(schema, tuple(ids), choose(numbered, per_personality, seed))


def choose(instances: Mapping[str, dataset.Instance], per_personality: int, seed: int) -> dict[str, dataset.Instance]:
    """At most `per_personality` instances of every personality, drawn with `seed`; all of them where it is 0. The
    personalities come in the order of their ids."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for i, instance in instances.items():
        groups.setdefault(tuple(instance.labels), []).append(i)
    if not per_personality:
        return {i: instances[i] for i in itertools.chain(*(groups[labels] for labels in sorted(groups)))}
    generator, chosen = np.random.default_rng(seed), []
    for labels in sorted(groups):
        order = generator.permutation(len(groups[labels]))[:per_personality]
        chosen += [groups[labels][i] for i in sorted(order)]
    return {i: instances[i] for i in chosen}


def variants_of(kind: str, name: str, sample: config.Sample, schema: Schema) -> list[Variant]:
    """The variants of a run, of which the first is the run as it is. kind: as `evaluate.Options.variants`."""
    number = len(schema.names)
    everything, nothing = (True,) * number, (False,) * number
    whole = Variant(name, sample, 1, everything, everything)
    if kind == "energy":
        return [whole, Variant(f"{name} w/o energy", sample, 1, nothing, everything)]
    if kind == "attributes":
        alone = [tuple(i == a for i in range(number)) for a in range(number)]
        short = schema.short_names
        return [whole] + [Variant(f"{name}: {short[a]}", sample, 1, mask, mask) for a, mask in enumerate(alone)]
    if kind == "strength":
        weights = [
            Variant(
                f"{name}, lambda {weight:g}", dataclasses.replace(sample, weight=weight), 1, everything, everything,
                (name, "lambda", weight),
            )
            for weight in WEIGHTS
        ]  # fmt: skip
        drawn = dataclasses.replace(sample, start="draw")
        draws = [Variant(f"{name}, K {k}", drawn, k, everything, everything, (name, "K", k)) for k in DRAWS]
        return [whole, *weights, *draws]
    return [whole]


def answer(
    model: Model, variant: Variant, test: TestSet, decode: config.Decode, counterfactual: bool, seed: int, folder: Path
) -> System | None:
    """The variant's replies; those that are in `folder` already are taken from there. None on all processes but the
    first, which answer too."""
    wanted = np.where(np.array(variant.judged), test.labels, UNKNOWN)
    own = test.tasks(np.where(np.array(variant.asked), test.labels, UNKNOWN), list(test.chosen))
    every = []
    if counterfactual:
        ids, rows = everything(test)
        every = test.tasks(np.where(np.array(variant.asked), rows, UNKNOWN), ids)
    tasks = list({(task["id"], task["personality"]): task for task in own + every}.values())
    asked = generate.Options(
        personality="labelled", samples=variant.samples, seed=seed, sample=variant.sample, decode=decode
    )
    path = folder / f"{_slug(variant.name)}-{generate.digest(model, tasks, asked, {})}.jsonl"
    timing = path.with_suffix(".json")
    if not cluster.tell(path.exists()):
        with _stopwatch() as clock:
            written = generate.write_file(model, tasks, dataclasses.replace(asked, out=str(path)), {})
        if cluster.first():
            with storage.replacing(timing) as file:
                file.write(json.dumps(clock | {"replies": written, "on": mesh.hardware()}).encode())
    if not cluster.first():
        return None
    damaged = f"{path} is damaged; delete it, and the contexts are answered again"
    not_ok = sum(not reading.parse_object(line, damaged).get("ok") for _, line in reading.lines(storage.read(path)))
    facts = {"replies": len(tasks), "not_ok": not_ok, "settings": _settings(variant, decode)}
    if timing.exists():
        known = reading.json_object(timing)
        try:
            if known["replies"]:
                rate = 1000 * known["seconds"] / known["replies"]
                facts |= {"seconds_per_1000": rate, "answered": known["replies"], "answered_on": known["on"]}
        except (KeyError, TypeError):
            raise UserError(f"{timing} is damaged; delete it") from None
    replies = read_answers(str(path), own, test.ids, test.schema)
    to_every = read_answers(str(path), every, test.ids, test.schema) if every else None
    return System(variant.name, replies, wanted, to_every, facts, variant.strength)


def _settings(variant: Variant, decode: config.Decode) -> dict:
    """What differs from the defaults of config.Sample and config.Decode, by flag."""
    changed = {"samples": variant.samples} if variant.samples > 1 else {}
    for group, part in (("sample", variant.sample), ("decode", decode)):
        for name, default in dataclasses.asdict(type(part)()).items():
            if getattr(part, name) != default:
                changed[f"{group}.{name}"] = getattr(part, name)
    return changed


def read(name: str, path: str, test: TestSet, counterfactual: bool) -> System:
    """A system whose replies are in a file."""
    replies = read_answers(path, test.tasks(test.labels, list(test.chosen)), test.ids, test.schema)
    every = None
    if counterfactual:
        ids, rows = everything(test)
        try:
            every = read_answers(path, test.tasks(rows, ids), test.ids, test.schema)
        except UserError as error:
            print(f"{name} has no counterfactual figures: {error}", file=sys.stderr)
    return System(name, replies, test.labels, every)


def everything(test: TestSet) -> tuple[list[str], np.ndarray]:
    """Every instance with every personality: ids and aspects (N x personalities, A)."""
    personalities = test.schema.personalities()
    ids = [i for i in test.chosen for _ in personalities]
    return ids, np.array(personalities * len(test.chosen))


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+]+", "-", name)


@contextlib.contextmanager
def _stopwatch():
    """A dict that has, after the block, its "seconds" without compilation, and "compilation" in seconds."""
    clock, compilations = {}, []

    def listen(name, seconds, **_):
        # Tracing is left out: traces contain each other, and their seconds would count twice.
        if name.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            compilations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    try:
        yield clock
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        clock["compilation"] = sum(compilations)
        clock["seconds"] = time.perf_counter() - began - clock["compilation"]


def training(workdir: Path) -> dict:
    """How long the run's training took and on what, as far as its folder tells."""
    if not (workdir / "metrics.jsonl").exists() or not (workdir / "model.json").exists():
        return {}
    batch_size = config.load_run(workdir).train.batch_size
    trained_on = reading.json_object(workdir / "model.json").get("hardware")
    seconds = report.training_seconds(workdir / "metrics.jsonl", batch_size)
    return {"training_seconds": seconds, "trained_on": trained_on}
