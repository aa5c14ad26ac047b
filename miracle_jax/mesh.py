"""One mesh over all devices, the rule that lays out batches and the rule that lays out parameters."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as JaxMesh
from jax.sharding import PartitionSpec as P

from miracle_jax import config, env
from miracle_jax.errors import UserError

AXES = ("data", "fsdp")
BATCH_AXES = AXES


def make(layout: config.Mesh, devices: Sequence[jax.Device] | None = None) -> JaxMesh:
    """A (data, fsdp) mesh over these devices. None: over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % layout.fsdp:
        raise UserError(f"mesh.fsdp {layout.fsdp} does not divide the number of devices, {len(devices)}")
    shape = (len(devices) // layout.fsdp, layout.fsdp)
    # Auto axes: under explicit ones an embedding look-up with a sharded batch is refused.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def hardware() -> str:
    """What this process computes on: kind and number of its accelerators, or the CPU."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return env.cpu()
    return f"{len(devices)} x {devices[0].device_kind}"


def replicated(mesh: JaxMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def parameter_shardings(tree, mesh: JaxMesh, layout: config.Mesh):
    """The rule: an array above `shard_above_mb` is split over `fsdp` on its largest divisible axis; others are copied.

    tree: arrays or shapes (parameters, or an optimizer state made of them).
    """

    def rule(leaf):
        if layout.fsdp > 1 and leaf.size * leaf.dtype.itemsize > layout.shard_above_mb * 2**20:
            for axis in np.argsort(leaf.shape)[::-1]:
                if leaf.shape[axis] % layout.fsdp == 0:
                    return NamedSharding(mesh, P(*[None] * axis, "fsdp"))
        return replicated(mesh)

    return jax.tree.map(rule, tree)


def check_batch(rows: int, mesh: JaxMesh, name: str) -> None:
    """Raises UserError unless `rows` instances split evenly over the devices."""
    if rows % mesh.size:
        raise UserError(
            f"{name} is {rows} instances, which {mesh.size} devices cannot share evenly; choose a multiple of "
            f"{mesh.size}"
        )


def put_batch(batch: dict[str, np.ndarray], mesh: JaxMesh, batch_axis: int):
    """Places this process's rows of a batch; the result is the global batch, split over devices on `batch_axis`."""
    sharding = NamedSharding(mesh, P(*[None] * batch_axis, BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
