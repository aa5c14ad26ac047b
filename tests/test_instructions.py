"""Prompts from the descriptions in a schema file."""

import re

import pytest

from miracle_jax import attributes
from miracle_jax.attributes import Schema
from miracle_jax.errors import UserError
from miracle_jax.instructions import ANSWER_WORDS, QUESTION_WORDS, TURNS, Instructions

MOOD = """
[[attribute]]
name = "mood"
aspects = ["calm", "very angry"]

[attribute.instructions.calm]
manner = "quietly"
speaker = "a calm person"
dialogue = "calm"
question = "How are you?"
answer = "Well, thank you, and in no hurry."

[attribute.instructions."very angry"]
manner = "with rage"
speaker = "a furious person"
dialogue = "furious"
question = "How are you?"
answer = "Do not ask me that again, I have had enough."
"""


@pytest.fixture
def schema_file(tmp_path):
    def write(text):
        path = tmp_path / "schema.toml"
        path.write_text(text)
        return path

    return write


def test_a_dialogue_of_one_aspect_has_its_description_and_every_rule():
    instructions = Instructions.load()
    prompt = instructions.dialogue((-1, 1, -1), "I keep bees.")
    told = instructions.descriptions[1][1]
    for text in (told.manner, told.speaker, told.dialogue, told.question, told.answer, "I keep bees."):
        assert text in prompt
    for rule in (QUESTION_WORDS, ANSWER_WORDS, f"at least {TURNS}", "never asks", "harmless", "toxic", "same verb"):
        assert str(rule) in prompt
    for other in (instructions.descriptions[1][0], *instructions.descriptions[0], *instructions.descriptions[2]):
        assert other.manner not in prompt


def test_a_combination_joins_its_aspects_and_has_no_example():
    instructions = Instructions.load()
    for labels in instructions.schema.personalities():
        prompt, reply = instructions.dialogue(labels, "I keep bees."), instructions.reply(labels)
        for of, i in zip(instructions.descriptions, labels, strict=True):
            for text in (of[i].manner, of[i].speaker):
                assert text in prompt and text in reply
            assert of[1 - i].manner not in prompt + reply
            assert of[i].answer not in prompt


def test_the_bundled_descriptions_keep_their_own_rules():
    for of in Instructions.load().descriptions:
        for told in of:
            assert 5 <= len(told.answer.split()) < ANSWER_WORDS and "?" not in told.answer
            assert len(told.question.split()) <= QUESTION_WORDS and told.question.endswith("?")


def test_a_reply_without_a_personality_is_told_the_form_only():
    reply = Instructions.load().reply((-1, -1, -1))
    assert f"fewer than {ANSWER_WORDS} words" in reply and "You are ;" not in reply


def test_an_attribute_of_ones_own(schema_file):
    path = schema_file(MOOD)
    instructions = Instructions.load(path)
    assert "with rage" in instructions.dialogue((1,), "x") and instructions.text == MOOD
    assert Schema.load(path) == instructions.schema  # what a model is trained with needs no instructions
    assert "instructions" not in instructions.schema.to_toml()


def test_everything_that_is_wrong_with_instructions_is_told_at_once(schema_file):
    text = MOOD.replace('manner = "quietly"', "manner = 7").replace("Do not ask me that again", "Why do you ask?")
    text += '\n[attribute.instructions.sad]\nmanner = "x"\n\n[[attribute]]\nname = "pace"\naspects = ["slow", "fast"]\n'
    with pytest.raises(UserError) as error:
        Instructions.load(schema_file(text))
    said = str(error.value)
    for problem in ("calm: manner", "'sad'", "very angry: the example's answer", "pace: slow", "pace: fast"):
        assert re.search(problem, said), (problem, said)


@pytest.mark.parametrize("given", ["3", '"text"', "[1, 2]", "{calm = 3}", "{calm = {manner = []}}"])
def test_instructions_of_another_kind_are_one_sentence(schema_file, given):
    text = f'[[attribute]]\nname = "mood"\naspects = ["calm", "angry"]\ninstructions = {given}\n'
    with pytest.raises(UserError, match="mood"):
        Instructions.load(schema_file(text))


def test_an_attribute_that_can_name_no_file_is_refused_before_anything_is_asked(schema_file):
    with pytest.raises(UserError, match="formal/informal: files of the corpus"):
        Instructions.load(schema_file(MOOD.replace('name = "mood"', 'name = "formal/informal"')))


def test_labels_that_are_no_personality_are_refused():
    with pytest.raises(UserError, match="in ids"):
        Instructions.load().dialogue((0, 1), "x")


def test_the_bundled_topics():
    lines = attributes.BUNDLED.with_name("topics.txt").read_text().splitlines()
    topics = [line for line in lines if line and not line.startswith("#")]
    assert len(topics) >= 300 and len({t.lower() for t in topics}) == len(topics)
    assert all(len(topic.split()) <= 15 for topic in topics)
