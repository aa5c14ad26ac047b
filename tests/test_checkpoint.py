"""Checkpoints: which are kept, what a restore refuses, and that what is written is whole or absent."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miracle_jax import checkpoint, storage
from miracle_jax.errors import UserError


def state(value: float, size: int = 3) -> dict:
    return {
        "params": {"layer": {"bias": jnp.full(size, float(value))}},
        "opt_state": [jnp.int32(7)],
        "step": jnp.int32(value),
    }


def shapes(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def save_all(workdir, scores: dict[int, float | None], keep: int = 2):
    manager = checkpoint.open_manager(workdir, keep)
    for step, score in scores.items():
        checkpoint.save(manager, step, state(step), score)
    checkpoint.finish(manager)
    return manager


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(path): whatever would appear there does not fit the disk."""

    def fill(path):
        rename = os.rename

        def refuse(source, target, **options):
            if str(target) == str(path):
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            return rename(source, target, **options)

        monkeypatch.setattr(os, "rename", refuse)

    yield fill
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------ what is kept


def test_the_newest_survives_a_bad_validation_and_the_best_is_kept_too(tmp_path):
    manager = save_all(tmp_path, {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 9.0})
    assert sorted(manager.all_steps()) == [20, 40, 50]
    manager.close()
    again = checkpoint.open_manager(tmp_path, keep=2)  # as a resumed run finds it
    assert again.latest_step() == 50 and checkpoint.best_step(again) == 20
    for step in (20, 50):
        restored = checkpoint.restore(again, step, shapes(state(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    checkpoint.save(again, 60, state(60), 0.5)
    checkpoint.finish(again)
    assert sorted(again.all_steps()) == [50, 60] and checkpoint.best_step(again) == 60


def test_without_a_validation_the_newest_is_the_best(tmp_path):
    assert checkpoint.best_step(save_all(tmp_path, {1: None, 2: None})) == 2
    assert checkpoint.best_step(checkpoint.open_manager(tmp_path / "empty", keep=1)) is None


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """Training goes on, in the same buffers, while the checkpoint is being written."""
    manager = checkpoint.open_manager(tmp_path, keep=1)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    now = jax.tree.map(jnp.asarray, state(4, size=100_000))
    checkpoint.save(manager, 4, now, None)
    for _ in range(5):
        now = overwrite(now)
    checkpoint.finish(manager)
    restored = checkpoint.restore(manager, 4, shapes(now))
    jax.tree.map(np.testing.assert_array_equal, restored, state(4, size=100_000))


# ------------------------------------------------------------------------------------------------ what does not fit


def test_a_checkpoint_of_another_form_is_refused_with_every_difference(tmp_path):
    manager = save_all(tmp_path, {5: None})
    expected = shapes({"params": {"layer": {"bias": jnp.zeros(4), "kernel": jnp.zeros((4, 2))}}, "step": jnp.zeros(())})
    with pytest.raises(UserError) as error:
        checkpoint.restore(manager, 5, expected)
    first, *problems, last = str(error.value).splitlines()
    assert first == f"checkpoint {tmp_path}/checkpoints/5 does not match the model:"
    assert problems == [
        "  params.layer.kernel: missing (model expects (4, 2) float32)",
        "  opt_state.0: not in the model (checkpoint has () int32)",
        "  params.layer.bias: checkpoint has (3,) float32, model expects (4,) float32",
        "  step: checkpoint has () int32, model expects () float32",
    ]
    assert "another config" in last


def test_many_differences_are_counted():
    expected = {f"layer{i:02}": jnp.zeros(1) for i in range(25)}
    with pytest.raises(UserError) as error:
        checkpoint.check_matches("it", {}, expected)
    assert str(error.value).count("missing") == 20 and "... and 5 more" in str(error.value)
    checkpoint.check_matches("it", expected, shapes(expected))


# ------------------------------------------------------------------------------------------------ the finished model


def test_model_json_is_written_when_the_model_is_whole(tmp_path, monkeypatch):
    model, seen = state(1), []
    replacing = storage.replacing

    def look(path):
        loaded = checkpoint.load_model(tmp_path, shapes(model))
        jax.tree.map(np.testing.assert_array_equal, loaded, model)
        seen.append(str(path))
        return replacing(path)

    monkeypatch.setattr(checkpoint.storage, "replacing", look)
    checkpoint.save_model(tmp_path, model, {"step": 1})
    assert seen == [str(tmp_path / "model.json")]
    assert json.loads((tmp_path / "model.json").read_text()) == {"step": 1}
    monkeypatch.undo()
    checkpoint.save_model(tmp_path, state(2), {"step": 2})  # stage 2 that runs again
    assert checkpoint.load_model(tmp_path, shapes(model))["step"] == 2


def test_a_model_of_another_form_is_refused(tmp_path):
    checkpoint.save_model(tmp_path, state(1), {})
    with pytest.raises(UserError, match=r"(?s)model .*/model does not match the model:\s+params.layer.bias"):
        checkpoint.load_model(tmp_path, shapes(state(1, size=9)))


def test_a_model_that_is_missing_or_damaged_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="model is missing; it holds the parameters of the run"):
        checkpoint.load_model(tmp_path, shapes(state(1)))
    checkpoint.save_model(tmp_path, state(1), {})
    data = list((tmp_path / "model").rglob("d/*"))
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read, its files are damaged .*; restore them from a copy"):
        checkpoint.load_model(tmp_path, shapes(state(1)))


# ------------------------------------------------------------------------------------------------ interrupted


def test_a_full_disk_is_one_sentence_and_earlier_checkpoints_are_intact(tmp_path, full_disk):
    manager = save_all(tmp_path, {1: 1.0})
    full_disk(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="could not be written: .*No space left.*; earlier checkpoints are intact;"):
        checkpoint.save(manager, 2, state(2), 0.5)
        checkpoint.finish(manager)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left[0] == "1" and len(left) == 2  # what was written of 2, under another name
    again = checkpoint.open_manager(tmp_path, keep=2)
    assert again.all_steps() == [1] and checkpoint.best_step(again) == 1
    assert checkpoint.restore(again, 1, shapes(state(0)))["step"] == 1
    again.close()  # leftovers are removed in the background
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_model_that_does_not_fit_the_disk_leaves_no_model_json(tmp_path, full_disk):
    full_disk(tmp_path / "model")
    with pytest.raises(UserError, match="could not be written: .*No space left"):
        checkpoint.save_model(tmp_path, state(1), {})
    assert not (tmp_path / "model.json").exists() and not (tmp_path / "model").exists()


def test_other_errors_are_not_called_a_full_disk():
    with pytest.raises(ValueError, match="something else"), checkpoint._disk_errors():
        raise ValueError("something else")
