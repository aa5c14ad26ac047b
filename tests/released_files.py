"""A small checkpoint of the paper's PyTorch code as files: its state dict, and the folders of its BERT and its GPT-2.

Nothing here needs torch; tests/released.py computes with these tensors.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

BERT = {
    "model_type": "bert", "vocab_size": 141, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 66, "type_vocab_size": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 257, "n_embd": 12, "n_layer": 3, "n_head": 3, "n_positions": 20,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
ROWS = GPT2["vocab_size"] + 1  # with <bos>
BOS, EOS = 257, 256
LATENT, HIDDEN, ATTRIBUTES, ASPECTS = 6, 128, 3, 2


def shapes(posterior: bool = True) -> dict[str, tuple[int, ...]]:
    """The state dict's names and shapes."""
    found = {}

    def linear(name, n_out, n_in):
        found[f"{name}.weight"], found[f"{name}.bias"] = (n_out, n_in), (n_out,)

    def norm(name, width):
        found[f"{name}.weight"], found[f"{name}.bias"] = (width,), (width,)

    D, M = BERT["hidden_size"], BERT["intermediate_size"]
    for encoder in ("prior_encoder", "posterior_encoder")[: 1 + posterior]:
        for table, rows in (
            ("word", BERT["vocab_size"]), ("position", BERT["max_position_embeddings"]),
            ("token_type", BERT["type_vocab_size"]),
        ):  # fmt: skip
            found[f"{encoder}.embeddings.{table}_embeddings.weight"] = (rows, D)
        norm(f"{encoder}.embeddings.LayerNorm", D)
        for i in range(BERT["num_hidden_layers"]):
            layer = f"{encoder}.encoder.layer.{i}"
            for part in ("query", "key", "value"):
                linear(f"{layer}.attention.self.{part}", D, D)
            linear(f"{layer}.attention.output.dense", D, D)
            norm(f"{layer}.attention.output.LayerNorm", D)
            linear(f"{layer}.intermediate.dense", M, D)
            linear(f"{layer}.output.dense", D, M)
            norm(f"{layer}.output.LayerNorm", D)
        linear(f"{encoder}.pooler.dense", D, D)
        found[f"{encoder}.linear.weight"] = (2 * LATENT, D)

    D, gpt2 = GPT2["n_embd"], "decoder.transformer"
    found[f"{gpt2}.wte.weight"], found[f"{gpt2}.wpe.weight"] = (ROWS, D), (GPT2["n_positions"], D)
    for i in range(GPT2["n_layer"]):
        layer = f"{gpt2}.h.{i}"
        norm(f"{layer}.ln_1", D)
        norm(f"{layer}.ln_2", D)
        for part, n_in, n_out in (
            ("attn.c_attn", D, 3 * D), ("attn.c_proj", D, D), ("mlp.c_fc", D, 4 * D), ("mlp.c_proj", 4 * D, D)
        ):  # fmt: skip
            found[f"{layer}.{part}.weight"], found[f"{layer}.{part}.bias"] = (n_in, n_out), (n_out,)  # Conv1D
    norm(f"{gpt2}.ln_f", D)
    found[f"{gpt2}.latent_proj.weight"] = ((GPT2["n_layer"] + 1) * D, LATENT)
    found[f"{gpt2}.latent_embed.weight"] = (D, LATENT)
    found["decoder.lm_head.weight"], found["decoder.lm_head.bias"] = (ROWS, D), (ROWS,)
    for i in range(ATTRIBUTES):
        linear(f"latent_cls.{i}.0", HIDDEN, LATENT)
        linear(f"latent_cls.{i}.2", ASPECTS, HIDDEN)
    return found


def tensors(posterior: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, biases and norms, so that none can be left out unseen; the head is tied."""
    # ReLU makes the ODE's field jump wherever a unit switches, and a tight solve pays for every jump: few do here.
    std_of = {"linear.weight": 0.1, "0.weight": 0.02, "0.bias": 1.0, "wpe.weight": 1.0}
    rng, made = np.random.default_rng(seed), {}
    for name, shape in shapes(posterior).items():
        is_norm = name.endswith("weight") and len(shape) == 1
        std = std_of.get(".".join(name.split(".")[-2:]), 0.3)
        made[name] = (float(is_norm) + std * rng.normal(size=shape)).astype(np.float32)
    if posterior:
        made["posterior_encoder.linear.weight"] *= 6  # far enough from the prior for dimensions above the KL's floor
    made["decoder.lm_head.bias"][EOS] += 3.5  # so that replies end early, late and not at all
    made["decoder.lm_head.weight"] = made["decoder.transformer.wte.weight"].copy()
    return made


def write(path: Path, state: dict[str, np.ndarray], prefix: str = "") -> Path:
    """The state dict as .safetensors, or by torch.save."""
    state = {prefix + name: tensor for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(state, path)
    else:
        import torch

        torch.save({name: torch.tensor(tensor) for name, tensor in state.items()}, path)
    return path


def write_encoder(folder: Path, **changes) -> Path:
    """Config and tokenizer of the BERT: one token a character."""
    chars = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *chars, *("##" + char for char in chars)]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return _write_folder(folder, BERT | changes, backend, roles)


def write_decoder(folder: Path, **changes) -> Path:
    """Config and tokenizer of the GPT-2: one token a byte, and one for both ends of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*alphabet, "<|endoftext|>"])}
    backend = tokenizers.Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return _write_folder(folder, GPT2 | changes, backend, roles)


def _write_folder(folder: Path, settings: dict, backend: tokenizers.Tokenizer, roles: dict[str, str]) -> Path:
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
