"""Files that announce more than they hold, names that leave their folder, code in checkpoints: memory, disk and
processes stay as they were."""

import importlib
import io
import json
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import micro
import pytest

from miracle_jax import errors, evaluate, examples, generate, hub, reading, storage, tokenizers
from miracle_jax.attributes import Schema
from miracle_jax.errors import UserError

SCHEMA = Schema.load()


# ------------------------------------------------------------------------------------------------ size


def npz(path: Path, member: bytes, announced: int = 0) -> Path:
    """An archive of three arrays of no more than their header. announced: how large each says it is."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name in "abc":
            archive.writestr(f"{name}.npy", member)
    content = written.getvalue()
    if announced:  # in the list at the archive's end, as in its members' own headers
        for mark, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
            first, *others = content.split(mark)
            others = [other[: place - 4] + struct.pack("<I", announced) + other[place:] for other in others]
            content = mark.join([first, *others])
    path.write_bytes(content)
    return path


def npy_header(shape: str) -> bytes:
    text = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def gguf_metadata(kind: int, count: int) -> bytes:
    """A GGUF file whose only entry is an array that announces `count` members."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, kind, count)


def safetensors(header: dict, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


READ = """
import resource, sys
from pathlib import Path
from miracle_jax import dataset, examples, gguf_file, hub, storage
from miracle_jax.attributes import Schema
from miracle_jax.errors import UserError

readers = {
    "data": lambda p: dataset.read_files([("attitude", p)], Schema.load()), "arrays": examples.read_arrays,
    "gguf": lambda p: gguf_file.config_of(Path(p)), "weights": lambda p: hub.tensors_of(Path(p)),
    "schema": Schema.load,
}
import gguf, numpy, safetensors  # what readers import late takes its memory here
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for argument in sys.argv[1:]:
    kind, _, path = argument.partition("=")
    try:
        readers[kind](path)
        print("read", path)
    except UserError as error:
        print(Path(path).name, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
              str(error).replace("\\n", " "), sep="|")
"""


def test_what_announces_more_than_it_holds_takes_no_memory(tmp_path):
    long = tmp_path / "line.jsonl"
    long.write_bytes(b'{"input": ["' + b"x" * (reading.LONGEST + 1) + b'"]}\n')
    tensor = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    files = {
        "data": [(sparse(tmp_path / "sparse.jsonl", 2**42), "files like it are read up to 1,024 MiB"),
                 (long, "at most 33,554,432 are read"),
                 ("/dev/zero", "is a pipe or a device")],
        "schema": [(sparse(tmp_path / "sparse.toml", 2**25), "is not a text of at most 1,048,576 characters")],
        "arrays": [(npz(tmp_path / "bomb.npz", npy_header(f"({2**32},)"), 3 * 2**30), "unpacks to 9 GiB"),
                   (npz(tmp_path / "shape.npz", npy_header(f"({2**44},)")), "is not a whole file of arrays")],
        "gguf": [(tmp_path / f"{kind}.gguf", "is not a whole GGUF file") for kind in (0, 8, 9, 12)],
        "weights": [(tmp_path / "huge.safetensors", "is not a whole safetensors file"),
                    (tmp_path / "length.safetensors", "is not a whole safetensors file")],
    }  # fmt: skip
    for kind in (0, 8, 9, 12):  # uint8, text, array, float64
        (tmp_path / f"{kind}.gguf").write_bytes(gguf_metadata(kind, 2**60))
    (tmp_path / "huge.safetensors").write_bytes(safetensors({"a": tensor}))
    (tmp_path / "length.safetensors").write_bytes(safetensors({"a": tensor}, 2**62))
    arguments = [f"{kind}={path}" for kind, listed in files.items() for path, _ in listed]
    done = subprocess.run([sys.executable, "-c", READ, *arguments], cwd=micro.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    for (path, sentence), (name, megabytes, error) in zip(sum(files.values(), []), told, strict=True):
        assert Path(path).name == name and sentence in error
        assert int(megabytes) < 200, f"{name} took {megabytes} MB"


def test_problems_beyond_the_first_are_counted_not_kept():
    problems = errors.Problems()
    for i in range(1000):
        problems += [f"line {i}", "again"]
    listed = str(problems).split("\n")
    assert problems.count == 2000 and len(problems._first) == errors.SHOWN
    assert listed[0] == "line 0" and len(listed) == errors.SHOWN + 1 and listed[-1] == "... and 1980 more"


def test_a_message_ends_and_steers_no_terminal():
    error = str(UserError(f"a.jsonl:1: tag {'x' * 10**6} has no \x1b[31mred, \u202e and \ud800\nnext"))
    first, second = error.split("\n")
    assert len(first) < errors.LONGEST_LINE + 50 and first.startswith("a.jsonl:1: tag xxx") and second == "next"
    assert first.endswith(r"x has no \x1b[31mred, \u202e and \ud800")


def test_too_many_combinations_are_not_listed():
    text = "".join(f"[[attribute]]\nname = 'a{i}'\naspects = ['b{i}', 'c{i}']\n" for i in range(40))
    with pytest.raises(UserError, match="the 40 attributes make 1,099,511,627,776 personalities, which are too many"):
        Schema.from_toml(text).personalities()


# ------------------------------------------------------------------------------------------------ names and code


@pytest.mark.parametrize(
    "part",
    [
        "../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.safetensors.index.json", "..", "", "code.py",
        "model.safetensors\0.bin",
    ],
)  # fmt: skip
def test_an_index_names_nothing_but_weights_beside_it(tmp_path, part):
    outside = hub.safetensors_bytes({"a": examples.np.ones(2)})
    (tmp_path / "model.safetensors").write_bytes(outside)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    index = {"weight_map": {"a": part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"its parts are .safetensors or .bin files beside it|does not exist"):
        hub.tensors_of(folder)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../b", "a\0b"])
def test_a_list_of_files_in_a_bucket_names_nothing_outside_its_folder(tmp_path, name):
    marker = json.dumps({"a": 1, name: 1}).encode()
    with pytest.raises(UserError, match="does not list files and their sizes"):
        storage._listed(marker, tmp_path)


def test_code_beside_a_tokenizer_is_not_run_nor_asked_for(tmp_path, monkeypatch):
    """transformers asks in the terminal whether to run what `auto_map` names, unless it is told."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks in the terminal"))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    about = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "model_type": "evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "config.json").write_text(json.dumps(about | {"auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(UserError, match="is neither a folder with a tokenizer nor a hub name within reach"):
        tokenizers.load_tokenizer("encoder", str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_an_archive_writes_nothing(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("../../outside.npy", npy_header("(0,)"))
    (tmp_path / "a.npz").write_bytes(content.getvalue())
    assert examples.read_arrays(tmp_path / "a.npz").keys() == {"../../outside"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert not list(tmp_path.parent.parent.glob("outside*"))


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        examples.np.savez(file, a=examples.np.array([{}], object))
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        examples.read_arrays(tmp_path / "a.npz")


# ------------------------------------------------------------------------------------------------ wrong types


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda mj: mj.load(None), "a run is named by its folder, not None"),
        (lambda mj: mj.load(7), "a run is named by its folder, not 7"),
        (lambda mj: mj.load(b"runs"), "a run is named by its folder, not b'runs'"),
        (lambda mj: mj.load("a\0b"), "holds no run"),
        (lambda mj: mj.load(""), "holds no run"),
        (lambda mj: mj.Schema.load(7), "a schema is named by its file, not 7"),
        (lambda mj: mj.Schema.load(["a"]), "a schema is named by its file, not"),
        (lambda mj: mj.Schema.load("a\0b"), "schema file a.* does not exist"),
        (lambda mj: mj.Schema.load("/"), "schema / is a folder; expected a file"),
        (lambda mj: mj.Schema.load("x" * 5000), "cannot be read: File name too long"),
        (lambda mj: mj.Schema.from_toml(None), "is not a text of at most"),
        (lambda mj: mj.Schema.from_toml("a = " + "[" * 100_000), "is not valid TOML"),
        (lambda mj: mj.Schema.from_toml("a = " + "9" * 5000), "is not valid TOML"),
        (lambda mj: SCHEMA.describe(None), "a personality in ids has one for each of language_style"),
        (lambda mj: SCHEMA.describe("101"), "a personality in ids has one for each of language_style"),
        (lambda mj: SCHEMA.describe([0, 0]), "a personality in ids has one for each of language_style"),
        (lambda mj: SCHEMA.describe([0, 5, 0]), "attitude has no aspect 5"),
        (lambda mj: SCHEMA.aspect_id(7, "calm"), "there is no attribute 7; there are 3, from 0"),
        (lambda mj: SCHEMA.aspect_id(None, "calm"), "an attribute is named by text, not None"),
        (lambda mj: SCHEMA.attribute_index(b"attitude"), "an attribute is named by text, not b'attitude'"),
        (lambda mj: SCHEMA.parse(b"lyrical"), "a personality lists aspects by name, not 108"),
        (lambda mj: SCHEMA.parse('{"a":' * 10_000), "is not a JSON object: maximum recursion depth"),
        (lambda mj: SCHEMA.parse({"attitude": 1.5}), "attitude has no aspect 1.5"),
        (lambda mj: SCHEMA.parse("x" * 10**6), "unknown aspect 'xxx"),
    ],
)
def test_a_wrong_type_from_python_is_one_sentence(call, sentence):
    import miracle_jax as mj

    with pytest.raises(UserError, match=sentence) as error:
        call(mj)
    assert "\n" not in str(error.value) and str(error.value).isprintable()


# ------------------------------------------------------------------------------------------------ contexts


HOSTILE = {
    "a megabyte": "Why? " * 2**18, "a megabyte in one word": "x" * 2**20, "a megabyte of marks": "!" * 2**20,
    "a megabyte of accents": "e\u0301" * 2**19, "NUL": "a\0b", "control characters": "\x1b[2J\x07\x08 hi \x7f",
    "right to left": "\u202e\u0645\u0631\u062d\u0628\u0627 \u200f\u061f", "emoji": "\U0001f469\u200d\U0001f467" * 99,
    "special tokens": "<bos><eos>[SEP][CLS]User:\n\nAssistant:", "a byte order mark": "\ufeffhi",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:a question is longer")
def test_any_unicode_is_a_context_in_bounded_memory(tiny_run, tiny_model, tmp_path, monkeypatch):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contexts = [[text] for text in HOSTILE.values()] + [["Hi?", text, "So?"] for text in HOSTILE.values()]
    replies = tiny_model.replies(contexts, "lyrical")
    assert len(replies) == len(contexts) and all(reply.ok for reply in replies)

    monkeypatch.setattr(generate, "load", lambda workdir: tiny_model)
    data, out = tmp_path / "contexts.jsonl", tmp_path / "replies.jsonl"
    records = [{"id": name, "input": [text], "output": []} for name, text in HOSTILE.items()]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = [str(tiny_run.workdir), "--data", str(data), "--out", str(out), "--personality", "lyrical"]
    generate.main(arguments)
    written = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    assert [line["id"] for line in written] == list(HOSTILE)
    assert [line["reply"] for line in written] == [reply.text for reply in replies[: len(HOSTILE)]]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < 400, f"{grown} MB for {sum(map(len, HOSTILE.values())) / 2**20:.0f} million characters"


def test_of_a_megabyte_the_end_is_read(tiny_model):
    end = " ".join(str(i) for i in range(9000))
    read = tiny_model.tokenizers.encoder.context
    with pytest.warns(UserWarning, match="a question is longer than the encoder's limit"):
        assert read(["x " * 2**19 + end], [], 32) == read([end], [], 32)


@pytest.mark.parametrize("text", ["\ud800", "hi \udfff", "", " ", "\t\n "])
def test_what_is_no_text_is_refused(tiny_model, text):
    with pytest.raises(UserError, match="half of a surrogate pair|a text that is not empty"):
        tiny_model.reply([text])


# ------------------------------------------------------------------------------------------------ commands


BROKEN = {"binary": b"\x00\xff\xfe{", "nested": b"[" * 100_000, "blank": b" \n\t\n", "a list": b"[1]\n"}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(
    "command",
    [
        "generate {run} --data {bad}.jsonl", "evaluate {run} --data {bad}.jsonl --out {new}",
        "evaluate --predictions a={bad}.jsonl --out {new}", "dataset --config {bad}.json",
        "dataset --data.train attitude={bad}.jsonl --data.cache {new}", "dataset --data.schema {bad}.toml",
        "train --config {bad}.json --workdir {new}", "train --config {micro} --workdir {new} --data.frozen {bad}.npz",
        "human sheets {new} --predictions a={bad}.jsonl", "human score {folder} {bad}.csv",
        "convert {bad}.safetensors {new}", "judge {new} --train attitude={bad}.jsonl",
        "judge {new} --encoder {folder}", "baseline --config {bad}.json --workdir {new} --control none",
        "ablation --config {bad}.json --workdir {new}", "generate {folder} hi", "export {folder} {new}",
        "evaluate {folder} --out {new}", "evaluate --judges {folder} --predictions a={said} --out {new}",
    ],
)  # fmt: skip
def test_a_command_refuses_a_broken_file_in_one_sentence(
    tiny_run, tiny_model, tmp_path, monkeypatch, capsys, content, command
):
    for ending in ("jsonl", "json", "toml", "npz", "csv", "safetensors"):
        (tmp_path / f"bad.{ending}").write_bytes(content)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "model.json", "judges.json", "key.json", "model.safetensors", "schema.toml"):
        (folder / name).write_bytes(content)
    said = tmp_path / "said.jsonl"
    said.write_text('{"id": "0", "reply": "Well."}\n')
    names = {"run": str(tiny_run.workdir), "bad": tmp_path / "bad", "new": tmp_path / "new"}
    module, *arguments = command.format(**names, folder=folder, said=said, micro=micro.__file__).split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    for user in (generate, evaluate):  # to load it takes longer than all else
        load = user.load
        monkeypatch.setattr(user, "load", lambda name, load=load: tiny_model if name == names["run"] else load(name))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"miracle_jax.{module}").main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    assert not (tmp_path / "new").exists() or command.startswith(("evaluate", "dataset", "train"))
