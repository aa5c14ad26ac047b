"""Baselines without a latent: what they read, learn and answer; resumption; what they refuse."""

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from small import random_model

from miracle_jax import baseline, config, dataset, examples, export, pipeline, train
from miracle_jax.attributes import Schema
from miracle_jax.checkpoint import Checkpoints
from miracle_jax.errors import UserError
from miracle_jax.tokenizers import Tokenizers

STEPS = ["--train.steps", "150", "--train.eval-every", "50", "--train.save-every", "50"]
SHORT = ["--train.steps", "6", "--train.eval-every", "3", "--train.save-every", "3", "--train.log-every", "2"]
SEES = ["--decoder.sees-context", "True", "--decoder.context-tokens", "32", "--decoder.max-positions", "90"]
PERSONALITIES = list(itertools.product((0, 1), repeat=3))
ASKED = [
    {"input": ["How are you?", "What about the river?"], "output": ["Well."], "tag": [0, None, None], "id": "a\u2028b"},
    {"input": ["What about the river?"], "output": ["I saw the river."], "tag": {"attitude": "optimistic"}},
    *(
        {"input": ["What about the bread?"], "output": [], "tag": {name: aspect}}
        for name in micro.REPLIES
        for aspect in (0, 1)
    ),
    *({"input": ["What about the lamp?"], "output": [], "tag": list(tag)} for tag in PERSONALITIES),
    {"input": ["How are you?", "What about the window?", "What about the song?"], "output": ["Well.", "The window."]},
]


def run(arguments) -> None:
    """What the command does, in this process."""
    baseline.main(list(map(str, arguments)))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def saved(path):
    return ocp.StandardCheckpointer().restore(path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return micro.write_lines(tmp_path_factory.mktemp("asked") / "asked.jsonl", ASKED)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The flags of the micro corpus."""
    return micro.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def tokens_run(corpus, asked, tmp_path_factory) -> micro.Run:
    """A finished run with control tokens by the real command."""
    trained = micro.Run(
        tmp_path_factory.mktemp("tokens") / "run", [*corpus, *STEPS, "--control", "tokens", "--data", asked]
    )
    command = [sys.executable, "-m", "miracle_jax.baseline", *trained.arguments]
    done = subprocess.run(command, cwd=micro.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained.output, trained.errors = done.stdout, done.stderr
    return trained


class Alone:
    """A decoder that reads one text at a time: no padding before it, no batch, no cache, no latent."""

    def __init__(self, settings, tokenizer, params):
        self.config, self.tokenizer, self.params = settings, tokenizer, params
        shape = settings.decoder
        model = nnx.merge(baseline.graph_of(settings), params).decoder
        nothing = jnp.zeros((shape.depth, 1, shape.heads, 1, shape.width // shape.heads))  # a key and a value of 0
        see = (jnp.zeros((1, 1)), (nothing, nothing), jnp.ones((), bool), 1)
        self._scores = jax.jit(lambda ids: model.logits(model.hidden(ids[None], *see)[0])[0])

    def log_p(self, ids) -> np.ndarray:
        """(S, V): log probabilities after each of the ids."""
        behind = self.config.decoder.max_positions - 1 - len(ids)  # one shape; nothing sees what follows it
        scores = np.asarray(self._scores(np.pad(ids, (0, behind))), np.float64)[: len(ids)]
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    def prompt(self, task, control) -> list[int]:
        questions = task["input"]
        replies = task["output"][: len(questions) - 1]  # behind them may be a reference
        return self.tokenizer.encode(control) + self.tokenizer.prompt(questions, replies, self.config.decoder)

    def greedy(self, prompt) -> str:
        ids, settings = [*prompt, self.tokenizer.bos_id], self.config.decode
        for step in range(settings.max_new_tokens):
            scores = self.log_p(ids)[-1]
            scores[self.tokenizer.size :] = scores[self.tokenizer.bos_id] = -np.inf
            if step < settings.min_new_tokens:
                scores[self.tokenizer.eos_id] = -np.inf
            ids.append(int(scores.argmax()))
            if ids[-1] == self.tokenizer.eos_id:
                break
        return self.tokenizer.decode(ids[len(prompt) + 1 :])


@pytest.fixture(scope="module")
def schema(tokens_run):
    return Schema.load(tokens_run.workdir / "schema.toml")


@pytest.fixture(scope="module")
def trained(tokens_run) -> Alone:
    """The decoder that wrote the replies of this run."""
    step = json.loads((tokens_run.workdir / "baseline.json").read_text())["step"]
    params = saved(tokens_run.workdir / f"checkpoints/{step}")["params"]
    settings = config.load_run(tokens_run.workdir)
    return Alone(settings, Tokenizers.load(tokens_run.workdir / "tokenizers").decoder, params)


# ------------------------------------------------------------------------------------------------ the real command


def test_the_command_leaves_a_run_and_its_replies(tokens_run, asked):
    assert {path.name for path in tokens_run.workdir.iterdir()} == {
        "config.json", "schema.toml", "tokenizers", "checkpoints", "metrics.jsonl", "replies.jsonl", "baseline.json",
        ".lock",
    }  # fmt: skip
    assert json.loads((tokens_run.workdir / "config.json").read_text())["control"] == "tokens"
    facts = json.loads((tokens_run.workdir / "baseline.json").read_text())
    assert facts["replies"] == len(ASKED) and facts["training_seconds"] > 0 and facts["answering_seconds"] > 0
    rows = tokens_run.metrics()
    validated = {row["step"]: row["score"] for row in rows if row["split"] == "validation"}
    assert list(validated) == [50, 100, 150] and facts["step"] == min(validated, key=validated.get)
    learned = [row for row in rows if row["split"] == "train"]
    assert {"reconstruct", "gradient_norm", "learning_rate"} == set(learned[0]) - {"step", "split"}
    assert learned[-1]["reconstruct"] < 0.3 * learned[0]["reconstruct"]
    said = tokens_run.output.splitlines()
    assert said[0] == "starting from random weights"
    assert said[-1].startswith(f"150 steps took {facts['training_seconds']:.0f} s; wrote {len(ASKED)} replies by the ")
    assert "warning: 1 of 17 contexts have no `tag`" in tokens_run.errors and "Traceback" not in tokens_run.errors


def test_a_line_a_context_with_the_keys_of_generate(tokens_run):
    records = lines(tokens_run.workdir / "replies.jsonl")
    assert [list(record) for record in records] == [
        ["id", "input", "output", "reference", "personality", "reply"]
    ] * len(ASKED)
    assert [record["id"] for record in records] == ["a\u2028b", *map(str, range(1, len(ASKED)))]
    assert [record["input"] for record in records] == [line["input"] for line in ASKED]
    assert [record["output"] for record in records[:2]] == [["Well."], []]
    assert [record["reference"] for record in records[:3]] == [None, "I saw the river.", None]
    assert [record["personality"] for record in records[:3]] == ["plain", "optimistic", "plain"]
    assert records[-2]["personality"] == "lyrical, optimistic, critical" and records[-1]["personality"] == ""
    assert all(record["reply"] for record in records)


# ------------------------------------------------------------------------------------------------ what it reads


def test_the_decoder_reads_as_much_as_the_encoders_do_and_has_positions_for_it(trained, tokens_run):
    styles, attitudes, minds = (
        ("", "plain", "lyrical"),
        ("", "pessimistic", "optimistic"),
        ("", "emotional", "critical"),
    )
    given, shape = train.read_command("", "", tokens_run.arguments[:4])[0].decoder, trained.config.decoder
    assert not given.sees_context and shape.sees_context and shape.context_tokens == 32
    texts = [", ".join(filter(None, words)) for words in itertools.product(styles, attitudes, minds)]
    control = max(len(trained.tokenizer.encode(f"{text}: ")) for text in texts if text)
    assert shape.max_positions == 32 + control + 17 > given.max_positions  # reply 16, and the latent's
    assert dataclasses.replace(shape, sees_context=False, context_tokens=0, max_positions=20) == given


def test_a_decoder_that_sees_some_of_the_context_keeps_its_setting():
    settings = micro.get_config()
    sees = dataclasses.replace(settings.decoder, sees_context=True, context_tokens=5)
    read = baseline.reading(dataclasses.replace(settings, decoder=sees))
    assert read.decoder == sees
    assert baseline.with_room(read, 3, None).decoder.max_positions == 5 + 3 + 17
    longer = dataclasses.replace(read, decode=config.Decode(max_new_tokens=40))
    assert baseline.with_room(longer, 3, None).decoder.max_positions == 5 + 3 + 42
    assert baseline.with_room(read, 3, longer).decoder.max_positions == 25
    before = baseline.with_room(longer, 3, None)
    assert baseline.with_room(read, 3, before).decoder == before.decoder  # shorter replies go on with its table


@pytest.mark.parametrize("control", ["tokens", "none"])
def test_prompts_begin_with_the_labels_by_name_or_with_nothing(trained, schema, tokens_run, control):
    """Whatever is cut of the context."""
    settings = dataclasses.replace(trained.config.decoder, context_tokens=8)
    corpus = pipeline.prepare(
        dataclasses.replace(trained.config, decoder=settings), Tokenizers.load(tokens_run.workdir / "tokenizers")
    )
    decode = trained.tokenizer.backend.decode
    prompts = baseline.controlled(corpus.train, partial(baseline.control_ids, control, schema, trained.tokenizer))
    assert isinstance(prompts, examples.TokenArrays) and len(prompts) == 72
    rows = range(0, 72, 5)
    for i, before, after in zip(rows, corpus.train.tokens(rows), prompts.tokens(rows), strict=True):
        [attribute] = np.flatnonzero(corpus.train.labels[i] >= 0)
        aspect = schema.attributes[attribute].aspects[corpus.train.labels[i, attribute]]
        front = f"{aspect}: " if control == "tokens" else ""
        read = decode(after[3].tolist())
        assert read == front + decode(before[3].tolist()) and read.endswith("ssistant:") and len(before[3]) <= 8
        for a, b in zip(before[:3], after[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        assert prompts.lengths[i].tolist() == list(map(len, after))
    for name in ("labels", "turns"):
        np.testing.assert_array_equal(getattr(prompts, name), getattr(corpus.train, name))


def test_a_personality_is_written_in_the_order_of_the_schema(trained, schema):
    def text(labels, control="tokens"):
        ids = baseline.control_ids(control, schema, trained.tokenizer, labels)
        return trained.tokenizer.backend.decode(ids)

    assert text((1, 1, 0)) == "lyrical, optimistic, emotional: "
    assert text((-1, 0, -1)) == "pessimistic: "
    assert text((-1, -1, -1)) == text((1, 1, 0), "none") == ""


# ------------------------------------------------------------------------------------------------ what it computes


def test_the_validation_score_is_the_mean_over_tokens_of_rows_computed_one_by_one(trained, schema, tokens_run):
    nats = tokens = 0
    for item in trained.config.data.validation:
        name, _, path = item.partition("=")
        for line in lines(Path(path)):
            reply = trained.tokenizer.reply(line["output"][-1], 16)
            aspect = schema.attributes[schema.attribute_index(name)].aspects[line["tag"]]
            task = {"input": line["input"], "output": line["output"][:-1]}
            prompt = trained.prompt(task, f"{aspect}: ")
            log_p = trained.log_p(prompt + reply[:-1])[len(prompt) :]
            nats -= log_p[np.arange(len(reply) - 1), reply[1:]].sum()
            tokens += len(reply) - 1
    best = json.loads((tokens_run.workdir / "baseline.json").read_text())["step"]
    scores = {row["step"]: row["score"] for row in tokens_run.metrics() if row["split"] == "validation"}
    assert scores[best] == pytest.approx(nats / tokens, rel=1e-4)


def test_replies_are_the_most_probable_tokens_one_after_another(trained, tokens_run):
    for record in lines(tokens_run.workdir / "replies.jsonl")[::2]:
        control = f"{record['personality']}: " if record["personality"] else ""
        assert record["reply"] == trained.greedy(trained.prompt(record, control))


def test_control_tokens_control(tokens_run):
    """The corpus answers every aspect in words of its own."""
    bread = [record for record in lines(tokens_run.workdir / "replies.jsonl") if "bread" in record["input"][-1]]
    answers = [answer for answers in micro.REPLIES.values() for answer in answers]
    for record, answer in zip(bread, answers, strict=True):
        assert re.fullmatch(re.escape(answer).replace(r"\{\}", r"\w+"), record["reply"]), record


def test_a_reply_does_not_depend_on_what_else_is_asked(trained):
    prompts = [trained.prompt(task, control) for task in ASKED[:2] for control in ("", "lyrical: ", "critical: ")]
    together = baseline.answer(trained.config, trained.params, trained.tokenizer, prompts)
    small = dataclasses.replace(trained.config, decode=dataclasses.replace(trained.config.decode, batch_size=2))
    assert baseline.answer(small, trained.params, trained.tokenizer, prompts[::-1]) == together[::-1]
    assert baseline.answer(trained.config, trained.params, trained.tokenizer, prompts[3:4]) == together[3:4]
    assert len(set(together)) > 1 and baseline.answer(trained.config, trained.params, trained.tokenizer, []) == []


def test_what_stands_for_the_latent_is_nothing_that_can_be_learned():
    settings = baseline.reading(micro.get_config())
    settings = baseline.with_room(settings, 4, None)
    model = random_model(lambda: baseline.Baseline(settings, nnx.Rngs(0)))
    batch = {"reply": np.full((2, 5), 3), "prompt": np.full((2, 4), 7), "prompt_length": np.array([4, 2])}
    score = jax.jit(lambda model, batch: model(batch).logits)
    before = score(model, batch)
    model.decoder.latent_embed.kernel[...] += 1
    model.decoder.latent_proj.kernel[...] += 1
    np.testing.assert_array_equal(score(model, batch), before)
    for part in model.decoder.latent_key_values(baseline.no_latent(2)):
        np.testing.assert_array_equal(part, 0)


def test_adapters_are_merged_into_the_decoder_that_answers(trained):
    adapted = dataclasses.replace(
        trained.config, decoder=dataclasses.replace(trained.config.decoder, frozen=True, pretrained="x", lora_rank=2)
    )
    params = nnx.to_pure_dict(nnx.state(random_model(lambda: baseline.Baseline(adapted, nnx.Rngs(0)), std=0.1)))
    prompts = [trained.prompt(task, "") for task in ASKED[:3]]
    replies = baseline.answer(adapted, params, trained.tokenizer, prompts)
    assert replies == [Alone(adapted, trained.tokenizer, params).greedy(prompt) for prompt in prompts]


# ------------------------------------------------------------------------------------------------ resuming


def test_a_resumed_run_equals_the_uninterrupted_one(tokens_run, tmp_path, capsys):
    part = micro.Run(tmp_path / "run", tokens_run.flags)
    shutil.copytree(tokens_run.workdir, part.workdir)
    for name in ("replies.jsonl", "baseline.json"):
        (part.workdir / name).unlink()
    steps = sorted(int(path.name) for path in (part.workdir / "checkpoints").iterdir())
    for step in steps[1:]:
        shutil.rmtree(part.workdir / f"checkpoints/{step}")
    run(part.arguments)
    assert f"resuming from {part.workdir}/checkpoints/{steps[0]}" in capsys.readouterr().out
    assert part.metrics() == tokens_run.metrics()
    for step in steps[1:]:
        ours, theirs = (saved(each.workdir / f"checkpoints/{step}") for each in (part, tokens_run))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (part.workdir / "replies.jsonl").read_bytes() == (tokens_run.workdir / "replies.jsonl").read_bytes()


def test_a_finished_run_answers_other_contexts_by_the_same_model(tokens_run, tmp_path, capsys):
    other = micro.Run(tmp_path / "run", tokens_run.flags)
    shutil.copytree(tokens_run.workdir, other.workdir)
    data = micro.write_lines(tmp_path / "other.jsonl", ASKED[3:4])
    run([*other.arguments, "--data", data, "--decode.max-new-tokens", 3])
    [record] = lines(other.workdir / "replies.jsonl")
    first = lines(tokens_run.workdir / "replies.jsonl")[3]
    assert record["personality"] == first["personality"] and first["reply"].startswith(record["reply"])
    facts, before = (json.loads((each.workdir / "baseline.json").read_text()) for each in (other, tokens_run))
    assert facts["replies"] == 1 and facts["training_seconds"] == before["training_seconds"]
    assert other.metrics() == tokens_run.metrics()


def test_replies_appear_whole_or_not_at_all(tokens_run, tmp_path, monkeypatch):
    part = micro.Run(tmp_path / "run", tokens_run.flags)
    shutil.copytree(tokens_run.workdir, part.workdir)
    (part.workdir / "replies.jsonl").unlink()
    before = {path.name for path in part.workdir.iterdir()}
    monkeypatch.setattr(baseline, "answer", lambda *_: ["one reply"])
    with pytest.raises(ValueError, match="shorter"):
        run(part.arguments)
    assert {path.name for path in part.workdir.iterdir()} == before


# ------------------------------------------------------------------------------------------------ other runs


def test_control_tokens_on_frozen_tokens_equal_those_on_dialogues(corpus, asked, tmp_path):
    """They are in no frozen file: its labels say what to write."""
    frozen = str(tmp_path / "data.npz")
    dataset.main(["freeze", frozen, "--config", micro.__file__, *corpus, *SEES])
    flags = [*SHORT, "--control", "tokens", "--data", asked]
    ours = micro.Run(tmp_path / "ours", ["--data.frozen", frozen, *flags])
    theirs = micro.Run(tmp_path / "theirs", [*corpus, *flags])
    for each in (ours, theirs):
        run(each.arguments)
    assert ours.metrics() == theirs.metrics()
    assert (ours.workdir / "replies.jsonl").read_bytes() == (theirs.workdir / "replies.jsonl").read_bytes()


def test_a_pretrained_decoder_keeps_its_weights_and_positions_and_learns_adapters(tiny_run, asked, tmp_path, capsys):
    export.export(tiny_run.workdir, str(tmp_path / "backbones"), export.Options(format="safetensors"))
    folder = tmp_path / "backbones" / "decoder"
    flags = [
        *tiny_run.flags, *SHORT, "--decoder.pretrained", folder, "--decoder.frozen", "True", "--decoder.lora-rank", "2",
        "--decoder.sees-context", "True", "--decoder.context-tokens", "8", "--data.buckets", "32", "40", "8",
        "--decode.max-new-tokens", "5", "--data", asked,
    ]  # fmt: skip
    arguments = micro.Run(tmp_path / "run", flags).arguments
    with pytest.raises(SystemExit):
        run([*arguments, "--control", "tokens"])
    message = capsys.readouterr().err
    assert message.startswith(f"error: decoder.pretrained {folder} has 20 positions, but 8 tokens of the context, ")
    assert "of control and 9 of the reply need " in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    run([*arguments, "--control", "none"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"starting from {folder}; random are ") and "decoder.latent_embed, " in first
    params = saved(tmp_path / "run/checkpoints/6")["params"]["decoder"]
    assert set(params) == {"latent_embed", "latent_proj", "layers"}
    adapters = params["layers"]["blocks"]["qkv"]
    assert set(adapters) == {"adapter_in", "adapter_out"} and np.abs(adapters["adapter_out"]).max() > 0
    assert config.load_run(tmp_path / "run").decoder.max_positions == 20
    lamp = [record["reply"] for record in lines(tmp_path / "run/replies.jsonl") if "lamp" in record["input"][-1]]
    assert len(lamp) == len(PERSONALITIES) and len(set(lamp)) == 1  # nothing tells it which is wanted


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--control", "labels"], "--control is 'labels'; it must be tokens, or none for plain fine-tuning"),
        ([], "--control is ''; it must be tokens"),
        (["--control", "none", "--workdir", ""], "--workdir is missing; it names the folder"),
        (["--control", "none", "--config", ""], "--config is missing; the bundled ones are in configs/"),
        (["--control", "none", "--data", "nowhere.jsonl"], "file nowhere.jsonl does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(corpus, tmp_path, monkeypatch, capsys, more, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run([*micro.Run(tmp_path / "run", corpus).arguments, *more])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith(f"error: {sentence}") and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_frozen_decoder_without_adapters_has_nothing_to_learn():
    settings = micro.get_config()
    frozen = dataclasses.replace(settings.decoder, pretrained="x", frozen=True)
    with pytest.raises(UserError, match="^decoder.frozen leaves a baseline nothing to train; give it adapters with"):
        baseline.reading(dataclasses.replace(settings, decoder=frozen))


def test_a_folder_belongs_to_one_kind_of_run(tokens_run, tiny_run, asked):
    def refused(command, *arguments):
        with pytest.raises(UserError) as error:
            command(*arguments)
        return str(error.value)

    settings, workdir = train.read_command("", "", tokens_run.arguments[:-4])
    held = f"{workdir} holds the baseline --control tokens; give another --workdir"
    assert refused(baseline.run, settings, workdir, "none", asked) == held
    assert refused(train.train, settings, workdir) == held
    changed = dataclasses.replace(settings, train=dataclasses.replace(settings.train, learning_rate=0.5))
    assert refused(baseline.run, changed, workdir, "tokens", asked).startswith(
        f"{workdir} holds a run with another train.learning_rate; give the same flags to resume it"
    )
    settings, workdir = train.read_command("", "", tiny_run.arguments)
    assert refused(baseline.run, settings, workdir, "none", asked) == (
        f"{workdir} holds a run of miracle_jax.train; give another --workdir"
    )


def test_frozen_tokens_must_hold_what_the_decoder_sees(corpus, asked, tmp_path):
    frozen = str(tmp_path / "data.npz")
    dataset.main(["freeze", frozen, "--config", micro.__file__, *corpus])
    data = config.Data(frozen=frozen, buckets=((32, 40, 16),))
    settings = dataclasses.replace(micro.get_config(), data=data)
    with pytest.raises(UserError) as error:
        baseline.run(settings, tmp_path / "run", "tokens", asked)
    assert str(error.value) == (
        f"{frozen} holds no prompts, but the decoder sees 32 tokens of the context; freeze the data again with "
        "--decoder.sees-context True --decoder.context-tokens 32"
    )
    assert not (tmp_path / "run").exists()
    dataset.main(["freeze", frozen, "--config", micro.__file__, *corpus, *SEES])
    for decoder, held in (
        (
            settings.decoder,
            r"prompts of up to \d+ tokens, but the decoder sees 0 tokens of the context; freeze the data ",
        ),
        (
            dataclasses.replace(settings.decoder, sees_context=True, context_tokens=4),
            r"prompts of .* sees 4 tokens of ",
        ),
    ):
        with pytest.raises(UserError, match=held):
            pipeline.prepare(dataclasses.replace(settings, decoder=decoder))
    pipeline.prepare(baseline.reading(settings))


def test_the_best_checkpoint_answers(tokens_run, tmp_path, monkeypatch, capsys):
    """Not the last."""
    part = micro.Run(tmp_path / "run", tokens_run.flags)
    shutil.copytree(tokens_run.workdir, part.workdir)
    monkeypatch.setattr(Checkpoints, "best", lambda checkpoints: 100)
    given = []
    monkeypatch.setattr(baseline, "answer", lambda settings, params, *_: given.append(params) or ["a"] * len(ASKED))
    run(part.arguments)
    wanted = saved(part.workdir / "checkpoints/100")["params"]
    jax.tree.map(np.testing.assert_array_equal, given[0], wanted)
    assert json.loads((part.workdir / "baseline.json").read_text())["step"] == 100
