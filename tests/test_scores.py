"""One system's scores, from judges and a language model whose answers are known."""

import math

import numpy as np
import pytest

from miracle_jax.scores import score

REPLIES = ["the cat sat on the mat", "yes", ""]
REFERENCES = ["the cat sat on the mat", "yet", "a dog"]
CONTEXTS = [(["Where?"], [])] * 3
WANTED = np.array([[0, 1], [1, 0], [0, 0]])


class FakeJudges:
    def attributes(self, replies):
        assert replies == REPLIES
        return {
            "style": np.array([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]),
            "mood": np.array([[0.2, 0.8, 0.0], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3]]),
        }

    def consistency(self, contexts, replies):
        assert contexts == CONTEXTS and replies == REPLIES
        return np.array([0.9, 0.4, 0.2])


class FakeLanguageModel:
    def score(self, replies):
        return np.array([[5 * math.log(7), 6], [0, 1], [0, 0]])


def test_the_papers_words_and_the_released_code():
    found = score(REPLIES, REFERENCES, CONTEXTS, WANTED, FakeJudges(), FakeLanguageModel())
    paper, released = found["paper"], found["released"]
    assert paper["style"] == pytest.approx(2 / 3) and released["style"] == pytest.approx((0.9 + 0.4 + 0.5) / 3)
    assert paper["mood"] == pytest.approx(2 / 3) and released["mood"] == pytest.approx((0.8 + 0.1 + 0.4) / 3)
    assert paper["nli"] == pytest.approx(1 / 3) and released["nli"] == pytest.approx(0.5)
    assert paper["ppl"] == pytest.approx(7) and released["ppl"] == pytest.approx(7 ** (5 / 6))
    assert paper["bleu"] == paper["rouge"] == pytest.approx(1 / 3)
    assert released["bleu"] > paper["bleu"]  # "yes" and "yet" share two characters and no word


def test_references_score_100_and_what_nobody_measures_is_left_out():
    found = score(REFERENCES, REFERENCES, CONTEXTS, WANTED)
    assert set(found["paper"]) == set(found["released"]) == {"bleu", "rouge", "distinct", "self_bleu"}
    assert found["paper"]["rouge"] < 1  # neither "yet" nor "a dog" has the pairs and triples that count
    long = [f"{reply} and so it went on" for reply in REFERENCES]
    assert score(long, long, CONTEXTS, WANTED)["paper"]["bleu"] == pytest.approx(1)


def test_a_perplexity_that_no_reply_has_is_none():
    class Silent(FakeLanguageModel):
        def score(self, replies):
            return np.zeros((3, 2))

    found = score(REPLIES, REFERENCES, CONTEXTS, WANTED, language_model=Silent())
    assert found["paper"]["ppl"] is found["released"]["ppl"] is None
