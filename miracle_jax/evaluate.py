"""Control accuracy: does an independent judge find the wanted personality in the replies? And what does it cost?

    python -m miracle_jax.evaluate runs/tiny [--judges judges] [--language-model NAME]

The judge is a text classifier per attribute (TF-IDF and logistic regression) that learns from the training answers and
never sees a latent. It reads the reference replies, the replies with the energy, and the replies without it (z stays
at the prior's mean). Its own accuracy on the validation answers stands beside, since no figure here can be better than
its judge. A second table has the other columns of the paper's Table 1: personalization and NLI by the judges of
`python -m miracle_jax.judge`, where a folder of them is named, BLEU and ROUGE against the references, perplexity under
the language model that is named, Distinct and self-BLEU. The file of figures has them a second time as the paper's
released code computes them (metrics.py says how that differs).
"""

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from miracle_jax import config, dataset, storage
from miracle_jax.attributes import Schema
from miracle_jax.command_line import read_options
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.fluency import LanguageModel
from miracle_jax.judge import Judges
from miracle_jax.model import Model, load
from miracle_jax.scores import score


@dataclass(frozen=True)
class Options:
    """What to evaluate on."""

    data: str = "test"
    """JSONL file whose `tag` labels every attribute, with references. `test` is the bundled test set."""
    train: tuple[str, ...] = ()
    """What the judge learns from, `attribute=path.jsonl` each. Empty: the run's training files."""
    validation: tuple[str, ...] = ()
    """What the judge's own accuracy is measured on, written as `train`. Empty: the run's validation files."""
    judges: str = ""
    """Folder that `python -m miracle_jax.judge` wrote. Empty: neither its personalization nor NLI."""
    language_model: str = ""
    """GPT-2 or Llama checkpoint of the perplexity: a hub name (the paper's is gpt2-xl), a folder, a .gguf file or
    package:NAME/PATH. Empty: no perplexity."""
    per_personality: int = 20
    """Contexts of each personality, drawn from the file with `seed`."""
    seed: int = 0
    out: str = ""
    """JSON file for figures and replies. Empty: evaluation.json in the run's folder, or in this one where the run is
    in a bucket."""
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


def judged_by(data: config.Data, options: Options, schema: Schema) -> tuple[list, list]:
    """The instances that judges learn from and those that they are measured on."""
    if data.frozen and not (options.train and options.validation):
        raise UserError(
            f"this run learned from tokens ({data.frozen}), but the judge learns from text; name its files with "
            f"--train {schema.names[0]}=FILE.jsonl ... --validation {schema.names[0]}=FILE.jsonl ..."
        )
    train, validation = options.train or data.train, options.validation or data.validation
    named = dataclasses.replace(data, train=train, validation=validation)
    train_files, validation_files, _ = dataset.sources(named, schema)
    if not validation_files:
        raise UserError("--train is given but --validation is not; name the files that the judge is measured on")
    on_error = "skip" if data.on_error == "skip" else ""
    return tuple(dataset.read_files(files, schema, on_error) for files in (train_files, validation_files))


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
    """Scores the model: {"attributes": {name: {"judge", "gold", "with_energy", "without_energy"}}, "mean": ...,
    "scores": {"gold", ...: as `scores.score` gives them}, ...}, accuracies as shares."""
    judges = Judges(options.judges) if options.judges else None
    if judges and judges.schema != model.schema:
        raise UserError(
            f"the judges in {options.judges} are of {', '.join(judges.schema.names)}, this run of "
            f"{', '.join(model.schema.names)}; train judges with --schema"
        )
    language_model = LanguageModel(options.language_model) if options.language_model else None
    train, validation = judged_by(model.config.data, options, model.schema)
    test = dataset.read_files(dataset.labelled_source(options.data, model.schema), model.schema)
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
    linear = train_judges(train, model.schema)
    attributes = {}
    for a, name in enumerate(model.schema.names):
        accuracy = {"judge": float(linear[a].score(*answers(validation, a)))}
        for source, found in texts.items():
            accuracy[source] = float(np.mean(linear[a].predict(found) == wanted[:, a]))
        attributes[name] = accuracy
    mean = {source: float(np.mean([part[source] for part in attributes.values()])) for source in ("judge", *texts)}
    before = [(i.questions, i.replies[:-1]) for i in chosen]
    scores = {
        source: score(found, texts["gold"], before, wanted, judges, language_model, options.seed)
        for source, found in texts.items()
    }
    return {
        "contexts": len(chosen), "personalities": len(set(named)), "seconds": round(seconds, 1),
        "not_ok": sum(not reply.ok for reply in replies["with_energy"]), "attributes": attributes, "mean": mean,
        "scores": scores, "judges": judges and judges.facts, "language_model": options.language_model,
        "replies": [
            {"question": instance.questions[-1], "personality": named[i]} | {name: t[i] for name, t in texts.items()}
            for i, instance in enumerate(chosen)
        ],
    }  # fmt: skip


def table(result: dict) -> str:
    """The control accuracies for the terminal, in percent."""
    head = ("attribute", "judge on validation", "gold replies", "with energy", "without energy", "gain")
    rows = [head]
    for name, s in (*result["attributes"].items(), ("mean", result["mean"])):
        figures = [f"{100 * s[k]:.1f}" for k in ("judge", "gold", "with_energy", "without_energy")]
        rows.append((name.replace("_", " "), *figures, f"{100 * (s['with_energy'] - s['without_energy']):+.1f}"))
    return _aligned(rows)


COLUMNS = {"bleu": "BLEU", "rouge": "ROUGE", "nli": "NLI", "ppl": "PPL", "distinct": "Distinct", "self_bleu": "sBLEU"}


def quality(result: dict) -> str:
    """The columns of the paper's Table 1 for the terminal, in percent except the perplexity."""
    names = list(result["attributes"]) if result["judges"] else []
    rows = [("", *(name.replace("_", " ") for name in names), *COLUMNS.values())]
    for source, scores in result["scores"].items():
        found = {name: value if name == "ppl" else 100 * value for name, value in scores["paper"].items()}
        figures = [found.get(name) for name in (*names, *COLUMNS)]
        rows.append((source.replace("_", " "), *("-" if x is None else f"{x:.1f}" for x in figures)))
    if result["judges"]:
        known = result["judges"]["judges"] | {"nli": result["judges"]["judges"]["consistency"]}
        own = [f"{100 * known[name]['accuracy']:.1f}" if name in known else "" for name in (*names, *COLUMNS)]
        rows.append(("the judge's own", *own))
    return _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        workdir, _, options = read_options(
            "python -m miracle_jax.evaluate", __doc__, "",
            lambda run: Options(sample=run.sample, decode=run.decode), argv,
        )  # fmt: skip
        if options.per_personality < 1:
            raise UserError("--per-personality must be at least 1")
        if options.seed < 0:
            raise UserError("--seed must be at least 0")
        own = Path(workdir) if Path(workdir).is_dir() else Path()
        path = storage.local_file(options.out or own / "evaluation.json")
        result = evaluate(load(workdir), options)
        with storage.replacing(path) as file:
            file.write(json.dumps(result, indent=1, ensure_ascii=False).encode())
        print(f"accuracy in percent on {result['contexts']} contexts, {result['personalities']} personalities:\n")
        print(table(result))
        print(f"\nin percent, except PPL:\n\n{quality(result)}")
        if result["not_ok"]:
            print(f"\n{result['not_ok']} latents are not ok; the warning above says why")
        print(f"\nreplies and figures: {path}")


if __name__ == "__main__":
    main()
