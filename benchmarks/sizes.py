"""The model at three sizes, with random weights and without anything pretrained: what is timed does not depend on them.

tiny: the widths of configs/tiny.py. base: BERT-base encoders and GPT-2 small. paper: BERT-base and GPT-2 medium.

corpus.npz is the bundled corpus as tokens, for machines without Grain and TFDS, by 8,192 tokens each that were trained
on it (`python -m miracle_jax.dataset freeze` with encoder.vocab_size and decoder.vocab_size 8192 and BUCKETS).
"""

import dataclasses
from pathlib import Path

import numpy as np

BUCKETS = ((48, 80, 40), (72, 104, 40), (112, 144, 48), (160, 192, 64), (256, 320, 128), (512, 512, 128))
CORPUS = Path(__file__).with_name("corpus.npz")


def config(size: str, **changes):
    """The Config of a size. changes: of its top-level fields."""
    from miracle_jax.config import Bert, Config, Data, Gpt2, Latent

    encoder, decoder, latent = Bert(), Gpt2(), Latent(size=768)
    if size == "tiny":
        encoder = Bert(vocab_size=8192, width=128, depth=1, heads=4, mlp=512)
        decoder, latent = Gpt2(vocab_size=8192, width=192, depth=3, heads=4, mlp=768), Latent(size=64)
    elif size == "paper":
        decoder = Gpt2(width=1024, depth=24, heads=16, mlp=4096)
    data = Data(buckets=BUCKETS, frozen=str(CORPUS))
    return dataclasses.replace(Config(data=data, encoder=encoder, decoder=decoder, latent=latent), **changes)


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
