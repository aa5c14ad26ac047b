"""A collection of 100,000 dialogues, cleaned: how long it takes, in how much memory, and whether it finds what was
planted.

    python -m tests.clean_scale [--dialogues 100000]

The dialogues are chains of words from the bundled corpus, so that they are varied, English of a kind, and show their
aspect. Planted among them are duplicates, other languages, turns that break a rule, refusals, and dialogues of the
other aspect. It fails unless they are dropped for the right reason: all of them, of near duplicates, languages and
aspects, which are matters of degree, nearly all.

It also fails where the command needs more than MOST_MEMORY. That is the operating system's figure, so it needs Linux.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from miracle_jax import attributes, dataset
from miracle_jax.attributes import Schema

MOST_MEMORY = 2**31
"""Bytes, for 100,000 dialogues."""
PLANTED = {
    "failed": ({"collection"}, 1.0), "refusal": ({"parsing"}, 1.0), "short": ({"rules"}, 1.0),
    "asks": ({"rules"}, 1.0), "placeholder": ({"rules"}, 1.0), "copy": ({"duplicates"}, 1.0),
    "near": ({"duplicates"}, 0.98), "german": ({"language", "duplicates"}, 0.99),
    "other": ({"round 1", "round 2"}, 0.9),
}  # fmt: skip
"""What is planted, the stages that have to drop it, and the share of it that has to be dropped there. There are few
German sentences, so that dialogues of them are duplicates too."""
SHARE = 0.02
"""Of each."""
GERMAN = (
    "Das weiß ich leider nicht so genau.", "Wir sind gestern erst spät am Abend nach Hause gekommen.",
    "Mein Bruder wohnt seit vielen Jahren in einem Dorf am Fluss.", "Ich koche am liebsten mit frischem Gemüse.",
    "Im Sommer fahren wir wieder ans Meer und bleiben drei Wochen dort.", "Das Wetter war heute wirklich sehr schön.",
    "Meine Großmutter hat mir früher oft Geschichten vorgelesen.", "Am Sonntag gehen wir gern im Wald spazieren.",
)  # fmt: skip


class Writer:
    """Chains of words for every aspect of the bundled corpus."""

    def __init__(self, seed: int):
        self.random, self.schema = random.Random(seed), Schema.load()
        instances = dataset.read_files(dataset.bundled("train"), self.schema)
        self.topics = list(dict.fromkeys(i.topic for i in instances))
        self.questions = sorted({i.questions[-1] for i in instances if len(i.questions[-1].split()) < 25})
        self.next = defaultdict(lambda: defaultdict(list))
        for instance in instances:
            words = instance.replies[-1].replace(".", "").replace("?", "").replace("!", "").split()
            for one, two in zip(["", *words], words, strict=False):
                self.next[instance.labels][one].append(two)

    def answer(self, labels) -> str:
        following, words = self.next[labels], []
        while len(words) < self.random.randint(8, 25):
            last = words[-1] if words else ""
            words.append(self.random.choice(following.get(last) or following[""]))
        return " ".join(words) + "."

    def turns(self, labels) -> list[list[str]]:
        number = self.random.randint(4, 6)
        single = [tuple(a if i == index else -1 for i in range(3)) for index, a in enumerate(labels) if a >= 0]
        questions = self.random.sample(self.questions, number)
        return [[question, self.answer(self.random.choice(single))] for question in questions]


def write(folder: Path, number: int, seed: int = 0) -> dict[str, str]:
    """A collection of that many dialogues. Returns {id: what is planted there}."""
    writer = Writer(seed)
    draw, schema = writer.random, writer.schema
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.toml").write_bytes(attributes.BUNDLED.read_bytes())
    settings = {"endpoint": "http://127.0.0.1/v1", "model": "chains", "begun": "2024-01-01", "seed": seed}
    (folder / "collection.json").write_text(json.dumps(settings | {"licence": "CC0-1.0"}))
    singles = [tuple(i if a == index else -1 for a in range(3)) for index in range(3) for i in range(2)]
    cut = max(len(writer.topics) // 10, 1)
    topics = {
        "test": writer.topics[:cut],
        "validation": writer.topics[cut : 2 * cut],
        "train": writer.topics[2 * cut :],
    }
    planted, earlier = {}, []
    with (folder / "transcripts.jsonl").open("w", encoding="utf-8") as file:
        for i in range(number):
            block = i // len(singles)
            split = {0: "test", 1: "validation"}.get(block % 20, "train")
            every = schema.personalities()
            labels = every[(block // 20 * 6 + i % 6) % len(every)] if split == "test" else singles[i % 6]
            of = topics[split]
            topic = of[(block if split == "train" else block // 20) % len(of)]
            record = {"id": f"{split}/{i:07d}", "split": split, "topic": topic, "status": "done"}
            kind = draw.choice(list(PLANTED)) if draw.random() < SHARE * len(PLANTED) and split == "train" else ""
            turns = writer.turns(labels)
            if kind == "other":
                turns = writer.turns(tuple(1 - a if a >= 0 else -1 for a in labels))
            elif kind in ("copy", "near") and earlier:
                labels, turns = draw.choice(earlier)
                turns = [list(turn) for turn in turns]
                if kind == "near":
                    turns[0][1] = "Well, " + turns[0][1]
            elif kind == "short":
                turns[1][1] = "So it is."
            elif kind == "asks":
                turns[0][1] = turns[0][1].replace(".", "?")
            elif kind == "placeholder":
                turns[0][0] = "..."
            elif kind == "german":
                turns = [[draw.choice(GERMAN), answer] for answer in draw.sample(GERMAN, 4)]
                turns[-1][1] += f" Das war im Jahr {i}."
            elif not kind and split == "train" and draw.random() < 0.05:
                earlier.append((labels, turns))
            text = "\n".join(f"A: {question}\nB: {answer}" for question, answer in turns)
            if kind == "refusal":
                text = "I'm sorry, but I can't write that."
            record |= {"tag": schema.tag(labels)}
            failed = kind == "failed"
            record |= {"status": "failed", "reason": "HTTP 500"} if failed else {"reason": ""}
            file.write(json.dumps(record | {"text": text}) + "\n")
            if kind and (kind not in ("copy", "near") or earlier):
                planted[record["id"]] = kind
    return planted


def found(out: Path, planted: dict[str, str]) -> Counter:
    """How many of each kind the right stage dropped."""
    counts = Counter()
    for line in (out / "dropped.jsonl").open():
        drop = json.loads(line)
        kind = planted.get(drop["id"])
        if kind and not drop["kept_turns"] and drop["stage"] in PLANTED[kind][0]:
            counts[kind] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=100_000)
    number = parser.parse_args().dialogues
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = write(folder / "collected", number)
        size = (folder / "collected" / "transcripts.jsonl").stat().st_size
        print(f"{number:,} dialogues, {size / 1e6:.0f} MB")
        began = time.monotonic()
        command = [sys.executable, "-m", "miracle_jax.clean", str(folder / "collected"), "--out", str(folder / "out")]
        subprocess.run(command, check=True)
        seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(f"cleaned in {seconds:.0f} s, at most {peak / 1024:.0f} MiB resident")
        counts = found(folder / "out", planted)
        failures = [f"its place in {MOST_MEMORY >> 20:,} MiB"] if peak * 1024 > MOST_MEMORY else []
        for kind, (stages, share) in PLANTED.items():
            there = sum(other == kind for other in planted.values())
            print(f"{kind}: {there:,} planted, {counts[kind]:,} dropped by {' or '.join(sorted(stages))}")
            failures += [kind] if counts[kind] < share * there else []
        if failures:
            raise SystemExit(f"not found: {', '.join(failures)}")


if __name__ == "__main__":
    main()
