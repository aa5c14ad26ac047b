"""Runs every public function of the model once with the shapes in its signature checked; test_shapes.py starts it."""

from jaxtyping import install_import_hook

with install_import_hook("miracle_jax", "beartype.beartype"):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import pytest
    from flax import nnx
    from small import CONFIG, SIZES, miracle, random_batch, random_model

    from miracle_jax import config, decode, energy, losses, sampler
    from miracle_jax.decoder import make
    from miracle_jax.layers import Compute

model = miracle()
micro_batches = jax.tree.map(jnp.asarray, random_batch(1, 4))
batch = jax.tree.map(lambda rows: rows[0], micro_batches)


@jax.jit
def objective(model, batch, key):
    out = model(batch, key, noise=1.0)
    named = losses.parts(out, batch, CONFIG.loss, losses.counts(micro_batches))
    return losses.weighted_sum(named, CONFIG.loss, losses.kl_cycle(8, CONFIG.loss)), out


value, out = objective(model, batch, jax.random.key(0))
assert np.isfinite(value)
aspects = np.array([[1, 2, -1], [0, -1, 1], [-1, -1, -1], [1, 0, 1]], np.int32)
weights = np.ones((4, 3), np.float32)
for method, drift in (("ode", "energy"), ("ode", "energy+prior"), ("langevin", "energy"), ("sde", "energy")):
    settings = config.Sample(method=method, drift=drift)
    moved = sampler.sample(model.heads, *out.prior, aspects, weights, settings, jax.random.key(1))
assert energy.aspect_probabilities(model.heads, jnp.asarray(moved.z)).shape == (4, len(SIZES), max(SIZES))
shape = config.Llama(vocab_size=18, width=16, depth=2, heads=4, kv_heads=2, mlp=32, max_positions=24)
llama = random_model(lambda: make(shape, 6, Compute(), nnx.Rngs(0)))
for decoder in (model.decoder, llama):
    decoder(batch["reply"], out.z, jax.random.key(3))
    first = jnp.arange(4)
    past = decoder.latent_key_values(out.z)
    decoder.hidden(batch["reply"], out.z, past, jnp.ones((), bool), 1 - first[:, None], first=first)
    for temperature in (0.0, 1.0):
        settings = config.Decode(max_new_tokens=5, temperature=temperature, top_p=0.9)
        decode.generate(decoder, out.z, jnp.arange(4), jnp.ones(18, bool), 0, 1, settings, jax.random.key(2))

# The check can fail: five latents for four replies.
with pytest.raises(Exception, match="Type-check error"):
    model.decoder(batch["reply"], jnp.zeros((5, 6)))
