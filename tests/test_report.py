"""What a run tells: the bar, the lines, metrics.jsonl and the trackers."""

import builtins
import io
import json
import sys
import types

import pytest

from miracle_jax import config, report
from miracle_jax.errors import UserError
from miracle_jax.report import Report

LOSSES = {"reconstruct": 2.5, "kl": 0.125}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved."""
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    return now


def test_speed_and_eta_are_those_of_the_last_interval_without_its_pauses(tmp_path, clock, capsys):
    told = Report(tmp_path, config.Train(batch_size=16), start=10, total=100_000)
    clock[0] += 5
    told.training(20, LOSSES)
    paused = told.pause()
    clock[0] += 1000  # validation
    told.resume(paused)
    clock[0] += 10
    told.training(30, LOSSES)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 20/100000  reconstruct 2.5  kl 0.125  32 examples/s  ETA 13:53:10"
    assert second == "step 30/100000  reconstruct 2.5  kl 0.125  16 examples/s  ETA 1 day, 3:46:10"
    assert rows(tmp_path)[1] == {"step": 30, "split": "train", **LOSSES, "examples_per_second": 16.0}


def test_what_was_compiled_is_told_and_why_a_shape_was_compiled_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.compiled, "PROGRAMS", [])
    told = Report(tmp_path, config.Train(), start=0, total=20)
    for name, kept, shape in (
        ("train_step", False, (8, 9, 4)), ("validation_step", False, (8, 9, 4)), ("train_step", True, (16, 20, 4)),
        ("validation_step", False, (16, 20, 4)), ("train_step", False, (8, 9, 4)),
    ):  # fmt: skip
        report.compiled.PROGRAMS.append(report.compiled.Program(name, 2.0, kept))
        told.compiled(shape)
    assert capsys.readouterr().out.splitlines() == [
        "train_step for lengths (8, 9, 4) compiled in 2.0 s",
        "validation_step compiled in 2.0 s",
        "train_step for lengths (16, 20, 4) read from the cache in 2.0 s",
        "validation_step compiled in 2.0 s",
        "train_step for lengths (8, 9, 4), packed otherwise, compiled in 2.0 s",
    ]


def test_a_terminal_gets_a_bar_with_the_losses(tmp_path, clock, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    told = Report(tmp_path, config.Train(batch_size=16), start=10, total=40)
    clock[0] += 5
    told.progress(20)
    told.training(20, LOSSES)
    told.bar.refresh()
    told.say("validation at step 20")
    told.close()
    shown = screen.getvalue()
    assert "20/40" in shown and "32 examples/s  reconstruct 2.5  kl 0.125" in shown
    assert "validation at step 20" in capsys.readouterr().out and "step 20/40" not in shown


def test_a_resumed_run_forgets_what_was_logged_after_its_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 11}\n{"nothing": 1}\n{"step": 1')
    told = Report(tmp_path, config.Train(), start=10, total=20)
    told.write("validation", 10, {"score": 1.0})
    assert rows(tmp_path) == [{"step": 5}, {"step": 10}, {"step": 10, "split": "validation", "score": 1.0}]
    Report(tmp_path, config.Train(), start=0, total=20)
    assert rows(tmp_path) == []


def test_another_process_than_the_first_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.jax, "process_index", lambda: 1)
    told = Report(tmp_path, config.Train(tensorboard=True), start=0, total=20)
    told.progress(10)
    told.training(10, LOSSES)
    told.say("hello")
    told.plot()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_the_plot_shows_training_and_validation(tmp_path):
    told = Report(tmp_path, config.Train(), start=0, total=20)
    told.plot()
    assert not (tmp_path / "training.png").exists()  # nothing to draw
    told.write("train", 10, LOSSES)
    told.write("validation", 10, {"reconstruct_prior": 2.0})
    told.plot()
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# ------------------------------------------------------------------------------------------------ trackers


@pytest.mark.parametrize(("flag", "module"), [("tensorboard", "tensorboardX"), ("trackio", "trackio")])
def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch, flag, module):
    real = builtins.__import__

    def absent(name, *arguments, **options):
        if name == module:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    Report(tmp_path, config.Train(), start=0, total=20)  # off unless asked for
    message = rf"train.{flag} is on but {module} is not installed; pip install 'miracle-jax\[{flag}\]'"
    with pytest.raises(UserError, match=message):
        Report(tmp_path, config.Train(**{flag: True}), start=0, total=20)


def test_trackers_get_what_metrics_get(tmp_path, monkeypatch):
    heard = []
    writer = types.SimpleNamespace(add_scalar=lambda *point: heard.append(point), flush=lambda: heard.append("flush"))
    tensorboard = types.SimpleNamespace(SummaryWriter=lambda folder: heard.append(folder) or writer)
    trackio = types.SimpleNamespace(
        init=lambda **options: heard.append(options), log=lambda values, step: heard.append((values, step))
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    told = Report(tmp_path / "tiny", config.Train(tensorboard=True, trackio=True), start=0, total=20)
    (tmp_path / "tiny").mkdir(exist_ok=True)
    told.write("train", 10, LOSSES)
    assert heard == [
        str(tmp_path / "tiny" / "tensorboard"),
        {"project": "miracle-jax", "name": "tiny"},
        ("train/reconstruct", 2.5, 10),
        ("train/kl", 0.125, 10),
        "flush",
        ({"train/reconstruct": 2.5, "train/kl": 0.125}, 10),
    ]


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboardX")
    told = Report(tmp_path, config.Train(tensorboard=True), start=0, total=20)
    told.write("train", 10, LOSSES)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()][0].startswith("events.out.tfevents")
