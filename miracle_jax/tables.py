"""What an evaluation writes: report.md, report.json and details.jsonl, in the form of the paper's tables.

Shares are in percent where people read them, and from 0 to 1 in the files for programs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from miracle_jax import storage
from miracle_jax.attributes import UNKNOWN
from miracle_jax.scores import AVERAGE, mean
from miracle_jax.significance import interval, paired
from miracle_jax.systems import REFERENCES, System, TestSet

COLUMNS = {
    "bleu": "BLEU↑",
    "rouge": "ROUGE↑",
    "nli": "NLI↑",
    "ppl": "PPL↓",
    "distinct": "Distinct↑",
    "self_bleu": "sBLEU↓",
}
"""After the personalization, as Table 1 has them."""
LOWER_IS_BETTER = ("ppl", "self_bleu")
SIGNIFICANT = 0.05
DAGGER = "†"
OWN = "the judges' own accuracy"


def write(out: Path, setup: dict, test: TestSet, systems: Sequence[System], seed: int) -> dict:
    """Writes the three files into the folder `out`. Returns the content of report.json:

    {"setup", "attributes": {name: short name}, "systems": {name: figures}, "times": {name: {...}}}, where figures are
      "paper": {metric: {"mean", "low", "high", "count"}}, the interval a bootstrap's of 95 %, over `count` replies;
      "released": {metric: mean};
      "compared": {metric: as `significance.paired`, this system minus the first};
      "by_personality": {personality: mean over attributes};
      "counterfactual": {"agrees", "contradicts": {attribute: accuracy}}, where every personality was asked for;
      "silent": replies without a word; "not_ok": latents that did not arrive; "settings": flags that are not at their
      defaults; "strength": its place in a curve.
    """
    schema, first = test.schema, systems[0]
    times = ("training_seconds", "trained_on", "seconds_per_1000", "answered", "answered_on")
    result = {
        "setup": setup,
        "attributes": dict(zip(schema.names, schema.short_names, strict=True)),
        "systems": {
            system.name: {
                "paper": {name: _figure(values, seed) for name, values in system.scores.paper.items()},
                "released": {name: mean(values) for name, values in system.scores.released.items()},
                "compared": {} if system is first else _compared(system, first, seed),
                "by_personality": _by_personality(system, test),
                "counterfactual": _counterfactual(system, test),
                "silent": sum(not reply.strip() for reply in system.replies),
                "strength": system.strength,
            } | {name: fact for name, fact in system.facts.items() if name not in times}
            for system in systems
        },
        "times": {system.name: {name: system.facts.get(name) for name in times} for system in systems if system.facts},
    }  # fmt: skip
    files = {
        "details.jsonl": "".join(
            json.dumps(line, ensure_ascii=False) + "\n" for line in _details(test, systems)
        ),
        "report.md": markdown(result),
        "report.json": json.dumps(_rounded(result), indent=1, ensure_ascii=False),
    }  # fmt: skip
    for name, text in files.items():
        with storage.replacing(out / name) as file:
            file.write(text.encode())
    return result


def _rounded(tree):
    """Floats to six places: what is beyond depends on which texts a model read together."""
    if isinstance(tree, Mapping):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_rounded(value) for value in tree]
    return round(tree, 6) if isinstance(tree, float) else tree


def _figure(values: np.ndarray, seed: int) -> dict:
    known = values[~np.isnan(values)]
    low, high = interval(known, seed) if len(known) > 1 else (None, None)
    return {"mean": mean(values), "low": low, "high": high, "count": len(known)}


def _compared(system: System, first: System, seed: int) -> dict:
    """Without what single replies do not have, or not independently of each other; and without the average where it is
    over other attributes."""
    one, other = system.scores.paper, first.scores.paper
    names = [name for name in one if name not in ("distinct", "self_bleu")]
    if ((system.wanted >= 0).any(axis=0) != (first.wanted >= 0).any(axis=0)).any():
        names.remove(AVERAGE)
    return {name: paired(one[name], other[name], seed) for name in names}


def _by_personality(system: System, test: TestSet) -> dict[str, float | None]:
    """Mean over the attributes, by the labels of the instances."""
    values = system.scores.paper[AVERAGE]
    groups = sorted(set(map(tuple, test.labels.tolist())))
    return {test.schema.describe(group): mean(values[(test.labels == group).all(axis=1)]) for group in groups}


def _counterfactual(system: System, test: TestSet) -> dict | None:
    """Accuracy where the wanted aspect is the context's, and where it is another; of contexts with an earlier answer,
    since others have no aspect."""
    if system.counterfactual is None:
        return None
    wanted, labels = np.array(test.schema.personalities())[None], test.labels[:, None]
    answered = np.array([len(instance.replies) > 1 for instance in test.chosen.values()])
    known = (labels != UNKNOWN) & answered[:, None, None]
    split = {"agrees": known & (wanted == labels), "contradicts": known & (wanted != labels)}
    found = {}
    for name, chosen in split.items():
        right = np.where(chosen, system.counterfactual, np.nan)
        each = {attribute: mean(right[:, :, a]) for a, attribute in enumerate(test.schema.names)}
        measured = [value for value in each.values() if value is not None]
        found[name] = {AVERAGE: float(np.mean(measured)) if measured else None} | each
    return found


def _details(test: TestSet, systems: Sequence[System]):
    """An object an instance: its texts, and every system's reply and scores in the paper's words."""
    for row, (i, instance) in enumerate(test.chosen.items()):
        answers = {}
        for system in systems:
            each = {name: v for name, v in system.scores.paper.items() if len(v) == len(system.replies)}
            scores = {name: None if np.isnan(v[row]) else round(float(v[row]), 6) for name, v in each.items()}
            answers[system.name] = {
                "personality": test.schema.describe(system.wanted[row].tolist()), "reply": system.replies[row]
            } | scores  # fmt: skip
        reference = instance.replies[-1]
        yield {"id": i, "question": instance.questions[-1], "reference": reference, "systems": answers}


def markdown(result: dict) -> str:
    """The content of report.md."""
    setup, systems = result["setup"], result["systems"]
    first = next(iter(systems))
    lines = [
        "# Evaluation", "",
        f"- data: {setup['data']}, {setup['contexts']} contexts, {setup['personalities']} personalities; "
        f"seed {setup['seed']}",
        f"- judges: {setup['judges']}",
        *(
            f"- replies that the judges learned from and {name} too: "
            + ("{shared} of {learned_from}".format(**overlap) if overlap else "not known")
            for name, overlap in setup["judges_overlap"].items()
        ),
        f"- language model of PPL: {setup['language_model'] or 'none'}",
        *(
            f"- {name}: " + ", ".join(f"{flag} {value}" for flag, value in figures["settings"].items())
            for name, figures in systems.items() if figures.get("settings")
        ),
        "", "## As the paper words it", "",
        "In percent, PPL aside. Bold: the best, references aside. "
        f"{DAGGER}: differs from {first} by a paired t-test (p < {SIGNIFICANT}).", "",
        *_pipes(table(result, "paper", bold=True)), "",
        *_remarks(result),
    ]  # fmt: skip
    others = {name: figures["compared"] for name, figures in systems.items() if figures["compared"]}
    if others:
        lines += [
            f"## Difference from {first}", "",
            "Mean difference on the same instances, its 95 % bootstrap interval, p of the paired t-test. Distinct and "
            "self-BLEU are missing, since they belong to all replies together.", "",
            *_pipes(_differences(result, others)), "",
        ]  # fmt: skip
    lines += [
        "## As the released code computes it", "",
        "Its BLEU is over characters, its perplexity divides by all tokens, its accuracies are mean probabilities "
        "(`miracle_jax/metrics.py`); not to be compared with the table above.", "",
        *_pipes(table(result, "released", bold=True)), "",
        "## Personalization by personality", "",
        *_pipes(_transposed({name: figures["by_personality"] for name, figures in systems.items()})), "",
    ]  # fmt: skip
    asked = {name: figures["counterfactual"] for name, figures in systems.items() if figures["counterfactual"]}
    if asked:
        lines += [
            "## Counterfactual control", "",
            "Every context in which the speaker has answered before, with every personality, by whether the wanted "
            "aspect is the one of these answers.", "",
            *_pipes(_agreement(result, asked)), "",
        ]  # fmt: skip
    if result["times"]:
        lines += [
            "## Efficiency", "",
            "Training: the steps of stage 1 with their compilation; reading of texts, warm-up, validation and stage 2 "
            "aside. Replies: compilation aside (Table 5).", "",
            *_pipes(_efficiency(result)), "",
        ]  # fmt: skip
    return "\n".join(lines)


def _remarks(result: dict) -> list[str]:
    """What the first table does not show."""
    lines = []
    for name, figures in result["systems"].items():
        if figures.get("not_ok"):
            lines.append(f"{figures['not_ok']} latents of {name} did not arrive (not ok).")
        if figures["silent"]:
            lines.append(f"{figures['silent']} replies of {name} have no word.")
        perplexity = figures["paper"].get("ppl")
        if perplexity and perplexity["count"] < result["setup"]["contexts"]:
            lines.append(f"The PPL of {name} is over {perplexity['count']} replies; the others are too short.")
    return [line for remark in lines for line in (remark, "")]


def terminal(result: dict) -> str:
    """The first table, for a terminal."""
    rows = table(result, "paper", bold=False)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    legend = ", ".join(f"{short} {name.replace('_', ' ')}" for name, short in result["attributes"].items())
    failed = [
        f"{figures['not_ok']} latents of {name} are not ok: they did not arrive"
        for name, figures in result["systems"].items() if figures.get("not_ok")
    ]  # fmt: skip
    contexts = f"{result['setup']['contexts']} contexts, in percent but for PPL; judges: {result['setup']['judges']}"
    return "\n".join([contexts, "", *lines, "", legend, *failed])


def table(result: dict, block: str, bold: bool) -> list[list[str]]:
    """The paper's Table 1: a head and a row a system, then the judges' own accuracy. block: "paper" or "released"."""
    systems, names = result["systems"], [AVERAGE, *result["attributes"], *COLUMNS]

    def value(figures, name):
        found = figures[block].get(name)
        return found["mean"] if isinstance(found, dict) else found

    best = {}
    for name in names:
        found = [value(figures, name) for system, figures in systems.items() if system != REFERENCES]
        found = [_shown(name, x) for x in found if x is not None]
        if found and len(systems) > 2:
            best[name] = (min if name in LOWER_IS_BETTER else max)(found, key=float)
    rows = [["", "Avg.↑", *(f"{short}↑" for short in result["attributes"].values()), *COLUMNS.values()]]
    for system, figures in systems.items():
        cells = []
        for name in names:
            cell = _shown(name, value(figures, name))
            if bold and cell == best.get(name) and system != REFERENCES:
                cell = f"**{cell}**"
            compared = figures["compared"].get(name) if block == "paper" and bold else None
            cells.append(cell + DAGGER * bool(compared and compared["p"] is not None and compared["p"] < SIGNIFICANT))
        rows.append([system, *cells])
    return [*rows, [OWN, *(_shown(name, _own_accuracy(result).get(name)) for name in names)]]


def _own_accuracy(result: dict) -> dict[str, float | None]:
    """The judges', by the names of the scores that they give."""
    own = result["setup"]["judges_accuracy"]
    measured = [own[name] for name in result["attributes"] if own[name] is not None]
    return {AVERAGE: np.mean(measured) if measured else None} | own | {"nli": own.get("consistency")}


def _shown(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value if name == 'ppl' else 100 * value:.2f}"


def _differences(result: dict, others: Mapping[str, dict]) -> list[list[str]]:
    names = {AVERAGE: "Avg."} | result["attributes"] | {name: head[:-1] for name, head in COLUMNS.items()}
    names = {name: head for name, head in names.items() if any(compared.get(name) for compared in others.values())}
    rows = [["", *names.values()]]
    for system, compared in others.items():
        cells = []
        for name in names:
            found, scale = compared.get(name), 1 if name == "ppl" else 100
            if not found:
                cells.append("–")
                continue
            difference, low, high = (scale * found[key] for key in ("difference", "low", "high"))
            p = "" if found["p"] is None else ", p < 0.001" if found["p"] < 0.001 else f", p = {found['p']:.3f}"
            cells.append(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]{p}")
        rows.append([system, *cells])
    return rows


def _transposed(columns: Mapping[str, dict]) -> list[list[str]]:
    keys = next(iter(columns.values()))
    return [["", *columns]] + [[key, *(_shown(key, column[key]) for column in columns.values())] for key in keys]


def _agreement(result: dict, asked: Mapping[str, dict]) -> list[list[str]]:
    names = {AVERAGE: "Avg."} | result["attributes"]
    parts = ("agrees", "contradicts")
    rows = [["", *(f"{head} {part}" for head in names.values() for part in parts)]]
    for system, found in asked.items():
        rows.append([system, *(_shown(name, found[part][name]) for name in names for part in parts)])
    return [*rows, [OWN, *(_shown(name, _own_accuracy(result)[name]) for name in names for _ in parts)]]


def _efficiency(result: dict) -> list[list[str]]:
    rows = [["", "training", "on", "1,000 replies", "measured on replies", "on"]]
    for system, times in result["times"].items():
        training, answering = times["training_seconds"], times["seconds_per_1000"]
        hours = None if training is None else f"{training / 3600:.2f} h"
        seconds = None if answering is None else f"{answering:.0f} s"
        figures = (hours, times["trained_on"], seconds, times["answered"], times["answered_on"])
        rows.append([system, *("–" if figure is None else str(figure) for figure in figures)])
    return rows


def _pipes(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    head, *others = rows
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *others)]
