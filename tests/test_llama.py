"""What only the Llama family has: rotary positions and shared key/value heads. The rest is in test_decoders.py."""

import jax
import numpy as np
import parity
import pytest

from miracle_jax.llama import rotate, rotation


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def case():
    """Six heads of queries, two of keys and values."""
    return parity.load("llama_grouped")


def test_positions_are_relative(case):
    """Among tokens, that is: the latent stays at position 0, so where it is seen the distance to it counts."""
    graphdef, params = parity.decoder(case)
    tokens, z = case["tokens"], case["z"]

    @jax.jit
    def run(params, latent_seen, position):
        model = parity.merge(graphdef, params)
        return model.hidden(tokens, z, model.latent_key_values(z), latent_seen, position)[0]

    hidden, seen = np.zeros((), bool), np.ones((), bool)
    near = run(params, hidden, 1)
    for position in (8, 50, np.array([[3], [1], [20]])):
        np.testing.assert_allclose(run(params, hidden, position), near, rtol=1e-5, atol=1e-5)
    moved = np.abs(run(params, seen, 8) - run(params, seen, 1)).max(axis=-1)
    assert (moved > 1e-3).all()


def test_a_rotation_by_hand():
    """Dimension i turns with i + K/2, by the position times theta^(-2i/K); at position 0, the latent's, none turns."""
    x = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    got = np.asarray(rotate(np.broadcast_to(x, (1, 2, 1, 4)), rotation(np.array([0, 5]), 4, 100.0)))[0, :, 0]
    fast, slow = np.exp(5j), np.exp(0.5j)
    want = np.array([(1 + 3j) * fast, (2 + 4j) * slow])
    np.testing.assert_array_equal(got[0], x)
    np.testing.assert_allclose(got[1], np.concatenate([want.real, want.imag]), rtol=1e-5)


def test_a_query_head_reads_the_key_head_of_its_group(case):
    """Head h reads head h // 3 of two, so with each of the two written out three times nothing changes."""
    shared = ("k_proj.weight", "v_proj.weight", "latent_proj.weight")
    apart = case | {"shape/kv_heads": np.array(6)}
    for name in case:
        if name.startswith("weights/") and name.endswith(shared):
            heads = case[name].reshape(-1, 2, 4, case[name].shape[-1])  # parts, heads, head size, inputs
            apart[name] = np.repeat(heads, 3, axis=1).reshape(-1, case[name].shape[-1])
    got, want = (jax.jit(parity.merge(*parity.decoder(c)))(case["tokens"], case["z"]) for c in (apart, case))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
