"""Reading and validating dialogues, and the dataset that is built from them once and never half."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from miracle_jax import config, dataset, dialogues, examples, storage
from miracle_jax.attributes import Attribute, Schema
from miracle_jax.dataset import Instance, read_bytes, read_files
from miracle_jax.errors import UserError

SCHEMA = Schema.load()
GOOD = {"input": ["How are you?"], "output": ["Fine."], "personas": "health", "tag": 1}


def line(**changes) -> bytes:
    record = GOOD | changes
    return json.dumps({key: value for key, value in record.items() if value is not ...}).encode()


def write(path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def parse(content: bytes, attribute="attitude", reference_required=True) -> list[Instance]:
    return read_bytes([(attribute, "f.jsonl", content)], SCHEMA, "stop", reference_required)[0]


# ------------------------------------------------------------------------------------------------ reading


def test_bundled_corpus_reads_whole():
    for split, count in (("train", 5832), ("validation", 480), ("test", 640)):
        instances = read_files(dataset.bundled(split), SCHEMA)
        assert len(instances) == count
        labelled = {tuple(label >= 0 for label in i.labels) for i in instances}
        one_each = {(True, False, False), (False, True, False), (False, False, True)}
        assert labelled == ({(True, True, True)} if split == "test" else one_each)


@pytest.mark.parametrize(
    ("tag", "attribute", "labels"),
    [
        (1, "attitude", (-1, 1, -1)),
        ("Pessimistic", "attitude", (-1, 0, -1)),
        ([0, 1, 1], None, (0, 1, 1)),
        (["plain", None, "critical"], None, (0, -1, 1)),
        ({"mental characteristic": "emotional", "attitude": 1}, None, (-1, 1, 0)),
        (None, None, (-1, -1, -1)),
    ],
)
def test_tags_are_ids_names_lists_and_mappings(tag, attribute, labels):
    (instance,) = parse(line(tag=tag, id=7), attribute)
    assert instance == Instance(("How are you?",), ("Fine.",), "health", labels, "7")


def test_a_context_to_answer_needs_no_reference_and_no_tag():
    content = line(input=["a", "b"], output=["c"], tag=..., personas=...)
    (instance,) = parse(content, None, reference_required=False)
    assert instance == Instance(("a", "b"), ("c",), "", (-1, -1, -1))
    (instance,) = parse(line(input=["a"], output=[], tag=[1, 1, 1]), None, reference_required=False)
    assert instance.replies == () and instance.labels == (1, 1, 1)
    assert parse(line(tag=...), None, reference_required=False)[0].replies == ("Fine.",)


def test_line_ends_blank_lines_and_a_byte_order_mark_do_no_harm():
    odd = json.dumps(GOOD | {"output": ["one\u2028line \x85 still"]}, ensure_ascii=False).encode()
    instances = parse(b"\xef\xbb\xbf" + line() + b"\r\n\r\n  \n" + odd)
    assert [i.replies for i in instances] == [("Fine.",), ("one\u2028line \x85 still",)]


MALFORMED = {
    "syntax": (b'{"input": ["a"],', "invalid JSON at column 17: Expecting property name enclosed in double quotes"),
    "not UTF-8": (line(personas="x").replace(b"x", b"\xff"), "(0xff) is not UTF-8; expected one JSON object a line"),
    "deep": (b"[" * 100_000, "invalid JSON: maximum recursion depth exceeded"),
    "digits": (b'{"tag": ' + b"1" * 5000 + b"}", "invalid JSON: Exceeds the limit (4300 digits)"),
    "no object": (b"[1]", "this is a list; expected a JSON object with input, output and tag"),
    "no input": (line(input=...), "key 'input' is missing; expected input, output, tag"),
    "no output": (line(output=...), "key 'output' is missing"),
    "no tag": (line(tag=...), "key 'tag' is missing"),
    "near key": (line(output=..., outputs=["Fine."]), "key 'output' is missing, but there is 'outputs'"),
    "input type": (line(input="How?"), "'input' is text; expected a list of texts"),
    "output type": (line(output=None), "'output' is null; expected a list of texts"),
    "turn type": (line(input=[5]), "turn 1 of 'input' is a number; expected text"),
    "no question": (line(input=[], output=[]), "'input' is empty; expected at least one question"),
    "empty turn": (line(input=["a", "b"], output=["c", " \t"]), "turn 2 of 'output' is empty; expected text"),
    "unequal": (line(input=["a", "b"]), "'input' has 2 turns and 'output' 1; expected as many"),
    "surrogate": (line(output=["\ud83d"]), "turn 1 of 'output' has half of a surrogate pair"),
    "topic type": (line(personas={}), "'personas' is an object; expected text"),
    "id type": (line(id=1.5), "'id' is a number; expected text"),
    "tag id": (line(tag=2), "'tag': attitude has no aspect 2; there are 0 pessimistic, 1 optimistic"),
    "tag name": (line(tag="optimstic"), "'tag': attitude has no aspect 'optimstic'; did you mean optimistic"),
    "tag bool": (line(tag=True), "'tag': attitude has no aspect True"),
    "tag null": (line(tag=None), "'tag': attitude has no aspect None"),
    "tag list": (line(tag=[0, 1, 0]), "'tag' is a list; expected an aspect of attitude (pessimistic, optimistic)"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_every_problem_is_told_with_file_line_and_what_was_expected(name):
    bad, message = MALFORMED[name]
    with pytest.raises(UserError) as error:
        parse(line() + b"\n" + bad + b"\n" + line())
    head, problem = str(error.value).split("\n")
    assert head.startswith("1 problem in 1 line of the data") and "--data.on-error skip" in head
    assert problem.startswith("f.jsonl:2: ") and message in problem


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ([1, 0], "'tag' has 2 entries; expected 3, one each for language_style, attitude, mental_characteristic"),
        ([0, 2, 0], "'tag': attitude has no aspect 2"),
        ([None, None, None], "'tag' names no aspect; expected at least one"),
        ({}, "'tag' names no aspect"),
        ({"atitude": 1}, "'tag': unknown attribute 'atitude'; did you mean attitude?"),
        (1, "'tag' is a number; expected a list in the order language_style, attitude, mental_characteristic or"),
    ],
)
def test_problems_of_tags_with_several_attributes(tag, message):
    with pytest.raises(UserError) as error:
        parse(line(tag=tag), None)
    assert f"f.jsonl:1: {message}" in str(error.value)


def test_a_context_with_too_few_replies_is_refused_also_without_reference():
    with pytest.raises(UserError, match="'input' has 3 turns and 'output' 1; expected as many, or one reply fewer"):
        parse(line(input=["a", "b", "c"], output=["d"]), None, reference_required=False)


def test_all_problems_of_all_files_come_together(tmp_path):
    one = write(tmp_path / "one.jsonl", *[line(tag=9)] * 15, line())
    two = write(tmp_path / "two.jsonl", line(), *[line(input=3, output=3)] * 5)
    with pytest.raises(UserError) as error:
        read_files([("attitude", one), ("language_style", two)], SCHEMA)
    head, *listed = str(error.value).split("\n")
    assert head.startswith("25 problems in 20 lines of the data")
    assert len(listed) == 21 and listed[-1] == "... and 5 more"
    assert listed[14].startswith(f"{one}:15: ") and listed[15].startswith(f"{two}:2: ")


def test_skip_drops_the_broken_lines_and_counts_them(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", line(), line(tag=9), line(output=["Well."]), b"{")
    with caplog.at_level(logging.WARNING):
        instances = read_files([("attitude", str(path))], SCHEMA, on_error="skip")
    assert [i.replies[0] for i in instances] == ["Fine.", "Well."]
    assert "2 malformed lines dropped" in caplog.text and f"{path}:4: invalid JSON" in caplog.text


def test_the_remedy_names_a_flag_only_where_there_is_one(tmp_path):
    path = write(tmp_path / "a.jsonl", line(), b"{")
    told = {}
    for on_error in ("stop", ""):
        with pytest.raises(UserError) as error:
            read_files([("attitude", path)], SCHEMA, on_error)
        told[on_error], _ = str(error.value).split("\n")
    problem = "1 problem in 1 line of the data; "
    assert told == {
        "stop": problem + "mend them, or drop the lines with --data.on-error skip:", "": problem + "mend them:",
    }  # fmt: skip


def test_files_without_a_usable_line(tmp_path):
    with pytest.raises(UserError, match="no instances in .*empty.jsonl"):
        read_files([("attitude", write(tmp_path / "empty.jsonl", b""))], SCHEMA)
    with pytest.raises(UserError, match="no instances"):
        read_files([("attitude", write(tmp_path / "bad.jsonl", b"{"))], SCHEMA, on_error="skip")
    with pytest.raises(UserError, match="none.jsonl does not exist"):
        read_files([("attitude", tmp_path / "none.jsonl")], SCHEMA)
    with pytest.raises(UserError, match="is a folder; expected a file"):
        read_files([("attitude", tmp_path)], SCHEMA)


# ------------------------------------------------------------------------------------------------ which files


def test_sources_default_to_the_bundled_corpus():
    train, validation, schema = dataset.sources(config.Data())
    assert schema == SCHEMA and [name for name, _ in train] == list(SCHEMA.names)
    assert [path.split("/")[-2] for _, path in train + validation] == ["train"] * 3 + ["validation"] * 3


def test_sources_of_a_user(tmp_path):
    (tmp_path / "x=1").mkdir()
    a, b = (write(tmp_path / "x=1" / name, line()) for name in ("a.jsonl", "b.jsonl"))
    train, validation, _ = dataset.sources(config.Data(train=(f"Language Style={a}", b)))
    assert train == [("language_style", a), (None, b)] and validation == []


def test_sources_refuse(tmp_path):
    path = write(tmp_path / "a.jsonl", line())
    with pytest.raises(UserError, match="unknown attribute 'atitude'; did you mean attitude?"):
        dataset.sources(config.Data(train=(f"atitude={path}",)))
    with pytest.raises(UserError, match="no such data file: x.jsonl, y.jsonl"):
        dataset.sources(config.Data(train=("attitude=x.jsonl",), validation=("attitude=y.jsonl",)))
    Schema((Attribute("mood", ("good", "bad")),)).save(tmp_path / "mine.toml")
    with pytest.raises(UserError, match="mine.toml differs from the schema of the bundled corpus.*--data.train mood=F"):
        dataset.sources(config.Data(schema=str(tmp_path / "mine.toml")))


def test_labelled_data_are_a_file_with_or_without_an_attribute_or_the_bundled_test_set(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert dataset.labelled_source("a.jsonl", SCHEMA) == [(None, "a.jsonl")]
    assert dataset.labelled_source("Language Style=~/a.jsonl", SCHEMA) == [("language_style", "/home/me/a.jsonl")]
    assert dataset.labelled_source("~/x=1/a.jsonl", SCHEMA) == [(None, "/home/me/x=1/a.jsonl")]
    assert dataset.labelled_source("attitude=gs://some/a.jsonl", SCHEMA) == [("attitude", "gs://some/a.jsonl")]
    assert dataset.labelled_source("test", SCHEMA) == dataset.bundled("test")
    with pytest.raises(UserError, match="unknown attribute 'atitude'; did you mean attitude?"):
        dataset.labelled_source("atitude=a.jsonl", SCHEMA)


def test_the_bundled_test_set_is_not_for_other_attributes():
    other = Schema((*SCHEMA.attributes[:2], Attribute("mood", ("good", "bad"))))
    with pytest.raises(UserError) as error:
        dataset.labelled_source("test", other)
    assert str(error.value) == (
        "the bundled test set is labelled for language_style, attitude, mental_characteristic, this run for "
        "language_style, attitude, mood; name a file of your own with --data"
    )
    assert dataset.labelled_source("mood=a.jsonl", other) == [("mood", "a.jsonl")]


def test_a_run_keeps_its_files_by_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    data = config.Data(
        train=("attitude=a.jsonl", "x/a=b.jsonl", "~/c.jsonl", "attitude=gs://some/d.jsonl"),
        validation=(f"attitude={tmp_path}/a.jsonl", "gs://some/e=f.jsonl"), schema="mine.toml", frozen="data.npz",
    )  # fmt: skip
    assert dataset.absolute(data) == config.Data(
        train=(
            f"attitude={tmp_path}/a.jsonl", f"{tmp_path}/x/a=b.jsonl", "/home/me/c.jsonl", "attitude=gs://some/d.jsonl",
        ),
        validation=data.validation, schema=f"{tmp_path}/mine.toml", frozen=f"{tmp_path}/data.npz",
    )  # fmt: skip
    assert dataset.absolute(dataset.absolute(data)) == dataset.absolute(data)
    assert dataset.absolute(config.Data()) == config.Data()  # the bundled corpus


# ------------------------------------------------------------------------------------------------ building


@pytest.fixture
def files(tmp_path):
    lines = [
        line(input=["Wie geht's? ☃"] * n, output=["A"] * (n - 1) + [f"reply {n}"], tag=n % 2, id=n) for n in range(1, 6)
    ]
    return [("attitude", write(tmp_path / "a.jsonl", *lines))]


@pytest.fixture
def builds(monkeypatch):
    """Counts how often TFDS writes."""
    calls, write_tfds = [], dialogues._write_tfds
    monkeypatch.setattr(dialogues, "_write_tfds", lambda *args: calls.append(args) or write_tfds(*args))
    return calls


def test_a_built_dataset_holds_what_was_read_in_order(files, tmp_path):
    built = dialogues.build(files, SCHEMA, str(tmp_path / "cache"))
    instances = read_files(files, SCHEMA)
    assert len(built) == 5 and [built[i] for i in range(5)] == instances
    assert built.read([3, 0]) == [instances[3], instances[0]]
    assert list(built.folder.rglob("*.array_record*"))


def test_building_needs_neither_tensorflow_nor_jax(files, tmp_path):
    code = """
        import sys
        from miracle_jax import dialogues
        from miracle_jax.attributes import Schema
        print(dialogues.build([("attitude", sys.argv[1])], Schema.load(), sys.argv[2])[4].replies[-1])
        print("tensorflow" in sys.modules, "jax" in sys.modules)
    """
    done = run(code, files[0][1], tmp_path / "cache")
    assert (done.stdout, done.stderr) == ("reply 5\nFalse False\n", "")  # nor does TFDS chat


def test_the_same_content_is_built_once_and_other_content_anew(files, tmp_path, builds):
    cache = str(tmp_path / "cache")
    first = dialogues.build(files, SCHEMA, cache)
    moved = [("attitude", shutil.copy(files[0][1], tmp_path / "copy.jsonl"))]
    assert dialogues.build(moved, SCHEMA, cache).folder == first.folder and len(builds) == 1
    with open(files[0][1], "ab") as file:
        file.write(line(output=["new"]))
    assert dialogues.build(files, SCHEMA, cache)[5].replies == ("new",) and len(builds) == 2
    renamed = [("language_style", moved[0][1])]
    assert dialogues.build(renamed, SCHEMA, cache)[0].labels == (1, -1, -1) and len(builds) == 3
    wider = Schema((*SCHEMA.attributes, Attribute("pace", ("slow", "fast"))))
    assert dialogues.build(moved, wider, cache)[0].labels == (-1, 1, -1, -1) and len(builds) == 4


def test_a_broken_file_builds_nothing_until_told_to_skip(files, tmp_path, caplog):
    cache = tmp_path / "cache"
    with open(files[0][1], "ab") as file:
        file.write(b"{")
    with pytest.raises(UserError, match="a.jsonl:6: invalid JSON"):
        dialogues.build(files, SCHEMA, str(cache))
    assert not list(cache.rglob("*"))
    for _ in range(2):  # built, then found in the cache
        caplog.clear()
        assert len(dialogues.build(files, SCHEMA, str(cache), on_error="skip")) == 5
        assert "1 malformed line dropped" in caplog.text
    with pytest.raises(UserError, match="a.jsonl:6: invalid JSON"):
        dialogues.build(files, SCHEMA, str(cache))


def test_problems_of_training_and_validation_files_come_together(files, tmp_path):
    bad = [("attitude", write(tmp_path / name, b"{")) for name in ("train.jsonl", "validation.jsonl")]
    with pytest.raises(UserError) as error:
        dialogues.build_all([bad[:1], bad[1:]], SCHEMA, str(tmp_path / "cache"))
    assert "train.jsonl:1" in str(error.value) and "validation.jsonl:1" in str(error.value)


def run(code: str, *args):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})


def test_a_build_that_is_killed_leaves_nothing_usable_and_the_next_one_builds(files, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    code = """
        import os, signal, sys
        from miracle_jax import dialogues
        from miracle_jax.attributes import Schema

        write = dialogues._write_tfds

        def killed(folder, *rest):
            write(folder, *rest)
            os.kill(os.getpid(), signal.SIGKILL)

        dialogues._write_tfds = killed
        dialogues.build([("attitude", sys.argv[1])], Schema.load(), sys.argv[2])
    """
    assert run(code, files[0][1], cache).returncode == -signal.SIGKILL
    (leftover,) = cache.iterdir()
    assert leftover.name.startswith(".") and list(leftover.rglob("*.array_record*"))
    built = dialogues.build(files, SCHEMA, str(cache))
    assert len(built) == 5 and built.folder != leftover
    assert leftover.exists()  # another process may still be at it
    old = time.time() - 2 * storage.STALE_AFTER
    os.utime(leftover, (old, old))
    shutil.rmtree(built.folder)
    dialogues.build(files, SCHEMA, str(cache))
    assert not leftover.exists()


def test_a_build_that_fails_leaves_nothing_at_all(files, tmp_path, monkeypatch):
    def fail(folder, *_):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(dialogues, "_write_tfds", fail)
        dialogues.build(files, SCHEMA, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())
    assert len(dialogues.build(files, SCHEMA, str(tmp_path / "cache"))) == 5


def test_a_damaged_dataset_is_built_again(files, tmp_path, builds):
    built = dialogues.build(files, SCHEMA, str(tmp_path / "cache"))
    (record,) = built.folder.rglob("*.array_record*")
    os.truncate(record, 100)
    assert len(dialogues.build(files, SCHEMA, str(tmp_path / "cache"))) == 5 and len(builds) == 2


def test_of_two_builds_at_once_the_first_to_finish_wins(tmp_path):
    def write_slowly(folder):
        (folder / "who").write_text("slow")
        storage.build_once(tmp_path, "data", lambda other: (other / "who").write_text("quick"))

    assert (storage.build_once(tmp_path, "data", write_slowly) / "who").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ------------------------------------------------------------------------------------------------ buckets


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An in-memory file system behind gs://, and a home folder of its own."""

    class Bucket(MemoryFileSystem):
        protocol = ("gs", "gcs")
        cachable = False
        store, pseudo_dirs, wait = {}, [""], 0.0

        def __init__(self, **_):
            super().__init__()

        def _open(self, *args, **kwargs):
            time.sleep(self.wait)
            return super()._open(*args, **kwargs)

    from etils.epath import backend

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    yield Bucket
    type(backend.fsspec_backend)._get_filesystem.cache_clear()


def test_a_dataset_in_a_bucket_is_built_once_and_copied_to_the_local_cache(files, bucket, tmp_path, builds):
    built = dialogues.build(files, SCHEMA, "gs://some/cache")
    assert len(built) == 5 and built.folder.parent == tmp_path / "home/.cache/miracle_jax"
    assert f"gs://some/cache/{built.folder.name}/complete.json" in bucket.store
    shutil.rmtree(tmp_path / "home")  # another machine
    again = dialogues.build(files, SCHEMA, "gs://some/cache")
    assert [again[i] for i in range(5)] == read_files(files, SCHEMA) and len(builds) == 1


def test_a_half_copied_dataset_in_a_bucket_counts_as_absent(files, bucket, tmp_path, builds):
    dialogues.build(files, SCHEMA, "gs://some/cache")
    (marker,) = [name for name in bucket.store if name.endswith("complete.json")]
    del bucket.store[marker]
    shutil.rmtree(tmp_path / "home")
    assert len(dialogues.build(files, SCHEMA, "gs://some/cache")) == 5 and len(builds) == 2
    (record,) = [name for name in bucket.store if "array_record" in name]
    bucket.store[record].truncate(10)
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(UserError, match="is damaged.*delete it"):
        dialogues.build(files, SCHEMA, "gs://some/cache")


def test_data_files_may_lie_in_a_bucket(bucket):
    with fsspec.filesystem("gcs").open("gs://some/a.jsonl", "wb") as file:
        file.write(line())
    train, _, _ = dataset.sources(config.Data(train=("attitude=gs://some/a.jsonl",)))
    assert read_files(train, SCHEMA)[0].replies == ("Fine.",)
    with pytest.raises(UserError, match="file gs://some/b.jsonl does not exist"):
        read_files([("attitude", "gs://some/b.jsonl")], SCHEMA)


def test_a_bucket_that_does_not_answer_is_given_up(files, bucket, monkeypatch):
    monkeypatch.setattr(storage, "PROBE_TIMEOUT", 0.1)
    monkeypatch.setattr(bucket, "wait", 5.0)
    with pytest.raises(UserError, match="gs://some/cache/dialogues-.* did not answer within 0 s; check the network"):
        dialogues.build(files, SCHEMA, "gs://some/cache")


def test_a_bucket_that_refuses_is_told_in_one_sentence(files, bucket, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError("no access")

    monkeypatch.setattr(bucket, "_open", refuse)
    with pytest.raises(UserError, match="gs://some/cache/.* cannot be read or written: PermissionError: no access"):
        dialogues.build(files, SCHEMA, "gs://some/cache")


def test_a_bucket_without_its_package_names_the_extra(files, bucket, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=r"pip install 'miracle-jax\[gcs\]'"):
        dialogues.build(files, SCHEMA, "gs://some/cache")


# ------------------------------------------------------------------------------------------------ command line


def test_the_overview_of_the_bundled_corpus(tmp_path, capsys):
    small = ["--encoder.vocab-size", "1000", "--decoder.vocab-size", "1000"]
    buckets = ["--data.buckets", "96", "160", "64", "160", "256", "96"]
    dataset.main(["--data.cache", str(tmp_path), *small, *buckets])
    shown = capsys.readouterr().out
    for row in (
        "language style            486/40  1,944/160  20.44/21.92",
        "attitude                  486/40  1,944/160  21.70/21.89",
        "mental characteristic     486/40  1,944/160  23.24/23.29",
        "attitude                0  pessimistic     972/80",
        "personality: plain",
        "prior encoder, ",
        ": [CLS] user : how often do you get them? assistant : about twice a week, usually in the afternoon.",
        "<bos>First I close the curtains, then I lie down with a wet cloth.",
    ):
        assert row in shown, row
    assert "over the limit of 160: " in shown and "padding: " in shown and "182 steps an epoch" in shown
    assert "##########" in shown


def test_dialogues_are_counted_by_what_continues_what():
    from miracle_jax.overview import count_dialogues

    def instance(*turns, label=0, topic="t"):
        return Instance(tuple("q" + t for t in turns), tuple(f"word {t}" for t in turns), topic, (label, -1, -1))

    instances = [instance("a"), instance("a", "b"), instance("a", "c", "d")]  # ends: b, and d
    instances += [instance("a", label=1), instance("a", topic="u")]  # dialogues of their own
    assert count_dialogues(instances, 0) == (4, 6, 2.0)
    assert count_dialogues(instances, 1) == count_dialogues(instances, None) == (0, 0, 0.0)
    assert count_dialogues([*instances, instance("a", "b", label=-1)], None) == (1, 2, 2.0)


def test_instances_without_a_label_have_rows_of_their_own_in_the_tables():
    from miracle_jax.overview import aspect_table, table7

    known, unknown = (Instance(("a",), ("b c",), "t", labels) for labels in ((1, -1, -1), SCHEMA.unknown))
    assert "no label" not in table7([known], [known], SCHEMA) + aspect_table([known], [known], SCHEMA)
    shown = [table7([known], [unknown], SCHEMA), aspect_table([known], [unknown], SCHEMA)]
    assert [table.splitlines()[-1].split() for table in shown] == [
        ["no", "label", "0/1", "0/1", "0.00/2.00"], ["no", "label", "0/1"],
    ]  # fmt: skip


def test_freeze_writes_a_file_that_appears_whole_or_not_at_all(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out" / "frozen.npz"
    arguments = [
        "freeze", str(out), "--data.train", f"attitude={files[0][1]}", "--data.validation", f"attitude={files[0][1]}",
        "--data.cache", str(tmp_path / "cache"), "--encoder.vocab-size", "400", "--decoder.vocab-size", "400",
    ]  # fmt: skip
    dataset.main(arguments)
    assert "wrote" in capsys.readouterr().out and len(examples.load_frozen(out).train) == 5
    before = out.read_bytes()

    def fail(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(SystemExit):
        dataset.main(arguments)
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["freze"], "unknown command 'freze'; there are show, freeze OUT.npz and import KIND SOURCE OUT"),
        (["freeze"], "freeze needs a file to write first"),
        (["freeze", "--data.cache", "x"], "freeze needs a file to write first"),
        (["--data.frozen", "x.npz"], "data.frozen x.npz holds tokens, not dialogues"),
        (["--data.train", "attitude=none.jsonl"], "no such data file: none.jsonl"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        dataset.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
