"""Control accuracy: does an independent judge find the wanted personality in the replies?

    python -m miracle_jax.evaluate runs/tiny

The judge is a text classifier per attribute (TF-IDF and logistic regression) that learns from the training answers and
never sees a latent. It reads the reference replies, the replies with the energy, and the replies without it (z stays
at the prior's mean). Its own accuracy on the validation answers stands beside, since no figure here can be better than
its judge.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from miracle_jax import config, dataset, storage
from miracle_jax.attributes import Schema
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.model import Model, load


@dataclass(frozen=True)
class Options:
    """What to evaluate on."""

    data: str = "test"
    """JSONL file whose `tag` labels every attribute, with references. `test` is the bundled test set."""
    per_personality: int = 20
    """Contexts of each personality, drawn from the file with `seed`."""
    seed: int = 0
    sample: config.Sample = field(default_factory=config.Sample)
    decode: config.Decode = field(default_factory=config.Decode)


def train_judges(train: list, schema: Schema) -> list:
    """One text classifier an attribute: words and word pairs of an answer to its aspect."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    judges = []
    for attribute in range(len(schema.names)):
        texts, labels = answers(train, attribute)
        if len(set(labels)) < 2:
            raise UserError(f"the training data has no two aspects of {schema.names[attribute]}; no judge can learn it")
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        judges.append(make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000)).fit(texts, labels))
    return judges


def answers(instances: list, attribute: int) -> tuple[list[str], list[int]]:
    """The target replies of the instances that are labelled for an attribute, and their aspects."""
    labelled = [i for i in instances if i.labels[attribute] >= 0]
    return [i.replies[-1] for i in labelled], [i.labels[attribute] for i in labelled]


def choose(instances: list, per_personality: int, seed: int) -> list:
    """At most `per_personality` instances of every fully labelled personality, drawn with `seed`."""
    groups: dict[tuple[int, ...], list] = {}
    for instance in instances:
        if min(instance.labels) >= 0:
            groups.setdefault(tuple(instance.labels), []).append(instance)
    if not groups:
        raise UserError("no line of the data is labelled for every attribute; control accuracy needs such lines")
    generator = np.random.default_rng(seed)
    chosen = []
    for labels in sorted(groups):
        order = generator.permutation(len(groups[labels]))[:per_personality]
        chosen += [groups[labels][i] for i in sorted(order)]
    return chosen


def evaluate(model: Model, options: Options) -> dict:
    """Scores the model: {"attributes": {name: {"judge", "gold", "with_energy", "without_energy"}}, "mean": ..., ...},
    accuracies as shares."""
    train_files, validation_files, _ = dataset.sources(model.config.data)
    files = dataset.bundled("test") if options.data == "test" else [(None, options.data)]
    train, validation = (
        dataset.read_files(f, model.schema, model.config.data.on_error) for f in (train_files, validation_files)
    )
    test = dataset.read_files(files, model.schema)
    chosen = choose(test, options.per_personality, options.seed)
    contexts = [{"input": i.questions, "output": i.replies} for i in chosen]
    wanted = np.array([i.labels for i in chosen])
    named = [model.schema.describe(i.labels) for i in chosen]
    began = time.perf_counter()
    replies = {
        "with_energy": model.replies(contexts, named, seed=options.seed, sample=options.sample, decode=options.decode),
        "without_energy": model.replies(
            contexts, None, seed=options.seed, sample=options.sample, decode=options.decode
        ),
    }
    seconds = time.perf_counter() - began
    texts = {name: [reply.text for reply in found] for name, found in replies.items()}
    texts = {"gold": [i.replies[-1] for i in chosen]} | texts
    judges = train_judges(train, model.schema)
    attributes = {}
    for a, name in enumerate(model.schema.names):
        scores = {"judge": float(judges[a].score(*answers(validation, a)))}
        for source, found in texts.items():
            scores[source] = float(np.mean(judges[a].predict(found) == wanted[:, a]))
        attributes[name] = scores
    mean = {source: float(np.mean([scores[source] for scores in attributes.values()])) for source in ("judge", *texts)}
    return {
        "contexts": len(chosen), "personalities": len(set(named)), "seconds": round(seconds, 1),
        "not_ok": sum(not reply.ok for reply in replies["with_energy"]), "attributes": attributes, "mean": mean,
        "replies": [
            {"question": instance.questions[-1], "personality": named[i]} | {name: t[i] for name, t in texts.items()}
            for i, instance in enumerate(chosen)
        ],
    }  # fmt: skip


def table(result: dict) -> str:
    """The figures for the terminal, in percent."""
    head = ("attribute", "judge on validation", "gold replies", "with energy", "without energy", "gain")
    rows = [head]
    for name, s in (*result["attributes"].items(), ("mean", result["mean"])):
        figures = [f"{100 * s[k]:.1f}" for k in ("judge", "gold", "with_energy", "without_energy")]
        rows.append((name.replace("_", " "), *figures, f"{100 * (s['with_energy'] - s['without_energy']):+.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    with one_sentence():
        workdir = argv[0] if argv and not argv[0].startswith("-") else ""
        if not workdir and not {"-h", "--help"} & set(argv):
            raise UserError(
                "give the folder of a finished run first, for instance python -m miracle_jax.evaluate runs/tiny"
            )
        run = config.load_run(workdir) if workdir else config.Config()
        options = tyro.cli(
            Options, default=Options(sample=run.sample, decode=run.decode), args=argv[1:] if workdir else argv,
            prog="python -m miracle_jax.evaluate WORKDIR", description=__doc__,
        )  # fmt: skip
        dataclasses.replace(run, sample=options.sample, decode=options.decode).check()
        if options.per_personality < 1:
            raise UserError("--per-personality must be at least 1")
        result = evaluate(load(workdir), options)
        path = Path(workdir) / "evaluation.json"
        with storage.replacing(path) as file:
            file.write(json.dumps(result, indent=1, ensure_ascii=False).encode())
        print(f"accuracy in percent on {result['contexts']} contexts, {result['personalities']} personalities:\n")
        print(table(result))
        if result["not_ok"]:
            print(f"\n{result['not_ok']} latents are not ok; the warning above says why")
        print(f"\nreplies and figures: {path}")


if __name__ == "__main__":
    main()
