"""What all transformers share: fused attention against ours, unrolled layers against scanned ones, dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_trees_close
from small import CONFIG, miracle, random_batch

from miracle_jax import cvae, layers, losses
from miracle_jax.errors import UserError

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def keys_and_values(rows, number, groups, size, seed):
    return normal(rows, groups, number, size, seed=seed), normal(rows, groups, number, size, seed=seed + 1)


CAUSAL, LENGTH = np.tril(np.ones((7, 7), bool)), np.array([7, 1, 4])
PADDED = (np.arange(7) < LENGTH[:, None])[:, None]
CASES = {
    "encoder": ([7], [PADDED], 4),
    "decoder": ([1, 7], [np.ones((), bool), CAUSAL], 4),
    "prompt on the left": ([1, 7], [np.ones((), bool), CAUSAL & (np.arange(7) >= LENGTH[:, None, None] - 1)], 4),
    "grouped heads": ([1, 7], [np.ones((), bool), CAUSAL], 2),
    "a cache": ([1, 5, 7], [np.ones((), bool), (np.arange(5) < LENGTH[:, None])[:, None], CAUSAL], 1),
}  # (keys of each part, what is visible of it, key heads); 7 queries in 4 heads of 3 rows


@pytest.mark.parametrize("name", CASES)
def test_fused_attention_equals_ours_in_value_and_gradient(name):
    """By the code that cuDNN gets, with XLA behind it."""
    numbers, visible, groups = CASES[name]
    query = normal(3, 7, 4, 8)
    pairs = [keys_and_values(3, number, groups, 8, 10 + 2 * i) for i, number in enumerate(numbers)]

    def run(attend):
        def objective(query, pairs):
            mixed = attend(query, [(*pair, seen) for pair, seen in zip(pairs, visible, strict=True)])
            return jnp.sum(mixed * normal(3, 7, 32, seed=9)), mixed

        (_, mixed), slopes = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(query, pairs)
        return mixed, slopes

    want, got = run(layers.attention), run(lambda *inputs: layers.fused_attention(*inputs, "xla"))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert_trees_close(got[1], want[1], 1e-5)


def test_cudnn_is_asked_for_whole_texts_and_not_for_single_tokens(monkeypatch):
    asked = []
    monkeypatch.setattr(layers, "fused_attention", lambda query, parts, how: asked.append((query.shape[1], how)))
    parts = [(*keys_and_values(3, 7, 4, 8, 0), np.ones((), bool))]
    for how in ("xla", "cudnn"):
        for queries in (1, 7):
            layers.attention(normal(3, queries, 4, 8), parts, implementation=how)
    assert asked == [(7, "cudnn")]


def test_a_model_for_cudnn_runs_without_it_but_is_not_trained_so():
    settings = dataclasses.replace(CONFIG, attention="cudnn", dtype="bfloat16")
    assert cvae.compute(settings) == layers.Compute(jnp.dtype("bfloat16"), False, True, "xla")
    with pytest.raises(UserError, match="attention cudnn needs an NVIDIA GPU .* but this is .*; use --attention xla"):
        cvae.check_device(settings)
    cvae.check_device(CONFIG)


@pytest.mark.parametrize("rows", [(5,), (3, 5), (2, 3, 5)])
def test_the_product_has_the_gradients_of_a_plain_one(rows):
    x, kernel, slope = normal(*rows, 7), normal(7, 4), normal(*rows, 4)

    def pulled(function):
        value, back = jax.vjp(function, x, kernel)
        return value, *back(slope)

    for ours, plain in zip(pulled(layers.product), pulled(jnp.matmul), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("of_x", "kept"), [(True, (7, 4)), (False, (3, 7))])
def test_the_product_keeps_what_its_gradient_needs_and_no_more(of_x, kept):
    x, kernel = jnp.ones((3, 7)), jnp.ones((7, 4))
    if of_x:
        _, back = jax.vjp(lambda x: layers.product(x, kernel), x)
    else:
        _, back = jax.vjp(lambda kernel: layers.product(x, kernel), kernel)
    assert {leaf.shape for leaf in jax.tree.leaves(back)} == {kept}


@pytest.mark.parametrize("remat", [False, True])
def test_unrolled_layers_compute_what_scanned_ones_do(remat):
    """Losses and gradients of the whole model, dropout and the draw of z included."""
    batch = random_batch(1, 4)

    def run(scan):
        model = miracle(dataclasses.replace(CONFIG, scan_layers=scan, remat=remat))
        graphdef, params = layers.nnx.split(model)
        params = layers.nnx.to_pure_dict(params)

        def objective(params):
            out = layers.nnx.merge(graphdef, params)(jax.tree.map(lambda leaf: leaf[0], batch), KEY, 1.0)
            named = losses.parts(out, jax.tree.map(lambda leaf: leaf[0], batch), CONFIG.loss, losses.counts(batch))
            return losses.weighted_sum(named, CONFIG.loss, 1.0)

        value_and_slopes = jax.jit(jax.value_and_grad(objective))
        return value_and_slopes(params), str(jax.make_jaxpr(value_and_slopes)(params)).count(" scan[")

    (scanned, loops), (unrolled, none) = run(True), run(False)
    assert loops > 0 and none == 0
    assert_trees_close(unrolled, scanned, 1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("width", [64, 65])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate, width):
    x = np.ones((50, 40, width), np.float32)
    dropped = np.asarray(jax.jit(layers.dropout, static_argnums=1)(x, rate, KEY))
    kept = dropped != 0
    assert kept.mean() == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / x.size) ** 0.5)
    np.testing.assert_allclose(dropped[kept], 1 / (1 - rate), rtol=1e-4)
    for axis in range(3):  # no place is dropped more often than others, and neighbours do not go together
        means = kept.mean(axis=tuple({0, 1, 2} - {axis}))
        assert np.abs(means - (1 - rate)).max() < 5 * (rate * (1 - rate) * len(means) / x.size) ** 0.5
        both = np.mean(~np.delete(kept, 0, axis) & ~np.delete(kept, -1, axis))
        assert both == pytest.approx(rate**2, abs=5 * (rate**2 / x.size) ** 0.5)


def test_dropout_without_a_key_or_a_rate_changes_nothing():
    x = normal(3, 5)
    assert layers.dropout(x, 0.5, None) is x and layers.dropout(x, 0.0, KEY) is x
    assert layers.dropout(x.astype(jnp.bfloat16), 0.5, KEY).dtype == jnp.bfloat16
