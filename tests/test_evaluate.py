"""The evaluate command: runs in their variants and other systems' files, in one report."""

import copy
import dataclasses
import itertools
import json
import shutil
import types

import checkpoints
import micro
import numpy as np
import parity
import pytest
from test_generate import ALL, fails, with_data

from miracle_jax import config, evaluate, generate, judge, systems, tables, word_judges
from miracle_jax.attributes import Attribute, Schema
from miracle_jax.errors import UserError

AVERAGE = "personalization"
COLUMNS = ["bleu", "rouge", "nli", "ppl", "distinct", "self_bleu"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two contexts of each personality with a reference that shows its language style."""
    records = []
    for number, tag in enumerate(itertools.product((0, 1), repeat=3)):
        for i in (number, number + 1):
            records.append(micro.dialogue(i, micro.REPLIES["language_style"][tag[0]], list(tag)))
    return micro.write_lines(tmp_path_factory.mktemp("data") / "labelled.jsonl", records)


@pytest.fixture
def run(tiny_run, tiny_model, tmp_path, monkeypatch):
    """A folder to evaluate that other tests do not look into."""
    monkeypatch.setattr(evaluate, "load", lambda workdir: tiny_model)
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl", "model.json"):
        shutil.copy(tiny_run.workdir / name, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def scorers(tiny_model, tmp_path_factory):
    """Flags of judges and a language model."""
    folder = tmp_path_factory.mktemp("scorers")
    encoder = checkpoints.write(folder / "bert", parity.load("bert_gelu"), roles=checkpoints.BERT_ROLES)
    model = checkpoints.write(folder / "lm", parity.load("llama_grouped"))
    data = tiny_model.config.data
    options = judge.Options(
        encoder=str(encoder), train=data.train, validation=data.validation, pairs=data.train,
        pairs_validation=data.validation, epochs=1,
    )  # fmt: skip
    judge.train(str(folder / "judges"), options)
    return ["--judges", str(folder / "judges"), "--language-model", str(model)]


def evaluated(*arguments, out):
    """The report of the command, whose files lie in `out`."""
    evaluate.main([*map(str, arguments), "--out", str(out)])
    return json.loads((out / "report.json").read_text())


def details(out):
    return [json.loads(line) for line in (out / "details.jsonl").read_text().splitlines()]


def chosen(labelled, schema, per_personality=0):
    return systems.read_test_set(labelled, schema, per_personality, 0).chosen


def write_answers(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_with_and_without_its_energy(run, tiny_model, labelled, capsys):
    evaluate.main([str(run), "--data", labelled, "--per-personality", "1"])
    out = run / "evaluation"
    assert {path.name for path in out.iterdir()} == {
        "report.md", "report.json", "report.png", "details.jsonl", "replies", "scores"
    }  # fmt: skip
    report, lines = json.loads((out / "report.json").read_text()), details(out)
    assert report["setup"]["contexts"] == report["setup"]["personalities"] == len(lines) == 8
    assert list(report["systems"]) == ["run", "run w/o energy", "references"]
    for figures in report["systems"].values():
        assert list(figures["paper"])[:4] == [AVERAGE, *micro.REPLIES] and list(figures["by_personality"]) == ALL
        assert all(0 <= f["low"] <= f["mean"] <= f["high"] <= 1 for n, f in figures["paper"].items() if n != "distinct")
    assert report["systems"]["references"]["paper"]["language_style"]["mean"] == 1.0  # the corpus is easy
    assert report["setup"]["judges_accuracy"]["language_style"] == 1.0
    found = chosen(labelled, tiny_model.schema, 1)
    contexts = [{"input": instance.questions, "output": instance.replies} for instance in found.values()]
    expected = {
        "run": [reply.text for reply in tiny_model.replies(contexts, ALL)],
        "run w/o energy": [reply.text for reply in tiny_model.replies(contexts)],
        "references": [instance.replies[-1] for instance in found.values()],
    }
    for name, texts in expected.items():
        assert [line["systems"][name]["reply"] for line in lines] == texts
        for metric in (AVERAGE, "bleu"):
            values = [line["systems"][name][metric] for line in lines]
            assert report["systems"][name]["paper"][metric]["mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert expected["run"] != expected["run w/o energy"]
    assert [(line["id"], line["question"]) for line in lines] == [(i, x.questions[-1]) for i, x in found.items()]
    assert [line["systems"]["run"]["personality"] for line in lines] == ALL
    times = report["times"]["run"]
    assert times["training_seconds"] > 0 and times["seconds_per_1000"] > 0 and times["answered"] == 8
    assert times["trained_on"] == times["answered_on"] and "usable" in times["trained_on"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("8 contexts, in percent but for PPL; judges: TF-IDF")
    assert shown[2].split() == ["Avg.↑", "L.↑", "A.↑", "M.↑", *tables.COLUMNS.values()]
    assert [line.split("  ")[0] for line in shown[3:7]] == [*report["systems"], "the judges' own accuracy"]
    assert shown[-1] == f"report: {out / 'report.md'}"


def test_every_column_of_table_1_twice_and_nothing_is_computed_twice(run, labelled, scorers, tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = [run, "--data", labelled, "--per-personality", 1, *scorers]
    report = evaluated(*flags, out=out)
    for system in ("run", "run w/o energy", "references"):
        figures = report["systems"][system]
        assert list(figures["paper"]) == [AVERAGE, *micro.REPLIES, *COLUMNS]
        for block in ({n: f["mean"] for n, f in figures["paper"].items()}, figures["released"]):
            assert set(block) == {AVERAGE, *micro.REPLIES, *COLUMNS} and block["ppl"] > 1
            assert {n: v for n, v in block.items() if n != "ppl" and not 0 <= v <= 1 + 1e-9} == {}
    overlap = report["setup"]["judges_overlap"]["run"]
    assert overlap["shared"] == overlap["learned_from"] > 0  # these judges learned from the run's own training answers
    both = "- replies that the judges learned from and run too: {shared} of {learned_from}\n".format(**overlap)
    assert both in (out / "report.md").read_text()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for module, name in ((judge.Judges, "attributes"), (judge.Judges, "consistency"), (generate, "write_file")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(evaluate.LanguageModel, "score", lambda *_: pytest.fail("computed again"))
    evaluated(*flags, out=out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_the_same_command_writes_the_same_report_elsewhere(run, labelled, tmp_path):
    reports = [
        evaluated(run, "--data", labelled, "--per-personality", 1, out=tmp_path / name) for name in ("one", "two")
    ]
    for report in reports:
        report.pop("times")
    assert reports[0] == reports[1]
    one, two = ((tmp_path / name / "details.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    one, two = ((tmp_path / name / "report.md").read_text().partition("## Efficiency")[0] for name in ("one", "two"))
    assert one == two and len(one) > 1000


def test_each_attribute_alone_is_asked_for_and_judged_alone(run, labelled, tmp_path):
    flags = ["--data", labelled, "--per-personality", 1, "--variants", "attributes"]
    report, lines = evaluated(run, *flags, out=tmp_path / "out"), details(tmp_path / "out")
    assert list(report["systems"]) == ["run", "run: L.", "run: A.", "run: M.", "references"]
    for a, (name, system) in enumerate(zip(micro.REPLIES, ("run: L.", "run: A.", "run: M."), strict=True)):
        paper = report["systems"][system]["paper"]
        assert paper[AVERAGE]["mean"] == paper[name]["mean"]
        compared = report["systems"][system]["compared"]  # an average over one is not compared with that over three
        assert AVERAGE not in compared and compared[name] is not None
        assert [paper[other]["mean"] for other in micro.REPLIES if other != name] == [None, None]
        asked = [line["systems"][system]["personality"] for line in lines]
        assert asked == [personality.split(", ")[a] for personality in ALL]
    row = tables.table(report, "paper", bold=False)[2]
    assert row[0] == "run: L." and row[1] == row[2] and row[3:5] == ["–", "–"]


def test_the_strength_of_the_control_is_a_curve(run, labelled, tmp_path):
    flags = ["--data", labelled, "--per-personality", 1]
    report = evaluated(run, *flags, "--variants", "strength", out=tmp_path / "out")
    curve = [tuple(figures["strength"][1:]) for figures in report["systems"].values() if figures["strength"]]
    assert curve == [("lambda", w) for w in systems.WEIGHTS] + [("K", k) for k in systems.DRAWS]
    assert systems.WEIGHTS == (0.0, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0, 128.0)
    lines = details(tmp_path / "out")
    evaluated(run, *flags, out=tmp_path / "energy")
    replies = [{name: x["reply"] for name, x in line["systems"].items()} for line in lines]
    for line, other in zip(replies, details(tmp_path / "energy"), strict=True):
        assert line["run, lambda 0"] == other["systems"]["run w/o energy"]["reply"]
        assert line["run, lambda 1"] == other["systems"]["run"]["reply"] == line["run"]  # its own weight is 1
    assert any(line["run, lambda 128"] != line["run, lambda 0"] for line in replies)
    assert any(line["run, K 1"] != line["run, K 16"] for line in replies)


def test_a_report_says_how_many_latents_failed(run, labelled, tmp_path, capsys):
    flags = ["--data", labelled, "--per-personality", 1, "--sample.max-steps", 1]
    report = evaluated(run, *flags, out=tmp_path / "out")
    assert report["systems"]["run"]["not_ok"] == 8
    assert "8 latents of run are not ok" in capsys.readouterr().out
    assert "8 latents of run did not arrive" in (tmp_path / "out" / "report.md").read_text()


def test_two_runs_have_a_curve_each_whatever_they_are_called(run, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "WEIGHTS", (0.0, 1.0))
    monkeypatch.setattr(systems, "DRAWS", (1,))
    second = shutil.copytree(run, tmp_path / "_a$_$b{c}")
    flags = ["--data", labelled, "--per-personality", 1, "--variants", "strength"]
    report = evaluated(run, second, *flags, out=tmp_path / "out")
    assert [f["strength"][0] for f in report["systems"].values() if f["strength"]] == ["run"] * 3 + ["_a$_$b{c}"] * 3
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------ files of replies


@pytest.fixture
def answers(labelled, tiny_model):
    """Good lines of a file of replies: every reference, which a test may change."""
    schema = tiny_model.schema
    return [
        {"id": i, "reply": instance.replies[-1], "personality": schema.describe(instance.labels)}
        for i, instance in chosen(labelled, schema).items()
    ]


@pytest.fixture
def judged(tiny_model):
    """Flags of judges for systems that are no runs."""
    data = tiny_model.config.data
    return ["--train", *data.train, "--validation", *data.validation]


def test_systems_of_others_beside_a_run(run, labelled, answers, tmp_path):
    lines = [line | {"reply": ("No", "", "ж 🙂")[n % 3]} for n, line in enumerate(answers)]
    for line in lines:  # it answers whatever is wanted, and its ids are numbers
        line.update(personality=None, id=int(line["id"]))
    named = [
        f"echo={write_answers(tmp_path / 'echo.jsonl', answers[::-1])}",
        f"short={write_answers(tmp_path / 'short.jsonl', lines)}",
    ]
    report = evaluated(run, "--data", labelled, "--predictions", *named, "--variants", "none", out=tmp_path / "out")
    found = report["systems"]
    assert list(found) == ["run", "echo", "short", "references"]
    assert found["echo"]["paper"] == found["references"]["paper"]
    assert found["echo"]["paper"]["bleu"]["mean"] == pytest.approx(1)
    assert found["short"]["paper"]["bleu"]["mean"] == 0
    empty = [line["systems"]["short"] for line in details(tmp_path / "out") if not line["systems"]["short"]["reply"]]
    assert len(empty) == 5 and all(line[AVERAGE] == line["bleu"] == line["rouge"] == 0 for line in empty)
    assert found["run"]["compared"] == {} and found["echo"]["compared"]["bleu"]["difference"] > 0
    assert not {"distinct", "self_bleu"} & set(found["echo"]["compared"])  # no single reply has them
    assert found["short"]["silent"] == 5 and found["run"]["settings"] == {"decode.max_new_tokens": 14}
    assert "5 replies of short have no word." in (tmp_path / "out" / "report.md").read_text()
    assert list(report["times"]) == ["run"]


def test_five_systems_without_a_run(labelled, answers, judged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", lambda workdir: pytest.fail("there is no run"))
    paths = [write_answers(tmp_path / f"{n}.jsonl", answers) for n in range(5)]
    flags = ["--data", labelled, "--predictions", *(f"{n}={path}" for n, path in enumerate(paths)), *judged]
    report = evaluated(*flags, out=tmp_path / "out")
    assert list(report["systems"]) == [*"01234", "references"]
    assert report["systems"]["0"]["paper"] == report["systems"]["references"]["paper"]
    assert report["systems"]["1"]["compared"]["bleu"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": None}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "†" not in text.partition("## Difference")[0].partition("| --- |")[2] and "## Efficiency" not in text


def test_control_is_split_by_whether_the_context_agrees(run, labelled, answers, judged, tmp_path, capsys):
    """Of three attributes only the language style can be heard in these replies."""
    style = micro.REPLIES["language_style"]
    every = [
        {"id": line["id"], "personality": asked, "reply": style["lyrical" in asked].format("river")}
        for line in answers for asked in ALL
    ]  # fmt: skip
    plain = [{"id": line["id"], "reply": style[0].format("river")} for line in answers]
    named = [
        f"all={write_answers(tmp_path / 'all.jsonl', every)}",
        f"plain={write_answers(tmp_path / 'plain.jsonl', plain)}",
        f"labelled={write_answers(tmp_path / 'labelled.jsonl', answers)}",
    ]  # fmt: skip
    flags = ["--data", labelled, "--predictions", *named, *judged, "--counterfactual", True]
    report = evaluated(*flags, out=tmp_path / "out")
    split = {name: figures["counterfactual"] for name, figures in report["systems"].items()}
    assert split["all"]["agrees"]["language_style"] == split["all"]["contradicts"]["language_style"] == 1
    told = [instance for instance in chosen(labelled, Schema.load()).values() if len(instance.questions) > 1]
    share = np.mean([instance.labels[0] == 0 for instance in told])
    assert split["plain"]["agrees"]["language_style"] == pytest.approx(share)
    assert split["plain"]["contradicts"]["language_style"] == pytest.approx(1 - share)
    for part in split["all"].values():
        assert part[AVERAGE] == pytest.approx(np.mean([part[name] for name in micro.REPLIES]))
    assert split["labelled"] is split["references"] is None
    assert "labelled has no counterfactual figures: " in capsys.readouterr().err
    assert "## Counterfactual control" in (tmp_path / "out" / "report.md").read_text()
    report = evaluated(run, "--data", labelled, "--per-personality", 1, "--counterfactual", True, out=tmp_path / "run2")
    without = report["systems"]["run w/o energy"]["counterfactual"]
    for name in micro.REPLIES:  # it says the same whatever is wanted, and of two aspects one is heard
        assert without["agrees"][name] + without["contradicts"][name] == pytest.approx(1)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a[1:] + [a[1] | {"id": "99"}], "the test set has no instance 99\nthere is no reply to 0 (plain, "),
        (lambda a: [*a, a[3]], "17: id '{3}' is at {path}:4 already, with the same personality; expected one reply"),
        (lambda a: [a[0] | {"personality": "loud"}, *a[1:]], "{path}:1: unknown aspect 'loud'"),
        (lambda a: [a[0] | {"personality": "lyrical"}, *a[1:]], "there is no reply to {0} (plain, pessimistic, emo"),
        (lambda a: [{"id": a[0]["id"]}, *a[1:]], "{path}:1: 'reply' is missing or not a text"),
        (lambda a: [a[0] | {"input": ["Who?"], "output": []}, *a[1:]], "{path}:1: id '{0}' has another context than"),
        (lambda a: [a[0] | {"input": "Who?"}, *a[1:]], "{path}:1: 'input' is missing or not a list of texts"),
        (lambda a: [a[0] | {"id": None}, *a[1:]], "{path}:1: 'id' is missing or not a text"),
        (lambda a: [], "{path}:1: there is no reply; expected one JSON object a line"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_the_test_set_is_refused(labelled, answers, judged, tmp_path, capsys, change, message):
    path = write_answers(tmp_path / "a.jsonl", change(answers))
    for number, line in enumerate(answers):
        message = message.replace(f"{{{number}}}", line["id"])
    flags = ["--data", labelled, "--predictions", f"a={path}", *judged, "--out", tmp_path / "out"]
    found = fails(evaluate.main, capsys, *flags)
    assert message.replace("{path}", path) in found and found.startswith(path)
    assert not (tmp_path / "out" / "report.json").exists()


# ------------------------------------------------------------------------------------------------ the table


def figures(*means, compared=None):
    """A system's part of a report, of the columns Avg., L., BLEU and PPL."""
    named = dict(zip((AVERAGE, "style", "bleu", "ppl"), means, strict=True))
    return {
        "paper": {name: {"mean": value, "low": value, "high": value} for name, value in named.items()},
        "released": named, "compared": compared or {}, "by_personality": {}, "counterfactual": None, "strength": None,
        "silent": 0,
    }  # fmt: skip


def test_the_best_is_bold_and_what_differs_has_a_dagger():
    def paired(p):
        return {"difference": 0.1, "low": 0.0, "high": 0.2, "p": p}

    report = {
        "setup": {"judges_accuracy": {"style": 0.9, "consistency": 0.8}}, "attributes": {"style": "S."},
        "systems": {
            "ours": figures(0.9, 0.9, 0.2, 30.0),
            "a|b": figures(0.8, 0.90001, 0.1, 20.0, compared={"bleu": paired(0.04), "ppl": paired(0.06)}),
            "references": figures(0.95, 0.95, 1.0, 10.0, compared={"bleu": paired(0.001), "ppl": paired(None)}),
        },
    }  # fmt: skip
    rows = tables.table(report, "paper", bold=True)
    head = ["", "Avg.↑", "S.↑", "BLEU↑", "ROUGE↑", "NLI↑", "PPL↓", "Distinct↑", "sBLEU↓"]
    nothing = ["–", "–"]
    assert rows == [
        head,
        ["ours", "**90.00**", "**90.00**", "**20.00**", "–", "–", "30.00", *nothing],
        ["a|b", "80.00", "**90.00**", "10.00†", "–", "–", "**20.00**", *nothing],
        ["references", "95.00", "95.00", "100.00†", "–", "–", "10.00", *nothing],
        ["the judges' own accuracy", "90.00", "90.00", "–", "–", "80.00", "–", *nothing],
    ]
    assert not any("*" in cell or "†" in cell for row in tables.table(report, "paper", bold=False) for cell in row)
    assert tables._pipes(rows)[3].startswith(r"| a\|b | 80.00 |")


# ------------------------------------------------------------------------------------------------ mistakes


def test_the_choice_of_contexts_is_even_and_seeded(tiny_model, labelled):
    schema = tiny_model.schema
    every = systems.read_test_set(labelled, schema, 0, 0)
    assert list(every.ids) == [str(i) for i in range(16)] == sorted(every.chosen, key=int)

    def drawn(per_personality, seed):
        return systems.choose(every.chosen, per_personality, seed)

    assert [instance.labels for instance in drawn(1, 0).values()] == schema.personalities()
    assert drawn(1, 0) == drawn(1, 0) and drawn(20, 0) == every.chosen
    assert any(drawn(1, 0) != drawn(1, seed) for seed in range(1, 5))


def test_what_is_not_labelled_is_not_judged_and_ids_are_unique(tmp_path, run, capsys):
    records = [micro.dialogue(i, "I saw the {}.", tag) for i, tag in enumerate(([None, 1, None], [0, None, 1]))]
    path = micro.write_lines(tmp_path / "partly.jsonl", records)
    evaluated(run, "--data", path, out=tmp_path / "out")
    found = [line["systems"]["run"] for line in details(tmp_path / "out")]
    assert [[answer[name] is None for name in micro.REPLIES] for answer in found] == [
        [True, False, True], [False, True, False]
    ]  # fmt: skip
    assert [answer["personality"] for answer in found] == ["optimistic", "plain, critical"]
    capsys.readouterr()
    path = micro.write_lines(tmp_path / "same.jsonl", [record | {"id": "same"} for record in records])
    assert fails(evaluate.main, capsys, run, "--data", path).endswith("instances with the id same; number them anew")
    path = micro.write_lines(tmp_path / "none.jsonl", [{"input": ["Who?"], "output": ["I."], "tag": [None] * 3}])
    assert "'tag' names no aspect" in fails(evaluate.main, capsys, run, "--data", path)
    path = micro.write_lines(tmp_path / "unknown.jsonl", [{"input": ["Who?"], "output": ["I."], "tag": None}])
    assert "no aspect of id 0 is known" in fails(evaluate.main, capsys, run, "--data", path)
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl" in fails(evaluate.main, capsys, run, "--data", tmp_path / "empty.jsonl")


def test_what_is_no_way_to_evaluate_is_one_sentence(run, labelled, tmp_path, capsys):
    data = ["--data", labelled]
    for flags, message in (
        (["--per-personality", -1], "--per-personality and --seed must be at least 0"),
        (["--out", "gs://bucket/out"], "--out gs://bucket/out is not a local path"),
        (["--out", labelled], f"--out {labelled} is a file; name a folder"),
        (["--predictions", "run"], "--predictions 'run' is not of the form NAME=FILE.jsonl"),
        (["--predictions", f"a={tmp_path}/none.jsonl"], f"file {tmp_path}/none.jsonl does not exist"),
        (["--judges", tmp_path], f"{tmp_path} holds no judges"),
        (
            ["--judges", tmp_path, "--train", f"attitude={labelled}"],
            "--train and --validation are of judges that learn",
        ),
    ):
        assert fails(evaluate.main, capsys, run, *data, "--per-personality", 1, *flags).startswith(message)
    assert fails(evaluate.main, capsys, run, f"{run.parent}/./run") == "a run is named twice; name each once"
    same = write_answers(tmp_path / "a.jsonl", [])
    assert fails(evaluate.main, capsys, "--predictions", f"a={same}", f"a={same}").startswith("--predictions names 'a'")


def test_runs_and_judges_of_other_attributes_are_refused(run, tiny_run, tiny_model, labelled, monkeypatch, capsys):
    other = types.SimpleNamespace(schema=Schema((Attribute("mood", ("a", "b")),)))
    monkeypatch.setattr(evaluate, "Judges", lambda folder: other)
    message = fails(evaluate.main, capsys, run, "--data", labelled, "--judges", "mine")
    assert message.startswith("the judges in mine are of mood, this run of language_style, ")
    strange = copy.copy(tiny_model)
    strange.schema = other.schema
    monkeypatch.setattr(evaluate, "load", lambda workdir: tiny_model if workdir == str(run) else strange)
    second = shutil.copytree(run, run.parent / "second")
    message = fails(evaluate.main, capsys, run, second, "--data", labelled)
    assert message == "second has other attributes than run; they need a table each"


def test_a_run_on_frozen_tokens_is_judged_by_files_that_are_named(run, tiny_model, labelled, monkeypatch, capsys):
    data = tiny_model.config.data
    frozen = with_data(tiny_model, train=(), validation=(), frozen="data.npz")
    monkeypatch.setattr(evaluate, "load", lambda workdir: frozen)
    arguments = [run, "--data", labelled, "--per-personality", 1]
    train, validation = ["--train", *data.train], ["--validation", *data.validation]
    for named in ([], train, validation):
        assert fails(evaluate.main, capsys, *arguments, *named) == (
            "this run learned from tokens (data.npz), but the judge learns from text; name its files with "
            "--train language_style=FILE.jsonl ... --validation language_style=FILE.jsonl ..."
        )
    report = evaluated(*arguments, *train, *validation, out=run / "evaluation")
    assert report["setup"]["contexts"] == 8 and report["setup"]["judges_accuracy"]["language_style"] == 1.0


def test_the_judge_learns_from_the_files_that_are_named_else_from_the_runs(tiny_model):
    def read(data, train=(), validation=()):
        return [len(found) for found in word_judges.read(data, tiny_model.schema, train, validation)]

    data = tiny_model.config.data
    assert read(data) == [72, 24] and read(config.Data()) == [5832, 480]
    assert read(data, train=data.train[:1]) == [24, 24] and read(data, validation=data.validation[:2]) == [72, 16]
    with pytest.raises(UserError, match="^--train is given but --validation is not; name the files that the judge is"):
        read(config.Data(), train=data.train)
    short = dataclasses.replace(data, train=data.train[:1])
    with pytest.raises(UserError, match="^the training data lacks aspects of attitude; a judge of it needs all 2$"):
        word_judges.WordJudges(*word_judges.read(short, tiny_model.schema, (), ()), tiny_model.schema)


@pytest.mark.parametrize("flag", ["--data", "--train", "--validation"])
def test_malformed_lines_are_no_matter_of_a_flag_that_evaluation_lacks(run, labelled, tmp_path, capsys, flag):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    message = fails(evaluate.main, capsys, run, *(["--data", labelled] if flag != "--data" else []), flag, bad)
    assert f"{bad}:1: invalid JSON" in message and "--data.on-error" not in message
