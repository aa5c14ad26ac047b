"""Many rows through a compiled function: in pieces that fit the memory, on a CPU several at a time.

XLA spreads every operation over the cores of a CPU and waits for them. Where operations are short, that costs more than
it saves, in a virtual machine at times far more: 4,096 latents (sampler.py) took 0.30 to 0.56 s so on 2 cores, and 0.26
to 0.29 s where each core had one half of them, whose operations fill the gaps of the other's.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from miracle_jax import mesh
from miracle_jax.env import usable_cores

log = logging.getLogger("miracle_jax")

CACHED, LEAST_ROWS = 64 * 2**20, 32
"""Of cores that share rows: bytes of parameters at most, and rows of a core at least. Medians on 2 cores, as a share of
the time without: decoders of 12 to 40 MiB 0.74 to 0.96, of 55 MiB 0.82 to 1.02, of 115 MiB 0.99 to 1.06, GPT-2 small
(0.5 GB) 1.03 to 1.26, with 32 to 160 replies; 8 or 16 latents a core 1.25 to 1.31, 32 0.88 to 1.00, 64 0.56 to 0.97."""


def in_pieces(function: Callable, arrays: Any, batch_size: int, read: Any = None) -> Any:
    """Applies `function` to at most `batch_size` rows at a time; when memory runs out, to half as many from there on.

    A piece that is not full is padded with copies of its last row to a power of two, so that few shapes compile. Where
    results must not depend on the cutting, hand row numbers to `function` and derive random keys from them.

    Args:
        function: takes the arrays' rows, returns a pytree of arrays with as many rows; its work on a row does not
            depend on the other rows.
        arrays: sequence of arrays (or pytrees of arrays) with equally many rows, at least one.
        read: a pytree with the parameters that `function` reads over and over. Where a CPU's caches hold them, its
            cores share the rows, each working on a piece of its own, in a thread that has the caller's default device
            and 64-bit mode, but none of JAX's other contexts. None: one piece at a time.

    Returns:
        What `function` returns for all rows, as NumPy arrays.

    Raises:
        jax.errors.JaxRuntimeError: not even a single row fits memory, or a failure other than lack of memory.
    """
    arrays = jax.tree.map(np.asarray, tuple(arrays))
    total = len(jax.tree.leaves(arrays)[0])
    cores, calling = _cores(read), threading.Lock()
    device, wide = jax.config.jax_default_device, jax.config.jax_enable_x64

    def piece(rows: range, size: int) -> Any:
        # A slice copies nothing, which indices do.
        full = size == len(rows)
        taken = slice(rows.start, rows.stop) if full else np.arange(rows.start, rows.start + size).clip(max=rows[-1])
        # In turn: the first call compiles for all. The others return before the work is done.
        with jax.default_device(device), jax.enable_x64(wide), calling:
            result = function(*_take(arrays, taken))
        return _take(jax.device_get(result), slice(len(rows)))

    def padded(count: int) -> int:
        return min(batch_size, 1 << (count - 1).bit_length())

    results, done = [], 0
    with ThreadPoolExecutor(cores) as threads:
        while done < total:
            rows = range(done, min(done + batch_size, total))
            share = -(-len(rows) // min(cores, max(len(rows) // LEAST_ROWS, 1)))
            own = [rows[i : i + share] for i in range(0, len(rows), share)]
            try:
                if len(own) == 1:
                    results.append(piece(rows, padded(share)))
                else:
                    working = [threads.submit(piece, part, padded(share)) for part in own]
                    wait(working)  # those that fit must not hold memory any more when fewer rows are tried
                    results += [one.result() for one in working]
            except jax.errors.JaxRuntimeError as error:
                size = padded(len(rows))
                if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                    raise
                batch_size = size // 2
                log.warning("out of memory with %d rows at a time: going on with %d", size, batch_size)
            else:
                done = rows.stop
    return jax.tree.map(lambda *pieces: np.concatenate(pieces), *results)


def _cores(read: Any) -> int:
    """How many are to share the rows."""
    if read is None or mesh.default_device().platform != "cpu":
        return 1
    size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(read))
    return usable_cores() if size <= CACHED else 1


def _take(arrays: Any, rows: slice | np.ndarray) -> Any:
    return jax.tree.map(lambda array: array[rows], arrays)
