"""From torch to our parameter trees, and what the comparisons with torch share. See reference.py for a case.

A torch Linear's weight is (out, in) and is transposed; GPT-2's Conv1D is (in, out) and is not. The query, key and
value of BERT and Llama become one layer, and so do Llama's gate and up; layers are stacked on a leading axis.
"""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from miracle_jax import config
from miracle_jax.decoder import make
from miracle_jax.layers import Compute

GOLDEN = Path(__file__).parent / "golden"


def load(source: str | dict) -> dict:
    """A golden case by name, or a live one by the arguments of `bert_case`, `gpt2_case` or `llama_case`."""
    if isinstance(source, str):
        with np.load(GOLDEN / f"{source}.npz") as file:
            return dict(file)
    import reference  # needs torch

    family = "bert" if "lengths" in source else "llama" if "kv_heads" in source else "gpt2"
    return getattr(reference, f"{family}_case")(**source)


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
        latent_embed=take.kernel("latent_embed"),
        latent_proj=take.kernel("latent_proj"),
        head_bias=take("head_bias"),
    )


def llama(torch_arrays: dict) -> dict:
    """LatentLlama's parameters (or their gradients) as the tree of llama.Llama."""
    take = Taker(torch_arrays)

    def layer(prefix):
        def together(*parts):
            kernels = [take.kernel(f"{prefix}.{part}_proj") for part in parts]
            return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *kernels)

        return {
            "attention_norm": take.scale(f"{prefix}.input_layernorm"),
            "qkv": together("self_attn.q", "self_attn.k", "self_attn.v"),
            "attention_out": take.kernel(f"{prefix}.self_attn.o_proj"),
            "mlp_norm": take.scale(f"{prefix}.post_attention_layernorm"),
            "mlp_in": together("mlp.gate", "mlp.up"),
            "mlp_out": take.kernel(f"{prefix}.mlp.down_proj"),
        }

    head = {"head": take.kernel("head")} if "head.weight" in torch_arrays else {}
    return take.everything(
        tokens=take.table("transformer.embed_tokens"),
        layers=take.stacked("transformer.layers", layer),
        norm=take.scale("transformer.norm"),
        latent_embed=take.kernel("latent_embed"),
        latent_proj=take.kernel("latent_proj"),
        **head,
    )


class Taker:
    """Takes arrays out of a dict by torch's names and sees to it that none is left behind."""

    def __init__(self, torch_arrays: dict):
        self.left = dict(torch_arrays)

    def __call__(self, name):
        return self.left.pop(name)

    def kernel(self, name):
        return {"kernel": self(f"{name}.weight").T}

    def linear(self, name):
        return self.kernel(name) | {"bias": self(f"{name}.bias")}

    def conv1d(self, name):
        return {"kernel": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def scale(self, name):
        return {"scale": self(f"{name}.weight")}

    def norm(self, name):
        return self.scale(name) | {"bias": self(f"{name}.bias")}

    def table(self, name):
        return {"embedding": self(f"{name}.weight")}

    def stacked(self, prefix, layer):
        depth = 1 + max(int(name[len(prefix) + 1 :].split(".")[0]) for name in self.left if name.startswith(prefix))
        layers = [layer(f"{prefix}.{i}") for i in range(depth)]
        return {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}

    def everything(self, **tree):
        assert not self.left, f"parameters without a place: {list(self.left)}"
        return tree


def is_llama(case: dict) -> bool:
    return "shape/kv_heads" in case


def decoder_params(case: dict, prefix: str) -> dict:
    """The decoder's tree of a case's weights or gradients."""
    return (llama if is_llama(case) else gpt2)(group(case, prefix))


def decoder(case: dict, remat: bool = False) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, parameters) of our decoder of the case's family, with its weights."""
    params = decoder_params(case, "weights")
    sizes = {"vocab_size": len(params["tokens"]["embedding"])}
    if "positions" in params:
        sizes["max_positions"] = len(params["positions"]["embedding"])
    settings = (config.Llama if is_llama(case) else config.Gpt2)(**sizes, **shape(case))
    latent = case["shape/latent"].item()
    model = nnx.eval_shape(lambda: make(settings, latent, Compute(remat=remat), nnx.Rngs(0)))
    expected = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(model)))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
    return nnx.graphdef(model), params


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
