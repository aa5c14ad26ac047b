"""What every decoder family shares: the latent inside, the cache's form, one forward for whole replies and for steps.

The latent z enters twice: `latent_embed(z)` is added to every token embedding, and `latent_proj(z)` gives one extra
key = value position per layer that every token attends to. That position is number 0, so tokens start at position 1.

Axis letters: B batch, S new tokens, T earlier positions, D model, H heads, G key/value heads, K head size, L layers,
Z latent, V vocabulary. What a layer is given as (W, U, D) is (B, S, D) unless its tokens are packed (packing.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from miracle_jax import config
from miracle_jax.layers import Compute, Stack, dense, dropout, split_key
from miracle_jax.packing import Packing

Latent = tuple[Float[Array, "L B G 1 K"], Float[Array, "L B G 1 K"]]
# Keys and values of earlier positions and of new tokens: all layers' in one array, or a list of the layers'.
Past = tuple[Float[Array, "L B G T K"], Float[Array, "L B G T K"]] | list[
    tuple[Float[Array, "B G T K"], Float[Array, "B G T K"]]
]
New = tuple[Float[Array, "L B G S K"], Float[Array, "L B G S K"]] | list[
    tuple[Float[Array, "B G S K"], Float[Array, "B G S K"]]
]


class LmHead(NamedTuple):
    """What turns hidden states into the scores of the next token."""

    table: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores, summed in float32: bfloat16 logits have too few digits for a loss."""
        exact = jnp.promote_types(hidden.dtype, jnp.float32)
        table = self.table.astype(hidden.dtype)
        scores = jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=exact)
        return scores if self.bias is None else scores + self.bias


class Decoder(nnx.Module):
    """Latent and tokens so far to the logits of the next token. A family adds its block, its norms and its head."""

    def __init__(
        self,
        shape: config.Decoder,
        latent: int,
        kv_heads: int,
        make_block: Any,
        how: Compute,
        rngs: nnx.Rngs,
    ):
        """make_block: nnx.Rngs -> a layer, called as (x, look, place, packing, its past, key). look: see `hidden`."""
        D, std, dtype = shape.width, shape.init_std, how.dtype
        self.shape, self.kv_heads = shape, kv_heads
        self.tokens = table(shape.vocab_size, D, std, dtype, rngs)
        self.layers = Stack(make_block, shape.depth, how, rngs)
        self.latent_embed = dense(latent, D, std, dtype, rngs, bias=False)
        # One chunk more than there are layers; the last is unused. The released checkpoints have this shape.
        chunk = kv_heads * (D // shape.heads)
        self.latent_proj = dense(latent, (shape.depth + 1) * chunk, std, dtype, rngs, bias=False)

    def embed(self, tokens: Int[Array, "B S"], positions: Int[Array, "*B S"]) -> Float[Array, "B S D"]:
        return self.tokens(tokens)

    def place(self, positions: Int[Array, "*B S"]) -> Any:
        """What blocks need to know of the positions; None where the embedding says it all."""
        return None

    def latent_key_values(self, z: Float[Array, "B Z"]) -> Latent:
        """The key and the value (equal) that the latent adds to every layer, T = 1."""
        chunks = self.latent_proj(z).reshape(z.shape[0], self.shape.depth + 1, self.kv_heads, 1, -1)
        layers = jnp.moveaxis(chunks[:, :-1], 1, 0)
        return layers, layers

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        z: Float[Array, "B Z"],
        past: Past,
        past_visible: Bool[Array, "..."],
        position: Int[Array, "..."] | int,
        key: Key[Array, ""] | None = None,
        first: Int[Array, " B"] | None = None,
        layers: Callable | None = None,
        column: Int[Array, ""] | None = None,
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "B S D"] | Float[Array, "W U D"], New | Past]:
        """Runs S new tokens after T earlier positions, of which position 0 is the latent's.

        Args:
          tokens: the new tokens.
          z: the latents.
          past: keys and values of the earlier positions.
          past_visible: which of them exist, broadcasting to (B, S, T).
          position: number of the first new token, 1 for `<bos>`; (B, 1) where rows differ.
          key: dropout key; None at inference.
          first: index of each row's first new token that exists; those before it are padding, which nobody sees.
          layers: in place of its own, what `layers.one_by_one()` gave; `past` and what is returned are then lists.
          column: where in the past the keys and values of the new token (S = 1) go before it looks there, so that
            `past_visible` speaks of it too. None: they stay apart, and the past is read only.
          packing: how the new tokens lie between attention and attention; None: as they come.

        Returns:
          The last layer's output after the final norm, as the tokens lie, and the new tokens' keys and values (T = S),
          or the past with them in it.
        """
        S, packing = tokens.shape[1], packing or Packing(*tokens.shape)
        embed_key, layers_key = split_key(key, 2)
        positions = jnp.maximum(position + jnp.arange(S), 0)
        visible = jnp.tril(jnp.ones((S, S), bool))
        if first is not None:
            visible = visible & (jnp.arange(S) >= first[:, None, None])

        def look(past, *new):
            """What a layer's queries attend to, and what is kept of it."""
            if column is None:
                return [(*past, past_visible), (*new, visible)], new
            # First written, then read: XLA would copy a cache that is still to be read when it is written.
            past = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, fresh, column, axis=2)
                for old, fresh in zip(past, new, strict=True)
            )
            return [(*past, past_visible)], past

        x = packing.together(self.embed(tokens, positions) + self.latent_embed(z)[:, None])
        x = dropout(x, self.shape.dropout, packing.keys(embed_key))
        run = layers or self.layers
        x, kept = run(x, look, self.place(positions), packing, per_layer=past, key=layers_key)
        return self.norm(x), kept

    def lm_head(self) -> LmHead:
        """It shares the embedding's weights, unless a family has its own."""
        return LmHead(self.tokens.embedding[...])

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Scores of the next token, float32."""
        return self.lm_head().logits(hidden)

    def states(
        self,
        tokens: Int[Array, "B S"],
        z: Float[Array, "B Z"],
        key: Key[Array, ""] | None = None,
        prompt: Int[Array, "B P"] | None = None,
        prompt_length: Int[Array, " B"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "B S D"] | Float[Array, "W U D"]:
        """Hidden states after each of the tokens of a whole reply, which starts with `<bos>`; `logits` scores them.

        Rows are padded on the right: a token never sees what follows it, so padding cannot change the states before it.

        key: of dropout; None at inference.
        prompt, prompt_length: the context that stands before the reply, padded on the left.
        packing: of the tokens, and so of the states; there is none beside a prompt. None: as they come.
        """
        past, visible = self.latent_key_values(z), jnp.ones((), bool)
        words_key, key = split_key(key, 2)
        if words_key is not None and self.shape.word_dropout:
            hidden = jax.random.bernoulli(words_key, self.shape.word_dropout, tokens.shape)
            tokens = jnp.where(hidden, tokens[:, :1], tokens)
        if prompt is None:
            return self.hidden(tokens, z, past, visible, 1, key, packing=packing)[0]
        padding = prompt.shape[1] - prompt_length
        together = jnp.concatenate([prompt, tokens], axis=1)
        hidden, _ = self.hidden(together, z, past, visible, 1 - padding[:, None], key, padding)
        return hidden[:, prompt.shape[1] :]

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        z: Float[Array, "B Z"],
        key: Key[Array, ""] | None = None,
        prompt: Int[Array, "B P"] | None = None,
        prompt_length: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits after each of the tokens of a whole reply; arguments as of `states`."""
        return self.logits(self.states(tokens, z, key, prompt, prompt_length))


def table(rows: int, width: int, std: float, dtype: Any, rngs: nnx.Rngs) -> nnx.Embed:
    """An embedding whose float32 rows start as N(0, std^2)."""
    init = nnx.initializers.normal(std)
    return nnx.Embed(rows, width, embedding_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def make(shape: config.Decoder, latent: int, how: Compute, rngs: nnx.Rngs) -> Decoder:
    """The decoder of the shape's family."""
    from miracle_jax import gpt2, llama  # they import this module

    family = {"gpt2": gpt2.Gpt2, "llama": llama.Llama}[shape.family]
    return family(shape, latent, how, rngs)
