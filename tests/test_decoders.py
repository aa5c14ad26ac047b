"""The decoders with the latent inside against transformers' GPT2Model and LlamaModel given the latent as a past
position; then what holds for every family: who sees what, and where the latent goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

LIVE = {"seed": 21, "width": 24, "depth": 3, "latent": 40, "rows": 2, "length": 9}
LIVE_GPT2 = LIVE | {"heads": 3, "activation": "relu"}
LIVE_LLAMA = LIVE | {
    "heads": 4, "kv_heads": 2, "activation": "gelu", "rope_theta": 500.0, "norm_eps": 1e-5, "tied": False,
}  # fmt: skip
CASES = [
    "gpt2_gelu_tanh",
    "gpt2_silu",
    "llama_grouped",
    "llama_untied",
    pytest.param(LIVE_GPT2, marks=pytest.mark.torch, id="live_gpt2"),
    pytest.param(LIVE_LLAMA, marks=pytest.mark.torch, id="live_llama"),
]
FAMILIES = ["gpt2_gelu_tanh", "llama_grouped"]  # one case of each
NOTHING_HIDDEN = np.ones((), bool)


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=CASES)
def compared(request):
    """What torch computed for a case, and what we compute: "layers", "logits" and "gradients" of each."""
    case = parity.load(request.param)
    graphdef, params = parity.decoder(case, remat=request.param in ("gpt2_silu", "llama_untied"))

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

    gradients = {"params": parity.decoder_params(case, "gradients"), "z": case["z_gradient"]}
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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("remat", [False, True])
def test_remat_recomputes_in_the_backward_pass(name, remat):
    case = parity.load(name)
    graphdef, params = parity.decoder(case, remat)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: parity.merge(graphdef, p)(case["tokens"], case["z"]).sum()))(params)
    assert ("remat" in str(jaxpr)) == remat


@pytest.fixture(scope="module", params=FAMILIES)
def small(request):
    """(compute, parameters, tokens (3, 6), z) of one golden case; compute(params, tokens, z) gives logits."""
    case = parity.load(request.param)
    graphdef, params = parity.decoder(case)
    return jax.jit(lambda params, *inputs: parity.merge(graphdef, params)(*inputs)), params, case["tokens"], case["z"]


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


@pytest.mark.parametrize("name", FAMILIES)
def test_word_dropout_hides_that_share_of_the_words_but_never_bos_and_only_in_training(name):
    case = parity.load(name)
    graphdef, params = parity.decoder(case)
    decoder = parity.merge(graphdef, params)
    decoder.shape = dataclasses.replace(decoder.shape, word_dropout=0.3)
    rows, place = 400, 3
    tokens, z = np.tile(case["tokens"][:1], (rows, 1)), np.tile(case["z"][:1], (rows, 1))

    def reached(place, key):
        """Which rows notice another token at a place."""
        other = tokens.copy()
        other[:, place] = (tokens[:, place] + 7) % 30
        after, before = decoder(other, z, key), decoder(tokens, z, key)
        return np.abs(after - before).max(axis=(1, 2)) > 1e-3

    assert reached(place, jax.random.key(0)).mean() == pytest.approx(0.7, abs=0.06)
    assert reached(0, jax.random.key(0)).all()
    assert reached(place, None).all()


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_every_layer_reads_its_own_chunk_of_the_latent_and_none_reads_the_last(small, chunk):
    compute, params, tokens, z = small
    kernel = params["latent_proj"]["kernel"].copy()
    width = kernel.shape[1] // 3
    kernel[:, chunk * width : (chunk + 1) * width] *= -1
    other = params | {"latent_proj": {"kernel": kernel}}
    same = np.array_equal(compute(other, tokens, z), compute(params, tokens, z))
    assert same == (chunk == 2)


def test_the_latent_embedding_reaches_every_token(small):
    compute, params, tokens, z = small
    without_key = params | {"latent_proj": {"kernel": np.zeros_like(params["latent_proj"]["kernel"])}}
    moved = np.abs(compute(without_key, tokens, z) - compute(without_key, tokens, z + 1)).max(axis=-1)
    assert (moved > 1e-3).all()


def test_the_key_of_the_latent_reaches_every_token(small):
    compute, params, tokens, z = small
    without_embedding = params | {"latent_embed": {"kernel": np.zeros_like(params["latent_embed"]["kernel"])}}
    moved = np.abs(compute(without_embedding, tokens, z) - compute(without_embedding, tokens, z + 1)).max(axis=-1)
    assert (moved > 1e-3).all()


@pytest.fixture(scope="module", params=FAMILIES)
def in_two_chunks(request):
    """Rows of 9, 6 and 2 tokens and 3 more, as a whole and as a chunk padded on the left and the rest after it.

    Gives ((hidden, (keys, values)) of the whole rows, the same of the chunk, hidden of the rest, first (3,)); `first`
    is the number of a row's padding positions.
    """
    case = parity.load(request.param)
    graphdef, params = parity.decoder(case)
    z, first = case["z"], np.array([0, 3, 7])
    whole = np.random.default_rng(0).integers(0, 30, (3, 12))
    chunk, rest = np.full((3, 9), 29), np.zeros((3, 3), int)
    for row, pad in enumerate(first):
        chunk[row, pad:], rest[row] = np.split(whole[row, : 12 - pad], [9 - pad])

    @jax.jit
    def run(params):
        model = parity.merge(graphdef, params)
        latent = model.latent_key_values(z)
        of_chunk = model.hidden(chunk, z, latent, NOTHING_HIDDEN, 1 - first[:, None], first=first)
        past = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), latent, of_chunk[1])
        slots = np.arange(10)
        seen = (slots == 0) | (slots > first[:, None, None])
        of_rest, _ = model.hidden(rest, z, past, seen, 10 - first[:, None])
        return model.hidden(whole, z, latent, NOTHING_HIDDEN, 1), of_chunk, of_rest

    return *run(params), first


def test_padding_before_a_chunk_does_not_matter(in_two_chunks):
    (hidden, new), (padded_hidden, padded_new), _, first = in_two_chunks
    for row, pad in enumerate(first):
        np.testing.assert_allclose(padded_hidden[row, pad:], hidden[row, : 9 - pad], rtol=1e-5, atol=1e-5)
        for want, got in zip(new, padded_new, strict=True):
            np.testing.assert_allclose(got[:, row, :, pad:], want[:, row, :, : 9 - pad], rtol=1e-5, atol=1e-5)


def test_what_follows_a_padded_chunk_is_as_in_the_whole_row(in_two_chunks):
    (hidden, _), _, rest, first = in_two_chunks
    for row, pad in enumerate(first):
        np.testing.assert_allclose(rest[row], hidden[row, 9 - pad : 12 - pad], rtol=1e-5, atol=1e-5)
