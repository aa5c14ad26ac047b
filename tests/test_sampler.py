"""The sampler: closed forms, an independent reference, order of convergence, invariances, and distributions.

Two kinds of heads. SiluHeads is the shape that is trained: a smooth, non-linear energy. QuadraticHeads has logits whose
-log softmax is a paraboloid, so that every method has a closed form through the public function.
"""

import dataclasses
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from miracle_jax import pieces, sampler
from miracle_jax.config import Latent, Sample
from miracle_jax.energy import energy_gradient
from miracle_jax.errors import UserError
from miracle_jax.exponential import Exponential, phi
from miracle_jax.latent import Heads
from miracle_jax.sampler import sample

ROWS, LATENT, ATTRIBUTES = 8, 6, 3
INTEGRAL = 5.025  # of beta(t)/2 over t in [0, 1], with the default beta
KEY = jax.random.key(0)
TIGHT = Sample(rtol=1e-6, atol=1e-6)
NOISY = Sample(method="langevin", start="draw", langevin_steps=3, langevin_step=0.1)
TRACES = []


class SiluHeads(nnx.Module):
    """z (Z,) -> logits (A, 2)."""

    def __init__(self, seed=0, dtype=jnp.float32, hidden=8):
        rng = np.random.default_rng(seed)
        shapes = (ATTRIBUTES, LATENT, hidden), (ATTRIBUTES, hidden), (ATTRIBUTES, hidden, 2), (ATTRIBUTES, 2)
        w1, b1, w2, b2 = (rng.normal(size=shape) / 2 for shape in shapes)
        self.w1, self.b1, self.w2, self.b2 = (nnx.Param(jnp.asarray(value, dtype)) for value in (w1, b1, w2, b2))

    def __call__(self, z):
        TRACES.append(z.shape)
        hidden = jax.nn.silu(jnp.einsum("z,azf->af", z, self.w1[...]) + self.b1[...])
        return jnp.einsum("af,afn->an", hidden, self.w2[...]) + self.b2[...]


def quadratic_heads(curvature, centre):
    """Heads with E_a = 1 + sum_i curvature[a, i] (z_i - centre[a, i])^2 / 2 for aspect 0 of attribute a."""
    return Partial(quadratic_logits, jnp.asarray(curvature, jnp.float32), jnp.asarray(centre, jnp.float32))


def quadratic_logits(curvature, centre, z):
    q = 1 + jnp.sum(curvature * (z - centre) ** 2, axis=-1) / 2
    return jnp.stack([jnp.zeros_like(q), q + jnp.log1p(-jnp.exp(-q))], axis=-1)  # log(1 + exp(difference)) = q


@pytest.fixture(scope="module")
def problem():
    """(mean, logvar, aspects, weights) for SiluHeads: every row another personality and other weights."""
    rng = np.random.default_rng(1)
    mean = rng.normal(size=(ROWS, LATENT)).astype(np.float32)
    logvar = rng.uniform(-1, 0, size=mean.shape).astype(np.float32)
    aspects = rng.integers(0, 2, (ROWS, ATTRIBUTES))
    return mean, logvar, aspects, rng.uniform(0.5, 2, aspects.shape).astype(np.float32)


@pytest.fixture(scope="module")
def tight(problem):
    return sample(SiluHeads(), *problem, TIGHT, KEY)


def reference(problem, beta_max=20.0):
    """z(0) of SiluHeads in float64 without JAX: the gradient by hand, classical Runge-Kutta with 1,000 steps."""
    mean, _, aspects, weights = (np.asarray(array, np.float64) for array in problem)
    heads = SiluHeads()
    w1, b1, w2, b2 = (np.asarray(p[...], np.float64) for p in (heads.w1, heads.b1, heads.w2, heads.b2))
    wanted = np.eye(2)[aspects.astype(int)]

    def gradient(z):
        before = np.einsum("bz,azf->baf", z, w1) + b1
        gate = 1 / (1 + np.exp(-before))
        logits = np.einsum("baf,afn->ban", before * gate, w2) + b2
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        hidden = np.einsum("ban,afn->baf", weights[..., None] * (p - wanted), w2)
        return np.einsum("baf,azf->bz", hidden * (gate + before * gate * (1 - gate)), w1)

    z, n = mean, 1000
    h = -1 / n

    def slope(t, z):
        return (0.1 + t * (beta_max - 0.1)) / 2 * gradient(z)

    for t in 1 + h * np.arange(n):
        k1 = slope(t, z)
        k2 = slope(t + h / 2, z + h / 2 * k1)
        k3 = slope(t + h / 2, z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(t + h, z + h * k3))
    return z


# The adaptive solve.


def test_ode_against_an_independent_float64_reference(tight, problem):
    want = reference(problem)
    assert np.abs(want - problem[0]).max() > 0.5  # the latents do move
    assert tight.ok.all()
    np.testing.assert_allclose(tight.z, want, rtol=1e-5, atol=1e-5)


def test_energy_falls_for_every_latent(tight):
    assert (tight.energy_after < tight.energy_before).all()


def test_each_latent_has_its_own_step_control(tight):
    assert len(set(tight.steps.tolist())) > 1


def test_vmapped_equals_looped(tight, problem):
    looped = sample(SiluHeads(), *problem, dataclasses.replace(TIGHT, batch_size=1), KEY)
    np.testing.assert_allclose(looped.z, tight.z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(looped.energy_after, tight.energy_after, rtol=1e-5, atol=1e-5)


def test_ode_against_the_closed_form_of_a_quadratic_energy():
    # A product of experts: two paraboloids, weighted, are one with the summed curvature.
    rng = np.random.default_rng(2)
    curvature, centre = rng.uniform(0.02, 0.3, (2, LATENT)), rng.normal(size=(2, LATENT))
    mean, weights = rng.normal(size=(ROWS, LATENT)), rng.uniform(0.5, 2, (ROWS, 2))
    weights[0, 1] = 0
    got = sample(quadratic_heads(curvature, centre), mean, 0 * mean, np.zeros((ROWS, 2), int), weights, TIGHT, KEY)
    rate = weights @ curvature
    middle = weights @ (curvature * centre) / rate
    np.testing.assert_allclose(got.z, middle + np.exp(-rate * INTEGRAL) * (mean - middle), rtol=1e-5, atol=1e-5)
    experts = 1 + (curvature * (mean[:, None] - centre) ** 2).sum(-1) / 2
    np.testing.assert_allclose(got.energy_before, (weights * experts).sum(1), rtol=1e-5)


def test_ode_with_the_prior_against_its_closed_form():
    # z(0) = e^(kB) z(1) + (e^(kB) - 1)/k m, alone and with a quadratic energy, which only shifts k and m.
    rng = np.random.default_rng(3)
    variance = np.array([0.25, 0.5, 0.9999, 1.0, 1.0001, 1.6])  # k = 0 at 1
    curvature, centre = rng.uniform(0.1, 0.3, (1, LATENT)), rng.normal(size=(1, LATENT))
    mean, weights = rng.normal(size=(ROWS, LATENT)), np.linspace(0.5, 2, ROWS)[:, None]
    weights[:3] = 0
    logvar = np.tile(np.log(variance), (ROWS, 1))
    config = dataclasses.replace(TIGHT, drift="energy+prior")
    got = sample(quadratic_heads(curvature, centre), mean, logvar, np.zeros((ROWS, 1), int), weights, config, KEY)
    k = 1 - 1 / variance - weights * curvature
    m = mean / variance + weights * curvature * centre
    assert (k[:3, 3] == 0).all() and got.ok.all()
    growth = np.where(k == 0, INTEGRAL, np.expm1(k * INTEGRAL) / np.where(k == 0, 1, k))
    np.testing.assert_allclose(got.z, np.exp(k * INTEGRAL) * mean + growth * m, rtol=2e-5, atol=2e-5)


def test_weight_zero_equals_attribute_left_out(problem):
    mean, logvar, aspects, weights = problem
    off = np.arange(ROWS * ATTRIBUTES).reshape(aspects.shape) % 4 == 0
    left_out = sample(SiluHeads(), mean, logvar, np.where(off, -1, aspects), weights, TIGHT, KEY)
    weight_zero = sample(SiluHeads(), mean, logvar, aspects, np.where(off, 0, weights), TIGHT, KEY)
    for a, b in zip(left_out, weight_zero, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_controlled_leaves_the_latent_as_it_is(problem):
    mean, logvar, aspects, weights = problem
    got = sample(SiluHeads(), mean, logvar, 0 * aspects - 1, weights, TIGHT, KEY)
    np.testing.assert_array_equal(got.z, mean)
    assert got.ok.all() and (got.energy_before == 0).all() and (got.energy_after == 0).all()


def test_one_compiled_call_serves_new_values(problem, tight):
    mean, logvar, aspects, weights = problem
    before = len(TRACES)
    config = dataclasses.replace(TIGHT, weight=3.0, batch_size=64, heads="joint")
    sample(SiluHeads(seed=5), mean + 1, logvar - 1, 1 - aspects, 2 * weights, config, jax.random.key(9))
    assert len(TRACES) == before


def test_precision_is_highest_whatever_the_default(problem):
    with jax.default_matmul_precision("bfloat16"):
        text = str(sampler.solve.trace(SiluHeads(), *problem, np.arange(ROWS), KEY, TIGHT).jaxpr)
    assert text.count("dot_general[") == text.count("(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_exhausted_steps_are_data(problem, tight):
    config = dataclasses.replace(TIGHT, max_steps=2)
    got = sample(SiluHeads(), *problem, config, KEY)
    assert not got.ok.any() and (got.steps == 2).all() and np.isfinite(got.z).all()
    assert (got.energy_after <= got.energy_before).all()  # what was reached, not a placeholder


def test_a_latent_that_is_not_finite_fails_alone(problem, tight):
    mean = problem[0].copy()
    mean[3, 0] = np.nan
    got = sample(SiluHeads(), mean, *problem[1:], TIGHT, KEY)
    others = np.arange(ROWS) != 3
    assert (got.ok == others).all()
    np.testing.assert_array_equal(got.z[others], tight.z[others])


# Fixed steps.


@pytest.fixture(scope="module")
def fixed_steps_error(problem):
    """(solver, steps) -> largest error of z(0) in float64, with a beta that 8 steps resolve."""
    want = reference(problem, beta_max=2.0)

    def error(solver, steps):
        with jax.enable_x64(True):
            # max_steps does not apply to fixed steps.
            config = Sample(solver=solver, fixed_steps=steps, max_steps=1, beta_max=2.0)
            got = sample(SiluHeads(dtype=jnp.float64), problem[0].astype(np.float64), *problem[1:], config, KEY)
        assert got.z.dtype == np.float64 and got.ok.all() and (got.steps == steps).all()
        return np.abs(got.z - want).max()

    return error


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_fixed_steps_converge_with_the_order_of_the_solver(solver, order, fixed_steps_error):
    assert abs(np.log2(fixed_steps_error(solver, 8) / fixed_steps_error(solver, 16)) - order) < 0.1


def test_fixed_steps_of_a_fifth_order_solver(fixed_steps_error):
    assert fixed_steps_error("tsit5", 8) < 1e-6  # Heun: 4e-3, Euler: 1e-1


# Eq. 19, by the exponential solver.

PRIOR = dataclasses.replace(TIGHT, drift="energy+prior")


def test_phi_functions():
    # phi_n(x) = integral over [0, 1] of exp((1 - t) x) t^(n-1) / (n-1)!
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t = (nodes + 1) / 2
    x = np.concatenate([-np.geomspace(1e-6, 30, 60), [-1.0, 0.0, 1.0], np.geomspace(1e-6, 5, 60)]).astype(np.float32)
    far = -np.geomspace(1e3, 1e8, 6).astype(np.float32)
    for n, (near, beyond) in enumerate(zip(phi(jnp.asarray(x)), phi(jnp.asarray(far)), strict=True), start=1):
        kernel = np.exp((1 - t) * x[:, None].astype(float)) * t ** (n - 1) / math.factorial(n - 1)
        np.testing.assert_allclose(near, kernel @ weights / 2, rtol=1e-6)
        np.testing.assert_allclose(beyond, -1 / far / math.factorial(n - 1), rtol=1e-2)


def test_the_prior_alone_is_solved_exactly_whatever_its_width(problem):
    mean, _, aspects, weights = problem
    logvar = np.float32([-13.8, -6, -2, -0.01, 0, 0.01, 1, 4])[:, None] + 0 * mean
    config = dataclasses.replace(PRIOR, start="draw", rtol=1e-2, atol=1e-2)
    got = sample(SiluHeads(), mean, logvar, aspects, 0 * weights, config, KEY)
    unmoved = dataclasses.replace(config, beta_min=0.0, beta_max=0.0)
    start = sample(SiluHeads(), mean, logvar, aspects, 0 * weights, unmoved, KEY).z.astype(float)
    assert (np.abs(start - mean).max(axis=1) > 5e-4).all()
    k = -np.expm1(-logvar.astype(float))
    growth = np.where(k == 0, INTEGRAL, np.expm1(k * INTEGRAL) / np.where(k == 0, 1, k))
    want = mean + np.exp(k * INTEGRAL) * (start - mean) + growth * mean
    assert np.abs((got.z - want) / np.abs(want).max(axis=1, keepdims=True)).max() < 1e-5
    assert got.ok.all() and (got.steps <= 4).all()


@pytest.mark.parametrize("change", [{}, {"fixed_steps": 4}])
def test_a_narrow_prior_takes_a_handful_of_steps(problem, change):
    mean, _, aspects, weights = problem
    config, logvar = dataclasses.replace(PRIOR, **change), np.full_like(mean, -13.8)
    got = sample(SiluHeads(), mean, logvar, aspects, weights, config, KEY)
    assert got.ok.all() and (got.steps <= 5).all()
    # The balance of k (z - mu) + mu - grad E = 0.
    slope = jax.vmap(energy_gradient, (None, 0, 0, 0))(SiluHeads(), got.z, aspects, weights)
    np.testing.assert_allclose(got.z - mean, (mean - slope) * np.exp(-13.8), atol=4e-7)


@pytest.fixture(scope="module")
def mild(problem):
    """Float64 heads, problem and solution of Eq. 19 by the general solver, with a prior that is not stiff."""
    with jax.enable_x64(True):
        heads, (mean, _, aspects, weights) = SiluHeads(dtype=jnp.float64), problem
        mean, logvar = mean.astype(float), np.random.default_rng(4).uniform(-1.5, 0.3, mean.shape)

        def move(mean, logvar, aspects, weights):
            def slope(t, z, _):
                force = energy_gradient(heads, z, aspects, weights) + (z - mean) * jnp.exp(-logvar) - z
                return (0.1 + 19.9 * t) / 2 * force

            control = diffrax.PIDController(1e-10, 1e-10)
            return diffrax.diffeqsolve(
                diffrax.ODETerm(slope), diffrax.Dopri5(), 1.0, 0.0, None, mean, stepsize_controller=control
            ).ys[0]  # fmt: skip

        problem = mean, logvar, aspects, weights.astype(float)
        return heads, problem, np.asarray(jax.jit(jax.vmap(move))(*problem))


def test_eq_19_against_the_general_solver(mild):
    heads, problem, want = mild
    with jax.enable_x64(True):
        errors = [np.abs(sample(heads, *problem, dataclasses.replace(PRIOR, rtol=t, atol=t), KEY).z - want).max()
                  for t in (1e-4, 1e-7)]  # fmt: skip
    assert np.abs(want - problem[0]).max() > 0.5 and errors[1] < 1e-5 < errors[0] < 1e-2
    single = sample(SiluHeads(), *(array.astype(np.float32) for array in problem[:2]), *problem[2:], PRIOR, KEY)
    np.testing.assert_allclose(single.z, want, rtol=1e-4, atol=1e-4)


def test_eq_19_converges_with_fourth_order(mild):
    heads, problem, want = mild
    with jax.enable_x64(True):
        coarse, fine = (sample(heads, *problem, dataclasses.replace(PRIOR, fixed_steps=n), KEY) for n in (40, 80))
    assert coarse.ok.all() and (coarse.steps == 40).all()
    assert abs(np.log2(np.abs(coarse.z - want).max() / np.abs(fine.z - want).max()) - 4) < 0.3


def test_without_a_linear_part_it_is_the_classical_runge_kutta_method():
    with jax.enable_x64(True):
        y, h = jnp.array([0.3, -0.7]), 0.4
        field = diffrax.ODETerm(lambda t, y, _: jnp.sin(t + y[::-1]) * y)
        solver = Exponential(jnp.zeros(2), jnp.ones(2))
        start = solver.init(field, 0.0, h, y, None)
        got, error, _, following, _ = solver.step(field, 0.0, h, y, None, start, False)
        k1 = field.vf(0, y, None)
        k2 = field.vf(h / 2, y + h / 2 * k1, None)
        k3 = field.vf(h / 2, y + h / 2 * k2, None)
        k4 = field.vf(h, y + h * k3, None)
        np.testing.assert_allclose(got, y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), rtol=1e-13)
        np.testing.assert_allclose(following, field.vf(h, got, None), rtol=1e-13)
        trapezoidal = y + h / 2 * (k1 + k4)
        np.testing.assert_allclose(error, (got - trapezoidal) / 2, rtol=1e-9)
        # A jump in the second half of a step does not go unseen.
        jump = diffrax.ODETerm(lambda t, y, _: jnp.where(t > 0.7 * h, y, -y))
        _, error, *_ = solver.step(jump, 0.0, h, y, None, -y, False)
        assert (jnp.abs(error) > 0.1 * h * jnp.abs(y)).all()


# Langevin dynamics and the reverse SDE, on Gaussians: 4 latent dimensions, many chains. All updates are linear,
# z <- A_k z + C_k + S_k xi, so mean and variance after every step are known exactly, discretisation included.

CHAINS = 8192
MU, VARIANCE = np.array([1.0, -0.5, 0.0, 2.0]), np.array([0.2, 0.4, 0.8, 1.2])
CURVATURE, CENTRE, WEIGHT = np.array([2.0, 1.0, 0.5, 0.0]), np.array([-1.0, 1.0, 2.0, 0.0]), 1.5


def run_chains(config, weight=WEIGHT, variance=VARIANCE):
    ones = np.ones((CHAINS, 1))
    heads = quadratic_heads(CURVATURE[None], CENTRE[None])
    return sample(heads, ones * MU, ones * np.log(variance), np.zeros((CHAINS, 1), int), weight * ones, config, KEY)


def expect_moments(z, mean, variance):
    """Within four standard errors."""
    np.testing.assert_array_less(np.abs(z.mean(0) - mean), 4 * np.sqrt(variance / CHAINS))
    np.testing.assert_array_less(np.abs(z.var(0) / variance - 1), 4 * np.sqrt(2 / CHAINS))


def test_langevin_reaches_the_stationary_gaussian():
    # Constant steps: a chain with U's precision p settles at U's minimum with the variance 1/p / (1 - eps p/4).
    eps, temperature = 0.3, 0.7
    config = Sample(method="langevin", drift="energy+prior", langevin_step=eps, langevin_decay=1.0,
                    langevin_temperature=temperature)  # fmt: skip
    got = run_chains(config)
    precision = 1 / VARIANCE + WEIGHT * CURVATURE
    minimum = (MU / VARIANCE + WEIGHT * CURVATURE * CENTRE) / precision
    expect_moments(got.z, minimum, temperature**2 / precision / (1 - eps * precision / 4))
    assert got.ok.all() and (got.steps == 200).all()


def test_langevin_with_the_decaying_schedule():
    # The default steps sum to 0.1 only, so the chain stops far from U's Gaussian: follow its exact moments instead.
    mean, variance = MU, VARIANCE  # draws from the prior
    for eps in 0.01 * 0.9 ** np.arange(200):
        mean = mean - eps / 2 * WEIGHT * CURVATURE * (mean - CENTRE)
        variance = (1 - eps / 2 * WEIGHT * CURVATURE) ** 2 * variance + eps
    got = run_chains(Sample(method="langevin", start="draw"))
    assert got.ok.all()
    expect_moments(got.z, mean, variance)


def sde_moments(weight, steps=200):
    mean, variance = MU, np.zeros(4)
    for k in range(steps):
        size = (0.1 + (1 - k / steps) * 19.9) / steps
        rate = 2 / VARIANCE + 2 * weight * CURVATURE - 1
        mean = mean - size / 2 * (rate * mean - 2 * MU / VARIANCE - 2 * weight * CURVATURE * CENTRE)
        variance = (1 - size / 2 * rate) ** 2 * variance + size
    return mean, variance


def test_reverse_sde_on_gaussians():
    got = run_chains(Sample(method="sde"))
    expect_moments(got.z, *sde_moments(WEIGHT))
    assert got.ok.all() and (got.steps == 200).all()
    # Without energy: the documented end of Eq. 17 (not the prior), which the moments reach but for discretisation.
    mean, variance = sde_moments(0.0)
    expect_moments(run_chains(Sample(method="sde"), weight=0.0).z, mean, variance)
    forgotten = VARIANCE < 0.5
    np.testing.assert_allclose(mean[forgotten], (2 * MU / (2 - VARIANCE))[forgotten], rtol=1e-3)
    np.testing.assert_allclose(variance[forgotten], (VARIANCE / (2 - VARIANCE))[forgotten], rtol=0.1)


def test_reverse_sde_that_overflows_is_data():
    narrow = np.where(np.arange(CHAINS) == 5, 0.01, 1)[:, None] * VARIANCE
    got = run_chains(Sample(method="sde"), variance=narrow)
    assert (got.ok == (np.arange(CHAINS) != 5)).all()


# Randomness and cutting.


def test_draws_are_independent_of_batch_size_and_cutting(problem):
    four = [array[:4] for array in problem]
    whole = sample(SiluHeads(), *four, NOISY, KEY)
    fewer = sample(SiluHeads(), *(array[:3] for array in problem), NOISY, KEY)
    cut = sample(SiluHeads(), *four, dataclasses.replace(NOISY, batch_size=2), KEY)
    np.testing.assert_allclose(fewer.z, whole.z[:3], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(cut.z, whole.z, rtol=1e-6, atol=1e-6)


def test_one_key_reproduces_a_run_and_rows_draw_independently(problem):
    same = [np.repeat(array[:1], 4, axis=0) for array in problem]
    first, again = (sample(SiluHeads(), *same, NOISY, jax.random.key(7)) for _ in range(2))
    other = sample(SiluHeads(), *same, NOISY, jax.random.key(8))
    np.testing.assert_array_equal(first.z, again.z)
    assert (np.abs(first.z - other.z) > 1e-4).all()
    assert (np.abs(first.z[1:] - first.z[:-1]) > 1e-4).all()


@pytest.mark.parametrize("ours", [False, True], ids=["diffrax", "descent"])
def test_cores_that_share_latents_change_none(problem, monkeypatch, ours):
    heads = Heads(Latent(size=LATENT, hidden=8), (2, 2, 2), nnx.Rngs(0)) if ours else SiluHeads()
    whole, sizes, solve = sample(heads, *problem, TIGHT, KEY), [], sampler.solve

    def spy(heads, mean, *rest):
        sizes.append(len(mean))
        return solve(heads, mean, *rest)

    monkeypatch.setattr(sampler, "solve", spy)
    monkeypatch.setattr(pieces, "usable_cores", lambda: 2)
    monkeypatch.setattr(pieces, "LEAST_ROWS", 1)
    shared = sample(heads, *problem, TIGHT, KEY)
    assert sizes == [ROWS // 2] * 2
    for a, b in zip(shared, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_batch_that_does_not_fit_memory_is_cut(problem, monkeypatch, caplog):
    four = [array[:4] for array in problem]
    whole, solve = sample(SiluHeads(), *four, NOISY, KEY), sampler.solve

    def small_memory(heads, mean, *rest):
        if len(mean) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return solve(heads, mean, *rest)

    monkeypatch.setattr(sampler, "solve", small_memory)
    got = sample(SiluHeads(), *four, NOISY, KEY)
    np.testing.assert_allclose(got.z, whole.z, rtol=1e-6, atol=1e-6)
    assert isinstance(got, sampler.SampleResult) and "out of memory with 4 rows" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logvar": np.zeros((ROWS, 2), np.float32)}, r"\(8, 6\) and a logvar of shape \(8, 2\)"),
        ({"aspects": np.zeros((ROWS, 4), int)}, r"aspects of shape \(8, 4\).*make \(8, 3\)"),
        ({"weights": np.ones((2, 3))}, r"weights of shape \(2, 3\).*make \(8, 3\)"),
        ({"aspects": np.full((ROWS, 3), 2)}, "aspect 2 does not exist.*aspects 0 to 1"),
        ({"aspects": np.full((ROWS, 3), -2)}, "aspect -2 does not exist"),
        ({"weights": np.full((ROWS, 3), -0.5)}, "weight is -0.5; it must be finite and at least 0"),
        ({"weights": np.full((ROWS, 3), np.nan)}, "weight is nan; it must be finite"),
        ({"mean": np.zeros((0, LATENT)), "logvar": np.zeros((0, LATENT))}, "at least one latent"),
    ],
)
def test_arguments_that_cannot_be_meant(problem, change, message):
    arguments = dict(zip(("mean", "logvar", "aspects", "weights"), problem, strict=True)) | change
    with pytest.raises(UserError, match=message):
        sample(SiluHeads(), *arguments.values(), TIGHT, KEY)
