"""Fluency: the perplexity of replies under a language model that has nothing to do with ours (section 3.2).

Axis letters: B batch, S tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from miracle_jax import checkpoint, decoder, pretrained
from miracle_jax.cvae import has_bfloat16
from miracle_jax.layers import Compute
from miracle_jax.pipeline import by_length
from miracle_jax.tokenizers import load_tokenizer

POSITIONS = 16
"""Of which the scores over the vocabulary are in memory at a time."""
RELEASED_LIMIT = 1e4
"""The released code leaves perplexities from here on out of its mean."""


class LanguageModel:
    """A GPT-2 or Llama checkpoint: a hub name, a folder, a .gguf file, or package:NAME/PATH."""

    def __init__(self, name: str):
        """Raises UserError as `pretrained.language_model` does."""
        shape, params = pretrained.language_model(name, "--language-model")
        self.name, self.shape, self.fingerprint = name, shape, checkpoint.fingerprint(params)[:16]
        self.tokenizer = load_tokenizer("decoder", name)
        dtype = jnp.bfloat16 if has_bfloat16(jax.devices()[0]) else jnp.float32
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: decoder.make(shape, 1, Compute(dtype), nnx.Rngs(0))))
        self._compute = partial(jax.jit(partial(_negative_log_likelihood, graphdef)), params)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """(N, 2): the negative log likelihood of every text's tokens after its first, in nats, and how many tokens it
        has. Each text stands alone; what is longer than the model's positions is cut at the end."""
        rows = [self.tokenizer.encode(text)[: self.shape.max_positions] for text in texts]
        length = np.array([len(row) for row in rows])
        nats = np.zeros(len(rows), np.float32)
        some = np.flatnonzero(length)
        if len(some):
            nats[some] = by_length(
                self._compute, length[some], lambda chosen: [rows[some[i]] for i in chosen], self.tokenizer.eos_id
            )
        return np.stack([nats, length], axis=1)


def _negative_log_likelihood(
    graphdef, params, tokens: Int[Array, "B S"], length: Int[Array, " B"]
) -> Float[Array, " B"]:
    model = nnx.merge(graphdef, params)
    tokens = tokens[:, : model.shape.max_positions]  # beyond are no texts, but padding
    z = jnp.zeros((tokens.shape[0], 1))
    # The latent's position is hidden, so that the checkpoint computes what it always did; hence tokens start at 0.
    hidden, _ = model.hidden(tokens, z, model.latent_key_values(z), jnp.zeros((), bool), 0)

    def nats(position):
        hidden, target = position
        scores = model.logits(hidden[:, None])[:, 0]
        return jax.nn.logsumexp(scores, axis=-1) - jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]

    # A few positions at a time: the scores of all would be B x S x V numbers, many GB for long texts.
    positions = jnp.swapaxes(hidden[:, :-1], 0, 1), tokens[:, 1:].T
    every = jax.lax.map(nats, positions, batch_size=POSITIONS)
    counted = jnp.arange(tokens.shape[1] - 1)[:, None] < length - 1
    return jnp.sum(every * counted, axis=0)


def perplexity(nats: float, tokens: float) -> float | None:
    """exp of the mean over the tokens that are predicted, all but the first. None for a text that has none."""
    return math.exp(nats / (tokens - 1)) if tokens > 1 else None


def released_perplexity(nats: float, tokens: float) -> float | None:
    """As the released code has it: divided by all tokens. None for what it leaves out: empty texts, texts of one token,
    and from 10,000 on."""
    value = math.exp(nats / tokens) if tokens > 1 else math.inf
    return value if value < RELEASED_LIMIT else None
