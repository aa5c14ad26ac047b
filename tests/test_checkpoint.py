"""Checkpoints: which are kept, what a restore refuses, and that what is written is whole or absent."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miracle_jax import checkpoint, storage
from miracle_jax.checkpoint import Checkpoints
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
    checkpoints = Checkpoints(workdir, keep)
    for step, score in scores.items():
        checkpoints.save(step, state(step), score)
    checkpoints.finish()
    return checkpoints


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
    checkpoints = save_all(tmp_path, {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 9.0})
    assert checkpoints.steps() == [20, 40, 50]
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2)  # as a resumed run finds it
    assert again.newest() == 50 and again.best() == 20
    for step in (20, 50):
        restored = again.restore(step, shapes(state(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    again.save(60, state(60), 0.5)
    again.finish()
    assert again.steps() == [50, 60] and again.best() == 60


def test_without_a_validation_the_newest_is_the_best(tmp_path):
    assert save_all(tmp_path, {1: None, 2: None}).best() == 2
    assert Checkpoints(tmp_path / "empty", keep=1).best() is None


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """Training goes on, in the same buffers, while the checkpoint is being written."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    now = jax.tree.map(jnp.asarray, state(4, size=100_000))
    checkpoints.save(4, now, None)
    for _ in range(5):
        now = overwrite(now)
    checkpoints.finish()
    restored = checkpoints.restore(4, shapes(now))
    jax.tree.map(np.testing.assert_array_equal, restored, state(4, size=100_000))


# ------------------------------------------------------------------------------------------------ what does not fit


def test_a_checkpoint_of_another_form_is_refused_with_every_difference(tmp_path):
    checkpoints = save_all(tmp_path, {5: None})
    expected = shapes({"params": {"layer": {"bias": jnp.zeros(4), "kernel": jnp.zeros((4, 2))}}, "step": jnp.zeros(())})
    with pytest.raises(UserError) as error:
        checkpoints.restore(5, expected)
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
    checkpoints = save_all(tmp_path, {1: 1.0})
    full_disk(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="could not be written: .*No space left.*; earlier checkpoints are intact;"):
        checkpoints.save(2, state(2), 0.5)
        checkpoints.finish()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left[0] == "1" and len(left) == 2  # what was written of 2, under another name
    again = Checkpoints(tmp_path, keep=2)
    assert again.steps() == [1] and again.best() == 1
    assert again.restore(1, shapes(state(0)))["step"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_model_that_does_not_fit_the_disk_leaves_no_model_json(tmp_path, full_disk):
    full_disk(tmp_path / "model")
    with pytest.raises(UserError, match="could not be written: .*No space left"):
        checkpoint.save_model(tmp_path, state(1), {})
    assert not (tmp_path / "model.json").exists() and not (tmp_path / "model").exists()


def test_other_errors_are_not_called_a_full_disk():
    with pytest.raises(ValueError, match="something else"), storage.disk_errors("it"):
        raise ValueError("something else")


# ------------------------------------------------------------------------------------------------ damaged


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["checksums.json", "_METADATA", "manifest.ocdbt", "d/*"])
@pytest.mark.parametrize("harm", [cut, change, os.unlink])
def test_a_damaged_newest_checkpoint_is_passed_over_and_does_not_come_back(tmp_path, caplog, harm, name):
    save_all(tmp_path, {10: 2.0, 20: 1.0}).close()
    harm(next((tmp_path / "checkpoints/20").glob(f"**/{name}")))
    checkpoints = Checkpoints(tmp_path, keep=2)
    if (harm, name) == (change, "checksums.json") and not checkpoint.damage(tmp_path / "checkpoints/20"):
        pytest.fail("a changed checksum was not noticed")
    assert checkpoints.newest() == 10
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"checkpoint {tmp_path}/checkpoints/20 is damaged (")
    assert message.endswith(f"; it is now {tmp_path}/checkpoints/damaged-20, and checkpoint 10 takes its place")
    assert checkpoints.steps() == [10] and checkpoints.best() == 10
    assert checkpoints.restore(10, shapes(state(0)))["step"] == 10
    checkpoints.save(20, state(20), 1.0)  # the step is taken again
    checkpoints.finish()
    assert checkpoints.newest() == checkpoints.best() == 20


def test_what_orbax_does_not_read_may_be_damaged(tmp_path):
    checkpoints = save_all(tmp_path, {10: None})
    for name in checkpoint.OF_ORBAX:
        cut(tmp_path / "checkpoints/10" / name)
    assert checkpoints.newest() == 10 and checkpoints.restore(10, shapes(state(0)))["step"] == 10


def test_if_none_is_whole_a_run_does_not_silently_start_anew(tmp_path):
    save_all(tmp_path, {10: 2.0, 20: 1.0}).close()
    for step in (10, 20):
        cut(next((tmp_path / f"checkpoints/{step}").glob("**/d/*")))
    for _ in range(2):  # the second attempt finds what the first one left
        with pytest.raises(UserError) as error:
            Checkpoints(tmp_path, keep=2).newest()
        first, newer, older, last = str(error.value).splitlines()
        assert first == f"no checkpoint in {tmp_path}/checkpoints can be read:"
        assert "/checkpoints/20: " in newer and "/checkpoints/10: " in older and " bytes" in older
        assert last.startswith("Restore one from a copy, delete the folder to start from the first step")
    (tmp_path / "checkpoints/10").rename(tmp_path / "checkpoints/damaged-10")
    (tmp_path / "checkpoints/20").rename(tmp_path / "checkpoints/damaged-20")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        Checkpoints(tmp_path, keep=2).newest()


def test_leftovers_of_a_killed_process_do_no_harm(tmp_path):
    save_all(tmp_path, {10: None}).close()
    for name in ("20.orbax-checkpoint-tmp", "20.orbax-checkpoint-tmp-7", ".deleted-5"):
        (tmp_path / "checkpoints" / name / "d").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".stray").write_text("")
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(20, state(20), None)
    checkpoints.finish()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"10", "20", ".stray"}


def test_a_score_can_be_given_later(tmp_path):
    checkpoints = save_all(tmp_path, {10: 2.0})
    checkpoints.save(20, state(20), None)
    checkpoints.set_score(20, 1.0)
    assert Checkpoints(tmp_path, keep=2).score(20) == 1.0 and checkpoints.best() == 20
    assert checkpoints.newest() == 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # another thread of Orbax's gives up
def test_a_file_that_may_not_grow_is_one_sentence_and_earlier_checkpoints_are_intact(tmp_path):
    """What a quota does, by the operating system's own limit."""
    resource = pytest.importorskip("resource")
    checkpoints = save_all(tmp_path, {1: 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="^the checkpoint could not be written: File too large; earlier check"):
            rng = np.random.default_rng(0)  # that nothing compresses
            big = state(2) | {"params": {"layer": {"bias": jnp.asarray(rng.normal(size=300_000), jnp.float32)}}}
            checkpoints.save(2, big, 0.5)
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path, keep=2)
    assert again.steps() == [1] and again.newest() == 1
    again.save(2, state(2), 0.5)
    again.finish()
    assert again.best() == 2


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on a machine that is gone")  # of a process that was killed
    with storage.locked(tmp_path / "run"):
        with pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on .*; wait for its end, or give"):
            with storage.locked(tmp_path / "run"):
                pass
    with storage.locked(tmp_path / "run"):
        pass
