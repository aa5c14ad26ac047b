"""Ablation "w/o L_D" (Table 4): no attribute distance loss.

Run:     python -m miracle_jax.train --config configs/no_gap.py --workdir runs/no_gap
Took:    not yet measured      Reached: not yet measured
"""

from pathlib import Path

from miracle_jax.ablation import without
from miracle_jax.config import Config, load_file


def get_config() -> Config:
    return without("gap", load_file(Path(__file__).with_name("paper.py")))
