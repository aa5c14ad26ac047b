"""The energy: product of experts, its gradient, its precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from miracle_jax import energy as module
from miracle_jax.energy import aspect_probabilities

SIZES = (2, 3, 2)
energy, energy_gradient = jax.jit(module.energy), jax.jit(module.energy_gradient)


def logits(params, z):
    hidden = jax.nn.silu(jnp.einsum("z,azf->af", z, params["w1"]) + params["b1"])
    present = np.arange(max(SIZES)) < np.array(SIZES)[:, None]
    return jnp.where(present, jnp.einsum("af,afn->an", hidden, params["w2"]) + params["b2"], -1e9)


def make_heads(dtype=jnp.float32, latent=6, hidden=8):
    rng = np.random.default_rng(0)
    attributes, aspects = len(SIZES), max(SIZES)
    shapes = {"w1": (attributes, latent, hidden), "b1": (attributes, hidden)}
    shapes |= {"w2": (attributes, hidden, aspects), "b2": (attributes, aspects)}
    return Partial(logits, {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()})


@pytest.fixture
def z():
    return jnp.asarray(np.random.default_rng(1).normal(size=6), jnp.float32)


def test_energy_is_the_weighted_surprise_of_the_wanted_aspects(z):
    heads = make_heads()
    p = np.asarray(aspect_probabilities(heads, z[None]))[0]
    want = -(0.5 * np.log(p[0, 1]) + 2.0 * np.log(p[1, 2]) + 3.0 * np.log(p[2, 0]))
    got = energy(heads, z, jnp.array([1, 2, 0]), jnp.array([0.5, 2.0, 3.0]))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_aspect_probabilities_sum_to_one_over_the_aspects_that_exist(z):
    p = np.asarray(aspect_probabilities(make_heads(), jnp.stack([z, -z])))
    assert p.shape == (2, 3, 3)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert (p[:, [0, 2], 2] == 0).all() and (p[:, 1] > 0).all()


def test_gradient_against_finite_differences_in_float64():
    with jax.enable_x64(True):
        heads = make_heads(jnp.float64)
        aspects, weights = jnp.array([1, 2, -1]), jnp.array([0.7, 2.0, 5.0])
        z = jnp.asarray(np.random.default_rng(1).normal(size=6))
        step = 1e-5
        values = jax.vmap(lambda x: energy(heads, x, aspects, weights))
        differences = values(z + step * jnp.eye(6)) - values(z - step * jnp.eye(6))
        gradient = energy_gradient(heads, z, aspects, weights)
        assert gradient.dtype == jnp.float64 and np.abs(gradient).min() > 1e-3
        np.testing.assert_allclose(gradient, differences / (2 * step), rtol=1e-8, atol=1e-9)


def test_experts_add_and_weights_scale(z):
    heads, aspects = make_heads(), jnp.array([1, 2, 0])
    whole = energy_gradient(heads, z, aspects, jnp.array([1.0, 2.0, 3.0]))
    parts = [energy_gradient(heads, z, aspects, jnp.eye(3)[i]) for i in range(3)]
    np.testing.assert_allclose(whole, parts[0] + 2 * parts[1] + 3 * parts[2], rtol=1e-5, atol=1e-6)


def test_weight_zero_equals_attribute_left_out_and_nothing_controlled_is_zero(z):
    heads = make_heads()
    for function in (energy, energy_gradient):
        left_out = function(heads, z, jnp.array([1, -1, 0]), jnp.array([1.0, 7.0, 2.0]))
        weight_zero = function(heads, z, jnp.array([1, 2, 0]), jnp.array([1.0, 0.0, 2.0]))
        np.testing.assert_array_equal(left_out, weight_zero)
        assert not np.any(function(heads, z, jnp.array([-1, -1, -1]), jnp.ones(3)))


def test_products_run_at_highest_precision_whatever_the_default(z):
    with jax.default_matmul_precision("bfloat16"):
        text = str(jax.make_jaxpr(module.energy_gradient)(make_heads(), z, jnp.array([1, 2, 0]), jnp.ones(3)))
    assert text.count("dot_general[") == text.count("(Precision.HIGHEST, Precision.HIGHEST)") > 0
