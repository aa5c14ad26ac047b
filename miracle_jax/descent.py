"""Eq. 20 solved where it lives, for our own classifiers: thousands of latents, each with its own steps.

Three things make it fast, and none of them changes the solution:

- Time. With s = integral of beta/2 from t to 1, Eq. 20 is plain gradient descent, dz/ds = -grad E, for s from 0 to
  S = (beta_min + beta_max) / 4. Cross-entropies flatten as 1/s, so equal steps of q = log(1 + s/s0) suit them, where
  1/s0 = |H grad E| / |grad E| at the start is the rate at which a latent's gradient changes (H the Hessian of E).
- Space. E depends on z through u = z W + b alone, W (Z, D) being the first layers of all heads side by side. So u obeys
  du/ds = g(u) G with the Gram matrix G = W^T W and g = -dE/du; with c the integral of g, z = z(T) + c W^T at the end.
  Where Z > D this is cheaper than two products with W; else z itself is integrated.
- Slots (slots.py). A fixed number of latents is under way at any time; nobody waits for the slowest, and what is under
  way stays small.

An embedded Runge-Kutta pair estimates the error of each step. A step is accepted where the error's root mean square
over the Z dimensions of z is at most atol + rtol rms(z); |error|^2 is known without z, since |c W^T|^2 = c G c^T.

Axis letters: B latents, C slots, Z latent, A attributes, F hidden, D = A F, N aspects, X = D or Z.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from miracle_jax.config import Sample
from miracle_jax.latent import Heads
from miracle_jax.layers import ACTIVATIONS, HIDDEN
from miracle_jax.slots import begin, run

PAIRS = {"bosh3": diffrax.Bosh3, "dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5}
"""Embedded pairs whose last stage is the first of the next step."""

SLOTS, MANY_SLOTS = {"cpu": 192}, 16384
"""Latents under way at a time, by platform. On a CPU few, which stay in the caches of a core (pieces.py); elsewhere
enough to fill the device."""

FIRST_STEP, SAFETY = 0.2, 0.85
"""The first step in q, and how much is taken of a step that would just do. On real latents 5 % (ReLU) and 7 % (SiLU)
fewer steps than with 0.3 and 0.9, at the same error."""
LEAST_FACTOR, MOST_FACTOR = 0.2, 10.0  # of a step's size to the last one's


def applies(heads: Callable, config: Sample) -> bool:
    """Whether `solve` can do it: our heads, the energy alone, step size control."""
    plain_ode = config.method == "ode" and config.drift == "energy" and not config.fixed_steps
    return isinstance(heads, Heads) and plain_ode and config.solver in PAIRS


class _Energy(NamedTuple):
    """E as a function of u, its weights laid out for products with whole batches."""

    w1: Float[Array, "Z D"]
    b1: Float[Array, " D"]
    w2: Float[Array, "D A*N"]
    """Block-diagonal: an attribute's logits depend on its own hidden units."""
    b2: Float[Array, "A N"]

    @classmethod
    def of(cls, heads: Heads, dtype: Any) -> "_Energy":
        w1, b1, w2, b2 = (part[...].astype(dtype) for part in (heads.w1, heads.b1, heads.w2, heads.b2))
        A, Z, F = w1.shape
        N = w2.shape[-1]
        exists = jnp.arange(N) < jnp.array(heads.sizes)[:, None]
        blocks = jnp.einsum("AFN,AK->AFKN", jnp.where(exists[:, None], w2, 0), jnp.eye(A, dtype=dtype))
        return cls(
            jnp.moveaxis(w1, 0, 1).reshape(Z, A * F), b1.reshape(-1), blocks.reshape(A * F, A * N),
            jnp.where(exists, b2, HIDDEN),
        )  # fmt: skip

    def slope(self, u: Float[Array, "C D"], wanted, weights, activation):
        """-dE/du (C, D), and E (C,). wanted: (C, A, N) one-hot, zeros where free; weights: (C, A)."""
        hidden, derivative = activation(u)
        logits = (hidden @ self.w2).reshape(wanted.shape) + self.b2
        log_p = jax.nn.log_softmax(logits)
        asked = jnp.sum(wanted, axis=-1, keepdims=True)
        towards = (wanted - asked * jnp.exp(log_p)) * weights[..., None]
        energy = -jnp.sum(weights * jnp.sum(jnp.where(wanted > 0, log_p, 0), axis=-1), axis=-1)
        return (towards.reshape(len(u), -1) @ self.w2.T) * derivative, energy


def with_derivative(name: str) -> Callable:
    """u -> (activation(u), its derivative)."""
    function = ACTIVATIONS[name]
    return lambda u: jax.jvp(function, (u,), (jnp.ones_like(u),))


class Result(NamedTuple):
    """Of each latent: z(0), steps tried, whether it arrived, and the energies of z(T) and z(0)."""

    z: Float[Array, "B Z"]
    steps: Int[Array, " B"]
    arrived: Bool[Array, " B"]
    energy_before: Float[Array, " B"]
    energy_after: Float[Array, " B"]


class _Slots(NamedTuple):
    """Latents under way, or about to start; all arrays have a leading axis C, or B."""

    arrived: Bool[Array, " C"]
    tries: Int[Array, " C"]
    q: Float[Array, " C"]
    end: Float[Array, " C"]
    """Of q; not finite where there is nothing to follow."""
    s0: Float[Array, " C"]
    step: Float[Array, " C"]
    """Size of the next step."""
    ratio: Float[Array, " C"]
    """Error over tolerance of the last step that was accepted."""
    square: Float[Array, " C"]
    """|z|^2."""
    energy: Float[Array, " C"]
    x: Float[Array, "C X"]
    """u or z."""
    c: Float[Array, "C _"]
    """c (C, D), or (C, 0) where x is z."""
    dx: Float[Array, "C X"]
    """dx/dq, and dc/dq."""
    dc: Float[Array, "C _"]
    wanted: Float[Array, "C A N"]
    weights: Float[Array, "C A"]


def solve(
    heads: Heads,
    mean: Float[Array, "B Z"],
    aspects: Int[Array, "B A"],
    weights: Float[Array, "B A"],
    total: Int[Array, ""] | int,
    config: Sample,
) -> Result:
    """Moves latents from `mean` (as float32 or float64, which the result has too) down their energies.

    Args:
      aspects, weights: as in sampler.sample.
      total: rows that are to be moved, the first of B; the others stay where they are, for nothing.
      config: `solver`, `rtol`, `atol`, `max_steps` and beta.
    """
    B, C, dtype = len(mean), min(SLOTS.get(jax.default_backend(), MANY_SLOTS), len(mean)), mean.dtype
    energy_of = _Energy.of(heads, dtype)
    Z, D = energy_of.w1.shape
    in_rows = Z > D
    gram = energy_of.w1.T @ energy_of.w1 if in_rows else None
    activation = with_derivative(heads.activation)
    solver = PAIRS[config.solver]()
    tableau, order = solver.tableau, solver.order(None)
    length, tiny = (config.beta_min + config.beta_max) / 4, jnp.finfo(dtype).tiny

    def slope(x, wanted, weights):
        """(dx/ds, dc/ds, E)."""
        g, energy = energy_of.slope(x if in_rows else x @ energy_of.w1 + energy_of.b1, wanted, weights, activation)
        return (g @ gram, g, energy) if in_rows else (g @ energy_of.w1.T, g[:, :0], energy)

    def squared(dx, dc):
        """|dz|^2 of a displacement."""
        return jnp.maximum(jnp.sum(dx * dc if in_rows else dx * dx, axis=-1), 0)

    def start() -> _Slots:
        wanted = (jnp.arange(energy_of.b2.shape[-1]) == aspects[..., None]).astype(dtype)
        x = mean @ energy_of.w1 + energy_of.b1 if in_rows else mean
        dx, dc, energy = slope(x, wanted, weights)
        change_x, change_c, _ = jax.jvp(lambda x: slope(x, wanted, weights), (x,), (dx,))[1]
        steepness, change = squared(dx, dc) ** 0.5, squared(change_x, change_c) ** 0.5
        # A gradient that hardly changes (or is 0) makes q as good as s. Without time (length 0) s0 is still above 0.
        s0 = jnp.minimum(steepness / jnp.maximum(change, tiny), 10 * length)
        s0 = jnp.maximum(jnp.where(steepness > 0, s0, length), tiny)
        end = jnp.log1p(length / s0)
        end = jnp.where(jnp.isfinite(steepness + energy), end, jnp.nan)  # else all steps would be tried for nothing
        zeros = jnp.zeros(B, dtype)
        return _Slots(
            arrived=jnp.zeros(B, bool), tries=jnp.zeros(B, jnp.int32), q=zeros, end=end, s0=s0,
            step=jnp.minimum(FIRST_STEP, end), ratio=zeros + 1, square=jnp.sum(mean * mean, axis=-1),
            energy=energy, x=x, c=jnp.zeros_like(dc), dx=s0[:, None] * dx, dc=s0[:, None] * dc, wanted=wanted,
            weights=weights,
        )  # fmt: skip

    def advance(slots: _Slots, busy):
        """One step, accepted or not, of every slot."""
        rest = slots.end - slots.q
        size = jnp.minimum(slots.step, rest)
        dxs, dcs = [slots.dx], [slots.dc]
        for row, node in zip(tableau.a_lower, tableau.c, strict=True):
            x = slots.x + size[:, None] * _combine(row, dxs)
            dx, dc, energy = slope(x, slots.wanted, slots.weights)
            speed = (slots.s0 * jnp.exp(slots.q + float(node) * size))[:, None]
            dxs.append(speed * dx)
            dcs.append(speed * dc)
        # The last stage is the new point.
        gained = size[:, None] * _combine(tableau.b_sol, dcs)
        error = size * squared(_combine(tableau.b_error, dxs), _combine(tableau.b_error, dcs)) ** 0.5
        if in_rows:
            square = slots.square + jnp.sum(gained * (2 * (slots.x - energy_of.b1) + (x - slots.x)), axis=-1)
        else:
            square = jnp.sum(x * x, axis=-1)
        ratio = error / (config.atol * Z**0.5 + config.rtol * jnp.maximum(square, 0) ** 0.5)
        accepted = busy & (ratio <= 1)
        # Proportional-integral control: what the last accepted error was damps the reaction to this one.
        bounded = jnp.maximum(ratio, 1e-10)
        factor = SAFETY * bounded ** (-0.7 / order) * slots.ratio ** (0.4 / order)
        factor = jnp.where(ratio <= 1, jnp.clip(factor, 1, MOST_FACTOR), jnp.clip(factor, LEAST_FACTOR, 1))
        factor = jnp.where(jnp.isfinite(ratio), factor, LEAST_FACTOR)
        possible = jnp.isfinite(slots.end)
        tries = slots.tries + (busy & possible)
        arrived = accepted & (slots.step >= rest)

        def choose(new, old):
            return jnp.where(accepted[:, None] if new.ndim == 2 else accepted, new, old)

        slots = slots._replace(
            arrived=slots.arrived | arrived, tries=tries, q=choose(slots.q + size, slots.q), step=size * factor,
            ratio=choose(bounded, slots.ratio), square=choose(square, slots.square),
            energy=choose(energy, slots.energy), x=choose(x, slots.x), c=choose(slots.c + gained, slots.c),
            dx=choose(dxs[-1], slots.dx), dc=choose(dcs[-1], slots.dc),
        )  # fmt: skip
        return slots, busy & possible & ~arrived & (tries < config.max_steps)

    def load(slots: _Slots, slot, row):
        return jax.tree.map(lambda old, new: old.at[slot].set(new[row], mode="drop"), slots, starts)

    def result(slots: _Slots):
        return slots.c if in_rows else slots.x, slots.tries, slots.arrived, slots.energy

    starts = start()
    queue = begin(total, C, result(starts), length=jnp.nan_to_num(starts.energy))  # the higher, the more steps
    _, queue = run(jax.tree.map(lambda x: x[:C], starts), queue, load, advance, result)
    moved, tries, arrived, energy = queue.results
    z = mean + moved @ energy_of.w1.T if in_rows else moved
    return Result(z, tries, arrived, starts.energy, energy)


def _combine(weights, terms):
    """Sum of the terms by a tableau's weights, zeros left out."""
    return sum(float(weight) * term for weight, term in zip(weights, terms, strict=True) if weight)
