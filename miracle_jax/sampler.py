"""Moves latents to a personality: one compiled, vmapped solve (paper section 2.6 and appendix B.2).

Axis letters: B batch, Z latent, A attributes. Time t runs from 1 to 0, beta(t) = beta_min + t (beta_max - beta_min).
E is the energy (energy.py), N(mu, s^2) the prior of a context, and U = E, or U = E + sum (z - mu)^2 / (2 s^2) with
drift "energy+prior". The methods:

    ode, energy         dz/dt = beta/2 grad E                                                           (Eq. 20)
    ode, energy+prior   dz/dt = beta/2 (grad U - z)                                                     (Eq. 19)
    sde                 dz = beta/2 (2 grad U - z) dt + sqrt(beta) dw, with the prior in U              (Eq. 17)
    langevin            z <- z - eps_k/2 grad U + temperature sqrt(eps_k) xi,  eps_k = langevin_step langevin_decay^k

Eq. 20 of our own heads is solved by descent.py, that of other callables by diffrax. Eq. 19 is stiff where s is small;
its linear part is therefore solved exactly, by exponential.py, whatever `solver` is. It grows where s > 1. Eq. 17 has
one score for all t: without energy it ends near N(2 mu / (2 - s^2), s^2 / (2 - s^2)), which is the prior only for small
s. Without the prior it would do nothing but spread, so `drift` does not apply to it. Its fixed steps are unstable where
s^2 < beta_max / (2 steps).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from miracle_jax import descent
from miracle_jax.config import Sample
from miracle_jax.energy import energy, energy_gradient
from miracle_jax.errors import UserError
from miracle_jax.exponential import Exponential
from miracle_jax.pieces import in_pieces

SOLVERS = descent.PAIRS | {"euler": diffrax.Euler, "heun": diffrax.Heun}
SDE_STEPS = 200  # where `fixed_steps` names none


class SampleResult(NamedTuple):
    """What became of each latent."""

    z: Float[Array | np.ndarray, "B Z"]
    """z(0); where ok is False, what the solve had reached."""
    steps: Int[Array | np.ndarray, " B"]
    """Steps tried, rejected ones included."""
    ok: Bool[Array | np.ndarray, " B"]
    """False: `max_steps` did not suffice, or the latent or its energy is not finite."""
    energy_before: Float[Array | np.ndarray, " B"]
    energy_after: Float[Array | np.ndarray, " B"]


def sample(
    heads: Callable,
    mean: Array | np.ndarray,
    logvar: Array | np.ndarray,
    aspects: Array | np.ndarray,
    weights: Array | np.ndarray,
    config: Sample,
    key: Array,
    first: int = 0,
) -> SampleResult:
    """Moves B latents, each from its prior's mean or from a draw, to its personality.

    Several latents a context are repeated rows with `config.start = "draw"`. The randomness of row i depends on `key`
    and `first` + i alone, not on B or on how the batch is cut.

    Args:
        heads: classifiers z (Z,) -> logits (A, N): an NNX module, or another callable that is a pytree
            (jax.tree_util.Partial of a function and its parameters). New parameters compile nothing anew.
        mean, logvar: the prior of each latent's context, (B, Z) float.
        aspects: wanted aspect of each attribute, (B, A) int, -1 where it is not controlled.
        weights: weight lambda >= 0 of each attribute, (B, A) float; 0 is the same as not controlled.
        config: `weight` and `heads` are the caller's to apply; all other fields are applied here.
        key: a JAX random key.
        first: the number of the first row, where these are a part of more.

    Returns:
        SampleResult of NumPy arrays. Failure is data: look at `ok`.

    Raises:
        UserError: shapes that do not fit each other or the heads, an aspect that no head has, a negative weight.
    """
    _check(heads, mean, logvar, aspects, weights)
    rows = np.arange(first, first + len(mean), dtype=np.int32)
    # The compiled call reads none of these fields; a change of them must not compile it anew.
    compiled = dataclasses.replace(config, weight=1.0, heads="auto", batch_size=1)

    def run(*piece):
        return solve(heads, *piece, key, compiled)

    return in_pieces(run, (mean, logvar, aspects, weights, rows), config.batch_size, heads)


@partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")  # see energy.py
def solve(
    heads: Callable,
    mean: Float[Array, "B Z"],
    logvar: Float[Array, "B Z"],
    aspects: Int[Array, "B A"],
    weights: Float[Array, "B A"],
    rows: Int[Array, " B"],
    key: Array,
    config: Sample,
) -> SampleResult:
    """The compiled call behind `sample`: all rows at once, on the device. `rows` are the row numbers for the noise; one
    that repeats the one before it is there to fill up."""
    dtype = jnp.promote_types(mean.dtype, jnp.float32)
    mean, logvar, weights = mean.astype(dtype), logvar.astype(dtype), weights.astype(dtype)
    keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row)))(rows)
    start = mean
    if config.start == "draw":
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], dtype))(keys[:, 0])
        start = mean + jnp.exp(logvar / 2) * noise
    if descent.applies(heads, config):
        moved = descent.solve(heads, start, aspects, weights, 1 + jnp.sum(rows[1:] != rows[:-1]), config)
        ok = moved.arrived & jnp.isfinite(moved.z).all(axis=-1) & jnp.isfinite(moved.energy_after)
        return SampleResult(moved.z, moved.steps, ok, moved.energy_before, moved.energy_after)
    return jax.vmap(partial(_move, heads, config))(start, mean, logvar, aspects, weights, keys[:, 1])


def _move(heads, config, start, mean, logvar, aspects, weights, noise_key) -> SampleResult:
    """Moves one latent; all cases but the one that descent.py does faster."""
    has_prior = config.drift == "energy+prior" or config.method == "sde"

    def grad_e(z):
        return energy_gradient(heads, z, aspects, weights)

    def grad_u(z):
        return grad_e(z) + (z - mean) * jnp.exp(-logvar) if has_prior else grad_e(z)

    if config.method == "ode" and has_prior:
        # With B = integral of beta/2 from t to 1 and k = 1 - 1/s^2: dz/dB = z - grad U = k (z - mu) + mu - grad E.
        solver = Exponential(rate=-jnp.expm1(-logvar), centre=mean)
        length = (config.beta_min + config.beta_max) / 4
        z, steps, ok = _ode(lambda _, z, __: mean - grad_e(z), solver, 0.0, length, length / 50, start, config)
    elif config.method == "ode":
        solver = SOLVERS[config.solver]()
        z, steps, ok = _ode(lambda t, z, _: _beta(t, config) / 2 * grad_e(z), solver, 1.0, 0.0, None, start, config)
    elif config.method == "sde":
        steps = config.fixed_steps or SDE_STEPS
        sizes = _beta(1 - jnp.arange(steps, dtype=mean.dtype) / steps, config) / steps
        z, ok = _noisy_descent(lambda z: 2 * grad_u(z) - z, start, sizes, 1.0, noise_key), True
    else:
        steps = config.langevin_steps
        sizes = config.langevin_step * config.langevin_decay ** jnp.arange(steps, dtype=mean.dtype)
        z, ok = _noisy_descent(grad_u, start, sizes, config.langevin_temperature, noise_key), True

    before, after = (energy(heads, x, aspects, weights) for x in (start, z))
    ok &= jnp.isfinite(z).all() & jnp.isfinite(after)
    return SampleResult(z, jnp.asarray(steps), ok, before, after)


def _beta(t, config: Sample):
    return config.beta_min + t * (config.beta_max - config.beta_min)


def _ode(field: Callable, solver, begin: float, end: float, first: float | None, z: Float[Array, " Z"], config: Sample):
    """Solves dz/dx = field(x, z, None). first: size of the first step, None for diffrax's choice.

    Returns z at `end`, the steps tried, whether it arrived.
    """
    fixed = config.fixed_steps
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=jnp.asarray(begin, z.dtype),  # a Python float would make a float32 solve float64 under jax_enable_x64
        t1=jnp.asarray(end, z.dtype),
        dt0=(end - begin) / fixed if fixed else first,
        y0=z,
        stepsize_controller=diffrax.ConstantStepSize() if fixed else diffrax.PIDController(config.rtol, config.atol),
        adjoint=diffrax.ForwardMode(),  # a plain while loop: nobody differentiates through the solve
        max_steps=fixed or config.max_steps,
        throw=False,
    )
    return solution.ys[0], solution.stats["num_steps"], solution.result == diffrax.RESULTS.successful


def _noisy_descent(force: Callable, z: Float[Array, " Z"], sizes: Float[Array, " K"], temperature: float, key: Array):
    """z <- z - sizes_k/2 force(z) + temperature sqrt(sizes_k) xi for every k: Langevin, or Euler-Maruyama back in t."""

    def step(z, k_size):
        k, size = k_size
        noise = jax.random.normal(jax.random.fold_in(key, k), z.shape, z.dtype)
        return z - size / 2 * force(z) + temperature * jnp.sqrt(size) * noise, None

    return jax.lax.scan(step, z, (jnp.arange(len(sizes)), sizes))[0]


def _check(heads, mean, logvar, aspects, weights):
    """Raises UserError for arguments of `sample` that cannot be meant."""
    if mean.ndim != 2 or not len(mean) or mean.shape != logvar.shape:
        raise UserError(
            f"sample got a mean of shape {mean.shape} and a logvar of shape {logvar.shape}; both have to have the same "
            "shape (latents, latent size), with at least one latent"
        )
    latent = jax.ShapeDtypeStruct(mean.shape[1:], jnp.promote_types(mean.dtype, jnp.float32))
    attributes, most = jax.eval_shape(_logits, heads, latent).shape
    for name, array in (("aspects", aspects), ("weights", weights)):
        if array.shape != (len(mean), attributes):
            raise UserError(
                f"sample got {name} of shape {array.shape}; one row a latent and one column an attribute of the "
                f"classifiers make {(len(mean), attributes)}"
            )
    aspects, weights = np.asarray(aspects), np.asarray(weights)
    unknown = aspects[(aspects < -1) | (aspects >= most)]
    if unknown.size:
        raise UserError(
            f"aspect {unknown[0]} does not exist; the classifiers have aspects 0 to {most - 1}, and -1 leaves an "
            "attribute uncontrolled"
        )
    wrong = weights[~(np.isfinite(weights) & (weights >= 0))]
    if wrong.size:
        raise UserError(
            f"an energy weight is {wrong[0]}; it must be finite and at least 0 (0 leaves the attribute uncontrolled; "
            "for the opposite of an aspect name the other aspect)"
        )


def _logits(heads, z):
    return heads(z)
