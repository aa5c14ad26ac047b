"""What a checkpoint holds, how it is saved and how it is restored (Orbax).

A run's folder:

    config.json, schema.toml, tokenizers/   what the parameters mean
    checkpoints/STEP/                       training state {"params", "opt_state", "step"}, written asynchronously
    checkpoints/STEP/checksums.json         {"files": name -> [bytes, SHA-256], "score": of the validation at STEP}
    checkpoints/damaged-STEP/               one whose files do not have these checksums, set aside
    model/                                  the finished model {"miracle", "refit_heads"}, written after stage 2
    model.json                              which step it came from and how accurate its heads are
    metrics.jsonl, training.png             what happened
"""

import contextlib
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from miracle_jax import cluster, reading, storage
from miracle_jax.errors import UserError, first_line

log = logging.getLogger("miracle_jax")

# Orbax logs the traceback of every thread that could not write. The error itself reaches us, who say it in a sentence.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))

CHECKSUMS = "checksums.json"
OF_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Files that Orbax writes after the checksums are made. They say when it did, and are not read."""
DAMAGED = "damaged-"
UNFINISHED = ".orbax-checkpoint-tmp"
"""In the names of folders that Orbax is writing."""
DELETED = ".deleted-"
"""Before the names of folders that are being deleted."""


class Checkpoints:
    """The checkpoints of a run: the newest `keep` and the one with the lowest validation score.

    Each appears in a single rename, its checksums with it. The first process decides for all what is there.
    """

    def __init__(self, workdir: str | Path, keep: int):
        self.folder, self._keep = _absolute(workdir) / "checkpoints", keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saving: tuple[int, float | None] | None = None
        if cluster.first():
            for path in self.folder.iterdir():
                if UNFINISHED in path.name or path.name.startswith(DELETED):  # of a process that was killed
                    shutil.rmtree(path, ignore_errors=True)
        options = ocp.options.AsyncOptions(post_finalization_callback=self._add_checksums)
        self._writer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)

    def steps(self) -> list[int]:
        """Of the checkpoints, ascending."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def score(self, step: int) -> float | None:
        """The validation score of a checkpoint, if there is one."""
        return _checksums(self.folder / str(step)).get("score")

    def set_score(self, step: int, score: float) -> None:
        """Gives a checkpoint, which may still be being written, its validation score."""
        self.finish()
        if cluster.first():
            path = self.folder / str(step)
            _write_json(path / CHECKSUMS, _checksums(path) | {"score": score})

    def save(self, step: int, state: Any, score: float | None) -> None:
        """Starts writing `state` as checkpoint `step`. score: the validation score (lower is better), if there is one.

        Raises UserError when the disk has no room, or for the checkpoint before, whose writing ends here.
        """
        self.finish()
        self._saving = (step, score)
        with storage.disk_errors("the checkpoint"):
            self._writer.save(self.folder / str(step), args=ocp.args.StandardSave(state))

    def finish(self) -> None:
        """Waits until everything saved is on disk, and deletes what need not be kept."""
        with storage.disk_errors("the checkpoint"):
            self._writer.wait_until_finished()
        if cluster.first():
            kept = set(self.steps()[-self._keep :]) | set(self._by_score()[:1])
            for step in set(self.steps()) - kept:
                deleted = self.folder / f"{DELETED}{step}"
                (self.folder / str(step)).rename(deleted)
                shutil.rmtree(deleted, ignore_errors=True)

    def close(self) -> None:
        self.finish()
        self._writer.close()

    def newest(self) -> int | None:
        """The newest whole checkpoint; None in a new run. Newer ones that are damaged are set aside.

        Raises UserError if there were checkpoints and none is whole.
        """
        return self._first_whole(self.steps()[::-1])

    def best(self) -> int | None:
        """The whole checkpoint with the lowest validation score; the newest when none was validated."""
        scored = self._by_score()
        return self._first_whole(scored + [step for step in self.steps()[::-1] if step not in scored])

    def restore(self, step: int, expected: Any) -> Any:
        """Checkpoint `step`. expected: arrays or shapes with shardings, of the form in which the state was saved;
        the devices may be others than those that saved it.

        Raises UserError that lists every difference when the checkpoint has another form.
        """
        path = self.folder / str(step)
        with _readable(f"checkpoint {path}"), ocp.StandardCheckpointer() as reader:
            check_matches(f"checkpoint {path}", reader.metadata(path).item_metadata, expected)
            return reader.restore(path, expected)

    def _by_score(self) -> list[int]:
        scores = {step: self.score(step) for step in self.steps()}
        return sorted((step for step in scores if scores[step] is not None), key=scores.get)

    def _first_whole(self, candidates: list[int]) -> int | None:
        """The first of these steps whose checkpoint is whole, in all processes; the damaged ones before it are set
        aside."""
        found, problems = -1, {}
        if cluster.first():
            for step in candidates:
                if not (problem := damage(self.folder / str(step))):
                    found = step
                    break
                problems[step] = problem
            if found < 0 and (problems or any(self.folder.glob(f"{DAMAGED}*"))):
                found = -2
            elif found >= 0:
                self._set_aside(problems, found)
        if (found := cluster.tell(found)) == -2:
            listed = "".join(f"\n  {self.folder}/{step}: {problem}" for step, problem in problems.items())
            raise UserError(
                f"no checkpoint in {self.folder} can be read:{listed}\nRestore one from a copy, delete the folder to "
                "start from the first step, or give another --workdir"
            )
        return None if found == -1 else found

    def _set_aside(self, problems: dict[int, str], instead: int) -> None:
        for step, problem in problems.items():
            aside = self.folder / f"{DAMAGED}{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
            log.warning("checkpoint %s is damaged (%s); it is now %s, and checkpoint %d takes its place",
                        self.folder / str(step), problem, aside, instead)  # fmt: skip

    def _add_checksums(self) -> None:
        """Called by Orbax, in its thread of the first process, between the last file and the rename."""
        step, score = self._saving
        (part,) = self.folder.glob(f"{step}{UNFINISHED}*")
        files = {name: [(part / name).stat().st_size, _sha256(part / name)] for name in _files(part)}
        _write_json(part / CHECKSUMS, {"files": files, "score": score})


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; empty if nothing is."""
    found = _checksums(checkpoint).get("files")
    if not found:
        return f"{CHECKSUMS} is missing or damaged"
    for name, (size, digest) in found.items():
        try:
            now = (checkpoint / name).stat().st_size
            if now != size:
                return f"{name} has {now} of {size} bytes"
            if _sha256(checkpoint / name) != digest:
                return f"{name} has changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return ""


def _checksums(checkpoint: Path) -> dict:
    """checksums.json, or {} where it is damaged."""
    try:
        content = reading.json_object(checkpoint / CHECKSUMS)
        sizes, score = content["files"].values(), content["score"]
        whole = all(isinstance(size, int) and isinstance(digest, str) for size, digest in sizes)
        return content if whole and isinstance(score, float | None) else {}
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if name not in (CHECKSUMS, *OF_ORBAX)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict) -> None:
    with storage.replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def save_model(workdir: str | Path, model: Any, facts: dict) -> None:
    """Writes the finished model. model.json comes last: where it exists, the model is complete."""
    folder = _absolute(workdir) / "model"
    with storage.disk_errors("the model"), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, model, force=True)
    if cluster.first():
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


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().resolve()


@contextlib.contextmanager
def _readable(name: str):
    """Turns what Orbax and its storage say of damaged files into a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax raises nothing more special where a chunk is damaged
        if cluster.lost(error):
            raise
        raise UserError(
            f"{name} cannot be read, its files are damaged ({first_line(error)}); restore them from a copy"
        ) from error
