"""What a checkpoint holds, how it is saved and how it is restored (Orbax).

A run's folder:

    config.json, schema.toml, tokenizers/   what the parameters mean
    checkpoints/STEP/                       training state {"params", "opt_state"}, written asynchronously
    model/                                  the finished model {"miracle", "refit_heads"}, written after stage 2
    model.json                              which step it came from and how accurate its heads are
    metrics.jsonl, training.png             what happened
"""

import contextlib
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from miracle_jax import storage
from miracle_jax.errors import UserError, first_line


def open_manager(workdir: str | Path, keep: int) -> ocp.CheckpointManager:
    """Keeps the newest `keep` checkpoints and the one with the lowest validation score."""

    def score(metrics):
        return metrics.get("score", math.inf)  # Orbax warns of a checkpoint without metrics, so those have empty ones

    newest = checkpoint_managers.LatestN(keep)
    # Of BestN's ascending or descending order the last n stay, so "reverse" keeps the lowest. A best_fn with
    # max_to_keep would delete the newest after a bad validation, and with it the ability to resume.
    best = checkpoint_managers.BestN(get_metric_fn=score, reverse=True, n=1)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
        best_fn=score,  # without it metrics are not written, and a resumed run would not know its best checkpoint
        best_mode="min",
        cleanup_tmp_directories=True,
    )
    # The handler is named, or a resumed run could not read what its checkpoints hold before it restores one.
    handlers = {"state": ocp.StandardCheckpointHandler()}
    return ocp.CheckpointManager(_absolute(workdir) / "checkpoints", options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, step: int, state: Any, score: float | None) -> None:
    """Starts writing `state` as checkpoint `step`. score: the validation score (lower is better), if there is one."""
    metrics = {} if score is None else {"score": score}
    with _disk_errors():
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), metrics=metrics, force=True)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until everything saved is on disk."""
    with _disk_errors():
        manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, step: int, expected: Any) -> Any:
    """Checkpoint `step`. expected: arrays or shapes with shardings, of the form in which the state was saved.

    Raises UserError that lists every difference when the checkpoint has another form.
    """
    name = f"checkpoint {manager.directory}/{step}"
    with _readable(name):
        check_matches(name, manager.item_metadata(step)["state"], expected)
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(expected)))["state"]


def best_step(manager: ocp.CheckpointManager) -> int | None:
    """The kept checkpoint with the lowest validation score; the newest when none was validated."""
    scores = {step: manager.metrics(step) for step in manager.all_steps()}
    scored = {step: metrics["score"] for step, metrics in scores.items() if metrics and "score" in metrics}
    return min(scored, key=scored.get) if scored else manager.latest_step()


def save_model(workdir: str | Path, model: Any, facts: dict) -> None:
    """Writes the finished model. model.json comes last: where it exists, the model is complete."""
    folder = _absolute(workdir) / "model"
    with _disk_errors(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, model, force=True)
    if jax.process_index() == 0:
        with storage.replacing(Path(workdir) / "model.json") as file:
            file.write(json.dumps(facts, indent=2).encode())


def load_model(workdir: str | Path, expected: Any, dtype: str = "float32") -> Any:
    """The finished model of a run, in the form of `expected` (shapes); differences raise UserError.

    dtype: in which it was written. It is placed on one device, whatever wrote it.
    """
    folder = _absolute(workdir) / "model"
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def as_stored(leaf):
        kind = dtype if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=place)

    stored = jax.tree.map(as_stored, expected)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; it holds the parameters of the run")
    with _readable(f"model {folder}"), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
        if not jax.tree.leaves(metadata):
            raise ValueError("no parameters in them")
        check_matches(f"model {folder}", metadata, stored)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), checkpointer.restore(folder, stored), expected)


def fingerprint(params: Any) -> str:
    """A name made from every parameter of a tree."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        content.update(np.asarray(leaf).tobytes())
    return content.hexdigest()


def check_matches(name: str, found: Any, expected: Any) -> None:
    """Raises UserError unless both trees have the same paths with the same shapes and types."""

    def flat(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {_path(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves if hasattr(leaf, "shape")}

    def show(entry):
        return f"{entry[0]} {entry[1]}"

    found, expected = flat(found), flat(expected)
    problems = [f"{path}: missing (model expects {show(expected[path])})" for path in expected if path not in found]
    problems += [
        f"{path}: not in the model (checkpoint has {show(found[path])})" for path in found if path not in expected
    ]
    problems += [
        f"{path}: checkpoint has {show(found[path])}, model expects {show(expected[path])}"
        for path in expected
        if path in found and found[path] != expected[path]
    ]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(
            f"{name} does not match the model:\n  " + "\n  ".join(problems[:20]) + more
            + "\nIt was written with another config; use that config (config.json in its run) or another workdir."
        )  # fmt: skip


def _path(path) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _absolute(path: str | Path) -> epath.Path:
    return epath.Path(path).expanduser().resolve()


class _disk_errors:
    """Turns Orbax's report of a full disk into a sentence."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and ("No space left" in str(error) or "Disk quota" in str(error)):
            raise UserError(
                f"the checkpoint could not be written: {str(error).splitlines()[0][:200]}; earlier checkpoints are "
                "intact; free some space and run the same command again"
            ) from error


@contextlib.contextmanager
def _readable(name: str):
    """Turns what Orbax and its storage say of damaged files into a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax raises nothing more special where a chunk is damaged
        raise UserError(
            f"{name} cannot be read, its files are damaged ({first_line(error)}); restore them from a copy"
        ) from error
