"""Journals, which may be damaged."""

import json
import os
import resource

import pytest

from miracle_jax.errors import UserError
from miracle_jax.journal import Journal, read_journal


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


def test_what_is_appended_follows_the_last_whole_line(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(line("a") + line("b", text="y" * 200_000)[:-1])
    with Journal(path) as journal:
        assert path.read_bytes() == line("a")
        journal.append(json.loads(line("c", text="a\n\ud800")))
    assert [(record["id"], record["text"]) for record in read_journal(path)] == [("a", "x"), ("c", "a\n\ud800")]
    path.write_bytes(b"torn")
    with Journal(path):
        assert path.read_bytes() == b""


def test_a_disk_that_is_full_damages_nothing(tmp_path):
    path = tmp_path / "j.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        journal.append(json.loads(line("a")))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(UserError, match="j.jsonl could not be written: File too large; what it has is intact"):
                journal.append(json.loads(line("b", text="y" * 2000)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == line("a")
    with Journal(path) as journal:
        journal.append(json.loads(line("b")))
    assert path.read_bytes() == line("a") + line("b")


def test_a_pipe_is_no_journal(tmp_path):
    os.mkfifo(tmp_path / "j.jsonl")
    with pytest.raises(UserError, match="is a pipe"):
        Journal(tmp_path / "j.jsonl")
