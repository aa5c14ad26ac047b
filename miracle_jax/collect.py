"""Dialogues that show one aspect each, by any language model behind an OpenAI-compatible endpoint (section 2.4).

    export OPENAI_API_KEY=...
    python -m miracle_jax.collect --endpoint URL --model NAME --out DIR [--schema attributes.toml] [--topics topics.txt]

The topics are dealt out to training, validation and test, so that no two of these share one. For training and
validation every aspect of every attribute gets a dialogue about every topic, so that topics carry no aspect; for the
test every personality does, which names an aspect of every attribute. What is asked for stands in the schema file
(instructions.py). Each dialogue is in DIR/transcripts.jsonl as soon as it is whole, and the same command goes on from
there.
"""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from miracle_jax import asking, reading, storage, transcripts
from miracle_jax.attributes import UNKNOWN
from miracle_jax.command_line import parse
from miracle_jax.endpoint import Endpoint, Job, Settings
from miracle_jax.errors import Problems, UserError, one_sentence, refuse
from miracle_jax.instructions import Instructions

BUNDLED = Path(__file__).with_name("topics.txt")
MOST_TOPICS = 10_000
LONGEST_TOPIC = 200
"""Characters."""
LARGEST_TOPICS = 2**24
"""Bytes of a file of topics."""
SETTINGS, SCHEMA, JOURNAL = "collection.json", "schema.toml", "transcripts.jsonl"
"""Files of a collection."""

Split = dict[str, list[str]]
"""Topics of "train", "validation" and "test"."""


@dataclass(frozen=True)
class Options(Settings):
    """What is collected, and where."""

    schema: str = ""
    """TOML file of the attributes and the instructions for their aspects. Empty: the paper's three."""
    topics: str = ""
    """File of topics, one a line. Empty: the bundled ones."""
    out: str = ""
    """Folder of the collection."""
    splits: tuple[int, int, int] = (0, 30, 30)
    """Topics for training, validation and test; 0 for training: all the others."""
    per_topic: int = 1
    """Dialogues an aspect and topic, in training and validation. It may grow from run to run."""
    licence: str = ""
    """Of the dialogues, for their data card: what the model's terms allow."""


def read_topics(path: str | Path) -> list[str]:
    """The topics of a file, one a line; empty lines and those that begin with # are none. Raises UserError."""
    topics, problems = {}, Problems()
    for number, line in reading.lines(reading.content(path, LARGEST_TOPICS)):
        try:
            topic = line.decode().strip()
        except UnicodeDecodeError as error:
            problems += [f"{path}:{number}: byte {error.start + 1} is not UTF-8"]
            continue
        if not topic or topic.startswith("#"):
            continue
        if len(topic) > LONGEST_TOPIC or not topic.isprintable():
            problems += [f"{path}:{number}: a topic has at most {LONGEST_TOPIC} characters, none of them for control"]
        elif (first := topics.setdefault(topic.casefold(), (number, topic)))[0] != number:
            problems += [f"{path}:{number}: {topic!r} is in line {first[0]} already"]
    refuse(problems, f"{path} is no list of topics; mend it")
    if not 0 < len(topics) <= MOST_TOPICS:
        raise UserError(f"{path} has {len(topics):,} topics; expected one a line, and at most {MOST_TOPICS:,}")
    return [topic for _, topic in topics.values()]


def split_topics(topics: Sequence[str], splits: tuple[int, int, int], seed: int) -> Split:
    """Disjoint lists, in an order that depends on the seed only. splits: as Options has them."""
    train, validation, test = splits
    if min(splits) < 0:
        raise UserError(f"--splits {' '.join(map(str, splits))}: expected three numbers of topics from 0 on")
    if validation + test + max(train, 1) > len(topics):
        raise UserError(
            f"there are {len(topics):,} topics, too few for {validation:,} in validation, {test:,} in the test and "
            f"{train or 'some'} in training; add topics, or give other --splits"
        )
    order = sorted(topics, key=lambda topic: hashlib.sha256(f"{seed}/{topic}".encode()).digest())
    rest = order[validation + test :]
    return {"train": rest[:train] if train else rest, "validation": order[test:][:validation], "test": order[:test]}


def jobs(instructions: Instructions, topics: Split, per_topic: int) -> tuple[Iterator[Job], int]:
    """All that is to be collected, and its number. At whatever job one stops, the aspects are balanced up to one topic,
    and the splits have the same shares of their topics."""
    schema = instructions.schema
    single = [
        tuple(i if index == a else UNKNOWN for index in range(len(schema.sizes)))
        for a, size in enumerate(schema.sizes)
        for i in range(size)
    ]
    every = schema.personalities() if topics["test"] else []
    wanted = {"train": single, "validation": single, "test": every}
    order = sorted(
        ((i + 0.5) / len(some), split, i, topic) for split, some in topics.items() for i, topic in enumerate(some)
    )

    def made():
        for k in range(per_topic):
            for _, split, i, topic in order:
                for labels in wanted[split] if not k or split != "test" else ():
                    yield _job(instructions, labels, split, topic, f"{i:04d}/{k}")

    number = (len(topics["train"]) + len(topics["validation"])) * len(single) * per_topic
    return made(), number + len(topics["test"]) * len(every)


def _job(instructions: Instructions, labels: Sequence[int], split: str, topic: str, number: str) -> Job:
    tag = instructions.schema.tag(labels)
    name = ",".join(f"{attribute}={aspect}" for attribute, aspect in tag.items())
    return Job(
        f"{split}/{name}/{number}",
        [{"role": "user", "content": instructions.dialogue(labels, topic)}],
        transcripts.parse,
        {"split": split, "tag": tag, "topic": topic},
    )


def begin(folder: Path, options: Options, instructions: Instructions, topics: Split) -> None:
    """Writes what a collection depends on into its folder. Raises UserError where it has dialogues that depend on
    something else."""
    schema = folder / SCHEMA
    facts = asking.facts(options) | {
        "per_topic": options.per_topic, "licence": options.licence, "topics": topics,
        "schema": hashlib.sha256(instructions.text.encode()).hexdigest(),
    }  # fmt: skip
    asking.pin(folder / SETTINGS, facts, folder / JOURNAL, free=("licence",), growing=("per_topic",))
    with storage.disk_errors(str(schema), asking.INTACT), storage.replacing(schema) as file:
        file.write(instructions.text.encode())


def collect(options: Options) -> asking.Totals:
    """Collects what is not there yet. Raises UserError where that has to stop."""
    if not options.out or storage.is_remote(options.out):
        raise UserError("name the local folder of the collection: --out DIR")
    if options.per_topic < 1:
        raise UserError(f"--per-topic {options.per_topic}: expected a number from 1 on")
    endpoint, folder = Endpoint(options), Path(options.out).expanduser()
    instructions = Instructions.load(options.schema)
    topics = split_topics(read_topics(options.topics or BUNDLED), options.splits, options.seed)
    wanted, number = jobs(instructions, topics, options.per_topic)
    with storage.locked(folder, "--out"):
        begin(folder, options, instructions, topics)
        return asking.run(endpoint, wanted, number, folder / JOURNAL)


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        began = time.monotonic()
        argv = sys.argv[1:] if argv is None else argv
        options = parse(Options(), argv, "python -m miracle_jax.collect", __doc__)
        totals = collect(options)
        print(f"{totals}\nthis run took {time.monotonic() - began:,.0f} s")
        if totals.failed and not totals.done:
            raise UserError(f"{options.out} has no dialogue: every job has failed, for the reasons above")


if __name__ == "__main__":
    main()
