"""Finished runs that nothing trained: the folder of a run with random parameters, for any config."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from small import random_model

from miracle_jax import checkpoint, config
from miracle_jax.attributes import Schema
from miracle_jax.cvae import Miracle, split
from miracle_jax.tokenizers import Tokenizers


def write(folder: Path, like: Path, schema: Schema | None = None, **parts) -> Path:
    """A run with the config, the schema and the tokenizers of the run `like`.

    schema: another one. parts: fields of the config to change, a dict of fields where the field is a dataclass.
    """
    settings = config.load_run(like)
    for name, value in parts.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(settings, name), **value)
        settings = dataclasses.replace(settings, **{name: value})
    settings.check()
    schema = schema or Schema.load(like / "schema.toml")
    Tokenizers.load(like / "tokenizers").save(folder / "tokenizers")
    schema.save(folder / "schema.toml")
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict(settings)}))
    model = random_model(lambda: Miracle(settings, schema.sizes, nnx.Rngs(0)))
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    refit_heads = jax.tree.map(lambda leaf: leaf + 1, params["heads"])
    figures = {"attribute": {}, "turn": {}, "mean": 0.5}
    facts = {"step": 7, "heads": "joint", "accuracy": {"joint": figures, "refit": figures}}
    checkpoint.save_model(folder, {"miracle": split(settings, params)[0], "refit_heads": refit_heads}, facts)
    return folder
