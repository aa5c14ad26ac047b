"""Configs: each in the repository builds, each field is read, and every mistake is one sentence."""

import ast
import dataclasses
import functools
import json
from pathlib import Path

import jax
import pytest
from flax import nnx

from miracle_jax import config, train
from miracle_jax.command_line import read_config
from miracle_jax.config import Config, load_file, load_run
from miracle_jax.cvae import Miracle
from miracle_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
TINY = ROOT / "configs" / "tiny.py"
GROUPS = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)]


def change(settings: Config, path: str, value) -> Config:
    group, _, name = path.rpartition(".")
    if not group:
        return dataclasses.replace(settings, **{name: value})
    return dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **{name: value})})


def parse(*argv) -> Config:
    return read_config("python -m miracle_jax.train", "What it does.", ["--workdir", "w", *map(str, argv)])[0]


# ------------------------------------------------------------------------------------------------ the files


def batch_shapes(settings: Config, rows: int = 2) -> dict:
    """The largest batch of a config, (B, ...)."""
    lengths = dict(zip(("context", "joint", "reply"), settings.data.buckets[-1], strict=True))
    shapes = {name: (rows, length) for name, length in lengths.items()} | {
        f"{name}_length": (rows,) for name in lengths
    }
    return {name: jax.ShapeDtypeStruct(shape, "int32") for name, shape in shapes.items()}


def test_the_configs_that_the_readme_names_are_there():
    assert {"tiny", "base", "paper", "no_posterior", "no_gap", "no_classify", "no_energy"} <= {f.stem for f in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_builds(path):
    """Shape-only: parameters and one forward pass."""
    settings = load_file(path)
    settings.check()
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Miracle(settings, (2, 2, 2), nnx.Rngs(0))))
    out, logits = jax.eval_shape(
        lambda params, batch: ((out := nnx.merge(graphdef, params)(batch)), out.logits), params, batch_shapes(settings)
    )
    assert logits.shape == (2, settings.data.buckets[-1][2], settings.decoder.vocab_size)
    assert out.z.shape == (2, settings.latent.size) and out.attribute_logits.shape == (2, 3, 2)
    assert (out.posterior is None) == (path.stem == "no_posterior")


def test_tiny_builds_for_real():
    settings = load_file(TINY)
    params = jax.jit(lambda: nnx.state(Miracle(settings, (2, 2, 2), nnx.Rngs(0))))()
    assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_ablations_differ_from_the_paper_in_their_one_loss():
    paper = load_file(ROOT / "configs" / "paper.py")
    for stem, changed in (
        ("no_posterior", {"loss.posterior": False}), ("no_gap", {"loss.gap": 0.0}),
        ("no_classify", {"loss.classify": 0.0}), ("no_energy", {"sample.weight": 0.0}),
    ):  # fmt: skip
        expected = paper
        for path, value in changed.items():
            assert _get(paper, path) != value
            expected = change(expected, path, value)
        ablation = load_file(ROOT / "configs" / f"{stem}.py")
        assert change(ablation, "sample.heads", paper.sample.heads) == expected


def _get(settings, path):
    group, name = path.split(".")
    return getattr(getattr(settings, group), name)


# ------------------------------------------------------------------------------------------------ the fields


@functools.cache
def fields_read() -> set[str]:
    """Names of all attributes that the package reads, config.py apart."""
    found = set()
    for path in (ROOT / "miracle_jax").glob("*.py"):
        if path.name != "config.py":
            nodes = ast.walk(ast.parse(path.read_text()))
            found |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return found


@pytest.mark.parametrize("cls", [Config, *(type(getattr(Config(), group)) for group in GROUPS)])
def test_every_field_is_read_somewhere(cls):
    unread = {f.name for f in dataclasses.fields(cls)} - fields_read()
    assert not unread, f"nobody reads {cls.__name__}.{', '.join(unread)}"


def test_the_search_for_readers_can_fail():
    assert "langevin_decay" in fields_read() and "get_config" not in fields_read()


# ------------------------------------------------------------------------------------------------ inconsistencies


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("encoder.heads", 7, "encoder.width 768 is not divisible by encoder.heads 7"),
        ("decoder.width", 100, "decoder.width 100 is not divisible by decoder.heads 12"),
        ("encoder.heads", 0, "encoder.heads is 0; it must be at least 1"),
        ("decoder.depth", 0, "decoder.depth is 0; it must be at least 1"),
        ("data.buckets", (), "data.buckets names 0 shapes; it takes 1 to 6"),
        ("data.buckets", ((32, 48, 16),) * 7, "data.buckets names 7 shapes; it takes 1 to 6"),
        ("data.buckets", ((64, 96, 32), (32, 128, 32)), "does not ascend in every length"),
        ("data.buckets", ((64, 1024, 32),), "has 1024 encoder tokens but encoder.max_positions is 512"),
        ("data.buckets", ((64, 128, 1024),), "has 1024 reply tokens; with the latent's position that exceeds"),
        ("data.buckets", ((64, 32, 32),), "a joint length no shorter than the context's"),
        ("data.buckets", ((4, 32, 32),), "needs at least 8 tokens each"),
        ("decode.max_new_tokens", 1023, "decode.max_new_tokens 1023 + 2 exceeds decoder.max_positions 1024"),
        ("decode.min_new_tokens", 129, "decode.min_new_tokens 129 is not between 0 and decode.max_new_tokens 128"),
        ("train.accumulate", 5, "train.batch_size 32 is not divisible by train.accumulate 5"),
        ("train.accumulate", 0, "train.batch_size 32 is not divisible by train.accumulate 0"),
        ("train.epochs", 0.0, "train.steps and train.epochs are both 0"),
        ("train.steps", -1, "train.steps is -1; it must be at least 0"),
        ("train.batch_size", 0, "train.batch_size is 0; it must be at least 1"),
        ("train.learning_rate", 0.0, "train.learning_rate is 0.0; it must be above 0"),
        ("train.clip", 0.0, "train.clip is 0.0; it must be above 0"),
        ("train.warmup", 1.5, "train.warmup is 1.5; it must be in [0, 1]"),
        ("train.beta2", 1.0, "train.beta2 is 1.0; it must be in [0, 1)"),
        ("train.keep", 0, "train.keep is 0; it must be at least 1"),
        ("encoder.dropout", 1.0, "encoder.dropout is 1.0; it must be in [0, 1)"),
        ("decoder.dropout", -0.1, "decoder.dropout is -0.1; it must be in [0, 1)"),
        ("loss.kl_zero", 1.1, "loss.kl_zero is 1.1; it must be in [0, 1]"),
        ("loss.kl_period", 0, "loss.kl_period is 0; it must be at least 1"),
        ("loss.gap", -0.1, "loss.gap is -0.1; it must be at least 0"),
        ("sample.rtol", 0.0, "sample.rtol is 0.0; it must be above 0"),
        ("sample.atol", -1e-3, "sample.atol is -0.001; it must be above 0"),
        ("sample.beta_min", -0.1, "sample.beta_min -0.1 is not between 0 and sample.beta_max 20.0"),
        ("sample.beta_max", 0.05, "sample.beta_min 0.1 is not between 0 and sample.beta_max 0.05"),
        ("sample.max_steps", 0, "sample.max_steps is 0; it must be at least 1"),
        ("sample.langevin_steps", 0, "sample.langevin_steps is 0; it must be at least 1"),
        ("sample.langevin_step", -0.1, "sample.langevin_step is -0.1; it must be at least 0"),
        ("sample.langevin_decay", 0.0, "sample.langevin_decay is 0.0; it must be above 0"),
        ("sample.weight", float("nan"), "sample.weight is nan; it must be float"),
        ("decode.temperature", -1.0, "decode.temperature is -1.0; it must be at least 0"),
        ("decode.top_p", 0.0, "decode.top_p is 0.0; it must be in (0, 1]"),
        ("attention", "flash", "attention is 'flash'; it must be one of xla, cudnn"),
        ("mesh.fsdp", 0, "mesh.fsdp is 0; it must be at least 1"),
        ("seed", -1, "seed is -1; it must be at least 0 and have at most 63 bits"),
        ("seed", 2**63, "seed is 9223372036854775808; it must be at least 0 and have at most 63 bits"),
        # A config file is Python: nothing else would notice a choice that there is not.
        ("sample.method", "odee", "sample.method is 'odee'; it must be one of ode, langevin, sde"),
        ("loss.gap_distance", "cosine", "loss.gap_distance is 'cosine'; it must be one of squared, euclidean"),
        ("dtype", "float16", "dtype is 'float16'; it must be one of auto, float32, bfloat16"),
    ],
)
def test_an_inconsistency_is_one_sentence(path, value, sentence):
    with pytest.raises(UserError) as error:
        change(Config(), path, value).check()
    text = str(error.value)
    assert text.startswith("the config is inconsistent: ") and sentence in text and text.count(";") <= 1


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("dtype", "float32", "attention is cudnn, but dtype is float32; cuDNN computes attention in bfloat16 only"),
        ("decoder.heads", 4, "attention is cudnn, but decoder.width / decoder.heads is 192; cuDNN takes multiples"),
        ("encoder.heads", 64, "attention is cudnn, but encoder.width / encoder.heads is 12; cuDNN takes multiples"),
    ],
)
def test_what_cudnn_cannot_compute_is_one_sentence(path, value, sentence):
    settings = change(Config(), path, value)
    settings.check()
    with pytest.raises(UserError) as error:
        change(settings, "attention", "cudnn").check()
    assert sentence in str(error.value) and ";" not in str(error.value).replace("; cuDNN", "")
    change(Config(), "attention", "cudnn").check()


def test_all_inconsistencies_are_told_at_once():
    with pytest.raises(UserError, match=r"rtol is 0.*; .*atol is 0"):
        change(change(Config(), "sample.rtol", 0.0), "sample.atol", 0.0).check()
    Config().check()


# ------------------------------------------------------------------------------------------------ files and flags


def test_json_gives_back_the_config(tmp_path):
    settings = load_file(TINY)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": config.to_dict(settings), "data": "key"}))
    assert load_run(tmp_path) == settings
    path.write_text(json.dumps(config.to_dict(settings)))
    assert load_file(path) == settings


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"tran": {}}, "config has no field 'tran'; did you mean train"),
        ({"train": {"step": 5}}, "config.train has no field 'step'; did you mean steps"),
        ({"mesh": {"zzzz": 5}}, "config.mesh has no field 'zzzz'; it has fsdp, model, shard_above_mb"),
    ],
)
def test_an_unknown_field_in_json_gets_a_did_you_mean(tmp_path, values, sentence):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=sentence):
        load_file(tmp_path / "config.json")


def test_the_config_json_of_a_run_is_a_config_file(tmp_path):
    settings, path = load_file(TINY), tmp_path / "config.json"
    for values in ({"config": config.to_dict(settings), "data": "key"}, config.to_dict(settings)):
        path.write_text(json.dumps(values, indent=2))
        assert load_file(path) == load_run(tmp_path) == settings
        assert parse("--config", path, "--train.steps", 7) == change(settings, "train.steps", 7)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"train": {"steps": 5}', "{} is not valid JSON at column 23: Expecting ',' delimiter"),
        ("", "{} is not valid JSON at column 1: Expecting value"),
        ('{"train": {"steps": "x"}}', "{}: config.train.steps is 'x'; expected int"),
        ('{"train": {"steps": 5.5}}', "{}: config.train.steps is 5.5; expected int"),
        ('{"train": {"steps": true}}', "{}: config.train.steps is True; expected int"),
        ('{"train": {"steps": null}}', "{}: config.train.steps is None; expected int"),
        ('{"train": {"steps": [5]}}', "{}: config.train.steps is "),
        ('{"data": {"buckets": 5}}', "{}: config.data.buckets is 5; expected "),
        ('{"data": {"train": "a.jsonl"}}', "{}: config.data.train is 'a.jsonl'; expected "),
        ('{"loss": {"kl": "0.1"}}', "{}: config.loss.kl is '0.1'; expected float"),
        ('{"remat": 1}', "{}: config.remat is 1; expected bool"),
        ('{"train": 5}', "{}: config.train is 5; expected an object with fields"),
        ('{"config": {"train": 5}, "data": "key"}', "{}: config.train is 5; expected an object with fields"),
        ('{"config": 5, "data": "key"}', "{}: config is 5; expected an object with fields"),
        ("[1, 2]", "{}: config is [1, 2]; expected an object with fields"),
    ],
)
def test_a_mistake_in_json_is_one_sentence_with_the_file(tmp_path, text, sentence):
    path = tmp_path / "config.json"
    path.write_text(text)
    for load in (lambda: load_file(path), lambda: load_run(tmp_path), lambda: parse("--config", path)):
        with pytest.raises(UserError) as error:
            load()
        assert str(error.value).startswith(sentence.replace("{}", str(path))) and "\n" not in str(error.value)


def test_whole_numbers_in_json_serve_as_numbers(tmp_path):
    (tmp_path / "config.json").write_text('{"loss": {"kl": 1}, "data": {"buckets": [[32, 48, 16]]}}')
    expected = change(change(Config(), "loss.kl", 1), "data.buckets", ((32, 48, 16),))
    assert load_file(tmp_path / "config.json") == expected


@pytest.mark.parametrize(
    ("lines", "line", "sentence"),
    [
        (["import dataclasses", "def get_config(:", "    pass"], 2, "SyntaxError: "),
        (["import nowhere_to_be_found"], 1, "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        (["", "def get_config():", "    raise ValueError('not today')"], 3, "ValueError: not today"),
        (
            ["from miracle_jax.config import Train", "def get_config():", "    return Train(", "        step=5)"],
            3, "TypeError: Train.__init__() got an unexpected keyword argument 'step'",
        ),
        (
            ["def inner():", "    return {}['steps']", "def get_config():", "    return inner()"],
            2, "KeyError: 'steps'",
        ),
        (
            ["import json", "", "def get_config():", "    return json.loads('{')"],
            4, "JSONDecodeError: Expecting property name enclosed in double quotes",
        ),
    ],
    ids=["syntax", "import", "raise", "field", "inner", "error with a line of its own"],
)  # fmt: skip
def test_a_config_file_that_fails_is_told_by_file_and_line(tmp_path, lines, line, sentence):
    path = tmp_path / "mine.py"
    path.write_text("\n".join(lines) + "\n")
    for load in (lambda: load_file(path), lambda: parse("--config", path)):
        with pytest.raises(UserError) as error:
            load()
        assert str(error.value).startswith(f"config file {path}:{line}: {sentence}")
        assert error.value.__cause__ is None and error.value.__suppress_context__  # no traceback of ours


def test_what_a_config_file_says_itself_is_told_as_it_is(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from miracle_jax.errors import UserError\ndef get_config():\n    raise UserError('set X first')\n")
    with pytest.raises(UserError, match="^set X first$"):
        load_file(path)


def test_a_config_file_that_is_missing_or_is_none_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="config file configs/tny.py does not exist; the bundled ones are in configs/"):
        parse("--config", "configs/tny.py")
    empty = tmp_path / "empty.py"
    empty.write_text("steps = 3\n")
    with pytest.raises(UserError, match=r"empty.py defines no function get_config\(\)"):
        parse("--config", empty)
    with pytest.raises(UserError, match="holds no run .*; train one with python -m miracle_jax.train --workdir"):
        load_run(tmp_path)


def test_flags_win_over_the_file_and_the_file_over_the_defaults():
    file = load_file(TINY)
    settings = parse(
        "--config", TINY, "--train.steps", 7, "--data.buckets", 32, 64, 32, 48, 96, 48, "--data.on-error", "skip",
        "--data.train", "attitude=a.jsonl", "style=b.jsonl", "--seed", 3, "--encoder.max-positions", 96,
    )  # fmt: skip
    assert settings.train == dataclasses.replace(file.train, steps=7) and settings.seed == 3
    assert settings.data.buckets == ((32, 64, 32), (48, 96, 48)) and settings.data.on_error == "skip"
    assert settings.data.train == ("attitude=a.jsonl", "style=b.jsonl")
    assert settings.encoder == dataclasses.replace(file.encoder, max_positions=96) and settings.decoder == file.decoder
    assert parse("--remat", "True", "--loss.posterior", "False") == change(
        change(Config(), "remat", True), "loss.posterior", False
    )
    assert parse() == Config()
    assert read_config("", "", ["--config", str(TINY), "--workdir=runs/x"]) == (file, str(TINY), "runs/x")
    assert read_config("", "", []) == (Config(), "", "")


def test_flags_that_contradict_the_file_are_one_sentence():
    with pytest.raises(UserError, match="train.batch_size 32 is not divisible by train.accumulate 3"):
        parse("--config", TINY, "--train.accumulate", 3)


def test_a_run_needs_a_config_and_a_workdir(capsys):
    for argv, sentence in (
        (["--workdir", "runs/x"], "--config is missing; the bundled ones are in configs/"),
        (["--config", str(TINY)], "--workdir is missing; it names the folder of the run"),
        (["--config", str(TINY), "--workdir", "gs://bucket/run"], "gs://bucket/run is not a local folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: {sentence}")


def test_help_lists_every_field_with_the_files_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--config", TINY, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "What it does." in text
    for flag in ("--config", "--workdir", "--seed", "--train.steps", "--data.on-error", "--sample.langevin-decay"):
        assert flag in text
    for group in GROUPS:
        for field in dataclasses.fields(getattr(Config(), group)):
            assert f"--{group}.{field.name.replace('_', '-')}" in text
    assert f"default: {load_file(TINY).train.steps}" in text
    assert "Micro-batches per step" in text  # the fields' docstrings are their help


def test_an_unknown_flag_exits_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--train.step", 5)
    assert stop.value.code == 2 and "--train.steps" in capsys.readouterr().err
