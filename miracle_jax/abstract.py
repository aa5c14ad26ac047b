"""A training step and its arguments as shapes, laid out over a mesh: nothing is computed and no weight is made."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh as JaxMesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from miracle_jax import cost, losses, mesh
from miracle_jax.config import Config
from miracle_jax.cvae import Miracle, split
from miracle_jax.examples import FIELDS, PROMPT
from miracle_jax.train import make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step and the shapes of its arguments, laid out over a mesh."""

    step: object
    """The jitted function of `make_train_step`."""
    state: dict
    batch: dict
    frozen: dict
    trips: int
    """Of the loop over pieces of the vocabulary's scores, whose length the program does not say."""

    def trace(self):
        return self.step.trace(self.state, self.batch, self.frozen)

    def held(self) -> dict[str, int]:
        """Bytes that one device holds: {"parameters", "gradients", "optimizer", "frozen"}."""
        parameters = device_bytes(self.state["params"])
        return {
            "parameters": parameters, "gradients": parameters, "optimizer": device_bytes(self.state["opt_state"]),
            "frozen": device_bytes(self.frozen),
        }  # fmt: skip


def device_bytes(tree) -> int:
    """Bytes of one device's part of arrays, from their shapes and shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_step(config: Config, sizes: tuple[int, ...], devices: JaxMesh, batch: dict) -> Step:
    """sizes: number of aspects of each attribute. batch: of shapes (`batch_shapes`), or of arrays as the pipeline
    makes them."""

    def laid_out(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def layout(tree):
        return laid_out(tree, mesh.parameter_shardings(tree, devices, config.mesh))

    model = nnx.eval_shape(lambda: Miracle(config, sizes, nnx.Rngs(0)))
    graphdef, params = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    optimizer, _ = make_optimizer(config, 1000)  # steps change numbers, not shapes
    trained, frozen = split(config, params)
    state = jax.eval_shape(
        lambda params: {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}, trained
    )
    state = layout(state)
    by_rows = NamedSharding(devices, P(None, mesh.BATCH_AXES))
    step = make_train_step(
        config, graphdef, optimizer, jax.random.key(0), jax.tree.map(lambda leaf: leaf.sharding, state)
    )
    rows, positions = _scored(batch)
    trips = losses.pieces(rows // mesh.shares_of(devices), positions, config.decoder.vocab_size)
    return Step(step, state, laid_out(batch, {name: by_rows for name in batch}), layout(frozen), trips)


def _scored(batch: dict) -> tuple[int, int]:
    """Rows and positions of what the vocabulary's scores are taken of, in a micro-batch."""
    return batch.get("reply_tokens", batch["reply"]).shape[1:]


def batch_shapes(config: Config, attributes: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the longest bucket as pipeline.py makes it, unpacked. rows: of a micro-batch, over all devices."""
    groups, shapes = config.train.accumulate, {}
    widths = dict(zip(FIELDS, config.data.buckets[-1], strict=True))
    if config.decoder.sees_context:
        widths[PROMPT] = -(-config.decoder.prompt_limit // 8) * 8
    for name, width in widths.items():
        if config.encoder.frozen and name in FIELDS[:2]:
            shapes[f"{name}_mean"] = jax.ShapeDtypeStruct((groups, rows, config.encoder.width), jnp.float32)
        else:
            shapes[name] = jax.ShapeDtypeStruct((groups, rows, width), jnp.int32)
            shapes[f"{name}_length"] = jax.ShapeDtypeStruct((groups, rows), jnp.int32)
    return shapes | {"labels": jax.ShapeDtypeStruct((groups, rows, attributes), jnp.int32)}


def products(config: Config, sizes: tuple[int, ...], batch: dict, scored: int | None = None) -> cost.Products:
    """Those of one step on one device, for a batch of arrays or of shapes.

    scored: tokens of the longest reply (packed: of all) whose next is scored, where that is less than its bucket.
    """
    one = jax.sharding.AbstractMesh((1,) * len(mesh.AXES), mesh.AXES)
    trips = losses.pieces(*_scored(batch), config.decoder.vocab_size, scored)
    return cost.products(abstract_step(config, sizes, one, batch).trace().jaxpr, trips)
