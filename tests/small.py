"""Small models for tests, with random numbers made by numpy: quick, since nothing is compiled to create them."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from miracle_jax import config
from miracle_jax.cvae import Miracle

SIZES = (2, 3, 2)  # aspects of each attribute
CONFIG = config.Config(
    encoder=config.Bert(vocab_size=20, width=16, depth=2, heads=2, mlp=32, max_positions=24),
    decoder=config.Gpt2(vocab_size=18, width=16, depth=2, heads=2, mlp=32, max_positions=24),
    latent=config.Latent(size=6, hidden=8),
    loss=config.Loss(reconstruct=1.0, kl=0.3, classify=0.5, gap=0.7, kl_floor=0.05),
)


def random_model(make, seed: int = 0, std: float = 0.4) -> nnx.Module:
    """The module that `make()` builds, its parameters N(0, std^2) and its norms' scales N(1, 0.1^2)."""
    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + np.float32(0.1) * values if path[-1].key == "scale" else np.float32(std) * values

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, nnx.to_pure_dict(shapes)))


def miracle(settings: config.Config = CONFIG, **loss) -> Miracle:
    """A whole model; loss: fields of `settings.loss` to change."""
    settings = dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, **loss))
    return random_model(lambda: Miracle(settings, SIZES, nnx.Rngs(0)))


def random_batch(*leading: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as the pipeline gives it, with these leading axes: every attribute in it, several labels in some rows."""
    rng = np.random.default_rng(seed)
    batch = {}
    for name, longest, vocabulary in (("context", 9, 20), ("joint", 12, 20), ("reply", 7, 18)):
        batch[name] = rng.integers(0, vocabulary, (*leading, longest))
        batch[f"{name}_length"] = rng.integers(3, longest + 1, leading)
    labels = np.full((*leading, len(SIZES)), -1)
    for place in np.ndindex(*leading):
        for attribute in {place[-1] % 3, rng.integers(3)}:
            labels[*place, attribute] = rng.integers(SIZES[attribute])
    return {name: array.astype(np.int32) for name, array in (batch | {"labels": labels}).items()}


def packed(batch: dict[str, np.ndarray], shares: int, room: int) -> dict[str, np.ndarray]:
    """A batch (G, B, ...) with the places of its fields' tokens, room for so many in each share of its rows."""
    found = dict(batch)
    for name in [name for name in batch if f"{name}_length" in batch]:
        groups, rows, width = batch[name].shape
        found[f"{name}_tokens"] = np.full((groups, shares, room), -1, np.int32)
        for group, share in np.ndindex(groups, shares):
            own = range(rows // shares)
            lengths = batch[f"{name}_length"][group].reshape(shares, -1)[share]
            places = [row * width + place for row in own for place in range(lengths[row])]
            found[f"{name}_tokens"][group, share, : len(places)] = places
    return found
