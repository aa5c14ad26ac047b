"""The shapes in the signatures are true: jaxtyping checks them while every part of the model runs once."""

import subprocess
import sys

import micro


def test_signatures_hold_at_run_time():
    done = subprocess.run([sys.executable, "tests/shapes.py"], cwd=micro.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
