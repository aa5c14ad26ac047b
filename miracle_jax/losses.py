"""All losses and their schedules (paper Eq. 3 to 6), as pure functions.

A mean that is taken over the whole optimizer step (tokens, labels, instances) is computed as a sum, so that
micro-batches add up; `Counts` holds what the sums are divided by.

Axis letters: B batch, S tokens, Z latent, A attributes, N aspects, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from miracle_jax import config, mesh
from miracle_jax.cvae import Outputs
from miracle_jax.decoder import LmHead
from miracle_jax.latent import Gaussian
from miracle_jax.latent import kl as gaussian_kl
from miracle_jax.packing import Packing

LARGEST = 1e6
"""A loss or gradient norm beyond it means nothing: nats a token are below 20, a KL divergence in the hundreds."""


class Counts(NamedTuple):
    """Over one optimizer step, all micro-batches and processes together."""

    tokens: Float[Array, ""]
    labels: Float[Array, ""]
    instances: Float[Array, ""]
    micro_batches: float


def counts(batch: dict[str, Array]) -> Counts:
    """batch: as the pipeline gives it, (G, B, ...) with G micro-batches. Rows with weight 0 do not count."""
    weight = row_weight(batch)
    return Counts(
        tokens=jnp.sum(weight * (batch["reply_length"] - 1)),
        labels=jnp.sum(weight[..., None] * (batch["labels"] >= 0)),
        instances=jnp.sum(weight),
        micro_batches=float(batch["reply"].shape[0]),
    )


def row_weight(batch: dict[str, Array]) -> Float[Array, "*B"]:
    """1 for rows that count, 0 for rows that fill up the last evaluation batch."""
    return batch.get("weight", jnp.ones(batch["reply_length"].shape, jnp.float32))


def kl_cycle(step: Int[Array, ""] | int, loss: config.Loss) -> Float[Array, ""]:
    """The cyclical KL weight: 0 in the first `kl_zero` of each `kl_period` steps, then 1 (appendix C.2)."""
    return jnp.where(step % loss.kl_period < loss.kl_zero * loss.kl_period, 0.0, 1.0)


def reconstruction(
    hidden: Float[Array, "B S D"] | Float[Array, "W U D"],
    lm_head: LmHead,
    reply: Int[Array, "B S"],
    length: Int[Array, " B"],
    weight: Float[Array, " B"],
    packing: Packing | None = None,
) -> Float[Array, ""]:
    """Sum over reply tokens and `<eos>` of -log p(token | earlier tokens, z), in nats; padding never counts.

    packing: how the tokens of `hidden` lie; None: as they come.
    """
    packing = packing or Packing(*reply.shape)
    counted = (jnp.arange(reply.shape[1]) < length[:, None] - 1) * weight[:, None]
    target, counted = packing.together(jnp.roll(reply, -1, axis=1)), packing.together(counted.astype(jnp.float32))
    return cross_entropy(hidden, lm_head, target, counted)


LOGITS_MB = 128
"""Most memory of a device that `cross_entropy` spends on logits at a time."""


@jax.custom_vjp
def cross_entropy(
    hidden: Float[Array, "B S D"], lm_head: LmHead, target: Int[Array, "B S"], weight: Float[Array, "B S"]
) -> Float[Array, ""]:
    """Sum of weight x -log softmax(lm_head.logits(hidden))[target], without the logits of the whole batch.

    A few positions of all rows are scored at a time (rows may be spread over devices), and none behind the last that
    has a weight. The gradient is made in the same pass, while their logits are there: the vocabulary is never
    multiplied a second time.
    """

    def add(total, _, *piece):
        return total + _nats(*piece)[0]

    return _by_positions(add, _zero(hidden), hidden, lm_head, target, weight)


def _cross_entropy_and_slopes(hidden, lm_head, target, weight):
    def add(sums, at, *piece):
        total, of_hidden, of_head = sums
        value, here, head = _nats_and_slopes(*piece)
        of_hidden = jax.lax.dynamic_update_slice_in_dim(of_hidden, here, at, axis=1)
        return total + value, of_hidden, jax.tree.map(jnp.add, of_head, head)

    room = _padded(hidden, _positions(target, lm_head))
    start = (_zero(hidden), jnp.zeros_like(room), jax.tree.map(jnp.zeros_like, lm_head))
    value, of_hidden, of_head = _by_positions(add, start, hidden, lm_head, target, weight)
    return value, (of_hidden[:, : hidden.shape[1]], of_head)


def _scaled(slopes, by):
    return *jax.tree.map(lambda slope: (slope * by).astype(slope.dtype), slopes), None, None


cross_entropy.defvjp(_cross_entropy_and_slopes, _scaled)


def _zero(hidden):
    return jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))


def _positions(target, lm_head) -> int:
    """How many positions are scored at a time."""
    rows, positions = target.shape
    return -(-positions // pieces(rows // mesh.shares_in_force(), positions, lm_head.table.shape[0]))


def pieces(rows: int, positions: int, vocabulary: int, used: int | None = None) -> int:
    """In how many pieces `cross_entropy` scores so many rows a device.

    used: positions up to the last that has a weight.
    """
    most = max(int(LOGITS_MB * 2**20) // (4 * rows * vocabulary), 1)
    number = -(-positions // most)
    return number if used is None else -(-used // -(-positions // number))


def _padded(x, step: int):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % step)] + [(0, 0)] * (x.ndim - 2))


def _by_positions(add: Callable, start, hidden, lm_head, target, weight):
    """start, after `add(sums, first position, hidden, lm_head, target, weight)` of one piece after the other."""
    step = _positions(target, lm_head)
    used = jnp.max(jnp.where(weight != 0, jnp.arange(1, weight.shape[1] + 1), 0))
    hidden, target, weight = (_padded(x, step) for x in (hidden, target, weight))

    def one(i, sums):
        here, wanted, counted = (
            jax.lax.dynamic_slice_in_dim(x, i * step, step, axis=1) for x in (hidden, target, weight)
        )
        return add(sums, i * step, here, lm_head, wanted, counted)

    return jax.lax.fori_loop(0, -(-used // step), one, start)


def _nats(hidden, lm_head, target, weight):
    """The sum, and what its gradient needs: exp(scores) and its sum over the vocabulary, up to a common factor."""
    scores = lm_head.logits(hidden)
    picked = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
    highest = jnp.max(scores, axis=-1)
    powers = jnp.exp(scores - highest[..., None])
    total = jnp.sum(powers, axis=-1)
    return jnp.sum((jnp.log(total) + highest - picked) * weight), (powers, total)


def _nats_and_slopes(hidden, lm_head, target, weight):
    """The sum, its gradient of `hidden` and of `lm_head`."""
    value, (powers, total) = _nats(hidden, lm_head, target, weight)
    right = jnp.arange(powers.shape[-1]) == target[..., None]
    slope = powers * (weight / total)[..., None] - jnp.where(right, weight[..., None], 0)
    # By a product with ones, since XLA's sum over rows takes several times as long on CPUs.
    bias = None if lm_head.bias is None else jnp.einsum("BSV,BS->V", slope, jnp.ones_like(weight))
    slope, exact = slope.astype(hidden.dtype), slope.dtype
    of_hidden = jnp.einsum("BSV,VD->BSD", slope, lm_head.table.astype(slope.dtype))
    return value, of_hidden, LmHead(jnp.einsum("BSV,BSD->VD", slope, hidden, preferred_element_type=exact), bias)


def floored_kl(q: Gaussian, p: Gaussian, floor: float) -> Float[Array, " B"]:
    """KL(q || p) of each instance over those dimensions that exceed `floor` ("thresholding"), in nats."""
    per_dimension = gaussian_kl(q, p)
    return jnp.sum(jnp.where(per_dimension > floor, per_dimension, 0.0), axis=-1)


def classification(
    logits: Float[Array, "*B A N"], labels: Int[Array, "*B A"], weight: Float[Array, "*B"]
) -> Float[Array, ""]:
    """Sum of the cross-entropies over the labels that instances have (Eq. 4); label -1 is unknown."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(labels >= 0, picked, 0.0) * weight[..., None])


def attribute_gap(z: Float[Array, "B Z"], labels: Int[Array, "B A"], distance: str = "squared") -> Float[Array, ""]:
    """Distances between the attributes' batch means of z, summed over all pairs (Eq. 5).

    An instance counts in every attribute that it is labelled for. Pairs with an attribute that the batch lacks are
    left out. distance: "squared" is averaged over dimensions; "euclidean" is the norm as printed.
    """
    member: Bool[Array, "B A"] = labels >= 0
    number = jnp.sum(member, axis=0)
    means = jnp.einsum("BA,BZ->AZ", member.astype(z.dtype), z) / jnp.maximum(number, 1)[:, None]
    a, b = jnp.triu_indices(labels.shape[1], k=1)
    squared = jnp.square(means[a] - means[b])
    if distance == "squared":
        pairs = jnp.mean(squared, axis=-1)
    else:
        total = jnp.sum(squared, axis=-1)
        pairs = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)  # the norm has no slope at 0
    return jnp.sum(jnp.where((number[a] > 0) & (number[b] > 0), pairs, 0.0))


def parts(out: Outputs, batch: dict[str, Array], loss: config.Loss, total: Counts) -> dict[str, Float[Array, ""]]:
    """The four losses of one micro-batch, unweighted and divided so that the micro-batches of a step add up.

    Those with weight 0 are left out, except what is always reported: reconstruction, and the KL of a posterior.
    """
    weight = row_weight(batch)
    reconstruct = reconstruction(
        out.hidden, out.lm_head, batch["reply"], batch["reply_length"], weight, Packing.of(batch, "reply")
    )
    named = {"reconstruct": reconstruct / total.tokens}
    if out.posterior is not None:
        named["kl"] = jnp.sum(weight * floored_kl(out.posterior, out.prior, loss.kl_floor)) / total.instances
    if loss.classify:
        classify = classification(out.attribute_logits, batch["labels"], weight)
        named["classify"] = classify / jnp.maximum(total.labels, 1.0)
    if loss.gap:
        named["gap"] = attribute_gap(out.z, batch["labels"], loss.gap_distance) / total.micro_batches
    return named


def weighted_sum(named: dict[str, Float[Array, ""]], loss: config.Loss, cycle: Float[Array, ""]) -> Float[Array, ""]:
    """The training objective (Eq. 6): every part by its weight, the KL also by the cycle."""
    factors = {"reconstruct": loss.reconstruct, "kl": loss.kl * cycle, "classify": loss.classify, "gap": loss.gap}
    return sum(factors[name] * value for name, value in named.items())


def sound(named: dict[str, Float[Array, ""]]) -> Bool[Array, ""]:
    """Whether no value is NaN, infinite or beyond LARGEST."""
    return jnp.all(jnp.abs(jnp.stack(list(named.values()))) <= LARGEST)
