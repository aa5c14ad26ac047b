"""What a training step costs and needs: counts by hand, closed forms, and the command on eight virtual devices."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import ROOT
from micro import __file__ as MICRO

from miracle_jax import abstract, chips, config, cost, mesh, plan
from miracle_jax.errors import UserError

# ------------------------------------------------------------------------------------------------ products


def test_products_of_a_scan_count_each_of_its_steps():
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    jaxpr = jax.make_jaxpr(run)(jnp.ones((3, 4)), jnp.ones((5, 4, 4)))
    assert cost.products(jaxpr).flops == 5 * 2 * 3 * 4 * 4
    backward = jax.make_jaxpr(jax.grad(lambda x, w: run(x, w).sum(), argnums=(0, 1)))(
        jnp.ones((3, 4)), jnp.ones((5, 4, 4))
    )
    assert cost.products(backward).flops == 3 * 5 * 2 * 3 * 4 * 4


def test_loops_of_unknown_length_take_the_trips_that_are_given_and_conditionals_the_dearest_branch():
    def run(x, number):
        x = jax.lax.fori_loop(0, number, lambda _, x: x @ x, x)
        return jax.lax.cond(number > 2, lambda x: x @ x @ x, lambda x: x, x)

    jaxpr = jax.make_jaxpr(run)(jnp.ones((4, 4)), 3)
    assert cost.products(jaxpr, trips=7).flops == (7 + 2) * 2 * 4**3


def test_batched_products():
    jaxpr = jax.make_jaxpr(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)))
    assert cost.products(jaxpr) == (2 * 2 * 3 * 4 * 5, 4 * (2 * 3 * 4 + 2 * 4 * 5 + 2 * 3 * 5))


# --------------------------------------------------------------------------------------------- collectives

PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(3)
  ROOT %less = pred[] compare(%at, %end), direction=LT
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %gathered = f32[16,4]{1,0} all-gather(%x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %reduced = bf16[8,4]{1,0} reduce-scatter(%gathered), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
  %moved = f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%t, %moved)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%p, %p)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body LENGTH
  %last = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %total = f32[8,4]{1,0} all-reduce(%last), replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("length", "trips"), [('backend_config={"known_trip_count":{"n":"5"}}', 5), ("", 3)], ids=["noted", "compared"]
)
def test_collectives_inside_loops_count_every_trip(length, trips):
    found = {one.kind: one for one in cost.collectives(PROGRAM.replace("LENGTH", length))}
    assert found["all-gather"].bytes == trips * 16 * 4 * 4
    assert found["reduce-scatter"].bytes == trips * 2 * 8 * 4 * 2  # of the whole that is scattered
    assert found["collective-permute"].bytes == trips * 8 * 4 * 4
    assert found["all-reduce"].bytes == 8 * 4 * 4
    np.testing.assert_array_equal(found["all-gather"].groups, [[0, 2], [1, 3]])
    np.testing.assert_array_equal(found["reduce-scatter"].groups, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(found["all-reduce"].groups, [[0, 1], [2, 3]])


# --------------------------------------------------------------------------------------------------- chips


def all_reduce(members: int, size: int = 800) -> cost.Collective:
    return cost.Collective("all-reduce", size, np.arange(members)[None])


def test_an_all_reduce_sends_twice_all_but_its_own_part():
    chip = chips.Chip("", 1.0, 1.0, 1.0, link=100.0, domain=8, beyond=10.0)
    took = chips.seconds(chip, 0, 0, [all_reduce(8)])["network"] * chips.NETWORK
    assert took == pytest.approx(2 * 7 / 8 * 800 / 100)


def test_between_domains_each_chip_carries_its_share():
    chip = chips.Chip("", 1.0, 1.0, 1.0, link=100.0, domain=8, beyond=10.0)
    took = chips.seconds(chip, 0, 0, [all_reduce(32)])["network"] * chips.NETWORK
    assert took == pytest.approx(2 * 7 / 8 * 800 / 100 + 2 * 3 / 4 * 100 / 10)
    assert chips.seconds(chip, 0, 0, [all_reduce(1)])["network"] == 0


def test_an_unknown_chip_is_named_with_its_likes():
    with pytest.raises(UserError, match="--chip v5 is unknown; did you mean v5p or v5e"):
        chips.find("v5")
    with pytest.raises(UserError, match="--chip tpu is unknown; there are v5e, v5p, v6e, h100, h200"):
        chips.find("tpu")


# ---------------------------------------------------------------------------------------------------- bytes


def hand_shapes(settings: config.Config, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every parameter's shape, written down from the architecture (GPT-2 decoder)."""

    def layers(shape):
        D, M, L = shape.width, shape.mlp, shape.depth
        matrices = [(L, D, 3 * D), (L, D, D), (L, D, M), (L, M, D)]
        return matrices + [(L, 3 * D), (L, D), (L, M), (L, D)] + [(L, D)] * 4  # biases; two norms

    encoder, decoder, Z, F = settings.encoder, settings.decoder, settings.latent.size, settings.latent.hidden
    D, A, N = encoder.width, len(sizes), max(sizes)
    tables = [(encoder.vocab_size, D), (encoder.max_positions, D), (encoder.segments, D)]
    text_encoder = tables + [(D,), (D,)] + layers(encoder) + [(D, D), (D,), (D, 2 * Z)]
    D = decoder.width
    speaker = [(decoder.vocab_size, D), (decoder.max_positions, D), (D,), (D,), (decoder.vocab_size,)]
    speaker += layers(decoder) + [(Z, D), (Z, (decoder.depth + 1) * D)]
    return 2 * text_encoder + speaker + [(A, Z, F), (A, F), (A, F, N), (A, N)]


def hand_bytes(shapes: list[tuple[int, ...]], fsdp: int, threshold: float) -> int:
    """Float32 bytes a device, where arrays above `threshold` MiB that fsdp divides somewhere are split."""
    total = 0
    for shape in shapes:
        size = 4 * int(np.prod(shape))
        split = fsdp > 1 and size > threshold * 2**20 and any(axis % fsdp == 0 for axis in shape)
        total += size // fsdp if split else size
    return total


@pytest.mark.parametrize("name", ["tiny", "paper"])
@pytest.mark.parametrize("fsdp", [1, 8])
def test_bytes_agree_with_a_count_by_hand(name, fsdp):
    settings = config.load_file(ROOT / "configs" / f"{name}.py")
    threshold = 0.1 if name == "tiny" else 4.0
    settings = dataclasses.replace(settings, mesh=config.Mesh(fsdp=fsdp, shard_above_mb=threshold))
    devices = jax.sharding.AbstractMesh((8 // fsdp, fsdp, 1), mesh.AXES)
    step = abstract.abstract_step(settings, (2, 2, 2), devices, abstract.batch_shapes(settings, 3, 32))
    shapes = hand_shapes(settings, (2, 2, 2))
    parameters = hand_bytes(shapes, fsdp, threshold)
    assert sum(leaf.size for leaf in jax.tree.leaves(step.state["params"])) == sum(map(np.prod, shapes))
    # AdamW: two moments, and the count of steps twice, its own and the schedule's.
    assert step.held() == {
        "parameters": parameters, "gradients": parameters, "optimizer": 2 * parameters + 2 * 4, "frozen": 0
    }  # fmt: skip


def test_frozen_parts_have_no_gradients():
    settings = config.load_file(MICRO)
    frozen = dataclasses.replace(settings.encoder, frozen=True, pretrained="somewhere")
    settings = dataclasses.replace(settings, encoder=frozen)
    devices = jax.sharding.AbstractMesh((1, 1, 1), mesh.AXES)
    batch = abstract.batch_shapes(settings, 3, 8)
    assert batch["context_mean"].shape == (1, 8, 16) and "context" not in batch
    held = abstract.abstract_step(settings, (2, 2, 2), devices, batch).held()
    D, Z = 16, 8
    assert held["parameters"] + held["frozen"] == hand_bytes(hand_shapes(settings, (2, 2, 2)), 1, 4.0)
    bert = hand_shapes(settings, (2, 2, 2))[:20]
    assert held["frozen"] == 2 * (hand_bytes(bert, 1, 4.0) - 4 * (D * D + D + 2 * D * Z))


# ---------------------------------------------------------------------------------------------------- FLOPs


def test_flops_of_a_training_step_agree_with_the_closed_form():
    """Every product once forward and twice backward."""
    settings, B, A, N = config.load_file(MICRO), 8, 3, 2
    encoder, decoder, Z, F = settings.encoder, settings.decoder, settings.latent.size, settings.latent.hidden
    batch = abstract.batch_shapes(settings, A, B)
    context, joint, reply = (batch[name].shape[-1] for name in ("context", "joint", "reply"))

    def layers(shape, width, keys):
        D = shape.width
        return shape.depth * B * width * 2 * (4 * D * D + 2 * D * shape.mlp + 2 * keys * D)

    D = encoder.width
    forward = sum(layers(encoder, width, width) + 2 * B * (D * D + D * 2 * Z) for width in (context, joint))
    D = decoder.width
    forward += layers(decoder, reply, reply + 1) + 2 * B * (
        Z * D + Z * (decoder.depth + 1) * D
    )  # one key is the latent's
    forward += 2 * B * A * (Z * F + F * N)
    forward += 2 * B * reply * D * decoder.vocab_size
    besides = 2 * 2 * B * A * Z  # the attributes' means, whose members have no gradient
    besides += 2 * B * reply * decoder.vocab_size  # the head's bias, whose gradient is a product with ones
    assert abstract.products(settings, (2, 2, 2), batch).flops == 3 * forward + besides


def test_flops_count_the_layers_of_a_scan_as_those_written_out_and_remat_once_more():
    settings = config.load_file(MICRO)
    deep = dataclasses.replace(
        settings, encoder=dataclasses.replace(settings.encoder, depth=3),
        decoder=config.Llama(vocab_size=400, width=16, depth=3, heads=4, kv_heads=2, mlp=32, max_positions=20),
    )  # fmt: skip
    batch = abstract.batch_shapes(deep, 3, 8)
    count = {how: abstract.products(dataclasses.replace(deep, **dict(how)), (2, 2, 2), batch).flops
             for how in ((), (("scan_layers", False),), (("remat", True),))}  # fmt: skip
    scanned, flat, again = count.values()
    assert scanned == flat
    assert 1.2 * scanned < again < 4 / 3 * scanned


# ------------------------------------------------------------------------------------------------- the command


def command(*flags: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "miracle_jax.plan", "--config", MICRO, *flags]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


def test_the_command_plans_a_ladder_of_devices(tmp_path):
    out = tmp_path / "plan.json"
    split = ("--mesh.fsdp", "4", "--mesh.shard-above-mb", "0.001")
    done = command("--devices", "8", "--sizes", "--chip", "v5e", "--out", str(out), *split)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["plans"]  # 4 does not divide 1 device
    assert found["mesh"]["fsdp"] == 4 and found["devices"] == 8 and found["batch"] == 8 and found["fits"]
    settings = config.load_file(MICRO)
    parameters = hand_bytes(hand_shapes(settings, (2, 2, 2)), 4, 0.001)
    assert found["bytes"]["parameters"] == parameters
    # What XLA takes as arguments: the state, the step's number, and one row of tokens, lengths and labels.
    context, joint, reply = settings.data.buckets[-1]
    assert found["arguments_bytes"] == 3 * parameters + 3 * 4 + 4 * (context + joint + reply + 3 + 3)
    batch = abstract.batch_shapes(settings, 3, 8)
    assert found["flops"] == abstract.products(settings, (2, 2, 2), batch).flops / 8
    assert found["collective_bytes"]["all-gather"] > 0 and found["collective_bytes"]["all-reduce"] > 0
    assert found["bound"] == max(found["seconds"], key=found["seconds"].get)
    assert "compiled for CPUs" in done.stdout and "TPU v5e: 197 TFLOP/s" in done.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--chip", "v5"], "--chip v5 is unknown; did you mean v5p or v5e?"),
        (["--devices", "6", "8", "--mesh.fsdp", "4"], "mesh.fsdp 4 does not divide the number of devices, 6"),
        (["--devices", "0"], "--devices is [0]; it must be above 0"),
        (["--devices", "6", "12"], "is 8 instances, which 6 devices cannot share evenly"),
        (["--sizes", "8b"], "--sizes 8b is unknown; there are 1b, 3b, 7b"),
        (["--compiler", "tpu"], "--compiler tpu needs --chip"),
        (["--workdir", "runs/x"], "--workdir is not understood"),
    ],
)
def test_mistakes_are_one_sentence(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(plan, "virtual_devices", lambda number: jax.devices() * number)
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--config", MICRO, *flags])
    assert sentence in capsys.readouterr().err
