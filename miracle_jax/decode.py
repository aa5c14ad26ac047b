"""Latents to replies: one compiled loop over a key/value cache, which ends as soon as every reply has ended.

Axis letters: B batch, P prompt tokens, T positions, L layers, H heads, K head size, Z latent, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from miracle_jax import config
from miracle_jax.layers import HIDDEN


def generate(
    decoder: nnx.Module,
    z: Float[Array, "B Z"],
    rows: Int[Array, " B"],
    allowed: Bool[Array, " V"],
    bos: int,
    eos: int,
    settings: config.Decode,
    key: Key[Array, ""],
    prompt: Int[Array, "B P"] | None = None,
    prompt_length: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Writes one reply a latent.

    Args:
      decoder: of any family.
      z: the latents.
      rows: a number for each reply; with `key` it decides what is drawn, whatever else is in the batch.
      allowed: tokens that may be written at all (not `<bos>`, not rows of the table that no token has).
      bos, eos: ids of `<bos>` and `<eos>`; `<eos>` is barred from the first `settings.min_new_tokens`.
      settings: lengths, temperature (0 is greedy) and top-p.
      key: seed of the sampling; greedy replies do not depend on it.
      prompt, prompt_length: the context that a decoder which sees it reads first, padded on the left.

    Returns:
      Token ids, `<eos>` from the end of each reply on, T = settings.max_new_tokens; and the replies' lengths without
      `<eos>`. A reply that reached T tokens was cut there.
    """
    return _generate(
        decoder, z, rows, allowed, key, settings.temperature, settings.top_p, prompt, prompt_length,
        bos=bos, eos=eos, least=settings.min_new_tokens, most=settings.max_new_tokens, greedy=settings.temperature == 0,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("bos", "eos", "least", "most", "greedy"))
def _generate(
    decoder, z, rows, allowed, key, temperature, top_p, prompt, prompt_length, *, bos, eos, least, most, greedy
):
    B = z.shape[0]
    P = 0 if prompt is None else prompt.shape[1]
    slots = jnp.arange(1 + P + most)  # slot 0 is the latent's, then come the prompt's, then reply token n (from 1)
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(rows)

    def room(latent):
        L, _, _, H, K = latent.shape
        return jnp.zeros((L, B, len(slots), H, K), latent.dtype).at[:, :, :1].set(latent)

    def unfinished(state):
        step, _, _, _, done, _ = state
        return (step < most) & ~jnp.all(done)

    def write_token(state):
        step, token, cache, written, done, length = state
        visible, position = slots <= P + step, step + 1
        if P:
            padding = P - prompt_length[:, None]
            visible = (visible & ((slots == 0) | (slots > padding)))[:, None]
            position = position + prompt_length[:, None]
        hidden, new = decoder.hidden(token[:, None], z, cache, visible, position)
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), P + step + 1, axis=2)
            for old, fresh in zip(cache, new, strict=True)
        )
        permitted = allowed & ((jnp.arange(allowed.shape[0]) != eos) | (step >= least))
        logits = jnp.where(permitted, decoder.logits(hidden)[:, 0], HIDDEN)
        if greedy:
            choice = jnp.argmax(logits, axis=-1)
        else:
            step_keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(row_keys)
            choice = jax.vmap(jax.random.categorical)(step_keys, nucleus(logits / temperature, top_p))
        token = jnp.where(done, eos, choice).astype(jnp.int32)
        done = done | (token == eos)
        return step + 1, token, cache, written.at[:, step].set(token), done, length + ~done

    latent = decoder.latent_key_values(z)
    cache = tuple(room(part) for part in latent)
    if P:
        first = P - prompt_length
        _, new = decoder.hidden(prompt, z, latent, jnp.ones((), bool), 1 - first[:, None], None, first)
        cache = tuple(old.at[:, :, 1 : P + 1].set(fresh) for old, fresh in zip(cache, new, strict=True))
    written = jnp.full((B, most), eos, jnp.int32)
    start = (jnp.int32(0), jnp.full(B, bos, jnp.int32), cache, written, jnp.zeros(B, bool), jnp.zeros(B, jnp.int32))
    _, _, _, written, _, length = jax.lax.while_loop(unfinished, write_token, start)
    return written, length


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Keeps the fewest most probable tokens whose probabilities reach top_p (Holtzman et al. 2020)."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # 1.0 keeps everything, whatever rounding does to the sum.
    kept = (before < top_p) | (top_p >= 1.0)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, HIDDEN)
