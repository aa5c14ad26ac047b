"""The commands that talk: one context, files, a conversation, and the control accuracy."""

import json

import micro
import pytest

import miracle_jax as mj
from miracle_jax import evaluate, generate

LINES = [
    {"input": ["What about the river?"], "output": [], "id": "first"},
    {"input": ["How are you?", "What about the lamp?"], "output": ["Well.", "A reference."], "tag": [1, 0, 1]},
    {"input": ["What about the bread?"], "output": ["Another."], "tag": {"attitude": "optimistic"}},
]


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return mj.load(tiny_run.workdir)


@pytest.fixture
def run(tiny_run, loaded, monkeypatch, capsys):
    """Runs the command in this process, without loading the model anew: (exit status, stdout, stderr)."""

    def command(*arguments, module=generate, stdin=()):
        monkeypatch.setattr(module, "load", lambda workdir: loaded)
        typed = iter(stdin)

        def read(prompt):
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        status = 0
        try:
            module.main([str(tiny_run.workdir), *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def contexts(tmp_path):
    return micro.write_lines(tmp_path / "contexts.jsonl", LINES)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_context_on_the_command_line(run, loaded):
    turns = ["How are you?", "Well.", "What about the lamp?"]
    status, out, _ = run(*turns, "--personality", "lyrical, optimistic", "--weight", "attitude=2")
    reply = loaded.reply(turns, "lyrical, optimistic", weights={"attitude": 2.0})
    assert status == 0 and out.startswith(reply.text + "\n")
    assert "[lyrical, optimistic]" in out and "language style: " in out and f"{reply.steps} steps  ok" in out
    assert f"energy {reply.energy_before:.2f} -> {reply.energy:.2f}" in out


def test_every_personality(run):
    _, out, _ = run("What about the lamp?", "--personality", "all")
    assert out.count("steps  ok") == 8


def test_a_file_in_a_file_out(run, loaded, contexts, tmp_path):
    out = tmp_path / "deep" / "replies.jsonl"
    status, _, err = run("--data", contexts, "--out", out)
    assert status == 0 and f"wrote 3 replies to {out}" in err
    records = read(out)
    assert [r["id"] for r in records] == ["first", "1", "2"]
    assert [r["personality"] for r in records] == ["", "lyrical, pessimistic, critical", "optimistic"]
    assert [r["reference"] for r in records] == [None, "A reference.", "Another."]
    assert records[1]["input"] == LINES[1]["input"] and records[1]["output"] == ["Well."]
    replies = loaded.replies(LINES, [r["personality"] for r in records])
    assert [r["reply"] for r in records] == [reply.text for reply in replies]
    assert {"aspects", "energy", "energy_before", "steps", "ok"} <= set(records[0])
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_all_personalities_of_a_limited_file(run, contexts, tmp_path):
    run("--data", contexts, "--out", tmp_path / "out.jsonl", "--personality", "all", "--limit", "2")
    records = read(tmp_path / "out.jsonl")
    assert len(records) == 16 and len({r["personality"] for r in records}) == 8
    assert [r["id"] for r in records] == ["first"] * 8 + ["1"] * 8


def test_a_file_of_one_attribute(run, tmp_path):
    data = micro.write_lines(tmp_path / "a.jsonl", [{"input": ["Hi?"], "output": ["Yes."], "tag": "pessimistic"}])
    run("--data", f"attitude={data}", "--out", tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl")[0]["personality"] == "pessimistic"


def test_an_interrupted_file_resumes_to_the_same_and_other_settings_do_not(run, contexts, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 2)
    command = ["--data", contexts, "--personality", "all", "--decode.temperature", "1.5", "--samples", "2"]
    run(*command, "--out", tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text()

    answer, asked = generate.answer_all, []

    def stop_after_three_chunks(model, tasks, options, weights, start=0):
        asked.append(start)
        for i, records in enumerate(answer(model, tasks, options, weights, start)):
            if i == 3:
                raise KeyboardInterrupt
            yield records

    out = tmp_path / "resumed" / "whole.jsonl"
    monkeypatch.setattr(generate, "answer_all", stop_after_three_chunks)
    status, _, err = run(*command, "--out", out)
    assert status == 130 and "interrupted" in err and not out.exists()
    [part] = out.parent.iterdir()
    with part.open("a") as file:
        file.write('{"id": "torn')

    def go_on(model, tasks, options, weights, start=0):
        asked.append(start)
        yield from answer(model, tasks, options, weights, start)

    monkeypatch.setattr(generate, "answer_all", go_on)
    run(*command[:-1], "1", "--out", out.with_name("other.jsonl"))
    _, _, err = run(*command, "--out", out)
    assert asked == [0, 0, 6] and "resuming after 6 replies" in err
    assert out.read_text() == whole
    assert {path.name for path in out.parent.iterdir()} == {"whole.jsonl", "other.jsonl"}


def test_a_conversation(run, loaded):
    typed = [
        "What about the river?", "/personality plain, pessimistic", "What about the lamp?", "/weight attitude 2",
        "/samples 3", "What about the song?", "/personality optimstic", "/weight mood 1", "/samples 0", "/dance",
        "/help", "/reset", "/personality", "What about the river?", "/quit", "never read",
    ]  # fmt: skip
    status, out, _ = run("--personality", "lyrical", stdin=typed)
    assert status == 0
    first = loaded.reply(typed[:1], "lyrical")
    second = loaded.reply([typed[0], first.text, typed[2]], "plain, pessimistic", seed=2)
    third = loaded.reply(
        [typed[0], first.text, typed[2], second.text, typed[5]], "plain, pessimistic", seed=4, samples=3,
        weights={"attitude": 2.0},
    )  # fmt: skip
    fresh = loaded.reply(typed[:1], None, samples=3)  # /reset forgets the turns, not the settings
    for text in (generate.show(first), generate.show(second), generate.show(third), generate.show(fresh)):
        assert text in out
    assert "unknown aspect 'optimstic'; did you mean optimistic" in out and "unknown attribute 'mood'" in out
    assert "/samples takes a number of latents, at least 1, not '0'" in out
    assert "there is no command /dance" in out and "/weight attitude 2" in out and "never read" not in out


def test_the_end_of_input_ends_a_conversation(run):
    assert run(stdin=[])[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["Hi?", "--personality", "lyrcal"], "unknown aspect 'lyrcal'; did you mean lyrical?"),
        (["Hi?", "--weight", "attitude"], "weight 'attitude' is not of the form attribute=number"),
        (["Hi?", "--weight", "mood=1"], "unknown attribute 'mood'"),
        (["Hi?", "Yes."], "a context to answer ends with a question"),
        (["Hi?", "--data", "test"], "give either a context or --data, not both"),
        (["Hi?", "--samples", "0"], "--samples must be at least 1"),
        (["--data", "nowhere.jsonl"], "file nowhere.jsonl does not exist"),
        (["Hi?", "--sample.rtol", "0"], "sample.rtol is 0.0; it must be above 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(run, arguments, sentence):
    status, _, err = run(*arguments)
    assert status == 2 and err.startswith("error: ") and sentence in err and "Traceback" not in err


def test_a_bad_line_is_named_by_file_and_line(run, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"input": ["Hi?"], "output": []}\n{"input": "Hi?", "output": []}\n')
    status, _, err = run("--data", path)
    assert status == 2 and f"{path}:2: " in err


def test_the_run_comes_first(capsys, tmp_path):
    for arguments, sentence in (([], "give the folder of a finished run first"), ([str(tmp_path)], "holds no run")):
        with pytest.raises(SystemExit) as stop:
            generate.main(arguments)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_control_accuracy(run, tiny_run, tmp_path):
    tags = [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    records = [
        {"input": [f"What about the {subject}?"], "output": [f"Like rain, the {subject} sings."], "tag": tag}
        for tag in tags
        for subject in micro.SUBJECTS[:2]
    ]
    data = micro.write_lines(tmp_path / "test.jsonl", records)
    status, out, err = run("--data", data, "--per-personality", "1", module=evaluate)
    assert status == 0, err
    result = json.loads((tiny_run.workdir / "evaluation.json").read_text())
    assert result["contexts"] == result["personalities"] == len(result["replies"]) == 8
    assert set(result["attributes"]) == {"language_style", "attitude", "mental_characteristic"}
    style = result["attributes"]["language_style"]
    assert style["judge"] == 1.0 and style["gold"] == 0.5  # all references are lyrical, half of them are wanted so
    for source in ("with_energy", "without_energy"):
        values = [scores[source] for scores in result["attributes"].values()]
        assert all(0 <= value <= 1 for value in values)
        assert result["mean"][source] == pytest.approx(sum(values) / 3)
    assert "without energy" in out and "accuracy in percent on 8 contexts, 8 personalities" in out
