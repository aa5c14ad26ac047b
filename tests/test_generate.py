"""The generate and evaluate commands on the model of tests/micro.py: a context, a file, a conversation, mistakes."""

import io
import itertools
import json
import shutil
import sys

import micro
import pytest

from miracle_jax import evaluate, generate

ALL = [", ".join(aspects) for aspects in itertools.product(
    ("plain", "lyrical"), ("pessimistic", "optimistic"), ("emotional", "critical")
)]  # fmt: skip
RIVER = "What about the river?"
LINES = [
    {"input": [RIVER], "output": [], "id": "a"},
    {"input": ["How are you?", "What about\u2028the \x85 lamp?"], "output": ["Well, wéll."], "tag": ["lyrical", None, 1]},
    {"input": ["What about the bread?"], "output": ["The bread is lost again."], "tag": [0, 0, 0], "personas": "food"},
    {"input": ["What about the song?"], "output": ["Like rain."], "tag": {"attitude": "optimistic"}},
    {"input": ["What about the road?"], "output": []},
]  # fmt: skip


@pytest.fixture(autouse=True)
def loaded_once(request, monkeypatch):
    if "tiny_model" in request.fixturenames:
        model = request.getfixturevalue("tiny_model")
        monkeypatch.setattr(generate, "load", lambda workdir: model)


@pytest.fixture
def data(tmp_path):
    return micro.write_lines(tmp_path / "contexts.jsonl", LINES)


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


# ------------------------------------------------------------------------------------------------ one context


def test_a_context_on_the_command_line(tiny_run, capsys):
    generate.main([str(tiny_run.workdir), "How are you?", "Well.", RIVER, "--personality", "Lyrical, critical"])
    reply, facts = capsys.readouterr().out.splitlines()
    assert reply and facts.startswith("    [lyrical, critical]  language style: ")
    assert "%  attitude: " in facts and "%  mental characteristic: " in facts
    assert "  energy 1." in facts and " -> " in facts and facts.endswith(" steps  ok")


def test_every_personality_and_flags_over_the_runs_settings(tiny_run, tiny_model, capsys):
    generate.main([str(tiny_run.workdir), RIVER, "--personality", "all", "--decode.max-new-tokens", "5", "--weight",
                   "attitude=2", "language-style=0", "--sample.fixed-steps", "9"])  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert [line.strip().partition("]")[0] for line in out[1::2]] == [f"[{personality}" for personality in ALL]
    assert all("  9 steps  ok" in line for line in out[1::2])
    assert all(len(tiny_model.tokenizers.decoder.encode(text)) <= 5 for text in out[::2])


def test_a_latent_that_failed_is_marked(tiny_run, tiny_model, capsys):
    generate.main([str(tiny_run.workdir), RIVER, "--personality", "lyrical", "--sample.max-steps", "1"])
    assert "NOT ok: it did not arrive" in capsys.readouterr().out
    generate.main([str(tiny_run.workdir), RIVER, "--personality", "lyrical", "--sample.fixed-steps", "2", "--weight",
                   "language_style=3e38"])  # fmt: skip
    assert "NOT ok: not finite" in capsys.readouterr().out


def test_help_shows_the_runs_settings(tiny_run, capsys):
    for argv in ([str(tiny_run.workdir), "-h"], [str(tiny_run.workdir), "--help"]):
        with pytest.raises(SystemExit) as stop:
            generate.main(argv)
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "WORKDIR" in text and "--personality" in text
        assert "--decode.max-new-tokens INT" in text and "(default: 14)" in text


# ------------------------------------------------------------------------------------------------ a file


def test_a_file_of_contexts_becomes_a_file_of_replies(tiny_run, tiny_model, data, tmp_path, capsys):
    out = tmp_path / "new" / "replies.jsonl"
    generate.main([str(tiny_run.workdir), "--data", data, "--out", str(out), "--weight", "attitude=2"])
    captured = capsys.readouterr()
    assert captured.err == f"wrote 5 replies to {out}\n" and captured.out == ""
    assert [path.name for path in out.parent.iterdir()] == ["replies.jsonl"]
    records = read_lines(out)
    assert [list(record) for record in records] == [
        ["id", "input", "output", "reference", "personality", "reply", "aspects", "energy", "energy_before", "steps", "ok"]
    ] * 5  # fmt: skip
    assert [record["id"] for record in records] == ["a", "1", "2", "3", "4"]
    assert [record["input"] for record in records] == [line["input"] for line in LINES]
    assert [record["output"] for record in records] == [[], ["Well, wéll."], [], [], []]
    assert [record["reference"] for record in records] == [None, None, "The bread is lost again.", "Like rain.", None]
    personalities = ["", "lyrical, critical", "plain, pessimistic, emotional", "optimistic", ""]
    assert [record["personality"] for record in records] == personalities
    replies = tiny_model.replies(LINES, personalities, weights={"attitude": 2})
    assert [record["reply"] for record in records] == [reply.text for reply in replies]
    assert [record["energy"] for record in records] == [reply.energy for reply in replies]
    assert [record["aspects"] for record in records] == [reply.aspects for reply in replies]


def test_personalities_of_a_file_and_its_limit(tiny_run, tiny_model, data, tmp_path):
    def asked(*flags):
        out = tmp_path / "out.jsonl"
        generate.main([str(tiny_run.workdir), "--data", data, "--out", str(out), *flags])
        return [(record["id"], record["personality"]) for record in read_lines(out)]

    assert asked("--personality", "all", "--limit", "2") == [(i, p) for i in ("a", "2") for p in ALL]
    assert asked("--personality", "optimistic", "--limit", "9") == [(i, "optimistic") for i in ("a", "1", "2", "3", "4")]
    assert asked("--personality", "labelled", "--limit", "1") == [("a", "")]


def test_without_out_replies_are_printed_under_their_question(tiny_run, tiny_model, data, capsys):
    generate.main([str(tiny_run.workdir), "--data", data, "--personality", "all", "--limit", "1"])
    blank, question, *replies = capsys.readouterr().out.splitlines()
    assert (blank, question) == ("", f"User: {RIVER}")
    assert [line.split(":")[0].strip() for line in replies] == ALL


def test_the_bundled_test_set_is_named_test(tiny_run, tiny_model, capsys):
    generate.main([str(tiny_run.workdir), "--data", "test", "--limit", "2"])
    out = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("User: ") for line in out) == 2 and len(out) == 6


def test_one_attributes_file_is_named_with_it(tiny_run, tiny_model, tmp_path):
    path = micro.write_lines(tmp_path / "data.jsonl", [LINES[0] | {"tag": "optimistic"}])
    generate.main([str(tiny_run.workdir), "--data", f"attitude={path}", "--out", str(tmp_path / "out.jsonl")])
    assert [record["personality"] for record in read_lines(tmp_path / "out.jsonl")] == ["optimistic"]


def test_an_interrupted_file_resumes_to_what_an_uninterrupted_one_is(tiny_run, tiny_model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "CHUNK", 4)
    flags = ["--personality", "all", "--limit", "3", "--samples", "2", "--decode.temperature", "1.5"]

    def write(name, *more):
        generate.main([str(tiny_run.workdir), "--data", data, "--out", str(tmp_path / name), *flags, *more])
        return (tmp_path / name).read_bytes()

    whole = write("whole.jsonl")
    assert len(whole.split(b"\n")) == 25 and whole != write("other.jsonl", "--seed", "1")

    model, calls = tiny_model, []

    class Interrupted:
        def __getattr__(self, name):
            return getattr(model, name)

        def replies(self, contexts, *arguments, **options):
            calls.append(len(contexts))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return model.replies(contexts, *arguments, **options)

    monkeypatch.setattr(generate, "load", lambda workdir: Interrupted())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        write("out.jsonl")
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n" and calls == [4, 4, 4]
    assert not (tmp_path / "out.jsonl").exists()
    (part,) = tmp_path.glob(".out.jsonl.*.part")
    done = part.read_bytes().splitlines(keepends=True)
    assert len(done) == 8
    # Killed later, while it wrote the third chunk: its last line is torn, in the middle of a character.
    torn = whole.splitlines(keepends=True)[8:12]
    torn[3] = torn[3][: torn[3].index("é".encode()) + 1] if "é".encode() in torn[3] else torn[3][:40]
    part.write_bytes(b"".join([*done, *torn]))

    calls[:] = [0] * 3
    with pytest.raises(AssertionError), pytest.MonkeyPatch.context() as patch:  # another seed is another file
        patch.setattr(Interrupted, "replies", lambda *_, **__: pytest.fail("it starts anew"))
        patch.setattr(pytest, "fail", _raise_assertion)
        write("out.jsonl", "--seed", "1")
    assert "resuming" not in capsys.readouterr().err

    assert write("out.jsonl") == whole and calls == [0, 0, 0, 4, 4, 4, 4]
    assert f"resuming after 8 replies\nwrote 24 replies to {tmp_path / 'out.jsonl'}\n" == capsys.readouterr().err
