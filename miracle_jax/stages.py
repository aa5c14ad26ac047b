"""What happens on latents alone, before and after the training of the CVAE: reading texts with frozen encoders, warming
the latents up, refitting the attribute heads (appendix C.2), and measuring them.

Axis letters: N instances, D model, Z latent, A attributes.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from miracle_jax import cluster, losses, mesh
from miracle_jax.config import Config
from miracle_jax.cvae import join
from miracle_jax.examples import Examples
from miracle_jax.latent import Heads
from miracle_jax.losses import Counts
from miracle_jax.pipeline import by_length


def encoder_means(graphdef, params, examples: Examples) -> dict[str, np.ndarray]:
    """What frozen encoders make of every text: {"context_mean", "joint_mean"}, (N, D) float32."""

    @cluster.together
    @partial(jax.jit, static_argnames="encoder")
    def means(params, tokens, length, encoder):
        return getattr(nnx.merge(graphdef, params), encoder).bert.mean(tokens, length)

    def read(tokens, length, encoder):
        return mesh.fetch(means(params, tokens, length, encoder))

    encoders = {"context": "prior", "joint": "posterior"} if "posterior" in params else {"context": "prior"}
    return {
        f"{name}_mean": by_length(
            partial(read, encoder=encoder),
            examples.lengths[:, field],
            lambda rows, field=field: [row[field] for row in examples.tokens(rows)],
            examples.padding[field],
        )
        for field, (name, encoder) in enumerate(encoders.items())
    }


def warm_up(config: Config, graphdef, params: dict, frozen: dict, data: dict[str, np.ndarray], key) -> dict:
    """Trains Gaussians and heads without the decoder, by the losses of stage 1 that need none.

    data: {"context_mean", "joint_mean", "labels"} of all training instances, as `encoder_means` gives them.
    """
    batch_size = min(config.train.latent_batch_size, len(data["labels"]))

    def loss(params, data, rows, key):
        model = nnx.merge(graphdef, join(params, data["frozen"]))
        labels, ones = data["labels"][rows], jnp.ones(batch_size)
        prior = model.prior.of_mean(data["context_mean"][rows])
        total = Counts(1.0, jnp.sum(labels >= 0), batch_size, 1.0)
        if config.loss.posterior:
            posterior = model.posterior.of_mean(data["joint_mean"][rows])
            kl = losses.floored_kl(posterior, prior, config.loss.kl_floor).mean()
        else:
            posterior, kl = prior, 0.0
        z = posterior.sample(key)
        named = {
            "kl": kl, "gap": losses.attribute_gap(z, labels, config.loss.gap_distance),
            "classify": losses.classification(model.heads(z), labels, ones) / jnp.maximum(total.labels, 1),
        }  # fmt: skip
        return losses.weighted_sum(named, config.loss, 1.0)

    data = {"frozen": frozen} | {name: jnp.asarray(column) for name, column in data.items()}
    settings = config.train
    return fit(loss, params, data, batch_size, settings.latent_steps, settings.refit_learning_rate, key)


def prior_means(graphdef, params, batches: Iterable[dict]) -> dict[str, np.ndarray]:
    """The prior's mean of every example: {"z": (N, Z), "labels": (N, A), "turn": (N,)}, filled-up rows left out."""

    @cluster.together
    @jax.jit
    def encode(params, batch):
        prior = nnx.merge(graphdef, params).prior
        if "context_mean" in batch:
            return prior.of_mean(batch["context_mean"]).mean
        return prior(batch["context"], batch["context_length"]).mean

    rows = []
    for batch in batches:
        known = {name: batch[name] for name in ("labels", "turn", "weight")}
        columns = mesh.fetch(known | {"z": encode(params, batch)})
        counted = columns.pop("weight") > 0
        rows.append({name: column[counted] for name, column in columns.items()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def refit(config: Config, sizes: tuple[int, ...], data: dict[str, np.ndarray], key) -> dict:
    """Stage 2: new heads trained on frozen prior means. Returns their parameters."""
    init_key, steps_key = jax.random.split(key)
    graphdef, params = nnx.split(Heads(config.latent, sizes, nnx.Rngs(init_key)))
    batch_size = min(config.train.batch_size, len(data["z"]))
    steps = max(int(config.train.refit_epochs * len(data["z"]) / batch_size), 1)

    def loss(params, data, rows, key):
        labels = data["labels"][rows]
        logits = nnx.merge(graphdef, params)(data["z"][rows])
        return losses.classification(logits, labels, jnp.ones(batch_size)) / jnp.maximum(jnp.sum(labels >= 0), 1)

    data = {name: jnp.asarray(data[name]) for name in ("z", "labels")}
    rate = config.train.refit_learning_rate
    return fit(loss, nnx.to_pure_dict(params), data, batch_size, steps, rate, steps_key)


def fit(
    loss: Callable, params: dict, data: Any, batch_size: int, steps: int, learning_rate: float, key,
    weight_decay: float = 0.0,
) -> dict:  # fmt: skip
    """Minimises loss(params, data, rows, key) over random rows of data["labels"] by AdamW, its rate falling linearly
    to 0."""
    optimizer = optax.adamw(optax.schedules.linear_schedule(learning_rate, 0.0, steps), weight_decay=weight_decay)

    @jax.jit
    def run(params, data):
        def step(carry, step_key):
            params, opt_state = carry
            rows_key, loss_key = jax.random.split(step_key)
            rows = jax.random.choice(rows_key, len(data["labels"]), (batch_size,), replace=False)
            updates, opt_state = optimizer.update(jax.grad(loss)(params, data, rows, loss_key), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]

    return run(params, data)


def head_accuracy(heads_graph, params, data: dict[str, np.ndarray], names: tuple[str, ...]) -> dict:
    """Accuracy on the prior means of contexts: per attribute, their mean, and per turn (contexts of a first turn
    carry no aspect, since nothing was answered yet). Empty where none has a label."""
    guess = np.argmax(np.asarray(nnx.merge(heads_graph, mesh.fetch(params))(jnp.asarray(data["z"]))), axis=-1)
    known = data["labels"] >= 0
    if not known.any():
        return {}
    right = (guess == data["labels"]) & known
    per_attribute = {
        name: float(right[:, a].sum() / known[:, a].sum()) for a, name in enumerate(names) if known[:, a].any()
    }
    per_turn = {
        int(turn): float(right[data["turn"] == turn].sum() / known[data["turn"] == turn].sum())
        for turn in np.unique(data["turn"])
        if known[data["turn"] == turn].any()
    }
    return {"mean": float(np.mean(list(per_attribute.values()))), "attribute": per_attribute, "turn": per_turn}
