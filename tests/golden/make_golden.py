"""Writes the golden arrays beside this file: what torch's BERT and GPT-2 compute, for tests that run without torch.

    python tests/golden/make_golden.py        (written with torch 2.13.0 and transformers 5.23.0)
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import reference  # noqa: E402

BERT = {"seed": 0, "width": 16, "depth": 2, "lengths": [7, 1, 4]}
GPT2 = {"seed": 1, "width": 16, "depth": 2, "latent": 5, "rows": 3, "length": 6}
CASES = {
    "bert_gelu": reference.bert_case(**BERT, heads=4, activation="gelu"),
    "bert_relu": reference.bert_case(**BERT, heads=8, activation="relu"),
    "gpt2_gelu_tanh": reference.gpt2_case(**GPT2, heads=4, activation="gelu_tanh"),
    "gpt2_silu": reference.gpt2_case(**GPT2, heads=1, activation="silu"),
}

for name, case in CASES.items():
    np.savez_compressed(HERE / f"{name}.npz", **case)
    print(f"{name}.npz {(HERE / f'{name}.npz').stat().st_size / 1024:.0f} KB")
