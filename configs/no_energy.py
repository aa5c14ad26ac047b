"""Ablation "w/o EBM" (Tables 1 and 4): z stays where the prior puts it.

Run:     python -m miracle_jax.train --config configs/no_energy.py --workdir runs/no_energy
Took:    not yet measured      Reached: not yet measured
"""

from dataclasses import replace
from pathlib import Path

from miracle_jax.config import Config, load_file


def get_config() -> Config:
    paper = load_file(Path(__file__).with_name("paper.py"))
    return replace(paper, sample=replace(paper.sample, weight=0.0))
