"""The benchmarks' PyTorch side computes what ours does: the same parameters give the same numbers, tokens and steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from miracle_jax import config, decode, latent, losses, train, weights
from miracle_jax.cvae import Miracle

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from benchmarks import torch_decode, torch_train  # noqa: E402
from benchmarks.torch_model import TorchMiracle, attribute_gap  # noqa: E402

STILL = dataclasses.replace(
    small.CONFIG,
    encoder=dataclasses.replace(small.CONFIG.encoder, dropout=0.0),
    decoder=dataclasses.replace(small.CONFIG.decoder, dropout=0.0),
    latent=dataclasses.replace(small.CONFIG.latent, logvar_shift=-0.5),
    dtype="float32",
)
BOS, EOS, MOST = 0, 8, 12
ALLOWED = np.arange(18) < 17
ALLOWED[BOS] = False


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other: everything here is tiny
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ours():
    return small.miracle(STILL)


def parameters(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


def theirs(model, attention="sdpa", settings=STILL) -> TorchMiracle:
    return TorchMiracle.from_ours(settings, small.SIZES, parameters(model), attention)


def close(a, b, tolerance=1e-5):
    a = a.detach().numpy() if isinstance(a, torch.Tensor) else a
    np.testing.assert_allclose(a, np.asarray(b), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoders_and_decoder(ours, attention):
    peer, batch = theirs(ours, attention), small.random_batch(6)
    tensors = torch_train.to_torch(batch, "cpu", "released")
    out = jax.jit(lambda batch: ours(batch))(batch)
    for a, b in zip(peer.encode(tensors["context"], tensors["context_length"]), out.prior, strict=True):
        close(a, b)
    for a, b in zip(peer.posterior_encoder.gaussian(tensors["joint"], tensors["joint_length"]), out.posterior,
                    strict=True):  # fmt: skip
        close(a, b)
    close(peer.logits(tensors["reply"], torch.tensor(np.asarray(out.z))), out.logits, 1e-4)


@pytest.mark.parametrize("by_length", [False, True])
def test_contexts_in_batches(ours, by_length):
    batch = small.random_batch(7)
    prior = ours.prior(batch["context"], batch["context_length"])
    tokens, length = torch.tensor(batch["context"]), torch.tensor(batch["context_length"])
    found = torch_decode.encode_contexts(theirs(ours), tokens, length, 3, by_length)
    for a, b in zip(found, prior, strict=True):
        close(a, b)


@pytest.mark.parametrize("distance", ["squared", "euclidean"])
def test_attribute_gap(distance):
    z, labels = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32), small.random_batch(5)["labels"]
    labels[:, 1] = -1  # an attribute that the batch lacks
    found = attribute_gap(torch.tensor(z), torch.tensor(labels), distance)
    close(found, losses.attribute_gap(z, labels, distance))


def test_no_posterior():
    settings = dataclasses.replace(STILL, loss=dataclasses.replace(STILL.loss, posterior=False))
    batch = small.random_batch(4)
    peer = theirs(small.miracle(settings), settings=settings)
    tensors = torch_train.to_torch(batch, "cpu", "released")
    with torch.no_grad():
        z, _ = peer.encode(tensors["context"], tensors["context_length"])
        found = peer.losses(tensors)
    assert found.keys() == {"reconstruct", "classify", "gap"}
    close(found["gap"], attribute_gap(z, tensors["labels"], "squared"))  # z is the prior's mean


@pytest.fixture(scope="module")
def replies(ours):
    """Latents (6, Z), what ours writes for them, and the replies' lengths."""
    z = np.random.default_rng(11).normal(size=(6, 6)).astype(np.float32)
    settings = config.Decode(min_new_tokens=2, max_new_tokens=MOST)
    tokens, length = decode.generate(
        ours.decoder, jnp.asarray(z), jnp.arange(6), jnp.asarray(ALLOWED), BOS, EOS, settings, jax.random.key(0)
    )
    assert len(set(length.tolist())) >= 4 and length.max() == MOST  # some end, at different places, and some are cut
    return torch.tensor(z), np.asarray(tokens), np.asarray(length)


@pytest.mark.parametrize("batch_size", [2, 4, 8])
@pytest.mark.parametrize("way", ["released", "dynamic", "static"])
def test_tokens(ours, replies, way, batch_size):
    z, tokens, length = replies
    peer = theirs(ours, "eager" if way == "released" else "sdpa")
    arguments = (peer, z, torch.tensor(ALLOWED), BOS, EOS, 2, MOST, batch_size)
    for _ in range(2):  # the static cache is used again
        if way == "released":
            found = torch_decode.generate_as_released(*arguments)
        else:
            found = torch_decode.generate_modern(*arguments, cache=way)
        np.testing.assert_array_equal(found[0], tokens)
        np.testing.assert_array_equal(found[1], length)


LEARNING = dataclasses.replace(
    STILL,
    train=dataclasses.replace(STILL.train, learning_rate=0.2, warmup=0.5),
    loss=dataclasses.replace(STILL.loss, kl_zero=0.0),  # the KL counts from the first step on
)
STEPS = 20


@pytest.fixture(scope="module")
def stepped(ours):
    """A batch; of our first step the losses and, by the peer's names, the clipped gradients and the parameters that it
    leaves. z is the posterior's mean: the libraries draw other numbers."""
    batch, params = small.random_batch(1, 6), parameters(ours)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Miracle(LEARNING, small.SIZES, nnx.Rngs(0))))
    optimizer, _ = train.make_optimizer(LEARNING, STEPS)
    step = train.make_train_step(LEARNING, graphdef, optimizer, jax.random.key(0))
    state = {"params": jax.tree.map(jnp.array, params), "opt_state": optimizer.init(params), "step": jnp.int32(0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent.Gaussian, "sample", lambda self, key, scale: self.mean)
        state, named = step(state, batch)
    (adam,) = (s for s in jax.tree.leaves(state["opt_state"], is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    gradients = jax.tree.map(lambda mean: mean / 0.1, adam.mu)  # the first step's, which counts a tenth
    return batch, named, *(weights.dump(weights.released(LEARNING, 3), x) for x in (gradients, state["params"]))


@pytest.mark.parametrize("style, attention", [("released", "eager"), ("modernised", "sdpa")])
def test_training_step(ours, stepped, monkeypatch, style, attention):
    batch, named, gradients, after = stepped
    peer = theirs(ours, attention, LEARNING)
    before = {name: parameter.detach().clone() for name, parameter in peer.named_parameters()}
    step = torch_train.make_step(peer, LEARNING, style, steps=STEPS, log=style == "released")
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    found = step(torch_train.to_torch({name: array[0] for name, array in batch.items()}, "cpu", style))
    assert found.keys() == named.keys() and all(named.values()) and named["gradient_norm"] > LEARNING.train.clip
    for name, value in named.items():
        close(found[name], value)
    moved = []
    for name, parameter in peer.named_parameters():
        rows = len(parameter)  # ours have as many as the largest attribute has aspects
        close(parameter.grad * found["gradient_norm"], gradients[name][:rows] * named["gradient_norm"], 1e-4)
        # AdamW divides the gradient by its size. Where that is rounding error alone (the bias of keys), so is the step.
        sure = parameter.grad.abs() > 1e-5
        close(parameter[sure], after[name][:rows][sure.numpy()], 1e-4)
        moved.append((parameter - before[name]).abs()[sure] > 0.01)  # 0.02 is the step's learning rate
    moved = torch.cat(moved)
    assert len(moved) > 5000 and moved.float().mean() > 0.99
    if style == "released":
        assert step.logged[0].keys() == named.keys()


def test_learning_rate():
    factor, schedule = torch_train.learning_rate_factor(LEARNING.train, STEPS), train.make_optimizer(LEARNING, STEPS)[1]
    close(np.array([0.2 * factor(i) for i in range(STEPS + 1)]), [schedule(i) for i in range(STEPS + 1)])
