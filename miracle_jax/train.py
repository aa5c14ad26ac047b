"""Trains MIRACLE: stage 1 is the CVAE with its losses (section 2.5), stage 2 refits the attribute heads (appendix C.2).

One batch travels: pipeline -> prior and posterior encoder -> z -> decoder and heads -> losses -> AdamW.
A run starts from, in this order: 1. the newest checkpoint in its workdir, 2. pretrained weights for the parts that name
some, 3. random weights. It says which.
The same command again resumes, and a resumed run equals an uninterrupted one bit for bit.

    python -m miracle_jax.train --config configs/tiny.py --workdir runs/tiny [--train.steps 500 ...]
"""

import contextlib
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from miracle_jax import checkpoint, cluster, dataset, goodput, losses, mesh, pipeline, pretrained, reading, storage
from miracle_jax.command_line import read_config
from miracle_jax.config import Config, load_run, local_folder, to_dict
from miracle_jax.cvae import Miracle, check_device, join, split
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.examples import read_arrays
from miracle_jax.hub import absolute
from miracle_jax.latent import Heads
from miracle_jax.latent import kl as gaussian_kl
from miracle_jax.loop import of_batches, take_steps
from miracle_jax.report import Report
from miracle_jax.stages import encoder_means, head_accuracy, prior_means, refit, warm_up
from miracle_jax.tokenizers import Tokenizers

# What may differ between a run and its resumption: nothing that changes a parameter or what was learned from.
# (The data have a key of their own, made from their content: where they are found does not matter.)
FREE_TO_CHANGE = ("sample", "decode", "mesh", "data.train", "data.validation", "data.schema", "data.frozen",
                  "data.cache", "train.log_every", "train.save_minutes", "train.on_nan", "train.keep",
                  "train.tensorboard", "train.trackio")  # fmt: skip


def make_optimizer(config: Config, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW after clipping; the learning rate rises for `warmup` of the steps, then falls linearly, to 0 after the
    last step."""
    settings = config.train
    warm = max(int(settings.warmup * steps), 1)
    schedule = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(settings.learning_rate / warm, settings.learning_rate, warm - 1),
            optax.schedules.linear_schedule(settings.learning_rate, 0.0, steps - warm + 1),
        ],
        [warm - 1],
    )
    adamw = optax.adamw(schedule, b2=settings.beta2, weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw), schedule


class Keys(NamedTuple):
    """The run's random keys, one for each use."""

    init: Key[Array, ""]
    steps: Key[Array, ""]
    refit: Key[Array, ""]
    warm_up: Key[Array, ""]

    @classmethod
    def of(cls, seed: int) -> "Keys":
        return cls(*jax.random.split(jax.random.key(seed), 4))


NOTHING: dict = {}


def make_train_step(config: Config, graphdef, optimizer, key, shardings=None):
    """The jitted step: (state, batch, frozen) -> (state, losses). state is donated; it is traced once a batch shape.

    key: of dropout and of the draws of z; each step takes its own from it.
    shardings: the state's. Without them XLA may return a state laid out differently, and the next step compiles anew.
    """

    def whole(params):
        """All but the layers' parameters, which each layer gathers for itself."""
        flat = flatten_dict(params)
        return unflatten_dict(
            {path: leaf if "blocks" in path else mesh.gathered(leaf, config.mesh) for path, leaf in flat.items()}
        )

    def loss(params, micro_batch, key, cycle, total, frozen):
        with mesh.within(shardings):
            out = nnx.merge(graphdef, whole(join(params, frozen)))(micro_batch, key, noise=cycle)
            named = losses.parts(out, micro_batch, config.loss, total)
        return losses.weighted_sum(named, config.loss, cycle), named

    @cluster.together
    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch, frozen=NOTHING):
        params, step = state["params"], state["step"]
        micro_batches = batch["reply"].shape[0]
        cycle = losses.kl_cycle(step, config.loss)
        total = losses.counts(batch)
        keys = jax.random.split(jax.random.fold_in(key, step), micro_batches)
        gradient = partial(jax.grad(loss, has_aux=True), cycle=cycle, total=total, frozen=frozen)

        def add(sums, micro):
            return jax.tree.map(jnp.add, sums, gradient(params, *micro)), None

        first = jax.tree.map(lambda x: x[0], (batch, keys))
        if micro_batches == 1:  # no sums, which would be another copy of the parameters in memory
            gradients, named = gradient(params, *first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, *first))
            (gradients, named), _ = jax.lax.scan(add, zeros, (batch, keys))
        named["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state["opt_state"], params)
        new = {"params": optax.apply_updates(params, updates), "opt_state": opt_state, "step": step + 1}
        if config.train.on_nan == "skip":
            good = losses.sound(named)
            new = jax.tree.map(partial(jnp.where, good), new, state | {"step": step + 1})
            named["skipped"] = ~good
        return new, named

    return train_step


def make_validation_step(config: Config, graphdef, shardings=None):
    """The jitted sums of one validation batch: (params, batch) -> named sums; see `validate`.

    shardings: as of `make_train_step`.
    """

    @cluster.together
    @jax.jit
    def validation_step(params, batch):
        with mesh.within(shardings):
            return sums_of(nnx.merge(graphdef, params), batch)

    def sums_of(model, batch):
        out = model(batch)  # no key: z is the posterior's mean
        reply, length, weight = batch["reply"], batch["reply_length"], losses.row_weight(batch)
        prior_hidden = (
            out.hidden
            if out.posterior is None
            else model.decoder.states(reply, out.prior.mean, None, batch.get("prompt"), batch.get("prompt_length"))
        )
        head_logits = model.heads(out.prior.mean)
        known = (batch["labels"] >= 0) * weight[:, None]
        sums = {
            "tokens": jnp.sum(weight * (length - 1)),
            "labels": jnp.sum(known),
            "instances": jnp.sum(weight),
            "reconstruct_prior": losses.reconstruction(prior_hidden, out.lm_head, reply, length, weight),
            "classify": losses.classification(head_logits, batch["labels"], weight),
            "correct": jnp.sum(known * (jnp.argmax(head_logits, -1) == batch["labels"]), axis=0),
            "labelled": jnp.sum(known, axis=0),
        }
        if out.posterior is not None:
            raw = jnp.sum(gaussian_kl(out.posterior, out.prior), axis=-1)
            floored = losses.floored_kl(out.posterior, out.prior, config.loss.kl_floor)
            sums["reconstruct_posterior"] = losses.reconstruction(out.hidden, out.lm_head, reply, length, weight)
            sums["kl_raw"], sums["kl_floored"] = jnp.sum(weight * raw), jnp.sum(weight * floored)
        return sums

    return validation_step


def validate(validation_step, params, batches, config: Config, names: tuple[str, ...]) -> dict[str, float]:
    """Losses on the validation set: reconstruction (nats a token) from posterior and prior mean, KL raw and floored
    (nats an instance), classification of the prior mean (nats a label), accuracy per attribute, and `score`, by which
    the best checkpoint is chosen: prior reconstruction + loss.classify x classification."""
    sums = of_batches(partial(validation_step, params), batches)
    total = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *sums)
    per = {"reconstruct_posterior": "tokens", "reconstruct_prior": "tokens", "classify": "labels",
           "kl_raw": "instances", "kl_floored": "instances"}  # fmt: skip
    values = {name: float(total[name] / max(total[count], 1.0)) for name, count in per.items() if name in total}
    values["score"] = values["reconstruct_prior"] + config.loss.classify * values["classify"]
    for name, correct, labelled in zip(names, total["correct"], total["labelled"], strict=True):
        if labelled:
            values[f"accuracy_{name}"] = float(correct / labelled)
    return values


def run_folder(workdir: str | Path) -> Path:
    """The folder of --workdir, which may be new. Raises UserError for what cannot become one."""
    workdir = local_folder(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder, which may be new")
    return workdir


def start_run(config: Config, workdir: Path, corpus, control: str | None = None) -> None:
    """Writes what the run's parameters mean, or makes sure that a resumed run still means the same.

    control: of a run of baseline.py; None: of this module.
    """
    path = workdir / "config.json"
    # By absolute paths, by which the run finds its files from any folder.
    config = dataclasses.replace(
        config, data=dataset.absolute(config.data),
        encoder=dataclasses.replace(config.encoder, pretrained=absolute(config.encoder.pretrained)),
        decoder=dataclasses.replace(config.decoder, pretrained=absolute(config.decoder.pretrained)),
    )  # fmt: skip
    now = {"config": to_dict(config), "data": corpus.key} | ({"control": control} if control else {})
    if path.exists():
        then = reading.json_object(path)
        if not isinstance(then.get("config"), dict):
            raise UserError(f"{path} is not as training writes it; restore it from a copy, or give another --workdir")
        if then.get("control") != control:
            what = f"the baseline --control {then['control']}" if then.get("control") else "a run of miracle_jax.train"
            raise UserError(f"{workdir} holds {what}; give another --workdir")
        differences = _differences(then["config"], json.loads(json.dumps(now["config"])))
        differing = {
            name: old for name, (old, _) in differences.items()
            if not any(name == free or name.startswith(free + ".") for free in FREE_TO_CHANGE)
        }  # fmt: skip
        if ABSENT in differing.values() and not (workdir / "model.json").exists():
            new = ", ".join(name for name, old in differing.items() if old is ABSENT)
            raise UserError(
                f"{workdir} holds a run of an earlier version, which had no {new}; finish it with that version, or "
                "give another --workdir"
            )
        if differing := [name for name, old in differing.items() if old is not ABSENT]:
            raise UserError(
                f"{workdir} holds a run with another {', '.join(differing)}; give the same flags to resume it, or "
                "another --workdir to start anew"
            )
        if then.get("data") != corpus.key:
            raise UserError(
                f"{workdir} holds a run on other data; restore the files to resume it, or give another --workdir"
            )
    if not cluster.first():
        return
    corpus.tokenizers.save(workdir / "tokenizers")
    corpus.schema.save(workdir / "schema.toml")
    with storage.replacing(path) as file:
        file.write(json.dumps(now, indent=2).encode())


ABSENT = object()
"""What `_differences` has for the value of a field that there is not."""


def _differences(old: dict, new: dict, prefix: str = "") -> dict:
    found = {}
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, ABSENT), new.get(name, ABSENT)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[prefix + name] = (a, b)
    return found


def train(config: Config, workdir: str | Path) -> dict:
    """Runs or resumes a whole training run and returns what model.json holds."""
    workdir = run_folder(workdir)
    with contextlib.ExitStack() as held:
        return _train(config, workdir, held)


def _train(config: Config, workdir: Path, held: contextlib.ExitStack) -> dict:
    """held: keeps the folder locked until the end."""
    ledger = goodput.Ledger()
    finished = workdir / "model.json"
    resumed = (workdir / "config.json").exists()  # written last: a run without it has not begun
    config = pretrained.resolve(config, load_run(workdir) if resumed else None)
    config.check()
    check_device(config)

    # ---- Data
    devices = mesh.make(config.mesh)  # first, since all processes have to look for their devices together
    tokenizers = Tokenizers.load(workdir / "tokenizers") if resumed else None
    corpus = cluster.one_first(lambda: pipeline.prepare(config, tokenizers))
    micro_batch = config.train.batch_size // config.train.accumulate
    mesh.check_batch(micro_batch, devices, "train.batch_size / train.accumulate")
    own = mesh.own_rows(micro_batch, devices)

    def in_order(examples, columns=None, among=None):
        for batch in pipeline.evaluation_batches(examples, config.data.buckets, micro_batch, own, columns, among):
            yield mesh.put_batch(batch, devices, batch_axis=0)

    batches = pipeline.Batches(
        corpus.train, config.data.buckets, config.train.batch_size, config.train.accumulate, config.seed, own,
        mesh.shares_of(devices) if config.data.pack else 0,
    )  # fmt: skip
    steps = config.train.steps or max(round(config.train.epochs * batches.steps_per_epoch), 1)

    # ---- Model and optimizer
    keys = Keys.of(config.seed)
    sizes, names = corpus.schema.sizes, corpus.schema.names
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Miracle(config, sizes, nnx.Rngs(0))))
    optimizer, schedule = make_optimizer(config, steps)

    def random():
        return nnx.to_pure_dict(nnx.state(Miracle(config, sizes, nnx.Rngs(keys.init))))

    if cluster.first():
        held.enter_context(storage.locked(workdir))
    cluster.one_first(lambda: start_run(config, workdir, corpus))
    if finished.exists():
        print(f"{workdir} is finished; python -m miracle_jax.generate {workdir} talks to it", flush=True)
        return reading.json_object(finished)

    # ---- Start
    with ledger.of("restore"):
        checkpoints, state, frozen, abstract = starting_point(config, workdir, random, optimizer, devices)
    start = int(state["step"])
    number = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    print(
        f"{number / 1e6:.2f} M parameters, {len(corpus.train)} instances, {steps} steps of {config.train.batch_size} "
        f"on {devices.size} {jax.default_backend()} device(s), padding {batches.padding_fraction:.0%}",
        flush=True,
    )

    # ---- Frozen encoders read every text once; the latents warm up on that
    ledger.open("heads")
    columns = {"train": None, "validation": None}
    if config.encoder.frozen:
        params = join(state["params"], frozen)
        for name, part in (("train", corpus.train), ("validation", corpus.validation)):
            columns[name] = _read_once(workdir, name, graphdef, params, part)
        batches.columns = columns["train"]
    if config.train.latent_steps and not start:
        began = time.perf_counter()
        data = mesh.place(columns["train"] | {"labels": corpus.train.labels}, mesh.replicated(devices))
        warm = warm_up(config, graphdef, state["params"], frozen, data, keys.warm_up)
        state["params"] = jax.device_put(warm, jax.tree.map(lambda leaf: leaf.sharding, abstract["params"]))
        jax.block_until_ready(state["params"])
        took = time.perf_counter() - began
        print(f"{config.train.latent_steps} steps on latents alone took {took:.0f} s", flush=True)
    validation = list(in_order(corpus.validation, columns["validation"]))

    # ---- Stage 1
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    train_step = partial(make_train_step(config, graphdef, optimizer, keys.steps, shardings), frozen=frozen)
    validation_step = make_validation_step(config, graphdef, shardings)

    def score(params):
        return validate(validation_step, join(params, frozen), validation, config, names)

    def stream(start):
        return (mesh.put_batch(batch, devices, batch_axis=1) for batch in batches.stream(start))

    report = Report(workdir, config.train, start, steps)
    state = take_steps(config.train, state, stream, train_step, schedule, score, checkpoints, report, ledger)

    # ---- Stage 2: on the best checkpoint
    ledger.open("heads")
    began = time.perf_counter()
    best = checkpoints.best()
    if best != steps:
        state = checkpoints.restore(best, abstract)
    params = join(state["params"], frozen)
    del state
    heads_graph = nnx.graphdef(nnx.eval_shape(lambda: Heads(config.latent, sizes, nnx.Rngs(0))))
    seen = prior_means(graphdef, params, validation)
    accuracy = {"joint": head_accuracy(heads_graph, params["heads"], seen, names)}
    refitted = params["heads"]
    labelled = (corpus.train.labels >= 0).any(axis=1)
    if config.train.refit_epochs and labelled.any():
        learned_from = prior_means(graphdef, params, in_order(corpus.train, columns["train"], labelled))
        refitted = refit(config, sizes, mesh.place(learned_from, mesh.replicated(devices)), keys.refit)
        accuracy["refit"] = head_accuracy(heads_graph, refitted, seen, names)
    heads = max(accuracy, key=lambda name: accuracy[name].get("mean", 0.0))
    for name, facts in accuracy.items():
        if not facts:
            print(f"{name} heads are not measured: no validation instance has a label", flush=True)
            continue
        turns = "  ".join(f"turn {turn} {value:.1%}" for turn, value in facts["turn"].items())
        print(f"{name} heads on validation contexts: {facts['mean']:.1%}  ({turns})", flush=True)
    print(f"stage 2 took {time.perf_counter() - began:.0f} s; the energy will use the {heads} heads", flush=True)

    # ---- End
    report.plot()
    facts = {"step": best, "heads": heads, "accuracy": accuracy, "hardware": mesh.hardware()}
    checkpoint.save_model(workdir, {"miracle": split(config, params)[0], "refit_heads": refitted}, facts)
    checkpoints.close()
    report.write(goodput.SPLIT, steps, ledger.take())
    print(goodput.sentence(goodput.total(workdir / "metrics.jsonl")), flush=True)
    print(f"finished: {workdir} holds the model of step {best}", flush=True)
    return facts


def starting_point(config: Config, workdir: Path, random, optimizer, devices):
    """Where a run starts: 1. the newest checkpoint, 2. pretrained weights, 3. random weights. It says which.

    random: () -> nested dict of random parameters, those among them for which `config` names pretrained weights.

    Returns:
      The run's checkpoints; the state {"params", "opt_state", "step"}; the parameters that stay as they
      were pretrained; and the state's shapes with their shardings.
    """

    def layout(tree):
        return mesh.parameter_shardings(tree, devices, config.mesh)

    def initial(params):
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

    trained_shapes, frozen_shapes = split(config, jax.eval_shape(random))
    shapes = jax.eval_shape(initial, trained_shapes)
    shardings = layout(shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep)
    start = checkpoints.newest()
    params, named = {}, [part.pretrained for part in (config.encoder, config.decoder) if part.pretrained]
    if not start or frozen_shapes:
        params = cluster.together(jax.jit(random, out_shardings=layout(jax.eval_shape(random))))()
    if params and named:
        params, fresh = pretrained.start_from(config, mesh.fetch(params))
        params = mesh.place(params, layout(params))
    trained, frozen = split(config, params)
    if start:
        state = checkpoints.restore(start, abstract)
        print(f"resuming from {workdir}/checkpoints/{start}", flush=True)
    else:
        state = cluster.together(jax.jit(initial, out_shardings=shardings))(trained)
        what = f"{' and '.join(named)}; random are {', '.join(_modules(fresh))}" if named else "random weights"
        print(f"starting from {what}", flush=True)
    return checkpoints, state, frozen, abstract


def _modules(paths: list[str]) -> list[str]:
    """decoder.layers.blocks.qkv.adapter_in -> decoder.layers.blocks.qkv; each once. What is said of rows stays."""
    return list(dict.fromkeys(path if path.endswith(")") else path.rpartition(".")[0] for path in paths))


def _read_once(workdir: Path, name: str, graphdef, params, examples) -> dict[str, np.ndarray]:
    """`encoder_means` of a split, kept in the run's folder."""
    path = workdir / f"encoded-{name}.npz"
    if not path.exists():
        began = time.perf_counter()
        means = encoder_means(graphdef, params, examples)
        if cluster.first():
            with storage.replacing(path) as file:
                np.savez(file, **means)
        took = time.perf_counter() - began
        print(f"the frozen encoders read {len(examples)} {name} instances in {took:.0f} s", flush=True)
        return means
    return read_arrays(path)


def read_command(command: str, doc: str, argv: list[str] | None = None) -> tuple[Config, str]:
    """Reads the command line of a training run: (config, --workdir). Raises UserError where either is missing."""
    config, file, workdir = read_config(command, doc + cluster.HELP, argv)
    if not workdir:
        raise UserError("--workdir is missing; it names the folder of the run, for instance --workdir runs/tiny")
    if not file:
        raise UserError("--config is missing; the bundled ones are in configs/, for instance configs/tiny.py")
    return config, workdir


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        argv = cluster.join(argv)
        train(*read_command("python -m miracle_jax.train", __doc__, argv))


if __name__ == "__main__":
    main()
