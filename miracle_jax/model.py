"""A trained model to talk to: contexts and personalities in, replies out.

    import miracle_jax as mj

    model = mj.load("runs/tiny")
    print(model.reply(["How was your day?"], "lyrical, critical").text)

Path of a batch: contexts -> prior encoder -> z(T) -> ODE down the energy -> z(0) -> decoder -> replies.
"""

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from miracle_jax import checkpoint, config, dataset, decode, pretrained, reading, storage
from miracle_jax.attributes import Personality, Schema
from miracle_jax.cvae import Miracle, join, split
from miracle_jax.energy import aspect_probabilities
from miracle_jax.errors import UserError
from miracle_jax.latent import Gaussian, Heads
from miracle_jax.pieces import in_pieces
from miracle_jax.sampler import SampleResult, sample
from miracle_jax.tokenizers import Tokenizers

log = logging.getLogger("miracle_jax")

Context = Sequence[str] | Mapping[str, Any]

CONTEXTS, REPLIES = 128, 8192  # at a time, where decode.batch_size does not say; fewer when memory runs out
SHORT = 16, 32, 64  # widths at which contexts are encoded that are shorter than all buckets, as most in a corpus are


@dataclasses.dataclass(frozen=True)
class Reply:
    """One reply and what the model knows about it."""

    text: str
    personality: str
    """The aspects that were asked for, by name."""
    aspects: dict[str, dict[str, float]]
    """For every attribute, the probability that its classifier gives each aspect at the latent z(0)."""
    energy: float
    """E(P|z(0)) in nats; low means that the personality is strong."""
    energy_before: float
    """The same at z(T), before the ODE."""
    steps: int
    """Steps that the solver took."""
    ok: bool
    """False: the solver did not arrive within sample.max_steps, or the latent or its energy is not finite."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the folder of a finished run, or of an export of it, holds."""

    run: config.Config
    schema: Schema
    tokenizers: Tokenizers
    facts: dict
    """model.json."""
    miracle: dict
    """All parameters of the Miracle, float32."""
    refit_heads: dict


def read_run(workdir: str | Path) -> Stored:
    """Reads a finished run, or an export of one (a local folder or a gs:// path).

    Raises UserError when the folder holds none or its parameters do not fit its config.
    """
    workdir = storage.run_folder(workdir)
    run = config.load_run(workdir)
    if (workdir / "baseline.json").is_file():
        raise UserError(
            f"{workdir} holds a baseline, which has no latent; python -m miracle_jax.evaluate takes its replies with "
            f"--predictions NAME={workdir / 'replies.jsonl'}"
        )
    if not (workdir / "model.json").is_file():
        raise UserError(f"{workdir} is not finished (no model.json); run its python -m miracle_jax.train command again")
    facts = _facts(workdir / "model.json")
    schema = Schema.load(workdir / "schema.toml")
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Miracle(run, schema.sizes, nnx.Rngs(0)))))
    trained, frozen = split(run, shapes)
    heads = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Heads(run.latent, schema.sizes, nnx.Rngs(0)))))
    expected = {"miracle": trained, "refit_heads": heads}
    if facts.get("format") == "safetensors":
        params = pretrained.read_folder(workdir, run, expected)
    else:
        params = checkpoint.load_model(workdir, expected, facts.get("dtype", "float32"))
    miracle = params["miracle"]
    if frozen:
        nothing = pretrained.zeros(lambda: Miracle(run, schema.sizes, nnx.Rngs(0)))
        miracle = join(miracle, split(run, pretrained.start_from(run, nothing)[0])[1])
    tokenizers = Tokenizers.load(workdir / "tokenizers")
    tokenizers.check(run)
    return Stored(run, schema, tokenizers, facts, miracle, params["refit_heads"])


def _facts(path: Path) -> dict:
    """model.json. Raises UserError unless it has the form in which training writes it."""
    facts = reading.json_object(path)
    accuracy, heads = facts.get("accuracy"), facts.get("heads")
    kinds = ("joint", "refit")
    if not isinstance(accuracy, dict) or heads not in tuple(accuracy) or not accuracy.keys() <= set(kinds):
        raise UserError(f"{path} lacks accuracy or heads ({' or '.join(kinds)}); restore it from a copy")
    means = [figures.get("mean", 0.0) for figures in accuracy.values() if isinstance(figures, dict)]
    # NaN is what there is without a label.
    if len(means) < len(accuracy) or not all(type(mean) in (int, float) and not abs(mean) > 1 for mean in means):
        raise UserError(f"{path} has accuracies that are no shares; restore it from a copy")
    for name, known in (("format", ("orbax", "safetensors")), ("dtype", ("float32", "bfloat16"))):
        if facts.get(name, known[0]) not in known:
            raise UserError(f"{path}: {name} is {facts[name]!r}; expected {' or '.join(known)}")
    return facts


def load(workdir: str | Path) -> "Model":
    """Loads a finished run, for instance `runs/tiny`; an export of one, also from gs://; or `mini`, which ships.

    Raises UserError when there is none.
    """
    stored = read_run(workdir)
    run, miracle = merge_adapters(stored.run, stored.miracle)
    place = jax.local_devices()[0]
    miracle, refit_heads = jax.device_put((miracle, stored.refit_heads), place)
    sizes = stored.schema.sizes
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Miracle(run, sizes, nnx.Rngs(0))))
    heads_graph = nnx.graphdef(nnx.eval_shape(lambda: Heads(run.latent, sizes, nnx.Rngs(0))))
    heads = {"joint": miracle["heads"], "refit": refit_heads}
    heads = {name: nnx.merge(heads_graph, heads[name]) for name in stored.facts["accuracy"]}
    return Model(run, stored.schema, stored.tokenizers, nnx.merge(graphdef, miracle), heads, stored.facts["heads"])


def merge_adapters(run: config.Config, params: dict) -> tuple[config.Config, dict]:
    """The same model without adapters: their products are added to the matrices that they adapt."""
    if not run.decoder.lora_rank:
        return run, params
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1] == "adapter_in"]:
        *layer, _ = path
        update = jnp.matmul(flat.pop(path), flat.pop((*layer, "adapter_out")), precision="highest")
        flat[(*layer, "kernel")] = flat[(*layer, "kernel")] + update
    return dataclasses.replace(run, decoder=dataclasses.replace(run.decoder, lora_rank=0)), unflatten_dict(flat)


class Model:
    """A conditional VAE with its energy, ready to answer."""

    def __init__(
        self,
        run: config.Config,
        schema: Schema,
        tokenizers: Tokenizers,
        miracle: Miracle,
        heads: dict,
        default_heads: str,
    ):
        """heads: attribute heads, "joint" and "refit"; default_heads: those that `sample.heads = "auto"` takes."""
        self.config, self.schema, self.tokenizers, self.miracle = run, schema, tokenizers, miracle
        self.heads, self.default_heads = heads, default_heads
        self._allowed = np.arange(run.decoder.vocab_size) < tokenizers.decoder.size
        self._allowed[tokenizers.decoder.bos_id] = False
        self._encode = jax.jit(lambda encoder, tokens, length: encoder(tokens, length))

    def on(self, device: jax.Device) -> "Model":
        """The same with its parameters on that device."""
        replica = copy.copy(self)
        replica.miracle, replica.heads = jax.device_put((self.miracle, self.heads), device)
        return replica

    def reply(self, context: Context, personality: Personality = None, **options) -> Reply:
        """One reply; takes the options of `replies`."""
        return self.replies([context], [personality], **options)[0]

    def replies(
        self,
        contexts: Sequence[Context],
        personalities: Sequence[Personality] | Personality = None,
        *,
        weights: Mapping[str, float] | None = None,
        samples: int = 1,
        seed: int = 0,
        first: int = 0,
        sample: config.Sample | None = None,
        decode: config.Decode | None = None,
    ) -> list[Reply]:
        """Answers many contexts at once.

        Args:
          contexts: each a list of turns, question, reply, ..., question; or a mapping with `input` (M questions) and
            `output` (M - 1 replies; an M-th is a reference and is not read), as in data files.
          personalities: one for each context, or a single one for all: "lyrical, optimistic", None, or a mapping such
            as {"attitude": "optimistic"}. Attributes left out are not controlled.
          weights: energy weight of attributes, by name; others have `sample.weight`.
          samples: latents a context; from several, drawn from the prior, the one of lowest energy is kept.
          seed: of draws from the prior and of sampled text.
          first: number of the first context, where these are a part of more: what is drawn for a context depends on the
            seed and its number alone.
          sample, decode: settings in place of the run's.
        """
        for name, value, kind, text in (
            ("contexts", contexts, Sequence, "a list of contexts"), ("weights", weights or {}, Mapping, "a mapping"),
            ("sample", sample or config.Sample(), config.Sample, "a config.Sample"),
            ("decode", decode or config.Decode(), config.Decode, "a config.Decode"),
        ):  # fmt: skip
            if not isinstance(value, kind) or isinstance(value, str):
                raise UserError(f"{name} is {value!r}; expected {text}")
        if samples == 0:
            raise UserError("samples is 0; a context needs at least one latent")
        for name, value, least in (("samples", samples, 1), ("first", first, 0), ("seed", seed, -(2**63))):
            if not isinstance(value, int | np.integer) or not least <= value < 2**63:
                hint = f", at least {least}" if name != "seed" else ""
                raise UserError(f"{name} is {value!r}; expected a whole number{hint}")
        if (first + len(contexts)) * samples >= 2**31:
            raise UserError(f"first {first} is too large: contexts x samples are counted in 31 bits")
        sample, decode = sample or self.config.sample, decode or self.config.decode
        dataclasses.replace(self.config, sample=sample, decode=decode).check()
        if not contexts:
            return []
        if not isinstance(personalities, Sequence) or isinstance(personalities, str):
            personalities = [personalities] * len(contexts)
        if len(personalities) != len(contexts):
            raise UserError(
                f"there are {len(contexts)} contexts but {len(personalities)} personalities; give one for each"
            )
        aspects = np.array([self.schema.parse(personality) for personality in personalities], np.int32)
        prior = self.prior(contexts, decode.batch_size or CONTEXTS, sample.context_tokens)
        moved, probabilities = self.move(prior, aspects, weights, samples, seed, first, sample)
        texts = self.decode(moved.z, contexts, seed, first, decode)
        return [
            Reply(
                text=text,
                personality=self.schema.describe(aspects[i]),
                aspects={
                    attribute.name: {name: float(p) for name, p in zip(attribute.aspects, row, strict=False)}
                    for attribute, row in zip(self.schema.attributes, probabilities[i], strict=True)
                },
                energy=float(moved.energy_after[i]),
                energy_before=float(moved.energy_before[i]),
                steps=int(moved.steps[i]),
                ok=bool(moved.ok[i]),
            )
            for i, text in enumerate(texts)
        ]

    def prior(self, contexts: Sequence[Context], batch_size: int, context_tokens: int = 0) -> Gaussian:
        """The prior of every context, (B, Z) NumPy arrays, from at most `batch_size` rows at a time. Each is encoded at
        the length of the shortest bucket that holds it, or at one of SHORT that is shorter still. context_tokens: as
        sample.context_tokens."""
        widths = [bucket[0] for bucket in self.config.data.buckets]
        widths = [width for width in SHORT if width < widths[0]] + widths
        limit = min(context_tokens or widths[-1], widths[-1])
        pad = self.tokenizers.encoder.pad_id
        rows = [self.tokenizers.encoder.context(*turns(context), limit) for context in contexts]
        length = np.array([len(row) for row in rows], np.int32)
        width_of = np.array(widths)[np.searchsorted(widths, length)]
        found = Gaussian(*(np.empty((len(rows), self.config.latent.size), np.float32) for _ in Gaussian._fields))
        encoder = self.miracle.prior
        encode = partial(self._encode, encoder)
        for width in np.unique(width_of):
            chosen = np.flatnonzero(width_of == width)
            tokens = np.array([rows[i] + [pad] * (width - len(rows[i])) for i in chosen], np.int32)
            part = in_pieces(encode, (tokens, length[chosen]), batch_size, encoder)
            for column, values in zip(found, part, strict=True):
                column[chosen] = values
        return found

    def move(
        self,
        prior: Gaussian,
        aspects: np.ndarray,
        weights: Mapping[str, float] | None,
        samples: int,
        seed: int,
        first: int,
        settings: config.Sample,
    ) -> tuple[SampleResult, np.ndarray]:
        """One latent a context, moved to its aspects (B, A); and what the heads read in it, (B, A, N)."""
        heads = self._heads(settings)
        lambdas = np.full(len(self.schema.names), settings.weight, np.float32)
        for name, weight in (weights or {}).items():
            if not isinstance(weight, Real) or not 0 <= weight < float("inf"):
                raise UserError(f"the weight of {name} is {weight!r}; a weight is a finite number, at least 0")
            lambdas[self.schema.attribute_index(name)] = weight
        if samples > 1:
            settings = dataclasses.replace(settings, start="draw")
        rows = (prior.mean, prior.logvar, aspects, np.tile(lambdas, (len(aspects), 1)))
        repeated = (np.repeat(column, samples, axis=0) for column in rows)
        key = jax.random.fold_in(jax.random.key(seed), 0)
        moved = sample(heads, *repeated, settings, key, first * samples)
        if samples > 1:
            energy = np.where(moved.ok, moved.energy_after, np.inf).reshape(-1, samples)
            best = np.arange(len(aspects)) * samples + np.argmin(energy, axis=1)
            moved = SampleResult(*(column[best] for column in moved))
        finite = np.isfinite(moved.z).all(axis=1) & np.isfinite(moved.energy_after)
        late = f"did not arrive within sample.max_steps = {settings.max_steps}; raise it or loosen sample.rtol"
        burst = "are not finite; lower their weights or take smaller steps"
        for number, what in (((finite & ~moved.ok).sum(), late), ((~finite).sum(), burst)):
            if number:
                log.warning("%d of %d latents %s", number, len(aspects), what)
        return moved, np.asarray(aspect_probabilities(heads, jnp.asarray(moved.z)))

    def decode(
        self, z: np.ndarray, contexts: Sequence[Context], seed: int, first: int, settings: config.Decode
    ) -> list[str]:
        """Latents (B, Z) to texts. contexts: for a decoder that sees them; first: number of the first."""
        bos, eos = self.tokenizers.decoder.bos_id, self.tokenizers.decoder.eos_id
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def run(z, rows, *prompt):
            allowed = jnp.asarray(self._allowed)
            prompt, total = prompt or (None, None), len(np.unique(rows))  # copies of the last row fill up
            return decode.generate(self.miracle.decoder, z, rows, allowed, bos, eos, settings, key, *prompt, total)

        rows = (z, np.arange(first, first + len(z)), *self._prompts(contexts))
        read = None if settings.batch_size else self.miracle.decoder  # sharing, each core would have as many under way
        tokens, length = in_pieces(run, rows, REPLIES, read)
        return [self.tokenizers.decoder.decode(row[:n].tolist()).strip() for row, n in zip(tokens, length, strict=True)]

    def _prompts(self, contexts: Sequence[Context]) -> tuple[np.ndarray, ...]:
        """What the decoder sees of the contexts: tokens (B, P), padded on the left, and lengths (B,); or nothing."""
        if not self.config.decoder.sees_context:
            return ()
        seen = [self.tokenizers.decoder.prompt(*turns(context), self.config.decoder) for context in contexts]
        length = np.array([len(row) for row in seen], np.int32)
        width = -(-int(length.max()) // 16) * 16  # few shapes compile
        eos = self.tokenizers.decoder.eos_id
        return np.array([[eos] * (width - len(row)) + row for row in seen], np.int32), length

    def _heads(self, settings: config.Sample) -> Heads:
        name = self.default_heads if settings.heads == "auto" else settings.heads
        if name not in self.heads:
            raise UserError(f"sample.heads is {name} but this run has only {', '.join(self.heads)} heads")
        return self.heads[name]

    def fingerprint(self) -> str:
        """Changes with every parameter."""
        heads = {name: nnx.state(heads) for name, heads in self.heads.items()}
        return checkpoint.fingerprint((nnx.state(self.miracle), heads))


def turns(context: Context) -> tuple[list[str], list[str]]:
    """The M questions and the M - 1 replies before the one that is wanted. Raises UserError for anything else."""
    if isinstance(context, str):
        raise UserError(f"a context is a list of turns, not a text; write [{context[:40]!r}]")
    if not isinstance(context, Mapping | Sequence):
        raise UserError(f"a context is a list of turns or a mapping with input and output, not {context!r}")
    if isinstance(context, Mapping):
        questions, replies = context.get("input", ()), context.get("output", ())
        for part in (questions, replies):
            if isinstance(part, str) or not isinstance(part, Sequence):
                kind = "a text" if isinstance(part, str) else repr(part)
                raise UserError(f"the input and the output of a context are lists of turns, not {kind}")
        questions, replies = list(questions), list(replies)
        if questions and len(replies) == len(questions):
            replies = replies[:-1]
    else:
        questions, replies = list(context[0::2]), list(context[1::2])
    if not questions or len(replies) != len(questions) - 1:
        raise UserError(
            f"a context to answer ends with a question: it has M questions and M - 1 replies, not {len(questions)} and "
            f"{len(replies)}"
        )
    for turn in (*questions, *replies):
        if not isinstance(turn, str) or not turn.strip():
            raise UserError(f"a turn of the context is {turn!r}; every turn is a text that is not empty")
        if not dataset.is_unicode(turn):
            raise UserError(f"the turn {turn!r} has {dataset.NOT_UNICODE}; is it UTF-8?")
    return questions, replies
