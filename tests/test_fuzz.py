"""Every reader against files that are nearly right: the outcome is a result or one sentence, soon.

`python -m pytest tests/test_fuzz.py --examples 50000 --timeout 0` shares 50,000 mutated inputs out among the readers,
other ones than the suite's, and prints what became of them.
"""

import dataclasses
import datetime
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import micro
import numpy as np
import parity
import pytest
import runs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import mutated
from test_pretrained import write_gguf

from miracle_jax import (
    asking,
    card,
    clean,
    cleaning,
    collect,
    config,
    dataset,
    endpoint,
    examples,
    gguf_file,
    hub,
    human,
    imports,
    judge,
    model,
    predictions,
    pretrained,
    report,
    responses,
    reviews,
    scores,
    sheets,
    storage,
    systems,
    tokenizers,
    toxicity,
    transcripts,
)
from miracle_jax.attributes import Schema
from miracle_jax.errors import LONGEST_LINE, UserError, first_line
from miracle_jax.instructions import Instructions
from miracle_jax.journal import Journal, read_journal

SCHEMA = Schema.load()
SHARES = {"tokenizers": 60, "checkpoint of a Llama": 100, "checkpoint of a BERT": 60, "tokenizer of transformers": 30,
          "metrics of a run": 12, "a run": 24}  # fmt: skip
"""Inputs in the suite, of readers that take long; of the others there are USUAL. --examples keeps their proportions."""
USUAL = 100
PATIENCE = datetime.timedelta(seconds=10)
"""Within which an input has to be read or refused; all but the largest take milliseconds."""
DIALOGUES = [
    {"input": ["Hi?", "And you?"], "output": ["Well.", "Like rain."], "personas": "the river", "tag": 1, "id": "a"},
    {"input": ["What now?"], "output": ["Nothing is lost, überhaupt nichts."], "tag": "optimistic", "id": 7},
]
SAID = [
    {"id": "a", "input": ["Hi?"], "output": [], "personality": "lyrical, optimistic", "reply": "By the river."},
    {"id": "b", "input": ["Why?", "So?"], "output": ["Rain."], "personality": "plain", "reply": ""},
]

CHAT = [
    {"messages": [{"role": "system", "content": "Hm"}, {"role": "user", "content": [{"type": "text", "text": "Hi?"}]},
                  {"role": "assistant", "content": "Well."}], "topic": "rain", "tag": {"attitude": 1}},
    {"conversations": [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "No."}], "tag": "lyrical"},
]  # fmt: skip
PEOPLE = {
    str(n): {"messages": [[{"text": "Hi", "sender": f"{n}a"}], [{"text": "Yes", "sender": f"{n}b"}]], "prompt": "So?",
             "ratings": {"witty": "1", "interesting": 5, "upbeat": n}} for n in (1, 3, 8, 9)
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
    """Valid files by name, which of them are changed, and what reads the folder that they are in."""

    files: dict[str, bytes]
    read: Callable[[Path], Any]
    changed: tuple[str, ...] = ()
    """Empty: all."""
    refuses: bool = True
    """False: what it cannot use it leaves out."""


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def written(write: Callable[[Path], Any], folder: Path) -> dict[str, bytes]:
    """The files that `write` writes into a folder."""
    write(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_tokenizers() -> tokenizers.Tokenizers:
    texts = [text for line in DIALOGUES for text in (*line["input"], *line["output"])]
    return tokenizers.Tokenizers(tokenizers.train_wordpiece(texts, 300), tokenizers.train_bpe(texts, 300))


def small_corpus() -> examples.Corpus:
    made = small_tokenizers()
    rows = {
        "context": [5, 6, 7, 8, 9], "joint": [5, 6, 7, 8, 9, 4], "reply": [0, 2, 3, 1],
        "labels": [[1, -1, 0], [-1, 0, 1]], "lengths": [[2, 3, 2], [3, 3, 2]], "turns": [1, 2],
    }  # fmt: skip
    arrays = {name: np.array(values, np.int32) for name, values in rows.items()}
    split = examples.TokenArrays(arrays, examples._padding(made))
    return examples.Corpus(SCHEMA, made, split, split, "key")


def read_tokenizers(folder: Path) -> None:
    made = tokenizers.Tokenizers.load(folder)
    made.encoder.context(["Hi? <bos>", "And\0you?"], ["Well."], 12)
    made.decoder.decode(made.decoder.reply("Like rain.", 12))
    made.check(micro.get_config())


def imported(kind: str, name: str, *flags: str, folder: Path) -> None:
    shutil.rmtree(folder / "imported", ignore_errors=True)
    imports.run([kind, str(folder / name), str(folder / "imported"), *flags])


def read_key(folder: Path) -> None:
    key = human.read_key(str(folder / "key.json"))
    human.table(human.evaluate(key, human.read_ratings([str(folder / "filled.csv")], key)))


def read_answers(folder: Path) -> None:
    tasks = [{**line, "personality": SCHEMA.describe(SCHEMA.parse(line["personality"]))} for line in SAID]
    predictions.read_answers(str(folder / "said.jsonl"), tasks, ["a", "b"], SCHEMA)


def read_test_set(folder: Path) -> None:
    test = systems.read_test_set(str(folder / "a.jsonl"), SCHEMA, 1, 0)
    test.tasks(test.labels, list(test.chosen))


def read_decoder(folder: Path) -> None:
    path = hub.locate(str(folder), "decoder.pretrained")
    shape = pretrained.decoder_shape(pretrained._config_of(path), config.Gpt2(), "it")
    for tensor in pretrained.read_tensors(path, shape.family).values():
        tensor.read()


def read_gguf(folder: Path) -> None:
    gguf_file._open.cache_clear()
    path = folder / "m.gguf"
    shape = pretrained.decoder_shape(gguf_file.config_of(path), config.Gpt2(), "it")
    gguf_file.tokenizer_of(path)
    for tensor in pretrained.read_tensors(path, shape.family).values():
        tensor.read()


def read_weights(name: str, folder: Path) -> None:
    for tensor in hub.tensors_of(folder / name).values():
        tensor.read()


def read_scores(folder: Path) -> None:
    scores.Kept(folder).of("nats", ["a", "b"], lambda some: np.ones((len(some), 2)))


def read_metrics(folder: Path) -> None:
    report.training_seconds(folder / "metrics.jsonl", 8)
    report.Report(folder, config.Train(), 2, 9).plot()


def read_totals(folder: Path) -> None:
    Journal(folder / "j.jsonl").append({"id": "z", "status": "done", "reason": "", "text": ""})
    totals = asking.Totals(endpoint.Settings(price_in=1.0), 9)
    for record in read_journal(folder / "j.jsonl"):
        totals.add(record)
    str(totals)


def begin_collection(folder: Path) -> None:
    pytest.importorskip("openai")
    instructions, topics = Instructions.load(), {"train": ["a"], "validation": [], "test": []}
    collect.begin(folder, collect.Options(), instructions, topics)
    Journal(folder / collect.JOURNAL).append({"id": "a", "status": "done", "reason": "", "text": "A: Hi?"})


def read_answer(folder: Path) -> None:
    body = (folder / "answer.json").read_bytes()
    responses.message_of(body)
    try:
        responses.check(responses.read_answer(body))
    except (responses.Again, ValueError) as error:
        raise UserError(first_line(error)) from None


def read_transcript(folder: Path) -> None:
    try:
        transcripts.parse((folder / "transcript.txt").read_bytes().decode(errors="surrogateescape"))
    except transcripts.Unparseable as error:
        raise UserError(str(error)) from None


def read_review(folder: Path) -> None:
    some = cleaning.Dialogue("a", "train", (-1, 1, -1), "t", ("Hi?",), ("By the river.",))
    review = reviews.Reviews(folder / "review-1.csv")
    review.mark(some)
    review.ask([some], SCHEMA)
    (folder / "written.csv").write_bytes(review.content())
    assert reviews.Reviews(folder / "written.csv")._marked.keys() == review._marked.keys()  # none is lost


def read_collection(folder: Path) -> None:
    drops = cleaning.Drops()
    dialogues = cleaning.read(folder / "transcripts.jsonl", SCHEMA, clean.Options(min_turns=1).rules(), drops)
    settings = judge.reading.json_object(folder / "collection.json")
    facts = {"collection": card.collected(settings), "options": {"encoder": ""}, "stages": card.stages(9, drops)}
    facts |= {"judges": [], "folds": 5, "reviews": {}, "toxicity": {}, "versions": {}}
    facts |= card.contents(dialogues, SCHEMA)
    card.markdown(facts).encode()
    json.dumps(facts, indent=1)


def torch_file(path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a.weight": torch.ones(3, 2), "b": torch.arange(4)}, path / "pytorch_model.bin")


def small_run(folder: Path) -> None:
    like = folder / "like"
    small_tokenizers().save(like / "tokenizers")
    SCHEMA.save(like / "schema.toml")
    (like / "config.json").write_text(json.dumps({"config": config.to_dict(micro.get_config())}))
    runs.write(folder / "run", like)
    shutil.rmtree(like)


def small_schema() -> bytes:
    return SCHEMA.to_toml().encode()


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Callable[[], Reader]]:
    """Made when asked for."""

    def new() -> Path:
        return tmp_path_factory.mktemp("valid")

    bert, llama = parity.load("bert_gelu"), parity.load("llama_grouped")
    items = {code: {"sheet": 1, "system": system, "instance": "a"} for code, system in (("BCDFG", "x"), ("HJKLM", "y"))}
    key = {"scale": [1, 5], "seed": 0, "items": items}
    sheet = "item,readability: 1,personalization,coherence\r\nBCDFG,1,2,3\r\nHJKLM,5,,4\r\n".encode("utf-8-sig")
    run = {"config": config.to_dict(micro.get_config()), "data": "key"}
    figures = {"mean": 0.5, "attribute": {"attitude": 0.5}, "turn": {"1": 0.5}}
    facts = {"step": 7, "heads": "joint", "accuracy": {"joint": figures, "refit": figures}, "hardware": "1 x cpu"}
    judged = {"instances": 8, "accuracy": 0.9}
    judges = {"options": {"encoder": "x", "frozen": True}, "measured_by": "files", "judges": {"attitude": judged},
              "learned_from": ["abc"]}  # fmt: skip
    metrics = [{"step": i, "split": split, "kl": 0.5, "examples_per_second": 9.0}
               for i, split in enumerate(("train", "train", "validation"), 1)]  # fmt: skip
    journal = [{"id": i, "status": status, "reason": "late: 3", "text": "A: Hi?", "prompt_tokens": 7, "attempts": 1}
               for i, status in (("a", "done"), ("b", "failed"), ("b", "done"))]  # fmt: skip
    choice = {"message": {"content": "A: Hi?", "refusal": None}, "finish_reason": "stop"}
    said = {"choices": [choice], "usage": {"prompt_tokens": 7}, "error": {"message": "late", "code": "x"}}
    spoken = "Sure!\n1. **A:** Hi?\n2. **B:** By the river.\n3. [PersonA] “Why?”\n**A**: Why?\nB (calm): Rain.".encode()
    review = sheets.content(map(sheets.line, [reviews.COLUMNS, ("a", "x", "y", "A: Hi?\nB: By the river.", "n")]))
    comments = ",".join(("id", "comment_text", *toxicity.KINDS)).encode()
    comments += b'\n1,"so\n""it"" is",0,0,0,0,0,1\n2,a,0,0,0,0,0,0\n'
    collected = [{"id": f"train/{i}", "split": split, "tag": tag, "topic": "rain", "status": "done", "reason": "",
                  "text": spoken.decode()} for i, (split, tag) in enumerate(
                      [("train", {"attitude": "optimistic"}), ("test", {"attitude": "optimistic"})])]  # fmt: skip
    settings = {"endpoint": "http://127.0.0.1/v1", "model": "it", "sampling": {"top_p": 1.0}, "licence": "CC0-1.0"}
    arrays = {"model.safetensors": hub.safetensors_bytes({"a.weight": np.ones((3, 2), np.float32), "b": np.arange(4)})}
    index = {"metadata": {}, "weight_map": {"a.weight": "part-1.safetensors", "b": "part-1.safetensors"}}
    shards = {"part-1.safetensors": arrays["model.safetensors"]}
    shards |= {"model.safetensors.index.json": json.dumps(index).encode()}

    def check_judges(folder):
        judged = object.__new__(judge.Judges)
        judged.facts = judge.reading.json_object(folder / "judges.json")
        judged._check_facts()

    return {
        "training data": lambda: Reader(
            {"a.jsonl": lines(DIALOGUES)}, lambda f: dataset.read_files([("attitude", f / "a.jsonl")], SCHEMA, "stop")
        ),
        "training data, skipping": lambda: Reader(
            {"a.jsonl": lines([d | {"tag": [1, None, 0]} for d in DIALOGUES])},
            lambda f: dataset.read_files([(None, f / "a.jsonl")], SCHEMA, "skip"),
        ),
        "contexts": lambda: Reader(
            {"a.jsonl": lines([d | {"tag": {"attitude": 1}} for d in DIALOGUES])},
            lambda f: dataset.read_files([(None, f / "a.jsonl")], SCHEMA, reference_required=False),
        ),
        "the paper's files": lambda: Reader(
            {"x/dialogue_a.jsonl": lines(DIALOGUES), "x/test.json": lines([DIALOGUES[1] | {"tag": "plain"}])},
            lambda f: imported("released", "x", folder=f),
        ),
        "chat messages": lambda: Reader(
            {"chat.jsonl": lines(CHAT), "chat.json": json.dumps(CHAT[0], indent=1).encode()},
            lambda f: [imported("messages", name, "--tag", "plain", folder=f) for name in ("chat.jsonl", "chat.json")],
        ),
        "conversations of people": lambda: Reader(
            {"d.json": json.dumps(PEOPLE).encode()},
            lambda f: imported("chitchat", "d.json", "--rating", "upbeat", "--levels", "2", folder=f),
        ),
        "test set": lambda: Reader(
            {"a.jsonl": lines([d | {"tag": [1, 1, 0]} for d in DIALOGUES])},
            read_test_set,
        ),
        "schema": lambda: Reader({"s.toml": small_schema()}, lambda f: Schema.load(f / "s.toml").personalities()),
        "predictions": lambda: Reader({"said.jsonl": lines(SAID)}, read_answers),
        "predictions for people": lambda: Reader(
            {"said.jsonl": lines(SAID)}, lambda f: predictions.read_systems([f"x={f / 'said.jsonl'}"])
        ),
        "filled sheets and key": lambda: Reader({"key.json": json.dumps(key).encode(), "filled.csv": sheet}, read_key),
        "config of a run": lambda: Reader({"config.json": json.dumps(run).encode()}, config.load_run),
        "model.json": lambda: Reader(
            {"model.json": json.dumps(facts).encode()}, lambda f: model._facts(f / "model.json")
        ),
        "judges.json": lambda: Reader({"judges.json": json.dumps(judges).encode()}, check_judges),
        "frozen tokens": lambda: Reader(
            written(lambda f: examples.save_frozen(f / "c.npz", small_corpus()), new()),
            lambda f: examples.load_frozen(f / "c.npz"),
        ),
        "arrays": lambda: Reader(
            written(lambda f: np.savez(f / "e.npz", context_mean=np.ones((3, 2), np.float32)), new()),
            lambda f: examples.read_arrays(f / "e.npz"),
        ),
        "tokenizers": lambda: Reader(written(small_tokenizers().save, new()), read_tokenizers),
        "safetensors": lambda: Reader(arrays, partial(read_weights, "model.safetensors")),
        "an index": lambda: Reader(shards, partial(read_weights, "."), ("model.safetensors.index.json",)),
        "weights of torch": lambda: Reader(written(torch_file, new()), partial(read_weights, "pytorch_model.bin")),
        "checkpoint of a Llama": lambda: Reader(written(lambda f: checkpoints.write(f, llama), new()), read_decoder,
                                                ("config.json", "model.safetensors")),
        "checkpoint of a BERT": lambda: Reader(
            written(lambda f: checkpoints.write(f, bert), new()),
            lambda f: pretrained.text_encoder(str(f), "--encoder"), ("config.json", "model.safetensors"),
        ),
        "tokenizer of transformers": lambda: Reader(
            written(lambda f: checkpoints.write_tokenizer(f, checkpoints.BERT_ROLES), new()),
            lambda f: tokenizers.load_tokenizer("encoder", str(f)),
        ),
        "GGUF": lambda: Reader(
            written(lambda f: write_gguf(f / "m.gguf", llama, tokenizer=True), new()), read_gguf
        ),
        "list of a whole folder": lambda: Reader(
            {"complete.json": b'{"a": 1}', "a": b"x"}, 
            lambda f: storage._listed((f / "complete.json").read_bytes(), f), ("complete.json",),
        ),
        "scores that are kept": lambda: Reader(
            {"nats.jsonl": lines([{"ca978112ca1bbdcafac231b3": [1.0, 2.0]}])}, read_scores
        ),
        "a run": lambda: Reader(written(small_run, new()), lambda f: model.read_run(f / "run")),
        "metrics of a run": lambda: Reader({"metrics.jsonl": lines(metrics)}, read_metrics, refuses=False),
        "topics": lambda: Reader(
            {"t.txt": collect.BUNDLED.read_bytes()[:400]}, lambda f: collect.read_topics(f / "t.txt")
        ),
        "instructions": lambda: Reader(
            {"s.toml": Instructions.load().text.encode()}, lambda f: Instructions.load(f / "s.toml")
        ),
        "journal": lambda: Reader({"j.jsonl": lines(journal)}, read_totals),
        "settings of a collection": lambda: Reader(
            written(begin_collection, new()), begin_collection, ("collection.json",)
        ),
        "transcript": lambda: Reader({"transcript.txt": spoken}, read_transcript),
        "review file": lambda: Reader({"review-1.csv": review}, read_review, ("review-1.csv",)),
        "comments": lambda: Reader(
            {"c.csv": comments}, lambda f: sum(toxic for _, toxic in toxicity.read_comments(f / "c.csv"))
        ),
        "transcripts of a collection": lambda: Reader(
            {"transcripts.jsonl": lines(collected), "collection.json": json.dumps(settings).encode()}, read_collection
        ),
        "answer of an endpoint": lambda: Reader({"answer.json": json.dumps(said).encode()}, read_answer),
    }  # fmt: skip


NAMES = [
    "training data", "training data, skipping", "contexts", "the paper's files", "chat messages",
    "conversations of people", "test set", "schema", "predictions", "predictions for people", "filled sheets and key",
    "config of a run", "model.json", "judges.json", "frozen tokens", "arrays", "tokenizers", "safetensors", "an index",
    "weights of torch", "checkpoint of a Llama", "checkpoint of a BERT", "tokenizer of transformers", "GGUF",
    "list of a whole folder", "scores that are kept", "a run", "metrics of a run", "topics", "instructions", "journal",
    "settings of a collection", "transcript", "review file", "comments", "transcripts of a collection",
    "answer of an endpoint",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_nearly_right_is_read_or_refused(readers, name, tmp_path, request, capsys, monkeypatch):
    reader, outcomes, began = readers[name](), Counter(), time.perf_counter()
    share, total = SHARES.get(name, USUAL), sum(SHARES.get(other, USUAL) for other in NAMES)
    asked = request.config.getoption("--examples")
    number = -(-asked * share // total) or share
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)

    def fill(files):
        for file, content in files.items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    fill(reader.files)
    reader.read(tmp_path)  # as it is, it is read

    @settings(
        max_examples=number, derandomize=not asked, database=None, deadline=PATIENCE,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(st.data())
    def check(data):
        fill(reader.files)
        file = data.draw(st.sampled_from(sorted(reader.changed or reader.files)))
        fill({file: mutated(data.draw, file, reader.files[file])})
        try:
            reader.read(tmp_path)
            outcomes["read"] += 1
        except UserError as error:
            sentences = str(error).split("\n")
            assert all(0 < len(sentence) <= LONGEST_LINE + 10 and sentence.isprintable() for sentence in sentences)
            outcomes["refused"] += 1

    check()
    assert (outcomes["refused"] or not reader.refuses) and outcomes.total() >= 0.9 * number
    if asked:
        with capsys.disabled():
            seconds = time.perf_counter() - began
            print(f"\n| {name} | {outcomes['read']:,} | {outcomes['refused']:,} | {seconds:.0f} |", end="", flush=True)
