"""Ablation "w/o L_C" (Table 4): no aspect classification loss, so only refitted heads are trained.

Run:     python -m miracle_jax.train --config configs/no_classify.py --workdir runs/no_classify
Took:    not yet measured      Reached: not yet measured
"""

from pathlib import Path

from miracle_jax.ablation import without
from miracle_jax.config import Config, load_file


def get_config() -> Config:
    return without("classify", load_file(Path(__file__).with_name("paper.py")))
