"""Much work through few places: rows wait in a queue, a fixed number of them is under way, and a row that has ended
leaves its slot to the next. So no row waits for the longest, and what is under way fits the cache or the memory.

Axis letters: B rows, C slots, F slots filled at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Queue(NamedTuple):
    """Who is where. Made by `begin`."""

    total: Int[Array, ""]
    """Rows to be worked on."""
    order: Int[Array, " B"]
    """The rows as they get slots, one after the other; the first `total` of them do."""
    following: Int[Array, ""]
    """Rows that have got a slot."""
    row: Int[Array, " C"]
    """The row in each slot; B where there is none."""
    busy: Bool[Array, " C"]
    results: Any
    """A pytree of (B, ...) arrays: of rows that have ended, what `run`'s `result` gave."""


def begin(total: Int[Array, ""] | int, slots: int, results: Any, length: Float[Array, " B"] | None = None) -> Queue:
    """A queue of the first `total` rows.

    Args:
      results: what rows have that are not worked on.
      length: how long each row is expected to take, in any unit. The longest go first, so that at the end slots do not
        stand empty for the sake of a few. None: nothing is known.
    """
    B = len(jax.tree.leaves(results)[0])
    rows = jnp.arange(B, dtype=jnp.int32)
    order = rows if length is None else jnp.argsort(jnp.where(rows < total, -length, jnp.inf)).astype(jnp.int32)
    return Queue(jnp.int32(total), order, jnp.int32(0), jnp.full(slots, B, jnp.int32), jnp.zeros(slots, bool), results)


def run(
    state: Any,
    queue: Queue,
    load: Callable[[Any, Int[Array, " F"], Int[Array, " F"]], Any],
    advance: Callable[[Any, Bool[Array, " C"]], tuple[Any, Bool[Array, " C"]]],
    result: Callable[[Any], Any],
    goes_on: Callable[[Any, Bool[Array, " C"]], Bool[Array, ""]] | None = None,
) -> tuple[Any, Queue]:
    """Works until all rows have ended, or `goes_on` says no. Slots are filled again when an eighth of them is free.

    Args:
      state: a pytree, of the slots and whatever else `advance` needs.
      load: (state, slots, rows) -> state with those rows, which start, in those slots; slots that are C do not exist
        (indexing with mode="drop" leaves them out).
      advance: (state, busy) -> state after one step of every slot, and which are still busy. What becomes of slots that
        are not busy does not matter.
      result: state -> pytree of (C, ...) arrays, as the queue's results have them.
      goes_on: (state, busy) -> whether the next step may be taken.
    """
    B, C = len(jax.tree.leaves(queue.results)[0]), len(queue.row)
    F = max(C // 8, 1)

    def may(state, busy):
        return goes_on(state, busy) if goes_on else True

    def turn(carry):
        state, queue = carry
        free = jnp.argsort(queue.busy)[:F]
        place = queue.following + jnp.arange(F, dtype=jnp.int32)
        taken = ~queue.busy[free] & (place < queue.total)
        row, slot = queue.order[jnp.minimum(place, B - 1)], jnp.where(taken, free, C)
        state = load(state, slot, row)
        where = queue.row.at[slot].set(row, mode="drop")
        busy = queue.busy.at[slot].set(True, mode="drop")
        following = queue.following + jnp.sum(taken, dtype=jnp.int32)  # int64 otherwise where x64 is on
        least = jnp.where(following < queue.total, C - F, 0)
        state, busy = jax.lax.while_loop(
            lambda carry: (jnp.sum(carry[1]) > least) & may(*carry), lambda carry: advance(*carry), (state, busy)
        )
        ended = jnp.where(busy, B, where)
        results = jax.tree.map(lambda old, new: old.at[ended].set(new, mode="drop"), queue.results, result(state))
        return state, queue._replace(following=following, row=jnp.where(busy, where, B), busy=busy, results=results)

    def unfinished(carry):
        state, queue = carry
        return ((queue.following < queue.total) | jnp.any(queue.busy)) & may(state, queue.busy)

    return jax.lax.while_loop(unfinished, turn, (state, queue))
