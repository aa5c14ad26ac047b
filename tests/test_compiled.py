"""What is compiled: kept where it should be, with the same results, and told truly."""

import logging
import os
import subprocess
import sys

import jax
import micro
import pytest

from miracle_jax import compiled
from miracle_jax.errors import one_sentence

PROGRAM = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from miracle_jax import compiled
from miracle_jax.errors import one_sentence
from small import CONFIG, miracle, random_batch

with one_sentence():
    @jax.jit
    def slopes(model, batch, key):
        return jax.grad(lambda model: model(batch, key, 1.0).logits.sum())(model)

    found = slopes(miracle(), random_batch(4), jax.random.key(0))
    print(hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))).hexdigest())
    print([program.kept for program in compiled.PROGRAMS if program.name == "slopes"])
    print(jax.config.jax_compilation_cache_dir)
"""


def test_the_next_process_finds_what_one_has_compiled_and_computes_the_same(tmp_path):
    ours = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"PYTHONPATH": os.pathsep.join([str(micro.ROOT), str(micro.ROOT / "tests")])}
    outputs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        outputs.append(done.stdout.splitlines())
    (first, compiled_now, folder), (second, read, _) = outputs
    assert (compiled_now, read) == ("[False]", "[True]") and first == second
    assert folder.startswith(str(tmp_path / "miracle_jax" / "compiled-")) and os.listdir(folder)


@pytest.fixture
def no_folder(monkeypatch):
    """JAX as it is when no variable names a cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_folder_that_the_user_names_stays():
    before = jax.config.jax_compilation_cache_dir
    assert before == os.environ["JAX_COMPILATION_CACHE_DIR"]  # these tests do not touch the user's cache
    with one_sentence():
        pass
    assert jax.config.jax_compilation_cache_dir == before


def test_switched_off_it_stays_off(no_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    compiled.keep()
    jax.config.update("jax_enable_compilation_cache", True)
    assert jax.config.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_warning(no_folder, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "miracle_jax"):
        compiled.keep()
    assert jax.config.jax_compilation_cache_dir is None
    assert caplog.messages == [
        f"{tmp_path}/file/miracle_jax/compiled-{compiled._processor()} cannot be written, so what is compiled now will "
        "be compiled again next time"
    ]


def test_every_program_is_told_once_by_name():
    before = len(compiled.PROGRAMS)

    @jax.jit
    def a_name_of_its_own(x):
        return x + 1

    for _ in range(2):
        a_name_of_its_own(1.0)
    a_name_of_its_own(jax.numpy.ones(3))
    told = [program for program in compiled.PROGRAMS[before:] if program.name == "a_name_of_its_own"]
    assert len(told) == 2 and all(0 < program.seconds < 60 for program in told)
    seconds, text = compiled.summary([compiled.Program("a", 3.0, False), compiled.Program("b", 1.4, True)])
    assert seconds == 4.4 and text == "compiling took 4 s: 2 programs, 1 of them read from the cache"


def test_an_entry_point_ends_by_telling_what_took_long(monkeypatch, capsys):
    for seconds, told in ((3.0, ""), (12.0, "compiling took 12 s: 1 programs, 0 of them read from the cache\n")):
        with one_sentence():
            compiled.PROGRAMS.append(compiled.Program("a", seconds, False))
        assert capsys.readouterr().err == told


def test_training_tells_every_bucket_shape_once(tiny_run):
    told = [line for line in tiny_run.output.splitlines() if line.startswith("train_step ")]
    assert sorted(line.split(" compiled in ")[0].split(" read from")[0] for line in told) == [
        "train_step for lengths (16, 24, 16)", "train_step for lengths (32, 40, 16)",
    ]  # fmt: skip
