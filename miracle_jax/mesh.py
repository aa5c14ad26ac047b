"""One mesh over all devices of all processes, the rule that lays out batches and the rule that lays out parameters."""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as JaxMesh
from jax.sharding import PartitionSpec as P

from miracle_jax import config, env
from miracle_jax.errors import UserError

AXES = ("data", "fsdp", "model")
BATCH_AXES = AXES[:2]
"""Those over which a batch is split; the devices of a `model` group see the same rows."""


def make(layout: config.Mesh) -> JaxMesh:
    """A (data, fsdp, model) mesh over all devices of all processes; `data` takes what the others leave."""
    devices, group = jax.devices(), layout.fsdp * layout.model
    if len(devices) % group:
        flags = f"mesh.fsdp {layout.fsdp}" + (f" times mesh.model {layout.model}" if layout.model > 1 else "")
        raise UserError(f"{flags} does not divide the number of devices, {len(devices)}")
    shape = (len(devices) // group, layout.fsdp, layout.model)
    # Auto axes: under explicit ones an embedding look-up with a sharded batch is refused.
    types = (AxisType.Auto,) * len(AXES)
    if len({slice_of(device) for device in devices}) > 1:  # which jax.make_mesh refuses
        devices = sorted(devices, key=lambda device: (slice_of(device), device.process_index, device.id))
        return JaxMesh(np.array(devices).reshape(shape), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types)


def slice_of(device: jax.Device) -> int:
    """The TPU slice, or the GPU host, within which a device has fast connections."""
    return getattr(device, "slice_index", 0)


def hardware() -> str:
    """What all processes compute on: kind and number of their accelerators, or the CPU."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return env.cpu()
    return f"{len(devices)} x {devices[0].device_kind}"


def replicated(mesh: JaxMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def parameter_shardings(tree, mesh: JaxMesh, layout: config.Mesh):
    """The rule: an array above `shard_above_mb` is split over `model` on its largest axis that this divides, the first
    of equals, and over `fsdp` on the largest of those that are left; others are copied.

    So `model` splits the matrices that widen by their columns, those that narrow and the attention's output by their
    rows, as Megatron does, and embeddings by their vocabulary.

    tree: arrays or shapes (parameters, or an optimizer state made of them).
    """

    def rule(leaf):
        axes = [None] * len(leaf.shape)
        if leaf.size * leaf.dtype.itemsize > layout.shard_above_mb * 2**20:
            by_size = sorted(range(len(axes)), key=lambda axis: -leaf.shape[axis])
            for name, parts in (("model", layout.model), ("fsdp", layout.fsdp)):
                free = [axis for axis in by_size if axes[axis] is None and leaf.shape[axis] % parts == 0]
                if parts > 1 and free:
                    axes[free[0]] = name
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(rule, tree)


def check_batch(rows: int, mesh: JaxMesh, name: str) -> None:
    """Raises UserError unless `rows` instances split evenly over the devices, or the groups that share a row."""
    shares, model = _shares(mesh), mesh.shape["model"]
    if rows % shares:
        raise UserError(
            f"{name} is {rows} instances, which {shares} {f'groups of {model} ' if model > 1 else ''}devices cannot "
            f"share evenly; choose a multiple of {shares}"
        )


def own_rows(rows: int, mesh: JaxMesh) -> np.ndarray:
    """The numbers of those of a batch's rows that this process' devices hold: its share, or all where a `model` group
    spans all processes."""
    held = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((rows,)).values()
    return np.unique([np.arange(rows)[index] for index in held])


def put_batch(batch: dict[str, np.ndarray], mesh: JaxMesh, batch_axis: int):
    """Places this process' rows of a batch, those of `own_rows`; the result is the global batch, split over devices on
    `batch_axis`."""
    sharding = NamedSharding(mesh, P(*[None] * batch_axis, BATCH_AXES))
    held = own_rows(_shares(mesh), mesh)

    def place(own):
        rows = own.shape[batch_axis] // len(held)  # of a share

        def share(index):
            first = np.searchsorted(held, (index[batch_axis].start or 0) // rows) * rows
            return own[(slice(None),) * batch_axis + (slice(first, first + rows),)]

        shape = (*own.shape[:batch_axis], rows * _shares(mesh), *own.shape[batch_axis + 1 :])
        return jax.make_array_from_callback(shape, sharding, share)

    return jax.tree.map(place, batch)


def over(shardings):
    """A context in which `by_rows` knows the mesh of these shardings; None: there is none."""
    leaves = jax.tree.leaves(shardings)
    if not leaves or leaves[0].mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(leaves[0].mesh.abstract_mesh)


def by_rows(x):
    """Activations (B, ...), kept split by their rows, as the batch is. Left alone, XLA lets the split parameters split
    them otherwise in between, and moves them to and fro."""
    if not set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def place(tree, shardings):
    """NumPy arrays, the same on every process, as global arrays. shardings: of each, or one for all."""

    def put(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: put(x, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def fetch(tree):
    """Arrays, however laid out, as NumPy arrays on every process. All processes have to ask for them."""

    def whole(x):
        addressable = getattr(x, "is_fully_addressable", True)
        return x if addressable else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def _shares(mesh: JaxMesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
