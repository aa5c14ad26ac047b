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


def run(module: str, *arguments: str, processes: int = 1, devices: int = 1) -> list[subprocess.CompletedProcess]:
    """Runs `python -m module` in so many processes, each with so many virtual devices, to their ends."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env, coordinator = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, f"127.0.0.1:{free_port()}"
    commands = [[sys.executable, "-m", module, *map(str, arguments)] for _ in range(processes)]
    for i, command in enumerate(commands if processes > 1 else ()):
        command += ["--coordinator", coordinator, "--processes", str(processes), "--process", str(i)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=env, cwd=micro.ROOT, **pipes) for command in commands]
    try:
        ended = [(process.communicate(timeout=240), process) for process in running]
    finally:
        for process in running:
            process.kill()
    return [subprocess.CompletedProcess(process.args, process.returncode, *said) for said, process in ended]


def succeed(*arguments, **how) -> list[subprocess.CompletedProcess]:
    """`run`, all of whose processes have to end well."""
    done = run(*arguments, **how)
    for process in done:
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-5000:]
    return done
