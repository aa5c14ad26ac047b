"""A CVAE of BERT-base encoders and a GPT-2 small decoder, latent 768, from random weights.

Run:     python -m miracle_jax.train --config configs/base.py --workdir runs/base
Needs:   the tokenizers of bert-base-uncased and gpt2 (from the hub, its cache, or folders named by
         --data.encoder-tokenizer and --data.decoder-tokenizer)
Took:    not yet measured      Reached: not yet measured
Less memory: --remat True      On a laptop: configs/tiny.py
"""

from miracle_jax.config import Bert, Config, Data, Gpt2, Latent


def get_config() -> Config:
    return Config(
        data=Data(
            encoder_tokenizer="bert-base-uncased",
            decoder_tokenizer="gpt2",
            buckets=((48, 112, 64), (96, 160, 64), (160, 224, 64), (256, 320, 128), (512, 512, 128)),
        ),
        encoder=Bert(),
        decoder=Gpt2(),
        latent=Latent(size=768),
    )
