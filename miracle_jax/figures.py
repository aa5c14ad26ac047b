"""The picture of an evaluation, report.png: control by attribute and by personality, what it costs in coherence and
fluency, and curves of its strength."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from miracle_jax import storage
from miracle_jax.scores import AVERAGE
from miracle_jax.systems import REFERENCES
from miracle_jax.tables import COLUMNS

ASPECT_OF = {"nli": "coherence", "bleu": "coherence", "ppl": "fluency", "distinct": "diversity"}


def draw(out: Path, result: dict) -> None:
    """Writes report.png into the folder `out`. result: as `tables.write` returns it."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    systems = result["systems"]
    curves = sorted({figures["strength"][0] for figures in systems.values() if figures["strength"]})
    rows = 2 + bool(curves)
    figure = Figure(figsize=(13, 4.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2)

    def share(figures, name):
        found = figures["paper"].get(name)
        return np.nan if not found or found["mean"] is None else found["mean"] * (1 if name == "ppl" else 100)

    names = {AVERAGE: "average"} | {name: name.replace("_", " ") for name in result["attributes"]}
    shown = {name: figures for name, figures in systems.items() if not figures["strength"]}
    _bars(axes[0, 0], list(map(_label, names.values())), {s: [share(f, n) for n in names] for s, f in shown.items()})
    axes[0, 0].set(title="control accuracy by attribute (%)", ylim=(0, 100))
    groups = list(next(iter(shown.values()))["by_personality"])
    by = {s: [np.nan if (x := f["by_personality"][g]) is None else 100 * x for g in groups] for s, f in shown.items()}
    _bars(axes[0, 1], [_label(group).replace(", ", "\n") for group in groups], by)
    axes[0, 1].set(title="control accuracy by personality (%)", ylim=(0, 100))
    axes[0, 1].tick_params(axis="x", labelsize=6)

    def measured(name):
        return any(not np.isnan(share(figures, name)) for figures in systems.values())

    coherence, fluency = "nli" if measured("nli") else "bleu", "ppl" if measured("ppl") else "distinct"
    for panel, name in ((axes[1, 0], coherence), (axes[1, 1], fluency)):
        for system, figures in systems.items():
            if (name, system) != ("bleu", REFERENCES):  # they are their own references
                marker = "*" if system == REFERENCES else "." if figures["strength"] else "o"
                panel.plot(share(figures, name), share(figures, AVERAGE), marker, label=_label(system))
        panel.set(xlabel=f"{COLUMNS[name][:-1]}{'' if name == 'ppl' else ' (%)'}", ylabel="control accuracy (%)")
        panel.set(title=f"control against {ASPECT_OF[name]}")
        if len(systems) <= 10:
            panel.legend(fontsize=7)
    for panel, kind in zip(axes[2], ("lambda", "K"), strict=True) if curves else ():
        for run in curves:
            own = [f for f in systems.values() if f["strength"] and f["strength"][:2] == (run, kind)]
            labels = {AVERAGE: "control accuracy (%)", coherence: f"{COLUMNS[coherence][:-1]} (%)", "ppl": "PPL"}
            for name, label in labels.items():
                strengths = [f["strength"][2] for f in own]
                panel.plot(strengths, [share(f, name) for f in own], "o-", label=_label(f"{run}: {label}"))
        panel.set(title=f"strength: {kind}", xlabel=kind)
        panel.set_xscale("symlog" if kind == "lambda" else "log", base=2)
        panel.legend(fontsize=7)
    with storage.replacing(out / "report.png") as file:
        figure.savefig(file, format="png", dpi=110)


def _bars(panel, groups: Sequence[str], heights: Mapping[str, Sequence[float]]) -> None:
    width = 0.8 / len(heights)
    for i, (label, values) in enumerate(heights.items()):
        panel.bar(np.arange(len(groups)) + (i - (len(heights) - 1) / 2) * width, values, width, label=_label(label))
    panel.set_xticks(range(len(groups)), groups)
    panel.legend(fontsize=7, loc="lower right")


def _label(name: str) -> str:
    """A name as Matplotlib shows it: not taken for a formula, and not left out of the legend."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
