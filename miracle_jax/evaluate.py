"""Systems against each other on one test set: the tables of the paper, with what they are worth.

    python -m miracle_jax.evaluate runs/tiny [runs/other ...] [--predictions NAME=FILE.jsonl ...]
        [--judges judges] [--language-model NAME] [--out FOLDER]

A system is a finished run, which answers the test set here, or a file of any other system's replies (predictions.py has
its format). Of a run there are the variants that `--variants` names: with and without the energy (Table 1), one
attribute against all (Table 9), or the strength of the control. The references are a system too: no other should score
what they cannot.

FOLDER gets report.md (the tables, as the paper words its metrics and as its released code computes them), report.json
(every figure), report.png, details.jsonl (one line an instance) and replies/ and scores/, by which a command that was
interrupted goes on where it stopped. Every other system is compared with the first, instance by instance.

Judges are text classifiers that never see a latent. Without --judges they learn at once, from the training answers of
the first run; `python -m miracle_jax.judge` trains better ones, on other data, and one for coherence.

Axis letters: N replies, A attributes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from miracle_jax import cluster, config, dataset, figures, storage, systems, tables, word_judges
from miracle_jax.attributes import UNKNOWN, Schema
from miracle_jax.command_line import parse, split_words
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.fluency import LanguageModel
from miracle_jax.judge import CONSISTENCY, Judges
from miracle_jax.model import load
from miracle_jax.predictions import named_files
from miracle_jax.scores import AVERAGE, Kept, accuracy, score
from miracle_jax.systems import REFERENCES, System
from miracle_jax.word_judges import WordJudges


@dataclass(frozen=True)
class Options:
    """What to evaluate, and by what."""

    data: str = "test"
    """JSONL file with references, whose `tag` labels attributes. `test` is the bundled test set."""
    predictions: tuple[str, ...] = ()
    """Replies of other systems, `name=FILE.jsonl` each."""
    variants: Literal["energy", "attributes", "strength", "none"] = "energy"
    """How every run answers, beside as it is: `energy`, also without it; `attributes`, each attribute alone;
    `strength`, with other weights of the energy, and from several draws."""
    counterfactual: bool = False
    """Every context with every personality too: how often the control works where the context has another aspect."""
    judges: str = ""
    """Folder that `python -m miracle_jax.judge` wrote. Empty: judges learn from the training answers at once."""
    train: tuple[str, ...] = ()
    """What such judges learn from, `attribute=path.jsonl` each. Empty: the first run's training files."""
    validation: tuple[str, ...] = ()
    """What their own accuracy is measured on, written as `train`. Empty: the first run's validation files."""
    language_model: str = ""
    """GPT-2 or Llama checkpoint of the perplexity: a hub name (the paper's is gpt2-xl), a folder, a .gguf file or
    package:NAME/PATH. Empty: no perplexity."""
    per_personality: int = 0
    """Contexts of each personality, drawn from the file with `seed`. 0: all of the file."""
    seed: int = 0
    """Of this draw, of the latents where a run draws them, of self-BLEU and of the bootstrap."""
    out: str = "evaluation"
    """Folder for the report: at first `evaluation` in the folder of the run, where there is one run, else here."""
    sample: config.Sample = field(default_factory=config.Sample)
    decode: config.Decode = field(default_factory=config.Decode)


def evaluate(runs: Mapping[str, str], options: Mapping[str, Options], out: Path) -> dict:
    """Answers, reads and scores all systems and writes the report into the folder `out`; returns what report.json has.
    Of several processes all answer and the first does the rest; the others return an empty dict.

    Args:
      runs: name -> folder of a finished run, or of an export. May be empty.
      options: name -> the options. Those of the first count for all but `variants`, `sample` and `decode`; where there
        is no run, there is one entry of any name.
    """
    shared = next(iter(options.values()))
    models = {name: load(workdir) for name, workdir in runs.items()}
    judges = Judges(shared.judges) if shared.judges else None
    schema = next((model.schema for model in models.values()), judges.schema if judges else Schema.load())
    if taken := [name for name in schema.names if name in (AVERAGE, *tables.COLUMNS, CONSISTENCY)]:
        raise UserError(f"an attribute is called {taken[0]!r} like a figure of the report; give it another name")
    for name, model in models.items():
        if model.schema != schema:
            raise UserError(f"{name} has other attributes than {next(iter(models))}; they need a table each")
    if judges and judges.schema != schema:
        raise UserError(
            f"the judges in {shared.judges} are of {', '.join(judges.schema.names)}, this run of "
            f"{', '.join(schema.names)}; train judges with --schema"
        )
    language_model = LanguageModel(shared.language_model) if shared.language_model else None
    test = systems.read_test_set(shared.data, schema, shared.per_personality, shared.seed)
    data = next(iter(models.values())).config.data if models else config.Data()
    overlap = {name: _overlap(judges, model.config.data, schema) for name, model in models.items()} if judges else {}
    if judges is None:
        judges = WordJudges(*word_judges.read(data, schema, shared.train, shared.validation), schema)

    others = named_files(shared.predictions)
    variants = {name: systems.variants_of(options[name].variants, name, options[name].sample, schema) for name in runs}
    names = [variant.name for own in variants.values() for variant in own] + [*others, REFERENCES]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"two systems are called {repeated[0]!r}; give every system a name of its own")
    others = [systems.read(name, path, test, shared.counterfactual) for name, path in others.items()]

    found = []
    for name, model in models.items():
        training = systems.training(storage.run_folder(runs[name]))
        for variant in variants[name]:
            system = systems.answer(
                model, variant, test, options[name].decode, shared.counterfactual, shared.seed, out / "replies"
            )
            if system:
                found.append(dataclasses.replace(system, facts=system.facts | training))
    if not cluster.first():
        return {}
    models.clear()  # room for the models that score
    references = [instance.replies[-1] for instance in test.chosen.values()]
    found += [*others, System(REFERENCES, references, test.labels)]

    kept = Kept(out / "scores")
    contexts = [(instance.questions, instance.replies[:-1]) for instance in test.chosen.values()]
    for system in found:
        system.scores = score(
            system.replies, references, contexts, system.wanted, judges, language_model, shared.seed, kept
        )
        if system.everything:
            _, rows = systems.everything(test)
            rows = np.where((system.wanted >= 0).any(axis=0), rows, UNKNOWN)
            right = accuracy(judges, system.everything, rows, kept)
            system.counterfactual = right.reshape(len(test.chosen), -1, len(schema.names))
    setup = {
        "data": shared.data, "contexts": len(test.chosen), "personalities": len(set(map(tuple, test.labels.tolist()))),
        "seed": shared.seed, "judges": judges.about, "judges_accuracy": judges.accuracy, "judges_overlap": overlap,
        "language_model": shared.language_model or None,
    }  # fmt: skip
    result = tables.write(out, setup, test, found, shared.seed)
    figures.draw(out, result)
    return result


def _overlap(judges: Judges, data: config.Data, schema: Schema) -> dict | None:
    """How many of the replies that the judges learned from also trained the run; None where nobody can know."""
    if data.frozen:
        return None
    try:
        train, _, _ = dataset.sources(data, schema)
        shared, learned = judges.overlap(i.replies[-1] for i in dataset.read_files(train, schema, data.on_error))
    except UserError:
        return None
    return {"shared": shared, "learned_from": learned}


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        words, flags = split_words(cluster.join(argv))
        runs = _named(words)
        one = Path(words[0]) if len(words) == 1 and Path(words[0]).is_dir() else Path()
        default = Options(out=str(one / "evaluation"))
        usage, options = "python -m miracle_jax.evaluate WORKDIR [WORKDIR ...]", {}
        for name, workdir in runs.items():
            run = config.load_run(storage.run_folder(workdir))
            own = dataclasses.replace(default, sample=run.sample, decode=run.decode)
            options[name] = parse(own, flags, usage, __doc__ + cluster.HELP)
            dataclasses.replace(run, sample=options[name].sample, decode=options[name].decode).check()
        options = options or {"": parse(default, flags, usage, __doc__ + cluster.HELP)}
        report(runs, options)


def report(runs: Mapping[str, str], options: Mapping[str, Options]) -> None:
    """`evaluate` from checked options, and its first table on the terminal. Raises UserError for a mistake in them."""
    check(runs, options)
    out = Path(next(iter(options.values())).out).expanduser()
    result = evaluate(runs, options, out)
    if not cluster.first():
        return
    print(tables.terminal(result))
    print(f"\nreport: {out / 'report.md'}")


def check(runs: Mapping[str, str], options: Mapping[str, Options]) -> None:
    """Raises UserError for a mistake in the options that needs no model to be seen."""
    shared = next(iter(options.values()))
    if not runs and not shared.predictions:
        raise UserError("name finished runs first, or replies with --predictions NAME=FILE.jsonl; --help says more")
    if shared.per_personality < 0 or shared.seed < 0:
        raise UserError("--per-personality and --seed must be at least 0")
    if storage.is_remote(shared.out):
        raise UserError(f"--out {shared.out} is not a local path; write the report here and copy it there")
    out = Path(shared.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder for the report")
    if shared.judges and (shared.train or shared.validation):
        raise UserError("--train and --validation are of judges that learn here; leave them out beside --judges")
    named_files(shared.predictions)


def _named(workdirs: Sequence[str]) -> dict[str, str]:
    """By the last part of their paths, or by their paths where these are the same."""
    folders = [w if storage.is_remote(w) else storage.run_folder(w).resolve() for w in workdirs]
    if len(set(folders)) < len(folders):
        raise UserError("a run is named twice; name each once")
    short = [Path(workdir).name or workdir for workdir in workdirs]
    names = short if len(set(short)) == len(short) else workdirs
    return dict(zip(names, workdirs, strict=True))


if __name__ == "__main__":
    main()
