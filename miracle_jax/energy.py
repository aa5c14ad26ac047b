"""How far a latent is from a personality: the energy E(P|z) and its gradient (paper Eq. 8 and 13).

Axis letters: B batch, Z latent, A attributes, N aspects (largest number of any attribute).

`heads` is the classifiers' function z (Z,) -> logits (A, N), an NNX module or any other callable; an aspect that an
attribute does not have carries a large negative (finite) logit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.default_matmul_precision("highest")  # TF32 or bfloat16 products here wreck adaptive step control
def energy(
    heads: Callable, z: Float[Array, " Z"], aspects: Int[Array, " A"], weights: Float[Array, " A"]
) -> Float[Array, ""]:
    """E(P|z) = -sum_i weights_i log softmax(f_i(z))[aspects_i], a product of experts; low where z shows P.

    The paper's Eq. 8 lacks the minus sign. An attribute with aspect -1 or weight 0 contributes exactly nothing.
    Weights are >= 0. The result has the dtype of z, whatever the heads compute in.
    """
    surprise = -jax.nn.log_softmax(heads(z).astype(z.dtype))
    # (A, N). A mask rather than indexing: -1 needs no special case, and the gradient of a gather is a scatter.
    wanted = jnp.arange(surprise.shape[-1]) == aspects[:, None]
    return jnp.sum(weights.astype(z.dtype) * jnp.sum(jnp.where(wanted, surprise, 0), axis=-1))


energy_gradient = jax.grad(energy, argnums=1)
"""The gradient of `energy` with respect to z, (Z,)."""


@jax.jit
@jax.default_matmul_precision("highest")
def aspect_probabilities(heads: Callable, z: Float[Array, "B Z"]) -> Float[Array, "B A N"]:
    """softmax(f_i(z)): what the classifiers read in each latent; 0 for aspects that an attribute does not have."""
    return jax.nn.softmax(jax.vmap(heads)(z).astype(z.dtype))
