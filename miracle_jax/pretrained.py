"""Pretrained checkpoints: what their configs mean, reading their weights, and starting a model from them."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from miracle_jax import config, gguf_file, reading, weights
from miracle_jax.bert import Bert
from miracle_jax.decoder import make as make_decoder
from miracle_jax.errors import UserError
from miracle_jax.hub import Tensor, absolute, locate, tensors_of
from miracle_jax.layers import Compute
from miracle_jax.tokenizers import load_tokenizer
from miracle_jax.weights import Entry, Table

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip
OURS = {
    "encoder": ("frozen", "dropout", "init_std"),
    "decoder": ("frozen", "lora_rank", "sees_context", "context_tokens", "dropout", "word_dropout", "init_std"),
}
"""Fields of a shape that weights do not decide."""
SPARE_ROWS = 512
"""Rows that an embedding may have beyond its tokenizer's tokens: some are padded to a round number."""


# ------------------------------------------------------------------------------------------------ what it means


def resolve(settings: config.Config, run: config.Config | None = None) -> config.Config:
    """The config with the shapes and the tokenizers of the checkpoints that it names. Without names: as it is.

    What OURS names stays as configured; everything that the weights decide is the checkpoint's.

    run: that of a run to resume; where it names the same checkpoint, its shape is taken and nothing is looked up.
    """
    data, parts = settings.data, {}
    for part in ("encoder", "decoder"):
        shape = getattr(settings, part)
        tokenizer = getattr(data, f"{part}_tokenizer") or shape.pretrained
        parts[part] = shape
        if not shape.pretrained:
            continue
        data = dataclasses.replace(data, **{f"{part}_tokenizer": tokenizer})
        before = run and getattr(run, part)
        if before and before.pretrained == absolute(shape.pretrained):
            ours = {name: getattr(shape, name) for name in OURS[part]}
            parts[part] = dataclasses.replace(before, **ours)
            continue
        name = f"{part}.pretrained {shape.pretrained}"
        values = _config_of(locate(shape.pretrained, f"{part}.pretrained"))
        shape = bert_shape(values, shape, name) if part == "encoder" else decoder_shape(values, shape, name)
        tokens, rows = load_tokenizer(part, tokenizer).size, shape.vocab_size
        added = 2 if part == "decoder" else 0  # <bos> and <eos>
        if not rows - SPARE_ROWS <= tokens <= rows + added:
            raise UserError(
                f"the tokenizer {tokenizer} has {tokens} tokens but {name} has {rows} embedding rows; name by "
                f"--data.{part}-tokenizer the one that it was trained with"
            )
        parts[part] = dataclasses.replace(shape, vocab_size=max(rows, tokens))
    return dataclasses.replace(settings, data=data, **parts)


def _config_of(path: Path) -> dict:
    """transformers' config of a checkpoint; of a .gguf file, the same made from its metadata."""
    if path.suffix == ".gguf":
        return gguf_file.config_of(path)
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json; it is not a transformers checkpoint")
    return reading.json_object(file, "cannot be read")


class _Reader:
    """Takes entries out of a transformers config and collects what we do not support, by name."""

    def __init__(self, values: dict, name: str):
        self.values, self.name, self.problems = values, name, []

    def __call__(self, key: str, default=None):
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            self.problems.append(f"{key} is missing")
            return 1
        return value

    def size(self, key: str, default=None, most: int = config.WIDEST) -> int:
        value = self(key, default)
        if type(value) is int and 0 < value <= most:
            return value
        self.problems.append(f"{key} is {value!r}; it must be a whole number from 1 to {most:,}")
        return 1

    def depth(self, key: str) -> int:
        return self.size(key, most=config.DEEPEST)

    def number(self, key: str, default: float) -> float:
        value = self(key, default)
        if type(value) in (int, float) and 0 < value <= sys.float_info.max:
            return float(value)
        self.problems.append(f"{key} is {value!r}; it must be a finite number above 0")
        return 1.0

    def flag(self, key: str, default: bool) -> bool:
        value = self(key, default)
        if type(value) is not bool:
            self.problems.append(f"{key} is {value!r}; it must be true or false")
        return bool(value)

    def must(self, key: str, wanted) -> None:
        """What is not said is as wanted."""
        value = self.values.get(key)
        if value not in (wanted, None):
            self.problems.append(f"{key} is {value!r}, supported is {wanted!r}")

    def activation(self, key: str, default: str) -> str:
        value = self(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.problems.append(f"{key} is {value!r}, supported are {', '.join(ACTIVATIONS)}")
            return "gelu"
        return ACTIVATIONS[value]

    def heads(self, width: int, heads: int, kv_heads: int = 1, pairs: bool = False) -> None:
        """That heads share the width evenly, and keys and values the heads; with `pairs` a head's size is even."""
        if width % heads or heads % kv_heads or (pairs and width // heads % 2):
            grouped = f" of {kv_heads} keys and values" if kv_heads > 1 else ""
            self.problems.append(f"{heads} heads{grouped} cannot share a width of {width}")

    def done(self) -> None:
        if self.problems:
            raise UserError(f"{self.name} is a model that is not supported: " + "; ".join(self.problems))


def bert_shape(values: dict, base: config.Bert, name: str) -> config.Bert:
    """The shape that a transformers BertConfig describes."""
    take = _Reader(values, name)
    take.must("model_type", "bert")
    take.must("position_embedding_type", "absolute")
    take.must("is_decoder", False)
    take.must("add_cross_attention", False)
    shape = dataclasses.replace(
        base, vocab_size=take.size("vocab_size"), width=take.size("hidden_size"),
        depth=take.depth("num_hidden_layers"), heads=take.size("num_attention_heads"),
        mlp=take.size("intermediate_size"), max_positions=take.size("max_position_embeddings"),
        segments=take.size("type_vocab_size", 2),
        activation=take.activation("hidden_act", "gelu"), norm_eps=take.number("layer_norm_eps", 1e-12),
    )  # fmt: skip
    take.heads(shape.width, shape.heads)
    take.done()
    return shape


def decoder_shape(values: dict, base: config.Decoder, name: str) -> config.Gpt2 | config.Llama:
    """The shape that a transformers GPT2Config or LlamaConfig describes; of `base` what weights do not decide."""
    shared = {f.name: getattr(base, f.name) for f in dataclasses.fields(config.Decoder)}
    take = _Reader(values, name)
    if values.get("model_type") == "gpt2":
        take.must("scale_attn_weights", True)
        take.must("scale_attn_by_inverse_layer_idx", False)
        take.must("add_cross_attention", False)
        take.must("tie_word_embeddings", True)
        width = take.size("n_embd")
        shape = config.Gpt2(**shared | dict(
            vocab_size=take.size("vocab_size"), width=width, depth=take.depth("n_layer"), heads=take.size("n_head"),
            mlp=take.size("n_inner", 4 * width), max_positions=take.size("n_positions", values.get("n_ctx")),
            norm_eps=take.number("layer_norm_epsilon", 1e-5),
        ), activation=take.activation("activation_function", "gelu_new"))  # fmt: skip
        take.heads(width, shape.heads)
    elif values.get("model_type") == "llama":
        width, heads = take.size("hidden_size"), take.size("num_attention_heads")
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        rope = rope if isinstance(rope, dict) else {"rope_type": rope}
        take.values = values | {"rope_theta": rope.get("rope_theta") or values.get("rope_theta")}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            take.problems.append(f"rope_scaling is {rope}, supported is none")
        take.must("attention_bias", False)
        take.must("mlp_bias", False)
        take.must("head_dim", width // heads)
        shape = config.Llama(**shared | dict(
            vocab_size=take.size("vocab_size"), width=width, depth=take.depth("num_hidden_layers"), heads=heads,
            mlp=take.size("intermediate_size"), max_positions=take.size("max_position_embeddings"),
            norm_eps=take.number("rms_norm_eps", 1e-6),
        ), activation=take.activation("hidden_act", "silu"), kv_heads=take.size("num_key_value_heads", heads),
            rope_theta=take.number("rope_theta", 10000.0),
            tied=take.flag("tie_word_embeddings", False))  # fmt: skip
        take.heads(width, heads, shape.kv_heads, pairs=True)
    else:
        raise UserError(
            f"{name} is a {values.get('model_type')!r} model; decoders of the GPT-2 and Llama families are supported"
        )
    take.done()
    return shape


# ------------------------------------------------------------------------------------------------ its weights


def start_from(settings: config.Config, params: dict) -> tuple[dict, list[str]]:
    """A model's parameters with the checkpoints' weights in place of the random ones.

    settings: as `resolve` gives it. params: nested dict of a new Miracle.

    Returns:
      The parameters, and the paths of those that still are random.

    Raises:
      UserError as `weights.load` does.
    """
    loaded = dict(params)
    fresh = set(flatten_dict(params, sep="."))
    if settings.encoder.pretrained:
        name = f"encoder.pretrained {settings.encoder.pretrained}"
        tensors = read_tensors(locate(settings.encoder.pretrained, "encoder.pretrained"), "bert")
        for part in ("prior", "posterior"):
            if part in params:
                bert, lacking = weights.load(weights.bert(settings.encoder), tensors, params[part]["bert"], name)
                loaded[part] = params[part] | {"bert": bert}
                fresh -= {f"{part}.bert.{path}" for path in flatten_dict(bert, sep=".")} - {
                    f"{part}.bert.{path}" for path in lacking
                }
    if settings.decoder.pretrained:
        name = f"decoder.pretrained {settings.decoder.pretrained}"
        path = locate(settings.decoder.pretrained, "decoder.pretrained")
        rows = decoder_shape(_config_of(path), settings.decoder, name).vocab_size
        table = weights.decoder(settings.decoder, settings.decoder.vocab_size - rows)
        ours = params["decoder"]
        named = {entry.path for entry in table.entries}
        flat = flatten_dict(ours, sep=".")
        tensors = read_tensors(path, settings.decoder.family)
        decoder, _ = weights.load(table, tensors, ours, name)
        loaded["decoder"] = decoder
        fresh -= {f"decoder.{path}" for path in flat if path in named}
        added = settings.decoder.vocab_size - rows
        fresh |= {f"decoder.tokens.embedding (its last {added} of {added + rows} rows)"} if added else set()
    return loaded, sorted(fresh)


def language_model(name: str, field: str) -> tuple[config.Decoder, dict]:
    """The shape and the parameters of a GPT-2 or Llama checkpoint as it is; what it lacks (the latent's projections,
    here of one dimension) is 0.

    field: what names it, for messages. Raises UserError as `weights.load` does.
    """
    path = locate(name, field)
    shape = decoder_shape(_config_of(path), config.Gpt2(dropout=0.0), f"{field} {name}")
    nothing = zeros(lambda: make_decoder(shape, 1, Compute(), nnx.Rngs(0)))
    params, _ = weights.load(weights.decoder(shape), read_tensors(path, shape.family), nothing, f"{field} {name}")
    return shape, params


def text_encoder(name: str, field: str) -> tuple[config.Bert, dict]:
    """The shape and the parameters of a BERT checkpoint; a pooler that it lacks is 0. Otherwise as `language_model`."""
    path = locate(name, field)
    shape = bert_shape(_config_of(path), config.Bert(), f"{field} {name}")
    nothing = zeros(lambda: Bert(shape, Compute(), nnx.Rngs(0)))
    params, _ = weights.load(weights.bert(shape), read_tensors(path, "bert"), nothing, f"{field} {name}")
    return shape, params


def zeros(make) -> dict:
    """Parameters of the module that `make` makes, all 0, to be read only."""
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))
    # Views of one number: a shape that a file announces takes no memory before its weights are there.
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)


def read_folder(folder: Path, settings: config.Config, expected: dict) -> dict:
    """The parameters of an export in safetensors: what stands in transformers' folders, and miracle.safetensors.

    expected: nested dict of shapes. Raises UserError as `weights.load` does.
    """
    found = {}
    bert, decoder = weights.bert(settings.encoder), weights.decoder(settings.decoder)
    for name, table, family in (
        ("prior", bert, "bert"), ("posterior", bert, "bert"), ("decoder", decoder, settings.decoder.family)
    ):  # fmt: skip
        if (folder / name).is_dir():
            prefix = f"miracle.{name}." + ("bert." if family == "bert" else "")
            found |= _flat_load(
                table.prefixed(prefix, ""), read_tensors(folder / name, family), expected, folder / name
            )
    flat = flatten_dict(expected, sep=".").keys() - found.keys()
    own = Table(tuple(Entry(path, (path,)) for path in flat), 0)
    file = folder / "miracle.safetensors"
    return unflatten_dict(found | _flat_load(own, tensors_of(file), expected, file), sep=".")


def _flat_load(table: Table, tensors: dict[str, Tensor], expected: dict, name: Path) -> dict[str, np.ndarray]:
    """What a table names of `expected` (nested dict of shapes), by path."""
    flat = flatten_dict(expected, sep=".")
    wanted = {entry.path: np.broadcast_to(np.float32(0), flat[entry.path].shape) for entry in table.entries}
    loaded, lacking = weights.load(table, tensors, unflatten_dict(wanted, sep="."), str(name))
    if lacking:
        raise UserError(f"{name} lacks {', '.join(lacking)}; copy or export it again")
    return flatten_dict(loaded, sep=".")


PREFIXES = {"bert": "bert.", "gpt2": "transformer.", "llama": "model."}


def read_tensors(path: Path, family: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of transformers' bare model.

    family: "bert", "gpt2" or "llama".
    """
    if path.suffix == ".gguf":
        tensors = gguf_file.read_tensors(path)
    else:
        tensors = tensors_of(path)
    renamed, first = {}, {}
    for original, tensor in tensors.items():
        name = original.removeprefix("_orig_mod.").removeprefix(PREFIXES[family])
        if family == "bert":  # as converted from TensorFlow
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
            name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if name in renamed:
            raise UserError(f"{path} has both {first[name]} and {original}, which mean the same; remove one")
        renamed[name], first[name] = tensor, original
    return renamed
