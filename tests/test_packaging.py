"""What installs: the launch scripts, the files that ship with the package, and what it pulls in."""

import importlib.metadata
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Stands in for Python: answers `-m venv` and `-m pip`, and writes down what pip was asked for.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    --version) echo "Python VERSION" ;;
    "-c "*) exit SUITABLE ;;
    "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip install "*) echo "$*" >>pip.log; [[ ! -e pip-fails ]] ;;
    *) exit 99 ;;
esac
"""


def run(*command, cwd, **variables):
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"], **variables}
    )


@pytest.fixture
def checkout(tmp_path):
    """The scripts and pyproject.toml in a folder of their own."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def fake_python(folder: Path, version: str, suitable: bool = True) -> str:
    path = folder / f"python-{version}"
    path.write_text(FAKE_PYTHON.replace("VERSION", version).replace("SUITABLE", str(int(not suitable))))
    path.chmod(0o755)
    return f"PYTHON={path}"


@pytest.mark.parametrize(
    "script", ["launch/setup.sh", "launch/quickstart.sh", "launch/test.sh", "launch/bench.sh", ".ci/run"]
)
def test_scripts_parse(script):
    done = run("bash", "-n", str(ROOT / script), cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["setup.sh", "quickstart.sh", "test.sh", "bench.sh"])
def test_help_comes_from_any_folder_and_installs_nothing(checkout, script):
    elsewhere = checkout / "elsewhere"
    elsewhere.mkdir()
    done = run("bash", f"../launch/{script}", "--help", cwd=elsewhere)
    assert done.returncode == 0 and done.stderr == ""
    assert f"  bash launch/{script} [PYTHON=python3.12]" in done.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("script", ["setup.sh", "quickstart.sh", "test.sh", "bench.sh"])
def test_an_old_or_absent_python_is_one_sentence(checkout, script):
    old = fake_python(checkout, "3.10.4", suitable=False)
    done = run("bash", f"launch/{script}", old, cwd=checkout)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert re.match(r"error: miracle_jax needs Python 3\.11 or newer .* is Python 3\.10\.4; install one", done.stderr)
    done = run("bash", f"launch/{script}", "PYTHON=/no/such/python", cwd=checkout)
    assert done.returncode == 2 and "/no/such/python is not there" in done.stderr
    assert not (checkout / ".venv").exists()


def test_installs_once_and_again_when_something_changed(checkout):
    def set_up(*arguments):
        done = run("bash", "launch/setup.sh", *arguments, cwd=checkout)
        assert done.returncode == 0, done.stderr
        log = checkout / "pip.log"
        asked = [line.split()[-1] for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return asked

    first, second = fake_python(checkout, "3.11.7"), fake_python(checkout, "3.12.1")
    assert set_up(first) == ["."]
    assert set_up() == []  # .venv is there: no other Python is looked for
    assert set_up("test", "gcs") == [".[test,gcs]"]
    assert set_up("test") == []
    with open(checkout / "pyproject.toml", "a") as file:
        file.write("\n# changed\n")
    assert set_up("test") == [".[test]"]
    assert set_up(first) == []
    assert set_up(second) == ["."]  # another Python: a new environment
    assert set_up("test") == [".[test]"]


def test_a_failed_installation_is_said_and_tried_again(checkout):
    python = fake_python(checkout, "3.11.7")
    (checkout / "pip-fails").touch()
    done = run("bash", "launch/quickstart.sh", python, cwd=checkout)
    assert done.returncode == 2 and "error: pip could not install the package" in done.stderr
    (checkout / "pip-fails").unlink()
    assert run("bash", "launch/setup.sh", cwd=checkout).returncode == 0
    assert len((checkout / "pip.log").read_text().splitlines()) == 2


def test_mistyped_arguments_are_refused(checkout):
    python = fake_python(checkout, "3.11.7")
    done = run("bash", "launch/setup.sh", python, "cuda12", cwd=checkout)
    assert done.returncode == 2 and "unknown extra cuda12; pyproject.toml has: cuda tpu" in done.stderr
    done = run("bash", "launch/quickstart.sh", "--steps", cwd=checkout)
    assert done.returncode == 2 and "unknown argument --steps" in done.stderr
    assert not (checkout / ".venv").exists()


def test_every_file_of_the_package_ships():
    package = ROOT / "miracle_jax"
    here = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["miracle_jax"]
    shipped = {path for pattern in ["*.py", *patterns] for path in package.glob(pattern)}
    assert here == shipped
    for name in ("attributes.toml", "corpus/README.md", "corpus/test/personality.jsonl"):
        assert importlib.resources.files("miracle_jax").joinpath(name).read_text(encoding="utf-8")


def test_no_dependency_asks_for_torch_or_tensorflow():
    wanted = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    seen = {}
    while wanted:
        requirement = wanted.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        new = {"", *requirement.extras} - seen.get(name, set())
        if not new:
            continue
        seen[name] = seen.get(name, set()) | new
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in new):
                wanted.append(needed)
    assert len(seen) > 40  # the walk went past the first level
    assert not {"torch", "tensorflow", "tensorflow-cpu"} & set(seen)


def test_model_sampler_and_decoding_import_without_the_data_libraries():
    unwanted = {"tensorflow_datasets", "grain", "tyro", "gguf", "torchode"}
    code = "import sys, miracle_jax.cvae, miracle_jax.sampler, miracle_jax.decode; print(*sys.modules)"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not unwanted & set(done.stdout.split())
