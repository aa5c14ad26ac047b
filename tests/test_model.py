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
from flax import nnx

import miracle_jax as mj
from miracle_jax import decode, pieces, sampler
from miracle_jax import model as model_module
from miracle_jax.config import Decode, Sample
from miracle_jax.errors import UserError

SOLVER = 1e-3  # of the energy: what the solver's step control may make of a difference in rounding
FIXED = Sample(fixed_steps=8, batch_size=4)  # without step control the energy repeats to rounding
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


def test_the_prior_reads_no_more_of_a_context_than_it_is_told(model):
    context = ["How are you?", "Well, thank you, but the winter was long.", "What about the river?"]
    alone = model.prior([context[-1:]], 1)
    room = len(model.tokenizers.encoder.context(context[-1:], [], 99))
    assert room >= 8
    for prior, same in ((model.prior([context], 1, room), True), (model.prior([context], 1), False)):
        assert np.array_equal(prior.mean, alone.mean) == same
    settings = dataclasses.replace(model.config.sample, context_tokens=room)
    short, whole = (model.reply(context, "lyrical", sample=s) for s in (settings, None))
    assert short.energy_before == model.reply(context[-1:], "lyrical").energy_before != whole.energy_before
    with pytest.raises(UserError, match="sample.context_tokens is 7; it must be 0 or at least 8"):
        model.reply(context, sample=dataclasses.replace(settings, context_tokens=7))


def test_contexts_are_encoded_in_the_bucket_that_holds_them_in_pieces_of_at_most_a_batch(model, monkeypatch):
    shapes, encode = [], model._encode

    def spy(encoder, tokens, length):
        assert (length <= tokens.shape[1]).all()
        shapes.append(tokens.shape)
        return encode(encoder, tokens, length)

    monkeypatch.setattr(model, "_encode", spy)
    contexts = [LAMP, *CONTEXTS, RIVER]
    options = {"sample": FIXED, "decode": Decode(max_new_tokens=14, batch_size=2)}
    together = model.replies(contexts, "lyrical, critical", **options)
    assert {width for _, width in shapes} == {bucket[0] for bucket in model.config.data.buckets}
    assert len(shapes) > 2 and max(rows for rows, _ in shapes) == 2
    shapes.clear()
    for context, reply in zip(contexts, together, strict=True):
        alone = model.reply(context, "lyrical, critical", **options)
        assert alone.text == reply.text
        assert alone.energy == pytest.approx(reply.energy, abs=1e-5)
        assert alone.energy_before == pytest.approx(reply.energy_before, abs=1e-5)
    assert [width for _, width in shapes] == [32, 16, 32, 16, 32, 16]


def test_cores_share_contexts_and_replies_unless_a_batch_size_is_given(model, replies, monkeypatch):
    places, generate = [], decode._generate

    def spy(*given, **named):
        places.append(named["places"])
        return generate(*given, **named)

    monkeypatch.setattr(decode, "_generate", spy)
    monkeypatch.setattr(pieces, "usable_cores", lambda: 2)
    monkeypatch.setattr(pieces, "LEAST_ROWS", 1)
    encoded, encode = [], model._encode
    monkeypatch.setattr(model, "_encode", lambda *given: (encoded.append(given[1].shape), encode(*given))[1])
    shared = model.replies(CONTEXTS, PERSONALITIES)
    assert [reply.text for reply in shared] == [reply.text for reply in replies]
    assert places == [2, 2] and encoded == [(1, 16), (1, 16), (1, 32), (1, 32)]
    places.clear()
    model.replies(CONTEXTS, PERSONALITIES, decode=dataclasses.replace(model.config.decode, batch_size=3))
    assert places == [2]  # in two rounds


def test_short_contexts_are_encoded_in_widths_of_their_own(model, monkeypatch):
    widths, encode, want = [], model._encode, model.prior([RIVER, LAMP], 2)

    def spy(encoder, tokens, length):
        widths.append(tokens.shape[1])
        return encode(encoder, tokens, length)

    monkeypatch.setattr(model, "_encode", spy)
    length = len(model.tokenizers.encoder.context(RIVER, [], 99))
    monkeypatch.setattr(model_module, "SHORT", (length - 1, length, 16, 64))
    got = model.prior([RIVER, LAMP], 2)
    assert widths == [length, model.config.data.buckets[1][0]] and length < model.config.data.buckets[0][0] == 16
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_contexts_gets_the_replies_that_it_gets_among_all(model):
    options = {"samples": 2, "seed": 3, "sample": FIXED, "decode": Decode(max_new_tokens=14, temperature=1.5)}
    whole = model.replies(CONTEXTS * 2, "lyrical", **options)
    tail = model.replies(CONTEXTS, "lyrical", first=4, **options)
    assert [reply.text for reply in tail] == [reply.text for reply in whole[4:]]
    assert [reply.energy for reply in tail] == pytest.approx([reply.energy for reply in whole[4:]], abs=1e-5)
    assert [reply.text for reply in whole[:4]] != [reply.text for reply in whole[4:]]  # the number decides
    assert len({reply.energy for reply in whole}) == 8


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
        ({"input": None}, "the input and the output of a context are lists of turns, not None"),
        ({"input": RIVER, "output": None}, "the input and the output of a context are lists of turns, not None"),
        ({"input": ["a", "b"], "output": 7}, "the input and the output of a context are lists of turns, not 7"),
        ({"input": [None]}, "a turn of the context is None; every turn is a text that is not empty"),
        (["\ud800 hi"], r"the turn '\\ud800 hi' has half of a surrogate pair .*; is it UTF-8\?"),
        (["hi", "\udcff", "hi"], r"the turn '\\udcff' has half of a surrogate pair"),
        (7, "a context is a list of turns or a mapping with input and output, not 7"),
    ],
)
def test_a_context_that_cannot_be_answered_is_one_sentence(model, context, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        model.reply(context)
    assert "\n" not in str(error.value) and str(error.value).isprintable()


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
        ({"personalities": 7}, "a personality is text, a list of aspects or a mapping, not 7"),
        ({"personalities": ["plain", 7, None, None]}, "a personality is text, a list of aspects or a mapping, not 7"),
        ({"personalities": [["plain", 7]] * 4}, "a personality lists aspects by name, not 7; write for instance"),
        ({"weights": {"attitude": "2"}}, "the weight of attitude is '2'; a weight is a finite number, at least 0"),
        ({"weights": {"attitude": None}}, "the weight of attitude is None; a weight is a finite number, at least 0"),
        ({"weights": {"attitude": math.inf}}, "the weight of attitude is inf; a weight is a finite number"),
        ({"samples": 1.5}, "samples is 1.5; expected a whole number, at least 1"),
        ({"samples": "4"}, "samples is '4'; expected a whole number, at least 1"),
        ({"seed": "a"}, "seed is 'a'; expected a whole number"),
        ({"seed": None}, "seed is None; expected a whole number"),
        ({"first": -1}, "first is -1; expected a whole number, at least 0"),
        ({"decode": Decode(max_new_tokens=10**6)}, r"max_new_tokens 1000000 \+ 2 exceeds decoder.max_positions 20$"),
        ({"decode": Decode(max_new_tokens=14, temperature=-1.0)}, "decode.temperature is -1.0; it must be at least 0"),
        ({"sample": Sample(rtol=0.0)}, "sample.rtol is 0.0; it must be above 0"),
        ({"sample": Sample(method="odee")}, "sample.method is 'odee'; it must be one of ode, langevin, sde"),
    ],
)
def test_a_mistaken_option_is_one_sentence(model, options, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        model.replies(CONTEXTS, **options)
    assert "\n" not in str(error.value)


def test_numbers_may_be_numpys(model):
    ours = model.replies([RIVER], "lyrical", samples=2, seed=3, weights={"attitude": 2})
    numpys = {"samples": np.int64(2), "seed": np.int32(3), "weights": {"attitude": np.float32(2)}}
    assert model.replies([RIVER], "lyrical", **numpys) == ours


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


def test_the_fingerprint_changes_with_every_parameter(model, tiny_run):
    assert mj.load(tiny_run.workdir).fingerprint() == model.fingerprint()
    seen = {model.fingerprint()}
    trees = {"miracle": model.miracle, **model.heads}
    for name, module in trees.items():
        graphdef, params = nnx.split(module)
        leaves, tree = jax.tree.flatten(nnx.to_pure_dict(params))
        for i, leaf in enumerate(leaves):
            moved = np.array(leaf)
            moved.flat[-1] = np.nextafter(moved.flat[-1], np.float32(np.inf))
            other = copy.copy(model)
            other_module = nnx.merge(graphdef, jax.tree.unflatten(tree, [*leaves[:i], moved, *leaves[i + 1 :]]))
            if name == "miracle":
                other.miracle = other_module
            else:
                other.heads = model.heads | {name: other_module}
            seen.add(other.fingerprint())
    assert len(seen) == 1 + sum(len(jax.tree.leaves(nnx.state(module))) for module in trees.values())
