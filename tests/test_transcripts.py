"""Transcripts as language models write them, and what becomes of those that are none."""

import time

import pytest

from miracle_jax.transcripts import Unparseable, parse

DIALOGUE = ("How is the sea?", "And the sky?"), ("Wide, and it waits for us.", "Full of small lights.")
(Q1, Q2), (A1, A2) = DIALOGUE


@pytest.mark.parametrize(
    "text",
    [
        f"[PersonA]: {Q1}\n\n[PersonB]: {A1}\n\n[PersonA]: {Q2}\n\n[PersonB]: {A2}",
        f"PersonA: {Q1}\r\nPersonB: {A1}\r\nPersonA: {Q2}\r\nPersonB: {A2}\r\n",
        f"Sure! Here is the dialogue:\n\n**PersonA:** {Q1}\n**PersonB:** {A1}\n**PersonA:** {Q2}\n**PersonB:** {A2}",
        f"1. **Person A**: {Q1}\n2. **Person B**: {A1}\n3. **Person A**: {Q2}\n4. **Person B**: {A2}",
        f"Turn 1:\nUser: {Q1}\nAssistant: {A1}\n\nTurn 2:\nUser: {Q2}\nAssistant: {A2}",
        f"Turn 1: [PersonA]: {Q1}\n        [PersonB]: {A1}\nTurn 2: [PersonA]: {Q2}\n        [PersonB]: {A2}",
        f"Q1: {Q1}\nA1: {A1}\nQ2: {Q2}\nA2: {A2}",
        f"A: {Q1}\nB: {A1}\nA: {Q2}\nB: {A2}",
        f"Topic: the sea\n\nAnna: {Q1}\nJoão (calmly): {A1}\nAnna: {Q2}\nJoão (calmly): {A2}\n\nNote: as asked.",
        f'- [PersonA] "{Q1}"\n- [PersonB] “{A1}”\n- [PersonA] "{Q2}"\n- [PersonB] “{A2}”',
        f"[PersonA]: {Q1} [PersonB]: {A1} [PersonA]: {Q2} [PersonB]: {A2}",
        f"A: {Q1} B: {A1} A: {Q2} B: {A2}",
        f"[PersonA]：{Q1}\n[PersonB]：{A1}\n[PersonA]：{Q2}\n[PersonB]：{A2}",
        f"```\nPersonA: {Q1}\nPersonB: {A1}\nPersonA: {Q2}\nPersonB: {A2}\n```\n\nI hope this helps!",
        f"### PersonA\n{Q1}\n\n### PersonB\n\n{A1}\n\n### PersonA\n{Q2}\n\n### PersonB\n{A2}\n\n---\nThe end.",
        f"[PersonA]: [PersonA]: {Q1}\n[PersonB]: Wide,\nand it\n> waits for us.\n[PersonA]:\n[PersonA]: {Q2}\n"
        "[PersonB]: Full of\n\n[PersonB]: *small* lights.\n(End of the conversation)",
        f"[PersonA]: {Q1}\n[PersonB]: {A1}\n[PersonA]: {Q2}\n[PersonB]: {A2}\n[PersonA]: And the wind?\n[PersonB]:",
        f"[PersonA]: {Q1}\n[PersonB]: Wide,\n\nand it waits for us.\n[PersonA]: {Q2}\n[PersonB]: {A2}\n\nMore?",
    ],
)  # fmt: skip
def test_what_models_write_around_a_dialogue_is_left_out(text):
    assert parse(text) == DIALOGUE


def test_a_word_before_a_colon_is_part_of_what_somebody_says():
    text = (
        "A: Which?\nB: There are two.\nPros: it is cheap.\n[Laughs] So be it.\nA: And?\nB: Well.\n[Laughs] That is all."
    )
    assert parse(text)[1] == ("There are two. Pros: it is cheap. [Laughs] So be it.", "Well. [Laughs] That is all.")


def test_what_only_looks_like_a_refusal_is_read():
    text = "[PersonA]: Why?\n[PersonB]: I'm sorry, but as an AI says in a film, it had to be."
    assert parse(text)[1] == ("I'm sorry, but as an AI says in a film, it had to be.",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "blanks"),
        ("I'm sorry, but I can't help with that.\n[PersonA]: Hi?\n[PersonB]: Hello.", "refusal"),
        ("As an AI language model, I do not chat.", "refusal"),
        ("I’m unable to write this.", "refusal"),
        ("Once upon a time there was a river. It said: nothing.", "fewer than two speakers"),
        ("[PersonA]: Hi?\n[PersonA]: Hello?", "fewer than two speakers"),
        ("[PersonA]: Hi?\n[PersonA]: Hello?\n[PersonB]: Yes.", "a question without an answer"),
        ("[PersonB]: Yes.\n[PersonA]: Hi?\n[PersonB]: Yes.", "before the first question"),
        ("[PersonA]: Hi?\n[PersonB]:\n[PersonA]: Well?\n[PersonB]: Yes.", "an empty turn"),
        ("[PersonA]: Hi?\n[PersonB]:", "no answer"),
        ("Ann: Hi?\nBen: Yes.\nCarl: No.", "more than two speakers"),
        ("A: Hi?\nB: Yes.\nC: No.\nA: So?\nB: Yes.", "more than two speakers"),
        ("A: Hi?\nB: Yes.\nSam: No.\nA: So?\nSam: No.\nB: Yes.", "more than two speakers"),
        ("[PersonA]: \ud800?\n[PersonB]: Yes.", "surrogate"),
    ],
)  # fmt: skip
def test_what_is_no_dialogue_is_refused_with_the_reason(text, reason):
    with pytest.raises(Unparseable, match=reason):
        parse(text)


def test_hostile_text_takes_time_in_proportion():
    for piece in (
        "PersonA: ",
        "User: ",
        "[",
        "* ",
        "_",
        "1. ",
        "\n",
        " \t",
        "(",
        "a\n",
        "Q: x\nA: y\n",
        "“",
        "sorry, i ",
    ):
        began = time.perf_counter()
        try:
            parse("User: a\nAssistant: " + piece * (2**18 // len(piece)) + "x")
        except Unparseable:
            pass
        assert time.perf_counter() - began < 4, piece
