"""From torch to our parameter trees, and what the comparisons with torch share. See reference.py for a case.

A torch Linear's weight is (out, in) and is transposed; GPT-2's Conv1D is (in, out) and is not. BERT's query, key and
value become one layer; layers are stacked on a leading axis.
"""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

GOLDEN = Path(__file__).parent / "golden"


def load(source: str | dict) -> dict:
    """A golden case by name, or a live one by the arguments of `bert_case` (has `lengths`) or `gpt2_case`."""
    if isinstance(source, str):
        with np.load(GOLDEN / f"{source}.npz") as file:
            return dict(file)
    import reference  # needs torch

    return (reference.bert_case if "lengths" in source else reference.gpt2_case)(**source)


def group(case: dict, prefix: str) -> dict:
    """The arrays `prefix/NAME` of a case, by NAME."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in case.items() if name.startswith(f"{prefix}/")}


def shape(case: dict) -> dict:
    """The arguments of our config class that a case's `shape/` arrays give."""
    return {name: value.item() for name, value in group(case, "shape").items() if name != "latent"}


def bert(torch_arrays: dict) -> dict:
    """BertModel's parameters (or their gradients) as the tree of bert.Bert."""
    take = Taker(torch_arrays)

    def layer(prefix):
        qkv = [take.linear(f"{prefix}.attention.self.{part}") for part in ("query", "key", "value")]
        return {
            "qkv": jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *qkv),
            "attention_out": take.linear(f"{prefix}.attention.output.dense"),
            "attention_norm": take.norm(f"{prefix}.attention.output.LayerNorm"),
            "mlp_in": take.linear(f"{prefix}.intermediate.dense"),
            "mlp_out": take.linear(f"{prefix}.output.dense"),
            "mlp_norm": take.norm(f"{prefix}.output.LayerNorm"),
        }

    return take.everything(
        tokens=take.table("embeddings.word_embeddings"),
        positions=take.table("embeddings.position_embeddings"),
        segments=take.table("embeddings.token_type_embeddings"),
        norm=take.norm("embeddings.LayerNorm"),
        layers=take.stacked("encoder.layer", layer),
        pooler=take.linear("pooler.dense"),
    )


def gpt2(torch_arrays: dict) -> dict:
    """LatentGpt2's parameters (or their gradients) as the tree of gpt2.Gpt2."""
    take = Taker(torch_arrays)

    def layer(prefix):
        return {
            "attention_norm": take.norm(f"{prefix}.ln_1"),
            "qkv": take.conv1d(f"{prefix}.attn.c_attn"),
            "attention_out": take.conv1d(f"{prefix}.attn.c_proj"),
            "mlp_norm": take.norm(f"{prefix}.ln_2"),
            "mlp_in": take.conv1d(f"{prefix}.mlp.c_fc"),
            "mlp_out": take.conv1d(f"{prefix}.mlp.c_proj"),
        }

    return take.everything(
        tokens=take.table("transformer.wte"),
        positions=take.table("transformer.wpe"),
        layers=take.stacked("transformer.h", layer),
        norm=take.norm("transformer.ln_f"),
        latent_embed={"kernel": take("latent_embed.weight").T},
        latent_proj={"kernel": take("latent_proj.weight").T},
        head_bias=take("head_bias"),
    )


class Taker:
    """Takes arrays out of a dict by torch's names and sees to it that none is left behind."""

    def __init__(self, torch_arrays: dict):
        self.left = dict(torch_arrays)

    def __call__(self, name):
        return self.left.pop(name)

    def linear(self, name):
        return {"kernel": self(f"{name}.weight").T, "bias": self(f"{name}.bias")}

    def conv1d(self, name):
        return {"kernel": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def norm(self, name):
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def table(self, name):
        return {"embedding": self(f"{name}.weight")}

    def stacked(self, prefix, layer):
        depth = 1 + max(int(name[len(prefix) + 1 :].split(".")[0]) for name in self.left if name.startswith(prefix))
        layers = [layer(f"{prefix}.{i}") for i in range(depth)]
        return {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}

    def everything(self, **tree):
        assert not self.left, f"parameters without a place: {list(self.left)}"
        return tree


def merge(graphdef: nnx.GraphDef, params: dict, layers: int | None = None) -> nnx.Module:
    """The model with these parameters, cut after its first `layers` layers."""
    return nnx.merge(graphdef, params | {"layers": jax.tree.map(lambda leaf: leaf[:layers], params["layers"])})


def assert_trees_close(got: dict, want: dict, tolerance: float) -> None:
    """Compares leaf by leaf, and names the leaf that differs. A leaf is compared at its own scale."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, got_leaf), want_leaf in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(np.abs(want_leaf).max(), 1e-3)
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=tolerance, atol=tolerance * scale, err_msg=message)
