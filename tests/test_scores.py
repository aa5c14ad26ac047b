"""One system's scores, from judges and a language model whose answers are known."""

import json
import math

import numpy as np
import pytest

from miracle_jax import scores
from miracle_jax.attributes import Attribute, Schema
from miracle_jax.errors import UserError
from miracle_jax.scores import AVERAGE, Kept, accuracy, mean, score

REPLIES = ["the cat sat on the mat", "yes", " "]
REFERENCES = ["the cat sat on the mat", "yet", "a dog"]
CONTEXTS = [(["Where?"], [])] * 3
WANTED = np.array([[0, 1], [1, -1], [0, 0]])


class FakeJudges:
    schema = Schema((Attribute("style", ("a", "b")), Attribute("mood", ("a", "b", "c"))))
    fingerprint = "fake"

    def attributes(self, replies):
        known = {
            "style": ([0.9, 0.1], [0.6, 0.4], [0.5, 0.5]), "mood": ([0.2, 0.8, 0.0], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3])
        }  # fmt: skip
        return {name: np.array([rows[REPLIES.index(reply)] for reply in replies]) for name, rows in known.items()}

    def consistency(self, contexts, replies):
        return np.array([(0.9, 0.4, 0.7)[REPLIES.index(reply)] for reply in replies])


class FakeLanguageModel:
    fingerprint = "fake"

    def score(self, replies):
        return np.array([([5 * math.log(7), 6], [0, 1], [1, 3])[REPLIES.index(reply)] for reply in replies])


def test_the_papers_words_and_the_released_code():
    paper, released = score(REPLIES, REFERENCES, CONTEXTS, WANTED, FakeJudges(), FakeLanguageModel())
    np.testing.assert_equal(paper["style"], [1, 0, 0])  # who says nothing speaks with no aspect
    np.testing.assert_equal(paper["mood"], [1, np.nan, 0])
    np.testing.assert_equal(paper[AVERAGE], [1, 0, 0])
    np.testing.assert_allclose(released["style"], [0.9, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(released["mood"], [0.8, np.nan, 0.4], rtol=1e-6)
    np.testing.assert_allclose(released[AVERAGE], [0.85, 0.4, 0.45], rtol=1e-6)
    np.testing.assert_equal(paper["nli"], [1, 0, 0])
    np.testing.assert_allclose(released["nli"], [0.9, 0.4, 0.7], rtol=1e-6)
    assert mean(paper["ppl"]) == pytest.approx(7) and mean(released["ppl"]) == pytest.approx(7 ** (5 / 6))
    assert mean(paper["bleu"]) == mean(paper["rouge"]) == pytest.approx(1 / 3)
    assert released["bleu"][1] > paper["bleu"][1] == 0  # "yes" and "yet" share two characters and no word
    assert paper["distinct"].shape == (1,) and paper["self_bleu"].shape == (3,)


def test_references_score_100_and_what_nobody_measures_is_left_out():
    paper, released = score(REFERENCES, REFERENCES, CONTEXTS, WANTED)
    assert set(paper) == set(released) == {"bleu", "rouge", "distinct", "self_bleu"}
    assert mean(paper["rouge"]) < 1  # neither "yet" nor "a dog" has the pairs and triples that count
    long = [f"{reply} and so it went on" for reply in REFERENCES]
    np.testing.assert_allclose(score(long, long, CONTEXTS, WANTED).paper["bleu"], 1)


def test_a_perplexity_that_no_reply_has_is_none():
    silent = FakeLanguageModel()
    silent.score = lambda replies: np.zeros((len(replies), 2))
    paper, released = score(REPLIES, REFERENCES, CONTEXTS, WANTED, language_model=silent)
    assert mean(paper["ppl"]) is mean(released["ppl"]) is None


def test_accuracy_is_that_of_the_scores():
    paper = score(REPLIES, REFERENCES, CONTEXTS, WANTED, FakeJudges()).paper
    np.testing.assert_equal(accuracy(FakeJudges(), REPLIES, WANTED), np.stack([paper["style"], paper["mood"]], 1))


# ------------------------------------------------------------------------------------------------ kept scores


class Counting:
    """Scores a text by its length, and knows for which it was asked."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def __call__(self, texts):
        self.asked += texts
        if self.fails_at in texts:
            raise KeyboardInterrupt
        return np.array([[len(text), 1 / 3] for text in texts])


TEXTS = ["a", "bb", "a", "ccc", "dddd", "bb"]


def test_a_text_is_scored_once(tmp_path):
    compute = Counting()
    found = Kept(tmp_path).of("lengths", TEXTS, compute)
    np.testing.assert_array_equal(found, np.float32([[len(text), 1 / 3] for text in TEXTS]))
    assert compute.asked == ["a", "bb", "ccc", "dddd"]
    again = Kept(tmp_path).of("lengths", ["eeeee", *TEXTS], compute)
    np.testing.assert_array_equal(again[1:], found)
    assert compute.asked[4:] == ["eeeee"]
    Kept(tmp_path).of("others", ["a"], compute)
    assert compute.asked[5:] == ["a"]


def test_what_a_killed_run_scored_is_not_scored_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "CHUNK", 2)
    with pytest.raises(KeyboardInterrupt):
        Kept(tmp_path).of("lengths", TEXTS, Counting(fails_at="dddd"))
    path = tmp_path / "lengths.jsonl"
    with path.open("ab") as file:
        file.write(b'{"cut short": [1, 2]}')  # all but the end of the line
    compute = Counting()
    found = Kept(tmp_path).of("lengths", TEXTS, compute)
    assert compute.asked == ["ccc", "dddd"] and found[:, 0].tolist() == [1, 2, 1, 3, 4, 2]
    assert len(path.read_text().splitlines()) == 2 and all(map(json.loads, path.read_text().splitlines()))
    path.write_text("no scores\n" + path.read_text())
    with pytest.raises(UserError, match="lengths.jsonl is damaged; delete it"):
        Kept(tmp_path).of("lengths", TEXTS, compute)
