"""Several processes of one command on this machine, as a launcher would start them."""

import os
import socket
import subprocess
import sys

import micro


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(*command, processes: int = 1, devices: int = 1) -> list[subprocess.CompletedProcess]:
    """Runs Python with this command line (`-m`, module, flags) in so many processes, each with so many virtual devices,
    to their ends."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env, coordinator = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, f"127.0.0.1:{free_port()}"
    running = []
    for i in range(processes):
        place = ["--coordinator", coordinator, "--processes", str(processes), "--process", str(i)]
        running.append(
            subprocess.Popen(
                [sys.executable, *map(str, command), *place], env=env, cwd=micro.ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
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
