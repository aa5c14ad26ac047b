"""The schema: names <-> ids, personalities as people write them, and every message for wrong ones."""

import pytest

from miracle_jax.attributes import Attribute, Schema
from miracle_jax.errors import UserError

PAPER = Schema.load()
SHARED = Schema((Attribute("day", ("calm", "wild")), Attribute("night", ("calm", "loud", "very-loud"))))


def test_bundled_schema_has_the_released_ids():
    assert PAPER.names == ("language_style", "attitude", "mental_characteristic")
    assert PAPER.sizes == (2, 2, 2)
    ids = {aspect: i for a in PAPER.attributes for i, aspect in enumerate(a.aspects)}
    assert ids == {"plain": 0, "lyrical": 1, "pessimistic": 0, "optimistic": 1, "emotional": 0, "critical": 1}


@pytest.mark.parametrize("name", ["language_style", "language style", "Language-Style", "  LANGUAGE  STYLE "])
def test_attribute_names_ignore_case_and_separators(name):
    assert PAPER.attribute_index(name) == 0


@pytest.mark.parametrize(
    ("personality", "ids"),
    [
        ("lyrical, optimistic, critical", (1, 1, 1)),
        ("Critical,plain", (0, -1, 1)),
        ({"attitude": "optimistic"}, (-1, 1, -1)),
        ({"attitude": 1, "language style": None}, (-1, 1, -1)),
        (["lyrical", "attitude=pessimistic"], (1, 0, -1)),
        ("mental characteristic = emotional", (-1, -1, 0)),
        ("plain, plain", (0, -1, -1)),
        ("", (-1, -1, -1)),
        (" , ", (-1, -1, -1)),
        (None, (-1, -1, -1)),
        ({}, (-1, -1, -1)),
    ],
)
def test_parse(personality, ids):
    assert PAPER.parse(personality) == ids


@pytest.mark.parametrize(
    ("personality", "message"),
    [
        ("lyrcal", "unknown aspect 'lyrcal'; did you mean lyrical?"),
        ("xyz", "unknown aspect 'xyz'; there are plain, lyrical, pessimistic, optimistic, emotional, critical"),
        ("plain, lyrical", "plain and lyrical are two aspects of language_style; choose one"),
        ({"atitude": "optimistic"}, "unknown attribute 'atitude'; did you mean attitude?"),
        ({"attitude": "plain"}, "attitude has no aspect 'plain'; there are pessimistic, optimistic"),
        ({"attitude": 2}, "attitude has no aspect 2; there are 0 pessimistic, 1 optimistic"),
        ({"attitude": True}, "attitude has no aspect True"),
        ([3], "a personality lists aspects by name, not 3; write for instance 'lyrical, optimistic, critical'"),
    ],
)
def test_parse_refuses(personality, message):
    with pytest.raises(UserError) as error:
        PAPER.parse(personality)
    assert message in str(error.value)


def test_an_aspect_name_that_attributes_share_needs_its_attribute():
    with pytest.raises(UserError, match="'calm' is an aspect of several attributes; write day=calm or night=calm"):
        SHARED.parse("calm")
    assert SHARED.parse("night=calm") == (-1, 0)
    assert SHARED.parse("very loud") == (-1, 2)


@pytest.mark.parametrize("schema", [PAPER, SHARED])
def test_describe_is_the_inverse_of_parse(schema):
    assert schema.describe([-1] * len(schema.names)) == ""
    for ids in schema.personalities():
        assert schema.parse(schema.describe(ids)) == ids
        assert schema.parse(schema.describe((ids[0], *[-1] * (len(ids) - 1)))) == (ids[0], *[-1] * (len(ids) - 1))


def test_personalities_are_all_combinations_in_order_of_ids():
    assert SHARED.personalities() == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_schema_survives_its_file(tmp_path):
    schema = Schema((Attribute('quo"ted \\ name', ("überschwänglich", "ruhig")), *SHARED.attributes))
    schema.save(tmp_path / "schema.toml")
    assert Schema.load(tmp_path / "schema.toml") == schema


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[attribute]", "is not valid TOML"),
        ("", "needs at least one [[attribute]]"),
        ("attribute = 3", "needs at least one [[attribute]]"),
        ("[[attributes]]\nname = 'a'", "unknown entry 'attributes'"),
        ("[[attribute]]\nname = 'a'\naspects = ['b']", "attribute 1: aspects must be a list of at least two names"),
        ("[[attribute]]\naspects = ['b', 'c']", "attribute 1: None cannot be a name"),
        ("[[attribute]]\nname = 'a'\naspects = ['b', 3]", "attribute 1: 3 cannot be a name"),
        ("[[attribute]]\nname = 'a'\naspects = ['b', 'c,d']", "'c,d' cannot be a name"),
        ("[[attribute]]\nname = 'a'\naspects = ['b', 'B ']", "attribute 1: aspect 'B ' is there twice"),
        ("[[attribute]]\nname = 'a'\naspects = ['b', 'c']\nids = [1]", "unknown entry 'ids'; it takes name and"),
        (
            "[[attribute]]\nname = 'x y'\naspects = ['b', 'c']\n[[attribute]]\nname = 'x_y'\naspects = ['d', 'e']",
            "attribute 'x_y' is there twice",
        ),
    ],
)
def test_a_malformed_schema_is_refused_by_file_and_reason(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        Schema.load(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_schema_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="schema file .*none.toml does not exist"):
        Schema.load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(UserError, match="latin.toml is not UTF-8 at byte 5"):
        Schema.load(tmp_path / "latin.toml")
