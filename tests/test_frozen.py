"""Pretrained parts that stay frozen, adapters on them, and a decoder that sees the context: the real commands."""

import dataclasses
import json
import shutil
import subprocess

import jax
import micro
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import miracle_jax as mj
from miracle_jax import config, cvae, export, generate, model, pipeline, pretrained, stages, train
from miracle_jax.command_line import read_config
from miracle_jax.errors import UserError

CONTEXT = ["How are you?", "Well.", "What about the river?"]


@pytest.fixture(scope="module")
def backbones(tiny_run, tmp_path_factory):
    """A BERT and a GPT-2 in folders of transformers, made from a run."""
    folder = tmp_path_factory.mktemp("backbones") / "export"
    export.export(tiny_run.workdir, str(folder), export.Options(format="safetensors"))
    return folder


@pytest.fixture(scope="module")
def flags(tiny_run, backbones):
    return [
        *tiny_run.flags, "--encoder.pretrained", str(backbones / "prior"), "--encoder.frozen", "True",
        "--decoder.pretrained", str(backbones / "decoder"), "--decoder.frozen", "True", "--decoder.lora-rank", "2",
        "--decoder.sees-context", "True", "--decoder.context-tokens", "8", "--data.buckets", "16", "24", "10", "32",
        "40", "10", "--decode.max-new-tokens", "8", "--train.latent-steps", "30", "--train.steps", "6",
        "--train.eval-every", "3", "--train.save-every", "3", "--train.log-every", "2",
    ]  # fmt: skip


def settings_of(run: micro.Run) -> config.Config:
    return pretrained.resolve(read_config("", "", run.arguments)[0])


@pytest.fixture(scope="module")
def frozen_run(flags, tmp_path_factory):
    run = micro.Run(tmp_path_factory.mktemp("frozen") / "run", flags)
    done = subprocess.run(run.command, cwd=micro.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run.output = done.stdout
    return run


def test_the_run_says_what_it_starts_from_and_trains_only_what_is_not_frozen(frozen_run, backbones):
    first = frozen_run.output.splitlines()[0]
    assert first.startswith(f"starting from {backbones / 'prior'} and {backbones / 'decoder'}; random are ")
    assert "decoder.latent_proj" in first and "prior.to_gaussian" in first and "pooler" not in first
    settings = settings_of(frozen_run)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: cvae.Miracle(settings, (2, 2, 2), nnx.Rngs(0)))))
    trained, frozen = (flatten_dict(part, sep=".") for part in cvae.split(settings, shapes))
    number = sum(leaf.size for leaf in trained.values())
    assert f"{number / 1e6:.2f} M parameters" in frozen_run.output
    assert {path for path in trained if path.startswith("decoder.") and "adapter" not in path} == {
        "decoder.latent_embed.kernel", "decoder.latent_proj.kernel",
    }  # fmt: skip
    assert not [path for path in frozen if "adapter" in path or "heads" in path or "to_gaussian" in path]


def test_the_model_holds_what_was_trained_and_finds_the_rest_in_the_checkpoints(frozen_run, backbones):
    stored = model.read_run(frozen_run.workdir)
    source = model.read_run(backbones)
    for part in ("prior", "posterior"):
        for name in ("layers", "tokens", "norm"):
            jax.tree.map(
                np.testing.assert_array_equal, stored.miracle[part]["bert"][name], source.miracle["prior"]["bert"][name]
            )
        assert (
            stored.miracle[part]["bert"]["pooler"]["kernel"] != source.miracle["prior"]["bert"]["pooler"]["kernel"]
        ).any()
    blocks, before = (s.miracle["decoder"]["layers"]["blocks"]["qkv"] for s in (stored, source))
    np.testing.assert_array_equal(blocks["kernel"], before["kernel"])
    assert np.abs(blocks["adapter_out"]).max() > 0
    merged = mj.load(frozen_run.workdir)
    assert merged.config.decoder.lora_rank == 0
    update = np.matmul(blocks["adapter_in"], blocks["adapter_out"])
    kernel = merged.miracle.decoder.layers.blocks.qkv.kernel[...]
    np.testing.assert_allclose(kernel, before["kernel"] + update, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_equals_the_uninterrupted_one(frozen_run, tmp_path):
    part = micro.Run(tmp_path / "run", frozen_run.flags)
    shutil.copytree(frozen_run.workdir, part.workdir)
    for name in ("model", "checkpoints/6"):
        shutil.rmtree(part.workdir / name)
    (part.workdir / "model.json").unlink()
    settings, _, workdir = read_config("", "", part.arguments)
    train.train(settings, workdir)
    ours, theirs = (model.read_run(run.workdir).miracle for run in (part, frozen_run))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert part.metrics() == frozen_run.metrics()


def test_a_resumed_run_looks_for_weights_only(frozen_run, tmp_path, monkeypatch):
    """Shapes and tokenizers are in its folder."""
    monkeypatch.setattr(pretrained, "load_tokenizer", None)
    monkeypatch.setattr(pretrained, "_config_of", None)
    settings = read_config("", "", frozen_run.arguments)[0]
    assert pretrained.resolve(settings, config.load_run(frozen_run.workdir)) == config.load_run(frozen_run.workdir)


def test_frozen_encoders_read_every_text_as_the_model_does(frozen_run):
    settings = settings_of(frozen_run)
    corpus = pipeline.prepare(settings)
    stored = model.read_run(frozen_run.workdir)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: cvae.Miracle(settings, (2, 2, 2), nnx.Rngs(0))))
    means = stages.encoder_means(graphdef, stored.miracle, corpus.validation)
    with np.load(frozen_run.workdir / "encoded-validation.npz") as kept:
        for name in ("context_mean", "joint_mean"):
            np.testing.assert_allclose(kept[name], means[name], rtol=1e-5, atol=1e-5)
    whole = nnx.merge(graphdef, stored.miracle)
    for with_means, with_tokens in zip(
        pipeline.evaluation_batches(corpus.validation, settings.data.buckets, 8, columns=means),
        pipeline.evaluation_batches(corpus.validation, settings.data.buckets, 8),
        strict=True,
    ):
        assert "context" not in with_means and with_means["context_mean"].shape == (8, 16)
        got, want = (jax.jit(lambda m, b: m(b))(whole, batch) for batch in (with_means, with_tokens))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_latents_alone_learn_the_labels(frozen_run):
    """Heads that have seen the frozen encoders' means read the training labels better than chance."""
    settings = settings_of(frozen_run)
    corpus = pipeline.prepare(settings)
    stored = model.read_run(frozen_run.workdir)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: cvae.Miracle(settings, (2, 2, 2), nnx.Rngs(0))))
    with np.load(frozen_run.workdir / "encoded-train.npz") as kept:
        data = dict(kept) | {"labels": corpus.train.labels}
    trained, frozen = cvae.split(settings, stored.miracle)
    longer = dataclasses.replace(settings, train=dataclasses.replace(settings.train, latent_steps=300))
    after = stages.warm_up(longer, graphdef, trained, frozen, data, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, after["decoder"], trained["decoder"])
    whole = nnx.merge(graphdef, cvae.join(after, frozen))
    logits = whole.heads(whole.posterior.of_mean(data["joint_mean"]).mean)
    known = data["labels"] >= 0
    assert np.mean((np.argmax(logits, -1) == data["labels"])[known]) > 0.9


def test_prompts_stand_before_the_reply_and_are_cut_like_contexts(frozen_run):
    settings = settings_of(frozen_run)
    corpus = pipeline.prepare(settings)
    tokenizer = corpus.tokenizers.decoder
    batch = pipeline.Batches(corpus.train, settings.data.buckets, 8, 1, 0)[0]
    assert batch["prompt"].shape == (1, 8, 8) and batch["prompt_length"].shape == (1, 8)
    for row, length in zip(batch["prompt"][0], batch["prompt_length"][0], strict=True):
        assert (row[: 8 - length] == tokenizer.eos_id).all()
        assert tokenizer.decode(row[8 - length :].tolist(), specials=True).endswith("ssistant:")
    shape = config.Gpt2(sees_context=True)
    questions, replies = CONTEXT[0::2], CONTEXT[1::2]
    assert (
        tokenizer.backend.decode(tokenizer.prompt(questions, replies, shape))
        == "User:What about the river?\n\nAssistant:"
    )
    whole = tokenizer.prompt(questions, replies, config.Gpt2(sees_context=True, context_tokens=200))
    assert tokenizer.backend.decode(whole) == (
        "User:How are you?\n\nAssistant:Well.\n\nUser:What about the river?\n\nAssistant:"
    )
    assert tokenizer.prompt(questions, replies, config.Gpt2()) == []


def test_a_decoder_that_sees_the_context_answers_by_it(frozen_run):
    loaded = mj.load(frozen_run.workdir)
    z = np.zeros((2, loaded.config.latent.size), np.float32)
    contexts = [CONTEXT, ["What about the bread?"]]
    together = loaded.decode(z, contexts, 0, 0, loaded.config.decode)
    assert together == [loaded.decode(z[:1], [context], 0, 0, loaded.config.decode)[0] for context in contexts]
    prompt, length = loaded._prompts(contexts)
    other = prompt.copy()
    other[:, -1] = 300 - prompt[:, -1]
    logits = [loaded.miracle.decoder(np.ones((2, 1), int), z, None, seen, length) for seen in (prompt, other)]
    assert (np.abs(logits[0] - logits[1]).max(axis=-1) > 1e-3).all()


def test_the_commands_take_a_run_with_frozen_parts(frozen_run, tmp_path, capsys):
    generate.main([str(frozen_run.workdir), *CONTEXT, "--personality", "lyrical, critical"])
    assert "[lyrical, critical]" in capsys.readouterr().out
    export.export(frozen_run.workdir, str(tmp_path / "alone"), export.Options())
    facts = json.loads((tmp_path / "alone" / "config.json").read_text())["config"]
    assert not facts["encoder"]["pretrained"] and not facts["decoder"]["frozen"] and facts["decoder"]["lora_rank"] == 0
    small = export.Options(parts="trained", dtype="bfloat16")
    export.export(frozen_run.workdir, str(tmp_path / "small"), small)
    assert not (tmp_path / "small" / "decoder").exists()
    replies = [
        [reply.text for reply in mj.load(folder).replies([CONTEXT, CONTEXT[-1:]], "lyrical")]
        for folder in (frozen_run.workdir, tmp_path / "alone")
    ]
    assert replies[0] == replies[1] and mj.load(tmp_path / "small").reply(CONTEXT, "lyrical").ok


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--encoder.frozen", "True"], "encoder.frozen is set, but encoder.pretrained names no weights"),
        (["--decoder.lora-rank", "2"], "decoder.lora_rank is set, but without decoder.frozen"),
        (["--train.latent-steps", "2"], "train.latent_steps is set, but only frozen encoders"),
        (["--decoder.sees-context", "True"], "with 64 of the context and the latent's position that exceeds"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(tiny_run, more, sentence):
    with pytest.raises(UserError, match=sentence):
        read_config("", "", [*tiny_run.arguments, *more])
