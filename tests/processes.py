"""Several processes of one command on this machine, as a launcher would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import micro


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with so many virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def places(number: int) -> list[list[str]]:
    """The flags by which so many processes of one command find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    return [["--coordinator", coordinator, "--processes", str(number), "--process", str(i)] for i in range(number)]


def run(*command, processes: int = 1, devices: int = 1) -> list[subprocess.CompletedProcess]:
    """Runs Python with this command line (`-m`, module, flags) in so many processes, each with so many virtual devices,
    to their ends."""
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command), *place], env=environment(devices), cwd=micro.ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for place in places(processes)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(running, said, strict=True)
    ]


def succeed(module: str, *arguments, **how) -> list[subprocess.CompletedProcess]:
    """`run` of a module, all of whose processes have to end well."""
    done = run("-m", module, *arguments, **how)
    for process in done:
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-5000:]
    return done


QUICK = [
    "--train.steps", "20", "--train.log-every", "1", "--train.refit-epochs", "0", "--data.buckets", "32", "40", "16",
    "--mesh.shard-above-mb", "0.001",
]  # fmt: skip


def train(workdir: Path, corpus: list[str], *flags: str, **how) -> list[dict]:
    """metrics.jsonl of 20 steps. corpus: as of `micro.write_corpus`; how: as of `run`."""
    done = micro.Run(workdir, [*corpus, *QUICK, *flags])
    succeed("miracle_jax.train", *done.arguments, **how)
    return done.metrics()


def assert_same_losses(many: list[dict], one: list[dict]) -> None:
    """Step by step to 1e-5, and those of the validation."""
    numbers = [[{k: v for k, v in row.items() if k != "split"} for row in rows] for rows in (many, one)]
    assert [row["split"] for row in many] == [row["split"] for row in one] == ["train"] * 20 + ["validation"]
    assert numbers[0] == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in numbers[1]]


def contexts(folder: Path) -> str:
    """A data file with more contexts than two devices answer at a time."""
    lines = [micro.dialogue(i, "The {} is lost again.", i % 2) | {"id": str(i)} for i in range(600)]
    return "attitude=" + micro.write_lines(folder / "contexts.jsonl", lines)
