"""The generate and evaluate commands on the model of tests/micro.py: a context, a file, a conversation, mistakes."""

import io
import itertools
import json
import re
import shutil
import sys

import micro
import pytest

from miracle_jax import dataset, evaluate, generate

ALL = [", ".join(aspects) for aspects in itertools.product(
    ("plain", "lyrical"), ("pessimistic", "optimistic"), ("emotional", "critical")
)]  # fmt: skip
RIVER = "What about the river?"
LINES = [
    {"input": [RIVER], "output": [], "id": "a\u2028b"},
    {"input": ["How are you?", "What\u2028about \x85 lamps?"], "output": ["Well, wéll."], "tag": ["lyrical", None, 1]},
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
    assert re.search(r"  energy \d\.\d\d -> \d\.\d\d  \d+ steps  ok$", facts)


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
    asked = ["id", "input", "output", "reference", "personality"]
    told = ["reply", "aspects", "energy", "energy_before", "steps", "ok"]
    assert [list(record) for record in records] == [asked + told] * 5
    assert [record["id"] for record in records] == ["a\u2028b", "1", "2", "3", "4"]
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

    assert asked("--personality", "all", "--limit", "2") == [(i, p) for i in ("a\u2028b", "2") for p in ALL]
    assert asked("--personality", "optimistic", "--limit", "9") == [
        (i, "optimistic") for i in ("a\u2028b", "1", "2", "3", "4")
    ]
    assert asked("--personality", "labelled", "--limit", "1") == [("a\u2028b", "")]


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


class Watched:
    """The model, which counts the contexts of each call and is interrupted at the `stop`-th."""

    def __init__(self, model, stop=None):
        self.model, self.stop, self.calls = model, stop, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def replies(self, contexts, *arguments, **options):
        self.calls.append(len(contexts))
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        return self.model.replies(contexts, *arguments, **options)


def test_an_interrupted_file_resumes_to_what_an_uninterrupted_one_is(
    tiny_run, tiny_model, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(generate, "CHUNK", 4)

    def write(name, *more, stop=None):
        """Returns the contexts of each call and the file's content."""
        watched = Watched(tiny_model, stop)
        monkeypatch.setattr(generate, "load", lambda workdir: watched)
        generate.main([
            str(tiny_run.workdir), "--data", data, "--out", str(tmp_path / name), "--personality", "all", "--limit",
            "3", "--samples", "2", "--decode.temperature", "1.5", *more,
        ])  # fmt: skip
        return watched.calls, (tmp_path / name).read_bytes()

    (calls, whole), (_, other) = write("whole.jsonl"), write("other.jsonl", "--seed", "1")
    assert calls == [4] * 6 and whole.count(b"\n") == 24 and whole != other

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        write("out.jsonl", stop=3)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "out.jsonl").exists()
    (part,) = tmp_path.glob(".out.jsonl.*.part")
    assert part.read_bytes() == b"".join(whole.splitlines(keepends=True)[:8])
    # Killed a little later, while it wrote the third chunk: its last line is torn in the middle of a character.
    chunk = b"".join(whole.splitlines(keepends=True)[8:12])
    with part.open("ab") as file:
        file.write(chunk[: chunk.rindex("é".encode()) + 1])

    calls, content = write("out.jsonl", "--seed", "1")  # other settings: not this file's continuation
    assert calls == [4] * 6 and content == other
    assert "resuming" not in capsys.readouterr().err
    calls, content = write("out.jsonl")
    assert calls == [4] * 4 and content == whole
    assert capsys.readouterr().err == f"resuming after 8 replies\nwrote 24 replies to {tmp_path / 'out.jsonl'}\n"
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------------------ a conversation


def converse(tiny_run, monkeypatch, capsys, text, *flags):
    """What the command prints for each line of `text`, without the prompts."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    generate.main([str(tiny_run.workdir), *flags])
    greeting, *answers = capsys.readouterr().out.split("you> ")
    assert greeting == "Type a question. /help lists the commands, /quit ends.\n"
    return [answer.strip() for answer in answers]


def test_a_conversation_whose_personality_changes_at_any_turn(tiny_run, tiny_model, monkeypatch, capsys):
    def said(context, personality, **options):
        return generate.show(tiny_model.reply(context, personality, **options)).strip()

    first, changed, second, none, third, again, fourth, end = converse(
        tiny_run, monkeypatch, capsys,
        f"{RIVER}\n/personality plain, pessimistic\nHow are you?\n/personality\nWell?\n/reset\n{RIVER}\n/quit\nunread",
        "--personality", "lyrical", "--seed", "4",
    )  # fmt: skip
    turns = [RIVER]
    assert first == said(turns, "lyrical", seed=4)
    assert changed == "personality: plain, pessimistic"
    turns += [first.splitlines()[0], "How are you?"]
    assert second == said(turns, "plain, pessimistic", seed=6) and "[plain, pessimistic]" in second
    assert none == "personality: none"
    turns += [second.splitlines()[0], "Well?"]
    assert third == said(turns, None, seed=8) and "[no personality]" in third
    assert again == "the conversation starts anew"
    assert fourth == said([RIVER], None, seed=4) and end == ""


def test_weights_and_samples_of_a_conversation(tiny_run, tiny_model, monkeypatch, capsys):
    weights, empty, ready, reply, end = converse(
        tiny_run, monkeypatch, capsys, f"/weight mental characteristic 3\n\n/samples 4\n{RIVER}\n",
        "--personality", "critical", "--weight", "attitude=2",
    )  # fmt: skip
    assert weights == "weights: attitude 2, mental_characteristic 3" and ready == "samples: 4" and empty == end == ""
    expected = tiny_model.reply([RIVER], "critical", samples=4, weights={"mental_characteristic": 3, "attitude": 2})
    assert reply == generate.show(expected).strip()


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/personality lyricla", "unknown aspect 'lyricla'; did you mean lyrical"),
        ("/personality plain, lyrical", "plain and lyrical are two aspects of language_style"),
        ("/weight atitude 2", "unknown attribute 'atitude'; did you mean attitude?"),
        ("/weight attitude much", "weight 'attitude=much' is not of the form attribute=number"),
        (
            "/weight attitude -1",
            "weight 'attitude=-1' is not of the form attribute=number with a finite number, at least 0",
        ),
        ("/weight", "weight '' is not of the form attribute=number"),
        ("/samples 0", "/samples takes a number of latents, at least 1, not '0'"),
        ("/samples many", "/samples takes a number of latents, at least 1, not 'many'"),
        ("/persona plain", "there is no command /persona; /help lists them"),
        ("/help", "/personality plain, pessimistic   which aspects to speak with (language style: plain or lyrical; "),
    ],
)
def test_a_mistake_in_a_conversation_is_one_sentence_and_it_goes_on(
    tiny_run, tiny_model, monkeypatch, capsys, line, answer
):
    got, after, _ = converse(tiny_run, monkeypatch, capsys, f"{line}\n/weight attitude 1\n")
    assert got.startswith(answer) and after == "weights: attitude 1"
    assert line == "/help" or "\n" not in got


# ------------------------------------------------------------------------------------------------ mistakes


def fails(main, capsys, *argv) -> str:
    """The sentence with which a command refuses."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([RIVER, "--personality", "lyricla"], "unknown aspect 'lyricla'; did you mean lyrical?"),
        ([RIVER, "--weight", "atitude=2"], "unknown attribute 'atitude'; did you mean attitude?"),
        ([RIVER, "--weight", "attitude"], "weight 'attitude' is not of the form attribute=number"),
        ([RIVER, "--samples", "0"], "--samples must be at least 1 and --limit at least 0"),
        ([RIVER, "--sample.rtol", "0"], "the config is inconsistent: sample.rtol is 0.0; it must be above 0"),
        ([RIVER, "Well."], "a context to answer ends with a question: it has M questions and M - 1 replies"),
        ([RIVER, "--data", "test"], "give either a context or --data, not both"),
        ([RIVER, "--out", "x.jsonl"], "--out is where the replies to --data go"),
        (["--data", "nowhere.jsonl"], "file nowhere.jsonl does not exist"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tiny_run, tiny_model, capsys, arguments, sentence):
    message = fails(generate.main, capsys, tiny_run.workdir, *arguments)
    assert message.startswith(sentence) and "\n" not in message


def test_a_bad_line_is_named_by_file_and_line(tiny_run, tiny_model, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(
        json.dumps(LINES[0]) + '\n{"input": ["a"]}\n{"input": ["a"], "output": [], "tag": ["x", 0, 0]}\n{\n'
    )
    message = fails(generate.main, capsys, tiny_run.workdir, "--data", path, "--out", tmp_path / "out.jsonl")
    for number, problem in (
        (2, "key 'output' is missing"),
        (3, "'tag': language_style has no aspect 'x'"),
        (4, "invalid"),
    ):
        assert f"{path}:{number}: {problem}" in message
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("main", [generate.main, evaluate.main])
def test_a_folder_without_a_finished_run_is_one_sentence(tiny_run, tmp_path, capsys, main):
    assert "give the folder of a finished run first" in fails(main, capsys)
    assert "give the folder of a finished run first" in fails(main, capsys, "--seed", 1)
    assert f"{tmp_path} holds no run (no config.json)" in fails(main, capsys, tmp_path)
    shutil.copy(tiny_run.workdir / "config.json", tmp_path)
    assert f"{tmp_path} is not finished (no model.json)" in fails(main, capsys, tmp_path)


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.fixture
def labelled(tmp_path):
    """Two contexts of each personality with a reference that shows its language style."""
    records = []
    for number, tag in enumerate(itertools.product((0, 1), repeat=3)):
        for i in (number, number + 1):
            records.append(micro.dialogue(i, micro.REPLIES["language_style"][tag[0]], list(tag)))
    return micro.write_lines(tmp_path / "labelled.jsonl", records)


@pytest.fixture
def evaluated(tiny_run, tiny_model, tmp_path, monkeypatch):
    """A folder to evaluate that other tests do not look into."""
    monkeypatch.setattr(evaluate, "load", lambda workdir: tiny_model)
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run.workdir / "config.json", tmp_path / "run")
    return tmp_path / "run"


def test_evaluation_judges_replies_with_and_without_the_energy(evaluated, tiny_model, labelled, capsys):
    evaluate.main([str(evaluated), "--data", labelled, "--per-personality", "1"])
    path = evaluated / "evaluation.json"
    result = json.loads(path.read_text())
    out = capsys.readouterr().out
    assert out.startswith("accuracy in percent on 8 contexts, 8 personalities:") and f"figures: {path}" in out
    assert result["contexts"] == result["personalities"] == len(result["replies"]) == 8 and result["not_ok"] == 0
    assert list(result["attributes"]) == list(micro.REPLIES)
    sources = {"judge", "gold", "with_energy", "without_energy"}
    for scores in (*result["attributes"].values(), result["mean"]):
        assert set(scores) == sources and all(0 <= score <= 1 for score in scores.values())
    style = result["attributes"]["language_style"]
    assert style["judge"] == 1.0 and style["gold"] == 1.0  # the corpus is easy
    for source in sources:
        figures = [scores[source] for scores in result["attributes"].values()]
        assert result["mean"][source] == pytest.approx(sum(figures) / 3)
    assert [reply["personality"] for reply in result["replies"]] == ALL
    chosen = evaluate.choose(dataset.read_files([(None, labelled)], tiny_model.schema), 1, seed=0)
    contexts = [{"input": instance.questions, "output": instance.replies} for instance in chosen]
    for name, texts in {
        "question": [instance.questions[-1] for instance in chosen],
        "gold": [instance.replies[-1] for instance in chosen],
        "with_energy": [reply.text for reply in tiny_model.replies(contexts, ALL)],
        "without_energy": [reply.text for reply in tiny_model.replies(contexts)],
    }.items():
        assert [reply[name] for reply in result["replies"]] == texts
    assert any(reply["with_energy"] != reply["without_energy"] for reply in result["replies"])


def test_evaluation_says_how_many_latents_failed(evaluated, labelled, capsys):
    evaluate.main([str(evaluated), "--data", labelled, "--per-personality", "1", "--sample.max-steps", "1"])
    assert json.loads((evaluated / "evaluation.json").read_text())["not_ok"] == 8
    assert "8 latents are not ok" in capsys.readouterr().out


def test_the_choice_of_contexts_is_even_and_seeded(tiny_model, labelled):
    instances = dataset.read_files([(None, labelled)], tiny_model.schema)
    chosen = evaluate.choose(instances, 1, seed=0)
    assert [instance.labels for instance in chosen] == tiny_model.schema.personalities()
    assert chosen == evaluate.choose(instances, 1, seed=0)
    assert any(chosen != evaluate.choose(instances, 1, seed=seed) for seed in range(1, 5))
    assert evaluate.choose(instances, 20, seed=0) == sorted(instances, key=lambda instance: instance.labels)


def test_evaluation_needs_lines_that_are_labelled_throughout(evaluated, tmp_path, capsys):
    half = micro.write_lines(tmp_path / "half.jsonl", [micro.dialogue(0, "I saw the {}.", [0, None, None])])
    message = fails(evaluate.main, capsys, evaluated, "--data", half)
    assert message == "no line of the data is labelled for every attribute; control accuracy needs such lines"
    assert "at least 1" in fails(evaluate.main, capsys, evaluated, "--per-personality", 0)
