"""Other people's names for our parameters: one table per architecture, read in both directions.

A table lists, for every array of ours, the tensors that it is made of. Ours differ in three ways: kernels are (in, out)
where PyTorch's Linear is (out, in); the layers of a stack are one array with a leading axis; and what is multiplied
with the same input (query, key and value; gate and up) is one kernel.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from miracle_jax import config
from miracle_jax.errors import UserError
from miracle_jax.hub import Tensor

SHOWN = 30
"""Problems of a checkpoint that are listed; the others are counted."""


@dataclass(frozen=True)
class Entry:
    """One array of ours and the tensors that it is made of."""

    path: str
    """Of our array: "layers.blocks.qkv.kernel"."""
    names: tuple[str, ...]
    """Of the tensors, which lie side by side on our last axis. "{}" is the number of a layer."""
    transposed: bool = False
    widths: tuple[int, ...] = ()
    """Of the parts on our last axis, where there are several."""
    fresh_rows: int = 0
    """Rows that the tensor lacks at its end: tokens that were added."""
    optional: bool = False
    """Whether checkpoints may lack it, together with all others that are optional."""
    depth: int = 0
    """How many "{}" counts; 0: the table's."""


@dataclass(frozen=True)
class Table:
    """An architecture's entries, and what its checkpoints may hold besides."""

    entries: tuple[Entry, ...]
    depth: int
    ignored: tuple[str, ...] = ()
    """Patterns of buffers and heads that we have no use for."""
    copies: tuple[tuple[str, str], ...] = ()
    """(name, of): a tensor that may be there too and must equal another one."""

    def prefixed(self, ours: str, theirs: str) -> "Table":
        """The same under a prefix of our paths and of their names."""
        entries = tuple(
            replace(e, path=ours + e.path, names=tuple(theirs + name for name in e.names), depth=e.depth or self.depth)
            for e in self.entries
        )
        ignored = tuple(re.escape(theirs) + pattern for pattern in self.ignored)
        return Table(entries, self.depth, ignored, tuple((theirs + name, theirs + of) for name, of in self.copies))


def load(table: Table, tensors: dict[str, Tensor], params: dict, name: str) -> tuple[dict, list[str]]:
    """Puts a checkpoint's tensors into a model's parameters.

    Args:
      tensors: all of the checkpoint.
      params: nested dict of the arrays that the table names; what the checkpoint lacks (rows of added tokens, optional
        entries) keeps these values.
      name: the checkpoint's, for messages.

    Returns:
      The parameters as float32 NumPy arrays, and the paths of those that the checkpoint lacks.

    Raises:
      UserError with every tensor that is missing, too many or of another shape.
    """
    ours = flatten_dict(params, sep=".")
    problems, used, fresh, wanted = [], set(), [], {}
    parts = {entry: _parts(entry, table.depth, ours[entry.path].shape) for entry in table.entries}
    has_optional = any(part in tensors for entry in table.entries if entry.optional for part, _ in parts[entry])
    for entry in table.entries:
        if entry.optional and not has_optional:
            fresh.append(entry.path)
            continue
        wanted[entry.path] = entry
        for part, shape in parts[entry]:
            used.add(part)
            if part not in tensors:
                problems.append(f"{part}: missing (the model expects {shape})")
            elif tensors[part].shape != shape:
                problems.append(f"{part}: the checkpoint has {tensors[part].shape}, the model expects {shape}")
    copies = {copy: of for copy, of in table.copies if copy in tensors}
    for extra in tensors.keys() - used - copies.keys():
        if not any(re.fullmatch(pattern, extra) for pattern in table.ignored):
            problems.append(f"{extra}: not in the model (the checkpoint has {tensors[extra].shape})")
    if not problems:
        problems = [
            f"{copy}: differs from {of}, of which the model takes it to be a copy"
            for copy, of in copies.items()
            if not np.array_equal(tensors[copy].read(), tensors[of].read())
        ]
    if problems:
        problems.sort()
        more = [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
        raise UserError(f"{name} does not match the model:\n  " + "\n  ".join(problems[:SHOWN] + more))
    loaded = {
        path: _assemble(wanted[path], table.depth, tensors, array) if path in wanted else np.asarray(array)
        for path, array in ours.items()
    }
    return unflatten_dict(loaded, sep="."), fresh


def dump(table: Table, params: dict) -> dict[str, np.ndarray]:
    """A model's parameters as tensors of the table's names; copies are left out."""
    ours = flatten_dict(params, sep=".")
    tensors = {}
    for entry in table.entries:
        array = np.asarray(ours[entry.path])
        stacked = "{}" in entry.names[0]
        layers = array if stacked else array[None]
        for i, layer in enumerate(layers):
            edges = np.cumsum(entry.widths)[:-1]
            for name, part in zip(entry.names, np.split(layer, edges, axis=-1), strict=True):
                tensors[name.format(i)] = np.ascontiguousarray(part.T if entry.transposed else part)
    return tensors


def _parts(entry: Entry, depth: int, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the tensors that make up our array of this shape."""
    stacked = "{}" in entry.names[0]
    *rest, last = shape[stacked:]
    parts = []
    for i in range((entry.depth or depth) if stacked else 1):
        for name, width in zip(entry.names, entry.widths or (last,), strict=True):
            first, *others = (*rest, width)[::-1] if entry.transposed else (*rest, width)
            parts.append((name.format(i), (first - entry.fresh_rows, *others)))
    return parts


def _assemble(entry: Entry, depth: int, tensors: dict[str, Tensor], initial: Any) -> np.ndarray:
    def turned(array):
        return array.T if entry.transposed else array

    def read(name):
        tensor = tensors[name].read().astype(np.float32)
        if entry.fresh_rows:
            tensor = np.concatenate([tensor, turned(np.asarray(initial))[-entry.fresh_rows :]])
        return turned(tensor)

    layers = range(entry.depth or depth) if "{}" in entry.names[0] else [None]
    arrays = [np.concatenate([read(name.format(i)) for name in entry.names], axis=-1) for i in layers]
    return arrays[0] if layers == [None] else np.stack(arrays)


# ------------------------------------------------------------------------------------------------ architectures


def _linear(path: str, *names: str, widths: Sequence[int] = (), transposed: bool = True, bias: bool = True, **more):
    weights, biases = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    entries = [Entry(f"{path}.kernel", weights, transposed, tuple(widths), **more)]
    return entries + [Entry(f"{path}.bias", biases, False, tuple(widths), **more)] * bias


def _norm(path: str, name: str, bias: bool = True):
    return [Entry(f"{path}.scale", (f"{name}.weight",))] + [Entry(f"{path}.bias", (f"{name}.bias",))] * bias


def bert(shape: config.Bert) -> Table:
    """transformers' BertModel."""
    layer, D = "encoder.layer.{}", shape.width
    return Table((
        Entry("tokens.embedding", ("embeddings.word_embeddings.weight",)),
        Entry("positions.embedding", ("embeddings.position_embeddings.weight",)),
        Entry("segments.embedding", ("embeddings.token_type_embeddings.weight",)),
        *_norm("norm", "embeddings.LayerNorm"),
        *_linear("layers.blocks.qkv", *(f"{layer}.attention.self.{x}" for x in ("query", "key", "value")),
                 widths=(D, D, D)),
        *_linear("layers.blocks.attention_out", f"{layer}.attention.output.dense"),
        *_norm("layers.blocks.attention_norm", f"{layer}.attention.output.LayerNorm"),
        *_linear("layers.blocks.mlp_in", f"{layer}.intermediate.dense"),
        *_linear("layers.blocks.mlp_out", f"{layer}.output.dense"),
        *_norm("layers.blocks.mlp_norm", f"{layer}.output.LayerNorm"),
        *_linear("pooler", "pooler.dense", optional=True),
    ), shape.depth, (r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"cls\..*", r"classifier\..*",
                     r"qa_outputs\..*", r"dropout\..*"))  # fmt: skip


def gpt2(shape: config.Gpt2, fresh_rows: int = 0) -> Table:
    """transformers' GPT2Model."""
    layer = "h.{}"
    return Table((
        Entry("tokens.embedding", ("wte.weight",), fresh_rows=fresh_rows),
        Entry("positions.embedding", ("wpe.weight",)),
        *_norm("layers.blocks.attention_norm", f"{layer}.ln_1"),
        *_linear("layers.blocks.qkv", f"{layer}.attn.c_attn", transposed=False),
        *_linear("layers.blocks.attention_out", f"{layer}.attn.c_proj", transposed=False),
        *_norm("layers.blocks.mlp_norm", f"{layer}.ln_2"),
        *_linear("layers.blocks.mlp_in", f"{layer}.mlp.c_fc", transposed=False),
        *_linear("layers.blocks.mlp_out", f"{layer}.mlp.c_proj", transposed=False),
        *_norm("norm", "ln_f"),
    ), shape.depth, (r"h\.\d+\.attn\.(bias|masked_bias)",), (("lm_head.weight", "wte.weight"),))  # fmt: skip


def llama(shape: config.Llama, fresh_rows: int = 0) -> Table:
    """transformers' LlamaModel, and its head where it is not tied."""
    layer, head = "layers.{}", shape.width // shape.heads
    widths = (shape.width, shape.kv_heads * head, shape.kv_heads * head)
    head_entry = [] if shape.tied else _linear("head", "lm_head", bias=False, fresh_rows=fresh_rows)
    return Table((
        Entry("tokens.embedding", ("embed_tokens.weight",), fresh_rows=fresh_rows),
        *_norm("layers.blocks.attention_norm", f"{layer}.input_layernorm", bias=False),
        *_linear("layers.blocks.qkv", *(f"{layer}.self_attn.{x}_proj" for x in "qkv"), widths=widths, bias=False),
        *_linear("layers.blocks.attention_out", f"{layer}.self_attn.o_proj", bias=False),
        *_norm("layers.blocks.mlp_norm", f"{layer}.post_attention_layernorm", bias=False),
        *_linear("layers.blocks.mlp_in", *(f"{layer}.mlp.{x}_proj" for x in ("gate", "up")),
                 widths=(shape.mlp, shape.mlp), bias=False),
        *_linear("layers.blocks.mlp_out", f"{layer}.mlp.down_proj", bias=False),
        *_norm("norm", "norm", bias=False),
        *head_entry,
    ), shape.depth, (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        (("lm_head.weight", "embed_tokens.weight"),) if shape.tied else ())  # fmt: skip


def decoder(shape: config.Decoder, fresh_rows: int = 0) -> Table:
    return {"gpt2": gpt2, "llama": llama}[shape.family](shape, fresh_rows)


def released(settings: config.Config, attributes: int) -> Table:
    """A whole model under the names of the paper's PyTorch code; all attributes have equally many aspects there."""
    coders = bert(settings.encoder), gpt2(settings.decoder)
    parts = [
        coders[0].prefixed("prior.bert.", "prior_encoder."),
        coders[1].prefixed("decoder.", "decoder.transformer."),
    ]
    encoders = ["prior"]
    if settings.loss.posterior:
        parts.append(coders[0].prefixed("posterior.bert.", "posterior_encoder."))
        encoders.append("posterior")
    entries = [
        *(Entry(f"{name}.to_gaussian.kernel", (f"{name}_encoder.linear.weight",), True) for name in encoders),
        Entry("decoder.latent_proj.kernel", ("decoder.transformer.latent_proj.weight",), True),
        Entry("decoder.latent_embed.kernel", ("decoder.transformer.latent_embed.weight",), True),
        Entry("decoder.head_bias", ("decoder.lm_head.bias",)),
    ]
    for ours, theirs in (("1", "0"), ("2", "2")):
        entries.append(Entry(f"heads.w{ours}", (f"latent_cls.{{}}.{theirs}.weight",), True, depth=attributes))
        entries.append(Entry(f"heads.b{ours}", (f"latent_cls.{{}}.{theirs}.bias",), depth=attributes))
    return Table(
        tuple(entry for part in parts for entry in part.entries) + tuple(entries), 0,
        tuple(pattern for part in parts for pattern in part.ignored),
        (("decoder.lm_head.weight", "decoder.transformer.wte.weight"),),
    )  # fmt: skip
