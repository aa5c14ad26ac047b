"""The whole model: conditional VAE over dialogue with attribute classifiers on its latent space (Figure 2).

Axis letters: B batch, S tokens, Z latent, A attributes, N aspects of the largest attribute, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from miracle_jax import decoder
from miracle_jax.config import Config
from miracle_jax.decoder import LmHead
from miracle_jax.errors import UserError
from miracle_jax.latent import Gaussian, GaussianEncoder, Heads
from miracle_jax.layers import Compute, split_key
from miracle_jax.packing import Packing


class Outputs(NamedTuple):
    """What one forward pass gives. Everything a loss needs, by name; None is what the model lacks."""

    prior: Gaussian | None
    posterior: Gaussian | None
    z: Float[Array, "B Z"]
    hidden: Float[Array, "B S D"]
    """The decoder's states after each of `reply`'s tokens; (W, U, D) where the batch packs them."""
    lm_head: LmHead
    attribute_logits: Float[Array, "B A N"] | None

    @property
    def logits(self) -> Float[Array, "B S V"]:
        """Scores of the token after each of `reply`'s tokens, as `hidden` has them. The losses make them piece by piece
        instead."""
        return self.lm_head.logits(self.hidden)


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


def compute(config: Config) -> Compute:
    """How this machine computes the model. Where it has no cuDNN, a model that was trained with it does without."""
    dtype = compute_dtype(config)
    attention = config.attention if has_cudnn(jax.devices()[0]) and dtype == jnp.bfloat16 else "xla"
    return Compute(dtype, config.remat, config.scan_layers, attention, config.mesh)


def has_cudnn(device) -> bool:
    """Whether cuDNN's attention runs on a device: NVIDIA GPUs from Ampere on."""
    return device.platform == "gpu" and "cuda" in device.client.platform_version and has_bfloat16(device)


def check_device(config: Config) -> None:
    """Raises UserError where this machine cannot train as the config says."""
    if config.attention == "cudnn" and compute(config).attention != "cudnn":
        raise UserError(
            "attention cudnn needs an NVIDIA GPU from Ampere on and dtype bfloat16, but this is "
            f"{jax.devices()[0].device_kind} with {jnp.dtype(compute_dtype(config)).name}; use --attention xla"
        )


class Miracle(nnx.Module):
    """Prior encoder, posterior encoder, decoder and attribute heads."""

    def __init__(self, config: Config, sizes: tuple[int, ...], rngs: nnx.Rngs):
        """sizes: number of aspects of each attribute."""
        how = compute(config)
        self.prior = GaussianEncoder(config.encoder, config.latent, how, rngs)
        if config.loss.posterior:
            self.posterior = GaussianEncoder(config.encoder, config.latent, how, rngs)
        self.decoder = decoder.make(config.decoder, config.latent.size, how, rngs)
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
          batch: context (B, Sc), context_length (B,), joint (B, Sj), joint_length (B,), reply (B, Sr), and where the
            decoder sees the context prompt (B, Sp) and prompt_length (B,); see pipeline.py. Fields with tokens (W, U)
            are packed. Texts that frozen encoders have read already are context_mean (B, D) and joint_mean (B, D)
            instead.
          key: for dropout and for the draw of z; None means neither (z is the mean).
          noise: scale of the draw's noise: 1 for a draw, 0 for the mean.
        """
        prior_key, posterior_key, z_key, decoder_key = split_key(key, 4)

        def encode(encoder, name, key):
            if f"{name}_mean" in batch:
                return encoder.of_mean(batch[f"{name}_mean"])
            return encoder(batch[name], batch[f"{name}_length"], key, Packing.of(batch, name))

        prior = encode(self.prior, "context", prior_key)
        posterior = encode(self.posterior, "joint", posterior_key) if hasattr(self, "posterior") else None
        source = prior if posterior is None else posterior
        z = source.mean if z_key is None else source.sample(z_key, noise)
        hidden = self.decoder.states(
            batch["reply"], z, decoder_key, batch.get("prompt"), batch.get("prompt_length"), Packing.of(batch, "reply")
        )
        return Outputs(prior, posterior, z, hidden, self.decoder.lm_head(), self.heads(z))


def split(config: Config, params: dict) -> tuple[dict, dict]:
    """Parameters (nested dict of a Miracle) -> those that are trained, and those that stay as they were pretrained."""
    flat = flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if _is_trained(config, path)}
    return unflatten_dict(trained), unflatten_dict({path: flat[path] for path in flat.keys() - trained.keys()})


def _is_trained(config: Config, path: tuple[str, ...]) -> bool:
    if path[0] in ("prior", "posterior") and path[1] == "bert":
        return not config.encoder.frozen or path[2] == "pooler"
    if path[0] == "decoder" and config.decoder.frozen:
        return path[1] in ("latent_embed", "latent_proj") or path[-1] in ("adapter_in", "adapter_out")
    return True


def join(trained: dict, frozen: dict) -> dict:
    """The reverse of `split`."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen)) if frozen else trained
