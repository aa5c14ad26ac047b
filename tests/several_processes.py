"""Several processes on every mesh, and all that they answer: minutes of work, so not in the suite.

python -m pytest tests/several_processes.py
"""

import json

import micro
import processes
import pytest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return micro.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory):
    """Losses on one device."""
    return processes.train(tmp_path_factory.mktemp("one") / "run", corpus)


FSDP, BOTH, MODEL = ("--mesh.fsdp", "4"), ("--mesh.fsdp", "2", "--mesh.model", "2"), ("--mesh.model", "2")


@pytest.mark.parametrize(
    ("flags", "number", "devices"),
    [
        ((), 2, 2),
        (FSDP, 2, 2),
        (BOTH, 2, 2),
        (MODEL, 2, 1),  # both processes hold all rows
        ((), 1, 4),
        (FSDP, 1, 4),
    ],
)
def test_the_losses_are_those_of_one_device(corpus, one, tmp_path, flags, number, devices):
    processes.assert_same_losses(
        processes.train(tmp_path / "run", corpus, *flags, processes=number, devices=devices), one
    )


def test_three_devices_generate_the_file_of_one(tiny_run, tmp_path):
    flags = [tiny_run.workdir, "--data", processes.contexts(tmp_path), "--samples", "2", "--decode.max-new-tokens", "6"]
    for devices in (1, 3):
        processes.succeed("miracle_jax.generate", *flags, "--out", tmp_path / str(devices), devices=devices)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


def test_two_processes_write_the_evaluation_of_one(tiny_run, tmp_path):
    found, contexts = [], processes.contexts(tmp_path)
    for number in (1, 2):
        out = tmp_path / str(number)
        flags = ["--data", contexts, "--decode.max-new-tokens", "6", "--out", out]
        processes.succeed("miracle_jax.evaluate", tiny_run.workdir, *flags, processes=number)
        replies = {path.name: path.read_bytes() for path in (out / "replies").glob("*.jsonl")}
        found.append(((out / "details.jsonl").read_bytes(), replies))
    assert found[0] == found[1] and len(found[0][1]) == 2


def test_two_processes_train_a_baseline_and_answer_in_order(corpus, tmp_path):
    found = []
    for number in (1, 2):
        run = micro.Run(tmp_path / str(number), [*corpus, *processes.QUICK])
        flags = ["--control", "tokens", "--decode.batch-size", "4"]
        processes.succeed("miracle_jax.baseline", *run.arguments, *flags, processes=number)
        found.append([json.loads(line)["id"] for line in (run.workdir / "replies.jsonl").read_text().splitlines()])
        assert len(run.metrics()) == 21
    assert found[0] == found[1]
