"""The BERT encoder (Devlin et al. 2019) with mean pooling.

Axis letters: B batch, S tokens, D model, H heads, K head size; W, U: as in packing.py.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from miracle_jax import config
from miracle_jax.layers import ACTIVATIONS, Compute, Stack, attention, dense, dropout, layer_norm, split_key
from miracle_jax.packing import Packing


class Block(nnx.Module):
    """One encoder layer, normalised after each residual sum as in BERT."""

    def __init__(self, shape: config.Bert, how: Compute, rngs: nnx.Rngs):
        D, std, dtype = shape.width, shape.init_std, how.dtype
        self.shape, self.how = shape, how
        self.qkv = dense(D, 3 * D, std, dtype, rngs)  # query | key | value on the last axis
        self.attention_out = dense(D, D, std, dtype, rngs)
        self.attention_norm = layer_norm(D, shape.norm_eps, dtype, rngs)
        self.mlp_in = dense(D, shape.mlp, std, dtype, rngs)
        self.mlp_out = dense(shape.mlp, D, std, dtype, rngs)
        self.mlp_norm = layer_norm(D, shape.norm_eps, dtype, rngs)

    def __call__(self, x: Float[Array, "W U D"], visible, packing: Packing, _, key):
        rate = self.shape.dropout
        weights_key, attention_key, mlp_key = split_key(key, 3)
        qkv = packing.apart(self.qkv(x))
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], 3 * self.shape.heads, -1), 3, axis=2)
        mixed = attention(q, [(k.swapaxes(1, 2), v.swapaxes(1, 2), visible)], rate, weights_key, self.how.attention)
        mixed = self.attention_out(packing.together(mixed))
        x = self.attention_norm(x + dropout(mixed, rate, packing.keys(attention_key)))
        hidden = self.mlp_out(ACTIVATIONS[self.shape.activation](self.mlp_in(x)))
        return self.mlp_norm(x + dropout(hidden, rate, packing.keys(mlp_key))), None


class Bert(nnx.Module):
    """Token ids to one vector per text."""

    def __init__(self, shape: config.Bert, how: Compute, rngs: nnx.Rngs):
        D, std, dtype = shape.width, shape.init_std, how.dtype

        def table(rows):
            init = nnx.initializers.normal(std)
            return nnx.Embed(rows, D, embedding_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)

        self.shape = shape
        self.tokens = table(shape.vocab_size)
        self.positions = table(shape.max_positions)
        self.segments = table(shape.segments)  # all our texts are segment 0
        self.norm = layer_norm(D, shape.norm_eps, dtype, rngs)
        self.layers = Stack(lambda r: Block(shape, how, r), shape.depth, how, rngs)
        self.pooler = dense(D, D, std, dtype, rngs)

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        length: Int[Array, " B"],
        key: Key[Array, ""] | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "B S D"]:
        """The last layer's output. Only the first `length` tokens of a row are attended to.

        packing: how they lie meanwhile; None: as they come.
        """
        S = tokens.shape[1]
        packing = packing or Packing(*tokens.shape)
        embed_key, layers_key = split_key(key, 2)
        x = self.tokens(tokens) + self.positions(jnp.arange(S)) + self.segments(jnp.zeros((), jnp.int32))
        x = dropout(self.norm(packing.together(x)), self.shape.dropout, packing.keys(embed_key))
        visible = (jnp.arange(S) < length[:, None])[:, None, :]
        return packing.apart(self.layers(x, visible, packing, key=layers_key)[0])

    def mean(
        self,
        tokens: Int[Array, "B S"],
        length: Int[Array, " B"],
        key: Key[Array, ""] | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "B D"]:
        """Mean of the last layer over the row's tokens ([CLS] and [SEP] included), float32."""
        x = self.hidden(tokens, length, key, packing).astype(jnp.float32)
        inside = (jnp.arange(tokens.shape[1]) < length[:, None])[:, :, None]
        return jnp.sum(x * inside, axis=1) / jnp.maximum(length, 1)[:, None]

    def pool(self, mean: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return jnp.tanh(self.pooler(mean))

    def __call__(
        self, tokens: Int[Array, "B S"], length: Int[Array, " B"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B D"]:
        """Mean pooling, then the pooler: Eq. 1 as the paper's code has it."""
        return self.pool(self.mean(tokens, length, key))
