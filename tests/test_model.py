"""A trained model from Python: contexts and personalities in, replies out. The model is that of tests/micro.py."""

import copy
import dataclasses
import json
import logging
import math
import shutil

import jax
import numpy as np
import pytest

import miracle_jax as mj
from miracle_jax import sampler
from miracle_jax.config import Decode, Sample
from miracle_jax.errors import UserError

SOLVER = 1e-3  # of the energy: what the solver's step control may make of a difference in rounding
RIVER, LAMP = ["What about the river?"], ["How are you?", "Well.", "What about the lamp?"]
CONTEXTS = [RIVER, LAMP, ["What about the bread?"], ["What about the song?", "Fine.", "How are you?"]]
PERSONALITIES = ["lyrical", "plain, optimistic, critical", None, {"attitude": "pessimistic"}]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def replies(model):
    return model.replies(CONTEXTS, PERSONALITIES)


# ------------------------------------------------------------------------------------------------ what comes out


def test_a_reply_tells_what_the_latent_shows(model, replies):
    assert len({reply.text for reply in replies}) > 1  # the model says something
    expected = ["lyrical", "plain, optimistic, critical", "", "pessimistic"]
    assert [reply.personality for reply in replies] == expected
    for reply in replies:
        assert {name: list(p) for name, p in reply.aspects.items()} == {
            attribute.name: list(attribute.aspects) for attribute in model.schema.attributes
        }
        assert all(sum(p.values()) == pytest.approx(1, abs=1e-5) for p in reply.aspects.values())
        wanted = [aspect.strip() for aspect in reply.personality.split(",") if aspect]
        surprise = -sum(math.log(p[aspect]) for p in reply.aspects.values() for aspect in p if aspect in wanted)
        assert reply.energy == pytest.approx(surprise, abs=1e-5)  # every weight is 1
        assert reply.ok and reply.steps >= 1
        assert reply.energy < reply.energy_before if wanted else reply.energy == reply.energy_before == 0


def test_a_batch_says_what_single_calls_say(model, replies):
    for context, personality, together in zip(CONTEXTS, PERSONALITIES, replies, strict=True):
        alone = model.reply(context, personality)
        assert alone.text == together.text and alone.energy == pytest.approx(together.energy, abs=SOLVER)
    assert model.replies([]) == []


def test_contexts_are_lists_of_turns_or_mappings_as_in_data_files(model, replies):
    questions, answers = [LAMP[0], LAMP[2]], [LAMP[1]]
    for context in (
        tuple(LAMP), {"input": questions, "output": answers}, {"input": tuple(questions), "output": (*answers, "Yes.")}
    ):  # fmt: skip
        assert model.reply(context, PERSONALITIES[1]) == model.reply(LAMP, PERSONALITIES[1])
    assert model.reply({"input": RIVER}, "lyrical") == model.reply(RIVER, ["lyrical"])


def test_one_personality_serves_all_contexts(model):
    one = model.replies(CONTEXTS, "lyrical, critical")
    assert one == model.replies(CONTEXTS, ["lyrical, critical"] * 4)
    assert model.replies(CONTEXTS) == model.replies(CONTEXTS, [None] * 4)
    assert model.replies(CONTEXTS, {"attitude": "optimistic"})[3].personality == "optimistic"


def test_a_long_conversation_is_cut_not_refused(model):
    long = ["How are you?", "Well."] * 30 + RIVER
    assert model.reply(long, "lyrical").ok


# ------------------------------------------------------------------------------------------------ the controls


def test_weights_pull_and_weight_0_is_no_personality(model):
    wanted = "lyrical, optimistic"
    free, light, heavy = (model.reply(RIVER, wanted, weights={"language style": w, "attitude": 0}) for w in (0, 0.5, 5))
    none = model.reply(RIVER)
    assert free.text == none.text and free.aspects == none.aspects and free.energy == 0
    seen = [reply.aspects["language_style"]["lyrical"] for reply in (free, light, heavy)]
    assert seen[0] < seen[1] < seen[2]
    assert model.reply(RIVER, wanted, sample=Sample(weight=0.0)).aspects == none.aspects
    assert light.energy == pytest.approx(-0.5 * math.log(seen[1]), abs=1e-5)


def test_of_several_samples_the_lowest_energy_speaks(model):
    draws = model.replies([RIVER] * 4, "lyrical, critical", seed=5, sample=Sample(start="draw"))
    energies = [reply.energy for reply in draws]
    assert len(set(energies)) == 4
    best = model.reply(RIVER, "lyrical, critical", seed=5, samples=4)
    assert best.energy == pytest.approx(min(energies), abs=SOLVER)
    assert best.text == draws[int(np.argmin(energies))].text
    two = model.replies([RIVER, LAMP], ["lyrical, critical", "plain"], seed=5, samples=4)
    assert two[0].energy == pytest.approx(best.energy, abs=SOLVER) and two[1].personality == "plain"


def test_a_sample_that_failed_is_not_the_best(model, monkeypatch):
    def one_fails(heads, *arguments):
        moved = sampler.sample(heads, *arguments)
        energy = moved.energy_after.copy()
        energy[2] = -1.0
        return moved._replace(energy_after=energy, ok=moved.ok & (np.arange(len(moved.ok)) != 2))

    monkeypatch.setattr("miracle_jax.model.sample", one_fails)
    assert model.reply(RIVER, "lyrical", samples=4).energy > 0


def test_the_seed_decides_what_is_drawn(model):
    def texts(seed):
        drawn = model.replies(
            CONTEXTS, "lyrical", seed=seed, samples=2, decode=Decode(max_new_tokens=14, temperature=2.0)
        )
        return [reply.text for reply in drawn], [reply.energy for reply in drawn]

    assert texts(0) == texts(0)
    assert texts(0)[0] != texts(1)[0] and texts(0)[1] != texts(1)[1]


def test_settings_of_a_call_replace_those_of_the_run(model):
    short = model.replies(CONTEXTS, "lyrical", decode=Decode(max_new_tokens=3))
    encode = model.tokenizers.decoder.encode
    assert all(len(encode(reply.text)) <= 3 for reply in short)
    assert model.reply(RIVER, "lyrical", sample=Sample(fixed_steps=7)).steps == 7


def test_heads_are_those_that_training_found_better_unless_named(model, tiny_run):
    facts = json.loads((tiny_run.workdir / "model.json").read_text())
    by_name = {
        name: model.reply(RIVER, "lyrical", sample=Sample(heads=name)).energy for name in ("auto", "joint", "refit")
    }
    assert by_name["joint"] != by_name["refit"] and by_name["auto"] == by_name[facts["heads"]]
    lacking = copy.copy(model)
    lacking.heads = {"joint": model.heads["joint"]}
    with pytest.raises(UserError, match="sample.heads is refit but this run has only joint heads"):
        lacking.reply(RIVER, "lyrical", sample=Sample(heads="refit"))


# ------------------------------------------------------------------------------------------------ failure is data


def test_a_solve_that_does_not_arrive_is_reported(model, caplog):
    with caplog.at_level(logging.WARNING):
        late = model.reply(RIVER, "lyrical", sample=Sample(max_steps=1))
    assert not late.ok and late.steps == 1 and late.text
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == ("1 of 1 latents did not arrive within sample.max_steps = 1; raise it or loosen sample.rtol")


def test_a_latent_that_is_not_finite_is_reported_as_such(model, caplog):
    with caplog.at_level(logging.WARNING):
        burst = model.reply(RIVER, "lyrical", weights={"language_style": 3e38}, sample=Sample(fixed_steps=2))
    assert not burst.ok and not math.isfinite(burst.energy)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "1 of 1 latents are not finite; lower their weights or take smaller steps"


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("context", "sentence"),
    [
        ("How are you?", r"a context is a list of turns, not a text; write \['How are you\?'\]"),
        (None, "a context is a list of turns or a mapping with input and output, not None"),
        ([], "has M questions and M - 1 replies, not 0 and 0"),
        (["How are you?", "Well."], "ends with a question: it has M questions and M - 1 replies, not 1 and 1"),
        ({"input": ["a", "b", "c"], "output": ["d"]}, "M - 1 replies, not 3 and 1"),
        ({"input": [], "output": []}, "M - 1 replies, not 0 and 0"),
        ({"input": "How are you?"}, "the input and the output of a context are lists of turns, not a text"),
        (["How are you?", " ", "Really?"], "a turn of the context is ' '; every turn is a text that is not empty"),
        (["How are you?", 3, "Really?"], "a turn of the context is 3; every turn is a text"),
    ],
)
def test_a_context_that_cannot_be_answered_is_one_sentence(model, context, sentence):
    with pytest.raises(UserError, match=sentence):
        model.reply(context)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"personalities": "lyrica"}, "unknown aspect 'lyrica'; did you mean lyrical"),
        ({"personalities": {"atitude": "optimistic"}}, "unknown attribute 'atitude'; did you mean attitude"),
        ({"personalities": "plain, lyrical"}, "plain and lyrical are two aspects of language_style; choose one"),
        ({"personalities": ["plain", "lyrical"]}, "there are 4 contexts but 2 personalities; give one for each"),
        ({"personalities": "plain", "weights": {"mood": 1}}, "unknown attribute 'mood'"),
        ({"personalities": "plain", "weights": {"attitude": -1}}, "weight of attitude is -1; a weight is a finite"),
        ({"personalities": "plain", "weights": {"attitude": math.nan}}, "weight of attitude is nan; a weight is"),
        ({"samples": 0}, "samples is 0; a context needs at least one latent"),
    ],
)
def test_a_mistaken_option_is_one_sentence(model, options, sentence):
    with pytest.raises(UserError, match=sentence):
        model.replies(CONTEXTS, **options)


def test_a_folder_without_a_finished_run_is_one_sentence(tiny_run, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no run .*; train one with python -m miracle_jax.train"):
        mj.load(tmp_path)
    for name in ("config.json", "schema.toml"):
        shutil.copy(tiny_run.workdir / name, tmp_path)
    with pytest.raises(UserError, match=r"is not finished \(no model.json\); run its python -m miracle_jax.train"):
        mj.load(tmp_path)


def test_parameters_of_another_config_are_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"hidden": 8', '"hidden": 9'))
    with pytest.raises(UserError, match=r"heads.b1: checkpoint has \(3, 8\) float32, model expects \(3, 9\) float32"):
        mj.load(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ cost


def test_a_second_call_of_the_same_shape_compiles_nothing(model, replies):
    with jax.log_compiles(False):
        solved = sampler.solve._cache_size()
        model.replies(CONTEXTS[::-1], "lyrical, critical", weights={"attitude": 3.0}, seed=9)
    assert sampler.solve._cache_size() == solved


def test_a_reply_is_plain_data(replies):
    assert json.loads(json.dumps([dataclasses.asdict(reply) for reply in replies]))[0]["text"] == replies[0].text
