"""The whole model: conditional VAE over dialogue with attribute classifiers on its latent space (Figure 2).

Axis letters: B batch, S tokens, Z latent, A attributes, N aspects of the largest attribute, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from miracle_jax import decoder
from miracle_jax.config import Config
from miracle_jax.latent import Gaussian, GaussianEncoder, Heads
from miracle_jax.layers import split_key


class Outputs(NamedTuple):
    """What one forward pass gives. Everything a loss needs, by name."""

    prior: Gaussian
    posterior: Gaussian | None
    z: Float[Array, "B Z"]
    logits: Float[Array, "B S V"]
    """Scores of the token after each of `reply`'s tokens."""
    attribute_logits: Float[Array, "B A N"]


def compute_dtype(config: Config):
    """The precision that `config.dtype` stands for on this machine's default device."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.bfloat16 if has_bfloat16(jax.devices()[0]) else jnp.float32


def has_bfloat16(device) -> bool:
    """Whether a device multiplies bfloat16 in hardware: TPUs, and GPUs except NVIDIA's before Ampere (8.0)."""
    if device.platform == "cpu":
        return False
    try:
        return float(getattr(device, "compute_capability", "")) >= 8.0
    except ValueError:  # not NVIDIA's: "gfx90a", or none
        return True


class Miracle(nnx.Module):
    """Prior encoder, posterior encoder, decoder and attribute heads."""

    def __init__(self, config: Config, sizes: tuple[int, ...], rngs: nnx.Rngs):
        """sizes: number of aspects of each attribute."""
        dtype = compute_dtype(config)
        self.prior = GaussianEncoder(config.encoder, config.latent, dtype, config.remat, rngs)
        if config.loss.posterior:
            self.posterior = GaussianEncoder(config.encoder, config.latent, dtype, config.remat, rngs)
        self.decoder = decoder.make(config.decoder, config.latent.size, dtype, config.remat, rngs)
        self.heads = Heads(config.latent, sizes, rngs)

    def __call__(
        self,
        batch: dict[str, Array],
        key: Key[Array, ""] | None = None,
        noise: Float[Array, ""] | float = 0.0,
    ) -> Outputs:
        """Encodes contexts and replies, takes z from the posterior (or the prior where there is none), and scores the
        replies.

        Args:
          batch: context (B, Sc), context_length (B,), joint (B, Sj), joint_length (B,), reply (B, Sr); see pipeline.py.
          key: for dropout and for the draw of z; None means neither (z is the mean).
          noise: scale of the draw's noise: 1 for a draw, 0 for the mean.
        """
        prior_key, posterior_key, z_key, decoder_key = split_key(key, 4)
        prior = self.prior(batch["context"], batch["context_length"], prior_key)
        posterior = None
        if hasattr(self, "posterior"):
            posterior = self.posterior(batch["joint"], batch["joint_length"], posterior_key)
        source = prior if posterior is None else posterior
        z = source.mean if z_key is None else source.sample(z_key, noise)
        return Outputs(prior, posterior, z, self.decoder(batch["reply"], z, decoder_key), self.heads(z))
