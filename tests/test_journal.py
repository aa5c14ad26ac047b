"""Journals, which may be damaged."""

import json

import pytest

from miracle_jax.errors import UserError
from miracle_jax.journal import read_journal


def line(name, **more):
    return json.dumps({"id": name, "status": "done", "reason": "", "text": "x"} | more).encode() + b"\n"


def test_of_several_records_the_last_counts_and_a_torn_line_does_not(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + line("a", status="failed", tag=1) + b"\n" + line("b") + line("a") + line("c")[:-1]
    )
    assert [(record["id"], record["status"]) for record in read_journal(path)] == [("b", "done"), ("a", "done")]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (b"{\n", "j.jsonl:2 is no record of a journal"),
        (b"[]\n", "j.jsonl:2 is no record of a journal"),
        (b'{"id": "a"}\n', "j.jsonl:2: 'status' is missing or not a text"),
        (line(""), "j.jsonl:2: id ''"),
        (line("a", status="late"), "expected an id, and done or failed"),
        (b'"' + b"x" * (2**25 + 9), "j.jsonl:2 is no record of a journal.*at most"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, wrong, sentence):
    path = tmp_path / "j.jsonl"
    path.write_bytes(line("a") + wrong)
    with pytest.raises(UserError, match=sentence):
        list(read_journal(path))
