"""Packed batches: where tokens go and come back from, and that a model computes on them what it does on padded ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import assert_trees_close
from small import CONFIG, SIZES, miracle, packed, random_batch

from miracle_jax import abstract, config, losses
from miracle_jax.packing import Packing

KEY = jax.random.key(3)
LENGTH = np.array([2, 5, 1, 4])
FAMILIES = {
    "gpt2": CONFIG,
    "llama": dataclasses.replace(
        CONFIG,
        decoder=config.Llama(vocab_size=18, width=16, depth=2, heads=2, kv_heads=1, mlp=32, max_positions=24),
    ),
}


def packing(shares: int, room: int) -> Packing:
    tokens = packed({"x": np.zeros((1, 4, 5)), "x_length": LENGTH[None]}, shares, room)["x_tokens"][0]
    return Packing(4, 5, jnp.asarray(LENGTH), jnp.asarray(tokens))


def numbered(*trailing: int) -> np.ndarray:
    return 1 + np.arange(20 * int(np.prod(trailing)), dtype=np.float32).reshape(4, 5, *trailing)


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("shares", "room"), [(1, 12), (1, 15), (2, 7), (4, 6)])
def test_tokens_stand_end_to_end_and_come_back_to_their_places(shares, room, trailing):
    x, how = numbered(*trailing), packing(shares, room)
    together = np.asarray(how.together(jnp.asarray(x)))
    for share in range(shares):
        rows = range(share * 4 // shares, (share + 1) * 4 // shares)
        tokens = np.concatenate([x[row, : LENGTH[row]] for row in rows])
        np.testing.assert_array_equal(together[share, : len(tokens)], tokens)
        assert not together[share, len(tokens) :].any()
    inside = (np.arange(5) < LENGTH[:, None]).reshape(4, 5, *[1] * len(trailing))
    np.testing.assert_array_equal(how.apart(jnp.asarray(together)), np.where(inside, x, 0))


def test_unpacked_texts_stay_as_they_are():
    x, how = jnp.asarray(numbered(3)), Packing(4, 5)
    assert how.together(x) is x and how.apart(x) is x and how.keys(None) is None


@pytest.mark.parametrize("shares", [1, 2])
def test_gradients_are_those_of_plain_indexing(shares):
    how, x = packing(shares, 14), jnp.asarray(numbered(3))
    places = np.asarray(how.together(jnp.arange(20).reshape(4, 5)))
    real = np.asarray(how.together(jnp.ones((4, 5)))) > 0

    def plain(x):
        return jnp.where(real[..., None], x.reshape(20, 3)[places], 0)

    value, pull = jax.vjp(how.together, x)
    expected, pull_plain = jax.vjp(plain, x)
    slope = jnp.asarray(np.random.default_rng(0).normal(size=value.shape), jnp.float32)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(pull(slope)[0], pull_plain(slope)[0])

    def back(y):  # the reverse, written as the transpose of plain indexing
        return jax.linear_transpose(plain, x)(y)[0]

    value, pull = jax.vjp(how.apart, slope)
    expected, pull_plain = jax.vjp(back, slope)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(pull(x)[0], pull_plain(x)[0])


def test_a_tokens_key_depends_on_its_row_and_place_alone():
    def keys(how, together):
        return np.asarray(jax.random.key_data(how.keys(KEY)))[together]

    inside = np.arange(5) < LENGTH[:, None]
    unpacked = keys(Packing(4, 5), inside)
    assert len(np.unique(unpacked, axis=0)) == LENGTH.sum()
    wider = np.pad(inside, [(0, 0), (0, 3)])
    np.testing.assert_array_equal(keys(Packing(4, 8), wider), unpacked)
    for shares, room in ((1, 14), (2, 8)):
        how = packing(shares, room)
        together = np.asarray(how.together(jnp.ones((4, 5)))) > 0
        np.testing.assert_array_equal(keys(how, together), unpacked)


def step(settings: config.Config, batch: dict):
    """Losses of one micro-batch, and gradients of all parameters; dropout and the draw of z are on."""
    graphdef, params = nnx.split(miracle(settings))
    total = losses.counts(batch)
    batch = jax.tree.map(lambda leaf: leaf[0], batch)

    @jax.jit
    def objective(params):
        named = losses.parts(nnx.merge(graphdef, params)(batch, KEY, 1.0), batch, settings.loss, total)
        return losses.weighted_sum(named, settings.loss, 1.0), named

    return jax.value_and_grad(objective, has_aux=True)(nnx.to_pure_dict(params))


@pytest.mark.parametrize(
    ("family", "how", "shares"),
    [
        ("gpt2", {}, 1),
        ("gpt2", {"remat": True}, 2),
        ("gpt2", {"scan_layers": False}, 2),
        ("llama", {}, 2),
    ],
)
def test_losses_and_gradients_are_those_of_padded_texts(family, how, shares):
    settings, batch = dataclasses.replace(FAMILIES[family], **how), random_batch(1, 4)
    assert settings.encoder.dropout and settings.decoder.dropout
    assert_trees_close(step(settings, packed(batch, shares, 24 // shares + 18)), step(settings, batch), 1e-5)


def test_fields_are_packed_each_on_its_own():
    batch = random_batch(1, 4)
    whole = packed(batch, 1, 40)
    expected = step(CONFIG, batch)
    for field in ("context", "reply"):
        part = batch | {f"{field}_tokens": whole[f"{field}_tokens"]}
        assert_trees_close(step(CONFIG, part), expected, 1e-5)


def test_what_stands_behind_a_texts_end_counts_for_nothing():
    batch = random_batch(1, 4)
    for name in ("context", "joint", "reply"):
        batch[name][np.arange(batch[name].shape[-1]) >= batch[f"{name}_length"][..., None]] = 1
    other = {name: array.copy() for name, array in batch.items()}
    for name in ("context", "joint", "reply"):
        other[name][np.arange(other[name].shape[-1]) >= other[f"{name}_length"][..., None]] = 2
    one, two = (step(CONFIG, packed(each, 1, 50))[0] for each in (batch, other))
    assert float(one[0]) == float(two[0])


def test_products_are_counted_as_packed():
    batch, room = random_batch(1, 4), 36
    padded, short = (abstract.products(CONFIG, SIZES, each).flops for each in (batch, packed(batch, 1, room)))
    D, M, L, V = 16, 32, 2, 18
    layers = 2 * L * (3 * D * D + D * D + 2 * D * M)  # of a token, forward
    saved = 3 * layers * sum(batch[name][0].size - room for name in ("context", "joint", "reply"))
    head = 3 * 2 * V * D + 2 * V  # of a token; its bias has a gradient only
    assert padded - short == saved + head * (batch["reply"][0].size - room)
