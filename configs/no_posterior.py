"""Ablation "w/o posterior" (Table 4, appendix D): z comes from the prior in training too.

Run:     python -m miracle_jax.train --config configs/no_posterior.py --workdir runs/no_posterior
Took:    not yet measured      Reached: not yet measured
"""

from pathlib import Path

from miracle_jax.ablation import without
from miracle_jax.config import Config, load_file


def get_config() -> Config:
    return without("posterior", load_file(Path(__file__).with_name("paper.py")))
