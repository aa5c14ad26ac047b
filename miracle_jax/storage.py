"""Folders that are built once and are whole or absent, on a local disk or in a bucket."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from miracle_jax import config, reading
from miracle_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SHIPPED = ("mini",)
"""Trained models in the package. A folder of the same name is `./mini`."""
COMPLETE = "complete.json"
"""Written last: file -> size in bytes. A folder without it, or that does not agree with it, counts as absent."""
PROBE_TIMEOUT = 60.0
COPY_TIMEOUT = 600.0
"""Seconds that a bucket has to answer, and to take or give one file."""
STALE_AFTER = 3600.0
"""Seconds after which the leftovers of a build that was killed are removed."""


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def read(path: str | Path) -> bytes:
    """The content of a local or remote file. Raises UserError as `reading.content` does."""
    if not is_remote(path):
        return reading.content(path)
    try:
        return _remote(lambda: epath.Path(path).read_bytes(), path, COPY_TIMEOUT)
    except FileNotFoundError:
        raise UserError(f"file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; expected a file") from None


def local_file(path: str | Path) -> Path:
    """A path that can become a local file. Raises UserError for a bucket's and for a folder."""
    if is_remote(path):
        raise UserError(f"{path} is not a local path; write the file here and copy it there")
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    return path


@contextlib.contextmanager
def replacing(path: str | Path):
    """A binary file that appears under `path` when the block ends without an error, and not at all otherwise."""
    path = local_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)  # mkstemp lets only the owner read
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


@contextlib.contextmanager
def locked(folder: Path, flag: str = "--workdir"):
    """The folder, made if need be, belongs to this process while the block runs. Raises UserError when it belongs to
    another. The lock is the operating system's: it ends with the process, however that ends.

    flag: that names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read() or "another process"
                raise UserError(f"{folder} is in use by {holder}; wait for its end, or give another {flag}") from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems that know no locks
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


NO_ROOM = re.compile("No space left on device|Disk quota exceeded|File too large|Read-only file system", re.IGNORECASE)
"""What the operating system says, also by way of Orbax's storage, which raises no OSError."""


@contextlib.contextmanager
def disk_errors(what: str, intact: str = "earlier checkpoints are intact"):
    """Turns a full or read-only disk, and a quota that is used up, into a sentence. what: is written in the block."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if said := NO_ROOM.search(str(error)):
            raise UserError(
                f"{what} could not be written: {said[0]}; {intact}; free some space, or make the "
                "folder writable, and run the same command again"
            ) from error
        raise


@contextlib.contextmanager
def new_folder(path: str | Path):
    """A local folder that becomes `path`, local or remote, when the block ends without an error, and is nothing else.

    Raises UserError when `path` exists.
    """
    target = epath.Path(path) if is_remote(path) else Path(path).expanduser().absolute()
    exists = _remote(target.exists, path, PROBE_TIMEOUT) if is_remote(path) else target.exists()
    if exists:
        raise UserError(f"{path} exists; name a folder that does not, or delete it")
    beside = None
    if not is_remote(path):
        beside = target.parent
        beside.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=beside, prefix=f".{target.name}-"))
    try:
        yield part
        if is_remote(path):
            content = hashlib.sha256()
            for name in _sizes(part):
                content.update((part / name).read_bytes())
            (part / f"sha256-{content.hexdigest()}").touch()  # so that no two contents have the same COMPLETE
            sizes = _sizes(part)
            (part / COMPLETE).write_text(json.dumps(sizes, indent=1))
            try:
                _push(part, target, sizes)
            except BaseException:
                with contextlib.suppress(UserError, FileNotFoundError):  # what is left of it counts as absent
                    _remote(target.rmtree, path, PROBE_TIMEOUT)
                raise
        else:
            os.chmod(part, 0o755)  # mkdtemp lets only the owner in
            os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run_folder(name: str | Path) -> Path:
    """The local folder of a run or an export, which may be in a bucket, or of a model that comes with the package."""
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"a run is named by its folder, not {name!r}")
    if str(name) in SHIPPED:
        return Path(__file__).with_name("models") / name
    return local_copy(str(name)) if is_remote(name) else Path(name).expanduser()


def local_copy(path: str) -> Path:
    """A folder that `new_folder` put into a bucket, in the local cache."""
    remote = epath.Path(path)
    try:
        marker = _remote(lambda: (remote / COMPLETE).read_bytes(), remote, PROBE_TIMEOUT)
    except FileNotFoundError:
        raise UserError(f"{path} holds no whole folder (no {COMPLETE}); write it with miracle_jax.export") from None
    _listed(marker, remote)
    name = hashlib.sha256(f"{path}\n".encode() + marker).hexdigest()[:20]
    return build_once(config.Data().cache, f"fetched-{name}", lambda folder: _fetch(remote, folder))


def _listed(marker: bytes, folder: Path) -> dict[str, int]:
    """What COMPLETE lists. Raises UserError where it is no such list, or names something outside its folder."""
    otherwise = f"{folder}/{COMPLETE} does not list files and their sizes; write the folder again"
    sizes = reading.parse_object(marker, otherwise)
    for name, size in sizes.items():
        path = Path(name)
        if path.is_absolute() or not all(map(reading.is_name, path.parts)) or type(size) is not int:
            raise UserError(f"{otherwise}: {name!r}: {size!r}")
    return sizes


def build_once(cache: str, name: str, write: Callable[[Path], None]) -> Path:
    """The local folder `name` of `cache`; where it is absent, `write(folder)` fills it.

    `write` gets a folder beside the final one, which becomes the final one in a single rename: whatever happens in
    between, nobody sees half a folder. When several processes build at once, the first to finish wins. Of a remote
    cache there is a copy in the default local one.
    """
    remote = epath.Path(cache) / name if is_remote(cache) else None
    folder = Path(config.Data().cache if remote else cache).expanduser() / name
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    try:
        if remote is None or not _fetch(remote, part):
            write(part)
            sizes = _sizes(part)
            (part / COMPLETE).write_text(json.dumps(sizes, indent=1))
            if remote is not None:
                _push(part, remote, sizes)
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _sizes(folder: Path) -> dict[str, int]:
    """Every file of a folder but COMPLETE, and its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.name != COMPLETE}


def _is_complete(folder: Path) -> bool:
    try:
        sizes = _listed((folder / COMPLETE).read_bytes(), folder)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, UserError):
        return False


def _publish(part: Path, folder: Path) -> None:
    try:
        os.rename(part, folder)
    except OSError:  # there is a folder already
        if not _is_complete(folder):  # a damaged one: files of it were lost or cut
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(part, folder)


def _remove_leftovers(folder: Path) -> None:
    for part in folder.parent.glob(f".{folder.name}-*"):
        with contextlib.suppress(OSError):
            if part.is_dir() and time.time() - part.stat().st_mtime > STALE_AFTER:
                shutil.rmtree(part, ignore_errors=True)


def _fetch(remote: epath.Path, folder: Path) -> bool:
    """Copies a complete remote folder; False when there is none."""
    try:
        marker = _remote(lambda: (remote / COMPLETE).read_bytes(), remote, PROBE_TIMEOUT)
    except FileNotFoundError:
        return False
    for name in _listed(marker, remote):
        content = _remote(lambda name=name: (remote / name).read_bytes(), remote / name, COPY_TIMEOUT)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / COMPLETE).write_bytes(marker)
    if not _is_complete(folder):
        raise UserError(f"{remote} is damaged: its files do not have the sizes that {COMPLETE} lists; delete it")
    return True


def _push(folder: Path, remote: epath.Path, sizes: dict[str, int]) -> None:
    """Copies a complete folder; a bucket knows no rename, so the list of its files goes last."""
    for name in [*sizes, COMPLETE]:
        content = (folder / name).read_bytes()

        def put(path=remote / name, content=content):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        _remote(put, remote / name, COPY_TIMEOUT)


def _remote(call: Callable, path, seconds: float):
    """`call()` in a thread, since a bucket out of reach can hang for ever. Raises UserError, or FileNotFoundError."""
    outcome = {}

    def run():
        try:
            outcome["value"] = call()
        except BaseException as error:  # taken to the thread that waits
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise UserError(f"{path} did not answer within {seconds:.0f} s; check the network, or choose a local path")
    error = outcome.get("error")
    if isinstance(error, ImportError):
        raise UserError(f"{path} needs a package that is not installed: {error}; pip install 'miracle-jax[gcs]'")
    if isinstance(error, FileNotFoundError):
        raise error
    if error is not None:
        raise UserError(f"{path} cannot be read or written: {type(error).__name__}: {error}") from error
    return outcome["value"]
