"""An exponential Runge-Kutta pair for dz/ds = rate (z - centre) + N(s, z): the linear part is solved exactly.

Eq. 19 is such an equation, and `rate` = 1 - 1/sigma^2 is -10^6 where the prior's standard deviation sigma is 10^-3. A
classical solver needs steps of about 1/|rate| there, whatever its order; this one takes the steps that N asks for.

The method is Krogstad's of fourth order (J. Comput. Phys. 203, 2005: ETDRK4-B), with rate 0 the classical Runge-Kutta
method. All is written in differences of N and in the whole slope, so that terms of the size of `rate`, which nearly
cancel, are never added up. The error is estimated by half the distance to the exponential trapezoidal rule, of second
order: that sees where N jumps, as it does for ReLU heads. The usual third-order estimate, from the last stage and the
next step's first, is blind to a jump within the second half of a step, where both have it behind them.

Axis letters: Z latent.
"""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Float

SERIES = 15  # powers of x in phi_3; those left out are below 1e-16 where |x| < 1


class Exponential(diffrax.AbstractAdaptiveSolver):
    """As any solver of diffrax; the term handed to it is N."""

    rate: Float[Array, " Z"]
    centre: Float[Array, " Z"]

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar[Callable] = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 4

    def error_order(self, terms):
        return 3

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args)

    def func(self, terms, t0, y0, args):
        return self.rate * (y0 - self.centre) + terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump  # N has no jumps
        size, middle, first = t1 - t0, (t0 + t1) / 2, solver_state
        slope = self.rate * (y0 - self.centre) + first
        half1, half2, _ = phi(size / 2 * self.rate)
        phi1, phi2, phi3 = phi(size * self.rate)

        second = y0 + size / 2 * half1 * slope
        d2 = terms.vf(middle, second, args) - first
        d3 = terms.vf(middle, second + size * half2 * d2, args) - first
        exact = y0 + size * phi1 * slope
        d4 = terms.vf(t1, exact + 2 * size * phi2 * d3, args) - first
        y1 = exact + size * ((2 * phi2 - 4 * phi3) * (d2 + d3) + (4 * phi3 - phi2) * d4)
        error = size * (phi2 - 2 * phi3) * (d2 + d3 - d4)
        following = terms.vf(t1, y1, args)
        return y1, error, {"y0": y0, "y1": y1}, following, diffrax.RESULTS.successful


def phi(x: Float[Array, " Z"]) -> tuple[Float[Array, " Z"], ...]:
    """phi_1, phi_2, phi_3 with phi_n(x) = sum_j x^j / (j + n)!, to a few units in the last place at any x."""
    near = jnp.abs(x) < 1
    # Upwards by phi_n+1 = (phi_n - 1/n!) / x far from 0; near it that cancels, and downwards from a series does not.
    far = jnp.where(near, 1, x)
    up1 = jnp.expm1(far) / far
    up2 = (up1 - 1) / far
    up3 = (up2 - 0.5) / far
    close = jnp.where(near, x, 0)
    series = jnp.ones_like(x)
    for j in range(SERIES + 3, 3, -1):
        series = 1 + close / j * series
    down3 = series / 6
    down2 = close * down3 + 0.5
    down1 = close * down2 + 1
    return jnp.where(near, down1, up1), jnp.where(near, down2, up2), jnp.where(near, down3, up3)
