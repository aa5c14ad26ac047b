"""Versions, machine and devices in one block to paste into a bug report: `python -m miracle_jax.env`.

It needs only the standard library: a missing or broken dependency is often what the report is about. JAX is asked in
a process of its own, so that a driver that crashes or hangs costs a line, not the report.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import miracle_jax

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "diffrax", "equinox", "orbax-checkpoint", "numpy", "grain", "tensorflow-datasets",
    "array-record", "transformers", "tokenizers", "tyro",
)  # fmt: skip
OPTIONAL = (
    "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu", "gcsfs",
    "tensorboardX", "trackio", "torch", "tensorflow",
)  # fmt: skip
VARIABLES = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "LIBTPU_INIT_ARGS")
PREFIXES = ("JAX_", "XLA_", "NCCL_")

ASK_JAX = """
import jax
kinds = [device.device_kind for device in jax.local_devices()]
print(jax.default_backend() + ":", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)))
"""


def output_of(command: list[str], timeout: float = 60) -> tuple[bool, str]:
    """Runs a command: (True, what it printed) or (False, one line that says why not)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except OSError as error:
        return False, error.strerror or str(error)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:g} s"
    if done.returncode:
        return False, (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    return True, done.stdout.strip()


def version(distribution: str) -> str:
    """The installed version of a distribution, "" if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit(root: Path) -> str:
    """Short hash of the commit checked out at `root`, with "-dirty" if files differ from it; "" without a checkout."""
    if not (root / ".git").exists():  # the package may be installed somewhere inside another project's checkout
        return ""
    found, text = output_of(["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"])
    return text if found else ""


def usable_cores(limit_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores of this machine that this process may use, and its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = limit_file.read_text().partition(" ") if limit_file.exists() else ("max", "", "")
    return min(cores, -(-int(quota) // int(period))) if quota.isdecimal() else cores


def cpu() -> str:
    """Model and cores, for instance "AMD EPYC, 2 of 64 cores usable"."""
    model, total = platform.processor() or platform.machine(), os.cpu_count() or 1
    if sys.platform == "darwin":
        found, text = output_of(["sysctl", "-n", "machdep.cpu.brand_string"])
        model = text if found else model
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {usable_cores()} of {total} cores usable"


def memory(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> str:
    """Physical memory, and the container's limit where it is lower."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{total / 2**30:.1f} GiB"
    limit = limit_file.read_text().strip() if limit_file.exists() else "max"
    if limit.isdecimal() and int(limit) < total:
        text += f", limited to {int(limit) / 2**30:.1f} GiB"
    return text


def report() -> list[tuple[str, str]]:
    """(name, value) pairs, in the order in which a reader wants them."""
    root = Path(__file__).resolve().parent.parent
    revision = commit(root)
    rows = [
        ("miracle-jax", miracle_jax.__version__ + (f", commit {revision}" if revision else "")),
        ("python", f"{platform.python_version()} {platform.python_implementation()}"),
        ("os", platform.platform()),
        ("cpu", cpu()),
        ("memory", memory()),
    ]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        rows += [("nvidia gpu", line) for line in output_of(query)[1].splitlines()]
    found, devices = output_of([sys.executable, "-c", ASK_JAX])
    rows += [("jax devices", devices if found else f"none, JAX failed: {devices}")]
    rows += [(name, version(name) or "missing") for name in PACKAGES]
    rows += [(name, version(name)) for name in OPTIONAL if version(name)]
    rows += [(name, os.environ[name]) for name in sorted(os.environ) if name in VARIABLES or name.startswith(PREFIXES)]
    return rows


def main() -> None:
    rows = report()
    width = max(len(name) for name, _ in rows)
    print("```")  # a code block where issues are written in Markdown
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    print("```")


if __name__ == "__main__":
    main()
