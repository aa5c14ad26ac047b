"""Every loss against its definition, their schedules, and what may not change them: padding, micro-batches, rows of
weight 0."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_trees_close

from miracle_jax import config, losses
from miracle_jax.cvae import Outputs
from miracle_jax.decoder import LmHead
from miracle_jax.latent import Gaussian, kl

EVERYTHING = config.Loss(reconstruct=1.0, kl=0.3, classify=0.5, gap=0.7, kl_floor=0.1)
NOTHING = dataclasses.replace(EVERYTHING, reconstruct=0.0, kl=0.0, classify=0.0, gap=0.0)
SIZES = (3, 2, 4)


SAME = LmHead(np.eye(7, dtype=np.float32))  # hidden states are the scores


def random_step(groups=2, rows=6, seed=0):
    """(outputs, batch) with leading axes (G, B): replies of 2 to 9 tokens; one label a row, some rows two, one none."""
    rng = np.random.default_rng(seed)
    G, B, S, Z, A, N, V = groups, rows, 9, 5, len(SIZES), max(SIZES), 7

    def normal(*shape):
        return rng.normal(size=(G, B, *shape)).astype(np.float32)

    labels = np.full((G, B, A), -1)
    for g, b in np.ndindex(G, B):
        for a in {b % A, (b + g) % A}:
            labels[g, b, a] = rng.integers(SIZES[a])
    labels[0, 0] = -1
    batch = {
        "reply": rng.integers(0, V, (G, B, S)),
        "reply_length": rng.integers(2, S + 1, (G, B)),
        "labels": labels,
    }
    prior, posterior = Gaussian(normal(Z), normal(Z)), Gaussian(normal(Z), normal(Z))
    return Outputs(prior, posterior, normal(Z), normal(S, V), None, normal(A, N)), batch


def micro_batches(outputs, batch):
    return [jax.tree.map(lambda leaf, g=g: leaf[g], (outputs, batch)) for g in range(batch["reply"].shape[0])]


@partial(jax.jit, static_argnames="loss")
def step_losses(outputs, batch, loss=EVERYTHING):
    """The losses of one optimizer step, as train.py adds them up."""
    total = losses.counts(batch)
    parts = [(out._replace(lm_head=SAME), micro) for out, micro in micro_batches(outputs, batch)]
    named = [losses.parts(*both, loss, total) for both in parts]
    return jax.tree.map(lambda *values: sum(values), *named)


# ---- Reconstruction


def test_reconstruction_by_hand():
    """Tokens <bos> 1 2 <eos>=3 and one of padding: the losses of 1, 2 and 3 count, in that order."""
    probability = np.array(
        [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.15, 0.05], [0.3, 0.2, 0.1, 0.4], [0.9, 0.05, 0.03, 0.02], [1, 0, 0, 0]]
    )
    reply = np.array([[0, 1, 2, 3, 3]])
    scores = (np.log(probability + 1e-12) + 5.0).astype(np.float32)[None]
    got = losses.reconstruction(scores, LmHead(np.eye(4)), reply, np.array([4]), np.ones(1))
    np.testing.assert_allclose(got, -np.log(0.2) - np.log(0.15) - np.log(0.4), rtol=1e-6)


@jax.jit
def reconstruction_per_token(logits, reply, length):
    batch = {"reply": reply[None], "reply_length": length[None], "labels": jnp.full((1, len(reply), 1), -1)}
    return losses.reconstruction(logits, SAME, reply, length, jnp.ones(len(reply))) / losses.counts(batch).tokens


def test_reconstruction_is_the_mean_over_reply_tokens_and_eos():
    """Uniform scores cost log V a token, however long the replies are."""
    reply = np.zeros((3, 8), int)
    got = reconstruction_per_token(np.zeros((3, 8, 7), np.float32), reply, np.array([2, 8, 5]))
    np.testing.assert_allclose(got, np.log(7), rtol=1e-6)


def test_reconstruction_ignores_what_stands_in_padding_and_how_much_there_is():
    outputs, batch = random_step(groups=1)
    logits, reply, length = outputs.hidden[0], batch["reply"][0], batch["reply_length"][0]
    padding = np.arange(9) >= length[:, None]
    before = reconstruction_per_token(logits, reply, length)
    other = reconstruction_per_token(
        np.where(padding[..., None], 50.0 * logits, logits), np.where(padding, 6 - reply, reply), length
    )
    np.testing.assert_allclose(other, before, rtol=1e-6)
    more = [(0, 0), (0, 10)]
    longer = reconstruction_per_token(np.pad(logits, [*more, (0, 0)]), np.pad(reply, more), length)
    np.testing.assert_allclose(longer, before, rtol=1e-6)


def test_reconstruction_gradient_touches_exactly_the_places_that_predict_a_counted_token():
    outputs, batch = random_step(groups=1)
    length = batch["reply_length"][0]
    slope = jax.grad(lambda logits: reconstruction_per_token(logits, batch["reply"][0], length))(outputs.hidden[0])
    moved = np.abs(slope).max(axis=-1) > 0
    np.testing.assert_array_equal(moved, np.arange(9) < length[:, None] - 1)


# ---- Cross-entropy in pieces


def directly(hidden, lm_head, target, weight):
    """From the scores of everything at once."""
    scores = jnp.einsum("BSD,VD->BSV", hidden, lm_head.table) + (0 if lm_head.bias is None else lm_head.bias)
    log_p = jax.nn.log_softmax(scores, axis=-1)
    return -jnp.sum(jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0] * weight)


def scored(dtype=np.float32, bias=True, rows=3, positions=10, width=6, vocabulary=29):
    rng = np.random.default_rng(3)
    lm_head = LmHead(rng.normal(size=(vocabulary, width)).astype(dtype), rng.normal(size=vocabulary).astype(dtype))
    hidden, target = rng.normal(size=(rows, positions, width)), rng.integers(0, vocabulary, (rows, positions))
    weight = np.where(np.arange(positions) < np.array([[4], [0], [7]]), rng.random((rows, positions)), 0)
    return hidden.astype(dtype), lm_head if bias else lm_head._replace(bias=None), target, weight.astype(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pieces", [1, 4, 10])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_cross_entropy_in_pieces_equals_the_direct_form_with_its_gradient(monkeypatch, dtype, tolerance, pieces, bias):
    hidden, lm_head, target, weight = scored(dtype, bias)
    monkeypatch.setattr(losses, "LOGITS_MB", 4 * 3 * 29 * -(-10 // pieces) / 2**20)
    with jax.enable_x64(dtype == np.float64):

        def run(function):
            def twice(hidden, lm_head):
                return 2 * function(hidden, lm_head, target, weight)

            return jax.jit(jax.value_and_grad(twice, (0, 1)))(hidden, lm_head)

        want, got = run(directly), run(losses.cross_entropy)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(dtype)}
        alone = jax.jit(losses.cross_entropy)(hidden, lm_head, target, weight)
        np.testing.assert_allclose([2 * alone, got[0]], want[0], rtol=tolerance)
        assert_trees_close(got[1], want[1], tolerance)


def test_cross_entropy_looks_at_nothing_behind_the_last_weight():
    hidden, lm_head, target, weight = scored()
    hidden[:, 8:] = np.nan  # positions in the pieces after the 7 that count
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(losses, "LOGITS_MB", 4 * 3 * 29 * 2 / 2**20)
        value, slopes = jax.value_and_grad(losses.cross_entropy, (0, 1))(hidden, lm_head, target, weight)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert losses.cross_entropy(hidden, lm_head, target, 0 * weight) == 0


def test_logits_of_the_whole_batch_are_never_in_memory(monkeypatch):
    hidden, lm_head, target, weight = scored(positions=128, vocabulary=1000)
    monkeypatch.setattr(losses, "LOGITS_MB", 4 * 3 * 1000 * 8 / 2**20)

    def temporary(function):
        compiled = jax.jit(jax.grad(function, (0, 1))).lower(hidden, lm_head, target, weight).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 3 * 128 * 1000
    assert temporary(directly) > logits > 2 * temporary(losses.cross_entropy)


def test_bfloat16_cross_entropy_is_summed_in_float32():
    hidden, lm_head, target, weight = scored()
    run = jax.jit(jax.value_and_grad(losses.cross_entropy, (0, 1)))
    (value, slopes), (want, want_slopes) = run(hidden.astype(jnp.bfloat16), lm_head, target, weight), run(*scored())
    assert value.dtype == jnp.float32 and slopes[0].dtype == jnp.bfloat16 and slopes[1].table.dtype == jnp.float32
    np.testing.assert_allclose(value, want, rtol=1e-2)
    np.testing.assert_allclose(slopes[1].table, want_slopes[1].table, atol=0.03)


# ---- KL


def test_floor_drops_dimensions_at_or_below_it():
    """KL(N(m, 1) || N(0, 1)) = m^2 / 2, so these dimensions have 0.125, 0.5, 2 and 0 nats."""
    mean = jnp.array([[0.5, 1.0, -2.0, 0.0]])
    q, p = Gaussian(mean, jnp.zeros_like(mean)), Gaussian(jnp.zeros_like(mean), jnp.zeros_like(mean))
    for floor, want in ((0.0, 2.625), (0.125, 2.5), (0.3, 2.5), (0.5, 2.0), (0.9, 2.0), (2.0, 0.0), (2.1, 0.0)):
        np.testing.assert_allclose(losses.floored_kl(q, p, floor), [want], rtol=1e-6, err_msg=f"floor {floor}")
    slope = jax.grad(lambda mean: losses.floored_kl(Gaussian(mean, q.logvar), p, 0.5)[0])(mean)
    np.testing.assert_allclose(slope, [[0, 0, -2.0, 0]])


def test_kl_is_that_of_the_posterior_from_the_prior():
    outputs, batch = random_step()
    named = step_losses(outputs, batch, dataclasses.replace(EVERYTHING, kl_floor=0.0))
    want = np.sum(kl(outputs.posterior, outputs.prior)) / 12
    np.testing.assert_allclose(named["kl"], want, rtol=1e-5)


def test_cycle_is_a_pure_function_of_the_step():
    steps = np.arange(200)
    want = np.where(steps % 40 < 8, 0.0, 1.0)
    cycle = jax.jit(partial(losses.kl_cycle, loss=config.Loss()))
    np.testing.assert_array_equal([cycle(step) for step in steps], want)
    np.testing.assert_array_equal([losses.kl_cycle(step, config.Loss()) for step in (7, 8, 39, 40)], [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("period", "zero", "zeros"), [(10, 0.7, 7), (10, 0.0, 0), (10, 1.0, 10), (7, 0.5, 4), (1, 0.2, 1)]
)
def test_cycle_takes_other_periods(period, zero, zeros):
    got = losses.kl_cycle(np.arange(2 * period), config.Loss(kl_period=period, kl_zero=zero))
    np.testing.assert_array_equal(got, ([0.0] * zeros + [1.0] * (period - zeros)) * 2)


# ---- Classification


def test_classification_by_hand():
    """Three attributes; a row with one label, one with none, one with all three."""
    logits = jnp.log(jnp.array([[[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]] * 3)) - 3.0
    labels = jnp.array([[-1, -1, 1], [-1, -1, -1], [1, 0, 0]])
    got = losses.classification(logits, labels, jnp.ones(3))
    np.testing.assert_allclose(got, -np.log(0.1) - np.log(0.8) - np.log(0.5) - np.log(0.9), rtol=1e-6)


def test_classification_is_the_mean_over_labels_and_touches_no_other_attribute():
    outputs, batch = random_step()
    named = step_losses(outputs, batch)
    log_p = np.asarray(jax.nn.log_softmax(outputs.attribute_logits))
    labelled = np.argwhere(batch["labels"] >= 0)
    want = -np.mean([log_p[*place, batch["labels"][*place]] for place in labelled])
    np.testing.assert_allclose(named["classify"], want, rtol=1e-5)
    slope = jax.grad(lambda logits: step_losses(outputs._replace(attribute_logits=logits), batch)["classify"])
    moved = np.abs(slope(outputs.attribute_logits)).max(axis=-1) > 0
    np.testing.assert_array_equal(moved, batch["labels"] >= 0)


def test_no_label_at_all_gives_no_classification_loss():
    outputs, batch = random_step()
    batch["labels"] = np.full_like(batch["labels"], -1)
    named = step_losses(outputs, batch)
    assert named["classify"] == 0 and named["gap"] == 0


# ---- Attribute distance


def gap_by_loops(z, labels, distance):
    z, labels, total = np.asarray(z, np.float64), np.asarray(labels), 0.0
    for a in range(labels.shape[1]):
        for b in range(a + 1, labels.shape[1]):
            of_a, of_b = z[labels[:, a] >= 0], z[labels[:, b] >= 0]
            if len(of_a) and len(of_b):
                difference = of_a.mean(0) - of_b.mean(0)
                total += np.mean(difference**2) if distance == "squared" else np.sqrt(np.sum(difference**2))
    return total


attribute_gap = jax.jit(losses.attribute_gap, static_argnames="distance")


@pytest.mark.parametrize("distance", ["squared", "euclidean"])
@pytest.mark.parametrize("absent", [(), (1,), (0, 2), (0, 1, 2, 3)])
def test_gap_sums_over_all_pairs_of_attributes_that_are_there(distance, absent):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(12, 5)).astype(np.float32)
    labels = np.where(rng.random((12, 4)) < 0.4, rng.integers(0, 2, (12, 4)), -1)  # some rows have several, some none
    labels[:, absent] = -1
    got = attribute_gap(z, labels, distance)
    np.testing.assert_allclose(got, gap_by_loops(z, labels, distance), rtol=1e-5)
    assert (got == 0) == (len(absent) >= 3)


@pytest.mark.parametrize(("distance", "want"), [("squared", 12.5), ("euclidean", 5.0)])
def test_gap_by_hand(distance, want):
    """Means (2, 0) and (-1, 4)."""
    z, labels = jnp.array([[1.0, 0.0], [3.0, 0.0], [-1.0, 4.0]]), jnp.array([[0, -1], [1, -1], [-1, 1]])
    np.testing.assert_allclose(losses.attribute_gap(z, labels, distance), want, rtol=1e-6)


@pytest.mark.parametrize("distance", ["squared", "euclidean"])
def test_gap_gradient_is_finite_where_means_coincide_or_an_attribute_is_absent(distance):
    z = jnp.array([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]])
    labels = jnp.array([[0, -1, -1], [-1, 1, -1], [-1, -1, -1]])
    value, slope = jax.value_and_grad(losses.attribute_gap)(z, labels, distance)
    assert value == 0
    np.testing.assert_array_equal(slope, np.zeros((3, 2)))


# ---- Together


def test_micro_batches_add_up_to_the_whole_batch():
    outputs, batch = random_step(groups=3)
    one = jax.tree.map(lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:]), (outputs, batch))
    tokens = np.sum(batch["reply_length"] - 1, axis=1)
    labels = np.sum(batch["labels"] >= 0, axis=(1, 2))
    assert len(set(tokens)) == 3 and len(set(labels)) > 1  # so that a mean of means would be wrong
    many, whole = step_losses(outputs, batch), step_losses(*one)
    for name in ("reconstruct", "kl", "classify"):
        np.testing.assert_allclose(many[name], whole[name], rtol=1e-5, err_msg=name)
    gaps = [gap_by_loops(out.z, micro["labels"], "squared") for out, micro in micro_batches(outputs, batch)]
    np.testing.assert_allclose(many["gap"], np.mean(gaps), rtol=1e-5)


def test_rows_of_weight_0_count_nowhere():
    outputs, batch = random_step(groups=1)
    kept = step_losses(*jax.tree.map(lambda leaf: leaf[:, :4], (outputs, batch)))
    batch["labels"][:, 5:] = -1  # the pipeline fills up with rows without labels; the weight alone must do, too
    batch["weight"] = np.array([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    got = step_losses(outputs, batch)
    for name in ("reconstruct", "kl", "classify"):
        np.testing.assert_allclose(got[name], kept[name], rtol=1e-5, err_msg=name)


def objective(outputs, batch, loss, cycle=1.0):
    return losses.weighted_sum(step_losses(outputs, batch, loss), loss, cycle)


gradient = jax.jit(jax.grad(objective), static_argnames="loss")


def test_the_objective_is_the_weighted_sum_and_the_cycle_scales_the_kl_only():
    outputs, batch = random_step()
    named = step_losses(outputs, batch)
    for cycle in (0.0, 1.0):
        want = named["reconstruct"] + 0.3 * cycle * named["kl"] + 0.5 * named["classify"] + 0.7 * named["gap"]
        np.testing.assert_allclose(objective(outputs, batch, EVERYTHING, cycle), want, rtol=1e-6)


REACHES = {
    "reconstruct": {"hidden"},
    "kl": {"prior", "posterior"},
    "classify": {"attribute_logits"},
    "gap": {"z"},
}


@pytest.mark.parametrize("name", REACHES)
def test_every_loss_can_be_switched_off_on_its_own(name):
    """Weight 0 removes exactly this loss' gradient, and what is left when the others are 0 is exactly this one's."""
    outputs, batch = random_step()
    everything = gradient(outputs, batch, loss=EVERYTHING)
    without = gradient(outputs, batch, loss=dataclasses.replace(EVERYTHING, **{name: 0.0}))
    alone = gradient(outputs, batch, loss=dataclasses.replace(NOTHING, **{name: getattr(EVERYTHING, name)}))
    for field in set(Outputs._fields) - {"lm_head"}:
        moved = [any(np.any(leaf) for leaf in jax.tree.leaves(getattr(g, field))) for g in (without, alone)]
        assert moved == ([False, True] if field in REACHES[name] else [True, False]), field
    for parts in zip(*map(jax.tree.leaves, (without, alone, everything)), strict=True):
        np.testing.assert_allclose(parts[0] + parts[1], parts[2], rtol=1e-5, atol=1e-7)


def test_without_a_posterior_there_is_no_kl():
    outputs, batch = random_step()
    named = step_losses(outputs._replace(posterior=None), batch)
    assert set(named) == {"reconstruct", "classify", "gap"}
    assert np.isfinite(losses.weighted_sum(named, EVERYTHING, jnp.float32(1.0)))
