"""The benchmarks' own logic: timing in turn, rows and tables, bars, curves, the picture and the suite."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as suite
from benchmarks import measure, plot, sampler, tables
from miracle_jax.errors import UserError

GIVEN = types.SimpleNamespace(size="base", device="cpu", out=None, repeats=3, curves=False)
TOP = {"matmul_float32": 1e9, "copy": 1e9}


def row(benchmark="sampler", system=measure.OURS, seconds=1.0, work="4096 latents x 768, 3 attributes, relu", **others):
    return {
        "benchmark": benchmark, "work": work, "system": system, "size": "base", "device": "cpu", "seconds": seconds,
        "least": seconds, "most": seconds, "compile_seconds": 0.5, "peak_bytes": 2**20, "ratio": seconds,
        "ceilings": TOP, "hardware": "a machine", "commit": "abc", "date": "2026-01-01", "python": "3.11.7",
        "versions": {"jax": "0.10.2"}, "command": "python -m benchmarks.sampler --out /somewhere/r.jsonl", **others,
    }  # fmt: skip


def everything():
    """Rows of every kind."""
    systems = {measure.OURS: (1, 1e-3), "as released": (11, 2e-3), "modernised, torchdiffeq": (6, 2e-3)}
    rows = [row(system=name, seconds=seconds, error=error) for name, (seconds, error) in systems.items()]
    for benchmark, number in tables.CURVES.items():
        for n in (1, 2, 4, 8):
            if benchmark == "devices":
                rows += [row(benchmark, work=f"{what}, on {n} devices", seconds=n, devices=n, **{what: 64})
                         for what in ("latents", "batch")]  # fmt: skip
                continue
            rows += [row(benchmark, name, n * factor, f"{n} things, silu", **{number: n})
                     for name, factor in ((measure.OURS, 0.1), ("modernised", 0.3))]  # fmt: skip
    for activation in ("relu", "silu"):
        for tolerance in (1e-2, 1e-3):
            work = f"64 latents, {activation}, tolerance {tolerance:g}"
            rows.append(row(tables.ACCURACY, "miracle_jax, bosh3", 1e-3 / tolerance, work, tolerance=tolerance,
                            error=tolerance, ratio=None))  # fmt: skip
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


# ---- measure


def test_systems_are_called_in_turn_and_a_missing_one_is_left_out(capsys):
    calls = []

    def absent():
        raise measure.Unavailable("no such thing here")

    systems = {"a": lambda: calls.append("a") or 1, "gone": absent, "b": lambda: calls.append("b") or 2}
    timings = measure.in_turn(systems, 3, "cpu")
    assert "".join(calls) == "ab" + "ababab" + "ab"  # the first ones, those that are timed, those for their memory
    assert {name: timing.output for name, timing in timings.items()} == {"a": 1, "b": 2}
    assert all(len(timing.seconds) == 3 for timing in timings.values())
    assert "gone is left out: no such thing here" in capsys.readouterr().err


def test_the_median_is_of_the_later_calls():
    assert measure.Timing(100.0, [3.0, 1.0, 2.0], None, None).median == 2.0


def test_a_slow_system_is_called_once_more_only(monkeypatch):
    monkeypatch.setattr(measure, "LONG", 0.0)
    timings = measure.in_turn({"slow": lambda: None}, 5, "cpu")
    assert len(timings["slow"].seconds) == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_memory_counts_though_an_earlier_call_has_left_it_with_the_process():
    """Pieces of 64 KiB stay with the process's allocator when they are freed below one that is held."""
    held = []

    def work():
        pieces = [bytearray(2**16) for _ in range(1024)]
        held.append(bytearray(2**16))
        del pieces

    timings = measure.in_turn({"a": work, "b": work}, 2, "cpu")
    for timing in timings.values():
        assert 2**25 < timing.peak_bytes < 2**28


def test_rows_are_whole_and_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "ceilings", lambda device: TOP)
    given = types.SimpleNamespace(**vars(GIVEN) | {"out": tmp_path / "new" / "rows.jsonl"})
    timings = {measure.OURS: measure.Timing(2.5, [0.5, 0.5], 2**20, None)}
    timings["as released"] = measure.Timing(5, [5], None, None)
    facts = {measure.OURS: {"flops": 1e8, "bytes": 1e8, "correct": "as it should be"}}
    made = measure.rows("sampler", "a work", timings, given, facts, latents=7)
    assert tables.read([given.out]) == made and measure.rows("sampler", "a work", timings, given, facts, latents=7)
    assert len(tables.read([given.out])) == 4  # added, not written over
    ours, theirs = made
    assert theirs["ratio"] == 10 and ours["compile_seconds"] == 2.0 and ours["latents"] == 7
    assert ours["share_of_matmul"] == pytest.approx(0.2) and ours["share_of_copy"] == pytest.approx(0.2)
    assert measure.cells(ours) == (
        "miracle_jax", "500 ms", "500 ms to 500 ms", "", "2.0", "1", "20%", "20%", "as it should be",
    )  # fmt: skip
    assert measure.cells(theirs)[3:6] == ("10.00", "0.0", "")
    assert "a work (base, cpu)" in capsys.readouterr().out


def test_numbers_of_calls_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        measure.arguments("doc", ["--repeats", "0"])
    assert "--repeats is 0" in capsys.readouterr().err


# ---- Reading


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"benchmark": "sampler"}', "no compile_seconds, device, hardware, least"),
        (json.dumps(row() | {"seconds": "1"}), "seconds is '1', which is no number"),
        (json.dumps(row() | {"work": 3}), "work is 3, which is no text"),
        (json.dumps(row("decode scaling")), "replies is None, which is no number"),
    ],
)
def test_a_line_that_no_benchmark_wrote_is_one_sentence(tmp_path, capsys, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl:2: {problem.replace('(', '.')}"):
        tables.read([path])
    for main in (plot.main, tables.main):
        with pytest.raises(SystemExit) as stopped:
            main([str(path)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_a_missing_file_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "none.jsonl")])
    assert capsys.readouterr().err.startswith("error: No such file or directory: ")


def test_the_last_run_of_a_work_counts():
    first = [row(seconds=1.0), row(system="as released", seconds=9.0), row(work="other")]
    assert tables.works([*first, row(seconds=2.0)]) == [[row(seconds=2.0)], [row(work="other")]]
    assert tables.works([row(seconds=1.0), row(seconds=2.0)]) == [[row(seconds=2.0)]]
    elsewhere = row(hardware="2 x GPU"), row(hardware="4 x GPU", system="other"), row(hardware="GPU B")
    assert [len(work) for work in tables.works(elsewhere)] == [2, 1]


# ---- Curves


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_exact(power):
    numbers = [1, 8, 64, 512, 4096]
    assert tables.exponent(numbers, [3e-4 * n**power for n in numbers]) == pytest.approx(power, abs=1e-9)


def test_the_exponent_is_that_of_the_larger_half():
    numbers = [64, 1, 8, 2, 16, 32, 4]
    assert tables.exponent(numbers, [max(n, 8) ** 2 for n in numbers]) == pytest.approx(2.0)
    assert tables.exponent([1, 2, 3], [9.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert tables.exponent([2], [1.0]) is None and tables.exponent([], []) is None
    assert tables.exponent([2, 2], [1.0, 2.0]) is None


# ---- Bars


def judged(*rows, bar=None):
    return tables.verdict(bar or tables.BARS[("sampler", "cpu", "base", "relu")], list(rows))


def test_bars():
    ours, theirs = row(error=1e-3), row(system="as released", seconds=10.0, error=2e-3)
    modern = row(system="modernised, torchode", seconds=5.0, error=2e-3)
    faster = row(system="modernised, torchdiffeq", seconds=4.5, error=2e-3)
    assert judged(ours, theirs, modern) == "met"
    assert judged(ours, theirs, modern, faster) == "not met: 4.50x modernised"
    assert judged(ours, theirs) == "not measured: modernised"
    assert judged(ours | {"error": 3e-3}, theirs, modern).startswith("not met: error 3.0e-03 against 2.0e-03 as")
    # The rows with syncs and with the factor are shown, and not what the bar is taken against.
    assert judged(ours, row(system="as released, with its syncs", seconds=99), modern) == "not measured: as released"
    bar = tables.Bar(most=(("seconds", 0.25),), least=(("share_of_matmul", 0.75),))
    assert bar.text() == "<= 250 ms, >= 75% of matmul"
    assert judged(row(seconds=0.2, share_of_matmul=0.8), bar=bar) == "met"
    assert judged(row(seconds=0.3, share_of_matmul=0.7), bar=bar) == "not met: 300 ms, 70% of matmul"
    assert judged(row(seconds=0.2), bar=bar) == "not measured: share_of_matmul"


def test_the_summary_has_a_line_a_work():
    lines = tables.summary(tables.works(everything())).splitlines()
    assert len(lines) == 3  # curves are no works
    assert tables.summary(tables.works([row("devices", devices=1)])) == ""
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "sampler: 4096 latents x 768, 3 attributes, relu (base, cpu)", "1 s", "11 s", "6 s", "11.00", "6.00",
        ">= 10x as released, >= 5x modernised", "met",
    ]  # fmt: skip


# ---- Markdown and picture


def test_markdown(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [*everything(), row(hardware="another machine")])
    tables.main([str(path)])
    text = capsys.readouterr().out
    assert text.count("\n## ") == 2 and "## a machine\n\nCommit abc, measured on 2026-01-01, Python 3.11.7" in text
    assert "    python -m benchmarks.sampler\n" in text and "/somewhere" not in text
    assert "| matmul float32, GFLOP/s | 1 " in text
    for heading in ("Summary", "sampler: 4096 latents", "decode scaling (replies)", "devices (devices)"):
        assert f"\n### {heading}" in text
    assert "Accuracy against time of the sampler, silu heads" in text
    assert all(line.startswith("|") == line.endswith("|") for line in text.splitlines())
    assert text.count(" 1.00 ") >= 8  # the exponents


@pytest.mark.parametrize("kept", [None, {"sampler"}, {"decode scaling"}, {tables.ACCURACY, "sampler"}])
def test_picture(tmp_path, kept):
    rows = [each for each in everything() if kept is None or each["benchmark"] in kept]
    plot.main([str(write(tmp_path / "rows.jsonl", rows)), "--out", str(tmp_path / "new" / "picture.png")])
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_one_machine(tmp_path, capsys):
    for rows, problem in ((everything() + [row(hardware="b")], "rows of 2 machines: a machine; b"), ([], "no rows")):
        with pytest.raises(SystemExit):
            plot.main([str(write(tmp_path / "rows.jsonl", rows))])
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "rows.png").exists()


# ---- The suite


def test_the_suite_goes_on_after_a_failure(monkeypatch, tmp_path, capfd):
    """Each benchmark is a process; here one that writes a row, one that fails and one that takes too long."""
    out = write(tmp_path / "rows.jsonl", [row(work="measured before")])
    programs = {
        "sampler": f"print({json.dumps(row())!r}, file=open({str(out)!r}, 'a'))",
        "decode": "raise ValueError('no memory left')",
        "train_step": "import os; os.kill(os.getpid(), 9)",
        "compile": "import time; time.sleep(60)",
    }
    monkeypatch.setattr(suite, "command", lambda name, given, out: [sys.executable, "-c", programs[name]])
    monkeypatch.setattr(suite, "run", _limited(suite.run, "time.sleep", 1.0))
    with pytest.raises(SystemExit) as stopped:
        suite.main(["--out", str(out), "--only", *programs])
    said = capfd.readouterr()
    assert stopped.value.code == 1
    assert "error: benchmarks.decode failed: ValueError: no memory left" in said.err
    assert "error: benchmarks.train_step failed: ended by SIGKILL" in said.err
    assert "no time for compile (stopped when the time was over)" in said.err
    assert "sampler: 4096 latents" in said.out and "measured before" not in said.out


def _limited(run, program: str, seconds: float):
    """The suite's `run`, in which a program has so many seconds."""
    return lambda arguments, limit: run(arguments, seconds if program in arguments[-1] else limit)


def test_none_starts_after_the_time(monkeypatch, capfd):
    clock = iter([0.0, 1.0, 121.0, 122.0])
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(suite, "run", lambda command, left: "")
    suite.main(["--minutes", "2", "--only", "compile", "sampler", "decode"])
    assert "no time for decode, compile: --minutes 2" in capfd.readouterr().err


def test_commands_of_the_suite(tmp_path, capsys):
    given = suite.read_flags(["--curves", "--repeats", "2"])
    assert suite.command("decode", given, tmp_path / "o")[1:] == [
        "-m", "benchmarks.decode", "--size", "base", "--device", "cpu", "--repeats", "2", "--curves", "--out",
        str(tmp_path / "o"),
    ]  # fmt: skip
    assert "tiny" in suite.command("end_to_end", given, tmp_path / "o")
    on_gpu = suite.read_flags(["--device", "gpu", "--size", "paper"])
    assert "paper" in suite.command("end_to_end", on_gpu, tmp_path / "o")
    for wrong in (["--only", "smpler"], ["--minutes", "0"]):
        with pytest.raises(SystemExit):
            suite.read_flags(wrong)
    assert "--minutes is 0; give a time" in capsys.readouterr().err


def test_every_benchmark_and_bar_is_there():
    for name in suite.BENCHMARKS:
        assert importlib.util.find_spec(f"benchmarks.{name}"), name
    assert {key[0] for key in tables.BARS} <= set(suite.BENCHMARKS)


# ---- The sampler's problem


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_committed_heads_read_the_committed_latents(activation):
    from benchmarks.make_latents import FILE

    mean, logvar, aspects, weights = sampler.problem(3840)
    assert mean.shape == logvar.shape == (3840, 768) and aspects.shape == weights.shape == (3840, 3)
    assert len(set(map(tuple, aspects))) == 8
    assert sampler.our_heads(activation)(mean[:5]).shape == (5, 3, 2)
    with np.load(FILE) as stored:
        accuracy = stored[f"{activation}_accuracy"]
    assert accuracy.shape == (3,) and accuracy.mean() >= 0.9


@pytest.mark.torch
def test_the_sampler_benchmark_runs(monkeypatch, tmp_path):
    for name in ("torch", "torchdiffeq", "torchode"):
        pytest.importorskip(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the benchmark sets both; this puts them back
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(measure, "ceilings", lambda device: TOP)
    monkeypatch.setattr(sampler, "LATENTS", {"tiny": 16})
    monkeypatch.setattr(sampler, "JUDGED", 2)
    out = tmp_path / "rows.jsonl"
    # The real one takes long to compile and, for ReLU, 20,000 steps.
    tight = sampler.ours("silu", 16, 1e-6)().z[sampler.judged(16)]
    monkeypatch.setattr(sampler, "reference", lambda activation, latents: tight)
    sampler.compare("silu", measure.arguments("", ["--size", "tiny", "--repeats", "1", "--out", str(out)]))
    rows = tables.read([out])
    assert len(rows) == 6 and rows[0]["system"] == measure.OURS
    released = next(each for each in rows if each["system"] == "as released")
    assert rows[0]["error"] <= released["error"] < 0.01
    assert "16 latents x 768, 3 attributes, silu (tiny, cpu)" in tables.markdown(rows)
