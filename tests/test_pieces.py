"""Rows in pieces: order, padding, memory, and the cores of a CPU that share them."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miracle_jax import pieces
from miracle_jax.pieces import in_pieces

READ = {"kernel": np.zeros((3, 3), np.float32)}


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(pieces, "usable_cores", lambda: 4)


def test_in_pieces_halves_pads_and_keeps_the_order():
    sizes = []

    def double(x, rows):
        sizes.append(len(x))
        if len(x) > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {"x": jnp.asarray(x) * 2, "rows": rows}

    x = np.random.default_rng(0).normal(size=(11, 2)).astype(np.float32)
    got = in_pieces(double, (x, np.arange(11)), batch_size=8)
    np.testing.assert_array_equal(got["x"], 2 * x)
    np.testing.assert_array_equal(got["rows"], np.arange(11))
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]

    sizes.clear()
    assert (in_pieces(double, (x[:3], np.arange(3)), batch_size=3)["x"] == 2 * x[:3]).all()
    assert (in_pieces(double, (x[:10], np.arange(10)), batch_size=3)["x"] == 2 * x[:10]).all()
    assert sizes == [3, 3, 3, 3, 1]
    sizes.clear()
    got = in_pieces(lambda x: (sizes.append(len(x)), x)[1], (np.arange(5),), batch_size=64)
    assert got.tolist() == [0, 1, 2, 3, 4] and sizes == [8]


@pytest.mark.parametrize("message, rows", [("INTERNAL: something else", 4), ("RESOURCE_EXHAUSTED: hopeless", 1)])
def test_in_pieces_hides_no_other_failure(message, rows):
    tried = []

    def fail(x):
        tried.append(len(x))
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        in_pieces(fail, (np.zeros(4),), batch_size=4)
    assert tried[-1] == rows


def test_cores_share_rows_in_their_order(four_cores):
    sizes = []

    def double(x, rows):
        sizes.append(len(x))
        return {"x": jnp.asarray(x) * 2, "rows": rows}

    x = np.random.default_rng(0).normal(size=(600, 2)).astype(np.float32)
    got = in_pieces(double, (x, np.arange(600)), batch_size=512, read=READ)
    np.testing.assert_array_equal(got["x"], 2 * x)
    np.testing.assert_array_equal(got["rows"], np.arange(600))
    assert sorted(sizes) == [64, 64, 128, 128, 128, 128]  # of the last 88 a core gets 44, not 22


def test_cores_share_only_what_is_worth_it(four_cores):
    sizes = []

    def count(x):
        sizes.append(len(x))
        return x

    x = np.zeros(256)
    for rows, read in ((x[:63], READ), (x, None), (x, {"table": np.zeros(pieces.CACHED + 1, np.int8)})):
        in_pieces(count, (rows,), 256, read)
    assert sizes == [64, 256, 256]


def test_cores_work_at_the_same_time(four_cores, monkeypatch):
    together, get = threading.Barrier(4), jax.device_get

    def wait(x):
        together.wait(timeout=30)  # raises where fewer than four come
        return get(x)

    monkeypatch.setattr(jax, "device_get", wait)
    x = np.arange(256.0)
    np.testing.assert_array_equal(in_pieces(jax.jit(lambda x: x + 1), (x,), 256, READ), x + 1)


def test_cores_compile_once(four_cores):
    traced = []

    @jax.jit
    def double(x):
        traced.append(x.shape)
        return 2 * x

    in_pieces(double, (np.arange(256.0),), 256, READ)
    assert traced == [(64,)] and double._cache_size() == 1


def test_cores_have_the_settings_of_the_caller(four_cores):
    seen = []

    def look(x):
        seen.append((jax.config.jax_default_device, jnp.asarray(x).dtype))
        return x

    device = jax.local_devices()[0]
    with jax.enable_x64(True), jax.default_device(device):
        in_pieces(look, (np.arange(256.0),), 256, READ)
    assert seen == [(device, np.float64)] * 4


def test_cores_that_run_out_of_memory_take_fewer_rows(four_cores, caplog):
    sizes = []

    def fail(x):
        sizes.append(len(x))
        if len(x) > 32:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return 2 * x

    x = np.arange(256.0)
    np.testing.assert_array_equal(in_pieces(fail, (x,), 256, READ), 2 * x)
    assert sizes[-8:] == [32] * 8 and "out of memory with 256 rows at a time: going on with 128" in caplog.text
