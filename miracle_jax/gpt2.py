"""The GPT-2 family (Radford et al. 2019): learned positions, layer norms, one tied head. DialoGPT is one of them.

Axis letters: as in decoder.py.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from miracle_jax import config
from miracle_jax.decoder import Decoder, LmHead, table
from miracle_jax.layers import ACTIVATIONS, Compute, attention, dense, dropout, layer_norm, split_key
from miracle_jax.packing import Packing


class Block(nnx.Module):
    """One decoder layer, normalised before each sublayer as in GPT-2."""

    def __init__(self, shape: config.Gpt2, how: Compute, rngs: nnx.Rngs):
        D, std, rank, dtype = shape.width, shape.init_std, shape.lora_rank, how.dtype
        residual_std = std / (2 * shape.depth) ** 0.5  # GPT-2 scales the layers that write to the residual stream
        self.shape, self.how = shape, how
        self.attention_norm = layer_norm(D, shape.norm_eps, dtype, rngs)
        self.qkv = dense(D, 3 * D, std, dtype, rngs, rank=rank)  # query | key | value on the last axis
        self.attention_out = dense(D, D, residual_std, dtype, rngs, rank=rank)
        self.mlp_norm = layer_norm(D, shape.norm_eps, dtype, rngs)
        self.mlp_in = dense(D, shape.mlp, std, dtype, rngs, rank=rank)
        self.mlp_out = dense(shape.mlp, D, residual_std, dtype, rngs, rank=rank)

    def __call__(self, x: Float[Array, "W U D"], look, place, packing: Packing, past, key):
        rate = self.shape.dropout
        weights_key, attention_key, mlp_key = split_key(key, 3)
        qkv = packing.apart(self.qkv(self.attention_norm(x)))
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], 3 * self.shape.heads, -1), 3, axis=2)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        parts, kept = look(past, k, v)
        mixed = attention(q, parts, rate, weights_key, self.how.attention)
        mixed = self.attention_out(packing.together(mixed))
        x = x + dropout(mixed, rate, packing.keys(attention_key))
        hidden = self.mlp_out(ACTIVATIONS[self.shape.activation](self.mlp_in(self.mlp_norm(x))))
        return x + dropout(hidden, rate, packing.keys(mlp_key)), kept


class Gpt2(Decoder):
    """GPT-2 with the latent inside."""

    def __init__(self, shape: config.Gpt2, latent_size: int, how: Compute, rngs: nnx.Rngs):
        super().__init__(shape, latent_size, shape.heads, lambda r: Block(shape, how, r), how, rngs)
        self.positions = table(shape.max_positions, shape.width, shape.init_std / 2, how.dtype, rngs)
        self.norm = layer_norm(shape.width, shape.norm_eps, how.dtype, rngs)
        self.head_bias = nnx.Param(jnp.zeros(shape.vocab_size))  # GPT-2 has none; the released checkpoints do

    def embed(self, tokens, positions):
        return self.tokens(tokens) + self.positions(positions)

    def lm_head(self):
        return LmHead(super().lm_head().table, self.head_bias[...])
