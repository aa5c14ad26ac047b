"""Outside checkpoints as files and as names: every table reads and writes what torch has, and anything that does not
match is refused in one message."""

import json
import pickle
import sys
from pathlib import Path

import checkpoints
import jax
import ml_dtypes
import numpy as np
import parity
import pytest
import safetensors.numpy

from miracle_jax import config, pretrained, weights
from miracle_jax.errors import UserError
from miracle_jax.hub import Tensor, tensors_of

FAMILIES = ["bert_gelu", "gpt2_gelu_tanh", "llama_grouped", "llama_untied"]


def table(case: dict, fresh_rows: int = 0) -> weights.Table:
    shape = parity.shape(case)
    if checkpoints.family(case) == "bert":
        return weights.bert(config.Bert(**shape))
    return weights.decoder((config.Llama if parity.is_llama(case) else config.Gpt2)(**shape), fresh_rows)


def tree(case: dict) -> dict:
    """Our parameters as parity.py has them from torch's, the latent's part included."""
    if checkpoints.family(case) == "bert":
        return parity.bert(parity.group(case, "weights"))
    return parity.decoder_params(case, "weights")


def held(arrays: dict) -> dict[str, Tensor]:
    return {name: Tensor(array.shape, lambda array=array: array) for name, array in arrays.items()}


def refused(case: dict, arrays: dict) -> list[str]:
    """The lines of the message about these tensors."""
    with pytest.raises(UserError) as raised:
        weights.load(table(case), held(arrays), tree(case), "the file")
    first, *lines = str(raised.value).split("\n")
    assert first == "the file does not match the model:"
    return [line.removeprefix("  ") for line in lines]


# ------------------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("name", FAMILIES)
def test_every_table_reads_what_torch_has(name):
    """Transposed where it has to be, stacked, and put together: the arrays are those of parity.py."""
    case = parity.load(name)
    want = tree(case)
    latent = {part: 0 * leaf for part, leaf in want.items() if part == "head_bias"}
    latent |= {part: jax.tree.map(np.zeros_like, want[part]) for part in ("latent_embed", "latent_proj") & want.keys()}
    zeros = jax.tree.map(np.zeros_like, want)
    got, lacking = weights.load(table(case), held(checkpoints.tensors(case)), zeros, name)
    parity.assert_trees_close(got, want | latent, 0)
    assert lacking == []
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_table_writes_what_it_reads(name):
    case = parity.load(name)
    got, want = weights.dump(table(case), tree(case)), checkpoints.tensors(case)
    assert got.keys() == want.keys()
    for tensor, array in want.items():
        np.testing.assert_array_equal(got[tensor], array, err_msg=tensor)
        assert got[tensor].flags.c_contiguous  # or safetensors would write it wrongly


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_rows_of_added_tokens_stay_as_they_were(name):
    """Two tokens more than the checkpoint has rows, in the embedding and in a head of its own."""
    case = parity.load(name)
    ours, arrays = tree(case), checkpoints.tensors(case)
    embedding = next(tensor for tensor in ("wte.weight", "embed_tokens.weight") if tensor in arrays)
    cut = arrays | {tensor: arrays[tensor][:28] + 1 for tensor in (embedding, "lm_head.weight") if tensor in arrays}
    got, _ = weights.load(table(case, fresh_rows=2), held(cut), ours, name)
    tables = [(got["tokens"]["embedding"], ours["tokens"]["embedding"])]
    if "head" in ours:
        tables.append((got["head"]["kernel"].T, ours["head"]["kernel"].T))
    for after, before in tables:
        np.testing.assert_array_equal(after, np.concatenate([before[:28] + 1, before[28:]]))
    with pytest.raises(UserError, match=r"(wte|embed_tokens).weight: the checkpoint has \(30, "):
        weights.load(table(case, fresh_rows=2), held(arrays), ours, name)


def test_a_bert_may_lack_its_pooler_but_not_half_of_it():
    case = parity.load("bert_gelu")
    arrays, ours = checkpoints.tensors(case), tree(case)
    kernel, bias = arrays.pop("pooler.dense.weight"), arrays.pop("pooler.dense.bias")
    got, lacking = weights.load(table(case), held(arrays), ours, "the file")
    assert lacking == ["pooler.kernel", "pooler.bias"]
    parity.assert_trees_close(got, ours, 0)
    missing = "missing (the model expects"
    assert refused(case, arrays | {"pooler.dense.weight": kernel}) == [f"pooler.dense.bias: {missing} (16,))"]
    assert refused(case, arrays | {"pooler.dense.bias": bias}) == [f"pooler.dense.weight: {missing} (16, 16))"]


# ------------------------------------------------------------------------------------------------ what does not match


@pytest.mark.parametrize(
    ("name", "lost", "turned", "extra"),
    [
        ("bert_gelu", "encoder.layer.1.output.LayerNorm.bias", "encoder.layer.0.output.dense.weight",
         "encoder.layer.2.output.dense.bias"),
        ("gpt2_gelu_tanh", "h.1.ln_2.bias", "h.0.attn.c_attn.weight", "h.2.ln_1.weight"),
        ("llama_grouped", "layers.1.input_layernorm.weight", "layers.0.self_attn.k_proj.weight",
         "layers.0.self_attn.q_proj.bias"),
    ],
)  # fmt: skip
def test_one_message_lists_every_tensor_that_is_missing_too_many_or_of_another_shape(name, lost, turned, extra):
    case = parity.load(name)
    arrays = checkpoints.tensors(case)
    a, b = arrays[turned].shape
    broken = arrays | {turned: arrays[turned].T, extra: np.zeros(7)}
    width = broken.pop(lost).shape
    assert refused(case, broken) == sorted([
        f"{lost}: missing (the model expects {width})",
        f"{turned}: the checkpoint has {(b, a)}, the model expects {(a, b)}",
        f"{extra}: not in the model (the checkpoint has (7,))",
    ])  # fmt: skip


def test_a_long_list_is_cut_and_counted():
    case = parity.load("bert_gelu")
    lines = refused(case, {})
    assert len(lines) == weights.SHOWN + 1 and lines[-1] == "... and 7 more"  # 39 tensors, the pooler's two not needed
    assert lines[0] == "embeddings.LayerNorm.bias: missing (the model expects (16,))"


def test_a_checkpoint_of_more_layers_or_fewer_is_refused():
    """Stacked arrays must not hide it."""
    case = parity.load("llama_grouped")
    arrays = checkpoints.tensors(case)
    fewer = {name: array for name, array in arrays.items() if ".1." not in name}
    more = arrays | {name.replace(".1.", ".2."): array for name, array in arrays.items() if ".1." in name}
    assert len(refused(case, fewer)) == 9 and all("layers.1." in line for line in refused(case, fewer))
    assert len(refused(case, more)) == 9 and all("layers.2." in line for line in refused(case, more))


@pytest.mark.parametrize("name", ["gpt2_gelu_tanh", "llama_grouped"])
def test_a_head_must_be_the_copy_that_the_model_takes_it_for(name):
    case = parity.load(name)
    arrays = checkpoints.tensors(case)
    of = "wte.weight" if "wte.weight" in arrays else "embed_tokens.weight"
    weights.load(table(case), held(arrays | {"lm_head.weight": arrays[of].copy()}), tree(case), name)
    for head in (arrays[of] * np.float32(1.001), arrays[of][:-1]):
        lines = refused(case, arrays | {"lm_head.weight": head})
        assert lines == [f"lm_head.weight: differs from {of}, of which the model takes it to be a copy"]


def test_buffers_and_other_heads_are_left_out_by_name_only():
    case = parity.load("gpt2_gelu_tanh")
    mask = {"h.0.attn.bias": np.ones((1, 1, 20, 20)), "h.1.attn.masked_bias": np.array(-1e4)}
    got, _ = weights.load(table(case), held(checkpoints.tensors(case) | mask), tree(case), "the file")
    parity.assert_trees_close(got, tree(case), 0)
    assert len(refused(case, checkpoints.tensors(case) | {"h.0.attn.biases": np.ones(1)})) == 1
    case = parity.load("bert_gelu")
    others = {name: np.zeros(3) for name in ("embeddings.position_ids", "cls.predictions.bias", "classifier.weight")}
    weights.load(table(case), held(checkpoints.tensors(case) | others), tree(case), "the file")
    assert len(refused(case, checkpoints.tensors(case) | {"embeddings.norm.weight": np.ones(1)})) == 1


# ------------------------------------------------------------------------------------------------ names


def read_back(folder: Path, arrays: dict, family: str) -> dict[str, np.ndarray]:
    """What is read of a checkpoint of these tensors."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    return {name: tensor.read() for name, tensor in pretrained.read_tensors(folder, family).items()}


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
@pytest.mark.parametrize(
    ("name", "family", "prefix"),
    [("bert_gelu", "bert", "bert."), ("gpt2_gelu_tanh", "gpt2", "transformer."), ("llama_untied", "llama", "model.")],
)
def test_prefixes_of_a_model_with_a_head_and_of_a_compiled_one_are_taken_off(tmp_path, name, family, prefix, compiled):
    arrays = checkpoints.tensors(parity.load(name))
    heads = {"lm_head.weight"}
    stored = {compiled + ("" if key in heads else prefix) + key: array for key, array in arrays.items()}
    got = read_back(tmp_path, stored, family)
    assert got.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(got[key], array, err_msg=key)


def test_names_as_converted_from_tensorflow(tmp_path):
    arrays = checkpoints.tensors(parity.load("bert_gelu"))

    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    got = read_back(tmp_path, {"bert." + old(name): array for name, array in arrays.items()}, "bert")
    assert got.keys() == arrays.keys()
    np.testing.assert_array_equal(got["embeddings.LayerNorm.bias"], arrays["embeddings.LayerNorm.bias"])


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [("gpt2", "transformer.wte.weight", "wte.weight"), ("bert", "norm.LayerNorm.beta", "norm.LayerNorm.bias")],
)
def test_two_tensors_of_one_meaning_are_refused(tmp_path, family, first, second):
    """Otherwise one of the two would be loaded, and which one were chance."""
    with pytest.raises(UserError, match=f"{tmp_path} has both {first} and {second}"):
        read_back(tmp_path, {first: np.zeros(2), second: np.ones(2)}, family)


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_precisions_become_float32(tmp_path, kind):
    case = parity.load("gpt2_gelu_tanh")
    stored = {name: array.astype(kind) for name, array in checkpoints.tensors(case).items()}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    got, _ = weights.load(table(case), tensors_of(tmp_path), tree(case), "the file")
    want = stored["h.1.attn.c_attn.weight"].astype(np.float32)
    np.testing.assert_array_equal(got["layers"]["blocks"]["qkv"]["kernel"][1], want)
    assert got["norm"]["scale"].dtype == np.float32


# ------------------------------------------------------------------------------------------------ files


def test_shards_are_read_as_one(tmp_path):
    arrays = checkpoints.tensors(parity.load("gpt2_gelu_tanh"))
    names = sorted(arrays)
    checkpoints.write_shards(tmp_path, [{name: arrays[name] for name in names[i::3]} for i in range(3)])
    got = tensors_of(tmp_path)
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].shape == array.shape
        np.testing.assert_array_equal(got[name].read(), array)


def test_safetensors_go_before_pickles(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert tensors_of(tmp_path).keys() == {"a"}


def test_a_folder_without_weights_says_what_it_should_hold(tmp_path):
    with pytest.raises(UserError, match="has no weights; expected one of model.safetensors, model.safetensors.index"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 60, 0.5, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path, left):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones(200), "b": np.ones(3)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if left == 0.5 else left])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file .*download it again"):
        tensors_of(tmp_path)


def test_a_pointer_in_place_of_the_weights_is_refused(tmp_path):
    """What a clone without git-lfs leaves."""
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        tensors_of(tmp_path)


def test_an_index_of_what_is_not_there_is_refused(tmp_path):
    mapped = checkpoints.write_shards(tmp_path, [{"a": np.ones(2)}, {"b": np.ones(2)}])
    checkpoints.write_index(tmp_path, mapped | {"c": mapped["a"], "d": mapped["b"]})
    with pytest.raises(UserError, match="index.json lists tensors that its files do not hold: c, d$"):
        tensors_of(tmp_path)
    checkpoints.write_index(tmp_path, mapped)
    (tmp_path / mapped["b"]).unlink()
    with pytest.raises(UserError, match=f"{mapped['b']} does not exist"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', ""])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="model.safetensors.index.json is not an index of weights"):
        tensors_of(tmp_path)


# ------------------------------------------------------------------------------------------------ PyTorch's files


def test_a_pickle_where_pytorch_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="pytorch_model.bin is in PyTorch's format and PyTorch is not installed; pip"):
        tensors_of(tmp_path)


@pytest.mark.torch
def test_a_state_dict_of_torch(tmp_path):
    import torch

    state = torch.nn.Linear(3, 2).state_dict() | {
        "grown": torch.nn.Parameter(torch.ones(2, 2)), "half": torch.ones(3, dtype=torch.bfloat16),
        "turned": torch.arange(6.0).reshape(2, 3).T, "ids": torch.arange(4),
    }  # fmt: skip
    torch.save(state, tmp_path / "pytorch_model.bin")
    got = tensors_of(tmp_path)
    assert got.keys() == state.keys()
    for name, value in state.items():
        assert got[name].shape == tuple(value.shape)
        np.testing.assert_array_equal(got[name].read(), value.detach().to(torch.float32).numpy())


@pytest.mark.torch
def test_shards_of_torch(tmp_path):
    arrays = checkpoints.tensors(parity.load("bert_gelu"))
    names = sorted(arrays)
    parts = [{name: arrays[name] for name in names[i::2]} for i in range(2)]
    mapped = checkpoints.write_shards(tmp_path, parts, "pytorch_model.bin")
    got = tensors_of(tmp_path)
    assert got.keys() == arrays.keys()
    np.testing.assert_array_equal(got["pooler.dense.weight"].read(), arrays["pooler.dense.weight"])
    (tmp_path / mapped["pooler.dense.weight"]).unlink()
    with pytest.raises(UserError, match=r"pytorch_model-0000\d-of-00002.bin does not exist"):
        tensors_of(tmp_path)


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


@pytest.mark.torch
@pytest.mark.parametrize("plain", [False, True])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path, plain):
    import torch

    trap = {"a": torch.ones(2), "b": Code(tmp_path / "trap")}
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(trap, protocol=2)) if plain else torch.save(trap, path)
    with pytest.raises(UserError, match="is not a plain PyTorch state dict .*; only tensors are read, never code"):
        tensors_of(tmp_path)
    assert not (tmp_path / "trap").exists()
    pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)  # it does run where one lets it
    assert (tmp_path / "trap").read_text() == "it ran"


@pytest.mark.torch
@pytest.mark.parametrize("content", [[1], {"model": {}}, {"epoch": 3}, {0: "tensor"}, "tensor"])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    import torch

    named = isinstance(content, dict)
    content = {k: torch.ones(2) if v == "tensor" else v for k, v in content.items()} if named else content
    torch.save(torch.ones(2) if content == "tensor" else content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds something other than named tensors; save model.state_dict()"):
        tensors_of(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_a_truncated_pickle_is_refused(tmp_path, left):
    import torch

    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(200)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if left == 0.5 else left])
    with pytest.raises(UserError, match="pytorch_model.bin is not a plain PyTorch state dict"):
        tensors_of(tmp_path)


# ------------------------------------------------------------------------------------------------ what configs mean


def bert_shape(**changes) -> config.Bert:
    values = checkpoints.description(parity.load("bert_gelu")) | changes
    return pretrained.bert_shape(values, config.Bert(), "the encoder")


def decoder_shape(name: str, **changes) -> config.Gpt2 | config.Llama:
    values = checkpoints.description(parity.load(name)) | changes
    return pretrained.decoder_shape({k: v for k, v in values.items() if v != "gone"}, config.Gpt2(), "the decoder")


def test_shapes_that_configs_describe():
    assert bert_shape(layer_norm_eps=1e-5, type_vocab_size=3, hidden_act="gelu_new") == config.Bert(
        vocab_size=30, width=16, depth=2, heads=4, mlp=32, max_positions=20, segments=3, norm_eps=1e-5,
        activation="gelu_tanh",
    )  # fmt: skip
    gpt2 = config.Gpt2(vocab_size=30, width=16, depth=2, heads=4, mlp=64, max_positions=20, norm_eps=1e-5)
    # DialoGPT's config has no n_inner and its length twice; older ones have it as n_ctx alone.
    assert decoder_shape("gpt2_gelu_tanh", n_inner=None, n_ctx=7) == gpt2
    assert decoder_shape("gpt2_gelu_tanh", n_inner="gone", n_positions="gone", n_ctx=20) == gpt2
    llama = config.Llama(
        vocab_size=30, width=24, depth=2, heads=6, kv_heads=2, mlp=48, max_positions=20, norm_eps=1e-3, rope_theta=100,
        tied=True,
    )  # fmt: skip
    assert decoder_shape("llama_grouped", head_dim=4, rope_scaling=None) == llama
    newer = {"rope_theta": "gone", "rope_parameters": {"rope_type": "default", "rope_theta": 100}}
    assert decoder_shape("llama_grouped", **newer) == llama
    full = decoder_shape("llama_grouped", num_key_value_heads="gone", tie_word_embeddings="gone", rope_theta="gone")
    assert (full.kv_heads, full.tied, full.rope_theta) == (6, False, 10000)  # as transformers takes their absence


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"model_type": "roberta"}, "model_type is 'roberta'"),
        ("bert", {"hidden_act": "mish"}, "hidden_act is 'mish', supported are gelu, "),
        ("bert", {"hidden_size": None, "vocab_size": None}, "vocab_size is missing; hidden_size is missing"),
        ("gpt2_gelu_tanh", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2_gelu_tanh", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2_gelu_tanh", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2_gelu_tanh", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gpt2_gelu_tanh", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ("llama_grouped", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {'type': 'linear'"),
        ("llama_grouped", {"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling is {'rope_type': 'llama3'}"),
        ("llama_grouped", {"attention_bias": True}, "attention_bias is True"),
        ("llama_grouped", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama_grouped", {"head_dim": 8}, "head_dim is 8, supported is 4"),
        ("llama_grouped", {"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number from 1 to"),
        ("llama_grouped", {"hidden_size": "24"}, "hidden_size is '24'; it must be a whole number from 1 to"),
        ("gpt2_gelu_tanh", {"n_embd": [16]}, r"n_embd is \[16\]; it must be a whole number from 1 to"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, changes, named):
    with pytest.raises(UserError, match=f"the (en|de)coder is a model that is not supported: .*{named}"):
        bert_shape(**changes) if name == "bert" else decoder_shape(name, **changes)


def test_one_message_names_all_that_is_not_supported():
    changes = {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "yarn"}, "hidden_act": "mish"}
    with pytest.raises(UserError) as raised:
        decoder_shape("llama_grouped", **changes, vocab_size=None)
    assert all(name in str(raised.value) for name in [*changes, "vocab_size is missing"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["opt", None])
def test_another_family_of_decoders_is_refused(kind):
    with pytest.raises(UserError, match=f"the decoder is a {kind!r} model; decoders of the GPT-2 and Llama families"):
        decoder_shape("gpt2_gelu_tanh", model_type=kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json; it is not a transformers checkpoint"),
        ("{", "config.json cannot be read at column 2: "),
        ("[1]", "config.json cannot be read: it is a list; expected an object"),
        ("\x00", "config.json cannot be read at column 1: "),
    ],
)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_config_that_is_missing_or_broken(tmp_path, part, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        pretrained.resolve(checkpoints.naming(**{part: tmp_path}))


def test_a_file_in_place_of_a_folder(tmp_path):
    path = checkpoints.write(tmp_path / "model", parity.load("bert_gelu")) / "model.safetensors"
    with pytest.raises(UserError, match="model.safetensors has no config.json; it is not a transformers checkpoint"):
        pretrained.resolve(checkpoints.naming(encoder=path))


def test_unused_entries_of_a_config_do_not_matter():
    values = json.loads('{"architectures": ["BertModel"], "torch_dtype": "float32", "id2label": {"0": "A"}}')
    assert bert_shape(**values) == bert_shape()
