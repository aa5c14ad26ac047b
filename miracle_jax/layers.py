"""What the encoder and the decoder share: dense layers, attention, dropout and a scanned stack of blocks.

Axis letters: B batch, S new tokens, T earlier positions, D model, H heads, G key/value heads, R = H/G, K head size,
L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Key

from miracle_jax import config, mesh

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

class Compute(NamedTuple):
    """How a model is computed; no parameter depends on it. See the fields of these names in config.py."""

    dtype: Any = jnp.float32
    remat: bool = False
    scan_layers: bool = True
    attention: str = "xla"
    layout: config.Mesh = config.Mesh()


HIDDEN = -1e30  # the score of a pair that must not attend; finite, so a row with no visible key gives no NaN


def dense(
    n_in: int, n_out: int, std: float, dtype: Any, rngs: nnx.Rngs, bias: bool = True, rank: int = 0
) -> nnx.Linear:
    """A linear layer whose float32 kernel starts as N(0, std^2), computing in `dtype`. rank: of its adapter, or 0."""
    init = nnx.initializers.normal(std)
    kind = partial(Adapted, rank=rank) if rank else nnx.Linear
    return kind(
        n_in, n_out, use_bias=bias, kernel_init=init, dtype=dtype, param_dtype=jnp.float32, dot_general=_dot_general,
        rngs=rngs,
    )  # fmt: skip


@jax.custom_vjp
def product(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x @ kernel, with a gradient of the kernel that XLA's CPU code multiplies by its fast library. The gradient that
    JAX derives is the transpose of another product, which goes by a slower one. No forward-mode derivatives."""
    return x @ kernel


def _product_forward(x, kernel):
    # A frozen kernel needs no x, and kept for nothing they would fill the memory.
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return product(x.value, kernel.value), kept


def _product_backward(kept, slope):
    x, kernel = kept
    if isinstance(slope, SymbolicZero):
        return None, None
    rows = tuple(range(slope.ndim - 1))
    of_x = None if kernel is None else slope @ kernel.T
    of_kernel = None if x is None else jax.lax.dot_general(x, slope, ((rows, rows), ((), ())))
    return of_x, of_kernel


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _dot_general(x, kernel, *_, **__):
    """As nnx.Linear calls it, always for the last axis of x and the first of the kernel."""
    return product(x, kernel)


class Adapted(nnx.Linear):
    """A linear layer with a low-rank adapter, x (W + A B), which starts as the layer without it (Hu et al. 2021)."""

    def __init__(self, n_in: int, n_out: int, *, rank: int, rngs: nnx.Rngs, **linear):
        super().__init__(n_in, n_out, rngs=rngs, **linear)
        self.adapter_in = nnx.Param(jax.random.normal(rngs.params(), (n_in, rank)) * n_in**-0.5)
        self.adapter_out = nnx.Param(jnp.zeros((rank, n_out)))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        a, b = (part[...].astype(self.dtype) for part in (self.adapter_in, self.adapter_out))
        return super().__call__(x) + (x.astype(self.dtype) @ a) @ b


def layer_norm(width: int, eps: float, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation by the two-pass variance: the one-pass form loses digits that parity tests see."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, param_dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def dropout(x: Array, rate: float, key: Key[Array, "..."] | None) -> Array:
    """Zeroes a share `rate` of x and scales the rest up. Without a key (inference) x passes unchanged.

    key: one for all of x, or one for each vector on its last axis.

    The rate is rounded to a multiple of 2^-16: 16 random bits an element, of which one 32-bit draw gives two. Drawing
    is most of what dropout costs.
    """
    dropped = round(rate * 2**16)
    if key is None or not dropped:
        return x
    half, draw = -(-x.shape[-1] // 2), jax.random.bits
    if key.ndim:
        bits = jax.vmap(lambda key: draw(key, (half,), jnp.uint32))(key.ravel())
    else:
        bits = draw(key, (*x.shape[:-1], half), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return jnp.where(bits >= np.uint16(dropped), x * (2**16 / (2**16 - dropped)), 0).astype(x.dtype)


def split_key(key: Key[Array, ""] | None, number: int) -> list:
    """`number` keys, or that many None where there is no key."""
    return [None] * number if key is None else list(jax.random.split(key, number))


def attention(
    query: Float[Array, "B S H K"],
    parts: list[tuple[Float[Array, "B G _ K"], Float[Array, "B G _ K"], Bool[Array, "..."]]],
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    implementation: str = "xla",
) -> Float[Array, "B S H*K"]:
    """Scaled dot-product attention over keys that come in parts.

    Args:
      query: one query a token and head.
      parts: (keys, values, visible) each; `visible` broadcasts to (B, S, keys). Query head h reads key head h // R. The
        softmax runs over all parts together. Parts let a decoder attend to a cache and to its new tokens without
        copying the cache; heads come before keys, since a product that has to transpose a cache takes several times as
        long.
      rate, key: dropout of the attention weights.
      implementation: "xla", or "cudnn", which has no such dropout. A single query a row gains nothing from cuDNN,
        which would copy the cache to put the parts together.
    """
    B, S, H, K = query.shape
    if implementation == "cudnn" and S > 1:
        return fused_attention(query, parts, implementation)
    G = parts[0][0].shape[1]
    query = query.reshape(B, S, G, H // G, K)
    scores = [
        jnp.where(
            visible[:, None, None] if visible.ndim == 3 else visible,
            jnp.einsum("BSGRK,BGTK->BGRST", query, keys, preferred_element_type=jnp.float32) * K**-0.5,
            HIDDEN,
        )
        for keys, _, visible in parts
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    weights = dropout(weights, rate, key).astype(query.dtype)
    edges = [sum(s.shape[-1] for s in scores[: i + 1]) for i in range(len(scores) - 1)]
    mixed = sum(
        jnp.einsum("BGRST,BGTK->BSGRK", part, values)
        for part, (_, values, _) in zip(jnp.split(weights, edges, axis=-1), parts, strict=True)
    )
    return mixed.reshape(B, S, H * K)


def fused_attention(query: Array, parts: list, implementation: str) -> Float[Array, "B S H*K"]:
    """`attention` without dropout by JAX's fused function, which takes all keys in one array."""
    B, S, H, K = query.shape
    keys, values = (jnp.concatenate([part[i] for part in parts], axis=2).swapaxes(1, 2) for i in (0, 1))
    masks = [jnp.broadcast_to(visible, (B, S, keys.shape[2])) for keys, _, visible in parts]
    visible = jnp.concatenate(masks, axis=-1)[:, None]

    def even(x, *axes):  # with a mask cuDNN's gradient wants even numbers of queries and keys; the additions are hidden
        return jnp.pad(x, [(0, x.shape[axis] % 2 if axis in axes else 0) for axis in range(x.ndim)])

    query, keys, values, visible = even(query, 1), even(keys, 1), even(values, 1), even(visible, 2, 3)
    mixed = jax.nn.dot_product_attention(query, keys, values, mask=visible, implementation=implementation)
    return mixed[:, :S].reshape(B, S, H * K)


class Stack(nnx.Module):
    """`depth` equal blocks whose parameters are stacked on a leading axis L and run by one scan, or one by one.

    The scan keeps compile time independent of the depth; without it XLA sees all layers at once.
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, how: Compute, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(layer_rngs):
            return make_block(layer_rngs)

        self.blocks = create(rngs)
        self.depth = depth
        self.how = how

    def __call__(self, x: Array, *shared: Any, per_layer: Any = None, key: Key[Array, ""] | None = None):
        """Runs x through every block as `x, y = block(x, *shared, layer's part of per_layer, key)`.

        Args:
          x: what the blocks hand on to each other.
          shared: passed to every block as it is.
          per_layer: a pytree with leading axis L, or None.
          key: dropout key, or None.

        Returns:
          The last x, and every block's y stacked on a leading axis L.
        """
        graphdef, params = nnx.split(self.blocks)

        def run(x, layer):
            layer_params, part, layer_key = layer
            layer_params = mesh.gathered(layer_params, self.how.layout, of=params)
            x, y = nnx.merge(graphdef, layer_params)(mesh.by_rows(x), *shared, part, layer_key)
            return mesh.by_rows(x), y

        if self.how.remat:
            # Inside a scan nothing can be merged with the forward pass; unrolled it would be, and nothing saved.
            run = jax.checkpoint(run, prevent_cse=not self.how.scan_layers)
        if self.how.scan_layers:
            keys = None if key is None else jax.random.split(key, self.depth)
            return jax.lax.scan(run, x, (params, per_layer, keys))
        leaves, structure = jax.tree.flatten((params, per_layer))
        outputs = []
        for *parts, layer_key in zip(*map(jnp.unstack, leaves), split_key(key, len(leaves[0])), strict=True):
            x, y = run(x, (*structure.unflatten(parts), layer_key))
            outputs.append(y)
        return x, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)

    def one_by_one(self) -> Callable:
        """The same without dropout as a function that is called many times, in a loop for instance: the parameters are
        taken apart once. Its `per_layer` is a list, as is what it returns of the blocks."""
        graphdef, params = nnx.split(self.blocks)
        leaves, structure = jax.tree.flatten(params)
        layers = zip(*map(jnp.unstack, leaves), strict=True)
        blocks = [nnx.merge(graphdef, structure.unflatten(layer)) for layer in layers]

        def run(x: Array, *shared: Any, per_layer: list, key: None = None):
            outputs = []
            for block, part in zip(blocks, per_layer, strict=True):
                x, y = block(x, *shared, part, key)
                outputs.append(y)
            return x, outputs

        return run
