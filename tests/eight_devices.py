"""What test_mesh.py runs in a process with eight virtual devices. By its name pytest collects it nowhere else."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from parity import assert_trees_close
from small import CONFIG, miracle, packed, random_batch
from test_losses import SAME, random_step
from test_train import Toy

from miracle_jax import config, losses, mesh
from miracle_jax.checkpoint import Checkpoints
from miracle_jax.errors import UserError
from miracle_jax.train import Keys, make_train_step

BATCHES = [random_batch(2, 8, seed=seed) for seed in range(2)]  # two micro-batches of eight, for each of two steps
ALWAYS_KL = dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, kl_zero=0.0))


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def train(layout, pack=False):
    """Losses of two steps and the state after them, still on their devices. Dropout and the draws of z are on.

    layout: a config.Mesh; None: one device, no mesh. pack: tokens end to end, for every share of the rows.
    """
    graphdef, params = nnx.split(miracle(ALWAYS_KL))
    # Not Adam: it would divide the rounding of gradients that are zero in theory by itself.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(params))
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
    batches, shardings = BATCHES, None
    if layout is not None:
        devices = mesh.make(layout)
        shardings = mesh.parameter_shardings(state, devices, layout)
        state = jax.device_put(state, shardings)
        shares = mesh.shares_of(devices)
        batches = [packed(batch, shares, 96 // shares) for batch in BATCHES] if pack else BATCHES
        batches = [mesh.put_batch(batch, devices, batch_axis=1) for batch in batches]
    step = make_train_step(ALWAYS_KL, graphdef, optimizer, Keys.of(0).steps, shardings)
    named = []
    for batch in batches:
        state, values = step(state, batch)
        named.append(values)
    assert step._cache_size() == 1  # compiled once: the state keeps its layout
    return {"losses": named, "state": state}, shardings


def test_two_steps_with_split_parameters_equal_those_of_one_device():
    """Losses and gradients: the optimizer's state is the sum of the gradients."""
    one, _ = train(None)
    many, shardings = train(config.Mesh(fsdp=4, shard_above_mb=0.001))
    assert set(many["losses"][0]) == {"reconstruct", "kl", "classify", "gap", "gradient_norm"}
    assert all(value > 0 for value in jax.tree.leaves(many["losses"]))
    assert_trees_close(jax.device_get(many), jax.device_get(one), 1e-5)
    assert jax.tree.map(lambda leaf: leaf.sharding, many["state"]) == shardings
    kernel = many["state"]["params"]["decoder"]["layers"]["blocks"]["mlp_in"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.sharding.spec == P(None, None, "fsdp")


def test_two_steps_with_packed_tokens_equal_those_of_padded_ones_on_one_device():
    one, _ = train(None)
    many, _ = train(config.Mesh(fsdp=4, shard_above_mb=0.001), pack=True)
    assert_trees_close(jax.device_get(many), jax.device_get(one), 1e-5)


@pytest.mark.slow
def test_two_steps_with_matrices_multiplied_in_parts_equal_those_of_one_device():
    one, _ = train(None)
    many, shardings = train(config.Mesh(fsdp=2, model=2, shard_above_mb=0.001))
    assert_trees_close(jax.device_get(many), jax.device_get(one), 1e-5)
    blocks = many["state"]["params"]["decoder"]["layers"]["blocks"]
    specs = [blocks[name]["kernel"].sharding.spec for name in ("mlp_in", "mlp_out")]
    assert specs == [P(None, "fsdp", "model"), P(None, "model", "fsdp")]


def test_losses_over_eight_shards_equal_those_of_one_device():
    """Values and gradients in the default layout. No shard has every attribute, none the mean number of tokens."""
    devices = mesh.make(config.Mesh())
    outputs, batch = jax.tree.map(lambda leaf: leaf[0], random_step(groups=1, rows=8))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(outputs, batch):
        total = losses.counts(jax.tree.map(lambda leaf: leaf[None], batch))
        named = losses.parts(outputs._replace(lm_head=SAME), batch, CONFIG.loss, total)
        return losses.weighted_sum(named, CONFIG.loss, 1.0), named

    one = run(outputs, batch)
    many = run(*jax.device_put((outputs, batch), NamedSharding(devices, P(mesh.BATCH_AXES))))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(many))
    assert_trees_close(jax.device_get(many), jax.device_get(one), 1e-5)


@pytest.mark.parametrize(
    ("fsdp", "shape", "spec"),
    [
        (4, (512, 1024), (None, "fsdp")),  # the largest axis
        (4, (1024, 512), ("fsdp",)),
        (4, (12, 256, 768), (None, None, "fsdp")),
        (4, (1023, 512), (None, "fsdp")),  # the largest that is divisible
        (4, (1023, 511), ()),  # none is
        (4, (262_144,), ()),  # 1 MiB is not above 1 MiB
        (4, (262_148,), ("fsdp",)),
        (1, (1024, 1024), ()),
        (8, (1024, 1024), ("fsdp",)),
        (4, (), ()),
    ],
)
def test_large_parameters_are_split_on_their_largest_divisible_axis(fsdp, shape, spec):
    layout = config.Mesh(fsdp=fsdp, shard_above_mb=1.0)
    devices = mesh.make(layout)
    sharding = mesh.parameter_shardings({"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, devices, layout)["x"]
    assert dict(devices.shape) == {"data": 8 // fsdp, "fsdp": fsdp, "model": 1}
    if shape == (1024, 1024) and fsdp > 1:  # either axis will do
        assert sharding.spec in (P("fsdp"), P(None, "fsdp"))
    else:
        assert sharding.spec == P(*spec)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 512, 1536), (None, "fsdp", "model")),  # query, key and value: by columns
        ((2, 512, 512), (None, "model", "fsdp")),  # the attention's output: by rows
        ((2, 2048, 512), (None, "model", "fsdp")),
        ((50_258, 512), ("model", "fsdp")),  # an embedding: by the vocabulary
        ((50_257, 512), (None, "model")),  # which is odd
        ((50_257, 511), ()),
        ((1_000_000,), ("model",)),
    ],
)
def test_model_takes_the_largest_axis_and_fsdp_the_next(shape, spec):
    layout = config.Mesh(fsdp=2, model=2, shard_above_mb=1.0)
    devices = mesh.make(layout)
    assert dict(devices.shape) == {"data": 2, "fsdp": 2, "model": 2}
    sharding = mesh.parameter_shardings({"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, devices, layout)["x"]
    assert sharding.spec == P(*spec)


def test_the_rule_goes_by_bytes():
    layout = config.Mesh(fsdp=4, shard_above_mb=1.0)
    devices = mesh.make(layout)
    shapes = {kind: jax.ShapeDtypeStruct((400_000,), kind) for kind in ("float32", "bfloat16")}
    shardings = mesh.parameter_shardings(shapes, devices, layout)
    assert shardings["float32"].spec == P("fsdp") and shardings["bfloat16"].spec == P()


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("batch_axis", [0, 1])
def test_a_batch_is_split_over_all_devices(fsdp, batch_axis):
    devices = mesh.make(config.Mesh(fsdp=fsdp))
    rows = np.arange(2 * 16 * 3).reshape((16, 2, 3) if batch_axis == 0 else (2, 16, 3))
    placed = mesh.put_batch({"x": rows}, devices, batch_axis)["x"]
    assert len({shard.device for shard in placed.addressable_shards}) == 8
    assert {shard.data.shape[batch_axis] for shard in placed.addressable_shards} == {2}
    np.testing.assert_array_equal(placed, rows)


def test_a_batch_that_devices_cannot_share_is_refused():
    devices = mesh.make(config.Mesh(fsdp=4))
    mesh.check_batch(16, devices, "train.batch_size")
    with pytest.raises(UserError, match="train.batch_size is 12 instances, which 8 devices cannot share evenly"):
        mesh.check_batch(12, devices, "train.batch_size")
    with pytest.raises(UserError, match="mesh.fsdp 3 does not divide the number of devices, 8"):
        mesh.make(config.Mesh(fsdp=3))
    with pytest.raises(UserError, match="mesh.fsdp 4 times mesh.model 4 does not divide the number of devices, 8"):
        mesh.make(config.Mesh(fsdp=4, model=4))
    devices = mesh.make(config.Mesh(model=2))
    mesh.check_batch(12, devices, "train.batch_size")
    with pytest.raises(UserError, match="is 6 instances, which 4 groups of 2 devices cannot share evenly"):
        mesh.check_batch(6, devices, "train.batch_size")


def test_devices_of_a_model_group_hold_the_same_rows():
    devices = mesh.make(config.Mesh(fsdp=2, model=2))
    rows = np.arange(8 * 3).reshape(8, 3)
    placed = mesh.put_batch({"x": rows}, devices, batch_axis=0)["x"]
    np.testing.assert_array_equal(placed, rows)
    by_group = [{str(shard.index) for shard in placed.addressable_shards if shard.device in group}
                for group in devices.devices.reshape(4, 2)]  # fmt: skip
    assert [len(held) for held in by_group] == [1] * 4 and len(set.union(*by_group)) == 4


def test_a_process_reads_the_rows_that_its_devices_hold(monkeypatch):
    """As if two devices of the mesh, not next to each other, were ours."""
    devices = mesh.make(config.Mesh())
    assert mesh.own_rows(16, devices).tolist() == list(range(16))
    own = NamedSharding(devices, P(mesh.BATCH_AXES)).addressable_devices_indices_map((16,))
    some = dict(list(own.items())[1:4:2])
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape: some)
    assert mesh.own_rows(16, devices).tolist() == [2, 3, 6, 7]


def test_devices_of_several_slices_are_ordered_by_them(monkeypatch):
    """jax.make_mesh refuses them, and JAX calls the hosts of GPUs slices too."""
    devices = jax.devices()
    monkeypatch.setattr(mesh, "slice_of", lambda device: device.id % 2)
    made = mesh.make(config.Mesh(fsdp=2, model=2)).devices
    assert made.ravel().tolist() == devices[0::2] + devices[1::2]


def test_a_checkpoint_of_eight_devices_goes_on_on_one_two_or_four(tmp_path):
    """Six more steps, after two on eight devices with split parameters; loss by loss."""
    graphdef, params = nnx.split(Toy())
    optimizer = optax.adamw(1e-2)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    state = {"params": params, "opt_state": optimizer.init(params), "step": np.int32(0)}

    def on(number):
        """(devices, shardings, step) for so many devices, half of them along `fsdp` where there is more than one."""
        layout = config.Mesh(fsdp=max(number // 2, 1), shard_above_mb=0.001)
        devices = Mesh(np.array(jax.devices()[:number]).reshape(-1, layout.fsdp, 1), mesh.AXES)
        shardings = mesh.parameter_shardings(state, devices, layout)
        return devices, shardings, make_train_step(ALWAYS_KL, graphdef, optimizer, Keys.of(0).steps, shardings)

    def take(state, devices, step, number):
        losses = []
        for i in range(number):
            state, named = step(state, mesh.put_batch(BATCHES[i % 2], devices, batch_axis=1))
            losses.append(jax.device_get(named))
        return state, losses

    devices, shardings, step = on(8)
    now, _ = take(jax.device_put(state, shardings), devices, step, 2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, now, None)
    checkpoints.finish()
    _, expected = take(now, devices, step, 6)
    for number in (4, 2, 1):
        devices, shardings, step = on(number)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        restored = checkpoints.restore(2, shapes)
        assert jax.tree.map(lambda x: x.sharding, restored) == shardings
        _, found = take(restored, devices, step, 6)
        assert_trees_close(found, expected, 1e-5)
