"""Where a checkpoint or a tokenizer is: a folder, a .gguf file, a hub name, or a place in an installed package.

Hub names go through huggingface_hub, with its cache, its login and its offline mode (HF_HUB_OFFLINE).
"""

import importlib.util
import json
from pathlib import Path

from miracle_jax.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that hold a checkpoint's weights, the first that is there counts."""


def locate(name: str, field: str) -> Path:
    """The local folder or .gguf file of a checkpoint, fetched from the hub if need be.

    field: the config field that names it, for messages.
    """
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None:
            raise UserError(f"{field} {name}: the package {package} is not installed; run bash launch/pretrained.sh")
        path = Path(found.submodule_search_locations[0]) / inside
        if not path.exists():
            raise UserError(f"{field} {name}: the package {package} has no {inside}; another version of it may")
        return path
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{field} {name} does not exist")
    return _from_hub(name, field)


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

    try:
        found = fetch("config.json")
        if found is None:
            raise UserError(f"{field} {name}: this hub repository has no config.json; name a transformers checkpoint")
        file = next(filter(None, map(fetch, WEIGHTS)), None)
        if file is None:
            raise UserError(f"{field} {name}: this hub repository has none of {', '.join(WEIGHTS)}")
        if file.suffix == ".json":
            for part in sorted(set(json.loads(file.read_bytes())["weight_map"].values())):
                fetch(part)
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.HFValidationError) as error:
        raise UserError(
            f"{field} {name} is neither a folder nor a hub repository that you may read "
            f"({str(error).strip().splitlines()[0]}); mend the name, or log in with `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{field} {name} is not a local folder, and the hub cannot be reached "
            f"({str(error).strip().splitlines()[0][:200]}); connect, or name a folder that holds it"
        ) from None
    return found.parent
