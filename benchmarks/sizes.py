"""The model at three sizes, with random weights and without anything pretrained: what is timed does not depend on them.

tiny: configs/tiny.py. base: BERT-base encoders and GPT-2 small. paper: BERT-base encoders and GPT-2 medium.
"""

import dataclasses

import numpy as np


def config(size: str, **changes):
    """The Config of a size. changes: of its top-level fields."""
    from benchmarks.measure import ROOT
    from miracle_jax.config import Bert, Config, Data, Gpt2, Latent, load_file

    if size == "tiny":
        made = load_file(ROOT / "configs" / "tiny.py")
    else:
        medium = {"width": 1024, "depth": 24, "heads": 16, "mlp": 4096} if size == "paper" else {}
        buckets = ((48, 112, 64), (96, 160, 64), (160, 224, 64), (256, 320, 128), (512, 512, 128))
        made = Config(data=Data(buckets=buckets), encoder=Bert(), decoder=Gpt2(**medium), latent=Latent(size=768))
    return dataclasses.replace(made, **changes)


SIZES = (2, 2, 2)
"""Aspects of the three attributes."""


def random_model(settings, seed: int = 0):
    """(graphdef, parameters) of a Miracle, random, initialised under one jit."""
    import jax
    from flax import nnx

    from miracle_jax.cvae import Miracle

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Miracle(settings, SIZES, nnx.Rngs(0))))

    @jax.jit
    def initial(key):
        return nnx.to_pure_dict(nnx.state(Miracle(settings, SIZES, nnx.Rngs(key))))

    return graphdef, initial(jax.random.key(seed))


def random_latents(number: int, size: int, seed: int = 0) -> np.ndarray:
    """(number, size) float32, N(0, 1)."""
    return np.random.default_rng(seed).normal(size=(number, size)).astype(np.float32)


def parameters(params) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))
