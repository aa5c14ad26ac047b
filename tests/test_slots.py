"""Rows through slots: everybody is worked on once, whatever the numbers are, and nobody waits for the longest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miracle_jax import slots


def count_down(lengths, places, total=None, until=None, expected=None):
    """Every row counts its length down by one a step. Gives what was counted (B,), and the steps that were taken."""
    lengths = jnp.asarray(lengths)

    def load(state, slot, row):
        left, counted, steps = state
        return left.at[slot].set(lengths[row], mode="drop"), counted.at[slot].set(0, mode="drop"), steps

    def advance(state, busy):
        left, counted, steps = state
        return (left - 1, counted + busy, steps + 1), busy & (left > 1)

    def go(state, queue, goes_on=None):
        return slots.run(state, queue, load, advance, lambda state: state[1], goes_on)

    @jax.jit
    def run():
        state = jnp.zeros(places, int), jnp.zeros(places, int), jnp.int32(0)
        ahead = None if expected is None else jnp.asarray(expected)
        queue = slots.begin(len(lengths) if total is None else total, places, jnp.full(len(lengths), -1), ahead)
        if until is not None:
            state, queue = go(state, queue, lambda state, busy: state[2] < until)
        return go(state, queue)

    state, queue = run()
    return np.asarray(queue.results), int(state[2])


@pytest.mark.parametrize("places", [1, 2, 3, 7, 8, 40])
def test_every_row_is_worked_on_to_its_end(places):
    lengths = np.random.default_rng(0).integers(1, 9, 40)
    counted, _ = count_down(lengths, places)
    np.testing.assert_array_equal(counted, lengths)


def test_rows_beyond_the_total_are_left_alone():
    counted, _ = count_down([3, 1, 2, 5, 5, 5], 2, total=3)
    np.testing.assert_array_equal(counted, [3, 1, 2, -1, -1, -1])


def test_nobody_waits_for_the_longest():
    """63 rows of one step and one of 100 through four slots: not much longer than the longest."""
    lengths = np.ones(64, int)
    lengths[5] = 100
    counted, steps = count_down(lengths, 4)
    np.testing.assert_array_equal(counted, lengths)
    assert steps <= 110


def test_the_longest_go_first():
    """Six rows of one step and one of six, through two slots: the long one beside all the others."""
    lengths = [1, 1, 1, 1, 1, 1, 6]
    assert count_down(lengths, 2)[1] == 9
    counted, steps = count_down(lengths, 2, expected=[2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 50.0])
    np.testing.assert_array_equal(counted, lengths)
    assert steps == 6


def test_rows_beyond_the_total_stay_behind_however_long():
    counted, _ = count_down([3, 1, 2, 5, 5, 5], 2, total=3, expected=[1.0, 2.0, 3.0, 9.0, 9.0, 9.0])
    np.testing.assert_array_equal(counted, [3, 1, 2, -1, -1, -1])


def test_it_can_stop_in_between_and_go_on():
    lengths = np.random.default_rng(1).integers(1, 9, 30)
    counted, steps = count_down(lengths, 4, until=7)
    np.testing.assert_array_equal(counted, lengths)
    assert steps == count_down(lengths, 4)[1]
