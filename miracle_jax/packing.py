"""Texts without their padding: the tokens of a batch end to end.

Dense layers, norms and dropout take each token on its own, so padding among the tokens is work for nothing; attention
takes each text on its own. A model therefore computes on tokens that are `together` and lays texts `apart` for
attention.

Axis letters: B texts, S places of a text, W shares of a batch (its workers', one a device), U tokens of a share.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped


class Packing:
    """How the tokens of B texts lie: end to end, (W, U), or as they come, (B, S), padding included."""

    def __init__(self, rows: int, width: int, length: Int[Array, " B"] | None = None,
                 tokens: Int[Array, "W U"] | None = None):  # fmt: skip
        """rows, width: B and S. length: of the texts. tokens: where each token of a share is among its B / W x S
        places, -1 behind the last, as `pipeline.Batches` gives it; None: nothing is packed."""
        self._shape, self._tokens = (rows, width), tokens
        if tokens is not None:
            length = length.reshape(len(tokens), -1, 1)
            first, place = jnp.cumsum(length, axis=1) - length, jnp.arange(width)
            self._places = jnp.where(place < length, first + place, -1).reshape(len(tokens), -1)

    @classmethod
    def of(cls, batch: Mapping[str, Array], field: str) -> "Packing":
        """That of one field of a batch of pipeline.py."""
        return cls(*batch[field].shape, batch[f"{field}_length"], batch.get(f"{field}_tokens"))

    def together(self, x: Shaped[Array, "B S *D"]) -> Shaped[Array, "W U *D"]:
        """The tokens of all texts end to end, and 0 behind them; x itself where nothing is packed."""
        if self._tokens is None:
            return x
        x = x.reshape(*self._places.shape, *x.shape[2:])
        return _moved(x, self._tokens, self._places)

    def apart(self, x: Shaped[Array, "W U *D"]) -> Shaped[Array, "B S *D"]:
        """The reverse of `together`, with 0 for padding."""
        if self._tokens is None:
            return x
        return _moved(x, self._places, self._tokens).reshape(*self._shape, *x.shape[2:])

    def keys(self, key: Key[Array, ""] | None) -> Key[Array, "W U"] | None:
        """A key for each token. It depends on the text's row and the token's place in it, below 2^16 each, not on how
        they lie."""
        if key is None:
            return None
        rows, width = self._shape
        number = jnp.arange(rows, dtype=jnp.uint32)[:, None] * 2**16 + jnp.arange(width, dtype=jnp.uint32)
        number = self.together(number)
        return jax.vmap(jax.vmap(lambda n: jax.random.fold_in(key, n)))(number)


@jax.custom_vjp
def _moved(
    x: Shaped[Array, "W N *D"], source: Int[Array, "W M"], back: Int[Array, "W N"]
) -> Shaped[Array, "W M *D"]:
    """x[w, source[w, m]], or 0 where that is -1. back: where each of x's went, by which gradients are gathered too;
    JAX's own would be scattered."""

    def one(x, source):
        found = jnp.take(x, source, axis=0, mode="clip")
        return jnp.where((source >= 0).reshape(-1, *[1] * (x.ndim - 1)), found, 0)

    return jax.vmap(one)(x, source)


def _moved_forward(x, source, back):
    return _moved(x, source, back), (source, back)


def _moved_backward(kept, slope: Float[Array, "W M *D"]):
    source, back = kept
    return _moved(slope, back, source), None, None


_moved.defvjp(_moved_forward, _moved_backward)
