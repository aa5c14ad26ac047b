"""The fast solve of Eq. 20 for our own heads, through the public sampler: against diffrax, NumPy, and on real latents.

Where the latent is larger than the stacked first layers (WIDE) it runs in their row space, else (NARROW) in z itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from benchmarks import sampler as benchmark
from miracle_jax import descent, sampler
from miracle_jax.config import Latent, Sample
from miracle_jax.latent import Heads
from miracle_jax.sampler import sample

ROWS, SIZES, HIDDEN, WIDE, NARROW = 12, (2, 3, 2), 8, 40, 10
LENGTH = 5.025  # of the integral of beta/2
KEY = jax.random.key(0)
TIGHT = Sample(rtol=1e-6, atol=1e-6)


def make_heads(latent=WIDE, activation="silu", seed=0, scale=2.0, dtype=jnp.float32):
    """Heads of unequal numbers of aspects that pull rather hard."""
    heads = Heads(Latent(size=latent, hidden=HIDDEN, activation=activation), SIZES, nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for part in (heads.w1, heads.b1, heads.w2, heads.b2):
        part[...] = jnp.asarray(scale * rng.normal(size=part.shape) / part.shape[-2] ** 0.5, dtype)
    return heads


def plain(heads):
    """The same function of z, but none that the fast solve knows."""
    graphdef, params = nnx.split(heads)
    return Partial(lambda params, z: nnx.merge(graphdef, params)(z), params)


def make_problem(latent=WIDE, rows=ROWS, seed=1):
    """mean, logvar, aspects, weights: other weights in every row, and some attributes free."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(rows, latent)).astype(np.float32)
    aspects = np.stack([rng.integers(-1, size, rows) for size in SIZES], axis=1)
    aspects[0] = 0, 2, 1
    return mean, 0 * mean, aspects, rng.uniform(0.5, 2, aspects.shape).astype(np.float32)


@pytest.fixture(scope="module")
def problem():
    return make_problem()


@pytest.fixture(scope="module")
def tight(problem):
    return sample(make_heads(), *problem, TIGHT, KEY)


def reference(heads, problem, steps):
    """z(0) in float64 without JAX: gradients by hand, classical Runge-Kutta, steps that grow exponentially."""
    mean, _, aspects, weights = (np.asarray(array, np.float64) for array in problem)
    w1, b1, w2, b2 = (np.asarray(part[...], np.float64) for part in (heads.w1, heads.b1, heads.w2, heads.b2))
    first = np.concatenate(list(w1), axis=1)
    gram, start = first.T @ first, mean @ first + b1.ravel()
    N = w2.shape[-1]
    exists = np.arange(N) < np.array(heads.sizes)[:, None]
    wanted = np.arange(N) == aspects[..., None]
    asked = weights[..., None] * wanted.any(-1, keepdims=True)

    def slope(c):
        u = (start + c @ gram).reshape(-1, *b1.shape)
        gate = 1 / (1 + np.exp(-u)) if heads.activation == "silu" else u > 0
        logits = np.where(exists, np.einsum("baf,afn->ban", u * gate, w2) + b2, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        down = np.einsum("ban,afn->baf", asked * (wanted - p), w2)
        return (down * (gate + u * gate * (1 - gate))).reshape(len(u), -1)

    c = np.zeros_like(start)
    for h in np.diff(LENGTH * np.expm1(np.linspace(0, 6, steps + 1)) / np.expm1(6)):
        k1 = slope(c)
        k2 = slope(c + h / 2 * k1)
        k3 = slope(c + h / 2 * k2)
        c = c + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(c + h * k3))
    return mean + c @ first.T


# The same solution as others find.


@pytest.mark.parametrize("latent", [WIDE, NARROW])
def test_equals_the_general_path(latent):
    config = Sample(rtol=1e-8, atol=1e-8, max_steps=4000)
    with jax.enable_x64(True):
        heads = make_heads(latent, dtype=jnp.float64)
        mean, *rest = make_problem(latent)
        problem = mean.astype(np.float64), *rest
        want = sample(plain(heads), *problem, dataclasses.replace(config, solver="dopri5"), KEY)
        assert np.abs(want.z - mean).max() > 0.5 and want.ok.all()
        for solver in descent.PAIRS:
            got = sample(heads, *problem, dataclasses.replace(config, solver=solver), KEY)
            assert got.z.dtype == np.float64 and got.ok.all() and (got.steps != want.steps).any()
            for name in ("z", "energy_before", "energy_after"):
                np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("latent", [WIDE, NARROW])
def test_equals_an_independent_float64_reference(latent, request):
    problem = make_problem(latent)
    got = request.getfixturevalue("tight") if latent == WIDE else sample(make_heads(latent), *problem, TIGHT, KEY)
    assert got.ok.all() and got.z.dtype == np.float32
    np.testing.assert_allclose(got.z, reference(make_heads(latent), problem, 500), rtol=5e-5, atol=5e-5)


def test_float32_stays_float32_in_64_bit_mode(problem, tight):
    with jax.enable_x64(True):
        got = sample(make_heads(), *problem, TIGHT, KEY)
    assert got.z.dtype == np.float32
    np.testing.assert_allclose(got.z, tight.z, rtol=5e-5, atol=5e-5)


def test_units_of_relu_at_their_kink(problem):
    # Derivative 0 there, as jax.nn.relu has it: a latent on all kinks stays.
    mean, logvar, aspects, weights = problem
    heads = make_heads(activation="relu")
    heads.b1[...] *= 0
    got = sample(heads, 0 * mean, logvar, aspects, weights, TIGHT, KEY)
    assert got.ok.all() and (got.z == 0).all() and (got.steps <= 2).all()


@pytest.mark.parametrize("activation, bar", [("silu", 3.2e-4), ("relu", 3.5e-3)])
def test_default_is_as_accurate_as_the_papers_code_on_real_latents(activation, bar):
    # The bars: torchdiffeq's dopri5 at atol = rtol = 1e-3, 128 latents as one state, the paper's setting.
    rows = np.linspace(0, 4095, 24).astype(int)
    problem = [array[rows] for array in benchmark.problem(4096)]
    heads = benchmark.our_heads(activation)
    want = reference(heads, problem, {"silu": 60, "relu": 600}[activation])

    def error(**tolerances):
        got = sample(heads, *problem, Sample(**tolerances), KEY)
        assert got.ok.all() and (got.energy_after < got.energy_before).all()
        return np.sqrt(np.mean((got.z - want) ** 2, axis=1)).mean()

    default = error()
    assert default <= bar
    if activation == "silu":
        assert 10 * error(rtol=5e-5, atol=5e-5) < 2 * default < error(rtol=3e-3, atol=3e-3)


# What the solve does to z.


def test_energy_falls_for_every_latent_that_is_asked_anything(problem, tight):
    asked = (problem[2] >= 0).any(axis=1)
    assert (tight.energy_after < tight.energy_before)[asked].all()


def test_z_moves_in_the_row_space_of_the_first_layers(problem, tight):
    first = np.concatenate(list(np.asarray(make_heads().w1[...], np.float64)), axis=1)
    moved = tight.z - problem[0]
    outside = moved - moved @ first @ np.linalg.pinv(first)
    assert np.abs(moved).max() > 0.5 and np.abs(outside).max() < 1e-5


def test_nothing_asked_leaves_the_latent_as_it_is(problem):
    mean, logvar, aspects, weights = problem
    for free, none in ((0 * aspects - 1, weights), (aspects, 0 * weights)):
        got = sample(make_heads(), mean, logvar, free, none, TIGHT, KEY)
        np.testing.assert_array_equal(got.z, mean)
        assert got.ok.all() and (got.energy_before == 0).all() and (got.energy_after == 0).all()


def test_weight_zero_equals_attribute_left_out(problem):
    mean, logvar, aspects, weights = problem
    off = np.arange(aspects.size).reshape(aspects.shape) % 4 == 0
    left_out = sample(make_heads(), mean, logvar, np.where(off, -1, aspects), weights, TIGHT, KEY)
    weight_zero = sample(make_heads(), mean, logvar, aspects, np.where(off, 0, weights), TIGHT, KEY)
    for a, b in zip(left_out, weight_zero, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_aspect_that_an_attribute_lacks_pulls_as_in_the_general_path(problem):
    mean, logvar, aspects, weights = problem
    aspects = np.tile([2, 2, 1], (ROWS, 1))  # the first attribute has two aspects
    heads = make_heads()
    got, want = (sample(which, mean, logvar, aspects, weights, TIGHT, KEY) for which in (heads, plain(heads)))
    np.testing.assert_allclose(got.z, want.z, rtol=1e-4, atol=1e-4)


def test_huge_weights_and_no_time(problem):
    mean, logvar, _, weights = problem
    aspects = np.tile([1, 2, 1], (ROWS, 1))
    strong = sample(make_heads(), mean, logvar, aspects, 1e4 * weights, Sample(max_steps=4000), KEY)
    assert strong.ok.all() and (strong.energy_after < 0.1 * strong.energy_before).all()
    still = sample(make_heads(), mean, logvar, aspects, weights, Sample(beta_min=0.0, beta_max=0.0), KEY)
    np.testing.assert_array_equal(still.z, mean)
    assert still.ok.all()


# Latents and their neighbours.


def test_a_latent_does_not_depend_on_the_others(problem, tight, monkeypatch):
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = sample(make_heads(), *(array[order] for array in problem), TIGHT, KEY)
    np.testing.assert_allclose(shuffled.z, tight.z[order], rtol=1e-6, atol=1e-6)
    fewer = sample(make_heads(), *(array[4:7] for array in problem), TIGHT, KEY)
    np.testing.assert_allclose(fewer.z, tight.z[4:7], rtol=1e-6, atol=1e-6)

    monkeypatch.setattr(descent, "SLOTS", {jax.default_backend(): 4})
    sampler.solve.clear_cache()
    refilled = sample(make_heads(), *problem, TIGHT, KEY)
    sampler.solve.clear_cache()
    np.testing.assert_allclose(refilled.z, tight.z, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(refilled.energy_after, tight.energy_after, rtol=1e-6, atol=1e-6)
    assert refilled.ok.all() and len(set(refilled.steps.tolist())) > 3


def test_rows_that_fill_up_cost_no_steps(problem, tight):
    rows = np.minimum(np.arange(ROWS), 4)
    got = sampler.solve(make_heads(), *(array[rows] for array in problem), rows, KEY, TIGHT)
    assert (got.steps[5:] == 0).all() and (got.steps[:5] > 0).all()
    np.testing.assert_allclose(got.z[:5], tight.z[:5], rtol=1e-6, atol=1e-6)


def test_failure_is_data_and_disturbs_nobody(problem, tight):
    mean = problem[0].copy()
    mean[3, 0], mean[7, 1] = np.nan, np.inf
    got = sample(make_heads(), mean, *problem[1:], TIGHT, KEY)
    others = ~np.isin(np.arange(ROWS), [3, 7])
    assert (got.ok == others).all() and (got.steps[~others] == 0).all()
    np.testing.assert_array_equal(got.z[others], tight.z[others])

    # What was reached: on the way down, and different from the start.
    limit = int(np.median(tight.steps))
    late = sample(make_heads(), *problem, dataclasses.replace(TIGHT, max_steps=limit), KEY)
    np.testing.assert_array_equal(late.ok, tight.steps <= limit)
    assert (late.steps[~late.ok] == limit).all() and (late.energy_after < late.energy_before)[~late.ok].all()
    np.testing.assert_allclose(late.z[late.ok], tight.z[late.ok], rtol=1e-6, atol=1e-6)


# Cost.


def test_new_values_compile_nothing(problem, tight):
    mean, logvar, aspects, weights = problem
    before = sampler.solve._cache_size()
    got = sample(make_heads(seed=5), mean + 1, logvar, aspects[::-1], 2 * weights, TIGHT, jax.random.key(9))
    assert sampler.solve._cache_size() == before and np.abs(got.z - tight.z).max() > 0.1


def test_precision_is_highest_whatever_the_default(problem):
    with jax.default_matmul_precision("bfloat16"):
        text = str(sampler.solve.trace(make_heads(), *problem, np.arange(ROWS), KEY, TIGHT).jaxpr)
    assert text.count("dot_general[") == text.count("(Precision.HIGHEST, Precision.HIGHEST)") > 0


@pytest.mark.parametrize(
    "change", [{"solver": "heun"}, {"fixed_steps": 4}, {"drift": "energy+prior"}, {"method": "langevin"}]
)
def test_other_settings_and_other_heads_go_the_general_way(change):
    assert descent.applies(make_heads(), Sample())
    assert not descent.applies(plain(make_heads()), Sample())
    assert not descent.applies(make_heads(), Sample(**change))
