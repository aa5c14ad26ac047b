"""The training loop with a step that costs nothing: stops, losses that go wrong, saves by time, the watchdog."""

import itertools
import json
import os
import re
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miracle_jax import config, goodput, loop
from miracle_jax.checkpoint import Checkpoints
from miracle_jax.loop import Diverged
from miracle_jax.preemption import Preempted
from miracle_jax.report import Report

SETTINGS = {"log_every": 3, "eval_every": 10, "save_every": 5, "save_minutes": 0.0}


def step_of(skip: bool = False, bad=()):
    """A step that adds its batch to the parameter; in the steps `bad` its loss is NaN."""

    @jax.jit
    def train_step(state, batch):
        number = state["step"] + 1
        wrong = jnp.isin(number, jnp.array([*bad, -1]))
        loss = jnp.where(wrong, jnp.nan, 1.0)
        named = {"kl": loss, "gradient_norm": jnp.float32(2)} | ({"skipped": wrong} if skip else {})
        added = jnp.where(wrong & skip, 0.0, batch["reply"].sum())
        return {"params": state["params"] + added, "step": number}, named

    return train_step


def run(folder, train_step=None, total=30, validate=None, **settings):
    """Trains in a folder, new or not. Returns (the last state, how it ended)."""
    settings = config.Train(**(SETTINGS | settings))
    checkpoints = Checkpoints(folder, settings.keep)
    state = {"params": jnp.float32(0), "step": jnp.int32(0)}
    if newest := checkpoints.newest():
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state = checkpoints.restore(newest, shapes)
    report = Report(folder, settings, int(state["step"]), total)
    try:
        state = loop.take_steps(
            settings, state, lambda start: ({"reply": np.full((1, 1, 4), n)} for n in itertools.count(start)),
            train_step or step_of(), lambda step: 0.1,
            validate or (lambda params: {"score": 1.0}), checkpoints, report, goodput.Ledger(),
        )  # fmt: skip
    finally:
        checkpoints.close()
    return state


def rows(folder, split):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["split"] == split]


def total_of(steps):
    """The parameter after these steps."""
    return sum(4.0 * (step - 1) for step in steps)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)  # it is heard in another thread


def terminating_at(number, train_step=None):
    """The step, with SIGTERM while it is being taken."""
    train_step = train_step or step_of()

    def take(state, batch):
        if int(state["step"]) + 1 == number:
            terminate()
        return train_step(state, batch)

    return take


# ------------------------------------------------------------------------------------------------ stopped


def test_sigterm_saves_after_the_step_and_nothing_is_lost(tmp_path, capfd):
    with pytest.raises(Preempted, match="^stopped by SIGTERM at step 17 of 30, which is saved$"):
        run(tmp_path, terminating_at(17))
    assert Checkpoints(tmp_path, 2).steps()[-1] == 17
    assert "SIGTERM: saving and ending; a second one ends at once" in capfd.readouterr().err
    taken = []

    def counting(state, batch):
        taken.append(int(state["step"]) + 1)
        return step_of()(state, batch)

    state = run(tmp_path, counting)
    assert taken == list(range(18, 31)) and float(state["params"]) == total_of(range(1, 31))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_sigterm_while_the_first_step_compiles_ends_at_once(tmp_path, monkeypatch):
    statuses = []

    def end(status):
        statuses.append(status)
        raise SystemExit  # ends the thread that listens

    monkeypatch.setattr(os, "_exit", end)
    run(tmp_path, terminating_at(1))
    assert statuses == [75]
    with pytest.raises(Preempted, match="at step 32 of 40"):
        run(tmp_path, terminating_at(32), total=40)
    assert statuses == [75]


def test_a_validation_that_sigterm_ended_is_made_up_for(tmp_path):
    calls = []

    def validate(params):
        calls.append(float(params))
        if len(calls) == 2:
            terminate()
        loop.of_batches(jnp.sqrt, [params] * 3)
        return {"score": 1.0 / len(calls)}

    with pytest.raises(Preempted, match="at step 20 of 30"):
        run(tmp_path, validate=validate)
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.newest() == 20 and checkpoints.score(20) is None and checkpoints.score(10) == 1.0
    run(tmp_path, validate=validate)
    assert calls == [total_of(range(1, n + 1)) for n in (10, 20, 20, 30)]
    assert [row["step"] for row in rows(tmp_path, "validation")] == [10, 20, 30]
    assert Checkpoints(tmp_path, 2).score(30) == 0.25


def test_sigterm_during_a_save_lets_it_end_and_saves_the_present(tmp_path, monkeypatch):
    rename = os.rename

    def slow(source, target, **options):
        if str(target).endswith("checkpoints/5"):
            terminate()
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", slow)
    steps = step_of()

    def take(state, batch):
        time.sleep(0.02)
        return steps(state, batch)

    with pytest.raises(Preempted):
        run(tmp_path, take)
    saved = Checkpoints(tmp_path, 2).steps()
    assert saved[0] == 5 and 6 <= saved[1] <= 20


def test_sigterm_after_the_last_step_is_not_forgotten(tmp_path):
    def validate(params):
        if float(params) == total_of(range(1, 31)):
            terminate()
        return {"score": 1.0}

    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        run(tmp_path, validate=validate)
    assert Checkpoints(tmp_path, 2).score(30) == 1.0


def test_a_checkpoint_is_also_written_when_the_last_one_is_old(tmp_path, monkeypatch):
    """A minute a step; the clock of the day, which can be changed, is never asked."""
    now, steps, saved = [0.0], step_of(), []
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: saved.append(step))

    def take(state, batch):
        now[0] += 60.0
        return steps(state, batch)

    run(tmp_path, take, save_every=1000, eval_every=12, save_minutes=5.0)
    assert saved == [5, 10, 12, 17, 22, 24, 29, 30]


# ------------------------------------------------------------------------------------------------ going wrong


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e6])
def test_a_value_that_means_nothing_is_named_with_its_step(value):
    assert loop.finite({"kl": 1.0}, 3) == {"kl": 1.0}
    sentence = f"kl became {value:.4g} at step 3; the last checkpoint is intact"
    with pytest.raises(Diverged, match=re.escape(sentence)):
        loop.finite({"gap": 0.0, "kl": value}, 3)


def test_without_another_wish_it_stops_with_the_last_checkpoint_intact(tmp_path):
    with pytest.raises(Diverged, match="kl became nan at step 17"):
        run(tmp_path, step_of(bad=[17]))
    assert Checkpoints(tmp_path, 2).steps() == [10, 15]


def test_skip_leaves_a_step_out_and_counts_it_in_no_mean(tmp_path, capsys):
    state = run(tmp_path, step_of(skip=True, bad=[4, 5, 6, 17]), on_nan="skip")
    assert float(state["params"]) == total_of(set(range(1, 31)) - {4, 5, 6, 17})
    assert "kl became nan at step 17, which changes nothing" in capsys.readouterr().out
    assert all(row["kl"] == 1.0 and "skipped" not in row for row in rows(tmp_path, "train"))


def test_skip_gives_up_after_ten_in_a_row(tmp_path):
    bad = [*range(2, 11), *range(12, 30)]
    with pytest.raises(Diverged, match="kl became nan, as in the 9 steps before, at step 21"):
        run(tmp_path, step_of(skip=True, bad=bad), on_nan="skip")


def test_restore_goes_on_behind_the_bad_step_from_the_last_checkpoint(tmp_path, capsys):
    state = run(tmp_path, step_of(bad=[8, 17]), on_nan="restore")
    kept = [*range(1, 6), *range(9, 16), *range(18, 31)]
    assert float(state["params"]) == total_of(kept) and int(state["step"]) == 30
    assert "kl became nan at step 17: back to checkpoint 15, and on with step 18" in capsys.readouterr().out
    again = run(tmp_path / "again", step_of(bad=[8, 17]), on_nan="restore", log_every=1)
    assert float(again["params"]) == float(state["params"])


def test_restore_gives_up_when_it_gets_nowhere_or_has_nowhere_to_go(tmp_path):
    with pytest.raises(Diverged, match="kl became nan at step 18"):
        run(tmp_path / "a", step_of(bad=range(8, 30)), on_nan="restore", log_every=1, save_every=7)
    with pytest.raises(Diverged, match="kl became nan at step 2"):
        run(tmp_path / "b", step_of(bad=[2]), on_nan="restore")


# ------------------------------------------------------------------------------------------------ what it tells


def test_the_watchdog_dumps_all_stacks_when_no_step_ends(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(loop, "SHORTEST_SILENCE", 0.3)
    monkeypatch.setattr(loop.sys, "__stderr__", loop.sys.stderr)
    steps = step_of()

    def stuck_in_this_function(state, batch):
        if int(state["step"]) == 15:
            time.sleep(1.0)
        return steps(state, batch)

    run(tmp_path, stuck_in_this_function, eval_every=100, save_every=100)
    said = capfd.readouterr().err
    assert said.count("Timeout (0:00:00.3") == 1 and "stuck_in_this_function" in said


def test_goodput_counts_steps_that_a_killed_process_took_again(tmp_path):
    def row(step, split="goodput", **seconds):
        return json.dumps({"step": step, "split": split} | seconds) + "\n"

    (tmp_path / "metrics.jsonl").write_text(
        row(10, steps=2.0, compile=5.0) + row(10, "train", kl=1.0) + row(15, steps=1.0, data=0.5) + row(20, steps=1.0)
    )
    Report(tmp_path, config.Train(), start=10, total=30)
    assert [row["step"] for row in rows(tmp_path, "goodput")] == [10, 10, 10]
    seconds = goodput.total(tmp_path / "metrics.jsonl")
    assert seconds == {"compile": 5.0, "steps": 2.0, "repeated": 2.0, "data": 0.5} and list(seconds)[0] == "compile"
    assert goodput.sentence(seconds) == "goodput 21%: 2.0 of 9.5 s in steps; compile 5.0 s, repeated 2.0 s, data 0.5 s"


def test_every_second_is_in_one_account(monkeypatch):
    now, programs = [0.0], []
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(goodput.compiled, "PROGRAMS", programs)
    ledger = goodput.Ledger()
    now[0] = 1.0
    ledger.open("steps")
    now[0] = 3.0
    with ledger.of("validation"):
        now[0] = 8.0
        programs.append(goodput.compiled.Program("validation_step", 4.0, False))
    with ledger.of("data"):
        now[0] = 8.5
        ledger.account = "steps"
    now[0] = 9.0
    assert ledger.take() == {"start": 1.0, "steps": 3.0, "compile": 4.0, "validation": 1.0} and ledger.take() == {}
