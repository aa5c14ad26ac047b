"""Two baselines that have no encoder and no latent: plain fine-tuning, and control tokens in the prompt.

The decoder of a config learns to write the reply after reading the context, from the same batches and by the same
optimizer as `python -m miracle_jax.train`. With `--control tokens` what is wanted stands before the context by name,
"lyrical, optimistic: " (as the control codes of Keskar et al. 2019): in training what the reply is labelled with, in
answering what is asked for. With `--control none` nothing does.

    python -m miracle_jax.baseline --config configs/tiny.py --workdir runs/tokens --control tokens [--data test]

The same command again resumes. In the end the contexts of --data (`test`, the bundled test set, or a file as `python -m
miracle_jax.generate --data` reads it) are answered with the personality that they are labelled with, or with
`--personality all` with every one, into WORKDIR/replies.jsonl; WORKDIR/baseline.json tells what that took. Of the
config the encoder's weights, the latent, the losses and the sampler play no part; decoder.word_dropout, by which a
decoder is made to listen to z, does (--decoder.word-dropout 0 switches it off).
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from miracle_jax import cluster, decode, decoder, goodput, losses, mesh, pipeline, pretrained, storage, train
from miracle_jax.attributes import Schema
from miracle_jax.config import Bert, Config, Loss, load_run
from miracle_jax.cvae import Outputs, check_device, compute, join
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.examples import FIELDS, PROMPT, Examples, TokenArrays
from miracle_jax.generate import Options, contexts_to_answer
from miracle_jax.loop import of_batches, take_steps
from miracle_jax.model import merge_adapters
from miracle_jax.pieces import in_pieces
from miracle_jax.report import Report, training_seconds
from miracle_jax.tokenizers import DecoderTokenizer, Ids, Tokenizers


def no_latent(rows: int) -> Float[Array, "B 1"]:
    """z of a decoder that has none. The latent's projections have no bias, so its position is a key and a value of 0,
    the same whatever is read: it tells nothing, and training and decoding see it alike."""
    return jnp.zeros((rows, 1))


class Baseline(nnx.Module):
    """A decoder alone, called and trained as Miracle is."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.decoder = decoder.make(config.decoder, 1, compute(config), rngs)

    def __call__(self, batch: dict[str, Array], key: Key[Array, ""] | None = None, noise: float = 0.0) -> Outputs:
        """batch: reply (B, S), prompt (B, P) and prompt_length (B,) as in pipeline.py. key: of dropout."""
        z = no_latent(len(batch["reply"]))
        hidden = self.decoder.states(batch["reply"], z, key, batch["prompt"], batch["prompt_length"])
        return Outputs(None, None, z, hidden, self.decoder.lm_head(), None)


def graph_of(config: Config):
    return nnx.graphdef(nnx.eval_shape(lambda: Baseline(config, nnx.Rngs(0))))


# ------------------------------------------------------------------------------------------------ what it reads


def reading(config: Config) -> Config:
    """The run's config for a decoder that reads as much of the context as the encoders do, unless it sees some already,
    and for no loss but reconstruction."""
    shape = config.decoder
    if shape.frozen and not shape.lora_rank:
        raise UserError("decoder.frozen leaves a baseline nothing to train; give it adapters with --decoder.lora-rank")
    if not shape.sees_context:
        shape = dataclasses.replace(shape, sees_context=True, context_tokens=config.data.buckets[-1][0])
    return dataclasses.replace(config, decoder=shape, loss=Loss(classify=0.0, gap=0.0, posterior=False))


def with_room(config: Config, control: int, before: Config | None) -> Config:
    """The config with positions for prompts that are `control` tokens longer. before: that of the run to resume.

    Raises UserError where pretrained weights have fewer.
    """
    shape = config.decoder
    reply = max(config.data.buckets[-1][2] + 1, config.decode.max_new_tokens + 2)  # with the latent's: Config.check
    needed = shape.prompt_limit + control + reply
    if shape.pretrained and needed > shape.max_positions:
        raise UserError(
            f"decoder.pretrained {shape.pretrained} has {shape.max_positions} positions, but {shape.prompt_limit} "
            f"tokens of the context, {control} of control and {reply} of the reply need {needed}; set a smaller "
            "--decoder.context-tokens with --decoder.sees-context True, a shorter reply in the last of data.buckets, "
            "or --decode.max-new-tokens"
        )
    positions = max(needed, shape.max_positions, before.decoder.max_positions if before else 0)
    return dataclasses.replace(config, decoder=dataclasses.replace(shape, max_positions=positions))


def control_ids(control: str, schema: Schema, tokenizer: DecoderTokenizer, personality: Sequence[int]) -> Ids:
    """What stands before a context. control: "tokens" or "none". personality: (A,), -1 where nothing is wanted."""
    wanted = schema.describe(personality) if control == "tokens" else ""
    return tokenizer.encode(f"{wanted}: ") if wanted else []


def controlled(examples: Examples, control: Callable[[Sequence[int]], Ids]) -> TokenArrays:
    """The examples, in memory, with what they are labelled with before their prompts."""
    rows = examples.tokens(range(len(examples)))
    prompts = [[*control(labels), *row[-1]] for labels, row in zip(examples.labels, rows, strict=True)]
    lengths = np.column_stack([examples.lengths[:, : len(FIELDS)], np.array(list(map(len, prompts)), np.int32)])
    arrays = {name: np.concatenate([row[field] for row in rows]) for field, name in enumerate(FIELDS)}
    arrays |= {PROMPT: np.concatenate(prompts), "lengths": lengths, "labels": examples.labels, "turns": examples.turns}
    return TokenArrays(arrays, examples.padding)


# ------------------------------------------------------------------------------------------------ training


def make_validation(config: Config, batches: Sequence[dict]) -> Callable[[dict], dict[str, float]]:
    """A function from parameters to {"reconstruct", "score"}: both are nats a token over all batches."""
    graphdef = graph_of(config)

    @cluster.together
    @jax.jit
    def sums(params, batch):
        out, weight = nnx.merge(graphdef, params)(batch), losses.row_weight(batch)
        nats = losses.reconstruction(out.hidden, out.lm_head, batch["reply"], batch["reply_length"], weight)
        return nats, jnp.sum(weight * (batch["reply_length"] - 1))

    def validate(params):
        nats, tokens = np.sum(of_batches(partial(sums, params), batches), axis=0, dtype=np.float64)
        return {"reconstruct": float(nats / tokens), "score": float(nats / tokens)}

    return validate


def run(config: Config, workdir: str | Path, control: str, data: str = "test", personality: str = "labelled") -> dict:
    """Trains or resumes a baseline, then answers `data`. Returns what baseline.json holds, on the first process.

    personality: "labelled" or "all".
    """
    workdir = train.run_folder(workdir)
    with contextlib.ExitStack() as held:
        return _run(config, workdir, control, data, personality, held)


def _run(
    config: Config, workdir: Path, control: str, data: str, personality: str, held: contextlib.ExitStack
) -> dict:
    """held: keeps the folder locked until the end."""
    ledger = goodput.Ledger()
    before = load_run(workdir) if (workdir / "config.json").exists() else None
    config = reading(pretrained.resolve(config, before))
    settings, buckets = config.train, config.data.buckets

    # ---- Data
    tokenizers = Tokenizers.load(workdir / "tokenizers") if before else None
    corpus = cluster.one_first(lambda: pipeline.prepare(config, tokenizers))
    schema, tokenizer = corpus.schema, corpus.tokenizers.decoder
    control_of = partial(control_ids, control, schema, tokenizer)
    personalities = itertools.product(*(range(-1, size) for size in schema.sizes))
    config = with_room(config, max(map(len, map(control_of, personalities))), before)
    config.check()
    check_device(config)
    tasks = contexts_to_answer(schema, Options(data=data, personality=personality))
    devices = mesh.make(config.mesh)
    micro_batch = settings.batch_size // settings.accumulate
    mesh.check_batch(micro_batch, devices, "train.batch_size / train.accumulate")
    own = mesh.own_rows(micro_batch, devices)
    learned_from, unseen = (controlled(part, control_of) for part in (corpus.train, corpus.validation))
    batches = pipeline.Batches(learned_from, buckets, settings.batch_size, settings.accumulate, config.seed, own)
    steps = settings.steps or max(round(settings.epochs * batches.steps_per_epoch), 1)
    put = partial(mesh.put_batch, mesh=devices)
    validation = [put(b, batch_axis=0) for b in pipeline.evaluation_batches(unseen, buckets, micro_batch, own)]

    # ---- Training
    keys = train.Keys.of(config.seed)
    optimizer, schedule = train.make_optimizer(config, steps)

    def random():
        return nnx.to_pure_dict(nnx.state(Baseline(config, nnx.Rngs(keys.init))))

    if cluster.first():
        held.enter_context(storage.locked(workdir))
    cluster.one_first(lambda: train.start_run(config, workdir, corpus, control))
    alone = dataclasses.replace(config, encoder=Bert())  # its weights are not looked for
    with ledger.of("restore"):
        checkpoints, state, frozen, abstract = train.starting_point(alone, workdir, random, optimizer, devices)
    start, shardings = int(state["step"]), jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = partial(train.make_train_step(config, graph_of(config), optimizer, keys.steps, shardings), frozen=frozen)
    validate = make_validation(config, validation)

    def stream(start):
        return (put(batch, batch_axis=1) for batch in batches.stream(start))

    def score(params):
        return validate(join(params, frozen))

    report = Report(workdir, settings, start, steps)
    state = take_steps(settings, state, stream, step, schedule, score, checkpoints, report, ledger)
    best = checkpoints.best()
    if best != steps:
        state = checkpoints.restore(best, abstract)
    checkpoints.close()

    # ---- Answering
    began = time.perf_counter()
    contexts = [tokenizer.prompt(task["input"], task["output"], config.decoder) for task in tasks]
    asked = [control_of(schema.parse(task["personality"])) for task in tasks]
    prompts = [control + context for control, context in zip(asked, contexts, strict=True)]
    different = list(dict.fromkeys(map(tuple, prompts)))  # without control all personalities have the same
    answers = answer(config, mesh.fetch(join(state["params"], frozen)), tokenizer, different)
    if not cluster.first():
        return {}
    known = dict(zip(different, answers, strict=True))
    replies = [known[tuple(prompt)] for prompt in prompts]
    out = workdir / "replies.jsonl"
    with storage.replacing(out) as file:
        for task, reply in zip(tasks, replies, strict=True):
            file.write((json.dumps(task | {"reply": reply}, ensure_ascii=False) + "\n").encode())
    facts = {"step": best, "training_seconds": training_seconds(workdir / "metrics.jsonl", settings.batch_size)}
    facts |= {"replies": len(replies), "answering_seconds": time.perf_counter() - began}
    with storage.replacing(workdir / "baseline.json") as file:
        file.write(json.dumps(facts, indent=2).encode())
    print(
        f"{steps} steps took {facts['training_seconds']:.0f} s; wrote {len(replies)} replies by the model of step "
        f"{best} to {out} in {facts['answering_seconds']:.0f} s",
        flush=True,
    )
    return facts


# ------------------------------------------------------------------------------------------------ answering


def answer(config: Config, params: dict, tokenizer: DecoderTokenizer, prompts: Sequence[Sequence[int]]) -> list[str]:
    """A reply to each prompt, by config.decode; on the first process, while all answer. Prompts of similar length share
    a batch. params: on the host."""
    config, params = merge_adapters(config, params)
    graphdef = graph_of(config)
    models = {device: nnx.merge(graphdef, jax.device_put(params, device)) for device in jax.local_devices()}
    bos, eos, size = tokenizer.bos_id, tokenizer.eos_id, config.decode.batch_size or 128
    tokens = np.arange(config.decoder.vocab_size)
    allowed, key = jnp.asarray((tokens < tokenizer.size) & (tokens != bos)), jax.random.key(config.seed)

    def write(device, rows, prompt, length):
        z, writer = no_latent(len(rows)), models[device].decoder
        return decode.generate(writer, z, rows, allowed, bos, eos, config.decode, key, prompt, length)

    length = np.array([len(prompt) for prompt in prompts], np.int32)
    order, texts = np.argsort(length, kind="stable"), [""] * len(prompts)

    def answer_some(device, first):
        rows = order[first : first + size]
        width = -(-int(length[rows].max()) // 16) * 16  # few shapes compile
        prompt = np.array([[eos] * (width - length[i]) + list(prompts[i]) for i in rows], np.int32)
        with jax.default_device(device):
            written = in_pieces(partial(write, device), (rows, prompt, length[rows]), size, params)
        return [tokenizer.decode(ids[:number].tolist()).strip() for ids, number in zip(*written, strict=True)]

    for i, text in zip(order, itertools.chain(*cluster.spread(range(0, len(order), size), answer_some)), strict=False):
        texts[i] = text
    return texts


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        own.add_argument("--control", default="")
        own.add_argument("--data", default="test")
        own.add_argument("--personality", default="labelled")
        given, rest = own.parse_known_args(cluster.join(argv))
        config, workdir = train.read_command("python -m miracle_jax.baseline", __doc__, rest)
        if given.control not in ("tokens", "none"):
            raise UserError(f"--control is {given.control!r}; it must be tokens, or none for plain fine-tuning")
        if given.personality not in ("labelled", "all"):
            raise UserError(
                f"--personality is {given.personality!r}; it must be labelled, or all for every combination"
            )
        run(config, workdir, given.control, given.data, given.personality)


if __name__ == "__main__":
    main()
