"""Latents to replies: one compiled call, in which a reply that has ended leaves its place in the batch to the next.

The key/value cache is a ring: every step writes all replies' new keys into the same column, whenever each of them
began, and a reply sees the columns written since then. The ring grows when a reply needs it, so short replies pay for
short rings.

Axis letters: B replies, C replies under way, P prompt tokens, M most tokens of a reply, R columns of the ring, G
key/value heads, K head size, Z latent, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from miracle_jax import config, mesh, slots
from miracle_jax.decoder import Decoder
from miracle_jax.layers import HIDDEN

FIRST_RING = 64  # a longer one is another loop to compile


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
    total: int | None = None,
) -> tuple[Int[Array, "B M"], Int[Array, " B"]]:
    """Writes one reply a latent.

    Args:
      decoder: of any family.
      z: the latents.
      rows: a number for each reply; with `key` it decides what is drawn, whatever else is in the batch.
      allowed: tokens that may be written at all (not `<bos>`, not rows of the table that no token has).
      bos, eos: ids of `<bos>` and `<eos>`; `<eos>` is barred from the first `settings.min_new_tokens`.
      settings: lengths, temperature (0 is greedy), top-p, and how many replies are under way at a time.
      key: seed of the sampling; greedy replies do not depend on it.
      prompt, prompt_length: the context that a decoder which sees it reads first, padded on the left.
      total: replies that are wanted, the first of B; the others only fill up, and nothing is written. None: all.

    Returns:
      Token ids, `<eos>` from the end of each reply on, M = settings.max_new_tokens; and the replies' lengths without
      `<eos>`. A reply that reached M tokens was cut there.
    """
    total = len(z) if total is None else total
    room, wanted = min(settings.batch_size or places_in_memory(decoder, settings, prompt), len(z)), max(total, 1)
    # As many as equal rounds need: 160 replies of equal length would take as long in 128 places as 256.
    rounds = -(-wanted // room)
    places = min(room, _rounded(-(-wanted // rounds)))
    return _generate(
        decoder, z, rows, allowed, key, settings.temperature, settings.top_p, prompt, prompt_length, total,
        bos=bos, eos=eos, least=settings.min_new_tokens, most=settings.max_new_tokens,
        greedy=settings.temperature == 0, places=places,
    )  # fmt: skip


def places_in_memory(decoder: Decoder, settings: config.Decode, prompt: Array | None) -> int:
    """How many replies to have under way: a power of 2 to which a third of the free memory of the default device
    gives room, at most 1,024.

    On a CPU their keys and values get 160 MiB, and there are at least 64: larger decoders gain nothing from more. Where
    cores share the replies of a small one (pieces.py), that is for each of them.
    """
    memory = mesh.default_device().memory_stats() or {}
    known = "bytes_limit" in memory
    free = (memory["bytes_limit"] - memory["bytes_in_use"]) // 3 if known else 160 * 2**20
    shape = decoder.shape
    columns = 1 + (0 if prompt is None else prompt.shape[1]) + settings.max_new_tokens
    head = shape.width // shape.heads
    bytes_a_reply = 2 * shape.depth * decoder.kv_heads * head * columns * jnp.dtype(decoder.layers.how.dtype).itemsize
    room = max(int(free // bytes_a_reply), 1 if known else 64)
    return min(1024, 1 << room.bit_length() - 1)


def _rounded(number: int) -> int:
    """Up to five, six, seven or eight eighths of a power of 2: few shapes compile, and few places stay empty."""
    eighth = max((1 << max(number - 1, 0).bit_length()) // 8, 1)
    return -(-number // eighth) * eighth


class _Writing(NamedTuple):
    """The replies under way."""

    z: Float[Array, "C Z"]
    key: Key[Array, " C"]
    prompt_length: Int[Array, " C"]
    past: list
    """For each layer, keys and values (C, G, 1 + P + R, K): the latent's, the prompt's, the ring."""
    column: Int[Array, ""]
    """Of the ring, the next to be written."""
    token: Int[Array, " C"]
    """The last that was written."""
    age: Int[Array, " C"]
    """Tokens that it has in the ring."""
    text: Int[Array, "C M"]
    length: Int[Array, " C"]


@partial(jax.jit, static_argnames=("bos", "eos", "least", "most", "greedy", "places"))
def _generate(
    decoder, z, rows, allowed, key, temperature, top_p, prompt, prompt_length, total, *, bos, eos, least, most, greedy,
    places
):
    B, C = len(z), places
    dtype = decoder.layers.how.dtype
    graphdef, params = nnx.split(decoder)
    # Once, rather than at every token.
    decoder = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params))
    layers = decoder.layers.one_by_one()
    P = 0 if prompt is None else prompt.shape[1]
    prompt_length = jnp.zeros(B, jnp.int32) if prompt is None else prompt_length
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    rings = [*(size for size in (FIRST_RING << i for i in range(16)) if size < most), most]

    def load(state, slot, row):
        latent, read = decoder.latent_key_values(z[row]), prompt_length[row]
        start = latent = list(zip(*map(jnp.unstack, latent), strict=True))
        if P:
            first, seen = P - read, jnp.ones((), bool)
            _, new = decoder.hidden(prompt[row], z[row], latent, seen, 1 - first[:, None], first=first, layers=layers)
            start = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), latent, new)

        def put(old, new):
            return old.at[slot].set(new, mode="drop")

        return state._replace(
            z=put(state.z, z[row]), key=put(state.key, row_keys[row]), prompt_length=put(state.prompt_length, read),
            past=jax.tree.map(lambda old, new: old.at[slot, :, : 1 + P].set(new, mode="drop"), state.past, start),
            token=put(state.token, bos), age=put(state.age, 0), text=put(state.text, eos), length=put(state.length, 0),
        )  # fmt: skip

    def write(state, busy):
        R = state.past[0][0].shape[2] - 1 - P
        ago = (state.column - jnp.arange(R)) % R  # steps since a column was written; 0: by this one
        own = ago <= state.age[:, None]
        given = (jnp.arange(1 + P) == 0) | (jnp.arange(1 + P) > P - state.prompt_length[:, None])
        visible = jnp.concatenate([given, own], axis=1)[:, None]
        position = (1 + state.prompt_length + state.age)[:, None]
        hidden, past = decoder.hidden(
            state.token[:, None], state.z, state.past, visible, position, layers=layers, column=1 + P + state.column
        )
        permitted = allowed & ((jnp.arange(len(allowed)) != eos) | (state.age >= least)[:, None])
        logits = jnp.where(permitted, decoder.logits(hidden)[:, 0], HIDDEN)
        if greedy:
            # As argmax, which XLA's CPU code reduces one by one.
            best = logits == jnp.max(logits, axis=-1, keepdims=True)
            token = jnp.min(jnp.where(best, jnp.arange(len(allowed), dtype=jnp.int32), len(allowed) - 1), axis=-1)
        else:
            keys = jax.vmap(jax.random.fold_in)(state.key, state.age)
            token = jax.vmap(jax.random.categorical)(keys, nucleus(logits / temperature, top_p)).astype(jnp.int32)
        going = busy & (token != eos)
        text = state.text.at[jnp.arange(C), jnp.where(going, state.age, most)].set(token, mode="drop")
        age = state.age + busy
        state = state._replace(
            past=past, column=(state.column + 1) % R, token=token, age=age, text=text, length=state.length + going
        )
        return state, going & (age < most)

    empty = jnp.zeros((C, decoder.kv_heads, 1 + P + rings[0], decoder.shape.width // decoder.shape.heads), dtype)
    state = _Writing(
        z=jnp.zeros((C, z.shape[1]), z.dtype), key=row_keys[:C], prompt_length=jnp.zeros(C, jnp.int32),
        past=[(empty, empty)] * decoder.shape.depth, column=jnp.int32(0), token=jnp.zeros(C, jnp.int32),
        age=jnp.zeros(C, jnp.int32), text=jnp.zeros((C, most), jnp.int32), length=jnp.zeros(C, jnp.int32),
    )  # fmt: skip
    queue = slots.begin(total, C, (jnp.full((B, most), eos, jnp.int32), jnp.zeros(B, jnp.int32)))
    for ring in rings:
        if ring != rings[0]:
            state = _grown(state, 1 + P, ring)
        enough = None if ring == most else lambda state, busy, ring=ring: jnp.max(state.age * busy) < ring
        state, queue = slots.run(state, queue, load, write, lambda state: (state.text, state.length), enough)
    return queue.results


def _grown(state: _Writing, fixed: int, ring: int) -> _Writing:
    """With a ring of `ring` columns, the old ones in front of the new, the oldest first. fixed: columns before it."""

    def grown(cache):
        old = jnp.roll(cache[:, :, fixed:], -state.column, axis=2)
        room = jnp.zeros((*old.shape[:2], ring - old.shape[2], old.shape[3]), old.dtype)
        return jnp.concatenate([cache[:, :, :fixed], old, room], axis=2)

    old = state.past[0][0].shape[2] - fixed
    return state._replace(past=jax.tree.map(grown, state.past), column=jnp.int32(old))


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Keeps the fewest most probable tokens whose probabilities reach top_p (Holtzman et al. 2020)."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # 1.0 keeps everything, whatever rounding does to the sum.
    kept = (before < top_p) | (top_p >= 1.0)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, HIDDEN)
