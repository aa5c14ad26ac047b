"""Writes the golden arrays beside this file: what torch's BERT, GPT-2 and Llama compute, for tests without torch;
and what transformers computes with the real weights that `bash launch/pretrained.sh` installs.

    python tests/golden/make_golden.py        (written with torch 2.13.0, transformers 5.23.0, accelerate 1.15.0)
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import reference  # noqa: E402

BERT = {"seed": 0, "width": 16, "depth": 2, "lengths": [7, 1, 4]}
GPT2 = {"seed": 1, "width": 16, "depth": 2, "latent": 5, "rows": 3, "length": 6}
LLAMA = {"depth": 2, "activation": "silu", "norm_eps": 1e-3, "latent": 5, "rows": 3, "length": 6}
GROUPED = {"seed": 2, "width": 24, "heads": 6, "kv_heads": 2, "rope_theta": 100.0, "tied": True}
UNTIED = {"seed": 3, "width": 16, "heads": 4, "kv_heads": 4, "rope_theta": 10000.0, "tied": False}
CASES = {
    "bert_gelu": reference.bert_case(**BERT, heads=4, activation="gelu"),
    "bert_relu": reference.bert_case(**BERT, heads=8, activation="relu"),
    "gpt2_gelu_tanh": reference.gpt2_case(**GPT2, heads=4, activation="gelu_tanh"),
    "gpt2_silu": reference.gpt2_case(**GPT2, heads=1, activation="silu"),
    "llama_grouped": reference.llama_case(**LLAMA, **GROUPED),
    "llama_untied": reference.llama_case(**LLAMA, **UNTIED),
    "minilm": reference.minilm_case(),
    "smollm2": reference.smollm2_case(),
}

for name, case in CASES.items():
    np.savez_compressed(HERE / f"{name}.npz", **case)
    print(f"{name}.npz {(HERE / f'{name}.npz').stat().st_size / 1024:.0f} KB")
