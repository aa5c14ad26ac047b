"""A CVAE of BERT-base encoders and a GPT-2 small decoder, latent 768, from their pretrained weights.

Run:     python -m miracle_jax.train --config configs/base.py --workdir runs/base
Needs:   bert-base-uncased and gpt2, from the hub, its cache, or folders named by --encoder.pretrained and
         --decoder.pretrained; with those empty it starts from random weights
Took:    not yet measured      Reached: not yet measured
Less memory: --remat True      On a laptop: configs/tiny.py
"""

from miracle_jax.config import Bert, Config, Data, Gpt2, Latent


def get_config() -> Config:
    return Config(
        data=Data(
            buckets=((48, 80, 40), (72, 104, 40), (112, 144, 48), (160, 192, 64), (256, 320, 128), (512, 512, 128))
        ),
        encoder=Bert(pretrained="bert-base-uncased"),
        decoder=Gpt2(pretrained="gpt2"),
        latent=Latent(size=768),
    )
