"""The encoder against transformers' BertModel: layer by layer, then whole, then gradients. What padding may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from miracle_jax import config
from miracle_jax.bert import Bert
from miracle_jax.layers import Compute

CASES = [
    "bert_gelu",
    "bert_relu",
    pytest.param(
        {"seed": 11, "width": 24, "heads": 3, "depth": 3, "activation": "gelu_tanh", "lengths": [1, 9, 5, 12]},
        marks=pytest.mark.torch,
        id="live",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def build(case, remat=False):
    """(graphdef, parameters) of our encoder with the case's weights."""
    weights = parity.group(case, "weights")
    shape = config.Bert(
        vocab_size=len(weights["embeddings.word_embeddings.weight"]),
        max_positions=len(weights["embeddings.position_embeddings.weight"]),
        **parity.shape(case),
    )
    model = nnx.eval_shape(lambda: Bert(shape, Compute(remat=remat), nnx.Rngs(0)))
    params = parity.bert(weights)
    expected = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(model)))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
    return nnx.graphdef(model), params


@pytest.fixture(scope="module", params=CASES)
def compared(request):
    """What torch computed for a case, and what we compute: "layers", "pooled" and "gradients" of each."""
    case = parity.load(request.param)
    graphdef, params = build(case, remat=request.param == "bert_relu")

    @jax.jit
    def run(params):
        def objective(params):
            pooled = parity.merge(graphdef, params)(case["tokens"], case["length"])
            return jnp.sum(pooled * case["probe"]), pooled

        gradients, pooled = jax.grad(objective, has_aux=True)(params)
        depths = range(1, len(case["layers"]) + 1)
        layers = [parity.merge(graphdef, params, layers=n).hidden(case["tokens"], case["length"]) for n in depths]
        return {"layers": layers, "pooled": pooled, "gradients": gradients}

    return case | {"gradients": parity.bert(parity.group(case, "gradients"))}, run(params)


def test_hidden_states_after_every_layer(compared):
    want, got = compared
    inside = np.arange(want["tokens"].shape[1]) < want["length"][:, None]
    for i, layer in enumerate(want["layers"]):
        np.testing.assert_allclose(got["layers"][i][inside], layer[inside], rtol=1e-5, atol=1e-5, err_msg=f"layer {i}")


def test_pooled_output(compared):
    want, got = compared
    np.testing.assert_allclose(got["pooled"], want["pooled"], rtol=1e-5, atol=1e-5)


def test_gradients_of_every_weight(compared):
    want, got = compared
    parity.assert_trees_close(got["gradients"], want["gradients"], 1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_remat_recomputes_in_the_backward_pass(remat):
    case = parity.load("bert_gelu")
    graphdef, params = build(case, remat)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: parity.merge(graphdef, p)(case["tokens"], case["length"]).sum()))(params)
    assert ("remat" in str(jaxpr)) == remat


@pytest.fixture(scope="module")
def padded():
    """(encode, tokens, length): rows of 7, 1 and 4 tokens in 9 places."""
    case = parity.load("bert_gelu")
    return jax.jit(parity.merge(*build(case))), case["tokens"], case["length"]


def test_what_stands_in_padding_does_not_matter(padded):
    encode, tokens, length = padded
    other = tokens.copy()
    for row, end in enumerate(length):
        other[row, end:] = (tokens[row, end:] + 7) % 30
    assert (other != tokens).sum() == 15
    np.testing.assert_array_equal(encode(other, length), encode(tokens, length))


@pytest.mark.parametrize("width", [7, 20])
def test_how_much_padding_there_is_does_not_matter(padded, width):
    encode, tokens, length = padded
    other = np.zeros((len(tokens), width), tokens.dtype)
    other[:, :7] = tokens[:, :7]
    np.testing.assert_allclose(encode(other, length), encode(tokens, length), rtol=1e-6, atol=1e-6)


def test_every_token_of_the_text_matters(padded):
    encode, tokens, length = padded
    whole = np.asarray(encode(tokens, length))
    for place in range(7):
        other = tokens.copy()
        other[:, place] = (tokens[:, place] + 7) % 30
        moved = np.abs(encode(other, length) - whole).max(axis=1) > 1e-3
        np.testing.assert_array_equal(moved, place < length)


def test_a_row_does_not_depend_on_its_batch(padded):
    encode, tokens, length = padded
    np.testing.assert_allclose(encode(tokens[2:], length[2:])[0], encode(tokens, length)[2], rtol=1e-6, atol=1e-6)
