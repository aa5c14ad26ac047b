"""What all benchmarks share: the command line, timing in turn, memory, the machine's ceilings, and where results go.

A benchmark measures *systems* (ours, the paper's code as released, a modern PyTorch program) at one *work*. They run in
turn, A B C A B C, so that a machine that slows down slows all of them; the figure is the median, compile time (what the
first call takes beyond it) is apart, and a ratio is the other's median over ours.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "miracle_jax"
REST = 0.5
"""Seconds before every call that is timed: the threads of the system before keep a core busy for a while yet."""
LONG = 15.0
"""Seconds after which a system is not called again. A call that takes longer is not repeated for its memory's sake."""
HUGE_PAGES = "GLIBC_TUNABLES"
PACKAGES = ("jax", "jaxlib", "flax", "diffrax", "torch", "transformers", "torchdiffeq", "torchode")


def flags(doc: str) -> argparse.ArgumentParser:
    """A parser of the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "base", "paper"), default="base")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each system after the first")
    parser.add_argument("--out", type=Path, default=None, help="file to which a JSON line a row is added")
    parser.add_argument("--curves", action="store_true", help="also the scaling curves")
    return parser


def arguments(doc: str, argv: list[str] | None = None, **defaults) -> argparse.Namespace:
    """Reads a benchmark's flags, and readies JAX for the device. To be called before JAX looks for its devices.

    defaults: of flags that only this benchmark has, by name.
    """
    parser = flags(doc)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(argv)
    if given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}; at least one call is timed")
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[given.device]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch works on the same GPU
    return given


@dataclasses.dataclass
class Timing:
    """Of one system: seconds of the first call and of the others, bytes at the peak beyond what was held before."""

    first: float
    seconds: list[float]
    peak_bytes: int | None
    output: Any

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def in_turn(systems: dict[str, Callable[[], Any]], repeats: int, device: str, least: int = 1) -> dict[str, Timing]:
    """Calls every system once, then all of them in turn `repeats` times, long ones (LONG) fewer times, but at least
    `least`. A call returns when its work is done.

    What a call returns is kept (the first time). Memory is measured in one more call of each, before which what the
    process has freed goes back to the system; pages that have to be had anew would slow the calls that are timed. A
    system that is not available here may raise `Unavailable`.
    """
    timings: dict[str, Timing] = {}
    for name, system in systems.items():
        note(f"{name}: first call")
        with _Peak(device) as peak:
            began = time.perf_counter()
            try:
                output = system()
            except Unavailable as reason:
                note(f"{name} is left out: {reason}")
                continue
            first = time.perf_counter() - began
        timings[name] = Timing(first, [], peak.bytes, output)
    for done in range(repeats):
        for name, timing in timings.items():
            if done >= least and timing.first * done > LONG:
                continue
            time.sleep(REST)
            began = time.perf_counter()
            systems[name]()
            timing.seconds.append(time.perf_counter() - began)
    for name, timing in timings.items():
        if timing.median <= LONG:
            with _Peak(device) as peak:
                systems[name]()
            timing.peak_bytes = peak.bytes
    return timings


class Unavailable(Exception):
    """A system that cannot run here, and why."""


class _Peak:
    """Memory at its highest inside the block, beyond what was held at its start; None where nobody counts it.

    CPU: the process's resident memory. GPU: PyTorch's allocator is reset before; JAX's tells its highest ever, so that
    a JAX row is exact only where it needs more than the rows before it.
    """

    def __init__(self, device: str):
        self.device, self.bytes = device, None

    def __enter__(self):
        if self.device == "cpu":
            with contextlib.suppress(AttributeError, OSError):  # not on Linux, or not with its usual allocator
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._before = _resident("VmRSS")
        elif torch := sys.modules.get("torch"):
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_):
        if self.device == "cpu":
            peak = _resident("VmHWM")
            self.bytes = None if peak is None else max(peak - self._before, 0)
            return
        import jax

        of_torch = sys.modules["torch"].cuda.max_memory_allocated() if "torch" in sys.modules else 0
        of_jax = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        self.bytes = max(of_torch, of_jax)


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


@functools.cache
def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches at its best: FLOP/s of a large square product, bytes/s of a large copy (read + write),
    by JAX, and of the product by PyTorch where that is installed."""
    import jax
    import jax.numpy as jnp

    side, copied = (2048, 2**26) if device == "cpu" else (8192, 2**30)

    def best(function, *operands) -> float:
        jax.block_until_ready(function(*operands))
        took = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(function(*operands))
            took.append(time.perf_counter() - began)
        return min(took)

    found = {}
    for dtype in ("float32",) if device == "cpu" else ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (side, side), dtype)
        product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
        found[f"matmul_{dtype}"] = 2 * side**3 / best(product, a, a)
    x = jax.random.normal(jax.random.key(1), (copied // 4,))
    found["copy"] = 2 * copied / best(jax.jit(jnp.negative), x)  # `copy` itself could alias
    try:
        import torch
    except ImportError:
        return found
    place = torch.device("cuda" if device == "gpu" else "cpu")
    for dtype in ("float32",) if device == "cpu" else ("float32", "bfloat16"):
        a = torch.randn(side, side, device=place, dtype=getattr(torch, dtype))
        found[f"torch_matmul_{dtype}"] = 2 * side**3 / best(lambda a: torch_done(a @ a), a)
    return found


def torch_done(tensor):
    """The tensor, when it has been computed."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return tensor


def rows(
    benchmark: str, work: str, timings: dict[str, Timing], given: argparse.Namespace, facts: dict[str, dict], **numbers
) -> list[dict]:
    """One row a system, printed as a table and added to --out.

    Args:
      timings: as `in_turn` gives them.
      facts: by system, what was found out about its output (`correct`: agreement or error, in words), `flops` and
        `bytes` that it had to compute and to move.
      numbers: of the work, for the curves (latents=4096).
    """
    top = ceilings(given.device)
    ours = timings.get(OURS)
    made = []
    for name, timing in timings.items():
        row = {
            "benchmark": benchmark, "work": work, "system": name, "size": given.size, "device": given.device, **numbers,
            "seconds": timing.median, "least": min(timing.seconds), "most": max(timing.seconds),
            "compile_seconds": max(timing.first - timing.median, 0.0), "peak_bytes": timing.peak_bytes,
            "ratio": timing.median / ours.median if ours else None, **facts.get(name, {}),
        }  # fmt: skip
        if "flops" in row:
            row["flops_per_second"] = row["flops"] / timing.median
            row["share_of_matmul"] = row["flops_per_second"] / top[f"matmul_{row.get('dtype', 'float32')}"]
        if "bytes" in row:
            row["share_of_copy"] = row["bytes"] / timing.median / top["copy"]
        made.append(row | {"ceilings": top} | machine(given.device))
    show(f"{work} ({given.size}, {given.device})", made)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with open(given.out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
    return made


@functools.cache
def machine(device: str) -> dict[str, Any]:
    from miracle_jax import env, mesh

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "hardware": mesh.hardware(), "python": ".".join(map(str, sys.version_info[:3])), "commit": env.commit(ROOT),
        "versions": {name: version(name) for name in PACKAGES if version(name)},
        "command": _command(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _command() -> str:
    """What was typed, but where its results go, behind what launch/setup.sh sets; "" where nobody typed it."""
    spec, given = sys.modules["__main__"].__spec__, sys.argv[1:]
    if "--out" in given:
        del given[given.index("--out") : given.index("--out") + 2]
    pages = [f"{name}={value}" for name, value in os.environ.items() if name == HUGE_PAGES]
    return " ".join([*pages, "python -m", spec.name, *given]) if spec else ""


COLUMNS = ("system", "seconds", "spread", "theirs / ours", "first call +", "peak MiB", "of matmul", "of copy", "result")


def cells(row: dict) -> tuple[str, ...]:
    """A row of the table, by COLUMNS."""

    def share(name):
        return f"{row[name]:.0%}" if name in row else ""

    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    ratio = "" if row["ratio"] is None or row["system"] == OURS else f"{row['ratio']:.2f}"
    return (
        row["system"], seconds(row["seconds"]), f"{seconds(row['least'])} to {seconds(row['most'])}", ratio,
        f"{row['compile_seconds']:.1f}", peak, share("share_of_matmul"), share("share_of_copy"), row.get("correct", ""),
    )  # fmt: skip


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def show(title: str, made: list[dict]) -> None:
    """Prints rows as a table (Markdown, which is also what RESULTS.md holds)."""
    print(f"\n{title}\n\n{table(COLUMNS, map(cells, made))}", flush=True)


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown, with columns that also line up as plain text."""
    lines = [columns, ["---"] * len(columns), *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
