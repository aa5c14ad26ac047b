"""The Python interface: contexts and personalities in, replies out."""

import dataclasses
import logging

import numpy as np
import pytest

import miracle_jax as mj
from miracle_jax.errors import UserError

CONTEXTS = [["What about the river?"], ["How are you?", "Well.", "What about the lamp?"], ["What about the song?"]]


@pytest.fixture(scope="module")
def model(tiny_run) -> mj.Model:
    return mj.load(tiny_run.workdir)


def changed(model, **fields):
    return dataclasses.replace(model.config.sample, **fields)


def test_a_reply_says_what_was_asked_what_was_read_and_how_the_solve_went(model):
    reply = model.reply(CONTEXTS[0], "lyrical, optimistic")
    assert isinstance(reply.text, str) and reply.ok and reply.steps > 0
    assert reply.personality == "lyrical, optimistic"
    assert reply.energy < reply.energy_before
    for attribute in model.schema.attributes:
        assert set(reply.aspects[attribute.name]) == set(attribute.aspects)
        assert sum(reply.aspects[attribute.name].values()) == pytest.approx(1, abs=1e-5)
    surprise = -np.log(reply.aspects["language_style"]["lyrical"]) - np.log(reply.aspects["attitude"]["optimistic"])
    assert reply.energy == pytest.approx(surprise, abs=1e-4)


def test_a_batch_gives_what_its_contexts_give_alone(model):
    wanted = ["lyrical", None, {"attitude": "pessimistic"}]
    together = model.replies(CONTEXTS, wanted)
    alone = [model.reply(context, personality) for context, personality in zip(CONTEXTS, wanted, strict=True)]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    for a, b in zip(together, alone, strict=True):
        assert a.energy == pytest.approx(b.energy, abs=1e-4)


def test_a_context_is_a_list_of_turns_or_a_mapping_and_a_reference_is_not_read(model):
    as_turns = model.reply(CONTEXTS[1], "lyrical")
    open_end = {"input": ["How are you?", "What about the lamp?"], "output": ["Well."]}
    assert model.reply(open_end, "lyrical") == as_turns
    assert model.reply(open_end | {"output": ["Well.", "A reference."]}, "lyrical") == as_turns


def test_no_context_is_no_reply(model):
    assert model.replies([]) == []


def test_without_a_personality_z_stays_where_the_prior_puts_it_and_weight_0_is_the_same(model):
    free = model.replies(CONTEXTS, None)
    zero = model.replies(CONTEXTS, "lyrical, optimistic, critical", weights=dict.fromkeys(model.schema.names, 0.0))
    assert [reply.text for reply in free] == [reply.text for reply in zero]
    assert all(reply.energy == reply.energy_before == 0 for reply in (*free, *zero))
    assert [reply.aspects for reply in free] == [reply.aspects for reply in zero]


def test_a_larger_weight_pulls_harder(model):
    def probability(weight):
        return model.reply(CONTEXTS[0], "pessimistic", weights={"attitude": weight}).aspects["attitude"]["pessimistic"]

    assert probability(0.0) < probability(0.2) < probability(5.0)


def test_of_several_latents_the_one_of_lowest_energy_speaks(model):
    drawn = changed(model, start="draw", max_steps=64)
    best = model.reply(CONTEXTS[0], "lyrical, critical", samples=6, seed=3, sample=drawn)
    aspects = np.array([model.schema.parse("lyrical, critical")] * 6, np.int32)
    every, _ = model.latents([CONTEXTS[0]] * 6, aspects, None, 1, 3, drawn)
    assert len(set(every.energy_after.tolist())) > 1
    assert best.energy == pytest.approx(every.energy_after.min(), abs=1e-5)


def test_one_seed_reproduces_and_another_draws_anew(model):
    warm = dataclasses.replace(model.config.decode, temperature=2.0)
    first, again, other = (
        [r.text for r in model.replies(CONTEXTS * 4, "lyrical", seed=seed, decode=warm)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_did_not_arrive_is_said_with_the_remedy(model, caplog):
    with caplog.at_level(logging.WARNING):
        reply = model.reply(CONTEXTS[0], "lyrical", sample=changed(model, max_steps=1, rtol=1e-6, atol=1e-6))
    assert not reply.ok
    assert "1 of 1 latents did not arrive within sample.max_steps = 1; raise it or loosen sample.rtol" in caplog.text


@pytest.mark.parametrize(
    ("context", "personality", "options", "sentence"),
    [
        ("Hello?", None, {}, "a context is a list of turns, not a text; write ['Hello?']"),
        ([], None, {}, "a context to answer ends with a question"),
        (["Hello?", "Hi."], None, {}, "it has M questions and M - 1 replies, not 1 and 1"),
        (["Hello?", " ", "Well?"], None, {}, "a turn of the context is ' '"),
        (["Hello?"], "optimstic", {}, "unknown aspect 'optimstic'; did you mean optimistic"),
        (["Hello?"], "lyrical, plain", {}, "plain"),
        (["Hello?"], {"mood": "good"}, {}, "unknown attribute 'mood'"),
        (["Hello?"], "lyrical", {"weights": {"attitude": -1.0}}, "the weight of attitude is -1.0"),
        (["Hello?"], "lyrical", {"weights": {"atitude": 1.0}}, "did you mean attitude?"),
    ],
)
def test_a_mistake_is_one_sentence(model, context, personality, options, sentence):
    with pytest.raises(UserError) as error:
        model.reply(context, personality, **options)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_as_many_personalities_as_contexts(model):
    with pytest.raises(UserError, match="there are 3 contexts but 1 personalities"):
        model.replies(CONTEXTS, ["lyrical"])


def test_a_folder_without_a_finished_run_is_one_sentence(tmp_path, tiny_run):
    with pytest.raises(UserError, match="holds no run"):
        mj.load(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_run.workdir / "config.json").read_bytes())
    with pytest.raises(UserError, match="is not finished"):
        mj.load(tmp_path)
