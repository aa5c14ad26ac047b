"""Meshes and layouts. What needs several devices is in eight_devices.py and runs in a process that has eight."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import processes
import pytest

from miracle_jax import config, mesh
from miracle_jax.errors import UserError


def test_on_eight_virtual_devices():
    file = Path(__file__).with_name("eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=processes.environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


def test_fsdp_must_divide_the_number_of_devices():
    number = jax.device_count()
    message = f"mesh.fsdp {number + 1} does not divide the number of devices, {number}"
    with pytest.raises(UserError, match=re.escape(message)):
        mesh.make(config.Mesh(fsdp=number + 1))


def test_the_mesh_spans_all_devices():
    devices = mesh.make(config.Mesh())
    assert dict(devices.shape) == {"data": jax.device_count(), "fsdp": 1, "model": 1}


def test_one_process_puts_its_rows_as_they_are():
    devices = mesh.make(config.Mesh())
    rows = np.arange(2 * 4 * devices.size).reshape(2, -1, 2)
    np.testing.assert_array_equal(mesh.put_batch({"x": rows}, devices, batch_axis=1)["x"], rows)
