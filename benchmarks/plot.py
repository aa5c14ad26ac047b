"""Draws what was measured: ratios, scaling curves, and the sampler's accuracy against time.

    python -m benchmarks.plot results.jsonl [--out results.png]

One picture a machine. Only what the file has rows of is drawn. Every benchmark adds its rows by --out.
"""

import argparse
from pathlib import Path

from benchmarks import tables
from benchmarks.measure import OURS
from miracle_jax.errors import UserError, one_sentence

COLOURS = {OURS: "#c44e52", tables.RELEASED: "#8c8c8c", tables.MODERNISED: "#4c72b0"}


def draw(rows: list[dict], out: Path) -> None:
    """Writes the picture. Raises UserError where the rows are of several machines or there are none."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    machines = list(dict.fromkeys(map(tables.machine, rows)))
    if len(machines) != 1:
        found = f"rows of {len(machines)} machines: {'; '.join(machines)}" if machines else "no rows"
        raise UserError(f"there are {found}; a picture shows one machine")
    works = tables.works(rows)
    bars = [work for work in works if not tables.is_curve(work) and _rivals(work)]
    panels = [(_scaling, benchmark) for benchmark in tables.CURVES if tables.curves(works, benchmark)]
    accuracy = [work for work in works if work[0]["benchmark"] == tables.ACCURACY]
    for activation in dict.fromkeys(tables.activation(work[0]) for work in accuracy):
        points = [row for work in accuracy if tables.activation(work[0]) == activation for row in work]
        panels.append((_accuracy, (activation, points)))

    high = 0.24 * sum(len(_rivals(work)) + 1.5 for work in bars) + 0.8 if bars else 0.0
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(13, max(high + 4.2 * lines, 2.0)), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=(high, 4.2 * lines)) if bars and panels else (figure, figure)
    if bars:
        _ratios(parts[0].subplots(), bars)
    if panels:
        axes = parts[1].subplots(lines, 2, squeeze=False).ravel()
        for panel, (paint, what) in zip(axes, panels, strict=False):
            paint(panel, works, what)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows if row.get("commit")))
    figure.supxlabel(f"{machines[0]}{f'; commit {commits}' if commits else ''}", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, format="png")


def _rivals(work: list[dict]) -> list[dict]:
    return [row for row in work if row["ratio"] is not None and row["system"] != OURS]


def _colour(system: str) -> str | None:
    return next((colour for name, colour in COLOURS.items() if system.startswith(name)), None)


def _ratios(panel, bars: list[list[dict]]) -> None:
    from matplotlib.ticker import LogLocator

    place, names = 0.0, []
    for work in bars:
        names.append((place, tables.title(work)))
        for row in _rivals(work):
            place += 1
            panel.barh(place, row["ratio"] - 1, left=1, height=0.75, color=_colour(row["system"]) or COLOURS[OURS])
            panel.annotate(f"{row['ratio']:.2f}", (max(row["ratio"], 1), place), (4, 0), textcoords="offset points",
                           va="center", fontsize=7)  # fmt: skip
            names.append((place, row["system"]))
        place += 1.5
    panel.set_xscale("log", subs=())
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.axvline(1, color="black", linewidth=1)
    panel.set_yticks([place for place, _ in names], [name for _, name in names], fontsize=7)
    titles = {tables.title(work) for work in bars}
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in titles else "normal")
    panel.set(title="their seconds over ours (right of 1: ours is faster)", ylim=(place - 0.5, -1))
    panel.tick_params(axis="y", length=0)
    panel.margins(x=0.08)


def _scaling(panel, works: list[list[dict]], benchmark: str) -> None:
    number = tables.CURVES[benchmark]
    for label, rows in tables.curves(works, benchmark).items():
        power = tables.fitted(rows)
        legend = label if power is None else f"{label}: ~ {number}^{power:.2f}"
        style = "o-" if benchmark == "devices" or label.startswith(OURS) else "s--"
        panel.plot([row[number] for row in rows], [row["seconds"] for row in rows], style, label=legend, markersize=4)
    _log_log(panel, title=benchmark if benchmark != "devices" else "the same work on several devices", xlabel=number)
    numbers = sorted({row[number] for rows in tables.curves(works, benchmark).values() for row in rows})
    panel.set_xticks(numbers, [f"{x:,}" for x in numbers])
    panel.minorticks_off()


def _accuracy(panel, works: list[list[dict]], what: tuple[str, list[dict]]) -> None:
    activation, rows = what
    for system in dict.fromkeys(row["system"] for row in rows):
        own = sorted((row for row in rows if row["system"] == system), key=lambda row: row["tolerance"])
        style = "o-" if system.startswith(OURS) else "s--"
        panel.plot([row["seconds"] for row in own], [row["error"] for row in own], style, label=system, markersize=4)
        for row in own:
            panel.annotate(f"{row['tolerance']:g}", (row["seconds"], row["error"]), (3, 3), fontsize=6,
                           textcoords="offset points")  # fmt: skip
    _log_log(panel, title=f"sampler, {activation} heads: error by tolerance", xlabel="seconds", ylabel="error")


def _log_log(panel, title: str, xlabel: str, ylabel: str = "seconds") -> None:
    panel.set(xscale="log", yscale="log", title=title, xlabel=xlabel, ylabel=ylabel)
    panel.grid(True, alpha=0.3)
    panel.legend(fontsize=7)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines that benchmarks wrote with --out")
    parser.add_argument("--out", type=Path, default=None, help="the picture; by default beside the file")
    given = parser.parse_args(argv)
    with one_sentence():
        draw(tables.read([given.file]), given.out or given.file.with_suffix(".png"))


if __name__ == "__main__":
    main()
