"""The ablation command on the config of tests/micro.py; random parameters stand for trained ones."""

import dataclasses
import itertools
import json
from pathlib import Path

import micro
import pytest
import runs
from test_generate import fails

from miracle_jax import ablation
from miracle_jax.config import load_file


@pytest.fixture
def trained(tiny_run, monkeypatch):
    """The configs that were trained, by the names of their folders."""
    configs = {}

    def train(config, workdir):
        configs[Path(workdir).name] = config
        Path(workdir).mkdir(parents=True)
        parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("loss", "sample")}
        runs.write(Path(workdir), tiny_run.workdir, **parts)

    monkeypatch.setattr(ablation, "train", train)
    return configs


def test_every_part_is_left_out_once_and_all_become_one_table(trained, tiny_run, tmp_path, capsys):
    personalities = list(itertools.product((0, 1), repeat=3))
    records = [micro.dialogue(n, "I saw the {}.", list(tag)) for n, tag in enumerate(personalities)]
    data = micro.write_lines(tmp_path / "labelled.jsonl", records)
    folder = tmp_path / "ablation"
    arguments = ["--config", micro.__file__, "--workdir", str(folder), *tiny_run.flags, "--train.steps", "50"]
    ablation.main([*arguments, "--", "--data", data])
    base = trained["miracle"]
    assert base.train.steps == 50 and base.sample.heads == "refit" and base.loss == load_file(micro.__file__).loss
    for name, changed in (
        ("no_posterior", {"posterior": False}), ("no_gap", {"gap": 0.0}), ("no_classify", {"classify": 0.0})
    ):  # fmt: skip
        assert trained[name] == dataclasses.replace(base, loss=dataclasses.replace(base.loss, **changed))
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    order = ["miracle", "miracle w/o energy", "no_posterior", "no_gap", "no_classify", "references"]
    assert list(report["systems"]) == order and report["setup"]["contexts"] == 8
    assert all(report["systems"][name]["settings"]["sample.heads"] == "refit" for name in order[:-1])
    assert f"report: {folder / 'evaluation' / 'report.md'}" in capsys.readouterr().out


def test_mistakes_are_found_before_anything_is_trained(trained, tmp_path, capsys):
    arguments = ["--config", micro.__file__, "--workdir", tmp_path / "out"]
    for flags, message in (
        (
            ["--train.refit-epochs", 0],
            "train.refit_epochs is 0, but every row of the ablation takes the refitted heads",
        ),
        (["--", "--judges", tmp_path], f"{tmp_path} holds no judges"),
        (["--", "--predictions", "a"], "--predictions 'a' is not of the form NAME=FILE.jsonl"),
        (["--", "--out", "gs://bucket/out"], "--out gs://bucket/out is not a local path"),
    ):
        assert fails(ablation.main, capsys, *arguments, *flags).startswith(message)
    assert fails(ablation.main, capsys, *arguments[:2]).startswith("--workdir is missing")
    assert trained == {} and not (tmp_path / "out").exists()
