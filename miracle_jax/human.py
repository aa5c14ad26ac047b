"""Human evaluation (paper, section 3.2 and Table 2): sheets for annotators, and the scores of what they filled in.

    python -m miracle_jax.human sheets OUT --predictions mini=mini.jsonl tiny=tiny.jsonl
    python -m miracle_jax.human score OUT sheet-1-filled.csv sheet-2-filled.csv sheet-3-filled.csv

`sheets` takes files that `python -m miracle_jax.generate --data ... --out` wrote for the same contexts, draws instances
and writes the new folder OUT: for every annotator the same replies in another order, as sheet-1.csv and sheet-1.html
and so on, and key.json, which tells whose reply an item is and stays with you. Annotators fill in one of the two: the
page, which needs a browser and no network and saves the sheet as CSV, or the CSV in a spreadsheet program.

`score` takes the filled sheets, as many as there are, prints the table and writes OUT/human.json and OUT/human.md.

A sheet is CSV in UTF-8 with a byte order mark and the columns item, context, personality, reply, readability,
personalization and coherence, of which the last three are empty; what the head says after a colon explains a column. A
text that a spreadsheet program could take for a formula, and one that itself begins with an apostrophe, has an
apostrophe more in front; drop the first apostrophe of a cell to have the text back.
"""

import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

import numpy as np

from miracle_jax import reading, sheets, storage
from miracle_jax.command_line import parse, split_words
from miracle_jax.errors import UserError, one_sentence, refuse
from miracle_jax.predictions import Prediction, read_systems
from miracle_jax.significance import interval

COMMAND = "python -m miracle_jax.human"
USAGE = f"{COMMAND} sheets OUT --predictions NAME=FILE ..., or {COMMAND} score OUT FILLED.csv ..."
LOW, HIGH = 1, 5
CRITERIA = {
    "readability": "Is the reply fluent and easy to read, whatever it says?",
    "personalization": "Does the reply show every trait of the personality?",
    "coherence": "Does the reply fit the context and answer A's last line?",
}
"""What is rated. The paper names these and does not word them."""
COLUMNS = {
    "item": "",
    "context": "A and B talk",
    "personality": "what B should show",
    "reply": "B's answer to A's last line",
    **{name: f"{question} {LOW} (not at all) to {HIGH} (fully)" for name, question in CRITERIA.items()},
}
CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"
"""The letters of item codes, which no program takes for a number, a date or a truth value."""
CODE_LENGTH = 5
PAGE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Options:
    """What goes into the sheets."""

    predictions: tuple[str, ...] = ()
    """A file of replies for each system, `name=FILE.jsonl`. The table has the systems in this order."""
    annotators: int = 3
    """A sheet for each."""
    limit: int = 100
    """Instances drawn; all where there are no more."""
    seed: int = 0
    """Of the draw, of codes and order of the items, and of the bootstrap."""


@dataclass(frozen=True)
class NoOptions:
    """The filled sheets and the key say everything."""


@dataclass(frozen=True)
class Item:
    """What an item code stands for."""

    sheet: int
    system: str
    instance: str


@dataclass(frozen=True)
class Key:
    """The content of key.json."""

    scale: tuple[int, int]
    seed: int
    items: dict[str, Item]


def write_sheets(out: str, options: Options) -> str:
    """Writes the folder `out` whole or not at all. Returns a line about it.

    Raises UserError for files of replies that cannot be read or do not agree, and when `out` exists.
    """
    if options.annotators < 1 or options.limit < 1 or options.seed < 0:
        raise UserError("--annotators and --limit must be at least 1 and --seed at least 0")
    systems = read_systems(options.predictions)
    generator = np.random.default_rng(options.seed)
    ids = list(next(iter(systems.values())))
    drawn = [ids[i] for i in sorted(generator.permutation(len(ids))[: options.limit])]
    shown = [(system, instance) for system in systems for instance in drawn]
    codes = iter(_codes(options.annotators * len(shown), generator))
    key = Key((LOW, HIGH), options.seed, {})
    with storage.new_folder(out) as folder:
        for sheet in range(1, options.annotators + 1):
            items = {next(codes): Item(sheet, *pair) for pair in shown}
            key.items.update(items)
            # In the order of the codes, which are random, so that a sheet sorted otherwise can be sorted back.
            rows = [_row(code, systems[items[code].system][items[code].instance]) for code in sorted(items)]
            (folder / f"sheet-{sheet}.csv").write_bytes(_sheet(rows))
            (folder / f"sheet-{sheet}.html").write_bytes(_page(sheet, rows))
        (folder / "key.json").write_bytes(_json(asdict(key)))
    of = f"{len(drawn)} instances by {len(systems)} systems"
    return f"wrote {out}: {options.annotators} sheets of {of}; keep key.json from the annotators"


def _codes(count: int, generator: np.random.Generator) -> list[str]:
    """Different item codes, drawn."""
    base = len(CONSONANTS)
    if count > base**CODE_LENGTH:
        raise UserError(f"{count} items are more than there are codes; lower --annotators or --limit")
    numbers = generator.choice(base**CODE_LENGTH, size=count, replace=False)
    return ["".join(CONSONANTS[n // base**place % base] for place in range(CODE_LENGTH)) for n in numbers]


def _row(code: str, prediction: Prediction) -> tuple[str, str, str, str]:
    """The columns that are not rated."""
    reply = prediction.reply if prediction.reply.strip() else "(an empty reply)"
    return code, prediction.context, prediction.personality, reply


def _sheet(rows: Iterable[Sequence[str]]) -> bytes:
    return sheets.content([_head(), *(sheets.line(row) + "," * len(CRITERIA) for row in rows)])


def _head() -> str:
    return sheets.line(f"{name}: {about}" if about else name for name, about in COLUMNS.items())


def _page(sheet: int, rows: Sequence[Sequence[str]]) -> bytes:
    items = "\n".join(_section(number, row) for number, row in enumerate(rows, 1))
    questions = "\n".join(f"<dt>{name}<dd>{html.escape(question)}" for name, question in CRITERIA.items())
    # Two studies in one browser must not find each other's ratings.
    name = hashlib.sha256(items.encode()).hexdigest()[:16]
    # Nothing but digits goes from the page's script into the CSV: the lines come with the items. All texts are escaped.
    return (
        Template(PAGE.read_text())
        .substitute(
            sheet=sheet, name=name, head=html.escape(_head()), low=LOW, high=HIGH, questions=questions, items=items
        )
        .encode()
    )


def _section(number: int, row: Sequence[str]) -> str:
    """An item of the page, with its start of a line of the CSV."""
    code, context, personality, reply = map(html.escape, row)
    scales = "".join(_scale(code, criterion) for criterion in CRITERIA)
    return (
        f'<section data-line="{html.escape(sheets.line(row))}">\n<h2>{number}. {code}</h2>\n'
        f'<p class="context">{context}</p>\n<p><b>Personality:</b> {personality}</p>\n'
        f'<p class="reply"><b>Reply:</b> {reply}</p>\n{scales}\n</section>'
    )


def _scale(code: str, criterion: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="{code} {criterion}" value="{rating}">{rating}</label>'
        for rating in range(LOW, HIGH + 1)
    )
    return f'<fieldset name="{code} {criterion}"><legend>{criterion}</legend>{buttons}</fieldset>'


def score(out: str, filled: Sequence[str]) -> str:
    """Writes human.json and human.md into the folder `out` of `write_sheets`. Returns the latter.

    Args:
      filled: CSV files with the columns item, readability, personalization and coherence, divided by commas, semicolons
        or tabs, in UTF-8 or UTF-16 (of other encodings the texts get lost, which are not read). Empty cells and missing
        items count as unrated.

    Raises UserError with all problems of all files.
    """
    targets = [storage.local_file(f"{out}/human.{ending}") for ending in ("json", "md")]
    key = read_key(f"{out}/key.json")
    result = evaluate(key, read_ratings(filled, key))
    text = table(result)
    with storage.replacing(targets[0]) as figures, storage.replacing(targets[1]) as shown:
        figures.write(_json(result))
        shown.write(text.encode())
    return text


def _json(value) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_key(path: str) -> Key:
    otherwise = f"{path} is not a key as `sheets` writes it; take the one of these sheets"
    record = reading.parse_object(storage.read(path), otherwise)
    try:
        low, high = record["scale"]
        items = {code: Item(**item) for code, item in record["items"].items()}
        key = Key((low, high), record["seed"], items)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(otherwise) from None
    whole = [low, high, key.seed, *(item.sheet for item in items.values())]
    named = [name for item in items.values() for name in (item.system, item.instance)]
    if not all(type(n) is int and 0 <= n < 2**63 for n in whole) or not all(isinstance(name, str) for name in named):
        raise UserError(otherwise)
    # Every annotator rates every system's reply to every instance.
    columns = zip(*((item.sheet, item.system, item.instance) for item in items.values()), strict=True)
    if not items or math.prod(len(set(column)) for column in columns) != len(items) or not low < high < low + 100:
        raise UserError(otherwise)
    return key


def read_ratings(filled: Sequence[str], key: Key) -> dict[str, list[float]]:
    """{item code: its rating by every criterion, NaN where there is none}. Raises UserError with all problems."""
    ratings, owners, problems = {}, {}, []
    for path in filled:
        found, wrong = _ratings(path, key)
        problems += wrong
        for sheet in sorted({key.items[code].sheet for code in found}):
            if sheet in owners:
                problems.append(f"{path}:1: sheet {sheet} is in {owners[sheet]} already; every annotator counts once")
            owners[sheet] = path
        ratings |= found
    refuse(problems, "the filled sheets cannot be scored; mend them, or leave a file out")
    return ratings


def _ratings(path: str, key: Key) -> tuple[dict[str, list[float]], list[str]]:
    """What is rated in a file, and what is wrong with the file."""
    low, high = key.scale
    values = {"": math.nan} | {str(rating): float(rating) for rating in range(low, high + 1)}
    ratings, lines, problems = {}, {}, []
    content = storage.read(path)
    try:
        for line, row in sheets.rows(content, ("item", *CRITERIA)):
            code = row["item"]
            if code not in key.items:
                problems.append(f"{path}:{line}: there is no item {code!r} in these sheets")
            elif code in lines:
                problems.append(f"{path}:{line}: item {code} is at line {lines[code]} already")
            else:
                lines[code] = line
                ratings[code] = [values.get(row[criterion], math.nan) for criterion in CRITERIA]
                problems += [
                    f"{path}:{line}: {criterion} of item {code} is {row[criterion]!r}; expected a whole number from "
                    f"{low} to {high}, or nothing"
                    for criterion in CRITERIA
                    if row[criterion] not in values
                ]
    except UserError as error:
        problems.append(f"{path}:{error}")
    if not problems and np.isnan(list(ratings.values())).all():
        problems.append(f"{path}:1: no item is rated")
    return ratings, problems


def evaluate(key: Key, ratings: Mapping[str, Sequence[float]]) -> dict:
    """The content of human.json: {"annotators", "instances", "missing", "systems", "kappa"}.

    missing: how many ratings the annotators' sheets lack.
    systems: {name: {criterion: {"mean", "low", "high", "ratings"}}}. The mean is from 0 to 1, over the instances, of an
      instance's mean over annotators, with its 95 % bootstrap interval from resampled instances; null where there are
      no ratings.
    kappa: {criterion: {"kappa", "reason", "rated_by_all"}}, and under "all" that of all criteria together. Fleiss'
      kappa takes the ratings for categories without an order, and of them those that every annotator gave; null, with
      the reason, where it is not defined.
    """
    systems, instances, every = _arranged(key, ratings)
    annotators = every.shape[-1]
    low, high = key.scale
    scores = (every - low) / (high - low)
    return {
        "annotators": annotators,
        "instances": instances,
        "missing": int(np.isnan(every).sum()),
        "systems": {
            system: {name: _mean(scores[s, :, c], key.seed) for c, name in enumerate(CRITERIA)}
            for s, system in enumerate(systems)
        },
        "kappa": {name: _kappa(every[:, :, c].reshape(-1, annotators)) for c, name in enumerate(CRITERIA)}
        | {"all": _kappa(every.reshape(-1, annotators))},
    }


def _arranged(key: Key, ratings: Mapping[str, Sequence[float]]) -> tuple[list[str], int, np.ndarray]:
    """Names of the systems, the number of instances and ratings[system, instance, criterion, annotator]."""
    systems = list(dict.fromkeys(item.system for item in key.items.values()))
    instances = list(dict.fromkeys(item.instance for item in key.items.values()))
    sheets = sorted({key.items[code].sheet for code in ratings})
    every = np.full((len(systems), len(instances), len(CRITERIA), len(sheets)), np.nan)
    for code, row in ratings.items():
        item = key.items[code]
        every[systems.index(item.system), instances.index(item.instance), :, sheets.index(item.sheet)] = row
    return systems, len(instances), every


def _mean(scores: np.ndarray, seed: int) -> dict:
    """scores[instance, annotator], from 0 to 1."""
    rated = scores[~np.isnan(scores).all(axis=1)]
    if not len(rated):
        return {"mean": None, "low": None, "high": None, "ratings": 0}
    means = np.nanmean(rated, axis=1)
    figures = (means.mean(), *interval(means, seed))
    named = zip(("mean", "low", "high"), figures, strict=True)
    return {name: round(float(figure), 4) for name, figure in named} | {"ratings": int((~np.isnan(rated)).sum())}


def _kappa(ratings: np.ndarray) -> dict:
    """ratings[item, annotator]."""
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa  # slow to import

    rated = ratings[~np.isnan(ratings).any(axis=1)].astype(int)
    if ratings.shape[1] < 2:
        reason = "there is one annotator"
    elif not len(rated):
        reason = "nothing is rated by all annotators"
    elif rated.min() == rated.max():
        reason = "all ratings are the same"
    else:
        reason = ""
    kappa = None if reason else round(float(fleiss_kappa(aggregate_raters(rated)[0])), 4)
    return {"kappa": kappa, "reason": reason, "rated_by_all": len(rated)}


def table(result: dict) -> str:
    """The figures of `evaluate` as Markdown, in the form of the paper's Table 2: two decimals, the best means bold."""
    systems = result["systems"]
    best = {name: max(scores[name]["mean"] or 0 for scores in systems.values()) for name in CRITERIA}
    rows = [["Model", *map(str.capitalize, CRITERIA)], ["---"] * (1 + len(CRITERIA))]
    for system, scores in systems.items():
        rows.append([system.replace("|", r"\|"), *(_cell(scores[name], best[name]) for name in CRITERIA)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    kappas = ", ".join(f"{name} {_kappa_text(kappa)}" for name, kappa in result["kappa"].items())
    return "\n".join(lines) + (
        "\n\nMean rating on a scale from 0 to 1, its 95 % bootstrap interval over the instances, and the number of "
        f"ratings. Instances: {result['instances']}; annotators: {result['annotators']}; missing ratings: "
        f"{result['missing']}.\n\nFleiss' kappa: {kappas}.\n"
    )


def _cell(score: dict, best: float) -> str:
    if score["mean"] is None:
        return "no ratings"
    mean = f"{score['mean']:.2f}"
    mean = f"**{mean}**" if mean == f"{best:.2f}" else mean
    return f"{mean} [{score['low']:.2f}, {score['high']:.2f}] ({score['ratings']})"


def _kappa_text(kappa: dict) -> str:
    return f"not defined ({kappa['reason']})" if kappa["reason"] else f"{kappa['kappa']:z.2f}"


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        words, flags = split_words(argv)
        command, *words = words or [""]
        if command == "score":
            parse(NoOptions(), flags, f"{COMMAND} score OUT FILLED.csv ...", __doc__)
            if len(words) < 2:
                raise UserError(f"name the folder of the sheets and the filled sheets: {USAGE}")
            print(score(words[0], words[1:]), end="")
        else:
            options = parse(Options(), flags, f"{COMMAND} sheets OUT", __doc__)
            if command != "sheets" or len(words) != 1:
                raise UserError(f"say what to do: {USAGE}")
            print(write_sheets(words[0], options))


if __name__ == "__main__":
    main()
