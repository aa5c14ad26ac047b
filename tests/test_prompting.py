"""A language model answers the test set by its instructions: what it is told, and what comes of its answers."""

import json

import pytest
from loopback import PHRASES, Loopback, Sent, mixed

from miracle_jax import prompting, systems
from miracle_jax.attributes import Schema
from miracle_jax.instructions import Instructions

pytest.importorskip("openai", reason="bash launch/setup.sh corpus")


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command: (status, stdout, stderr). One context a personality, if no flag says otherwise."""

    def run(url, *more):
        status, flags = 0, ["--endpoint", url, "--model", "parrot", "--out", str(tmp_path / "out"), "--backoff", "0"]
        try:
            prompting.main([*flags, "--per-personality", "1", "--timeout", "5", *more])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_a_task_is_a_chat_with_the_personality_in_its_instruction():
    instructions = Instructions.load()
    task = {"personality": "lyrical, critical", "input": ["Hi?", "And now?"], "output": ["Well."]}
    system, *turns = prompting.messages(instructions, task)
    assert system["role"] == "system"
    for of, wanted in zip(instructions.descriptions, (1, None, 1), strict=True):
        assert [told.manner in system["content"] for told in of] == [i == wanted for i in range(2)]
    said = [("user", "Hi?"), ("assistant", "Well."), ("user", "And now?")]
    assert [(turn["role"], turn["content"]) for turn in turns] == said


def test_replies_are_a_system_that_evaluate_takes(run, tmp_path):
    with Loopback(mixed(0.03)) as server:
        status, output, errors = run(server.url, "--attempts", "5")
    assert status == 0, errors
    path = tmp_path / "out" / "replies.jsonl"
    assert str(path) in output
    test = systems.read_test_set("test", Schema.load(), 1, 0)  # as evaluate draws it
    system = systems.read("prompted", str(path), test, False)
    assert len(system.replies) == 8 == len(list(path.open()))
    for reply, instance in zip(system.replies, test.chosen.values(), strict=True):
        aspects = [a.aspects[i] for a, i in zip(test.schema.attributes, instance.labels, strict=True)]
        words = {phrase.split("{")[0] for aspect in aspects for phrase in PHRASES[aspect]}
        assert any(reply.startswith(word) for word in words if word), (reply, aspects)


def test_every_personality_for_the_counterfactual(run, tmp_path):
    with Loopback() as server:
        assert run(server.url, "--personality", "all")[0] == 0
    test = systems.read_test_set("test", Schema.load(), 1, 0)
    assert len(systems.read("prompted", str(tmp_path / "out" / "replies.jsonl"), test, True).everything) == 64


def test_what_was_answered_is_not_asked_again(run, tmp_path):
    with Loopback(lambda asked: "500" if asked.number >= 5 else "") as server:
        status, _, errors = run(server.url, "--tries", "1", "--in-flight", "1")
        assert status == 2 and "3 contexts have no answer" in errors and "Traceback" not in errors
        assert not (tmp_path / "out" / "replies.jsonl").exists()
        server.fault = lambda asked: ""
        assert run(server.url, "--again", "failed")[0] == 0
        assert sorted(server.prompts().values()) == [1] * 5 + [2] * 3
        assert run(server.url)[0] == 0 and len(server.asked) == 11
    assert len(list((tmp_path / "out" / "replies.jsonl").open())) == 8


def test_contexts_that_no_model_answers_can_be_left_empty(run, tmp_path):
    filtered = Sent('{"error": {"message": "content filter"}}', 400)
    with Loopback(lambda asked: filtered if asked.number == 3 else "") as server:
        status, _, errors = run(server.url, "--in-flight", "1")
        assert status == 2 and "1 contexts have no answer" in errors and "--again failed" in errors
        status, output, _ = run(server.url, "--give-up", "True")
    assert status == 0 and "1 of its replies empty" in output and len(server.asked) == 8
    replies = [json.loads(line)["reply"] for line in (tmp_path / "out" / "replies.jsonl").open()]
    assert replies.count("") == 1 and len(replies) == 8


@pytest.mark.parametrize(
    "more, named",
    [(["--model", "owl"], "model: 'parrot' there, 'owl' here"), (["--temperature", "0"], "temperature: 1.0 there"),
     (["--per-personality", "2"], "per_personality: 1 there, 2 here")],
)  # fmt: skip
def test_answers_to_something_else_are_not_mixed_in(run, more, named):
    with Loopback() as server:
        assert run(server.url)[0] == 0
        status, _, errors = run(server.url, *more)
    assert status == 2 and named in errors and "another --out" in errors


def test_settings_are_kept_with_the_answers(run, tmp_path):
    with Loopback() as server:
        run(server.url)
    kept = json.loads((tmp_path / "out" / "prompting.json").read_text())
    assert kept["model"] == "parrot" and kept["sampling"]["temperature"] == 1.0 and "begun" in kept
