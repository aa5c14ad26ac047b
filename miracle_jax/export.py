"""Takes a finished run elsewhere: a folder that `mj.load` opens, that transformers opens in part, or the state dict of
the paper's PyTorch code.

    python -m miracle_jax.export runs/tiny OUT --format orbax
    python -m miracle_jax.export runs/tiny OUT --format safetensors --dtype bfloat16
    python -m miracle_jax.export runs/tiny OUT.safetensors --format released

Formats: orbax holds the parameters as one Orbax checkpoint; safetensors holds the encoders and the decoder as folders
that transformers loads, and what they do not have (latent projections, heads) in miracle.safetensors.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from miracle_jax import __version__, checkpoint, config, hub, pretrained, reading, storage, weights
from miracle_jax.attributes import Schema
from miracle_jax.command_line import read_pair
from miracle_jax.cvae import split
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.model import Stored, merge_adapters, read_run
from miracle_jax.scores import AVERAGE

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}  # ours to transformers'


@dataclass(frozen=True)
class Options:
    """What to write, and how."""

    format: Literal["orbax", "safetensors", "released"] = "safetensors"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters in the files; loading makes them float32 again."""
    parts: Literal["all", "trained"] = "all"
    """all: the model stands alone, adapters merged. trained: without what stayed as it was pretrained, which loading
    looks for under the names in the config."""


def export(workdir: str | Path, out: str, options: Options) -> None:
    """Writes `out` whole or not at all; it must not exist yet. out: a folder (local or gs://); a file if released."""
    if options.format == "released":
        _check_released_file(out)
    stored = read_run(workdir)
    about = card(stored, storage.run_folder(workdir), options)  # before the config forgets what it started from
    if options.parts == "all" or options.format == "released":
        run, miracle = merge_adapters(stored.run, stored.miracle)
        run = dataclasses.replace(
            run,
            encoder=dataclasses.replace(run.encoder, pretrained="", frozen=False),
            decoder=dataclasses.replace(run.decoder, pretrained="", frozen=False),
            train=dataclasses.replace(run.train, latent_steps=0),
        )
        stored = dataclasses.replace(stored, run=run, miracle=miracle)
    if options.format == "released":
        write_released(stored, out, options)
        return
    with storage.new_folder(out) as folder:
        stored.tokenizers.save(folder / "tokenizers")
        stored.schema.save(folder / "schema.toml")
        (folder / "config.json").write_text(json.dumps({"config": config.to_dict(stored.run)}, indent=2))
        (folder / "README.md").write_text(about)
        miracle = split(stored.run, stored.miracle)[0]  # all of it, where nothing is frozen
        params = {"miracle": miracle, "refit_heads": stored.refit_heads}
        params = jax.tree.map(lambda leaf: _as(leaf, options.dtype), params)
        facts = stored.facts | {"format": options.format, "dtype": options.dtype, "parts": options.parts}
        if options.format == "safetensors":
            if options.parts == "all":
                params["miracle"] = _write_folders(folder, stored, params["miracle"])
            (folder / "miracle.safetensors").write_bytes(hub.safetensors_bytes(flatten_dict(params, sep=".")))
            (folder / "model.json").write_text(json.dumps(facts, indent=2))
        else:
            checkpoint.save_model(folder, params, facts)


def write_released(stored: Stored, out: str, options: Options) -> None:
    """One file under the names of the paper's PyTorch code. Raises UserError for what that code computes otherwise."""
    run = stored.run
    lacking = {
        f"decoder of the {run.decoder.family} family (only gpt2)": run.decoder.family != "gpt2",
        "attributes with different numbers of aspects": len(set(stored.schema.sizes)) != 1,
        f"latent.activation {run.latent.activation} (only relu)": run.latent.activation != "relu",
        f"latent.logvar_shift {run.latent.logvar_shift} (only 0)": run.latent.logvar_shift != 0,
    }
    if any(lacking.values()):
        raise UserError(
            "the released format cannot hold this run; the paper's code has no "
            + ", no ".join(name for name, lacks in lacking.items() if lacks)
        )
    if stored.facts["heads"] == "refit":
        stored = dataclasses.replace(stored, miracle=stored.miracle | {"heads": stored.refit_heads})
    params = jax.tree.map(lambda leaf: _as(leaf, options.dtype), stored.miracle)
    tensors = weights.dump(weights.released(stored.run, len(stored.schema.sizes)), params)
    tensors["decoder.lm_head.weight"] = tensors["decoder.transformer.wte.weight"].copy()
    with storage.replacing(Path(out).expanduser()) as file:
        file.write(hub.safetensors_bytes(tensors))


def _check_released_file(out: str) -> None:
    if storage.is_remote(out) or Path(out).suffix != ".safetensors":
        raise UserError(f"{out}: the released format is one local file; give it a name that ends in .safetensors")
    if Path(out).expanduser().exists():
        raise UserError(f"{out} exists; name a file that does not, or delete it")


def _write_folders(folder: Path, stored: Stored, params: dict) -> dict:
    """Writes the parts that transformers knows as folders of their own; returns the parameters that are left."""
    run, left = stored.run, dict(params)

    def write(name, tokenizer, settings, tensors):
        shutil.copytree(folder / "tokenizers" / tokenizer, folder / name)
        (folder / name / "config.json").write_text(json.dumps(settings, indent=2))
        (folder / name / "model.safetensors").write_bytes(hub.safetensors_bytes(tensors))

    for name in {"prior", "posterior"} & params.keys():
        left[name] = {key: value for key, value in params[name].items() if key != "bert"}
        tensors = weights.dump(weights.bert(run.encoder), params[name]["bert"])
        write(name, "encoder", bert_config(run.encoder) | {"pad_token_id": stored.tokenizers.encoder.pad_id}, tensors)
    table = weights.decoder(run.decoder)
    prefix = pretrained.PREFIXES[run.decoder.family]
    tensors = weights.dump(table, params["decoder"]).items()
    tensors = {name if name.startswith("lm_head") else prefix + name: tensor for name, tensor in tensors}
    tokenizer = stored.tokenizers.decoder
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write("decoder", "decoder", decoder_config(run.decoder) | ends, tensors)
    known = {entry.path for entry in table.entries}
    flat = flatten_dict(params["decoder"], sep=".")
    left["decoder"] = unflatten_dict({path: leaf for path, leaf in flat.items() if path not in known}, sep=".")
    return left


def bert_config(shape: config.Bert) -> dict:
    """transformers' BertConfig of a shape."""
    return {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": shape.vocab_size,
        "hidden_size": shape.width, "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp, "max_position_embeddings": shape.max_positions,
        "type_vocab_size": shape.segments, "hidden_act": ACTIVATIONS[shape.activation],
        "layer_norm_eps": shape.norm_eps, "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.dropout, "position_embedding_type": "absolute",
    }  # fmt: skip


def decoder_config(shape: config.Gpt2 | config.Llama) -> dict:
    """transformers' GPT2Config or LlamaConfig of a shape."""
    if shape.family == "gpt2":
        return {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": shape.vocab_size,
            "n_embd": shape.width, "n_layer": shape.depth, "n_head": shape.heads, "n_inner": shape.mlp,
            "n_positions": shape.max_positions, "activation_function": ACTIVATIONS[shape.activation],
            "layer_norm_epsilon": shape.norm_eps, "tie_word_embeddings": True,
        }  # fmt: skip
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": shape.vocab_size,
        "hidden_size": shape.width, "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "intermediate_size": shape.mlp, "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": shape.max_positions, "rope_theta": shape.rope_theta,
        "hidden_act": ACTIVATIONS[shape.activation], "tie_word_embeddings": shape.tied,
    }  # fmt: skip


def card(stored: Stored, workdir: Path, options: Options) -> str:
    """The bundle's README.md: what it is, what it learned from, how well it does, how to use it."""
    run, facts = stored.run, stored.facts
    heads = facts["heads"] if run.sample.heads == "auto" else run.sample.heads
    source = facts.get("converted_from")
    if source:
        data, origin = "not known", f"converted from {source}, a checkpoint of the paper's PyTorch code"
    else:
        data = ", ".join(run.data.train) or run.data.frozen or "the bundled corpus (Miracle-Mini, CC0 1.0)"
        origin = f"step {facts['step']} of {run.train.steps or f'{run.train.epochs:g} epochs'}"
    lines = [
        "---", "library_name: miracle_jax", "license: other  # yours to fill in", "---", "",
        "# A miracle_jax model", "",
        f"Written by miracle_jax {__version__} ({options.format}, {options.dtype}, parts: {options.parts}).", "",
        f"- attributes: {_attributes(stored.schema)}",
        f"- data: {data}",
        f"- checkpoint: {origin}",
        f"- heads of the energy: {heads}; accuracy on validation contexts: "
        + (", ".join(f"{name} {a['mean']:.1%}" for name, a in facts["accuracy"].items() if a) or "not measured"),
        f"- encoder from: {run.encoder.pretrained or 'see config.json'}",
        f"- decoder from: {run.decoder.pretrained or 'see config.json'}",
    ]  # fmt: skip
    path = workdir / "evaluation" / "report.json"
    if path.exists():
        report = reading.json_object(path)
        try:
            figures = {name: f["paper"][AVERAGE]["mean"] for name, f in report["systems"].items()}
            judges = report["setup"]["judges"]
            shown = ", ".join(f"{name} {value:.1%}" for name, value in figures.items() if value is not None)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{path} is not as evaluate writes it; delete it, or evaluate again") from None
        lines.append(f"- control accuracy (`miracle_jax.evaluate`; judges: {judges}): {shown}")
    example = stored.schema.describe([0] * len(stored.schema.names))
    lines += [
        "", "```python", "import miracle_jax as mj", "", 'model = mj.load("THIS FOLDER")',
        f'print(model.reply(["How was your day?"], "{example}").text)', "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _attributes(schema: Schema) -> str:
    return "; ".join(f"{a.name} ({', '.join(a.aspects)})" for a in schema.attributes)


def _as(leaf, dtype: str) -> np.ndarray:
    return np.asarray(leaf).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        words, options = read_pair(
            "python -m miracle_jax.export", __doc__, "WORKDIR OUT",
            "give the folder of a finished run and what to write: python -m miracle_jax.export RUN OUT",
            Options(), argv,
        )  # fmt: skip
        export(*words, options)
        print(f"wrote {words[1]}")


if __name__ == "__main__":
    main()
