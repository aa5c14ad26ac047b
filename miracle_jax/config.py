"""Every knob of the project, once.

A config is a tree of frozen dataclasses. A config file is a Python file with a function `get_config() -> Config`; the
command line overrides single fields (`--train.steps 500`). Nothing here imports JAX.
"""

import dataclasses
import difflib
import itertools
import math
import operator
import runpy
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin

from miracle_jax import reading
from miracle_jax.errors import UserError


@dataclass(frozen=True)
class Data:
    """Where dialogues come from and how they become batches."""

    train: tuple[str, ...] = ()
    """Training files, `attribute=path.jsonl` each, or a path alone, where the lines name their attributes in `tag`
    (null: none is known). Empty: the bundled corpus."""
    validation: tuple[str, ...] = ()
    """Validation files, written as `train`. Empty: the bundled corpus, when `train` is empty too."""
    schema: str = ""
    """TOML file that names the attributes and their aspects. Empty: the paper's three."""
    frozen: str = ""
    """An .npz file written by `python -m miracle_jax.dataset freeze`; replaces all of the above and needs neither
    Grain nor TFDS."""
    cache: str = "~/.cache/miracle_jax"
    """Where built datasets are kept, keyed by content: a local folder or a gs:// path."""
    on_error: Literal["stop", "skip"] = "stop"
    """A malformed line: stop before anything trains, or drop the line and count it."""
    encoder_tokenizer: str = ""
    """Hub name or folder of a BERT tokenizer. Empty: WordPiece is trained on the training text."""
    decoder_tokenizer: str = ""
    """Hub name or folder of a GPT-2 tokenizer. Empty: byte-level BPE is trained on the training text."""
    buckets: tuple[tuple[int, int, int], ...] = ((128, 192, 64), (256, 320, 64), (512, 512, 128))
    """Shapes of a batch, ascending, at most six: tokens of (context, context + reply, reply). The last one is the
    length limit; the reply's counts `<bos>` and `<eos>`. Every shape is compiled once."""
    pack: bool = True
    """Train on the tokens of a batch end to end, without their padding, except in attention. It changes rounding only.
    Not for the reply where the decoder sees the context. A batch with more tokens than the pipeline foresaw, one in
    thousands, has its padding after all: memory has to suffice for that, which is what `plan` shows."""


@dataclass(frozen=True)
class Bert:
    """Shape of an encoder (the defaults are BERT-base uncased). Prior and posterior have the same shape."""

    pretrained: str = ""
    """A BERT checkpoint to start from: a folder, a hub name, or package:NAME/PATH inside an installed package. It
    decides the shape and, unless data.encoder_tokenizer names another, the tokenizer."""
    frozen: bool = False
    """Train nothing of it but the pooler; every text is then encoded once, before training."""
    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    max_positions: int = 512
    segments: int = 2
    """Rows of the segment table, of which the first is used."""
    dropout: float = 0.1
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    norm_eps: float = 1e-12
    init_std: float = 0.02
    """Standard deviation of the initial weights, here and in the Gaussian's projection."""


@dataclass(frozen=True)
class Decoder:
    """What the shapes of all decoder families share (the defaults are GPT-2 small with one more token, `<bos>`)."""

    pretrained: str = ""
    """A GPT-2 or Llama checkpoint to start from: a folder, a .gguf file, a hub name, or package:NAME/PATH. It decides
    family and shape and, unless data.decoder_tokenizer names another, the tokenizer."""
    frozen: bool = False
    """Train nothing of it but its adapters and the latent's projections."""
    lora_rank: int = 0
    """Rank of the adapters on every layer's matrices (Hu et al. 2021). 0: none."""
    sees_context: bool = False
    """Whether it also reads the context, before the reply; otherwise z alone tells it what was asked."""
    context_tokens: int = 0
    """Most tokens of the context that it reads. 0: the last question only (at most 64 tokens of it)."""
    vocab_size: int = 50258
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    max_positions: int = 1024
    dropout: float = 0.1
    word_dropout: float = 0.0
    """Share of a reply's tokens that are hidden from it in training (`<bos>` stands in their place), so that what comes
    next has to be read from z (Bowman et al. 2016)."""
    norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of the initial weights, here and in the latent's projections."""

    @property
    def prompt_limit(self) -> int:
        """Most tokens of the context that it reads."""
        return (self.context_tokens or LAST_QUESTION) if self.sees_context else 0


LAST_QUESTION = 64
"""Tokens of the last question that a decoder reads where it reads nothing else of the context."""


@dataclass(frozen=True)
class Gpt2(Decoder):
    """Shape of a GPT-2 decoder."""

    family: Literal["gpt2"] = "gpt2"
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu_tanh"


@dataclass(frozen=True)
class Llama(Decoder):
    """Shape of a Llama decoder."""

    family: Literal["llama"] = "llama"
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "silu"
    kv_heads: int = 12
    """Heads of keys and values; each serves heads / kv_heads heads of queries."""
    rope_theta: float = 10000.0
    """Base of the rotary positions' wavelengths."""
    tied: bool = True
    """Whether the output layer shares the embedding's weights."""


@dataclass(frozen=True)
class Latent:
    """The latent space and the attribute classifiers on it."""

    size: int = 768
    logvar_shift: float = 0.0
    """Added to the log variances of prior and posterior. Below 0 for encoders that start from random weights: their
    means differ little at first, and noise of variance 1 would teach the decoder to ignore z."""
    hidden: int = 128
    """Width of the classifiers' hidden layer."""
    activation: Literal["silu", "relu"] = "silu"
    """Hidden activation. ReLU for checkpoints of the released code; SiLU gives the ODE a smooth field."""


@dataclass(frozen=True)
class Loss:
    """Weights and schedules of the losses (paper Eq. 3 to 6). A weight of 0 switches that loss off."""

    reconstruct: float = 1.0
    kl: float = 0.001
    kl_floor: float = 0.9
    """A dimension whose KL is at most this contributes nothing."""
    kl_period: int = 40
    """Length of a cycle of the KL weight, in steps."""
    kl_zero: float = 0.2
    """Share of each cycle for which the KL weight is 0 and z is the posterior's mean."""
    classify: float = 0.05
    gap: float = 0.002
    gap_distance: Literal["squared", "euclidean"] = "squared"
    """Attribute distance: squared and averaged over dimensions (released code) or the norm (Eq. 5)."""
    posterior: bool = True
    """False: "no posterior" (appendix D), z comes from the prior in training too and there is no KL."""


@dataclass(frozen=True)
class Train:
    """Optimisation, logging and checkpoints."""

    steps: int = 0
    """Optimizer steps of stage 1 (the CVAE). 0: `epochs` decides."""
    epochs: float = 20.0
    latent_steps: int = 0
    """Steps before stage 1, with frozen encoders only: the latents and their heads without the decoder, which costs
    next to nothing and spares the decoder a latent that says nothing yet."""
    latent_batch_size: int = 96
    batch_size: int = 32
    """Instances per optimizer step, over all devices and processes."""
    accumulate: int = 1
    """Micro-batches per step; each is stratified over the attributes."""
    learning_rate: float = 5e-5
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0; then it falls to 0 linearly."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global norm of the gradient."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    refit_epochs: float = 20.0
    """Stage 2: epochs of refitting the attribute heads on the frozen prior's latents. 0 leaves it out."""
    refit_learning_rate: float = 1e-3
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500
    save_minutes: float = 10.0
    """A checkpoint is also written when the last one is as old as this. 0: only every `save_every` steps."""
    on_nan: Literal["stop", "skip", "restore"] = "stop"
    """When a loss or the gradient becomes NaN, infinite or larger than 1e6. skip: that step changes nothing. restore:
    back to the last checkpoint, and on with the step after the bad one. Either gives up after ten times in a row, and
    the learning rate falls that much later."""
    keep: int = 2
    """Newest checkpoints kept, beside the best by validation."""
    tensorboard: bool = False
    trackio: bool = False


@dataclass(frozen=True)
class Sample:
    """How a latent is moved to a personality (paper Eq. 9, 19, 20)."""

    method: Literal["ode", "langevin", "sde"] = "ode"
    drift: Literal["energy", "energy+prior"] = "energy"
    """Force on z: the energy alone (Eq. 20) or with the prior (Eq. 19). `sde` always has the prior (Eq. 17)."""
    solver: Literal["bosh3", "dopri5", "tsit5", "heun", "euler"] = "bosh3"
    """Of Eq. 20. Eq. 19 has a solver of its own."""
    rtol: float = 1e-3
    """Error allowed in a step, relative to z; `atol` adds to it. With the defaults z(0) is at least as accurate as the
    paper's code has it: a root mean square error of 2.9e-4 with SiLU heads and 9.5e-4 with ReLU heads (5.8e-4 and
    3.6e-3) after 20 and 28 evaluations of the gradient, means over real latents of size 768 with three attributes."""
    atol: float = 1e-3
    max_steps: int = 256
    """A latent that needs more steps is returned as it is, with ok = False."""
    fixed_steps: int = 0
    """Above 0: that many equal steps in place of step size control, in t for Eq. 20, in the integral of beta for
    Eq. 19. `sde` always takes fixed steps (0: 200)."""
    beta_min: float = 0.1
    beta_max: float = 20.0
    langevin_steps: int = 200
    langevin_step: float = 0.01
    """First step size eps of Langevin dynamics; step k has eps x langevin_decay^k."""
    langevin_decay: float = 0.9
    langevin_temperature: float = 1.0
    heads: Literal["auto", "joint", "refit"] = "auto"
    """Classifiers of the energy: trained with the CVAE, or refitted in stage 2. auto: the more accurate one on the
    validation contexts, as training found and recorded."""
    weight: float = 1.0
    """Energy weight lambda of every attribute that is not given one of its own."""
    context_tokens: int = 0
    """Most tokens of the context that the prior reads, special ones included. 0: as many as in training. The last
    question alone leaves the reply free of the aspects that the speaker's earlier answers have."""
    start: Literal["mean", "draw"] = "mean"
    """z(T): the prior's mean or a draw from the prior. Several latents a context are always draws."""
    batch_size: int = 4096
    """Latents solved at a time; halved as often as needed when memory runs out."""


@dataclass(frozen=True)
class Decode:
    """How a latent becomes text."""

    min_new_tokens: int = 2
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    batch_size: int = 0
    """Replies under way at a time, at most; one that has ended leaves its place to the next. 0: as many as memory has
    room for, at most 1,024 (on a CPU, where more is no faster, as many as 160 MiB hold, at least 64; for each of the
    cores that share the replies, where the decoder is small)."""


@dataclass(frozen=True)
class Mesh:
    """How arrays are laid out over devices."""

    fsdp: int = 1
    """Devices over which each large parameter is split, as is the batch; they gather it where it is needed."""
    model: int = 1
    """Devices over which large matrices are split and multiplied in parts; they see the same part of the batch. fsdp
    times model must divide the device count: the batch is also split over the rest, where all parameters are copied."""
    shard_above_mb: float = 4.0
    """Smaller parameters are copied to every device."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: Data = field(default_factory=Data)
    encoder: Bert = field(default_factory=Bert)
    decoder: Gpt2 | Llama = field(default_factory=Gpt2)
    latent: Latent = field(default_factory=Latent)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)
    decode: Decode = field(default_factory=Decode)
    mesh: Mesh = field(default_factory=Mesh)
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoders' and the decoder's arithmetic; parameters are always float32. auto: bfloat16 on
    TPUs and on GPUs that have it (NVIDIA from Ampere on), float32 elsewhere."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    scan_layers: bool = True
    """Run the layers of a transformer in a loop, which compiles as fast for 24 as for 2. False unrolls it: a step may
    then be faster."""
    attention: Literal["xla", "cudnn"] = "xla"
    """cudnn: NVIDIA's flash attention, for bfloat16 on GPUs from Ampere on. It has no dropout of attention weights, so
    `dropout` leaves them alone; everything else is dropped as before."""

    def check(self) -> None:
        """Raises UserError with every inconsistency between fields."""
        parts = [("", self)] + [(f"{f.name}.", getattr(self, f.name)) for f in dataclasses.fields(self)]
        problems = [
            f"{prefix}{f.name} is {getattr(part, f.name)!r}; it must be {getattr(f.type, '__name__', f.type)}"
            for prefix, part in parts if dataclasses.is_dataclass(part)
            for f in dataclasses.fields(part) if not _fits(getattr(part, f.name), f.type)
        ]  # fmt: skip
        if problems:
            raise UserError("the config is inconsistent: " + "; ".join(problems))

        def expect(condition, message):
            if not condition:
                problems.append(message)

        for name, shape in (("encoder", self.encoder), ("decoder", self.decoder)):
            expect(
                shape.heads < 1 or shape.width % shape.heads == 0,
                f"{name}.width {shape.width} is not divisible by {name}.heads {shape.heads}",
            )
            size = shape.width // max(shape.heads, 1)
            expect(
                self.attention != "cudnn" or (size <= 128 and size % 8 == 0),
                f"attention is cudnn, but {name}.width / {name}.heads is {size}; cuDNN takes multiples of 8 up to 128",
            )
        expect(
            self.attention != "cudnn" or self.dtype != "float32",
            "attention is cudnn, but dtype is float32; cuDNN computes attention in bfloat16 only",
        )
        if isinstance(self.decoder, Llama):
            groups = self.decoder.kv_heads
            expect(
                groups >= 1 and self.decoder.heads % groups == 0,
                f"decoder.heads {self.decoder.heads} is not a multiple of decoder.kv_heads {groups}",
            )
            expect(
                self.decoder.heads < 1 or self.decoder.width // self.decoder.heads % 2 == 0,
                f"decoder.width {self.decoder.width} / decoder.heads {self.decoder.heads} is odd; rotary positions "
                "turn pairs of a head's dimensions",
            )
            expect(self.decoder.rope_theta > 0, f"decoder.rope_theta is {self.decoder.rope_theta}; it must be above 0")
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            expect(part.pretrained or not part.frozen, f"{name}.frozen is set, but {name}.pretrained names no weights")
        expect(
            self.decoder.frozen or not self.decoder.lora_rank,
            "decoder.lora_rank is set, but without decoder.frozen all of the decoder is trained anyway",
        )
        expect(
            self.encoder.frozen or not self.train.latent_steps,
            "train.latent_steps is set, but only frozen encoders have latents to train on beforehand (encoder.frozen)",
        )
        buckets = self.data.buckets
        expect(all(min(bucket) >= 1 for bucket in buckets), f"data.buckets {buckets} has lengths below 1")
        expect(1 <= len(buckets) <= 6, f"data.buckets names {len(buckets)} shapes; it takes 1 to 6")
        expect(
            all(low <= high for a, b in itertools.pairwise(buckets) for low, high in zip(a, b, strict=True)),
            f"data.buckets {buckets} does not ascend in every length",
        )
        expect(
            self.sample.context_tokens == 0 or self.sample.context_tokens >= 8,
            f"sample.context_tokens is {self.sample.context_tokens}; it must be 0 or at least 8",
        )
        prompt = self.decoder.prompt_limit
        for context, joint, reply in buckets[-1:]:
            longest = max(context, joint)
            expect(
                longest <= self.encoder.max_positions,
                f"the last of data.buckets has {longest} encoder tokens but encoder.max_positions is "
                f"{self.encoder.max_positions}",
            )
            expect(
                reply + 1 + prompt <= self.decoder.max_positions,
                f"the last of data.buckets has {reply} reply tokens; with "
                + (f"{prompt} of the context and " if prompt else "")
                + f"the latent's position that exceeds decoder.max_positions {self.decoder.max_positions}",
            )
            expect(
                min(context, reply) >= 8 and joint >= context,
                f"the last of data.buckets, {buckets[-1]}, needs at least 8 tokens each and a joint length no "
                "shorter than the context's",
            )
        expect(
            self.decode.max_new_tokens + 2 + prompt <= self.decoder.max_positions,
            f"decode.max_new_tokens {self.decode.max_new_tokens} + {2 + prompt} exceeds decoder.max_positions "
            f"{self.decoder.max_positions}",
        )
        expect(
            0 <= self.decode.min_new_tokens <= self.decode.max_new_tokens,
            f"decode.min_new_tokens {self.decode.min_new_tokens} is not between 0 and decode.max_new_tokens "
            f"{self.decode.max_new_tokens}",
        )
        expect(
            self.train.accumulate >= 1 and self.train.batch_size % max(self.train.accumulate, 1) == 0,
            f"train.batch_size {self.train.batch_size} is not divisible by train.accumulate {self.train.accumulate}",
        )
        expect(
            0 <= self.sample.beta_min <= self.sample.beta_max,
            f"sample.beta_min {self.sample.beta_min} is not between 0 and sample.beta_max {self.sample.beta_max}",
        )
        expect(0 <= self.seed < 2**63, f"seed is {self.seed}; it must be at least 0 and have at most 63 bits")
        expect(self.train.steps or self.train.epochs > 0, "train.steps and train.epochs are both 0")

        for wanted, holds, paths in _LIMITS:
            for path in paths.split():
                value = operator.attrgetter(path)(self)
                expect(holds(value), f"{path} is {value}; it must be {wanted}")
        for prefix, part in parts:
            for f in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
                value, choices = getattr(part, f.name), get_args(f.type)
                if f.type is int and f.name != "seed":
                    expect(abs(value) < 2**31, f"{prefix}{f.name} is {value}; it must have at most 31 bits")
                if f.type is float:
                    expect(abs(value) != math.inf, f"{prefix}{f.name} is {value}; it must be finite")
                if get_origin(f.type) is Literal:
                    expect(value in choices, f"{prefix}{f.name} is {value!r}; it must be one of {', '.join(choices)}")
        if problems:
            raise UserError("the config is inconsistent: " + "; ".join(problems))


WIDEST, DEEPEST = 2**20, 2**10
"""Of a model's sizes and of its layers. The largest models have a tenth of either; beyond, a file's number is an error
that would be told by a lack of memory."""
_LIMITS = (
    ("at least 1", lambda x: x >= 1, """
        encoder.segments encoder.vocab_size encoder.width encoder.depth encoder.heads encoder.mlp encoder.max_positions
        decoder.vocab_size decoder.width decoder.depth decoder.heads decoder.mlp decoder.max_positions
        latent.size latent.hidden loss.kl_period train.batch_size train.log_every train.eval_every train.save_every
        train.latent_batch_size train.keep sample.max_steps sample.langevin_steps sample.batch_size mesh.fsdp
        mesh.model"""),
    ("at least 0", lambda x: x >= 0, """
        encoder.init_std decoder.init_std loss.reconstruct loss.kl loss.kl_floor loss.classify loss.gap train.steps
        train.latent_steps train.save_minutes decoder.lora_rank decoder.context_tokens
        train.weight_decay train.refit_epochs sample.fixed_steps sample.langevin_step sample.langevin_temperature
        sample.weight decode.batch_size decode.temperature mesh.shard_above_mb"""),
    ("above 0", lambda x: x > 0, """
        encoder.norm_eps decoder.norm_eps train.learning_rate train.refit_learning_rate train.clip sample.rtol
        sample.atol sample.langevin_decay"""),
    (f"at most {WIDEST:,}", lambda x: x <= WIDEST, """
        encoder.segments encoder.vocab_size encoder.width encoder.mlp encoder.max_positions decoder.vocab_size
        decoder.width decoder.mlp decoder.max_positions decoder.lora_rank latent.size latent.hidden"""),
    (f"at most {DEEPEST:,}", lambda x: x <= DEEPEST, "encoder.depth decoder.depth"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "encoder.dropout decoder.dropout decoder.word_dropout train.beta2"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "loss.kl_zero train.warmup"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "decode.top_p"),
)  # fmt: skip
"""(what a field must be in words, the test, the fields)"""


def to_dict(config) -> dict:
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, where: str = "config"):
    """Builds dataclass `cls` from nested dicts and lists, as JSON gives them; unknown names and wrong types raise
    UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}; expected an object with fields")
    known = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; it has {', '.join(known)}"
            raise UserError(f"{where} has no field {name!r}{hint}")
        kind = known[name].type
        if kind == Gpt2 | Llama:
            kind = Llama if isinstance(value, dict) and value.get("family") == "llama" else Gpt2
        if dataclasses.is_dataclass(kind):
            built[name] = from_dict(kind, value, f"{where}.{name}")
            continue
        if isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        if not _fits(value, kind):
            raise UserError(f"{where}.{name} is {value!r}; expected {getattr(kind, '__name__', kind)}")
        built[name] = value
    return cls(**built)


def _fits(value, kind) -> bool:
    """Whether a value is of a field's type; the choices of a Literal are checked elsewhere."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[-1] is ... else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if value != value or (isinstance(value, int) and abs(value) >= 2**64):  # NaN, and what no float can hold
        return False
    if kind in (int, float, bool, str):
        return isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    return True


def load_file(path: str | Path) -> Config:
    """The config that a Python file's `get_config()` or a run's `config.json` describes."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; the bundled ones are in configs/")
    if path.suffix == ".json":
        return _from_json(path)
    try:
        made = runpy.run_path(str(path)).get("get_config", lambda: None)()
    except UserError:
        raise
    except Exception as error:  # a user's program can raise anything
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        own = isinstance(error, SyntaxError) and error.filename == str(path)
        line = error.lineno if own else inside[-1] if inside else 1
        raise UserError(f"config file {path}:{line}: {type(error).__name__}: {error}") from None
    if not isinstance(made, Config):
        raise UserError(f"config file {path} defines no function get_config() that returns a Config")
    return made


def load_run(workdir: str | Path) -> Config:
    """The config that a run was trained with."""
    path = local_folder(workdir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{workdir} holds no run (no config.json); train one with python -m miracle_jax.train --workdir "
            f"{workdir} --config configs/tiny.py"
        )
    settings = _from_json(path)
    try:
        settings.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return settings


def _from_json(path: Path) -> Config:
    """A config in JSON: alone, or as `config` beside what else a run's config.json records."""
    values = reading.parse(reading.content(path, reading.LONGEST), f"{path} is not valid JSON")
    values = values.get("config", values) if isinstance(values, dict) else values
    return from_dict(Config, values, f"{path}: config")


def local_folder(workdir: str | Path) -> Path:
    """A run's folder. Raises UserError for a remote one."""
    if "://" in str(workdir):
        raise UserError(
            f"{workdir} is not a local folder; a run is kept on a local disk, only data.cache may be remote"
        )
    return Path(workdir).expanduser()
