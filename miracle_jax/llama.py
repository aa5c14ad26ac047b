"""The Llama family (Touvron et al. 2023): rotary positions, RMS norms, SwiGLU, shared key/value heads.

The latent's key sits at position 0, where a rotation does nothing.

Axis letters: as in decoder.py.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from miracle_jax import config
from miracle_jax.decoder import Decoder, LmHead
from miracle_jax.layers import ACTIVATIONS, Compute, attention, dense, dropout, split_key
from miracle_jax.packing import Packing

Rotation = tuple[Float[Array, "*B S K"], Float[Array, "*B S K"]]  # cosine and sine


def rms_norm(width: int, eps: float, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=eps, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def rotation(positions: Int[Array, "*B S"], size: int, theta: float) -> Rotation:
    """Angles position x theta^(-2i/K) for the pair (i, i + K/2) of a head's dimensions (Su et al. 2021)."""
    frequency = theta ** (-jnp.arange(0, size, 2) / size)
    angle = positions[..., None] * jnp.concatenate([frequency, frequency])
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B S H K"], place: Rotation) -> Float[Array, "B S H K"]:
    cosine, sine = (part[..., None, :] for part in place)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (x * cosine + jnp.concatenate([-second, first], axis=-1) * sine).astype(x.dtype)


class Block(nnx.Module):
    """One decoder layer, normalised before each sublayer."""

    def __init__(self, shape: config.Llama, how: Compute, rngs: nnx.Rngs):
        D, std, rank, dtype = shape.width, shape.init_std, shape.lora_rank, how.dtype
        self.shape, self.how, self.groups, head = shape, how, shape.kv_heads, D // shape.heads
        self.attention_norm = rms_norm(D, shape.norm_eps, dtype, rngs)
        # query | key | value on the last axis
        self.qkv = dense(D, (shape.heads + 2 * shape.kv_heads) * head, std, dtype, rngs, bias=False, rank=rank)
        self.attention_out = dense(D, D, std, dtype, rngs, bias=False, rank=rank)
        self.mlp_norm = rms_norm(D, shape.norm_eps, dtype, rngs)
        self.mlp_in = dense(D, 2 * shape.mlp, std, dtype, rngs, bias=False, rank=rank)  # gate | up on the last axis
        self.mlp_out = dense(shape.mlp, D, std, dtype, rngs, bias=False, rank=rank)

    def __call__(self, x: Float[Array, "W U D"], look, place, packing: Packing, past, key):
        rate, H, G = self.shape.dropout, self.shape.heads, self.groups
        weights_key, attention_key, mlp_key = split_key(key, 3)
        qkv = packing.apart(self.qkv(self.attention_norm(x)))
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], H + 2 * G, -1), (H, H + G), axis=2)
        q, k = rotate(q, place), rotate(k, place)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        parts, kept = look(past, k, v)
        mixed = attention(q, parts, rate, weights_key, self.how.attention)
        mixed = self.attention_out(packing.together(mixed))
        x = x + dropout(mixed, rate, packing.keys(attention_key))
        gate, up = jnp.split(self.mlp_in(self.mlp_norm(x)), 2, axis=-1)
        hidden = self.mlp_out(ACTIVATIONS[self.shape.activation](gate) * up)
        return x + dropout(hidden, rate, packing.keys(mlp_key)), kept


class Llama(Decoder):
    """Llama with the latent inside."""

    def __init__(self, shape: config.Llama, latent_size: int, how: Compute, rngs: nnx.Rngs):
        super().__init__(shape, latent_size, shape.kv_heads, lambda r: Block(shape, how, r), how, rngs)
        self.norm = rms_norm(shape.width, shape.norm_eps, how.dtype, rngs)
        if not shape.tied:
            self.head = dense(shape.width, shape.vocab_size, shape.init_std, how.dtype, rngs, bias=False)

    def place(self, positions):
        return rotation(positions, self.shape.width // self.shape.heads, self.shape.rope_theta)

    def lm_head(self):
        return super().lm_head() if self.shape.tied else LmHead(self.head.kernel[...].T)
