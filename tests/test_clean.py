"""From a collection to a corpus: every stage, the human pass, and the folder."""

import csv
import dataclasses
import json
import random
import sys
import types
from collections import Counter

import clean_scale
import numpy as np
import pytest

from miracle_jax import aspects, clean, cleaning, dataset, reviews, toxicity
from miracle_jax.attributes import Schema
from miracle_jax.cleaning import Dialogue, Drops, Rules
from miracle_jax.instructions import Instructions

SCHEMA = Schema.load()
RULES = clean.Options().rules()
FLAGS = ["--review", "30"]


def run(folder, out, *flags):
    clean.main([str(folder), "--out", str(out), *FLAGS, *flags])


def refused(capsys, *command):
    """The sentence with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        clean.main(list(map(str, command)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error.removeprefix("error: ").strip()


def files(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sheet(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def mark(path, rows):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """(folder, {id: what is planted there})"""
    folder = tmp_path_factory.mktemp("clean") / "collected"
    return folder, clean_scale.write(folder, 480)


@pytest.fixture(scope="module")
def corpus(collection, tmp_path_factory):
    """Cleaned once; tests read it."""
    out = tmp_path_factory.mktemp("clean") / "out"
    run(collection[0], out)
    return out


def test_what_is_planted_is_dropped_by_the_right_stage(collection, corpus):
    _, planted = collection
    counts = clean_scale.found(corpus, planted)
    for kind, (_, share) in clean_scale.PLANTED.items():
        there = sum(other == kind for other in planted.values())
        assert there and counts[kind] >= share * there, kind


def test_every_dialogue_is_in_the_corpus_or_dropped_with_a_reason(collection, corpus):
    card = json.loads((corpus / "card.json").read_text())
    whole = [drop for drop in records(corpus / "dropped.jsonl") if not drop["kept_turns"]]
    assert len({drop["id"] for drop in whole}) == len(whole)
    assert all(drop["reason"] and drop["text"] for drop in whole)
    for stage in card["stages"]:
        assert (
            stage["dropped"] == sum(drop["stage"] == stage["stage"] for drop in whole) == stage["given"] - stage["left"]
        )
    kept = sum(r["dialogues"] for a in card["table7"].values() for s, r in a.items() if s != "test")
    assert kept + card["table7"]["attitude"]["test"]["dialogues"] == 480 - len(whole) == card["stages"][-1]["left"]


def test_the_corpus_is_in_the_released_format(corpus):
    card = json.loads((corpus / "card.json").read_text())
    schema = Schema.load(corpus / "schema.toml")
    assert schema == SCHEMA
    texts = {}
    for split in ("train", "validation"):
        for a, name in enumerate(schema.names):
            found = dataset.read_files([(name, str(corpus / split / f"{name}.jsonl"))], schema)
            assert {i.labels[a] for i in found} == {0, 1} and all(i.topic for i in found)
            assert sum(len(i.questions) == 1 for i in found) == card["table7"][name][split]["dialogues"]
            texts[split, name] = {i.replies for i in found}
            assert all(r[:-1] in texts[split, name] or len(r) == 1 for r in texts[split, name])
    test = dataset.read_files([(None, str(corpus / "test" / "personality.jsonl"))], schema)
    assert all(min(i.labels) >= 0 for i in test)


def test_the_card_tells_where_the_dialogues_are_from_and_what_was_done(corpus):
    card, text = json.loads((corpus / "card.json").read_text()), (corpus / "README.md").read_text()
    assert card["collection"]["model"] == "chains" and card["collection"]["licence"] == "CC0-1.0"
    for shown in ("chains", "CC0-1.0", "2024-01-01", "http://127.0.0.1/v1", "| language | ", "flatter"):
        assert shown in text
    for facts in card["judges"]:
        for fact in facts.values():
            assert fact["accuracy"] > 0.7 and fact["mean"] > 0.5 and not fact["reason"]
    assert all(fact["test_mean"] > 0.5 for fact in card["judges"][1].values())
    every = sum(card["aspects"]["attitude"][aspect]["train"] for aspect in ("pessimistic", "optimistic"))
    assert every == card["table7"]["attitude"]["train"]["dialogues"]


def test_the_same_input_gives_the_same_bytes(collection, corpus, tmp_path):
    folder = tmp_path / "shuffled"
    folder.mkdir()
    for name, content in files(collection[0]).items():
        (folder / name).write_bytes(content)
    lines = (folder / "transcripts.jsonl").read_text().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (folder / "transcripts.jsonl").write_text("".join(lines))
    run(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(corpus)
    left = tmp_path / "out" / ".clean-killed"
    left.mkdir()
    run(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(corpus) and not left.exists()


def test_marks_count_and_are_never_lost(collection, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    for name, content in files(corpus).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    (head, *first), (_, *second) = sheet(out / "review-1.csv"), sheet(out / "review-2.csv")
    dropped = {drop["id"] for drop in records(out / "dropped.jsonl") if drop["stage"] == "round 2"}
    rescued = next(row for row in second if row[0] in dropped)
    test = next(row for row in second if row[1] == "personality")
    first[0][4], rescued[4], test[4] = "n", "Y", "no"
    gone = ["gone", "attitude", "optimistic", "'=A: Why?\nB: It is collected no more.", "n"]
    mark(out / "review-1.csv", [head, *first, gone])
    mark(out / "review-2.csv", [head, *second])
    for _ in range(2):
        run(collection[0], out)
        by_id = {(drop["id"], drop["reason"]) for drop in records(out / "dropped.jsonl")}
        assert {(first[0][0], "rejected by people"), (test[0], "rejected by people")} <= by_id
        assert rescued[0] not in {name for name, _ in by_id}
        again = {row[0]: row for row in sheet(out / "review-1.csv")}
        assert again[first[0][0]] == first[0] and again["gone"] == gone
        again = {row[0]: row for row in sheet(out / "review-2.csv")}
        assert again[rescued[0]] == rescued and again[test[0]] == test
    run(collection[0], out, "--review", "3", "--seed", "5")
    assert "gone" in {row[0] for row in sheet(out / "review-1.csv")}
    said = "review-1.csv: 20 dialogues, 2 marked, of which 1 belong to no dialogue that came this far\n"
    assert said in capsys.readouterr().out


def test_marks_survive_an_encoding_that_lacks_letters_and_whoever_writes_meanwhile(tmp_path):
    some = dialogue("a", ["“Über” is how it goes – always."])
    path = tmp_path / "review-1.csv"
    review = reviews.Reviews(path)
    review.ask([some], SCHEMA)
    path.write_bytes(review.content().decode("utf-8-sig").replace('always.",""', 'always.","n"').encode("cp1252"))
    with pytest.raises(clean.UserError, match="has changed while dialogues were cleaned"):
        review.check()
    review = reviews.Reviews(path)
    assert review.mark(some) is False
    review.ask([some], SCHEMA)
    assert review.rows == [("a", "attitude", "optimistic", some.text, "n")]
    assert review.counts() == {"dialogues": 1, "marked": 1, "rejected": 1, "unused": 0}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"id,attribute,aspect,text,keep\na,b,c,d,maybe\n",
            "review-1.csv:2: keep is 'maybe'; expected y, n or nothing",
        ),
        (b"id,attribute,aspect,text,keep\na,b,c,d,y\na,b,c, d,n\n", "review-1.csv:3: this dialogue is at line 2"),
        (b"id;text\n", "review-1.csv:1: expected a sheet as CSV"),
        (b'id,attribute,aspect,text,keep\na,b,c,"d\n', "review-1.csv:2: unexpected end of data"),
        (b"", "review-1.csv:1: expected a sheet as CSV"),
    ],
)
def test_a_review_file_that_cannot_be_read_is_left_as_it_is(collection, tmp_path, capsys, content, sentence):
    (tmp_path / "card.json").write_text(
        json.dumps({"made_by": "miracle_jax.clean", "files": ["card.json", "review-1.csv"]})
    )
    (tmp_path / "review-1.csv").write_bytes(content)
    assert sentence in refused(capsys, collection[0], "--out", tmp_path)
    assert (tmp_path / "review-1.csv").read_bytes() == content and len(files(tmp_path)) == 2


def test_what_the_command_cannot_use_is_one_sentence(collection, corpus, tmp_path, capsys):
    folder, _ = collection
    assert "give the folder of one collection" in refused(capsys)
    assert "name the local folder of the corpus with --out" in refused(capsys, folder)
    assert "collection.json does not exist" in refused(capsys, tmp_path, "--out", tmp_path / "o")
    assert "files that this command did not write (collection.json" in refused(capsys, folder, "--out", folder)
    (tmp_path / "mine").write_text("x")
    assert "(mine); name a new folder" in refused(capsys, folder, "--out", tmp_path)
    for flags, sentence in [
        (["--near-duplicates", "1"], "--near-duplicates 1: expected 0.3 to 0.95, or 0"),
        (["--min-score", "2"], "from 0 to 1"),
        (["--min-turns", "0"], "at least 1"),
        (["--min-turns", "21"], "cut to 20 turns"),
        (["--language", "klingon"], "--language klingon: unknown; there are a"),
        (["--toxicity", "missing.csv", "--language", ""], "missing.csv does not exist"),
    ]:
        assert sentence in refused(capsys, folder, "--out", tmp_path / "new", *flags)
        assert not files(tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"split": "dev"}, "record 'a': its split is 'dev'; expected train, validation, test"),
        ({"topic": 5}, "record 'a': its topic is no text"),
        ({"topic": "\ud800"}, "half of a surrogate pair"),
        ({"tag": ["optimistic"]}, "its tag is no mapping"),
        ({"tag": {"mood": "good"}}, "its tag does not fit the schema: unknown attribute 'mood'"),
        ({"tag": {}}, "its tag names 0 aspects; expected one aspect of one attribute"),
        ({"status": "late"}, "transcripts.jsonl:1: id 'a' has status 'late'"),
    ],
)
def test_a_record_that_is_no_collections_is_named(tmp_path, changes, sentence):
    record = {"id": "a", "split": "train", "topic": "t", "tag": {"attitude": "optimistic"}, "status": "done"}
    (tmp_path / "transcripts.jsonl").write_text(json.dumps(record | {"reason": "", "text": ""} | changes) + "\n")
    with pytest.raises(clean.UserError, match=".*") as error:
        cleaning.read(tmp_path / "transcripts.jsonl", SCHEMA, RULES, Drops())
    assert sentence in str(error.value)


GOOD = ("How is it there?", "It is bright, and it stays so.")


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Why?", "It is so.", "answer of fewer than 5 words"),
        ("Why?", "Well, why do you ask me?", "answer with a question mark"),
        ("Why?", "word " * 61, "answer of more than 60 words"),
        ("Why?", "x" * 1201, "answer of more than 60 words"),
        ("why " * 31, GOOD[1], "question of more than 30 words"),
        ("Why?", "One is. Two are. Three are. Four are.", "answer of more than 3 sentences"),
        ("...", GOOD[1], "question with a placeholder"),
        ("(a question)", GOOD[1], "question with a placeholder"),
        ("Why?", "I was born in [city] long ago.", "answer with a placeholder"),
        ("Why?", "[[your answer about it here]]", "answer with a placeholder"),
        ("Why?", "As an AI language model I feel nothing.", "answer of a language model about itself"),
        ("Why?", "It is BRIGHT and it stays so", "an answer that repeats an earlier one"),
    ],
)
def test_a_dialogue_is_cut_before_the_first_turn_that_breaks_a_rule(question, answer, reason):
    other = ("And now?", "Mr. Hill says 3.5 hours... or more.")
    questions, answers = zip(GOOD, other, (question, answer), other, strict=True)
    assert RULES.turns(questions, answers) == (2, reason)
    assert Rules(1, 3, 99, 99, 9).turns(questions[:2], answers[:2]) == (2, "")


def rounds_over(attribute, dialogues, sample=30):
    """What is left after both rounds, with judges that learned from the dialogues, and the facts of the second."""
    schema = Schema.from_toml(f'[[attribute]]\nname = "x"\naspects = {json.dumps(attribute)}\n')
    nobody = (reviews.Reviews("/nowhere/1.csv"), reviews.Reviews("/nowhere/2.csv"))
    rounds = aspects.Rounds(schema, aspects.learner("", 0), nobody, sample, 0.5, 0, Drops())
    return rounds.second(rounds.first(dialogues)), rounds.facts[1]["x"]


def said(aspect, number, strength, chance, words=6):
    """A dialogue of one aspect. strength: the chance of a word to be of its aspect's vocabulary."""

    def word():
        return f"w{aspect}{chance.randrange(40)}" if chance.random() < strength else f"c{chance.randrange(200)}"

    answers = tuple(" ".join(word() for _ in range(words)) for _ in range(4))
    return Dialogue(f"train/{aspect}/{number}", "train", (aspect,), f"topic {number % 50}", ("Why?",) * 4, answers)


@pytest.mark.parametrize("numbers", [(200, 200), (40, 200), (30, 60, 90, 120, 150)])
def test_neither_rare_aspects_nor_many_are_dropped_for_it(numbers):
    chance = random.Random(0)
    dialogues = [said(aspect, i, 0.3, chance) for aspect, number in enumerate(numbers) for i in range(number)]
    left, facts = rounds_over([f"a{i}" for i in range(len(numbers))], dialogues)
    kept = Counter(d.labels[0] for d in left)
    for aspect, number in enumerate(numbers):
        assert kept[aspect] > 0.85 * number, (kept, facts)
    assert facts["accuracy"] > 0.85


def test_dialogues_of_another_aspect_than_their_label_are_dropped_in_several_aspects():
    chance = random.Random(1)
    dialogues = [said(aspect, i, 0.4, chance) for aspect in range(4) for i in range(60)]
    wrong = [dataclasses.replace(said(0, i, 0.4, chance), id=f"wrong/{i}", labels=(3,)) for i in range(15)]
    left, _ = rounds_over(list("abcd"), dialogues + wrong)
    assert sum(d.id.startswith("wrong") for d in left) <= 3 and len(left) > 0.85 * len(dialogues)


def test_probabilities_for_classes_in_other_proportions():
    # Bayes' rule by hand: odds 3:1 learned at 1:4 are odds 12:1 at 1:1.
    found = aspects.reweighted(np.array([[0.75, 0.25]]), np.array([20, 80]), np.array([1, 1]))
    np.testing.assert_allclose(found, [[12 / 13, 1 / 13]], rtol=1e-12)
    again = aspects.reweighted(found, np.array([1, 1]), np.array([20, 80]))
    np.testing.assert_allclose(again, [[0.75, 0.25]], rtol=1e-12)


def test_what_people_reject_teaches_no_judge(tmp_path):
    chance = random.Random(2)
    dialogues = [said(aspect, i, 0.5, chance) for aspect in (0, 1) for i in range(30)]
    schema = Schema.from_toml('[[attribute]]\nname = "x"\naspects = ["a", "b"]\n')
    learned = []

    def learn(texts, labels, classes):
        learned.append(set(texts))
        return lambda texts: np.full((len(texts), 2), 0.5)

    path = tmp_path / "review-2.csv"
    second = reviews.Reviews(path)
    second.ask(dialogues, schema)
    path.write_bytes(second.content())
    rows = sheet(path)
    rows[1][4] = "n"
    mark(path, rows)
    both = (reviews.Reviews(tmp_path / "none.csv"), reviews.Reviews(path))
    rounds = aspects.Rounds(schema, learn, both, 5, 0.5, 0, Drops())
    rounds.second(dialogues)
    rejected = next(d for d in dialogues if d.id == rows[1][0])
    assert learned and not any(set(rejected.answers) & texts for texts in learned)


def test_an_answer_that_was_cut_off_is_none(tmp_path):
    text = "A: How is it?\nB: It is as bright as ever.\nA: And there?\nB: It is full of light and the"
    record = {"id": "a", "split": "train", "topic": "t", "tag": {"attitude": "optimistic"}, "status": "done"}
    record |= {"reason": "", "text": text, "finish": "length"}
    lines = [json.dumps(record), json.dumps(record | {"id": "b", "finish": "stop"}), ""]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    drops = Drops()
    rules = clean.Options(min_turns=1).rules()
    found = {d.id: len(d.answers) for d in cleaning.read(tmp_path / "t.jsonl", SCHEMA, rules, drops)}
    assert found == {"a": 1, "b": 2}
    assert [(drop.id, drop.kept_turns) for drop in drops] == [("a", 1)] and "--max-tokens" in drops[0].reason


def test_an_answer_that_copies_the_example_is_none():
    examples = cleaning.examples(Instructions.load())
    rules = clean.Options().rules(examples)
    copied = ("What now?", "Oh! I made three mistakes this week and learned from every one, you know.")
    own = ("And now?", "I made mistakes this week, three of them, and I learned a lot.")
    assert rules.turns(*zip(own, copied, strict=True)) == (1, "an answer that copies the example")
    assert RULES.turns(*zip(own, copied, strict=True)) == (2, "")


def test_long_dialogues_are_cut_and_short_ones_dropped():
    many = [f"It was day {i} of that month." for i in range(30)]
    assert RULES.turns(["Why?"] * 30, many) == (20, "more than 20 turns")
    assert RULES.turns(["Why?"], many[:1]) == (1, "fewer than 2 turns")


def dialogue(name, answers, split="train", labels=(-1, 1, -1), topic="t"):
    return Dialogue(name, split, labels, topic, ("Why?",) * len(answers), tuple(answers))


def test_the_first_of_near_duplicates_is_kept():
    text = "the sea was wide and grey and the gulls stood on the pier as if they had paid for it"
    drops = Drops()
    some = [dialogue("a", [text], "test"), dialogue("b", [text.title() + "!"]), dialogue("c", ["so " + text]),
            dialogue("d", [text[::-1]]), dialogue("e", [text[:45]])]  # fmt: skip
    assert [d.id for d in cleaning.without_duplicates(some, 0.7, drops)] == ["a", "d", "e"]
    assert [(d.id, d.reason, d.detail) for d in drops] == [
        ("b", "exact duplicate", "of a"), ("c", "near duplicate", "0.95 of a")
    ]  # fmt: skip
    assert len(cleaning.without_duplicates(some, 0.0, Drops())) == 4


def test_balance_keeps_as_many_of_every_aspect_of_a_topic():
    some = [dialogue(f"{topic}{i}", [], labels=(-1, i % 2, -1), topic=topic) for topic in "ab" for i in range(6)]
    some += [dialogue(f"c{i}", [], labels=(-1, 1, -1), topic="c") for i in range(3)]
    some = [d for d in some if d.id not in ("a0", "a2")] + [dialogue("t", [], "test", (0, 1, 1), "a")]
    kept = cleaning.balanced(some, SCHEMA, 0, drops := Drops())
    counts = Counter((d.topic, d.labels[1]) for d in kept if d.split == "train")
    assert counts == {("a", 0): 1, ("a", 1): 1, ("b", 0): 3, ("b", 1): 3} and "t" in {d.id for d in kept}
    assert len(drops) + len(kept) == len(some)


JIGSAW = "id,comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate\n"


def write_comments(path):
    rng = random.Random(0)
    words = {0: "river garden morning letter kind thank window".split(), 1: "idiot stupid trash hate ugly liar".split()}
    rows = []
    for i in range(60):
        text = " ".join(rng.choices(words[i % 2], k=8))
        rows.append(f'{i},"a ""{text}""\n\n of {i}",0,0,0,0,{i % 2},0\n')
    path.write_text(JIGSAW + "".join(rows))


def test_toxic_dialogues_are_dropped_by_a_judge_of_labelled_comments(collection, tmp_path):
    write_comments(tmp_path / "comments.csv")
    comments = list(toxicity.read_comments(tmp_path / "comments.csv"))
    assert len(comments) == 60 and sum(toxic for _, toxic in comments) == 30 and "\n\n of 7" in comments[7][0]
    score, facts = toxicity.scorer(str(tmp_path / "comments.csv"), clean_learner(), 0)
    assert facts == {"source": "comments.csv", "toxic": 30, "harmless": 30, "accuracy": 1.0}
    some = [
        dialogue("a", ["The morning garden, thank you."]),
        dialogue("b", ["Kind letter.", "You stupid liar, trash."]),
    ]
    drops = Drops()
    assert [d.id for d in toxicity.without_toxic(some, score, 0.5, drops)] == ["a"]
    assert [(d.id, d.stage, d.reason) for d in drops] == [("b", "toxicity", "a turn above 0.5")]


def clean_learner():
    from miracle_jax import aspects

    return aspects.learner("", 0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (JIGSAW + "1,a,0,0,0,0,0,2\n", "c.csv:2: a label is '2'; expected 0 or 1"),
        (JIGSAW + "1,a,0,0,0,0,0\n", "c.csv:2: a label is ''; expected 0 or 1"),
        ("id,comment_text,toxic\n", "c.csv:1: expected a sheet as CSV, whose first line names the columns"),
        (JIGSAW + '1,"' + "x" * 200_000 + '",0,0,0,0,0,0\n', "c.csv:2: field larger"),
        (JIGSAW + "1,a,0,0,0,0,0,1\n", "c.csv has 0 harmless and 1 toxic comments; a judge needs at least 10 of both"),
    ],
)
def test_comments_that_cannot_be_learned_from_are_one_sentence(tmp_path, content, sentence):
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(clean.UserError) as error:
        toxicity.scorer(str(tmp_path / "c.csv"), clean_learner(), 0)
    assert sentence in str(error.value)


def test_detoxify_scores_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(clean.UserError, match="detoxify is not installed; run pip install detoxify"):
        toxicity.scorer("detoxify", clean_learner(), 0)

    class Detoxify:
        def __init__(self, name):
            assert name == "original"

        def predict(self, texts):
            rude = [float("rude" in text) for text in texts]
            return {"toxicity": [0.1] * len(texts), "insult": rude}

    monkeypatch.setitem(sys.modules, "detoxify", types.SimpleNamespace(Detoxify=Detoxify))
    score, facts = toxicity.scorer("detoxify", clean_learner(), 0)
    np.testing.assert_allclose(score(["kind", "rude"] * 50), [0.1, 1.0] * 50)
    assert facts == {"source": "detoxify"}


def test_a_few_dialogues_pass_without_judges_and_it_is_said(tmp_path, capsys):
    clean_scale.write(tmp_path / "few", 12)
    run(tmp_path / "few", tmp_path / "out", "--language", "")
    said = capsys.readouterr().out
    assert "round 1, attitude: no judges: an aspect has" in said and "wrote" in said
    assert json.loads((tmp_path / "out" / "card.json").read_text())["stages"][-1]["left"] > 0


def test_a_collection_of_nothing_usable_says_so(tmp_path, capsys):
    clean_scale.write(tmp_path / "c", 1)
    path = tmp_path / "c" / "transcripts.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text": "\ud800 I'm sorry, but no."}) + "\n")
    run(tmp_path / "c", tmp_path / "out")
    assert "no training dialogue is left" in capsys.readouterr().out
    assert records(tmp_path / "out" / "dropped.jsonl")[0]["reason"] == "half of a surrogate pair"
