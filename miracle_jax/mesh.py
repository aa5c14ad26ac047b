"""One mesh over all devices of all processes, the rule that lays out batches and the rule that lays out parameters."""

import contextlib
import math
from collections.abc import Sequence

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


def make(layout: config.Mesh, devices: Sequence[jax.Device] | None = None) -> JaxMesh:
    """A (data, fsdp, model) mesh over these devices, in which `data` takes what the others leave.

    devices: None: all devices of all processes.
    """
    devices, group = jax.devices() if devices is None else devices, layout.fsdp * layout.model
    if len(devices) % group:
        flags = f"mesh.fsdp {layout.fsdp}" + (f" times mesh.model {layout.model}" if layout.model > 1 else "")
        raise UserError(f"{flags} does not divide the number of devices, {len(devices)}")
    shape = (len(devices) // group, layout.fsdp, layout.model)
    # Auto axes: under explicit ones an embedding look-up with a sharded batch is refused.
    types = (AxisType.Auto,) * len(AXES)
    if len({slice_of(device) for device in devices}) > 1:  # which jax.make_mesh refuses
        devices = sorted(devices, key=lambda device: (slice_of(device), device.process_index, device.id))
        return JaxMesh(np.array(devices).reshape(shape), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def slice_of(device: jax.Device) -> int:
    """The TPU slice, or the GPU host, within which a device has fast connections."""
    return getattr(device, "slice_index", 0)


def default_device() -> jax.Device:
    """The device on which this thread computes what is nowhere yet."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


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

    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf, layout)), tree)


def _spec(leaf, layout: config.Mesh) -> P:
    axes = [None] * len(leaf.shape)
    if leaf.size * leaf.dtype.itemsize > layout.shard_above_mb * 2**20:
        by_size = sorted(range(len(axes)), key=lambda axis: -leaf.shape[axis])
        for name, parts in (("model", layout.model), ("fsdp", layout.fsdp)):
            free = [axis for axis in by_size if axes[axis] is None and leaf.shape[axis] % parts == 0]
            if parts > 1 and free:
                axes[free[0]] = name
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def within(shardings):
    """The context in which `gathered` and `by_rows` mean the mesh of these shardings. Of none, or of one device, they
    mean nothing."""
    leaves = jax.tree.leaves(shardings)
    if not leaves or leaves[0].mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(leaves[0].mesh.abstract_mesh)


def gathered(parameters, layout: config.Mesh, of=None):
    """Inside a program: parameters of which every device has all that `fsdp` splits; `model` still splits them.

    Said of a layer's parameters where they are used, it makes devices gather one layer at a time and compute their own
    rows. Left to itself XLA keeps parameters split and exchanges activations of the whole batch instead.

    of: what these are the layers of, stacked on a leading axis, which tells the rule their sizes.
    """

    def whole(leaf, stacked):
        axes = [None if axis == "fsdp" else axis for axis in _spec(stacked, layout)]
        return _constrain(leaf, P(*axes[stacked.ndim - leaf.ndim :]))

    return jax.tree.map(whole, parameters, parameters if of is None else of)


def by_rows(x):
    """Inside a program: activations of which every device has its own rows, on the first axis."""
    return _constrain(x, P(BATCH_AXES))


def shares_in_force() -> int:
    """Inside a program: into how many parts `by_rows` splits its rows."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(axis, 1) for axis in BATCH_AXES)


def _constrain(x, spec: P):
    """On the mesh that `within` names, if any."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)


def check_batch(rows: int, mesh: JaxMesh, name: str) -> None:
    """Raises UserError unless `rows` instances split evenly over the devices, or the groups that share a row."""
    shares, model = shares_of(mesh), mesh.shape["model"]
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
    held = own_rows(shares_of(mesh), mesh)

    def place(own):
        rows = own.shape[batch_axis] // len(held)  # of a share

        def share(index):
            first = np.searchsorted(held, (index[batch_axis].start or 0) // rows) * rows
            return own[(slice(None),) * batch_axis + (slice(first, first + rows),)]

        shape = (*own.shape[:batch_axis], rows * shares_of(mesh), *own.shape[batch_axis + 1 :])
        return jax.make_array_from_callback(shape, sharding, share)

    return jax.tree.map(place, batch)


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


def shares_of(mesh: JaxMesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
