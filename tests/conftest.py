"""What all tests share."""

import importlib.util
import os
import signal
import subprocess
import tempfile

import micro
import pytest

# Compiling takes most of the tests' time, and programs this small gain nothing from optimisation, nor from the fusion
# emitters, which take three times as long. What one test (or a process that it starts) has compiled, others find in the
# cache.
COMPILED = tempfile.TemporaryDirectory(prefix="miracle-jax-compiled-")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


# Shells start what runs in the background with SIGINT ignored, and so would all processes be that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    about = "mutated inputs for tests/test_fuzz.py, in place of the suite's few and other than these"
    parser.addoption("--examples", type=int, default=0, help=about)


LONGEST = ("train", "cluster", "chaos", "pretrained", "export", "evaluate", "baseline", "mesh", "frozen", "convert")
"""The files that take half a minute and more. Several processes begin with them, so that all end at the same time."""


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if importlib.util.find_spec("torch"):
        return
    for item in items:
        if item.get_closest_marker("torch"):
            item.add_marker(pytest.mark.skip(reason="PyTorch is not installed; launch/test.sh --with-torch adds it"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> micro.Run:
    """A finished run of tests/micro.py by the real command. Tests read it; those that change it take a copy."""
    folder = tmp_path_factory.mktemp("tiny")
    run = micro.Run(folder / "run", micro.write_corpus(folder))
    done = subprocess.run(run.command, cwd=micro.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run.output, run.errors = done.stdout, done.stderr
    return run


@pytest.fixture(scope="session")
def tiny_model(tiny_run):
    """Its model."""
    import miracle_jax as mj

    return mj.load(tiny_run.workdir)
