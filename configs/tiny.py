"""Quickstart: a small CVAE on the bundled corpus, from random weights, on a laptop's CPU."""

from miracle_jax.config import Bert, Config, Data, Decode, Gpt2, Latent, Loss, Train


def get_config() -> Config:
    encoder = Bert(vocab_size=4096, width=128, depth=2, heads=4, mlp=512, max_positions=128, dropout=0.0, init_std=0.05)
    decoder = Gpt2(vocab_size=4096, width=192, depth=3, heads=4, mlp=768, max_positions=66, dropout=0.0, init_std=0.05)
    return Config(
        data=Data(buckets=((32, 72, 48), (64, 104, 48))),
        encoder=encoder,
        decoder=decoder,
        latent=Latent(size=64),
        loss=Loss(kl=0.01, classify=0.5),
        train=Train(steps=800, learning_rate=2e-3, beta2=0.98, eval_every=200, save_every=200),
        decode=Decode(max_new_tokens=64),
    )
