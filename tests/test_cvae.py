"""The whole model's forward pass: where z comes from, what padding may not change, its precisions."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, SIZES, miracle, random_batch

from miracle_jax import cvae, losses

BATCH = random_batch(4)
KEY = jax.random.key(0)


@jax.jit
def mean_forward(model, batch):
    return model(batch)


@pytest.fixture(scope="module")
def model():
    return miracle()


@pytest.fixture(scope="module")
def out(model):
    return mean_forward(model, BATCH)


def test_without_a_key_z_is_the_posteriors_mean(model, out):
    np.testing.assert_array_equal(out.z, out.posterior.mean)
    assert np.abs(out.posterior.mean - out.prior.mean).max() > 0.1
    parts = jax.jit(lambda model, z: (model.decoder(BATCH["reply"], z), model.heads(z)))
    logits, attribute_logits = parts(model, out.z)
    np.testing.assert_allclose(out.logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.attribute_logits, attribute_logits, rtol=1e-5, atol=1e-5)
    assert out.logits.shape == (4, 7, 18) and out.attribute_logits.shape == (4, len(SIZES), max(SIZES))


def test_prior_reads_the_context_only_and_posterior_the_reply_too(model, out):
    other = mean_forward(model, BATCH | {"joint": BATCH["joint"][::-1]})
    np.testing.assert_array_equal(other.prior.mean, out.prior.mean)
    assert np.abs(other.posterior.mean - out.posterior.mean).max() > 0.1


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_noise_0_gives_the_mean_and_1_a_draw(noise):
    """Dropout off, so that nothing but the draw is random."""
    still = miracle(
        dataclasses.replace(
            CONFIG,
            encoder=dataclasses.replace(CONFIG.encoder, dropout=0.0),
            decoder=dataclasses.replace(CONFIG.decoder, dropout=0.0),
        )
    )
    out = jax.jit(lambda model, noise: model(BATCH, KEY, noise))(still, noise)
    distance = np.abs(out.z - out.posterior.mean) / np.exp(out.posterior.logvar / 2)
    assert distance.max() < 1e-5 if noise == 0 else 0.5 < distance.max() < 5


def test_dropout_needs_a_key_and_follows_it(model):
    logits = jax.jit(lambda model, key: model(BATCH, key).logits)
    first, again, other = (logits(model, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_a_model_without_a_posterior_takes_z_from_the_prior():
    alone = miracle(posterior=False)
    assert not hasattr(alone, "posterior")
    without = mean_forward(alone, BATCH)
    assert without.posterior is None
    np.testing.assert_array_equal(without.z, without.prior.mean)


def test_padding_changes_no_loss(model, out):
    """Other tokens in the padding, and more of it."""
    rng = np.random.default_rng(1)
    padded = dict(BATCH)
    for name, vocabulary in (("context", 20), ("joint", 20), ("reply", 18)):
        rows, width = BATCH[name].shape
        wide = rng.integers(0, vocabulary, (rows, width + 5)).astype(np.int32)
        inside = np.arange(width) < BATCH[f"{name}_length"][:, None]
        wide[:, :width] = np.where(inside, BATCH[name], wide[:, :width])
        padded[name] = wide

    @jax.jit
    def named(out, batch):
        total = losses.counts(jax.tree.map(lambda leaf: leaf[None], batch))
        return losses.parts(out, batch, CONFIG.loss, total)

    want, got = named(out, BATCH), named(mean_forward(model, padded), padded)
    assert set(want) == {"reconstruct", "kl", "classify", "gap"} and all(value > 0 for value in want.values())
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


def test_bfloat16_is_for_arithmetic_only(out):
    half = miracle(dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype("float32")}
    got = mean_forward(half, BATCH)
    scored, want_scored = (o._replace(hidden=o.logits, lm_head=None) for o in (got, out))
    assert {leaf.dtype for leaf in jax.tree.leaves(scored)} == {np.dtype("float32")}
    assert "bf16[4,7,16]" in str(jax.make_jaxpr(mean_forward)(half, BATCH))
    for got_leaf, want in zip(jax.tree.leaves(scored), jax.tree.leaves(want_scored), strict=True):
        error = np.abs(got_leaf - want)[np.abs(want) < 1e20].max() / jnp.std(want[np.abs(want) < 1e20])
        assert 0 < error < 0.3


def test_logits_of_bfloat16_arithmetic_have_the_digits_of_float32():
    half = miracle(dataclasses.replace(CONFIG, dtype="bfloat16"))
    half.decoder.head_bias[...] *= 0
    logits = half.decoder.logits(jnp.ones((1, 1, 16), jnp.bfloat16) / 3)
    assert np.mean(logits != logits.astype(jnp.bfloat16)) > 0.5


@pytest.mark.parametrize(
    ("platform", "capability", "has"),
    [
        ("cpu", None, False), ("tpu", None, True), ("gpu", "7.0", False), ("gpu", "7.5", False), ("gpu", "8.0", True),
        ("gpu", "8.9", True), ("gpu", "9.0", True), ("gpu", "10.0", True), ("gpu", "gfx90a", True), ("gpu", None, True),
    ],
)  # fmt: skip
def test_auto_is_bfloat16_where_the_hardware_multiplies_it(monkeypatch, platform, capability, has):
    device = SimpleNamespace(platform=platform, **({"compute_capability": capability} if capability else {}))
    assert cvae.has_bfloat16(device) == has
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert cvae.compute_dtype(CONFIG) == (jnp.bfloat16 if has else jnp.float32)
    for name in ("float32", "bfloat16"):
        assert cvae.compute_dtype(dataclasses.replace(CONFIG, dtype=name)) == jnp.dtype(name)
