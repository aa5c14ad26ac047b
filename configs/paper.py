"""The paper's model: two BERT-base encoders, DialoGPT-medium as the decoder, latent 768; 20 epochs at 5e-5.

Run:     python -m miracle_jax.train --config configs/paper.py --workdir runs/paper
Needs:   bert-base-uncased and microsoft/DialoGPT-medium, from the hub, its cache, or folders named by
         --encoder.pretrained and --decoder.pretrained
Took:    not yet measured      Reached: not yet measured
Less memory: --remat True      Ablations of Table 4: configs/no_posterior.py, no_gap.py, no_classify.py, no_energy.py
"""

from miracle_jax.config import Bert, Config, Data, Gpt2, Latent, Loss, Train


def get_config() -> Config:
    return Config(
        data=Data(
            buckets=((48, 80, 40), (72, 104, 40), (112, 144, 48), (160, 192, 64), (256, 320, 128), (512, 512, 128))
        ),
        encoder=Bert(pretrained="bert-base-uncased"),
        decoder=Gpt2(pretrained="microsoft/DialoGPT-medium", width=1024, depth=24, heads=16, mlp=4096),
        latent=Latent(size=768),
        loss=Loss(kl=0.001, kl_floor=0.9, classify=0.05, gap=0.002),
        train=Train(epochs=20, batch_size=32, learning_rate=5e-5, warmup=0.05, clip=1.0),
    )
