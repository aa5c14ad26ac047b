"""Outside checkpoints as files: where they are (a folder, a .gguf file, a hub name, a place in an installed package)
and the tensors in them.

Hub names go through huggingface_hub, with its cache, its login and its offline mode (HF_HUB_OFFLINE).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miracle_jax import reading
from miracle_jax.errors import UserError, first_line

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that hold a checkpoint's weights, the first that is there counts."""

PARTS = (".safetensors", ".bin", "")
"""What the files that an index names end in; what has no ending is read as a .bin is."""
PACKAGE = "package:"
"""Before the name of a file in an installed package."""
NUMBERS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""Types of safetensors that are read. What has fewer bits needs scales, which other programs keep elsewhere."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def absolute(name: str) -> str:
    """The name, by which a run finds the checkpoint from any folder: a local path made absolute, any other as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name


def locate(name: str, field: str) -> Path:
    """The local folder or .gguf file of a checkpoint, fetched from the hub if need be.

    field: the config field that names it, for messages.
    """
    if name.startswith(PACKAGE):
        return in_package(name, field, "bash launch/pretrained.sh")
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not on_hub(name):
        raise UserError(f"{field} {name} does not exist")
    return _from_hub(name, field)


def in_package(name: str, field: str, install: str) -> Path:
    """What package:NAME/PATH names inside an installed package, none of whose code runs. install: the command."""
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None:
        raise UserError(f"{field} {name}: the package {package} is not installed; run {install}")
    paths = [Path(place) / inside for place in found.submodule_search_locations or ()]
    if not any(path.exists() for path in paths):
        raise UserError(
            f"{field} {name}: the installed package {package} has no {inside}; {install} installs the version that "
            "has it"
        )
    return next(path for path in paths if path.exists())


def on_hub(name: str) -> bool:
    """Whether a name means a hub repository, by its form and since there is no such place on this machine."""
    local = name.startswith((PACKAGE, ".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1
    return bool(name) and not local and not Path(name).exists()


def _from_hub(name: str, field: str) -> Path:
    """The folder in the hub's cache that holds the checkpoint's config and weights."""
    import huggingface_hub as hub  # slow to import
    from huggingface_hub import errors

    def fetch(file):
        try:
            return Path(hub.hf_hub_download(name, file))
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            return None

    def fetch_weights():
        unreachable = None
        for file in WEIGHTS:
            try:
                found = fetch(file)
            except errors.LocalEntryNotFoundError as error:  # offline it may be absent, and another one in the cache
                unreachable = unreachable or error
                continue
            if found:
                return found
        if unreachable:
            raise unreachable
        raise UserError(f"{field} {name}: this hub repository has none of {', '.join(WEIGHTS)}")

    try:
        found = fetch("config.json")
        if found is None:
            raise UserError(f"{field} {name}: this hub repository has no config.json; name a transformers checkpoint")
        file = fetch_weights()
        if file.suffix == ".json":
            for part in sorted(set(_index(file).values())):
                fetch(part)
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.HFValidationError) as error:
        raise UserError(
            f"{field} {name} is neither a folder nor a hub repository that you may read "
            f"({first_line(error)}); mend the name, or log in with `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        raise UserError(
            f"{field} {name} is not a local folder, and the hub cannot be reached "
            f"({first_line(error)}); connect, or name a folder that holds it"
        ) from None
    return found.parent


def _index(path: Path) -> dict[str, str]:
    """Tensor -> the file beside this index that holds it."""
    parts = reading.json_object(path, "is not an index of weights").get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise UserError(f"{path} is not an index of weights: it has no weight_map from tensors to files")
    # A checkpoint reads nothing outside its folder, and an index is no part of an index.
    strange = sorted(
        part for part in set(parts.values())
        if not reading.is_name(part) or Path(part).suffix not in PARTS
    )  # fmt: skip
    if strange:
        raise UserError(f"{path} names {strange[0]!r}; its parts are .safetensors or .bin files beside it")
    return parts


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, or of a folder with one of WEIGHTS, by their names in it."""
    if path.is_dir():
        found = next((path / name for name in WEIGHTS if (path / name).exists()), None)
        if found is None:
            raise UserError(f"{path} has no weights; expected one of {', '.join(WEIGHTS)}")
        path = found
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".json":
        parts, tensors = _index(path), {}
        for part in sorted(set(parts.values())):
            tensors |= tensors_of(path.parent / part)
        lost = sorted(parts.keys() - tensors.keys())
        if lost:
            named = ", ".join(lost[:10]).replace("\n", "\\n")
            raise UserError(f"{path} lists tensors that its files do not hold: {named}")
        return tensors
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """The content of a safetensors file, as transformers reads it too."""
    import safetensors.numpy

    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return safetensors.numpy.save(tensors, metadata={"format": "pt"})


def _safetensors(path: Path) -> dict[str, Tensor]:
    import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
    import safetensors

    def read(name):
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    tensors = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                if part.get_dtype() not in NUMBERS:
                    raise UserError(f"{path}: {name} has the type {part.get_dtype()}; read are {', '.join(NUMBERS)}")
                tensors[name] = Tensor(tuple(part.get_shape()), lambda name=name: read(name))
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from None
    return tensors


def _pickled(path: Path) -> dict[str, Tensor]:
    """A state dict that torch saved. Only weights are read: a file that would run code is refused."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is in PyTorch's format and PyTorch is not installed; pip install torch, or convert the file to "
            "safetensors where it is"
        ) from None
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not a plain PyTorch state dict ({first_line(error)}); only tensors are read, never code"
        ) from None
    items = state.items() if isinstance(state, dict) else [(None, state)]
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in items):
        raise UserError(f"{path} holds something other than named tensors; save model.state_dict()")
    strange = [n for n, v in items if v.layout != torch.strided or v.is_quantized or v.is_complex() or v.is_meta]
    if strange:
        raise UserError(f"{path}: {strange[0]} is no plain tensor of real numbers; save model.state_dict()")

    def read(value):
        return (value.detach().float() if value.is_floating_point() else value).numpy()

    return {name: Tensor(tuple(value.shape), lambda value=value: read(value)) for name, value in state.items()}
