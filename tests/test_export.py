"""Finished runs taken elsewhere: what an export holds, what opens it, and that there is never half of one."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import processes
import pytest
import runs
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict
from micro import ROOT, Run
from test_dataset import bucket  # noqa: F401 - a fixture

import miracle_jax as mj
from miracle_jax import config, export, generate, model
from miracle_jax.attributes import Attribute, Schema
from miracle_jax.errors import UserError
from miracle_jax.export import Options
from miracle_jax.tokenizers import Tokenizers

RIVER = "What about the river?"
CONTEXTS = [[RIVER], ["How are you?", "Well.", "What about the lamp?"], ["What about the bread?"]]
PERSONALITIES = ["lyrical", "plain, optimistic, critical", None]
KINDS = {
    "orbax": Options("orbax"),
    "orbax bfloat16": Options("orbax", "bfloat16"),
    "orbax trained": Options("orbax", parts="trained"),
    "safetensors": Options("safetensors"),
    "safetensors bfloat16": Options("safetensors", "bfloat16"),
    "safetensors trained": Options("safetensors", parts="trained"),
}
WHOLE = ["orbax", "orbax trained", "safetensors", "safetensors trained"]
LLAMA = {"kv_heads": 1, "rope_theta": 300.0, "norm_eps": 1e-4, "activation": "silu"}


def says(loaded) -> list[tuple[str, float]]:
    return [(reply.text, reply.energy) for reply in loaded.replies(CONTEXTS, PERSONALITIES)]


def assert_same(said, expected):
    assert [text for text, _ in said] == [text for text, _ in expected]
    assert [energy for _, energy in said] == pytest.approx([energy for _, energy in expected], abs=1e-6)


def exported(workdir, folder, options=Options()) -> Path:  # noqa: B008 - frozen
    export.export(workdir, str(folder), options)
    return folder


@pytest.fixture(scope="module")
def exports(tiny_run, tmp_path_factory):
    """Kind -> an export of the run, which tests read only."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = exported(tiny_run.workdir, folder / kind.replace(" ", "-"), KINDS[kind])
        return made[kind]

    return get


@pytest.fixture(scope="module")
def said(tiny_model):
    return says(tiny_model)


def fails(capsys, *argv) -> str:
    """The sentence with which the command refuses."""
    with pytest.raises(SystemExit) as stop:
        export.main(list(map(str, argv)))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.startswith("error: ") and captured.out == ""
    return captured.err.removeprefix("error: ").rstrip("\n")


# ------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("kind", WHOLE)
def test_a_float32_export_has_every_parameter_of_the_run(tiny_model, exports, kind):
    loaded = mj.load(exports(kind))
    assert loaded.fingerprint() == tiny_model.fingerprint()
    assert loaded.default_heads == tiny_model.default_heads and loaded.schema == tiny_model.schema


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_a_float32_export_says_what_the_run_says(said, exports, kind):
    assert len({text for text, _ in said}) > 1
    assert_same(says(mj.load(exports(kind))), said)


@pytest.mark.parametrize("kind", ["orbax bfloat16", "safetensors bfloat16"])
def test_a_bfloat16_export_has_every_parameter_rounded(tiny_run, exports, kind):
    ours, source = model.read_run(exports(kind)), model.read_run(tiny_run.workdir)

    def compare(got, want):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, np.asarray(want).astype(ml_dtypes.bfloat16).astype(np.float32))

    jax.tree.map(compare, ours.miracle, source.miracle)
    jax.tree.map(compare, ours.refit_heads, source.refit_heads)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours.miracle)) > 10_000


def test_a_bfloat16_export_answers_and_is_half_as_large(exports):
    loaded = mj.load(exports("safetensors bfloat16"))
    assert all(reply.ok and reply.text for reply in loaded.replies(CONTEXTS, PERSONALITIES))
    name = "decoder/model.safetensors"
    half, whole = ((exports(kind) / name).stat().st_size for kind in ("safetensors bfloat16", "safetensors"))
    assert half < 0.6 * whole


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_the_config_the_schema_both_tokenizers_and_a_card(tiny_run, exports, kind):
    folder, options = exports(kind), KINDS[kind]
    names = {path.name for path in folder.iterdir()}
    parameters = {
        ("orbax", "all"): {"model"}, ("orbax", "trained"): {"model"}, ("safetensors", "trained"): set(),
        ("safetensors", "all"): {"prior", "posterior", "decoder"},
    }[options.format, options.parts]  # fmt: skip
    parameters |= {"miracle.safetensors"} if options.format == "safetensors" else set()
    assert names == {"config.json", "schema.toml", "tokenizers", "README.md", "model.json"} | parameters
    assert config.load_run(folder) == config.load_run(tiny_run.workdir)
    assert (folder / "schema.toml").read_bytes() == (tiny_run.workdir / "schema.toml").read_bytes()
    assert Tokenizers.load(folder / "tokenizers").files() == Tokenizers.load(tiny_run.workdir / "tokenizers").files()
    facts, own = (json.loads((place / "model.json").read_text()) for place in (folder, tiny_run.workdir))
    assert facts == own | {"format": options.format, "dtype": options.dtype, "parts": options.parts}
    assert all(os.access(path, os.R_OK) and path.stat().st_mode & 0o044 for path in (folder, *folder.rglob("*")))


def test_the_card_tells_the_data_the_figures_and_how_to_use_it(tiny_run, exports):
    card = (exports("safetensors") / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert fields["library_name"] == "miracle_jax" and fields["license"].startswith("other")
    assert f"miracle_jax {mj.__version__} (safetensors, float32, parts: all)" in body
    for attribute in Schema.load().attributes:
        assert f"{attribute.name} ({', '.join(attribute.aspects)})" in body
    files = [flag for flag in tiny_run.flags if "=" in flag and "train_" in flag]
    assert len(files) == 3 and all(file in body for file in files)
    facts = json.loads((tiny_run.workdir / "model.json").read_text())
    assert f"- checkpoint: step {facts['step']} of 60\n" in body
    assert f"- heads of the energy: {facts['heads']}" in body
    assert all(f"{name} {figures['mean']:.1%}" in body for name, figures in facts["accuracy"].items())
    assert "control accuracy" not in body  # nobody evaluated this run
    (example,) = re.findall(r'"([^"]*)"\)\.text\)', body)
    assert Schema.load().parse(example) == (0, 0, 0)


def test_the_card_has_the_figures_of_the_evaluation_and_the_names_of_the_backbones(tiny_run, tmp_path):
    run = runs.write(tmp_path / "run", tiny_run.workdir, data={"train": ()}, encoder={"pretrained": "some/bert"})
    means = {"run": 0.876, "run w/o energy": 0.5, "references": 0.83}
    systems = {name: {"paper": {"personalization": {"mean": mean}}} for name, mean in means.items()}
    (run / "evaluation").mkdir()
    report = {"setup": {"judges": "of words"}, "systems": systems}
    (run / "evaluation" / "report.json").write_text(json.dumps(report))
    card = (exported(run, tmp_path / "out") / "README.md").read_text()
    assert "judges: of words): run 87.6%, run w/o energy 50.0%, references 83.0%\n" in card
    assert "- encoder from: some/bert\n" in card and "- decoder from: see config.json\n" in card
    assert "- data: the bundled corpus (Miracle-Mini, CC0 1.0)\n" in card
    assert not config.load_run(tmp_path / "out").encoder.pretrained  # nothing is looked for


def test_the_command_writes_what_its_flags_say(tiny_run, tiny_model, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    export.main([str(tiny_run.workdir), str(out), "--format", "orbax", "--dtype", "bfloat16", "--parts", "trained"])
    assert capsys.readouterr().out == f"wrote {out}\n"
    facts = json.loads((out / "model.json").read_text())
    assert (facts["format"], facts["dtype"], facts["parts"]) == ("orbax", "bfloat16", "trained")
    with pytest.raises(SystemExit) as stop:
        export.main(["--help"])
    assert stop.value.code == 0 and "--format" in capsys.readouterr().out


def test_an_export_of_an_export_is_the_same_model(tiny_model, exports, tmp_path):
    again = exported(exports("orbax"), tmp_path / "again", Options("safetensors"))
    assert mj.load(again).fingerprint() == tiny_model.fingerprint()


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_a_model_without_a_posterior(tiny_run, tmp_path, kind):
    run = runs.write(tmp_path / "run", tiny_run.workdir, loss={"posterior": False})
    out = exported(run, tmp_path / "out", KINDS[kind])
    assert not (out / "posterior").exists()
    assert mj.load(out).fingerprint() == mj.load(run).fingerprint()


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_decoder_and_attributes_with_different_numbers_of_aspects(tiny_run, tmp_path, tied):
    schema = Schema((Attribute("tone", ("dry", "warm", "sharp")), Attribute("pace", ("slow", "fast"))))
    run = runs.write(tmp_path / "run", tiny_run.workdir, schema, decoder=llama(tiny_run, tied))
    out = exported(run, tmp_path / "out")
    assert mj.load(out).fingerprint() == mj.load(run).fingerprint()
    assert "tone (dry, warm, sharp); pace (slow, fast)" in (out / "README.md").read_text()


def llama(run: Run, tied: bool) -> config.Llama:
    """A Llama of the size of the run's GPT-2."""
    shared = {f.name: getattr(config.load_run(run.workdir).decoder, f.name) for f in dataclasses.fields(config.Decoder)}
    return config.Llama(**shared | LLAMA, tied=tied)


# ------------------------------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        (["--format", "safetensors"], "pathlib.Path.write_bytes"),
        (["--format", "orbax"], "miracle_jax.checkpoint.save_model"),
        (["--format", "orbax", "--parts", "trained"], "orbax.checkpoint.StandardCheckpointer.save"),
    ],
)
def test_a_write_that_fails_leaves_nothing(tiny_run, tmp_path, monkeypatch, capsys, options, broken):
    begun = []

    def fail(*arguments, **_):
        begun.append(list(tmp_path.iterdir()))
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(broken, fail)
    message = fails(capsys, tiny_run.workdir, tmp_path / "out", *options)
    assert "No space left on device" in message and "\n" not in message
    assert len(begun[0]) == 1 and not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(tiny_run, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.hub, "safetensors_bytes", interrupt)
    with pytest.raises(SystemExit) as stop:
        export.main([str(tiny_run.workdir), str(tmp_path / "out")])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_exists_is_not_replaced(tiny_run, tmp_path, capsys, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    assert fails(capsys, tiny_run.workdir, out) == f"{out} exists; name a folder that does not, or delete it"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give the folder of a finished run and what to write: python -m miracle_jax.export RUN OUT"),
        (["{run}"], "give the folder of a finished run and what to write: python -m miracle_jax.export RUN OUT"),
        (["{run}", "{out}", "more"], "give the folder of a finished run and what to write"),
        (["{run}", "{out}", "--format", "orbax", "more"], "'more' belongs to no flag; words without a flag come first"),
        (["/no/such/run", "{out}"], "/no/such/run holds no run (no config.json); train one with"),
        (["{run}", "{out}", "--format", "released"], "{out}: the released format is one local file; give it a name"),
        (["{run}", "gs://a/b.safetensors", "--format", "released"], "gs://a/b.safetensors: the released format is one"),
        (
            ["{run}", "{out}.safetensors", "--format", "released"],
            "the released format cannot hold this run; the paper's code has no latent.activation silu (only relu), "
            "no latent.logvar_shift -3.0 (only 0)",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tiny_run, tmp_path, capsys, arguments, sentence):
    names = {"run": tiny_run.workdir, "out": tmp_path / "out"}
    message = fails(capsys, *(word.format(**names) for word in arguments))
    assert message.startswith(sentence.format(**names))
    assert "\n" not in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--formt", "orbax"], ["--format", "gguf"], ["--dtype", "float16"]])
def test_a_flag_that_is_unknown_or_out_of_range_names_what_there_is(tiny_run, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        export.main([str(tiny_run.workdir), str(tmp_path / "out"), *flags])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and flags[0][:7] in shown and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_finished_is_refused(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run.workdir, tmp_path / "run")
    (run / "model.json").unlink()
    assert fails(capsys, run, tmp_path / "out").startswith(f"{run} is not finished (no model.json); run its python -m")
    (run / "model.json").write_text('{"step": 6')
    assert fails(capsys, run, tmp_path / "out").startswith(f"{run / 'model.json'} is not valid JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_released_format_takes_only_what_the_papers_code_computes(tiny_run, tmp_path):
    schema = Schema((Attribute("tone", ("dry", "warm", "sharp")), Attribute("pace", ("slow", "fast"))))
    relu = {"activation": "relu", "logvar_shift": 0.0}
    run = runs.write(tmp_path / "run", tiny_run.workdir, schema, latent=relu, decoder=llama(tiny_run, tied=True))
    with pytest.raises(UserError) as error:
        exported(run, tmp_path / "out.safetensors", Options("released"))
    assert str(error.value) == (
        "the released format cannot hold this run; the paper's code has no decoder of the llama family (only gpt2), no "
        "attributes with different numbers of aspects"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------------ other programs


@pytest.mark.torch
@pytest.mark.parametrize("part", ["prior", "posterior"])
def test_transformers_opens_the_encoders(tiny_model, exports, part):
    import torch
    from transformers import AutoTokenizer, BertModel

    theirs, report = BertModel.from_pretrained(exports("safetensors") / part, output_loading_info=True)
    assert not any(report.values())
    tokenizer = AutoTokenizer.from_pretrained(exports("safetensors") / part)
    encoded = tokenizer(["User:What about the river?", "User:Well."], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = theirs.eval()(**encoded, output_hidden_states=True)
    tokens, length = encoded["input_ids"].numpy(), encoded["attention_mask"].numpy().sum(1)
    ours = getattr(tiny_model.miracle, part).bert
    for row, number in zip(tokens, length, strict=True):
        assert tiny_model.tokenizers.encoder.decode(row[:number]) == tokenizer.decode(row[:number])
    hidden = np.asarray(jax.jit(lambda bert, *text: bert.hidden(*text))(ours, tokens, length))
    inside = np.arange(tokens.shape[1]) < length[:, None]
    np.testing.assert_allclose(hidden[inside], found.last_hidden_state.numpy()[inside], rtol=1e-5, atol=1e-5)
    pooled = ours.pool(hidden[:, 0])
    np.testing.assert_allclose(pooled, found.pooler_output.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_transformers_opens_a_gpt2_decoder(tiny_model, exports):
    from transformers import GPT2LMHeadModel

    check_decoder(tiny_model, exports("safetensors") / "decoder", GPT2LMHeadModel)


@pytest.mark.torch
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_a_llama_decoder(tiny_run, tmp_path, tied):
    from transformers import LlamaForCausalLM

    run = runs.write(tmp_path / "run", tiny_run.workdir, decoder=llama(tiny_run, tied))
    out = exported(run, tmp_path / "out")
    check_decoder(mj.load(out), out / "decoder", LlamaForCausalLM)


def check_decoder(ours, folder, kind):
    """Tokens and logits, as of a decoder without a latent and without a bias on its head."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is kind and not any(report.values()), report
    tokenizer, own = AutoTokenizer.from_pretrained(folder), ours.tokenizers.decoder
    assert tokenizer.bos_token_id == own.bos_id and tokenizer.eos_token_id == own.eos_id
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (own.bos_id, own.eos_id)
    text = "Like rain, the river sings."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == own.encode(text) and tokenizer.decode(ids) == text

    @jax.jit
    def run(decoder, tokens, z):
        hidden, _ = decoder.hidden(tokens, z, decoder.latent_key_values(z), np.zeros((), bool), 0)
        return decoder.logits(hidden) - (decoder.head_bias[...] if hasattr(decoder, "head_bias") else 0)

    z = np.zeros((1, ours.config.latent.size), np.float32)
    logits = run(ours.miracle.decoder, np.array([ids]), z)
    with torch.no_grad():
        want = theirs.eval()(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.torch
def test_transformers_opens_a_bfloat16_export(exports):
    import torch
    from transformers import BertModel

    loaded = BertModel.from_pretrained(exports("safetensors bfloat16") / "prior", dtype="auto")
    assert loaded.embeddings.word_embeddings.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ buckets


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_an_export_in_a_bucket_is_copied_once_and_opened(tiny_run, tiny_model, said, tmp_path, capsys, kind):
    export.main([str(tiny_run.workdir), "gs://some/model", "--format", kind])
    assert capsys.readouterr().out == "wrote gs://some/model\n"
    loaded = mj.load("gs://some/model")
    assert loaded.fingerprint() == tiny_model.fingerprint()
    assert_same(says(loaded), said)
    (copied,) = (tmp_path / "home/.cache/miracle_jax").iterdir()
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    generate.main(["gs://some/model", RIVER, "--personality", "lyrical"])
    assert "[lyrical]" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
    assert fails(capsys, tiny_run.workdir, "gs://some/model").startswith("gs://some/model exists; name a folder that")


@pytest.mark.usefixtures("bucket")
def test_another_model_under_the_same_address_is_another_model(tiny_run, tmp_path):
    """Also where its files have the same names and sizes."""
    prints, lists = [], []
    for name, scale in (("one", 1.0), ("other", 2.0)):
        run = shutil.copytree(tiny_run.workdir, tmp_path / name)
        exported(run, tmp_path / f"{name}-out")
        file = tmp_path / f"{name}-out" / "miracle.safetensors"
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file({key: scale * tensor for key, tensor in tensors.items()}, file)
        export.export(tmp_path / f"{name}-out", "gs://some/model", Options())
        prints.append(mj.load("gs://some/model").fingerprint())
        sizes = json.loads(epath.Path("gs://some/model/complete.json").read_text())
        lists.append({file: size for file, size in sizes.items() if size})
        epath.Path("gs://some/model").rmtree()
    assert lists[0] == lists[1] and prints[0] != prints[1]


@pytest.mark.usefixtures("bucket")
def test_a_folder_in_a_bucket_that_is_not_whole_is_refused(tiny_run, tmp_path):
    with pytest.raises(UserError, match=r"gs://some/model holds no whole folder \(no complete.json\); write it with"):
        mj.load("gs://some/model")
    export.export(tiny_run.workdir, "gs://some/model", Options())
    marker = epath.Path("gs://some/model/complete.json")
    content = marker.read_text()
    for wrong in ("{", "[]", '{"../../../escaped": 2}', '{"/tmp/escaped": 2}'):
        marker.write_text(wrong)
        with pytest.raises(UserError, match="gs://some/model/complete.json does not list files and their sizes; write"):
            mj.load("gs://some/model")
    marker.unlink()
    with pytest.raises(UserError, match=r"gs://some/model holds no whole folder \(no complete.json\)"):
        mj.load("gs://some/model")
    marker.write_text(content)
    epath.Path("gs://some/model/decoder/model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="gs://some/model is damaged: its files do not have the sizes"):
        mj.load("gs://some/model")
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.usefixtures("bucket")
def test_a_copy_to_a_bucket_that_fails_leaves_nothing(tiny_run, monkeypatch, request):
    kind = type(epath.Path("gs://some/model"))
    put, written = kind.write_bytes, []

    def fail(path, content):
        if path.name == "model.safetensors":
            raise PermissionError("no access")
        written.append(path.name)
        return put(path, content)

    monkeypatch.setattr(kind, "write_bytes", fail)
    with pytest.raises(UserError, match="gs://some/model/.* cannot be read or written: PermissionError: no access"):
        export.export(tiny_run.workdir, "gs://some/model", Options())
    assert written and "complete.json" not in written  # it comes last
    assert not request.getfixturevalue("bucket").store


# ------------------------------------------------------------------------------------------------ other machines

SAY = """
import json, sys
import jax
import miracle_jax as mj

number, questions, *folders = sys.argv[1:]
assert jax.device_count() == int(number)
for folder in folders:
    model = mj.load(folder)
    contexts, personalities = json.loads(questions)
    replies = model.replies(contexts, personalities)
    print(json.dumps([model.fingerprint(), [(reply.text, reply.energy) for reply in replies]]))
"""


def test_an_export_answers_alike_on_other_numbers_of_devices(tiny_model, said, exports):
    """Those of above, in this process, are on one."""
    assert jax.device_count() == 1
    folders = [str(exports("orbax")), str(exports("safetensors"))]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SAY, str(number), json.dumps([CONTEXTS, PERSONALITIES]), *folders],
            cwd=ROOT, env=processes.environment(number), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (2, 8)
    ]  # fmt: skip
    for process in running:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        for line in output.splitlines():
            fingerprint, replies = json.loads(line)
            assert fingerprint == tiny_model.fingerprint()
            assert_same(replies, said)
        assert output.count("\n") == len(folders)


@pytest.mark.slow
def test_a_run_of_eight_devices_with_split_parameters_is_exported_and_opened_on_one(tiny_run, tmp_path):
    flags = [
        "--mesh.fsdp", "4", "--mesh.shard-above-mb", "0.001", "--data.buckets", "32", "40", "16", "--train.steps", "2",
        "--train.eval-every", "2", "--train.save-every", "2", "--train.refit-epochs", "1",
    ]  # fmt: skip
    run = Run(tmp_path / "run", [*tiny_run.flags, *flags])
    done = subprocess.run(run.command, cwd=ROOT, env=processes.environment(8), capture_output=True, text=True)
    assert done.returncode == 0 and "on 8 cpu device(s)" in done.stdout, done.stderr
    loaded = mj.load(run.workdir)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(loaded.miracle.decoder.tokens.embedding[...])} == {1}
    out = exported(run.workdir, tmp_path / "out", Options("orbax"))
    assert_same(says(mj.load(out)), says(loaded))


# ------------------------------------------------------------------------------------------------ damaged exports


@pytest.fixture
def damaged(exports, tmp_path):
    """A copy of a safetensors export, and what changes the tensors of one of its files."""
    folder = shutil.copytree(exports("safetensors"), tmp_path / "damaged")

    def change(name, edit):
        tensors = safetensors.numpy.load_file(folder / name)
        edit(tensors)
        safetensors.numpy.save_file(tensors, folder / name)

    return folder, change


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        mj.load(folder)
    return str(error.value)


def test_every_tensor_that_does_not_fit_is_listed_by_name_and_shape(damaged):
    folder, change = damaged

    def edit(tensors):
        del tensors["transformer.h.0.ln_1.bias"], tensors["transformer.wpe.weight"]
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:7]
        tensors["transformer.h.0.attn.c_attn.weight"] = tensors["transformer.h.0.attn.c_attn.weight"].T.copy()
        tensors["transformer.h.1.ln_1.bias"] = np.zeros(3, np.float32)

    change("decoder/model.safetensors", edit)
    assert refusal(folder).splitlines() == [
        f"{folder / 'decoder'} does not match the model:",
        "  h.0.attn.c_attn.weight: the checkpoint has (48, 16), the model expects (16, 48)",
        "  h.0.ln_1.bias: missing (the model expects (16,))",
        "  h.1.ln_1.bias: not in the model (the checkpoint has (3,))",
        "  wpe.weight: missing (the model expects (20, 16))",
        "  wte.weight: the checkpoint has (7, 16), the model expects (400, 16)",
    ]


def test_the_parts_that_transformers_does_not_know_are_as_strict(damaged):
    folder, change = damaged

    def edit(tensors):
        tensors["miracle.decoder.latent_embed.bias"] = np.zeros(16, np.float32)
        tensors["refit_heads.w1"] = tensors["refit_heads.w1"][:2]
        del tensors["miracle.prior.to_gaussian.kernel"]

    change("miracle.safetensors", edit)
    assert refusal(folder).splitlines() == [
        f"{folder / 'miracle.safetensors'} does not match the model:",
        "  miracle.decoder.latent_embed.bias: not in the model (the checkpoint has (16,))",
        "  miracle.prior.to_gaussian.kernel: missing (the model expects (16, 16))",
        "  refit_heads.w1: the checkpoint has (2, 8, 8), the model expects (3, 8, 8)",
    ]


@pytest.mark.parametrize("part", ["prior", "posterior", "decoder"])
def test_a_part_that_is_absent_is_missed(damaged, part):
    folder, _ = damaged
    shutil.rmtree(folder / part)
    assert refusal(folder).startswith(f"{folder / 'miracle.safetensors'} does not match the model:\n  miracle.{part}.")


def test_a_pooler_that_is_absent_is_missed(damaged):
    folder, change = damaged

    def edit(tensors):
        del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]

    change("prior/model.safetensors", edit)
    assert str(folder / "prior") in refusal(folder) and "pooler" in refusal(folder)


@pytest.mark.parametrize("name", ["miracle.safetensors", "posterior/model.safetensors"])
def test_a_truncated_file_is_named(damaged, name):
    folder, _ = damaged
    content = (folder / name).read_bytes()
    for length in (len(content) // 2, 100, 0):
        (folder / name).write_bytes(content[:length])
        message = refusal(folder)
        assert message.startswith(f"{folder / name} is not a whole safetensors file") and "\n" not in message
    (folder / name).unlink()
    assert str(folder) in refusal(folder) and "\n" not in refusal(folder)


def test_parameters_in_another_precision_than_model_json_says_are_refused(exports, tmp_path):
    folder = shutil.copytree(exports("orbax bfloat16"), tmp_path / "wrong")
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"bfloat16"', '"float32"'))
    message = refusal(folder)
    assert message.startswith(f"model {folder / 'model'} does not match the model:\n")
    assert re.search(r"\(400, 16\) bfloat16, model expects \(400, 16\) float32", message)


# ------------------------------------------------------------------------------------------------ adapters


def test_adapters_are_merged_into_what_they_adapt(tiny_run):
    settings = config.load_run(tiny_run.workdir)
    settings = dataclasses.replace(settings, decoder=dataclasses.replace(settings.decoder, lora_rank=2))
    rng = np.random.default_rng(0)

    def layer():
        shapes = {"kernel": (3, 4, 5), "bias": (3, 5), "adapter_in": (3, 4, 2), "adapter_out": (3, 2, 5)}
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    params = {"decoder": {"blocks": {"qkv": layer(), "mlp_in": layer()}, "norm": {"scale": np.ones(4)}}}
    run, merged = model.merge_adapters(settings, params)
    assert run == config.load_run(tiny_run.workdir)
    assert not [path for path in flatten_dict(merged, sep=".") if "adapter" in path]
    assert merged["decoder"]["norm"] == params["decoder"]["norm"]
    for name, part in params["decoder"]["blocks"].items():
        update = np.einsum("lir,lro->lio", part["adapter_in"], part["adapter_out"])
        got = merged["decoder"]["blocks"][name]
        np.testing.assert_allclose(got["kernel"], part["kernel"] + update, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got["bias"], part["bias"])
