"""The latent space: diagonal Gaussians, the encoders that produce them, and the attribute classifiers.

Axis letters: B batch, S tokens, D model, Z latent, A attributes, F hidden, N aspects of the largest attribute.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from miracle_jax import config
from miracle_jax.bert import Bert
from miracle_jax.layers import ACTIVATIONS, HIDDEN, Compute, dense
from miracle_jax.packing import Packing


class Gaussian(NamedTuple):
    """N(mean, exp(logvar)) with independent dimensions."""

    mean: Float[Array, "B Z"]
    logvar: Float[Array, "B Z"]

    def sample(self, key: Key[Array, ""], scale: Float[Array, ""] | float = 1.0) -> Float[Array, "B Z"]:
        """Reparameterised draw (Eq. 2). `scale` multiplies the noise: 0 gives the mean."""
        noise = jax.random.normal(key, self.mean.shape)
        return self.mean + scale * jnp.exp(0.5 * self.logvar) * noise


def kl(q: Gaussian, p: Gaussian) -> Float[Array, "B Z"]:
    """KL(q || p) of each dimension, in nats."""
    return 0.5 * (
        p.logvar - q.logvar - 1.0 + jnp.exp(q.logvar - p.logvar) + jnp.square(q.mean - p.mean) * jnp.exp(-p.logvar)
    )


class GaussianEncoder(nnx.Module):
    """A text to a Gaussian over z: BERT, mean pooling, pooler, one linear layer without bias (Eq. 1)."""

    def __init__(self, shape: config.Bert, latent: config.Latent, how: Compute, rngs: nnx.Rngs):
        self.bert = Bert(shape, how, rngs)
        self.to_gaussian = dense(shape.width, 2 * latent.size, shape.init_std, jnp.float32, rngs, bias=False)
        self.logvar_shift = latent.logvar_shift

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        length: Int[Array, " B"],
        key: Key[Array, ""] | None = None,
        packing: Packing | None = None,
    ) -> Gaussian:
        return self.of_mean(self.bert.mean(tokens, length, key, packing))

    def of_mean(self, mean: Float[Array, "B D"]) -> Gaussian:
        """What follows the encoder: `mean` is its last layer's mean over a text's tokens."""
        mean, logvar = jnp.split(self.to_gaussian(self.bert.pool(mean)), 2, axis=-1)
        return Gaussian(mean, logvar + self.logvar_shift)


class Heads(nnx.Module):
    """One two-layer classifier f_i per attribute, z to logits over its aspects (section 2.5, Eq. 4).

    The attributes' weights are stacked, so all classifiers run as one; attributes with fewer than N aspects have the
    missing logits masked.
    """

    def __init__(self, shape: config.Latent, sizes: tuple[int, ...], rngs: nnx.Rngs):
        A, N, Z, F = len(sizes), max(sizes), shape.size, shape.hidden

        def uniform(dims, fan_in):  # the initialisation of torch.nn.Linear, on which the released heads were trained
            bound = fan_in**-0.5
            return nnx.Param(jax.random.uniform(rngs.params(), dims, minval=-bound, maxval=bound))

        self.sizes = tuple(sizes)
        self.activation = shape.activation
        self.w1, self.b1 = uniform((A, Z, F), Z), uniform((A, F), Z)
        self.w2, self.b2 = uniform((A, F, N), F), uniform((A, N), F)

    def __call__(self, z: Float[Array, "*B Z"]) -> Float[Array, "*B A N"]:
        """Logits, float32; those of aspects that an attribute lacks are about -1e30."""
        hidden = ACTIVATIONS[self.activation](jnp.einsum("...Z,AZF->...AF", z, self.w1[...]) + self.b1[...])
        logits = jnp.einsum("...AF,AFN->...AN", hidden, self.w2[...]) + self.b2[...]
        exists = np.arange(max(self.sizes)) < np.array(self.sizes)[:, None]
        return jnp.where(exists, logits, HIDDEN)
