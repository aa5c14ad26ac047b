"""Checkpoints of the paper's PyTorch code: they become runs of ours that compute the same, and the way back."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import released_files
import runs
import safetensors.numpy
from released_files import ATTRIBUTES, BOS, EOS, LATENT, ROWS

import miracle_jax as mj
from miracle_jax import config, convert, decode, export, generate, latent, losses, sampler
from miracle_jax import model as ours
from miracle_jax.attributes import Attribute, Schema
from miracle_jax.config import Decode, Sample
from miracle_jax.errors import UserError

TIGHT = {"rtol": 1e-7, "atol": 1e-7, "max_steps": 20_000}
CONTEXTS = [["How are you?"], ["The river?", "Cold.", "Really?"], ["hi"]]  # short: the encoder reads 66 characters
PERSONALITIES = ["lyrical, optimistic", "plain, pessimistic, critical", "emotional"]
ASPECTS = np.array([[1, 1, -1], [0, 0, 1], [-1, -1, 0]], np.int32)
WEIGHTS = np.array([[1, 1, 1], [2, 1, 0.5], [1, 1, 3]], np.float32)


@pytest.fixture(scope="module")
def state():
    return released_files.tensors()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    encoder, decoder = folder / "bert", folder / "gpt2"
    return convert.Options(str(released_files.write_encoder(encoder)), str(released_files.write_decoder(decoder)))


@pytest.fixture(scope="module")
def converted(state, options, tmp_path_factory):
    """The state dict as a run, which tests read only."""
    folder = tmp_path_factory.mktemp("converted")
    source = released_files.write(folder / "miracle.safetensors", state)
    convert.convert(source, str(folder / "run"), options)
    return folder / "run"


@pytest.fixture(scope="module")
def model(converted):
    return mj.load(converted)


@pytest.fixture(scope="module")
def original(state):
    import released  # needs torch

    return released.load(state)


@pytest.fixture(scope="module")
def batch():
    """Random tokens, padded with what must not count."""
    rng = np.random.default_rng(1)
    made = {}
    for name, longest, vocabulary in (("context", 11, 141), ("joint", 17, 141), ("reply", 13, ROWS)):
        made[name] = rng.integers(0, vocabulary, (4, longest)).astype(np.int32)
        made[f"{name}_length"] = np.array([longest, 3, longest - 4, 7], np.int32)
    made["reply"][:, 0] = BOS
    made["labels"] = np.array([[0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 0, -1]], np.int32)
    return made


def assert_equal_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_bit_equal(got: dict, want: dict):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].tobytes() == tensor.tobytes(), name


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ it computes the same


@pytest.mark.torch
def test_the_forward_pass_equals_that_of_the_papers_code(model, original, batch):
    import torch
    from torch.distributions import Normal, kl_divergence
    from torch.nn import functional as F

    out = jax.jit(lambda miracle, batch: miracle(batch))(model.miracle, batch)
    tensors = {name: torch.tensor(array).long() for name, array in batch.items()}
    prior = original.prior_encoder.gaussian(tensors["context"], tensors["context_length"])
    posterior = original.posterior_encoder.gaussian(tensors["joint"], tensors["joint_length"])
    for got, want in ((out.prior, prior), (out.posterior, posterior)):
        close(got.mean, want[0])
        close(got.logvar, want[1])
    logits = original.decoder(tensors["reply"], posterior[0])
    inside = np.arange(13) < batch["reply_length"][:, None]
    close(np.asarray(out.logits)[inside], logits[torch.tensor(inside)], 1e-4)
    heads = original.logits_of_attributes(posterior[0])
    close(out.attribute_logits, heads)

    settings = model.config.loss
    assert settings.kl_floor == 0.9
    total = losses.counts(jax.tree.map(lambda array: jnp.asarray(array)[None], batch))
    named = losses.parts(out, batch, settings, total)
    target = tensors["reply"].where(torch.tensor(inside), -100)[:, 1:]
    close(named["reconstruct"], F.cross_entropy(logits[:, :-1].transpose(1, 2), target))
    q, p = (Normal(mean, (logvar / 2).exp()) for mean, logvar in (posterior, prior))
    kl = kl_divergence(q, p)
    close(latent.kl(out.posterior, out.prior), kl, 1e-4)
    assert (kl > 0.9).any() and ((kl < 0.9) & (kl > 0.1)).any()
    close(named["kl"], kl.where(kl > 0.9, 0.0).sum(1).mean(), 1e-4)
    close(named["classify"], F.cross_entropy(heads.transpose(1, 2), tensors["labels"], ignore_index=-1))


@pytest.mark.torch
@pytest.mark.parametrize("drift", ["energy", "energy+prior"])
def test_the_ode_ends_where_that_of_the_papers_code_ends(model, original, batch, drift):
    import torch

    tokens, length = (torch.tensor(batch[name][:3]).long() for name in ("context", "context_length"))
    with torch.no_grad():
        mean, logvar = original.prior_encoder.gaussian(tokens, length)
    aspects, weights = torch.tensor(ASPECTS).long(), torch.tensor(WEIGHTS)
    start = mean.clone().requires_grad_()
    (slope,) = torch.autograd.grad(original.energy(start, aspects, weights).sum(), start)
    for z, wanted, weight, want in zip(mean.numpy(), ASPECTS, WEIGHTS, slope, strict=True):
        close(original.energy_gradient(z, wanted, weight), want)  # what the reference integrates

    want = original.sampled(mean, logvar, aspects, weights, with_prior=drift == "energy+prior")
    moved = sampler.sample(
        model.heads["joint"], mean.numpy(), logvar.numpy(), ASPECTS, WEIGHTS, Sample(drift=drift, **TIGHT),
        jax.random.key(0),
    )  # fmt: skip
    assert moved.ok.all() and np.abs(want - mean.numpy()).max(axis=1).min() > 0.1
    np.testing.assert_allclose(moved.z, want, rtol=1e-4, atol=1e-4)
    close(moved.energy_after, original.energy(torch.tensor(want).float(), aspects, weights), 1e-4)


@pytest.mark.torch
def test_greedy_replies_are_those_of_the_papers_code_token_for_token(model, original):
    import torch

    most = 14
    z = np.random.default_rng(2).normal(size=(8, LATENT)).astype(np.float32)
    settings = Decode(min_new_tokens=2, max_new_tokens=most)
    allowed = jnp.arange(ROWS) != BOS
    tokens, length = decode.generate(
        model.miracle.decoder, z, jnp.arange(8), allowed, BOS, EOS, settings, jax.random.key(0)
    )
    found = [row[:n].tolist() for row, n in zip(np.asarray(tokens), np.asarray(length), strict=True)]
    with torch.no_grad():
        wanted, margins = zip(*(original.greedy(row, 2, most) for row in torch.tensor(z)), strict=True)
    assert min(margins) > 1e-3  # rounding decides nothing
    assert found == list(wanted)
    lengths = {len(row) for row in wanted}
    assert {2, most} < lengths  # some would end at once, some never, some in between


@pytest.mark.torch
def test_replies_to_texts_are_those_of_the_papers_code(model, original, options):
    """From the text of a context to the text of the reply, with transformers' tokenizers on the other side."""
    import torch
    from transformers import AutoTokenizer

    encoder, decoder = (AutoTokenizer.from_pretrained(name) for name in (options.encoder, options.decoder))
    replies = model.replies(CONTEXTS, PERSONALITIES, sample=Sample(**TIGHT))
    texts = []
    for context, personality in zip(CONTEXTS, PERSONALITIES, strict=True):
        turns = [f"{'Assistant' if i % 2 else 'User'}:{turn}" for i, turn in enumerate(context)]
        ids = encoder("\n\n".join([*turns, "Assistant:"]), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[encoder.cls_token_id, *ids, encoder.sep_token_id]])
        aspects = torch.tensor([model.schema.parse(personality)])
        with torch.no_grad():
            prior = original.prior_encoder.gaussian(ids, torch.tensor([ids.shape[1]]))
            z = torch.tensor(original.sampled(*prior, aspects, torch.ones(1, ATTRIBUTES), False)).float()
            tokens, margin = original.greedy(z[0], 2, model.config.decode.max_new_tokens)
        assert margin > 1e-3
        texts.append(decoder.decode(tokens).strip())
    assert [reply.text for reply in replies] == texts
    assert len(set(texts)) == 3


# ------------------------------------------------------------------------------------------------ what it leaves


def test_a_converted_run_is_a_finished_run(converted, options):
    settings = config.load_run(converted)
    settings.check()
    assert settings.latent == config.Latent(size=LATENT, hidden=128, activation="relu")
    assert settings.decoder.vocab_size == ROWS and settings.decoder.mlp == 48
    assert not settings.encoder.pretrained and not settings.decoder.pretrained and settings.loss.posterior
    assert settings.decode.max_new_tokens == 18 and settings.data.buckets[-1] == (66, 66, 18)
    stored = ours.read_run(converted)
    assert (stored.tokenizers.decoder.bos_id, stored.tokenizers.decoder.eos_id) == (BOS, EOS)
    assert stored.schema == Schema.load() and stored.facts["converted_from"] == "miracle.safetensors"
    assert_equal_trees(stored.refit_heads, stored.miracle["heads"])


def test_generate_talks_to_a_converted_run(converted, capsys):
    generate.main([str(converted), "How are you?", "--personality", "lyrical, critical"])
    assert "[lyrical, critical]" in capsys.readouterr().out


def test_the_command_says_what_comes_next(state, options, tmp_path, capsys):
    source = released_files.write(tmp_path / "miracle.safetensors", state)
    out = tmp_path / "run"
    convert.main([str(source), str(out), "--encoder", options.encoder, "--decoder", options.decoder])
    assert capsys.readouterr().out == f"wrote {out}; python -m miracle_jax.generate {out} talks to it\n"


def test_the_card_of_an_exported_checkpoint_claims_no_data(converted, tmp_path):
    export.export(converted, str(tmp_path / "out"), export.Options())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- data: not known\n" in card and "Miracle-Mini" not in card
    assert "- checkpoint: converted from miracle.safetensors, a checkpoint of the paper's PyTorch code\n" in card
    assert "accuracy on validation contexts: not measured" in card


@pytest.mark.parametrize(
    ("suffix", "prefix"),
    [
        (".safetensors", "_orig_mod."),
        pytest.param(".bin", "", marks=pytest.mark.torch),
        pytest.param(".pt", "_orig_mod.", marks=pytest.mark.torch),
    ],
)
def test_every_form_of_the_state_dict_is_read(state, options, converted, tmp_path, suffix, prefix):
    source = released_files.write(tmp_path / f"miracle{suffix}", state, prefix)
    convert.convert(source, str(tmp_path / "run"), options)
    assert_equal_trees(ours.read_run(tmp_path / "run").miracle, ours.read_run(converted).miracle)


def test_buffers_and_tensors_that_share_their_memory_may_be_there_or_not(state, options, converted, tmp_path):
    buffers = {
        "prior_encoder.embeddings.position_ids": np.arange(66)[None],
        "decoder.transformer.h.1.attn.bias": np.ones((1, 1, 20, 20), bool),
        "decoder.transformer.h.2.attn.masked_bias": np.array(-1e4, np.float32),
    }
    for i, lost in enumerate((None, "decoder.lm_head.weight", "decoder.transformer.wte.weight")):
        tensors = {name: tensor for name, tensor in (state | buffers).items() if name != lost}
        source = released_files.write(tmp_path / f"{i}.safetensors", tensors)
        convert.convert(source, str(tmp_path / f"{i}"), options)
        assert_equal_trees(ours.read_run(tmp_path / f"{i}").miracle, ours.read_run(converted).miracle)


def test_safetensors_need_no_torch(state, options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    source = released_files.write(tmp_path / "miracle.safetensors", state)
    convert.convert(source, str(tmp_path / "run"), options)
    assert (tmp_path / "run" / "model.json").exists()


# ------------------------------------------------------------------------------------------------ and back


@pytest.mark.parametrize("posterior", [True, False])
def test_released_to_ours_to_released_is_bit_equal(options, tmp_path, posterior):
    tensors = released_files.tensors(posterior, seed=3)
    source = released_files.write(tmp_path / "before.safetensors", tensors)
    convert.convert(source, str(tmp_path / "run"), options)
    assert config.load_run(tmp_path / "run").loss.posterior == posterior
    export.main([str(tmp_path / "run"), str(tmp_path / "after.safetensors"), "--format", "released"])
    assert_bit_equal(safetensors.numpy.load_file(tmp_path / "after.safetensors"), tensors)


def test_ours_to_released_to_ours_is_bit_equal(converted, tmp_path):
    """The other way round, from a run of ours; the energy's heads are those that the run takes."""
    run = runs.write(tmp_path / "run", converted, decoder={"activation": "relu"})
    before = ours.read_run(run)
    export.export(run, str(tmp_path / "folders"), export.Options("safetensors"))
    folders = convert.Options(str(tmp_path / "folders" / "prior"), str(tmp_path / "folders" / "decoder"))
    for name, heads in (("joint", before.miracle["heads"]), ("refit", before.refit_heads)):
        path = run / "model.json"
        path.write_text(json.dumps(before.facts | {"heads": name}))
        export.export(run, str(tmp_path / f"{name}.safetensors"), export.Options("released"))
        convert.convert(tmp_path / f"{name}.safetensors", str(tmp_path / name), folders)
        after = ours.read_run(tmp_path / name)
        assert_equal_trees(after.miracle, before.miracle | {"heads": heads})
    assert (after.run.encoder, after.run.decoder, after.run.latent) == (
        before.run.encoder, before.run.decoder, before.run.latent
    )  # fmt: skip
    assert after.tokenizers.files() == before.tokenizers.files()


@pytest.mark.parametrize("parts", ["all", "trained"])
def test_adapters_are_in_a_released_file(converted, tmp_path, parts):
    export.export(converted, str(tmp_path / "folders"), export.Options())
    adapted = {"pretrained": str(tmp_path / "folders" / "decoder"), "frozen": True, "lora_rank": 2}
    run = runs.write(tmp_path / "run", converted, decoder=adapted)
    export.export(run, str(tmp_path / "out.safetensors"), export.Options("released", parts=parts))
    written = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    layers = ours.read_run(run).miracle["decoder"]["layers"]["blocks"]
    for name, part in (("attn.c_attn", layers["qkv"]), ("mlp.c_proj", layers["mlp_out"])):
        merged = part["kernel"] + part["adapter_in"] @ part["adapter_out"]
        assert np.abs(merged - part["kernel"]).max() > 0.1
        for i, want in enumerate(merged):
            got = written[f"decoder.transformer.h.{i}.{name}.weight"]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.torch
def test_the_papers_code_loads_what_we_write(converted, state, tmp_path):
    import released

    export.export(converted, str(tmp_path / "out.safetensors"), export.Options("released"))
    again = released.load(safetensors.numpy.load_file(tmp_path / "out.safetensors")).state_dict()
    assert_bit_equal({name: tensor.numpy() for name, tensor in again.items()}, state)


def test_a_released_file_in_bfloat16_is_rounded(converted, state, options, tmp_path):
    source = tmp_path / "half.safetensors"
    export.export(converted, str(source), export.Options("released", "bfloat16"))
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in state.items()}
    assert_bit_equal(safetensors.numpy.load_file(source), rounded)
    convert.convert(source, str(tmp_path / "run"), options)
    export.export(tmp_path / "run", str(tmp_path / "whole.safetensors"), export.Options("released"))
    again = safetensors.numpy.load_file(tmp_path / "whole.safetensors")
    assert_bit_equal(again, {name: tensor.astype(np.float32) for name, tensor in rounded.items()})


def test_a_released_file_is_whole_or_absent_and_replaces_nothing(converted, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.export(converted, str(out), export.Options("released"))
    assert not list(tmp_path.iterdir())
    out.write_text("mine")
    with pytest.raises(UserError, match=f"{out} exists; name a file that does not, or delete it"):
        export.export(converted, str(out), export.Options("released"))
    assert out.read_text() == "mine"


# ------------------------------------------------------------------------------------------------ wrong inputs


def refusal(source, options, tmp_path) -> str:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        convert.convert(source, str(tmp_path / "run"), options)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left
    return str(error.value)


def test_every_tensor_that_does_not_fit_is_listed_by_name_and_shape(state, options, tmp_path):
    tensors = dict(state)
    del tensors["prior_encoder.encoder.layer.1.attention.self.key.weight"], tensors["latent_cls.2.2.bias"]
    tensors["decoder.transformer.latent_proj.weight"] = tensors["decoder.transformer.latent_proj.weight"][:-12]
    tensors["posterior_encoder.linear.weight"] = tensors["posterior_encoder.linear.weight"].T.copy()
    tensors["latent_cls.3.0.bias"] = np.zeros(128, np.float32)
    tensors["prior_encoder.linear.bias"] = np.zeros(12, np.float32)
    source = released_files.write(tmp_path / "wrong.safetensors", tensors)
    assert refusal(source, options, tmp_path).splitlines() == [
        f"{source} does not match the model:",
        "  decoder.transformer.latent_proj.weight: the checkpoint has (36, 6), the model expects (48, 6)",
        "  latent_cls.2.2.bias: missing (the model expects (2,))",
        "  latent_cls.3.0.bias: not in the model (the checkpoint has (128,))",
        "  posterior_encoder.linear.weight: the checkpoint has (16, 12), the model expects (12, 16)",
        "  prior_encoder.encoder.layer.1.attention.self.key.weight: missing (the model expects (16, 16))",
        "  prior_encoder.linear.bias: not in the model (the checkpoint has (12,))",
    ]


def test_a_checkpoint_without_its_pooler_is_refused(state, options, tmp_path):
    """It may be missing from a BERT to start from, where it is trained; here it would stay zero."""
    tensors = {name: tensor for name, tensor in state.items() if "pooler" not in name}
    source = released_files.write(tmp_path / "wrong.safetensors", tensors)
    message = refusal(source, options, tmp_path)
    for encoder in ("prior_encoder", "posterior_encoder"):
        assert f"{encoder}.pooler.dense.weight: missing (the model expects (16, 16))" in message
        assert f"{encoder}.pooler.dense.bias: missing (the model expects (16,))" in message


@pytest.mark.parametrize(
    "name", ["prior_encoder.linear.weight", "latent_cls.0.0.weight", "decoder.transformer.wte.weight"]
)
def test_a_tensor_that_tells_a_size_is_missed_by_name(state, options, tmp_path, name):
    tensors = {key: value for key, value in state.items() if key not in (name, "decoder.lm_head.weight")}
    source = released_files.write(tmp_path / "wrong.safetensors", tensors)
    assert refusal(source, options, tmp_path) == f"{source} has no {name}; it is no checkpoint of the paper's code"
    source = released_files.write(tmp_path / "flat.safetensors", tensors | {name: state[name].ravel()})
    assert refusal(source, options, tmp_path).startswith(f"{source}: {name} has the shape ({state[name].size},); that")


def test_a_head_that_is_not_tied_is_refused(state, options, tmp_path):
    head = state["decoder.lm_head.weight"].copy()
    head[3, 4] += 1
    source = released_files.write(tmp_path / "wrong.safetensors", state | {"decoder.lm_head.weight": head})
    assert "decoder.lm_head.weight: differs from decoder.transformer.wte.weight" in refusal(source, options, tmp_path)


def test_a_tensor_with_and_without_the_prefix_is_refused(state, options, tmp_path):
    twice = state | {"_orig_mod.latent_cls.0.2.bias": np.ones(2, np.float32)}
    source = released_files.write(tmp_path / "wrong.safetensors", twice)
    assert refusal(source, options, tmp_path).startswith(f"{source} has tensors both with and without the prefix")


def test_backbones_of_other_shapes_are_refused(state, options, tmp_path):
    source = released_files.write(tmp_path / "miracle.safetensors", state)
    deeper = convert.Options(str(released_files.write_encoder(tmp_path / "bert", num_hidden_layers=3)), options.decoder)
    message = refusal(source, deeper, tmp_path)
    assert "posterior_encoder.encoder.layer.2.output.dense.bias: missing (the model expects (16,))" in message
    assert message.count("missing") == 30 and message.endswith("  ... and 2 more")
    wider = convert.Options(options.encoder, str(released_files.write_decoder(tmp_path / "gpt2", n_embd=24)))
    message = refusal(source, wider, tmp_path)
    assert "decoder.transformer.h.0.attn.c_attn.bias: the checkpoint has (36,), the model expects (72,)" in message


def test_a_checkpoint_without_a_row_for_bos_is_refused(state, options, tmp_path):
    tensors = {name: tensor[:-1] if len(tensor) == ROWS else tensor for name, tensor in state.items()}
    source = released_files.write(tmp_path / "wrong.safetensors", tensors)
    message = refusal(source, options, tmp_path)
    assert message == (
        f"{source} has embeddings of 257 decoder tokens, but with <bos> the tokenizer of --decoder {options.decoder} "
        "has 258; name the one that it was trained with"
    )


def test_a_llama_decoder_is_refused(state, options, tmp_path):
    folder = released_files.write_decoder(
        tmp_path / "llama", model_type="llama", hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, intermediate_size=24, max_position_embeddings=20,
    )  # fmt: skip
    source = released_files.write(tmp_path / "miracle.safetensors", state)
    message = refusal(source, convert.Options(options.encoder, str(folder)), tmp_path)
    assert message == f"--decoder {folder} is not of the GPT-2 family, which the paper's code has"


def test_a_schema_that_the_heads_do_not_have_is_refused(state, options, tmp_path):
    source = released_files.write(tmp_path / "miracle.safetensors", state)
    schema = tmp_path / "mine.toml"

    def with_schema(*sizes):
        names = (tuple(f"{i} {n}" for n in range(size)) for i, size in enumerate(sizes))
        Schema(tuple(Attribute(f"side {i}", aspects) for i, aspects in enumerate(names))).save(schema)
        return refusal(source, dataclasses.replace(options, schema=str(schema)), tmp_path)

    unequal = "the released code has equally many aspects in every attribute; --schema has not"
    assert with_schema(2, 3, 2) == unequal
    assert "latent_cls.2.2.weight: not in the model (the checkpoint has (2, 128))" in with_schema(2, 2)
    assert "latent_cls.1.2.weight: the checkpoint has (2, 128), the model expects (3, 128)" in with_schema(3, 3, 3)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.safetensors", b"", "{} is not a whole safetensors file"),
        ("a.safetensors", b"hello, this is not a checkpoint", "{} is not a whole safetensors file"),
        pytest.param("a.bin", b"", "{} is not a plain PyTorch state dict", marks=pytest.mark.torch),
        pytest.param("notes.md", b"# notes", "{} is not a plain PyTorch state dict", marks=pytest.mark.torch),
        ("a.safetensors", None, "{} does not exist"),
        ("folder", "folder", "{} has no weights; expected one of model.safetensors"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_sentence(options, tmp_path, name, content, sentence):
    source = tmp_path / name
    if content == "folder":
        source.mkdir()
    elif content is not None:
        source.write_bytes(content)
    message = refusal(source, options, tmp_path)
    assert message.startswith(sentence.format(source)) and "\n" not in message


def test_a_truncated_checkpoint_is_named(state, options, tmp_path):
    source = released_files.write(tmp_path / "cut.safetensors", state)
    source.write_bytes(source.read_bytes()[:-7])
    assert refusal(source, options, tmp_path).startswith(f"{source} is not a whole safetensors file")


class Code:
    """Runs when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.mark.torch
def test_a_pickle_that_carries_code_is_refused_and_runs_nothing(state, options, tmp_path):
    import torch

    tensors = {name: torch.tensor(tensor) for name, tensor in state.items()}
    torch.save(tensors | {"extra": Code(tmp_path / "ran")}, tmp_path / "evil.bin")
    message = refusal(tmp_path / "evil.bin", options, tmp_path)
    assert message.startswith(f"{tmp_path / 'evil.bin'} is not a plain PyTorch state dict (")
    assert message.endswith("only tensors are read, never code") and "\n" not in message
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "nested.bin")
    message = refusal(tmp_path / "nested.bin", options, tmp_path)
    assert message == f"{tmp_path / 'nested.bin'} holds something other than named tensors; save model.state_dict()"


def test_without_torch_its_format_is_refused_with_the_remedy(options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    source = tmp_path / "miracle.bin"
    source.write_bytes(b"PK")
    message = refusal(source, options, tmp_path)
    assert message.startswith(f"{source} is in PyTorch's format and PyTorch is not installed; pip install ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give the state dict and the folder to write: python -m miracle_jax.convert FILE OUT"),
        (["a.safetensors"], "give the state dict and the folder to write: python -m miracle_jax.convert FILE OUT"),
        (["a.safetensors", "OUT", "more"], "give the state dict and the folder to write"),
        (["a.safetensors", "OUT"], "a.safetensors does not exist"),
        (["a.safetensors", "OUT", "--encoder", "x", "y"], "'y' belongs to no flag; words without a flag come first"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        convert.main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith(f"error: {sentence}") and captured.err.count("\n") == 1


def test_what_exists_is_not_replaced(state, options, converted, tmp_path):
    source = released_files.write(tmp_path / "miracle.safetensors", state)
    out = shutil.copytree(converted, tmp_path / "run")
    facts = json.loads((out / "model.json").read_text())
    assert refusal(source, options, tmp_path) == f"{out} exists; name a folder that does not, or delete it"
    assert json.loads((out / "model.json").read_text()) == facts
