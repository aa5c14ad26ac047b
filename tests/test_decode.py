"""Decoding: the cache against whole forward passes, who may influence a reply, where it ends, and what is drawn."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import random_model

from miracle_jax import config, decode
from miracle_jax.decode import generate, nucleus
from miracle_jax.gpt2 import Gpt2
from miracle_jax.layers import Compute
from miracle_jax.llama import Llama

SIZES = {"vocab_size": 20, "width": 16, "depth": 2, "heads": 2, "mlp": 32, "max_positions": 24}
BOS, EOS = 0, 1
ALLOWED = np.arange(20) % 18 != BOS  # not <bos>, and not the rows 18 and 19, which no token has (18 % 18 = 0)
ALLOWED[19] = False
GREEDY = config.Decode(max_new_tokens=12)
DRAWN = config.Decode(max_new_tokens=12, temperature=1.0, top_p=0.9)
ROWS = np.arange(8)
KEY = jax.random.key(0)
STEPS = []


class Counted(Gpt2):
    """Counts the loop's steps as they run."""

    def hidden(self, *args, **named):
        jax.debug.callback(lambda: STEPS.append(1))
        return super().hidden(*args, **named)


class Biased(Llama):
    """With a bias in its head, as Gpt2 has it, so that replies can be steered alike."""

    def __init__(self, shape, *args):
        super().__init__(shape, *args)
        self.head_bias = nnx.Param(jnp.zeros(shape.vocab_size))

    def logits(self, hidden):
        return super().logits(hidden) + self.head_bias[...]


def make(kind, dtype=jnp.float32):
    shape = config.Llama(**SIZES, kv_heads=1, tied=False) if issubclass(kind, Llama) else config.Gpt2(**SIZES)
    return random_model(lambda: kind(shape, 6, Compute(dtype), nnx.Rngs(0)))


def make_decoder(bias=(), kind=Gpt2):
    """A decoder that mostly ends its replies at different places; bias: scores added to single tokens."""
    decoder = make(kind)
    if issubclass(kind, Gpt2):
        decoder.positions.embedding[...] *= 4  # less repetition
    head_bias = np.zeros(20, np.float32)
    for token, score in {EOS: 1.0, **dict(bias)}.items():
        head_bias[token] = score
    decoder.head_bias[...] = head_bias
    return decoder


@pytest.fixture(scope="module", params=[Gpt2, Biased], ids=["gpt2", "llama"])
def decoder(request):
    return make_decoder(kind=request.param)


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def run(decoder, z, settings=GREEDY, rows=None, allowed=ALLOWED, key=KEY, prompt=(), total=None):
    rows = np.arange(len(z)) if rows is None else rows
    tokens, length = generate(decoder, z, rows, allowed, BOS, EOS, settings, key, *(prompt or (None, None)), total)
    return np.asarray(tokens), np.asarray(length)


def by_whole_passes(decoder, z, prompt=()):
    """Greedy replies; nothing but the tokens so far and z goes from step to step."""
    score = jax.jit(lambda tokens: decoder(tokens, z, None, *prompt))
    want = np.full((8, 13), EOS)
    want[:, 0] = BOS
    for step in range(12):
        logits = np.where(ALLOWED, score(want)[:, step], -np.inf)
        if step < GREEDY.min_new_tokens:
            logits[:, EOS] = -np.inf
        ended = (want[:, 1 : step + 1] == EOS).any(axis=1)
        want[:, step + 1] = np.where(ended, EOS, logits.argmax(axis=1))
    return want[:, 1:]


def test_cached_decoding_equals_whole_forward_passes_token_for_token(decoder, z):
    """Rows end at different places, one is cut."""
    tokens, length = run(decoder, z)
    np.testing.assert_array_equal(tokens, by_whole_passes(decoder, z))
    np.testing.assert_array_equal(length, (tokens != EOS).sum(axis=1))
    assert len(set(length)) >= 4 and length.max() == 12 and length.min() == 2


def test_so_it_does_after_prompts_of_different_lengths_whatever_their_padding(decoder, z):
    prompt, length = np.random.default_rng(1).integers(2, 18, (8, 7)), np.array([7, 1, 3, 5, 2, 4, 6, 7])
    tokens, _ = run(decoder, z, prompt=(prompt, length))
    np.testing.assert_array_equal(tokens, by_whole_passes(decoder, z, (prompt, length)))
    other = np.where(np.arange(7) < 7 - length[:, None], (prompt + 5) % 18, prompt)
    np.testing.assert_array_equal(run(decoder, z, prompt=(other, length))[0], tokens)
    assert (tokens != run(decoder, z)[0]).any(axis=1).sum() >= 4
    # A row of its own, with no padding.
    np.testing.assert_array_equal(run(decoder, z[2:3], prompt=(prompt[2:3, 4:], length[2:3]))[0][0], tokens[2])


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_reply_does_not_depend_on_its_batch_mates(decoder, z, settings):
    tokens, length = run(decoder, z, settings)
    order = np.array([5, 3, 0, 7, 1, 2, 6, 4])
    other = np.where(np.isin(order, (3, 6))[:, None], z[order], -z[order])  # only the latents 3 and 6 are kept
    mixed, mixed_length = run(decoder, other, settings, rows=order)
    for place, row in ((1, 3), (6, 6)):
        np.testing.assert_array_equal(mixed[place], tokens[row])
        assert mixed_length[place] == length[row]
    alone, _ = run(decoder, z[3:4], settings, rows=np.array([3]))
    np.testing.assert_array_equal(alone[0], tokens[3])


def test_after_its_end_a_reply_is_eos_only(decoder, z):
    for settings in (GREEDY, DRAWN):
        tokens, length = run(decoder, z, settings)
        assert tokens.shape == (8, 12)
        np.testing.assert_array_equal(tokens == EOS, np.arange(12) >= length[:, None])


@pytest.mark.parametrize("ending", [5.0, -100.0])
def test_the_loop_ends_when_every_reply_has_ended(z, ending):
    STEPS.clear()
    _, length = run(make_decoder({EOS: ending}, Counted), z)
    jax.effects_barrier()
    assert len(STEPS) == min(length.max() + 1, 12)
    assert length.max() == 12 if ending < 0 else length.max() < 8


@pytest.mark.parametrize("least", [0, 5, 12])
def test_eos_is_barred_from_the_first_tokens(z, least):
    _, length = run(make_decoder({EOS: 100.0}), z, config.Decode(min_new_tokens=least, max_new_tokens=12))
    np.testing.assert_array_equal(length, least)


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_tokens_that_are_not_allowed_never_appear(z, settings):
    eager = make_decoder({BOS: 100.0, 5: 100.0, 18: 100.0, 19: 100.0})
    tokens, _ = run(eager, z, settings, allowed=ALLOWED & (np.arange(20) != 5))
    assert not np.isin(tokens, [BOS, 5, 18, 19]).any()
    assert (run(eager, z, settings)[0][:, 0] == 5).all()


def test_one_seed_reproduces_the_draws_and_another_does_not(decoder, z):
    first, again, other = (run(decoder, z, DRAWN, key=jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).sum() >= 4


def test_rows_with_one_latent_draw_different_replies_unless_their_number_is_the_same(decoder, z):
    same = np.repeat(z[:1], 8, axis=0)
    tokens, _ = run(decoder, same, DRAWN)
    assert len(np.unique(tokens, axis=0)) >= 6
    tokens, _ = run(decoder, same, DRAWN, rows=np.full(8, 3))
    assert len(np.unique(tokens, axis=0)) == 1


def test_every_step_draws_anew(z):
    """Where all tokens are equally likely at every step, a row is not one token over and over."""
    uniform = jax.tree.map(jnp.zeros_like, make_decoder())
    settings = config.Decode(min_new_tokens=12, max_new_tokens=12, temperature=1.0)
    tokens, _ = run(uniform, z, settings)
    assert min(len(set(row)) for row in tokens) >= 4


def test_greedy_ignores_the_seed_and_a_small_temperature_approaches_it(decoder, z):
    want, _ = run(decoder, z)
    np.testing.assert_array_equal(run(decoder, z, key=jax.random.key(7))[0], want)
    cold = config.Decode(max_new_tokens=12, temperature=1e-3)
    np.testing.assert_array_equal(run(decoder, z, cold)[0], want)
    assert (run(decoder, z, DRAWN)[0] != want).any()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.5, 0.7)])
def test_draws_follow_the_softmax_at_the_temperature_within_the_nucleus(decoder, z, temperature, top_p):
    number = 4000
    settings = config.Decode(min_new_tokens=0, max_new_tokens=1, temperature=temperature, top_p=top_p)
    drawn, _ = run(decoder, np.repeat(z[:1], number, axis=0), settings)
    logits = np.array(decoder(np.array([[BOS]]), z[:1])[0, 0], np.float64) / temperature
    p = np.where(ALLOWED, np.exp(logits - logits.max()), 0)
    p /= p.sum()
    order = np.argsort(-p)
    p[order[np.searchsorted(np.cumsum(p[order]), top_p) + 1 :]] = 0
    p /= p.sum()
    share = np.bincount(drawn[:, 0], minlength=20) / number
    assert (share[p == 0] == 0).all()
    np.testing.assert_allclose(share, p, atol=5 * 0.5 / number**0.5)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.74, [1, 3]),
        (0.76, [1, 3, 0]),
        (0.91, [1, 3, 0, 2]),
        (1.0, [1, 3, 0, 2, 4]),
    ],
)
def test_nucleus_by_hand(top_p, kept):
    """The fewest most probable tokens that reach top_p; their scores stay as they are."""
    logits = np.log(np.array([[0.15, 0.5, 0.1, 0.25, 1e-12]], np.float32)) + 3
    got = np.asarray(nucleus(logits, top_p))[0]
    np.testing.assert_array_equal(np.flatnonzero(got > -1e20), sorted(kept))
    np.testing.assert_array_equal(got[kept], logits[0, kept])


def test_nucleus_keeps_all_of_several_equal_tokens_at_its_edge_and_works_row_by_row():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.2], [0.97, 0.01, 0.01, 0.01]], np.float32))
    np.testing.assert_array_equal(nucleus(logits, 0.5) > -1e20, [[True] * 4, [True, False, False, False]])


def test_nucleus_of_1_keeps_what_rounding_would_drop():
    """Where the sum of the largest probabilities rounds to 1, the smaller ones still belong."""
    logits = np.array([[20.0, 0.0, -20.0]], np.float32)
    assert (nucleus(logits, 1.0) == logits).all()


@pytest.mark.parametrize(("kind", "cache"), [(Gpt2, "[8,2,13,8]"), (Llama, "[8,1,13,8]")], ids=["gpt2", "llama"])
def test_a_bfloat16_decoder_keeps_its_cache_in_bfloat16(z, kind, cache):
    """And Llama's has no more heads than its keys have."""
    jaxpr = str(jax.make_jaxpr(partial(run_abstract, make(kind, jnp.bfloat16)))(z))
    assert f"bf16{cache}" in jaxpr and f"f32{cache}" not in jaxpr


def run_abstract(decoder, z):
    return generate(decoder, z, ROWS, ALLOWED, BOS, EOS, GREEDY, KEY)


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_replies_do_not_depend_on_how_many_are_under_way(decoder, z, settings):
    """Fewer places than replies: those that end leave theirs to others, which join a ring that is in use."""
    many, rows = np.concatenate([z, z[::-1] * 2, z * 0.5]), np.arange(24)
    want = run(decoder, many, dataclasses.replace(settings, batch_size=24), rows=rows)
    for places in (1, 3, 8):
        got = run(decoder, many, dataclasses.replace(settings, batch_size=places), rows=rows)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_rounds_are_equally_full(decoder, z, monkeypatch):
    used, inner = [], decode._generate

    def spy(*given, places, **named):
        used.append(places)
        return inner(*given, places=places, **named)

    monkeypatch.setattr(decode, "_generate", spy)
    for batch_size, total in ((8, None), (6, None), (5, 7), (3, 7), (0, 5)):
        run(decoder, z, dataclasses.replace(GREEDY, batch_size=batch_size), total=total)
    assert used == [8, 4, 4, 3, 5]  # in 1, 2, 2, 3 and 1 rounds


def test_a_ring_that_grows_in_the_middle_changes_nothing(decoder, z, monkeypatch):
    many, rows = np.concatenate([z, z[::-1] * 2, z * 0.5]), np.arange(24)
    settings = dataclasses.replace(GREEDY, batch_size=3)
    want = run(decoder, many, settings, rows=rows)
    assert want[1].max() == 12 and want[1].min() < 4
    jax.clear_caches()
    monkeypatch.setattr(decode, "FIRST_RING", 2)  # 2, 4, 8, 12 columns
    got = run(decoder, many, settings, rows=rows)
    jax.clear_caches()
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_replies_beyond_the_total_are_not_written(decoder, z):
    tokens, length = run(decoder, z, GREEDY, total=3)
    want, lengths = run(decoder, z, GREEDY)
    np.testing.assert_array_equal(tokens[:3], want[:3])
    np.testing.assert_array_equal(length, [*lengths[:3], 0, 0, 0, 0, 0])
    assert (np.asarray(tokens[3:]) == EOS).all()


def test_prompts_are_read_when_a_reply_gets_its_place(decoder, z):
    prompt, length = np.random.default_rng(1).integers(2, 18, (8, 7)), np.array([7, 1, 3, 5, 2, 4, 6, 7])
    want, _ = run(decoder, z, prompt=(prompt, length))
    got, _ = run(decoder, z, dataclasses.replace(GREEDY, batch_size=3), prompt=(prompt, length))
    np.testing.assert_array_equal(got, want)
