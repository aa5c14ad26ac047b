"""All benchmarks, each in a process of its own, and a summary that judges them by their bars.

    python -m benchmarks [--size tiny|base|paper] [--device cpu|gpu] [--curves] [--out results.jsonl]
        [--only sampler decode ...] [--minutes 9]

The most important come first. One that fails is named at the end with its reason, and the others still run. After
--minutes none starts any more and the one under way is stopped; what it has measured by then counts.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import measure, tables
from miracle_jax.errors import one_sentence

BENCHMARKS = ("sampler", "decode", "train_step", "end_to_end", "compile", "devices")
ON_CPU = {"end_to_end": "tiny"}
"""Sizes in place of base on a CPU: what the model of the quickstart does, with all the rest around it."""
STOPPED = "stopped when the time was over"


def read_flags(argv: list[str] | None):
    parser = measure.flags(__doc__)
    parser.prog = "python -m benchmarks"
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", default=BENCHMARKS, metavar="BENCHMARK",
                        help=f"of {', '.join(BENCHMARKS)}")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=math.inf, help="the most that all may take")
    given = parser.parse_args(argv)
    if given.minutes <= 0:
        parser.error(f"--minutes is {given.minutes:g}; give a time, or leave it out for as long as it takes")
    return given


def command(name: str, given, out: Path) -> list[str]:
    """Of one benchmark."""
    size = ON_CPU.get(name, given.size) if (given.device, given.size) == ("cpu", "base") else given.size
    made = [sys.executable, "-m", f"benchmarks.{name}", "--size", size, "--device", given.device]
    return [*made, "--repeats", str(given.repeats), *["--curves"] * given.curves, "--out", str(out)]


def run(arguments: list[str], limit: float) -> str:
    """Runs a command, its output shown as it comes. Returns why it failed; "" where it did not.

    limit: seconds after which it is stopped, and what it has started too.
    """
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
    over = threading.Event()

    def stop():
        over.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(min(limit, threading.TIMEOUT_MAX), stop)
    timer.start()
    last = ""
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # we were interrupted
            os.killpg(process.pid, signal.SIGKILL)
    if over.is_set():
        return STOPPED
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    return (last or f"ended with status {process.returncode}") if process.returncode else ""


def run_all(given, out: Path) -> tuple[list[dict], dict[str, str], list[str]]:
    """The rows that were measured; those that failed, with their reasons; those that there was no time for."""
    before = len(tables.read([out])) if out.exists() else 0
    end = time.monotonic() + 60 * given.minutes
    failed, left_out = {}, []
    for name in (name for name in BENCHMARKS if name in given.only):
        left = end - time.monotonic()
        if left <= 0:
            left_out.append(name)
            continue
        print(f"\n== {name}", flush=True)
        reason = run(command(name, given, out), left)
        if reason == STOPPED:
            left_out.append(f"{name} ({reason})")
        elif reason:
            failed[name] = reason
    return (tables.read([out])[before:] if out.exists() else []), failed, left_out


def main(argv: list[str] | None = None) -> None:
    given = read_flags(argv)
    with one_sentence(), tempfile.TemporaryDirectory() as folder:
        rows, failed, left_out = run_all(given, given.out or Path(folder) / "results.jsonl")
    if judged := tables.summary(tables.works(rows)):
        print(f"\n== Summary\n\n{judged}", flush=True)
    if left_out:
        print(f"\nno time for {', '.join(left_out)}: --minutes {given.minutes:g}", file=sys.stderr)
    for name, reason in failed.items():
        print(f"error: benchmarks.{name} failed: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
