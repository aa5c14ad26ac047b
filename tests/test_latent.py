"""Gaussians, the KL divergence, the Gaussian encoder and the attribute heads, each against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from miracle_jax import config
from miracle_jax.latent import Gaussian, GaussianEncoder, Heads, kl
from miracle_jax.layers import Compute

SIZES = (3, 2, 4, 2)
ACTIVATIONS = {"silu": lambda x: x / (1 + np.exp(-x)), "relu": lambda x: np.maximum(x, 0)}


def gaussian(seed, shape=(3, 5)):
    rng = np.random.default_rng(seed)
    return Gaussian(*rng.normal(size=(2, *shape)).astype(np.float32))


@pytest.mark.parametrize(
    ("q", "p", "nats"),
    [
        ((1, 1), (0, 1), 0.5),  # (mean, variance)
        ((0, 4), (0, 1), (3 - np.log(4)) / 2),
        ((0, 1), (0, 4), (np.log(4) - 3 / 4) / 2),  # not the same with the arguments exchanged
        ((2, 1), (0, 4), (np.log(4) - 3 / 4) / 2 + 0.5),
    ],
)
def test_kl_by_hand(q, p, nats):
    q, p = (Gaussian(np.full((1, 1), mean, float), np.full((1, 1), np.log(variance))) for mean, variance in (q, p))
    np.testing.assert_allclose(kl(q, p), [[nats]], rtol=1e-6)


def test_kl_equals_the_numeric_integral_of_its_definition():
    q, p = gaussian(0), gaussian(1)
    x = np.linspace(-40, 40, 400_001)

    def log_density(mean, logvar):
        return -0.5 * (np.log(2 * np.pi) + logvar + (x - mean) ** 2 / np.exp(logvar))

    got = np.asarray(kl(q, p))
    for i in np.ndindex(q.mean.shape):
        log_q, log_p = (log_density(g.mean[i], g.logvar[i]) for g in (q, p))
        want = np.trapezoid(np.exp(log_q) * (log_q - log_p), x)
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)


def test_kl_of_a_gaussian_with_itself_is_zero_and_has_no_slope():
    q = gaussian(0)
    np.testing.assert_array_equal(kl(q, q), np.zeros((3, 5)))
    slope = jax.grad(lambda q, p: jnp.sum(kl(q, p)), argnums=(0, 1))(q, q)
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, atol=1e-6), slope)


def test_a_draw_with_scale_0_is_the_mean():
    q = gaussian(0)
    np.testing.assert_array_equal(q.sample(jax.random.key(0), 0.0), q.mean)
    assert np.abs(q.sample(jax.random.key(0)) - q.mean).min() > 0


def test_draws_have_the_mean_the_variance_and_independent_dimensions():
    number = 50_000
    mean, std = np.array([1.0, -2.0, 0.0]), np.array([0.5, 2.0, 1.0])
    q = Gaussian(jnp.tile(jnp.float32(mean), (number, 1)), jnp.tile(jnp.float32(2 * np.log(std)), (number, 1)))
    z = np.asarray(q.sample(jax.random.key(0)), np.float64)
    standard = (z - mean) / std
    error = 5 / number**0.5
    np.testing.assert_allclose(standard.mean(0), 0, atol=error)
    np.testing.assert_allclose(np.cov(standard.T), np.eye(3), atol=2**0.5 * error)
    np.testing.assert_allclose((standard**4).mean(0), 3, atol=96**0.5 * error)  # a normal's fourth moment


def test_draws_are_reparameterised():
    """dz/dmean = 1 and dz/dlogvar = (z - mean) / 2 (Eq. 2)."""
    q, key = gaussian(0), jax.random.key(3)
    slope = jax.grad(lambda q: jnp.sum(q.sample(key)))(q)
    np.testing.assert_allclose(slope.mean, np.ones((3, 5)), rtol=1e-6)
    np.testing.assert_allclose(slope.logvar, (q.sample(key) - q.mean) / 2, rtol=1e-5, atol=1e-6)


def test_encoder_projects_the_pooled_text_to_mean_then_logvar_without_a_bias():
    shape = config.Bert(vocab_size=11, width=8, depth=1, heads=2, mlp=8, max_positions=6, init_std=0.5)
    encoder = GaussianEncoder(shape, config.Latent(size=3, logvar_shift=-1.5), Compute(), nnx.Rngs(0))
    tokens, length = jnp.array([[1, 2, 3, 0], [4, 5, 6, 7]]), jnp.array([3, 4])
    got, pooled = jax.jit(lambda *text: (encoder(*text), encoder.bert(*text)))(tokens, length)
    want = pooled @ encoder.to_gaussian.kernel[...]
    np.testing.assert_allclose(got.mean, want[:, :3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.logvar, want[:, 3:] - 1.5, rtol=1e-5, atol=1e-6)
    assert set(nnx.to_pure_dict(nnx.state(encoder.to_gaussian))) == {"kernel"}


def make_heads(activation="silu", sizes=SIZES):
    return Heads(config.Latent(size=6, hidden=8, activation=activation), sizes, nnx.Rngs(0))


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_heads_equal_one_small_network_per_attribute(activation, leading):
    heads = make_heads(activation)
    z = np.random.default_rng(0).normal(size=(*leading, 6)).astype(np.float32)
    got = np.asarray(heads(z))
    assert got.shape == (*leading, 4, 4) and got.dtype == np.float32
    w1, b1, w2, b2 = (np.asarray(w[...]) for w in (heads.w1, heads.b1, heads.w2, heads.b2))
    for i, size in enumerate(SIZES):
        want = ACTIVATIONS[activation](z @ w1[i] + b1[i]) @ w2[i] + b2[i]
        np.testing.assert_allclose(got[..., i, :size], want[..., :size], rtol=1e-5, atol=1e-5)


def test_aspects_that_an_attribute_lacks_have_probability_0_and_no_gradient():
    heads = make_heads()
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    probability = np.asarray(jax.nn.softmax(heads(z)))
    exists = np.arange(4) < np.array(SIZES)[:, None]
    assert (probability[:, ~exists] == 0).all() and (probability[:, exists] > 0).all()
    np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-6)

    slope = jax.grad(lambda heads: -jnp.sum(jax.nn.log_softmax(heads(z))[..., 0]))(heads)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    moved = np.abs(slope.w2[...]).max(axis=1) > 0
    np.testing.assert_array_equal(moved, exists)


def test_heads_start_within_the_bounds_of_torch_linear_and_apart_from_each_other():
    heads = Heads(config.Latent(size=100, hidden=64), (2, 2), nnx.Rngs(0))
    for weights, fan_in in ((heads.w1, 100), (heads.b1, 100), (heads.w2, 64)):
        values = np.abs(weights[...])
        assert 0.9 * fan_in**-0.5 < values.max() <= fan_in**-0.5
        assert not np.array_equal(values[0], values[1])
