"""GGUF files (llama.cpp's format): config, weights and tokenizer of a Llama, as transformers would have them."""

import functools
import re
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from miracle_jax.errors import UserError, first_line
from miracle_jax.hub import Tensor

NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL, USER_DEFINED = 3, 4  # token types

# How text is split before BPE, by the name in `tokenizer.ggml.pre`.
_DIGIT = (pre_tokenizers.Digits, {"individual_digits": True})
_BYTES = (pre_tokenizers.ByteLevel, {"add_prefix_space": False})
PRE_TOKENIZERS = {"gpt-2": (_BYTES,), "default": (_BYTES,), "smollm": (_DIGIT, _BYTES)}


MOST_VALUES = 2**23
"""Values in a file's metadata, which become an array each; a vocabulary of 256,000 tokens has two million."""


def _reader(gguf, path: Path):
    class Reader(gguf.GGUFReader):
        """Reads nothing beyond the file's end, where the library goes on for as many empty values as are announced."""

        values = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            self.values += 1
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data) or self.values > MOST_VALUES:
                raise ValueError("it announces more than it holds")
            return super()._get(offset, dtype, count, override_order)

    return Reader(path)


@functools.lru_cache(maxsize=1)  # config, weights and tokenizer of a file are asked for in turn; opening takes seconds
def _open(path: Path):
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path} needs the package gguf; pip install gguf") from None
    try:
        reader = _reader(gguf, path)
        reader.path = path
    except (ValueError, LookupError, OverflowError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}); copy or download it again") from None
    architecture = _value(reader, "general.architecture", str)
    if architecture != "llama":
        raise UserError(f"{path} holds a {architecture!r} model; of GGUF files only the llama architecture is read")
    return reader


def _value(reader, key: str, kind: type, default=None):
    """An entry of the metadata; where it is a list, kind is that of its members. Raises UserError for another kind."""
    try:
        field = reader.get_field(key)
        value = default if field is None else field.contents()
        if value is default or all(isinstance(one, kind) for one in (value if isinstance(value, list) else [value])):
            return value
    except (UnicodeDecodeError, LookupError):
        pass
    raise UserError(f"{reader.path} has a strange {key!r} in its metadata; copy or download it again")


def config_of(path: Path) -> dict:
    """The entries of a transformers LlamaConfig."""
    reader = _open(path)
    names = {
        "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base",
        "head_dim": "attention.key_length",
    }  # fmt: skip
    values = {ours: _value(reader, f"llama.{theirs}", int | float) for ours, theirs in names.items()}
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise UserError(f"{path} has no token_embd.weight; it is not a whole model")
    scaling = _value(reader, "llama.rope.scaling.type", str)
    return {key: value for key, value in values.items() if value is not None} | {
        "model_type": "llama", "vocab_size": int(shapes["token_embd.weight"][1]),
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_scaling": {"rope_type": scaling} if scaling not in (None, "none") else None,
    }  # fmt: skip


def array_shape(tensor) -> tuple[int, ...]:
    return tuple(int(n) for n in tensor.shape[::-1])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Float32 tensors by transformers' names (of LlamaModel); a name that is not known stays as it is."""
    from gguf.quants import dequantize

    reader = _open(path)
    heads = {"attn_q": _value(reader, "llama.attention.head_count", int)}
    heads["attn_k"] = _value(reader, "llama.attention.head_count_kv", int, heads["attn_q"])
    tensors = {}
    for tensor in reader.tensors:
        kind = tensor.name.removesuffix(".weight").split(".")[-1]

        count = heads.get(kind)

        def read(tensor=tensor, count=count):
            try:
                array = dequantize(tensor.data, tensor.tensor_type)
                if count is None:
                    return array
                # The converter interleaves the two halves of each head of q and k, for another way to rotate.
                halves = array.reshape(count, -1, 2, array.shape[-1])
                return halves.swapaxes(1, 2).reshape(array.shape)
            except (NotImplementedError, ValueError):  # a way to quantise that gguf does not know; a strange shape
                kind, shape = tensor.tensor_type.name, array_shape(tensor)
                raise UserError(f"{path}: {tensor.name}, {kind} of the shape {shape}, cannot be read") from None

        name = tensor.name
        if kind in NAMES:
            name = re.sub(r"^blk\.", "layers.", name.replace(kind, NAMES[kind]))
        tensors[name] = Tensor(array_shape(tensor), read)
    return tensors


def tokenizer_of(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The byte-level BPE tokenizer in a file's metadata, and its special tokens by role (bos_token, eos_token)."""
    reader = _open(path)
    model, pre = (_value(reader, f"tokenizer.ggml.{key}", str, "") for key in ("model", "pre"))
    if model != "gpt2" or (pre or "default") not in PRE_TOKENIZERS:
        raise UserError(
            f"{path} has a tokenizer of kind {model!r} / {pre!r}, which is not supported; name a folder with the same "
            "tokenizer by --data.decoder-tokenizer"
        )
    tokens, kinds, merges = lists = [
        _value(reader, f"tokenizer.ggml.{key}", kind)
        for key, kind in (("tokens", str), ("token_type", int), ("merges", str))
    ]
    if None in lists:
        raise UserError(
            f"{path} lacks tokens, token_type or merges of its tokenizer; name a folder with the same tokenizer by "
            "--data.decoder-tokenizer"
        )
    roles = {role: _value(reader, f"tokenizer.ggml.{role}_id", int) for role in ("bos_token", "eos_token")}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
        roles = {role: tokens[i] for role, i in roles.items() if i is not None}
        backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path} has a damaged tokenizer ({first_line(error)}); download it again") from None
    backend.pre_tokenizer = pre_tokenizers.Sequence([make(**how) for make, how in PRE_TOKENIZERS[pre or "default"]])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return backend, roles
