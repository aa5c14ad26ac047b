"""Word metrics against values worked out by hand."""

import importlib.resources
import json
import math

import numpy as np
import pytest

from miracle_jax import metrics

REFERENCE = "the cat sat on the mat"
REPLY = "the cat sat on mat"  # matches 5 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples; one word short


def test_bleu_is_the_mean_of_bleu_1_to_4():
    precisions = np.cumprod([5 / 5, 3 / 4, 2 / 3, 1 / 2])
    scores = [product ** (1 / n) for n, product in enumerate(precisions, start=1)]
    assert metrics.bleu(REPLY, REFERENCE) == pytest.approx(math.exp(1 - 6 / 5) * np.mean(scores), abs=1e-9)


def test_released_bleu_counts_characters():
    # "ab" in "abc": 2 of 2 characters, 1 of 1 pair; there are no longer ones, which method 1 counts as 0.1 of 1.
    short = math.exp(1 - 3 / 2)
    products = [1, 1, 0.1**0.33, 0.1**0.5]
    assert metrics.released_bleu("ab", "abc") == pytest.approx(short * np.mean(products), abs=1e-9)


def test_unrelated_replies_share_half_of_what_the_released_bleu_counts():
    file = importlib.resources.files("miracle_jax") / "corpus/test/personality.jsonl"
    replies = [json.loads(line)["output"][-1] for line in file.read_text().splitlines()[::16]]
    pairs = list(zip(replies, replies[1:], strict=False))
    assert np.mean([metrics.released_bleu(*pair) for pair in pairs]) > 0.4
    assert np.mean([metrics.bleu(*pair) for pair in pairs]) < 0.15


def test_rouge_is_the_mean_of_three_f1():
    one, two, longest = 2 * 5 / (5 + 6), 2 * 3 / (4 + 5), 2 * 5 / (5 + 6)
    assert metrics.rouge(REPLY, REFERENCE) == pytest.approx((one + two + longest) / 3, abs=1e-9)
    assert metrics.rouge("walking", "walked") == pytest.approx(2 / 3)  # the same stem; neither has a pair


@pytest.mark.parametrize("score", [metrics.bleu, metrics.released_bleu, metrics.rouge])
def test_a_reference_scores_1_and_an_empty_reply_0(score):
    assert score(REFERENCE, REFERENCE) == pytest.approx(1)
    assert score("", REFERENCE) == 0
    assert score("привет 你好", REFERENCE) < 0.2


def test_distinct_of_replies_and_of_all_together():
    found = metrics.distinct(["a a b", "a b", ""])
    within = [(2 / 3 + 1) / 2, 1, 1]  # pairs: a-a, a-b | a-b; triples: a-a-b
    together = [2 / 5, 2 / 3, 1]
    assert found["sentence"] == pytest.approx(np.mean(within))
    assert found["corpus"] == pytest.approx(np.mean(together))
    assert found["mean"] == pytest.approx((np.mean(within) + np.mean(together)) / 2)
    assert metrics.distinct(["", ""]) == {"sentence": 0, "corpus": 0, "mean": 0}


def test_released_distinct_divides_by_words():
    found = metrics.released_distinct(["a a b", "a b"])
    assert found["sentence"] == pytest.approx(np.mean([(2 / 3 + 1) / 2, (2 / 3 + 1 / 2) / 2, (1 / 3 + 0) / 2]))
    assert found["corpus"] == pytest.approx(np.mean([2 / 5, 2 / 5, 1 / 5]))


@pytest.mark.parametrize("score", [metrics.self_bleu, metrics.released_self_bleu])
def test_self_bleu_is_1_for_copies_and_low_for_strangers(score):
    assert score([REFERENCE] * 5, seed=0) == pytest.approx(np.ones(5))
    strangers = ["one two three four five", "six seven eight nine ten", "red green blue black white"]
    assert (score(strangers, seed=0) < 0.1).all()
    assert score([REFERENCE], seed=0).tolist() == [0]
    assert score(["", REFERENCE, REFERENCE], seed=0).sum() == pytest.approx(2)


def test_self_bleu_draws_150_instances_by_the_seed():
    replies = [f"{i} {i + 1} {i + 2} {i + 3} {i + 4}" for i in range(300)]
    assert np.isfinite(metrics.self_bleu(replies, seed=0)).sum() == 150
    np.testing.assert_array_equal(metrics.self_bleu(replies, seed=3), metrics.self_bleu(replies, seed=3))
    assert not np.array_equal(metrics.self_bleu(replies, seed=3), metrics.self_bleu(replies, seed=4))
    assert len(metrics.released_self_bleu(replies, seed=0)) == 300
