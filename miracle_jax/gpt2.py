"""The GPT-2 decoder (Radford et al. 2019) with the latent inside.

The latent z enters twice: `latent_embed(z)` is added to every token embedding, and `latent_proj(z)` gives one extra
key = value position per layer that every token attends to. That position is number 0, so tokens start at position 1.

Axis letters: B batch, S new tokens, T earlier positions, D model, H heads, K head size, L layers, Z latent,
V vocabulary.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from miracle_jax import config
from miracle_jax.layers import ACTIVATIONS, Stack, attention, dense, dropout, layer_norm, split_key

Past = tuple[Float[Array, "L B T H K"], Float[Array, "L B T H K"]]  # keys and values of earlier positions
New = tuple[Float[Array, "L B S H K"], Float[Array, "L B S H K"]]  # and of new tokens


class Block(nnx.Module):
    """One decoder layer, normalised before each sublayer as in GPT-2."""

    def __init__(self, shape: config.Gpt2, dtype: Any, rngs: nnx.Rngs):
        D, std = shape.width, shape.init_std
        residual_std = std / (2 * shape.depth) ** 0.5  # GPT-2 scales the layers that write to the residual stream
        self.shape = shape
        self.attention_norm = layer_norm(D, shape.norm_eps, dtype, rngs)
        self.qkv = dense(D, 3 * D, std, dtype, rngs)  # query | key | value on the last axis
        self.attention_out = dense(D, D, residual_std, dtype, rngs)
        self.mlp_norm = layer_norm(D, shape.norm_eps, dtype, rngs)
        self.mlp_in = dense(D, shape.mlp, std, dtype, rngs)
        self.mlp_out = dense(shape.mlp, D, residual_std, dtype, rngs)

    def __call__(self, x: Float[Array, "B S D"], past_visible, past, key):
        rate, S = self.shape.dropout, x.shape[1]
        weights_key, attention_key, mlp_key = split_key(key, 3)
        q, k, v = jnp.split(self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3 * self.shape.heads, -1), 3, axis=2)
        causal = jnp.tril(jnp.ones((S, S), bool))
        mixed = attention(q, [(*past, past_visible), (k, v, causal)], rate, weights_key)
        x = x + dropout(self.attention_out(mixed), rate, attention_key)
        hidden = self.mlp_out(ACTIVATIONS[self.shape.activation](self.mlp_in(self.mlp_norm(x))))
        return x + dropout(hidden, rate, mlp_key), (k, v)


class Gpt2(nnx.Module):
    """Latent and tokens so far to the logits of the next token."""

    def __init__(self, shape: config.Gpt2, latent_size: int, dtype: Any, remat: bool, rngs: nnx.Rngs):
        D, std = shape.width, shape.init_std

        def table(rows, table_std):
            init = nnx.initializers.normal(table_std)
            return nnx.Embed(rows, D, embedding_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)

        self.shape = shape
        self.tokens = table(shape.vocab_size, std)
        self.positions = table(shape.max_positions, std / 2)
        self.layers = Stack(lambda r: Block(shape, dtype, r), shape.depth, remat, rngs)
        self.norm = layer_norm(D, shape.norm_eps, dtype, rngs)
        self.head_bias = nnx.Param(jnp.zeros(shape.vocab_size))
        self.latent_embed = dense(latent_size, D, std, dtype, rngs, bias=False)
        # One chunk more than there are layers; the last is unused. The released checkpoints have this shape.
        self.latent_proj = dense(latent_size, (shape.depth + 1) * D, std, dtype, rngs, bias=False)

    def latent_key_values(self, z: Float[Array, "B Z"]) -> Past:
        """The key and the value (equal) that the latent adds to every layer, T = 1."""
        chunks = self.latent_proj(z).reshape(z.shape[0], self.shape.depth + 1, 1, self.shape.heads, -1)
        layers = jnp.moveaxis(chunks[:, :-1], 1, 0)
        return layers, layers

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        z: Float[Array, "B Z"],
        past: Past,
        past_visible: Bool[Array, "..."],
        position: Int[Array, ""] | int,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], New]:
        """Runs S new tokens after T earlier positions, of which position 0 is the latent's.

        Args:
          tokens: the new tokens.
          z: the latents.
          past: keys and values of the earlier positions.
          past_visible: which of them exist, broadcasting to (B, H, S, T).
          position: number of the first new token, 1 for `<bos>`.
          key: dropout key; None at inference.

        Returns:
          The last layer's output after the final norm, and the new tokens' keys and values (T = S).
        """
        embed_key, layers_key = split_key(key, 2)
        x = self.tokens(tokens) + self.positions(position + jnp.arange(tokens.shape[1])) + self.latent_embed(z)[:, None]
        x = dropout(x, self.shape.dropout, embed_key)
        x, new = self.layers(x, past_visible, per_layer=past, key=layers_key)
        return self.norm(x), new

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Scores of the next token, float32; the head shares the embedding's weights."""
        # As nnx.Embed.attend, but summed in float32: bfloat16 logits have too few digits for a loss.
        table = self.tokens.embedding[...].astype(hidden.dtype)
        scores = jnp.einsum("BSD,VD->BSV", hidden, table, preferred_element_type=jnp.float32)
        return scores + self.head_bias[...]

    def __call__(
        self, tokens: Int[Array, "B S"], z: Float[Array, "B Z"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B S V"]:
        """Logits after each of the tokens of a whole reply, which starts with `<bos>`.

        Rows are padded on the right: a token never sees what follows it, so padding cannot change the logits before it.
        """
        hidden, _ = self.hidden(tokens, z, self.latent_key_values(z), jnp.ones((), bool), 1, key)
        return self.logits(hidden)
