"""The generate and evaluate commands on the model of tests/micro.py: a context, a file, a conversation, mistakes."""

import copy
import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
import sys

import micro
import pytest
from flax import nnx

from miracle_jax import dataset, evaluate, generate
from miracle_jax.attributes import Attribute, Schema

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


def test_lines_without_a_tag_are_counted_where_labels_were_asked_for(tiny_run, tiny_model, data, capsys):
    def told(*flags):
        generate.main([str(tiny_run.workdir), "--data", data, "--limit", "1", *flags])
        return capsys.readouterr().err

    untagged = "warning: 2 of 5 contexts have no `tag`; their replies are not controlled\n"
    assert told("--personality", "labelled") == untagged
    assert told() == told("--personality", "plain") == told("--personality", "all") == ""


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

    def on(self, device):
        return self

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


def test_a_file_that_was_begun_with_other_parameters_is_not_continued(
    tiny_run, tiny_model, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(generate, "CHUNK", 4)
    other = copy.copy(tiny_model)
    other.miracle = nnx.clone(tiny_model.miracle)
    other.miracle.decoder.head_bias[...] += 1e-3

    def write(model, stop=None):
        """Returns the contexts of each call."""
        watched = Watched(model, stop)
        monkeypatch.setattr(generate, "load", lambda workdir: watched)
        generate.main([
            str(tiny_run.workdir), "--data", data, "--out", str(tmp_path / "out.jsonl"), "--personality", "all",
            "--limit", "1",
        ])  # fmt: skip
        return watched.calls

    with pytest.raises(SystemExit):
        write(tiny_model, stop=2)
    (part,) = tmp_path.glob(".out.jsonl.*.part")
    assert part.read_bytes().count(b"\n") == 4
    capsys.readouterr()
    assert write(other) == [4, 4] and "resuming" not in capsys.readouterr().err
    assert list(tmp_path.glob(".*")) == [part] and len(read_lines(tmp_path / "out.jsonl")) == 8
    assert write(tiny_model) == [4] and "resuming after 4 replies" in capsys.readouterr().err


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
        ("/samples \u00b2", "/samples takes a number of latents, at least 1, not '\u00b2'"),
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


@pytest.mark.parametrize(
    "line", [b"\xff hi", b"How are \xed\xa0\x80 you?", b"\xff"], ids=["no character", "half a pair", "nothing else"]
)
def test_a_line_that_is_not_unicode_gets_a_sentence_and_the_conversation_goes_on(
    tiny_run, tiny_model, monkeypatch, capsys, line
):
    """As a terminal that is not set to UTF-8 hands it over."""
    text = line.decode(errors="surrogateescape")
    refused, reply, end = converse(tiny_run, monkeypatch, capsys, f"{text}\n{RIVER}\n", "--personality", "lyrical")
    assert refused == f"the turn {text!r} has {dataset.NOT_UNICODE}; is it UTF-8?" and "\\udc" in refused
    assert reply == generate.show(tiny_model.reply([RIVER], "lyrical")).strip() and end == ""


def test_a_line_that_cannot_be_decoded_gets_a_sentence_and_the_conversation_goes_on(
    tiny_run, tiny_model, monkeypatch, capsys
):
    lines = iter([b"\xff", b"/samples 2", b"/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines).decode())
    generate.main([str(tiny_run.workdir)])
    _, refused, ready = capsys.readouterr().out.splitlines()
    assert refused == "this line is not UTF-8; write it again, or set the terminal to UTF-8" and ready == "samples: 2"


# ------------------------------------------------------------------------------------------------ warnings


@pytest.fixture(scope="module")
def warned(tiny_run, tmp_path_factory):
    """What the real command writes to stderr when everything that it can warn of happens."""
    long = {"input": ["How are you? " * 30], "output": [], "tag": [1, 1, 1]}
    path = micro.write_lines(tmp_path_factory.mktemp("warned") / "contexts.jsonl", [LINES[2], LINES[0], long])
    command = [sys.executable, "-m", "miracle_jax.generate", str(tiny_run.workdir), "--data", path, "--personality",
               "labelled", "--sample.rtol", "1e-6", "--sample.max-steps", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=micro.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    "sentence",
    [
        r"\d of 3 latents did not arrive within sample\.max_steps = 1; raise it or loosen sample\.rtol",
        r"a question is longer than the encoder's limit; only its end is read",
        r"1 of 3 contexts have no `tag`; their replies are not controlled",
    ],
)
def test_the_command_writes_warnings_as_such_once_and_without_the_place_in_our_code(warned, sentence):
    assert [bool(re.fullmatch(f"warning: {sentence}", line)) for line in warned].count(True) == 1, warned
    assert not any("miracle_jax" in line or ".py" in line for line in warned)


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
        (["--data", "mood=nowhere.jsonl"], "unknown attribute 'mood'; there are language_style, attitude,"),
        (["\udcff hi"], "the turn '\\udcff hi' has half of a surrogate pair"),
        ([RIVER, "--limit", "2"], "--limit is how many contexts of --data are answered; name a file of contexts with"),
        (["--limit", "2"], "--limit is how many contexts of --data are answered; name a file of contexts with it"),
        (["--out", "x.jsonl"], "--out is where the replies to --data go; name a file of contexts with --data"),
        ([RIVER, "--personality", "labelled"], "--personality labelled takes the labels of --data; without it name"),
        (["--personality", "labelled"], "--personality labelled takes the labels of --data; without it name aspects"),
        (["--personality", "all"], "--personality all answers a context or --data; a conversation has one personality"),
        ([RIVER, "--seed", "1", "Well."], "'Well.' belongs to no flag; words without a flag come first: python -m"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tiny_run, tiny_model, capsys, arguments, sentence):
    message = fails(generate.main, capsys, tiny_run.workdir, *arguments)
    assert message.startswith(sentence) and "\n" not in message


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("contexts.jsonl", "--out {} is the file of contexts itself; name another"),
        ("", "{} is a folder; name a file"),
        ("gs://bucket/replies.jsonl", "gs://bucket/replies.jsonl is not a local path; write the file here and copy it"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_answered(
    tiny_run, data, tmp_path, monkeypatch, capsys, out, sentence
):
    monkeypatch.setattr(generate, "load", None)
    before = (tmp_path / "contexts.jsonl").read_bytes()
    path = out if "://" in out else tmp_path / out
    message = fails(generate.main, capsys, tiny_run.workdir, "--data", data, "--out", path)
    assert message.startswith(sentence.format(path))
    assert (tmp_path / "contexts.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_personality_can_be_written_as_json(tiny_run, tiny_model, capsys):
    generate.main([str(tiny_run.workdir), RIVER, "--personality", '{"attitude": "optimistic"}'])
    assert "[optimistic]" in capsys.readouterr().out
    message = fails(generate.main, capsys, tiny_run.workdir, RIVER, "--personality", '{"attitude": optimistic}')
    assert message.startswith("the personality '{\"attitude\": optimistic}' is not a JSON object")


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


def test_words_come_before_flags(tiny_run, capsys):
    first = "belongs to no flag; words without a flag come first: python -m miracle_jax"
    message = fails(generate.main, capsys, tiny_run.workdir, "--seed", 1, RIVER)
    assert message == f"{RIVER!r} {first}.generate WORKDIR [QUESTION [REPLY QUESTION ...]]"
    message = fails(evaluate.main, capsys, tiny_run.workdir, "--seed", 1, "word")
    assert message == f"'word' {first}.evaluate WORKDIR [WORKDIR ...]"
    for main in (generate.main, evaluate.main):
        with pytest.raises(SystemExit) as stop:
            main([str(tiny_run.workdir), "--sed", "1", "word"])
        assert stop.value.code == 2 and "--seed" in capsys.readouterr().err


def test_malformed_lines_of_contexts_are_to_be_mended(tiny_run, tiny_model, tmp_path, capsys):
    """There is no flag to skip them with."""
    path = tmp_path / "bad.jsonl"
    path.write_text("{\n")
    message = fails(generate.main, capsys, tiny_run.workdir, "--data", path)
    assert message.startswith(f"1 problem in 1 line of the data; mend them:\n{path}:1: invalid JSON")


@pytest.mark.parametrize("main", [generate.main, evaluate.main])
def test_a_bucket_out_of_reach_is_one_sentence(capsys, monkeypatch, main):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = fails(main, capsys, "gs://bucket/run")
    assert message.startswith("gs://bucket/run needs a package that is not installed: ")
    assert message.endswith("; pip install 'miracle-jax[gcs]'")


def with_data(model, **changes):
    """The model as if its run had learned from other data."""
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, **changes))
    return other


@pytest.mark.parametrize("command", [generate, evaluate])
def test_the_bundled_test_set_is_not_for_other_attributes(tiny_run, tiny_model, monkeypatch, capsys, command):
    data = tiny_model.config.data
    other = with_data(tiny_model, train=data.train[:2], validation=data.validation[:2])
    other.schema = Schema((*tiny_model.schema.attributes[:2], Attribute("mood", ("good", "bad"))))
    monkeypatch.setattr(command, "load", lambda workdir: other)
    assert fails(command.main, capsys, tiny_run.workdir, "--data", "test") == (
        "the bundled test set is labelled for language_style, attitude, mental_characteristic, this run for "
        "language_style, attitude, mood; name a file of your own with --data"
    )


@pytest.mark.parametrize("main", [generate.main, evaluate.main])
def test_a_folder_without_a_finished_run_is_one_sentence(tiny_run, tmp_path, capsys, main):
    first = {generate: "give the folder of a finished run first", evaluate: "name finished runs first, or replies with"}
    for arguments in ([], ["--seed", 1]):
        assert fails(main, capsys, *arguments).startswith(first[sys.modules[main.__module__]])
    assert f"{tmp_path} holds no run (no config.json)" in fails(main, capsys, tmp_path)
    shutil.copy(tiny_run.workdir / "config.json", tmp_path)
    assert f"{tmp_path} is not finished (no model.json)" in fails(main, capsys, tmp_path)
    (tmp_path / "baseline.json").touch()
    assert f"--predictions NAME={tmp_path}/replies.jsonl" in fails(main, capsys, tmp_path)
