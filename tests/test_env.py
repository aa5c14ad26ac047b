"""The report for bug reports: what it says, and that it comes whatever is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import miracle_jax
from miracle_jax import env

ROOT = Path(__file__).resolve().parent.parent


def test_names_versions_devices_and_flags(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("SECRET_TOKEN", "not for a bug report")
    env.main()
    text = capsys.readouterr().out
    assert text.startswith("```\n") and text.endswith("```\n")
    rows = dict(line.split("  ", 1) for line in text.splitlines()[1:-1])
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["miracle-jax"].startswith(miracle_jax.__version__)
    assert rows["python"].startswith(sys.version.split()[0])
    assert rows["jax"] == jax.__version__
    assert rows["jax devices"] == "cpu: 3 x cpu"  # the flags reach the process that asks
    assert rows["XLA_FLAGS"] == "--xla_force_host_platform_device_count=3"
    assert "not for a bug report" not in text


def test_comes_without_any_dependency():
    """-S: no site-packages, as if nothing were installed."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from miracle_jax import env; "
    code += "env.ASK_JAX = 'import sys; sys.modules[\\'jax\\'] = None' + env.ASK_JAX; env.main()"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["jax", "missing"] in lines and ["grain", "missing"] in lines
    assert "none, JAX failed: ModuleNotFoundError" in done.stdout
    assert not any(line[0] in env.OPTIONAL for line in lines)  # optional ones are listed only where they are


def test_a_command_that_fails_hangs_or_is_missing_costs_one_line():
    run = [sys.executable, "-c"]
    assert env.output_of([*run, "print('yes')"]) == (True, "yes")
    assert env.output_of([*run, "raise SystemExit('first\\nlast')"]) == (False, "last")
    assert env.output_of([*run, "raise SystemExit(3)"]) == (False, "ended with status 3")
    assert env.output_of([*run, "import time; time.sleep(60)"], timeout=0.5) == (False, "no answer within 0.5 s")
    assert env.output_of(["no-such-command"]) == (False, "No such file or directory")


def test_a_container_limit_below_the_memory_is_named(tmp_path):
    limit = tmp_path / "memory.max"
    limit.write_text("536870912\n")
    assert env.memory(limit).endswith("GiB, limited to 0.5 GiB")
    limit.write_text("max\n")
    assert "limited" not in env.memory(limit)
    assert "limited" not in env.memory(tmp_path / "absent")


def test_a_container_limit_below_the_cores_is_kept(tmp_path):
    limit, all_cores = tmp_path / "cpu.max", env.usable_cores(tmp_path / "absent")
    assert all_cores >= 1
    for text, cores in (("max 100000\n", all_cores), ("50000 100000\n", 1), (f"{10**9} 100000\n", all_cores)):
        limit.write_text(text)
        assert env.usable_cores(limit) == cores


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_commit_is_that_of_the_checkout_itself(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    assert env.commit(tmp_path) == ""
    git("init")
    assert env.commit(tmp_path) == ""  # nothing committed yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD").stdout
    assert head.startswith(env.commit(tmp_path)) and len(env.commit(tmp_path)) >= 7
    (tmp_path / "file").write_text("2")
    assert env.commit(tmp_path).endswith("-dirty")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert env.commit(inside) == ""  # installed below somebody else's checkout
