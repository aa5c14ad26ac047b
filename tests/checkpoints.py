"""Checkpoints as other programs write them, made of the golden cases: config.json, weights and a tokenizer.

Nothing here needs torch, nor uses what reads these files.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parity
import safetensors.numpy
import tokenizers
from flax import nnx
from small import CONFIG, SIZES, miracle
from tokenizers import models, pre_tokenizers

from miracle_jax import config, pretrained
from miracle_jax.cvae import Miracle

ROWS, POSITIONS = 30, 20  # of every golden case
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}  # ours to transformers'
BERT_ROLES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
BOTH_ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
ONE_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}  # GPT-2's


def tensors(case: dict) -> dict[str, np.ndarray]:
    """A case's weights by the names of a bare BertModel, GPT2Model or LlamaModel, an untied head beside it."""
    ours = ("latent_embed.weight", "latent_proj.weight", "head_bias")
    renamed = {"head.weight": "lm_head.weight"}
    weights = parity.group(case, "weights")
    return {renamed.get(n, n.removeprefix("transformer.")): w for n, w in weights.items() if n not in ours}


def family(case: dict) -> str:
    return "llama" if parity.is_llama(case) else "gpt2" if "shape/latent" in case else "bert"


def description(case: dict) -> dict:
    """What config.json says of a case."""
    shape = parity.shape(case)
    shape["activation"] = ACTIVATIONS[shape["activation"]]
    names = {
        "bert": {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
                 "mlp": "intermediate_size", "activation": "hidden_act"},
        "gpt2": {"width": "n_embd", "depth": "n_layer", "heads": "n_head", "mlp": "n_inner",
                 "activation": "activation_function"},
        "llama": {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
                  "kv_heads": "num_key_value_heads", "mlp": "intermediate_size", "activation": "hidden_act",
                  "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings"},
    }[family(case)]  # fmt: skip
    positions = "n_positions" if family(case) == "gpt2" else "max_position_embeddings"
    fixed = {"model_type": family(case), "vocab_size": ROWS, positions: POSITIONS}
    return fixed | {names[name]: value for name, value in shape.items()}


def write_tokenizer(folder: Path, roles: dict[str, str], size: int = ROWS) -> Path:
    """A tokenizer of one token a word, as transformers keeps it."""
    named = dict.fromkeys([*roles.values(), "[UNK]"])
    words = [*named, *(f"w{i}" for i in range(size - len(named)))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | roles
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write(
    folder: Path, case: dict, weights: dict | None = None, roles: dict | None = None, size: int = ROWS, **changes
) -> Path:
    """The whole checkpoint in one safetensors file.

    weights: in place of the case's. roles, size: of the tokenizer. changes: to config.json.
    """
    roles = roles or (BERT_ROLES if family(case) == "bert" else BOTH_ENDS)
    write_tokenizer(folder, roles, size)
    (folder / "config.json").write_text(json.dumps(description(case) | changes))
    safetensors.numpy.save_file(tensors(case) if weights is None else weights, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, parts: list[dict], file: str = "model.safetensors") -> dict:
    """Weights in several files with their index, as transformers writes large ones. Returns what the index maps."""
    stem, suffix = file.split(".")
    names = [f"{stem}-{i + 1:05}-of-{len(parts):05}.{suffix}" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        if suffix == "safetensors":
            safetensors.numpy.save_file(part, folder / name)
        else:
            import torch

            torch.save({key: torch.tensor(value) for key, value in part.items()}, folder / name)
    mapped = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    write_index(folder, mapped, file)
    return mapped


def write_index(folder: Path, mapped: Any, file: str = "model.safetensors") -> None:
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))


class Started(NamedTuple):
    """A model that started from checkpoints."""

    settings: config.Config
    graphdef: nnx.GraphDef
    before: dict
    params: dict
    fresh: list[str]


def naming(encoder: Any = "", decoder: Any = "", data: config.Data | None = None, **decoder_fields) -> config.Config:
    """The config of tests/small.py with these checkpoints."""
    return dataclasses.replace(
        CONFIG,
        data=data or config.Data(),
        encoder=dataclasses.replace(CONFIG.encoder, pretrained=str(encoder)),
        decoder=dataclasses.replace(CONFIG.decoder, pretrained=str(decoder), **decoder_fields),
        latent=config.Latent(size=5, hidden=8),
    )


def start(settings: config.Config, zeros: bool = False) -> Started:
    """A random model (with `zeros` one of zeros) with the checkpoints' weights in it, as training starts."""
    resolved = pretrained.resolve(settings)
    if zeros:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Miracle(resolved, SIZES, nnx.Rngs(0))))
        before = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nnx.to_pure_dict(state))
    else:
        graphdef, state = nnx.split(miracle(resolved))
        before = nnx.to_pure_dict(state)
    return Started(resolved, graphdef, before, *pretrained.start_from(resolved, before))


def encoded(started: Started, tokens: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The prior's last hidden states, and the mean over a text's tokens after the pooler."""
    return _encoded(started.graphdef, started.params, tokens, length)


@partial(jax.jit, static_argnums=0)
def _encoded(graphdef, params, tokens, length):
    bert = nnx.merge(graphdef, params).prior.bert
    return bert.hidden(tokens, length), bert(tokens, length)


def logits(started: Started, tokens: np.ndarray) -> np.ndarray:
    """The decoder's scores as of a model without a latent and without a bias on its head."""
    found = _logits(started.graphdef, started.params, tokens, started.settings.latent.size)
    return np.asarray(found - started.params["decoder"].get("head_bias", 0))


@partial(jax.jit, static_argnums=(0, 3))
def _logits(graphdef, params, tokens, latent):
    decoder = nnx.merge(graphdef, params).decoder
    z = jnp.zeros((len(tokens), latent))
    hidden, _ = decoder.hidden(tokens, z, decoder.latent_key_values(z), jnp.zeros((), bool), 0)
    return decoder.logits(hidden)
