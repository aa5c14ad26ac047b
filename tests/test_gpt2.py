"""The decoder with the latent inside against transformers' GPT2Model given the latent as a past position."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from miracle_jax import config
from miracle_jax.gpt2 import Gpt2

CASES = [
    "gpt2_gelu_tanh",
    "gpt2_silu",
    pytest.param(
        {"seed": 21, "width": 24, "heads": 3, "depth": 3, "activation": "relu", "latent": 40, "rows": 2, "length": 9},
        marks=pytest.mark.torch,
        id="live",
    ),
]
NOTHING_HIDDEN = np.ones((), bool)


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def build(case, remat=False):
    """(graphdef, parameters) of our decoder with the case's weights."""
    weights = parity.group(case, "weights")
    shape = config.Gpt2(
        vocab_size=len(weights["transformer.wte.weight"]),
        max_positions=len(weights["transformer.wpe.weight"]),
        **parity.shape(case),
    )
    latent = case["shape/latent"].item()
    model = nnx.eval_shape(lambda: Gpt2(shape, latent, jnp.float32, remat, nnx.Rngs(0)))
    params = parity.gpt2(weights)
    expected = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(model)))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
    return nnx.graphdef(model), params


@pytest.fixture(scope="module", params=CASES)
def compared(request):
    """What torch computed for a case, and what we compute: "layers", "logits" and "gradients" of each."""
    case = parity.load(request.param)
    graphdef, params = build(case, remat=request.param == "gpt2_silu")

    @jax.jit
    def run(params, z):
        def objective(inputs):
            logits = parity.merge(graphdef, inputs["params"])(case["tokens"], inputs["z"])
            return jnp.sum(logits * case["probe"]), logits

        def hidden(depth):
            cut = parity.merge(graphdef, params, layers=depth)
            past = jax.tree.map(lambda leaf: leaf[:depth], cut.latent_key_values(z))
            return cut.hidden(case["tokens"], z, past, NOTHING_HIDDEN, 1)[0]

        gradients, logits = jax.grad(objective, has_aux=True)({"params": params, "z": z})
        layers = [hidden(depth) for depth in range(1, len(case["layers"]) + 1)]
        return {"layers": layers, "logits": logits, "gradients": gradients}

    gradients = {"params": parity.gpt2(parity.group(case, "gradients")), "z": case["z_gradient"]}
    return case | {"gradients": gradients}, run(params, case["z"])


def test_hidden_states_after_every_layer(compared):
    want, got = compared
    for i, layer in enumerate(want["layers"]):
        np.testing.assert_allclose(got["layers"][i], layer, rtol=1e-5, atol=1e-5, err_msg=f"layer {i}")


def test_logits(compared):
    want, got = compared
    np.testing.assert_allclose(got["logits"], want["logits"], rtol=1e-5, atol=1e-5)


def test_gradients_of_every_weight_and_of_the_latent(compared):
    want, got = compared
    parity.assert_trees_close(got["gradients"], want["gradients"], 1e-4)


@pytest.fixture(scope="module")
def small():
    """(compute, parameters, tokens (3, 6), z) of one golden case; compute(params, tokens, z) gives logits."""
    case = parity.load("gpt2_gelu_tanh")
    graphdef, params = build(case)
    return jax.jit(lambda params, *inputs: parity.merge(graphdef, params)(*inputs)), params, case["tokens"], case["z"]


@pytest.mark.parametrize("remat", [False, True])
def test_remat_recomputes_in_the_backward_pass(remat):
    case = parity.load("gpt2_gelu_tanh")
    graphdef, params = build(case, remat)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: parity.merge(graphdef, p)(case["tokens"], case["z"]).sum()))(params)
    assert ("remat" in str(jaxpr)) == remat


def test_a_token_changes_the_logits_from_its_own_place_on(small):
    compute, params, tokens, z = small
    before = np.asarray(compute(params, tokens, z))
    for place in range(tokens.shape[1]):
        other = tokens.copy()
        other[:, place] = (tokens[:, place] + 7) % 30
        after = np.asarray(compute(params, other, z))
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert (np.abs(after - before).max(axis=-1)[:, place:] > 1e-3).all()


@pytest.mark.parametrize("length", [4, 15])
def test_how_much_padding_follows_does_not_matter(small, length):
    compute, params, tokens, z = small
    other = np.full((len(tokens), length), 29, tokens.dtype)
    other[:, :4] = tokens[:, :4]
    before, after = compute(params, tokens, z), compute(params, other, z)
    np.testing.assert_allclose(after[:, :4], before[:, :4], rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(small):
    compute, params, tokens, z = small
    together, alone = compute(params, tokens, z)[1], compute(params, tokens[1:2], z[1:2])[0]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_every_layer_reads_its_own_chunk_of_the_latent_and_none_reads_the_last(small, chunk):
    compute, params, tokens, z = small
    width = params["norm"]["scale"].size
    kernel = params["latent_proj"]["kernel"].copy()
    kernel[:, chunk * width : (chunk + 1) * width] *= -1
    other = params | {"latent_proj": {"kernel": kernel}}
    same = np.array_equal(compute(other, tokens, z), compute(params, tokens, z))
    assert same == (chunk == 2)


def test_the_latent_embedding_reaches_every_token(small):
    compute, params, tokens, z = small
    without_key = params | {"latent_proj": {"kernel": np.zeros_like(params["latent_proj"]["kernel"])}}
    moved = np.abs(compute(without_key, tokens, z) - compute(without_key, tokens, z + 1)).max(axis=-1)
    assert (moved > 1e-3).all()

