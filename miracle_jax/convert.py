"""Turns a checkpoint of the paper's PyTorch code into one of ours; `export --format released` is the way back.

    python -m miracle_jax.convert miracle.bin OUT --encoder bert-base-uncased --decoder microsoft/DialoGPT-medium

The state dict (.bin or .pt, which needs PyTorch, or .safetensors) has the weights; --encoder and --decoder name the
checkpoints, or folders, whose config.json and tokenizer the code was started with. The result is a finished run that
generate, evaluate and export take.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from miracle_jax import checkpoint, config, hub, pretrained, storage, weights
from miracle_jax.attributes import Schema
from miracle_jax.command_line import read_pair
from miracle_jax.cvae import Miracle
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.tokenizers import Tokenizers, load_tokenizer


@dataclass(frozen=True)
class Options:
    """What the state dict does not tell."""

    encoder: str = "bert-base-uncased"
    """Where the encoders' config.json and tokenizer are: a folder or a hub name."""
    decoder: str = "microsoft/DialoGPT-medium"
    """The same of the decoder; `<bos>` is added to its tokenizer."""
    schema: str = ""
    """TOML file of the attributes, in the order of the classifiers. Empty: the paper's three."""


def convert(source: str | Path, out: str, options: Options) -> None:
    """Writes the folder `out` whole or not at all. Raises UserError for a state dict of another form."""
    tensors = _tensors_of(Path(source).expanduser())
    schema = Schema.load(options.schema)
    run = _config_of(tensors, str(source), options)
    if len(set(schema.sizes)) != 1:
        raise UserError("the released code has equally many aspects in every attribute; --schema has not")
    nothing = pretrained.zeros(lambda: Miracle(run, schema.sizes, nnx.Rngs(0)))
    table = weights.released(run, len(schema.sizes))
    table = dataclasses.replace(table, entries=tuple(dataclasses.replace(e, optional=False) for e in table.entries))
    miracle, _ = weights.load(table, tensors, nothing, str(source))
    tokenizers = Tokenizers(
        load_tokenizer("encoder", run.data.encoder_tokenizer), load_tokenizer("decoder", run.data.decoder_tokenizer)
    )
    if tokenizers.decoder.size > run.decoder.vocab_size:
        raise UserError(
            f"{source} has embeddings of {run.decoder.vocab_size} decoder tokens, but with <bos> the tokenizer of "
            f"--decoder {options.decoder} has {tokenizers.decoder.size}; name the one that it was trained with"
        )
    with storage.new_folder(out) as folder:
        tokenizers.save(folder / "tokenizers")
        schema.save(folder / "schema.toml")
        (folder / "config.json").write_text(json.dumps({"config": config.to_dict(run)}, indent=2))
        facts = {"step": 0, "heads": "joint", "accuracy": {"joint": {}}, "converted_from": Path(source).name}
        checkpoint.save_model(folder, {"miracle": miracle, "refit_heads": miracle["heads"]}, facts)


def _tensors_of(path: Path) -> dict[str, hub.Tensor]:
    """The state dict without the prefix that torch.compile gives."""
    found = hub.tensors_of(path)
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise UserError(f"{path} has tensors both with and without the prefix _orig_mod.; remove one of each two")
    head, table = "decoder.lm_head.weight", "decoder.transformer.wte.weight"
    if head in tensors and table not in tensors:  # safetensors keeps one name of two that share their memory
        tensors[table] = tensors[head]
    return tensors


def _config_of(tensors: dict[str, hub.Tensor], source: str, options: Options) -> config.Config:
    """The config of a state dict: shapes from the named configs, sizes of what they do not know from the tensors."""

    def size(name, axis):
        if name not in tensors:
            raise UserError(f"{source} has no {name}; it is no checkpoint of the paper's code")
        shape = tensors[name].shape
        if len(shape) != 2:
            raise UserError(f"{source}: {name} has the shape {shape}; that of the paper's code has two dimensions")
        return shape[axis]

    latent = size("prior_encoder.linear.weight", 0) // 2
    run = config.Config(
        data=config.Data(encoder_tokenizer=options.encoder, decoder_tokenizer=options.decoder),
        encoder=config.Bert(pretrained=options.encoder),
        decoder=config.Gpt2(pretrained=options.decoder),
        latent=config.Latent(size=latent, hidden=size("latent_cls.0.0.weight", 0), activation="relu"),
        loss=config.Loss(posterior=any(name.startswith("posterior_encoder.") for name in tensors)),
    )
    run = pretrained.resolve(run)
    if run.decoder.family != "gpt2":
        raise UserError(f"--decoder {options.decoder} is not of the GPT-2 family, which the paper's code has")
    rows = size("decoder.transformer.wte.weight", 0)
    limit = min(512, run.encoder.max_positions)
    reply = min(128, run.decoder.max_positions - 2)
    buckets = ((width, limit, reply) for width in (64, 128, 256, limit) if width <= limit)
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, buckets=tuple(dict.fromkeys(buckets))),
        encoder=dataclasses.replace(run.encoder, pretrained=""),
        decoder=dataclasses.replace(run.decoder, pretrained="", vocab_size=rows),
        decode=config.Decode(max_new_tokens=reply),
    )
    run.check()
    return run


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        words, options = read_pair(
            "python -m miracle_jax.convert", __doc__, "STATE_DICT OUT",
            "give the state dict and the folder to write: python -m miracle_jax.convert FILE OUT",
            Options(), argv,
        )  # fmt: skip
        convert(*words, options)
        print(f"wrote {words[1]}; python -m miracle_jax.generate {words[1]} talks to it")


if __name__ == "__main__":
    main()
