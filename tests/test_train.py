"""Whole training runs of tests/micro.py: the real command, its resumption after SIGKILL, and what it refuses.

What a single step computes is tested in test_losses.py, test_cvae.py and test_mesh.py.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import orbax.checkpoint as ocp
import processes
import pytest
from flax import nnx
from small import CONFIG, SIZES, random_batch

import miracle_jax as mj
from miracle_jax import config, dataset, loop, pipeline, train
from miracle_jax.attributes import Attribute, Schema
from miracle_jax.checkpoint import Checkpoints
from miracle_jax.command_line import read_config
from miracle_jax.cvae import Miracle, Outputs
from miracle_jax.decoder import LmHead
from miracle_jax.errors import UserError
from miracle_jax.latent import Gaussian

ONE_BUCKET = ["--data.buckets", "32", "40", "16"]
SHORT = [
    *ONE_BUCKET, "--train.batch-size", "16", "--train.accumulate", "2", "--train.steps", "6", "--train.eval-every", "3",
    "--train.save-every", "6", "--train.log-every", "4",
]  # fmt: skip


GIVEN = ["--workdir", "x", "--config", micro.__file__]


def train_here(arguments) -> dict:
    """What the command does, in this process."""
    settings, _, workdir = read_config("", "", list(map(str, arguments)))
    return train.train(settings, workdir)


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def saved(path):
    return ocp.StandardCheckpointer().restore(path)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The flags of the micro corpus."""
    return micro.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def steps_made(monkeypatch):
    """The jitted training steps of the runs that follow."""
    made, make = [], train.make_train_step

    def spy(*arguments):
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(train, "make_train_step", spy)
    return made


# ------------------------------------------------------------------------------------------------ the real command


def test_the_command_leaves_everything_a_run_is_made_of(tiny_run):
    names = {path.name for path in tiny_run.workdir.iterdir()}
    assert names == {
        "config.json", "schema.toml", "tokenizers", "checkpoints", "model", "model.json", "metrics.jsonl",
        "training.png", ".lock",
    }  # fmt: skip
    assert {path.name for path in (tiny_run.workdir / "checkpoints").iterdir()} == {"40", "60"}
    assert (tiny_run.workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tiny_run.workdir / "model.json").read_text())
    assert facts["step"] == 60 and set(facts["accuracy"]) == {"joint", "refit"} and facts["heads"] in facts["accuracy"]
    assert set(facts["accuracy"]["joint"]["attribute"]) == set(micro.REPLIES)
    assert set(facts["accuracy"]["joint"]["turn"]) == {"1", "2"}


def test_metrics_tell_every_loss_at_every_interval_and_training_learns(tiny_run):
    rows = tiny_run.metrics()
    learned = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in learned] == [7, 14, 20, 21, 28, 35, 40, 42, 49, 56, 60]
    parts = {"reconstruct", "kl", "classify", "gap", "gradient_norm", "learning_rate"}
    assert all(parts <= set(row) and np.isfinite(list(row.values())[2:]).all() for row in learned)
    validated = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in validated] == [20, 40, 60]
    for row in validated:
        assert row["score"] == pytest.approx(row["reconstruct_prior"] + 0.5 * row["classify"])
        assert {f"accuracy_{name}" for name in micro.REPLIES} | {"reconstruct_posterior", "kl_raw"} <= set(row)
        assert row["kl_raw"] >= row["kl_floored"] > 0
    assert learned[-1]["reconstruct"] < 0.5 * learned[0]["reconstruct"]
    assert validated[-1]["score"] < validated[0]["score"]


def test_without_a_terminal_it_logs_one_readable_line_an_interval(tiny_run):
    lines = tiny_run.output.splitlines()
    assert lines[0] == "starting from random weights"
    assert "72 instances, 60 steps of 8 on 1 cpu device(s), padding " in lines[1]
    logged = [line for line in lines if line.startswith("step ")]
    assert len(logged) == 11 and logged[0].startswith("step 7/60  ") and " examples/s  ETA 0:0" in logged[0]
    assert sum(line.startswith("validation at step ") for line in lines) == 3
    assert any(line.startswith("refit heads on validation contexts: ") for line in lines)
    assert lines[-1] == f"finished: {tiny_run.workdir} holds the model of step 60"
    assert "\r" not in tiny_run.output + tiny_run.errors and "Traceback" not in tiny_run.errors


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(tiny_run, capsys):
    before = contents(tiny_run.workdir)
    facts = train_here(tiny_run.arguments)
    assert f"{tiny_run.workdir} is finished; python -m miracle_jax.generate" in capsys.readouterr().out
    assert contents(tiny_run.workdir) == before and facts == json.loads(
        before[next(p for p in before if p.name == "model.json")]
    )


# ------------------------------------------------------------------------------------------------ resuming

KILLED_WHILE_WRITING_40 = """
import os, pathlib, signal, time
from miracle_jax import train

rename = os.rename

def die(source, target, **options):
    if str(target).endswith("checkpoints/40"):
        metrics = pathlib.Path(target).parents[1] / "metrics.jsonl"
        while '"step": 56' not in metrics.read_text():  # training goes on while a checkpoint is being written
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, **options)

os.rename = die
train.main()
"""


def test_a_run_killed_by_sigkill_resumes_bit_for_bit(tiny_run, tmp_path, steps_made, capsys):
    run = micro.Run(tmp_path / "run", tiny_run.flags)
    command = [sys.executable, "-c", KILLED_WHILE_WRITING_40, *run.arguments]
    killed = subprocess.run(command, cwd=micro.ROOT, capture_output=True, text=True, timeout=250)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in (run.workdir / "checkpoints").iterdir()}
    assert "20" in left and "40" not in left and len(left) == 2
    assert max(row["step"] for row in run.metrics()) >= 56 and not (run.workdir / "model.json").exists()
    with (run.workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5')  # a line that was being written

    train_here(run.arguments)
    assert f"resuming from {run.workdir}/checkpoints/20" in capsys.readouterr().out
    assert run.metrics() == tiny_run.metrics()  # no step twice, none missing, no half line
    assert {path.name for path in (run.workdir / "checkpoints").iterdir()} == {"40", "60"}
    for part in ("checkpoints/40", "checkpoints/60", "model"):
        assert_equal_trees(saved(run.workdir / part), saved(tiny_run.workdir / part))
    assert (run.workdir / "model.json").read_bytes() == (tiny_run.workdir / "model.json").read_bytes()
    assert steps_made[0]._cache_size() == 2  # buckets


def test_another_config_is_refused_by_name_and_harmless_changes_are_not(tiny_run, capsys):
    before = contents(tiny_run.workdir)
    with pytest.raises(UserError) as error:
        train_here([*tiny_run.arguments, "--train.learning-rate", "0.5", "--loss.kl-zero", "0.5", "--train.keep", "9"])
    assert str(error.value) == (
        f"{tiny_run.workdir} holds a run with another loss.kl_zero, train.learning_rate; give the same flags to "
        "resume it, or another --workdir to start anew"
    )
    assert contents(tiny_run.workdir) == before
    settings = config.load_run(tiny_run.workdir)
    changed = config.to_dict(settings)
    changed["sample"]["rtol"] = changed["mesh"]["fsdp"] = changed["train"]["log_every"] = 3
    assert {path for path, _ in train._differences(config.to_dict(settings), changed).items()} == {
        "sample.rtol", "mesh.fsdp", "train.log_every",
    }  # fmt: skip


def test_a_run_of_an_earlier_version_is_refused_unless_it_is_finished(tiny_run, tmp_path, capsys):
    run = micro.Run(tmp_path / "run", tiny_run.flags)
    shutil.copytree(tiny_run.workdir, run.workdir)
    stored = json.loads((run.workdir / "config.json").read_text())
    del stored["config"]["data"]["pack"]
    (run.workdir / "config.json").write_text(json.dumps(stored))
    finished = run.workdir / "model.json"
    facts = finished.read_text()
    finished.unlink()
    with pytest.raises(UserError) as error:
        train_here(run.arguments)
    assert str(error.value) == (
        f"{run.workdir} holds a run of an earlier version, which had no data.pack; finish it with that version, or "
        "give another --workdir"
    )
    finished.write_text(facts)
    assert train_here(run.arguments) == json.loads(facts)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["", "~/", "../{}/"])
def test_the_same_files_under_another_spelling_are_the_same_run(tiny_run, tmp_path, monkeypatch, capsys, folder):
    run = micro.Run(tmp_path / "run", tiny_run.flags)
    shutil.copytree(tiny_run.workdir, run.workdir)
    home = tiny_run.workdir.parent
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    spelled = [flag.replace(f"={home}/", "=" + folder.format(home.name)) for flag in run.flags]
    assert spelled != run.flags and all(str(home) not in flag for flag in spelled if "=" in flag)
    facts = train_here(micro.Run(run.workdir, spelled).arguments)
    assert "is finished" in capsys.readouterr().out
    assert facts == json.loads((run.workdir / "model.json").read_text())
    data = config.load_run(run.workdir).data
    assert len(data.train) == len(data.validation) == 3
    for name, file in (item.split("=") for item in (*data.train, *data.validation)):
        assert os.path.isabs(file) and name in micro.REPLIES
        assert (home / file.rpartition("/")[2]).samefile(file)


def test_other_data_is_refused(tmp_path):
    flags = micro.write_corpus(tmp_path)
    arguments = micro.Run(tmp_path / "run", flags).arguments
    settings, _, _ = read_config("", "", arguments)
    train.start_run(settings, tmp_path / "run", pipeline.prepare(settings))
    file = tmp_path / "train_attitude.jsonl"
    file.write_text(file.read_text().replace("lost", "found"))
    with pytest.raises(UserError, match="run holds a run on other data; restore the files to resume it, or give"):
        train_here(arguments)


def test_settings_that_cannot_be_leave_no_run_behind(tiny_run, tmp_path):
    """The corrected command takes the same folder."""
    arguments = [*micro.Run(tmp_path / "run", tiny_run.flags).arguments]
    with pytest.raises(UserError, match="only 2 instances; each attribute needs one"):
        train_here([*arguments, "--train.batch-size", 2])
    assert not (tmp_path / "run" / "config.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir .*/file is a file; name a folder, which may be new"):
        train_here(micro.Run(tmp_path / "file", tiny_run.flags).arguments)


def test_a_start_that_was_cut_short_leaves_nothing_to_stumble_over(tmp_path, monkeypatch):
    """Killed among its first files: what they hold is not taken for a run's."""
    settings, *_ = read_config("", "", micro.Run(tmp_path / "run", micro.write_corpus(tmp_path)).arguments)
    (tmp_path / "run" / "tokenizers" / "encoder").mkdir(parents=True)

    class Started(Exception):
        pass

    def stop(*_):
        raise Started

    monkeypatch.setattr(train, "start_run", stop)
    with pytest.raises(Started):
        train.train(settings, tmp_path / "run")


def test_model_json_comes_last_so_that_a_run_cut_short_at_its_end_is_finished_by_the_same_command(
    tiny_run, tmp_path, monkeypatch
):
    run = micro.Run(tmp_path / "run", tiny_run.flags)
    shutil.copytree(tiny_run.workdir, run.workdir)
    for name in ("model.json", "training.png"):
        (run.workdir / name).unlink()
    shutil.rmtree(run.workdir / "model")

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(train.Report, "plot", fail)
        train_here(run.arguments)
    assert not (run.workdir / "model.json").exists()
    train_here(run.arguments)
    assert {path.name for path in run.workdir.iterdir()} == {path.name for path in tiny_run.workdir.iterdir()}
    assert (run.workdir / "model.json").read_bytes() == (tiny_run.workdir / "model.json").read_bytes()
    assert_equal_trees(saved(run.workdir / "model"), saved(tiny_run.workdir / "model"))


# ------------------------------------------------------------------------------------------------ going wrong


def test_a_nan_stops_by_name_and_step_and_the_last_checkpoint_is_intact(tiny_run, tmp_path, monkeypatch):
    make = train.make_train_step

    def poisoned(*arguments):
        step = make(*arguments)

        def take(state, batch, frozen):
            now = int(state["step"]) + 1
            state, named = step(state, batch, frozen)
            return state, named | ({"kl": named["kl"] * jnp.nan} if now == 5 else {})

        return take

    monkeypatch.setattr(train, "make_train_step", poisoned)
    run = micro.Run(tmp_path / "run", tiny_run.flags)
    with pytest.raises(UserError, match=r"^kl became nan at step 5; the last checkpoint is intact. Lower --train"):
        train_here([*run.arguments, "--train.save-every", "3"])  # and logs every 7
    assert [row["step"] for row in run.metrics()] == [3] and not (run.workdir / "model.json").exists()
    assert Checkpoints(run.workdir, keep=2).steps() == [3]
    state = saved(run.workdir / "checkpoints/3")
    assert state["step"] == 3 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--workdir is missing"),
        (["--workdir", "x", "--config", "nowhere.py"], "config file nowhere.py does not exist"),
        ([*GIVEN, "--data.train", "mood=a.jsonl"], "unknown attribute 'mood'"),
        ([*GIVEN, "--data.train", "attitude=nowhere.jsonl"], "no such data file: nowhere.jsonl"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence_and_status_2(monkeypatch, capsys, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith(f"error: {sentence}") and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_finite_names_the_value_and_the_step():
    assert loop.finite({"kl": 1.0}, 3) == {"kl": 1.0}
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"kl became {value} at step 3; the last checkpoint is intact"):
            loop.finite({"gap": 0.0, "kl": value}, 3)


# ------------------------------------------------------------------------------------------------ other runs


@pytest.fixture(scope="module")
def four_attributes(tmp_path_factory):
    """A run on the user's own schema and files, in two micro-batches a step."""
    folder = tmp_path_factory.mktemp("four")
    schema = Schema((*Schema.load().attributes, Attribute("length", ("short", "middling", "long"))))
    schema.save(folder / "schema.toml")
    length = {"length": ("Yes.", "Yes, the {}.", "Yes, the {}, and all the rest.")}
    flags = [*micro.write_corpus(folder, micro.REPLIES | length), "--data.schema", str(folder / "schema.toml")]
    run = micro.Run(folder / "run", flags)
    train_here([*run.arguments, *SHORT])
    return run, schema


def test_four_attributes_of_which_one_has_three_aspects(four_attributes):
    run, schema = four_attributes
    facts = json.loads((run.workdir / "model.json").read_text())
    assert set(facts["accuracy"]["joint"]["attribute"]) == set(schema.names)
    rows = [row for row in run.metrics() if row["split"] == "train"]
    assert [row["step"] for row in rows] == [3, 4, 6] and all(row["gap"] > 0 for row in rows)
    model = mj.load(run.workdir)
    assert model.schema == schema
    reply = model.reply(["What about the river?"], "lyrical, long")
    assert reply.personality == "lyrical, long" and reply.ok and reply.energy < reply.energy_before
    assert {name: list(p) for name, p in reply.aspects.items()} == {a.name: list(a.aspects) for a in schema.attributes}
    assert all(sum(p.values()) == pytest.approx(1, abs=1e-5) for p in reply.aspects.values())


FROZEN = """
import sys
sys.modules["grain"] = sys.modules["tensorflow_datasets"] = None  # as on a machine that lacks them
from miracle_jax import train
train.main()
assert sys.modules["grain"] is None and sys.modules["tensorflow_datasets"] is None
"""


def test_frozen_data_on_eight_devices_give_the_losses_of_one(four_attributes, tmp_path):
    """Without Grain and TFDS, in a process of its own."""
    single, _ = four_attributes
    frozen = str(tmp_path / "data.npz")
    dataset.main(["freeze", frozen, "--config", micro.__file__, *single.flags, *SHORT])
    run = micro.Run(tmp_path / "run", ["--data.frozen", frozen])
    done = subprocess.run(
        [sys.executable, "-c", FROZEN, *run.arguments, *SHORT], cwd=micro.ROOT, capture_output=True, text=True,
        env=processes.environment(8), timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on 8 cpu device(s)" in done.stdout
    ours, theirs = run.metrics(), single.metrics()
    assert [row.pop("split") for row in ours] == [row.pop("split") for row in theirs]
    assert ours == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in theirs]


def test_instances_without_a_label_are_trained_on_beside_labelled_ones(tmp_path, capsys):
    answers = micro.REPLIES["attitude"]
    labelled = micro.write_lines(tmp_path / "a.jsonl", [micro.dialogue(i, answers[i % 2], i % 2) for i in range(12)])
    unknown = micro.write_lines(tmp_path / "b.jsonl", [micro.dialogue(i, "The {}, well.", None) for i in range(24)])
    facts = train_here([
        "--config", micro.__file__, "--workdir", tmp_path / "run", *SHORT, "--data.cache", tmp_path / "cache",
        "--data.train", f"attitude={labelled}", unknown, "--data.validation", unknown,
    ])  # fmt: skip
    assert facts["accuracy"] == {"joint": {}, "refit": {}} and facts["heads"] == "joint"
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training, validation = ([row for row in rows if row["split"] == split] for split in ("train", "validation"))
    assert training and all(row["classify"] > 0 for row in training)
    assert validation and all(row["classify"] == 0 < row["score"] for row in validation)
    assert "refit heads are not measured: no validation instance has a label" in capsys.readouterr().out
    assert mj.load(tmp_path / "run").replies([{"input": ["Hi?"], "output": []}], ["optimistic"])


def test_without_a_posterior(corpus, tmp_path):
    """Appendix D; also without classification and refitting, and by epochs."""
    run = micro.Run(tmp_path / "run", corpus)
    facts = train_here([
        *run.arguments, *ONE_BUCKET, "--loss.posterior", "False", "--loss.classify", 0, "--train.steps", 0,
        "--train.epochs", 0.4, "--train.refit-epochs", 0, "--seed", 1,
    ])  # fmt: skip
    assert list(facts["accuracy"]) == ["joint"]
    rows = run.metrics()
    assert [(row["step"], row["split"]) for row in rows] == [(4, "train"), (4, "validation")]  # 0.4 of 9 steps
    assert not {"kl", "classify"} & set(rows[0]) and not {"kl_raw", "reconstruct_posterior"} & set(rows[1])
    assert "posterior" not in saved(run.workdir / "model")["miracle"]
    assert mj.load(run.workdir).reply(["What about the lamp?"], "plain").ok


def test_one_seed_gives_one_start_and_another_seed_another(corpus, tmp_path):
    def batches_and_first_step(seed):
        settings, *_ = read_config("", "", [*micro.Run(tmp_path, corpus).arguments, "--seed", str(seed)])
        batches = pipeline.Batches(pipeline.prepare(settings).train, settings.data.buckets, 8, 1, settings.seed)
        return [batches[step] for step in range(9)], toy_step(batches_of=[random_batch(1, 8)] * 2, seed=seed)

    first, again, other = map(batches_and_first_step, (0, 0, 1))
    assert_equal_trees(first, again)
    assert any(a["context"].shape != b["context"].shape or (a["context"] != b["context"]).any()
               for a, b in zip(first[0], other[0], strict=True))  # fmt: skip
    assert float(first[1][0]["reconstruct"]) != float(other[1][0]["reconstruct"])


# ------------------------------------------------------------------------------------------------ the step


class Toy(nnx.Module):
    """Stands in for Miracle: quick to compile, every loss has a gradient, z is noisy."""

    def __init__(self):
        rng = np.random.default_rng(0)

        def parameter(*shape):
            return nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32))

        self.table, self.by_z = parameter(20, 18), parameter(6, 18)
        self.to_prior, self.to_posterior, self.heads = parameter(20, 12), parameter(20, 12), parameter(6, 9)

    def __call__(self, batch, key, noise):
        prior = Gaussian(*jnp.split(self.to_prior[batch["context"]].mean(1), 2, axis=-1))
        posterior = Gaussian(*jnp.split(self.to_posterior[batch["joint"]].mean(1), 2, axis=-1))
        z = posterior.sample(key, noise)
        scores = self.table[batch["reply"]] + (z @ self.by_z[...])[:, None]
        return Outputs(prior, posterior, z, scores, LmHead(jnp.eye(18)), (z @ self.heads[...]).reshape(len(z), 3, 3))


def toy_step(batches_of, seed=0, **loss):
    """(losses of the first step, state after the last). KL weight and noise are on from the start unless said."""
    settings = config.Config(
        seed=seed, loss=config.Loss(**({"kl": 0.3, "classify": 0.5, "gap": 0.7, "kl_zero": 0.0} | loss))
    )
    graphdef, params = nnx.split(Toy())
    params, optimizer = nnx.to_pure_dict(params), optax.sgd(0.1)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
    step = train.make_train_step(settings, graphdef, optimizer, train.Keys.of(settings.seed).steps)
    named = []
    for batch in batches_of:
        state, values = step(state, batch)
        named.append(values)
    return jax.device_get((named[0], state))


def test_micro_batches_add_up_to_the_step_of_the_whole_batch():
    """But for the distance between attributes, which is by definition that of a micro-batch, and the noise."""
    whole = random_batch(1, 8)
    halves = {name: array.reshape(2, 4, *array.shape[2:]) for name, array in whole.items()}
    quiet = {"gap": 0.0, "kl_zero": 1.0}
    (named, state), (named_halves, state_halves) = toy_step([whole], **quiet), toy_step([halves], **quiet)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), named, named_halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, state_halves)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state["params"], nnx.to_pure_dict(nnx.state(Toy())))
    assert min(moved["table"], moved["heads"], moved["to_posterior"]) > 1e-4


def test_a_step_that_is_left_out_changes_nothing_and_the_others_are_as_without_the_setting():
    settings = config.Config(loss=config.Loss(kl=0.3, classify=0.5, gap=0.7, kl_zero=0.0))
    skipping = dataclasses.replace(settings, train=config.Train(on_nan="skip"))
    graphdef, params = nnx.split(Toy())
    params, optimizer = jax.tree.map(np.array, nnx.to_pure_dict(params)), optax.adam(0.1)
    batch = random_batch(1, 8)

    def after(settings, params):
        state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(4)}
        step = train.make_train_step(settings, graphdef, optimizer, train.Keys.of(0).steps)
        return jax.device_get(step(jax.tree.map(jnp.array, state), batch))

    (plain, named), (same, named_too) = after(settings, params), after(skipping, params)
    assert not named_too.pop("skipped")
    assert_equal_trees((plain, named), (same, named_too))
    for wrong in (np.nan, np.inf, 1e7):
        params["table"][0, 0] = wrong
        state, named = after(skipping, params)
        assert named["skipped"] and state["step"] == 5
        assert_equal_trees(state["params"], params)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(state["opt_state"]))


def test_micro_batches_draw_different_noise():
    batch = random_batch(1, 4)
    twice = {name: np.concatenate([array, array]) for name, array in batch.items()}
    once, both = toy_step([batch])[0], toy_step([twice])[0]
    assert abs(once["reconstruct"] - both["reconstruct"]) > 1e-4


def test_a_step_takes_over_the_memory_of_its_state():
    settings = config.Config()
    graphdef, params = nnx.split(Toy())
    optimizer, _ = train.make_optimizer(settings, 10)
    params = nnx.to_pure_dict(params)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
    step = train.make_train_step(settings, graphdef, optimizer, train.Keys.of(0).steps)
    batch = jax.tree.map(jnp.asarray, random_batch(1, 4))
    memory = step.lower(state, batch).compile().memory_analysis()
    old = jax.tree.leaves((state["params"], state["opt_state"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of what was given and not used
        new, _ = step(state, batch)
    assert len(old) > 3 * len(jax.tree.leaves(params)) and all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))
    if memory is not None:
        assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(new))


def equations(jaxpr) -> int:
    """How many there are in a program and in the programs inside it: bodies of loops, functions that it calls."""
    inside = jax.tree.leaves([list(e.params.values()) for e in jaxpr.eqns], is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    return len(jaxpr.eqns) + sum(equations(leaf) for leaf in inside if hasattr(leaf, "eqns"))


def test_a_deeper_model_is_not_a_longer_program():
    """Of the whole training step, so that compiling takes as long for twelve layers as for two."""

    def traced(encoder, decoder):
        settings = dataclasses.replace(
            CONFIG, encoder=dataclasses.replace(CONFIG.encoder, depth=encoder),
            decoder=dataclasses.replace(CONFIG.decoder, depth=decoder),
        )  # fmt: skip
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Miracle(settings, SIZES, nnx.Rngs(0))))
        optimizer, _ = train.make_optimizer(settings, 10)
        params = nnx.to_pure_dict(params)
        state = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params), "step": jnp.int32(0)}
        step = train.make_train_step(settings, graphdef, optimizer, train.Keys.of(0).steps)
        assert params["prior"]["bert"]["layers"]["blocks"]["mlp_in"]["kernel"].shape[0] == encoder
        return equations(jax.make_jaxpr(step)(state, random_batch(1, 3)).jaxpr)

    two = traced(2, 2)
    assert two > 500 and traced(6, 2) == traced(2, 6) == two


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 100])
def test_the_learning_rate_is_linear_on_both_sides_of_its_peak_and_no_step_is_without(steps, warmup):
    settings = config.Config(train=config.Train(learning_rate=2.0, warmup=warmup))
    _, schedule = train.make_optimizer(settings, steps)
    rates = [float(schedule(step)) for step in range(steps + 1)]
    warm = max(round(warmup * steps), 1)
    assert rates[:warm] == pytest.approx([2.0 * (i + 1) / warm for i in range(warm)], abs=1e-6)
    left = steps - warm + 1  # from the peak to 0, which comes after the last step
    assert rates[warm - 1 :] == pytest.approx([2.0 * (1 - i / left) for i in range(left + 1)], abs=1e-6)
    assert max(rates) == rates[warm - 1] == pytest.approx(2.0) and min(rates[:-1]) >= 2.0 / steps - 1e-6


def test_every_use_of_randomness_has_a_key_of_its_own():
    def words(keys):
        return [tuple(jax.random.key_data(key).tolist()) for key in keys]

    keys = [train.Keys.of(seed) for seed in (0, 1, 2)]
    assert len({key for of_seed in keys for key in words(of_seed)}) == 12
    assert words(train.Keys.of(0)) == words(keys[0])
    for init, steps, *others in keys:
        of_steps = words(jax.random.fold_in(steps, n) for n in range(10))
        assert len(set(of_steps)) == 10 and not set(of_steps) & set(words([init, steps, *others]))


def test_clipping_is_by_the_global_norm():
    settings = config.Config(train=config.Train(learning_rate=1.0, warmup=0.0, clip=1.0))
    optimizer, _ = train.make_optimizer(settings, 10)
    big = {"a": jnp.full(4, 1e3), "b": jnp.full(4, -1e3)}
    state = optimizer.init(big)
    _, state = optimizer.update(big, state, big)
    first_moment = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(first_moment)) == pytest.approx(0.1, rel=1e-4)  # (1 - beta1) of a gradient of norm 1


# ------------------------------------------------------------------------------------------------ stage 2


def test_refitting_learns_what_the_latents_tell_and_leaves_unknown_labels_alone():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(240, 8)).astype(np.float32)
    labels = np.full((240, 2), -1, np.int32)
    labels[::2, 0] = z[::2, 0] > 0
    labels[1::2, 1] = np.digitize(z[1::2, 1], [-0.5, 0.5])
    settings = config.Config(
        latent=config.Latent(size=8, hidden=16), train=config.Train(refit_epochs=60, refit_learning_rate=1e-2)
    )
    data = {"z": z, "labels": labels, "turn": np.arange(240) % 2 + 1}
    params = train.refit(settings, (2, 3), data, jax.random.key(0))
    assert_equal_trees(params, train.refit(settings, (2, 3), data, jax.random.key(0)))
    graph = nnx.graphdef(nnx.eval_shape(lambda: train.Heads(settings.latent, (2, 3), nnx.Rngs(0))))
    accuracy = train.head_accuracy(graph, params, data, ("sign", "band"))
    assert accuracy["attribute"]["sign"] > 0.95 and accuracy["attribute"]["band"] > 0.9
    assert accuracy["mean"] == pytest.approx(np.mean(list(accuracy["attribute"].values())))
    assert set(accuracy["turn"]) == {1, 2} and accuracy["turn"][1] == accuracy["attribute"]["sign"]
