"""Quickstart: a small CVAE on the bundled corpus, from random weights, on a laptop's CPU."""

from miracle_jax.config import Bert, Config, Data, Decode, Gpt2, Latent, Loss, Train


def get_config() -> Config:
    encoder = Bert(vocab_size=4096, width=128, depth=1, heads=4, mlp=512, max_positions=66, dropout=0.0, init_std=0.05)
    decoder = Gpt2(vocab_size=4096, width=192, depth=3, heads=4, mlp=768, max_positions=66, dropout=0.0, init_std=0.05)
    return Config(
        data=Data(buckets=((24, 66, 32), (24, 66, 52))),
        encoder=encoder,
        decoder=decoder,
        latent=Latent(size=64, logvar_shift=-4.0),
        loss=Loss(kl=0.015, kl_floor=0.1, classify=0.1),
        train=Train(steps=1300, learning_rate=3e-3, beta2=0.98, weight_decay=0.1, eval_every=260, save_every=260),
        decode=Decode(max_new_tokens=64),
    )
