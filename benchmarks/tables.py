"""What was measured, as text: reads the JSON lines of benchmarks and prints the Markdown of RESULTS.md, judged by bars.

    python -m benchmarks.tables results.jsonl [more.jsonl ...] > benchmarks/RESULTS.md

One section a machine. A work that was measured twice counts as it was the last time.
"""

import argparse
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import COLUMNS, OURS, cells, seconds, table
from miracle_jax.errors import UserError, one_sentence

CURVES = {
    "sampler scaling": "latents", "decode scaling": "replies", "train_step scaling": "batch", "devices": "devices",
}  # fmt: skip
"""Benchmarks that are points of a curve, and the number on its horizontal axis."""
ACCURACY = "sampler accuracy"
RELEASED, MODERNISED = "as released", "modernised"
WORDS = {"benchmark", "work", "system", "size", "device", "hardware"}
NUMBERS = {"seconds", "least", "most", "compile_seconds"}
NEEDED = WORDS | NUMBERS | {"peak_bytes", "ratio"}


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a work is to reach. Ratios are the others' seconds over ours; 0: no bar."""

    released: float = 0.0
    modernised: float = 0.0
    """Against the fastest of the modernised systems..."""
    rival: str = MODERNISED
    """... whose name starts so."""
    most: tuple[tuple[str, float], ...] = ()
    least: tuple[tuple[str, float], ...] = ()
    """Bounds of fields of our own row."""

    def text(self) -> str:
        named = ((self.released, RELEASED), (self.modernised, self.rival))
        parts = [f">= {ratio:g}x {name}" for ratio, name in named if ratio]
        parts += [f"<= {_value(name, bound)}" for name, bound in self.most]
        parts += [f">= {_value(name, bound)}" for name, bound in self.least]
        return ", ".join(parts)


MILLION_A_SECOND = Bar(modernised=20, rival="modernised, torchdiffeq", most=(("seconds", 65536 / 1e6),))
BARS = {  # by benchmark, device, size and, for the sampler, the heads' activation
    ("sampler", "cpu", "base", "relu"): Bar(released=10, modernised=5),
    ("sampler", "cpu", "base", "silu"): Bar(released=12, modernised=6),
    ("decode", "cpu", "base", ""): Bar(released=8, modernised=1.0),
    ("train_step", "cpu", "base", ""): Bar(released=1.2, modernised=0.9, least=(("share_of_matmul", 0.75),)),
    ("end_to_end", "cpu", "tiny", ""): Bar(released=10, modernised=2),
    ("sampler", "gpu", "paper", "relu"): MILLION_A_SECOND,
    ("sampler", "gpu", "paper", "silu"): MILLION_A_SECOND,
    ("decode", "gpu", "paper", ""): Bar(released=200, modernised=3, most=(("seconds", 0.25),)),
    # 20 epochs of 42,322 turns in 12 minutes.
    ("train_step", "gpu", "paper", ""): Bar(
        modernised=1.2, rival="modernised, torch.compile", least=(("share_of_matmul", 0.45),),
        most=(("hours_of_the_paper", 0.2),),
    ),
    ("end_to_end", "gpu", "paper", ""): Bar(most=(("seconds", 1.0),)),
}  # fmt: skip


def _value(name: str, value: float) -> str:
    """A figure with its unit, by the name of its field."""
    if name.startswith("share_of_"):
        return f"{value:.0%} of {name.removeprefix('share_of_')}"
    return f"{value:.2g} h for the paper's epochs" if name == "hours_of_the_paper" else seconds(value)


def read(paths: Iterable[Path]) -> list[dict]:
    """The rows of some files. Raises UserError for a line that no benchmark wrote."""
    rows = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
            if problem := _problem(line):
                raise UserError(
                    f"{path}:{number}: {problem}; expected a row as `python -m benchmarks --out FILE` writes it"
                )
            rows.append(json.loads(line))
    return rows


def _problem(line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return "not JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    if missing := sorted(NEEDED - row.keys()):
        return f"no {', '.join(missing)}"
    number = CURVES.get(row["benchmark"]) if isinstance(row["benchmark"], str) else None
    for name in (*sorted(WORDS), *sorted(NUMBERS | {number} - {None})):
        value, kinds, what = (row.get(name), str, "text") if name in WORDS else (row.get(name), int | float, "number")
        if not isinstance(value, kinds) or isinstance(value, bool):
            return f"{name} is {value!r}, which is no {what}"
    return ""


def machine(row: dict) -> str:
    """The hardware without the number of its accelerators, which differs where a benchmark takes fewer."""
    return re.sub(r"^\d+ x ", "", row["hardware"])


def works(rows: Iterable[dict]) -> list[list[dict]]:
    """The rows of each work, as its last run gave them."""
    found: dict[tuple, list[dict]] = {}
    last, systems = None, set()
    for row in rows:
        key = machine(row), row["benchmark"], row["work"], row["size"], row["device"]
        if key != last or row["system"] in systems:
            found[key], last, systems = [], key, set()
        found[key].append(row)
        systems.add(row["system"])
    return list(found.values())


def is_curve(work: list[dict]) -> bool:
    return work[0]["benchmark"] in CURVES or work[0]["benchmark"] == ACCURACY


def title(work: list[dict]) -> str:
    return f"{work[0]['work']} ({work[0]['size']}, {work[0]['device']})"


def activation(row: dict) -> str:
    """Of the sampler's heads; "" elsewhere."""
    return next((name for name in ("relu", "silu") if name in row["work"].split(", ")), "")


# ---- Curves


def curves(rows_of: Iterable[list[dict]], benchmark: str) -> dict[str, list[dict]]:
    """The rows of every system of a scaling benchmark, from the smallest number to the largest."""
    found = defaultdict(list)
    rows = [row for work in rows_of if work[0]["benchmark"] == benchmark for row in work]
    sizes = {row["size"] for row in rows}
    for row in rows:
        label = row["system"] if len(sizes) == 1 else f"{row['system']} ({row['size']})"
        if benchmark == "devices":  # two works
            label = "sampler" if "latents" in row else "training step"
        found[label].append(row)
    return {label: sorted(of, key=lambda row: row[CURVES[benchmark]]) for label, of in found.items()}


def exponent(numbers: Sequence[float], times: Sequence[float]) -> float | None:
    """p of seconds = c number^p, by least squares in log-log over the larger half of the points; None below two."""
    points = sorted(zip(numbers, times, strict=True))
    points = points[max(min(len(points) // 2, len(points) - 2), 0) :]
    if len({number for number, _ in points}) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(points, float)).T, 1)[0])


def fitted(rows: list[dict]) -> float | None:
    """The exponent of one of `curves`."""
    number = CURVES[rows[0]["benchmark"]]
    return exponent([row[number] for row in rows], [row["seconds"] for row in rows])


# ---- Summary


def summary(rows_of: Iterable[list[dict]]) -> str:
    """One line a work: ours, as released, the fastest modernised, the ratios, and whether its bar is met. "" without
    works of ours, curves aside."""
    lines = []
    for work in rows_of:
        ours = next((row for row in work if row["system"] == OURS), None)
        if is_curve(work) or not ours:
            continue
        released, modern = _fastest(work, RELEASED, exact=True), _fastest(work, MODERNISED)
        bar = BARS.get((ours["benchmark"], ours["device"], ours["size"], activation(ours)))
        times = [seconds(row["seconds"]) if row else "" for row in (ours, released, modern)]
        ratios = [f"{row['seconds'] / ours['seconds']:.2f}" if row else "" for row in (released, modern)]
        name = f"{ours['benchmark']}: {title(work)}"
        lines.append([name, *times, *ratios, bar.text() if bar else "", verdict(bar, work) if bar else ""])
    columns = ("work", "ours", RELEASED, "best modernised", "released / ours", "modernised / ours", "bar", "")
    return table(columns, lines) if lines else ""


def _fastest(work: list[dict], name: str, exact: bool = False) -> dict | None:
    found = [row for row in work if (row["system"] == name if exact else row["system"].startswith(name))]
    return min(found, key=lambda row: row["seconds"], default=None)


def verdict(bar: Bar, work: list[dict]) -> str:
    """What is said of a bar: "met", or what is not met, or what was not measured. `work` has a row of ours."""
    ours = next(row for row in work if row["system"] == OURS)
    failed, absent = [], []
    rivals = ((bar.released, RELEASED, True), (bar.modernised, bar.rival, False))
    for ratio, name, exact in rivals:
        if not ratio:
            continue
        row = _fastest(work, name, exact)
        if row is None:
            absent.append(name)
        elif row["seconds"] < ratio * ours["seconds"]:
            failed.append(f"{row['seconds'] / ours['seconds']:.2f}x {name}")
        elif ours.get("error", 0.0) > row.get("error", np.inf):  # faster, but less accurate
            failed.append(f"error {ours['error']:.1e} against {row['error']:.1e} {name}")
    for bounds, sign in ((bar.most, 1), (bar.least, -1)):
        for name, bound in bounds:
            if name not in ours:
                absent.append(name)
            elif sign * ours[name] > sign * bound:
                failed.append(_value(name, ours[name]))
    if failed:
        return f"not met: {', '.join(failed)}"
    return f"not measured: {', '.join(absent)}" if absent else "met"


# ---- Markdown


def markdown(rows: list[dict]) -> str:
    """RESULTS.md: a section a machine."""
    by_machine = defaultdict(list)
    for row in rows:
        by_machine[machine(row)].append(row)
    parts = ["# Results", "How to read this: [README.md](README.md). Written by `python -m benchmarks.tables`."]
    for name, own in by_machine.items():
        parts += [f"## {name}", *_circumstances(own), *_tables(works(own))]
    return "\n\n".join(parts) + "\n"


def _each(rows: list[dict], name: str) -> list:
    return list(dict.fromkeys(row[name] for row in rows if row.get(name)))


def _circumstances(rows: list[dict]) -> list[str]:
    versions = defaultdict(dict)
    for row in rows:
        for package, version in {"Python": row.get("python", ""), **row.get("versions", {})}.items():
            versions[package][version] = None
    shown = [("Commit", ", ".join(_each(rows, "commit"))), ("measured on", ", ".join(_each(rows, "date")))]
    shown += [(package, " and ".join(filter(None, of))) for package, of in versions.items()]
    parts = [", ".join(f"{name} {value}" for name, value in shown if value) + "."]
    commands = _each([{"command": re.sub(r" --out[ =]\S+", "", row.get("command", ""))} for row in rows], "command")
    if commands:
        parts.append("\n".join(f"    {command}" for command in commands))
    reached = defaultdict(list)
    for row in rows:
        for name, value in row.get("ceilings", {}).items():
            reached[name].append(value)
    if reached:
        lines = [
            (f"{name.replace('_', ' ')}, {'GB/s' if name == 'copy' else 'GFLOP/s'}",
             *(f"{of(values) / 1e9:.3g}" for of in (np.median, min, max)))
            for name, values in reached.items()
        ]  # fmt: skip
        parts += ["Ceilings, measured at the start of each benchmark:", table(("", "median", "least", "most"), lines)]
    return parts


def _tables(rows_of: list[list[dict]]) -> list[str]:
    single = [work for work in rows_of if not is_curve(work)]
    judged = summary(single)
    parts = ["### Summary", judged] if judged else []
    for work in single:
        parts += [f"### {work[0]['benchmark']}: {title(work)}", table(COLUMNS, map(cells, work))]
    for benchmark, number in CURVES.items():
        found = curves(rows_of, benchmark)
        if not found:
            continue
        lines = [(f"{row[number]:,}", label, *cells(row)[1:]) for label, of in found.items() for row in of]
        exponents = [(label, "" if (p := fitted(of)) is None else f"{p:.2f}") for label, of in found.items()]
        what = f"p of seconds ~ {number}^p, over the larger half of the points"
        parts += [f"### {benchmark} ({number})", table((number, *COLUMNS), lines), table(("", what), exponents)]
    accuracy = [work for work in rows_of if work[0]["benchmark"] == ACCURACY]
    for name in dict.fromkeys(activation(work[0]) for work in accuracy):
        of = [row for work in accuracy if activation(work[0]) == name for row in work]
        of.sort(key=lambda row: (row["system"], -row["tolerance"]))
        lines = [
            (row["system"], f"{row['tolerance']:g}", f"{row['error']:.1e}", seconds(row["seconds"]), cells(row)[5])
            for row in of
        ]
        columns = ("system", "tolerance", "error", "seconds", COLUMNS[5])
        parts += [f"### Accuracy against time of the sampler, {name} heads", table(columns, lines)]
    return parts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines that benchmarks wrote with --out")
    with one_sentence():
        print(markdown(read(parser.parse_args(argv).files)), end="")


if __name__ == "__main__":
    main()
