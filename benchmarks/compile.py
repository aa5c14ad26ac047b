"""Compile time: what a first call costs, cold and from the persistent cache, with scanned and with unrolled layers.

    python -m benchmarks.compile [--size tiny|base|paper] [--device cpu|gpu]

Each program (training step, decoding, solving) is compiled in a process of its own: cold into an empty cache, then
again from that cache. The time is that of tracing, lowering and compiling (or reading), not of the run. Scanned layers
keep the training step's program independent of the depth; decoding always unrolls.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks import measure, sizes

PROGRAMS = ("train_step", "train_step, unrolled", "decode", "sampler")


def compiled(program: str, size: str, device: str) -> float:
    """Compiles one program in this process. Seconds."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from miracle_jax import compiled as cache
    from miracle_jax.config import Decode, Sample

    cache.keep()
    if program.startswith("train_step"):
        from benchmarks import train_step
        from miracle_jax.train import make_optimizer, make_train_step

        settings, batches = train_step.problem(size, train_step.BATCH[size], 1)
        settings = dataclasses.replace(settings, scan_layers=program == "train_step")
        graphdef, params = sizes.random_model(settings)
        optimizer, _ = make_optimizer(settings, 1000)
        state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
        step = make_train_step(settings, graphdef, optimizer, jax.random.key(0))
        began = time.perf_counter()
        step.lower(state, batches[0]).compile()
    elif program == "decode":
        from benchmarks import decode
        from miracle_jax.decode import generate

        settings = sizes.config(size)
        graphdef, params = sizes.random_model(settings)
        z, allowed, bos, eos = decode.problem(settings, 64)
        decoder, how = nnx.merge(graphdef, params).decoder, Decode(max_new_tokens=decode.TOKENS)

        def run(decoder, z):
            return generate(decoder, z, jnp.arange(64), jnp.asarray(allowed), bos, eos, how, jax.random.key(0))

        began = time.perf_counter()
        jax.jit(run).lower(decoder, z).compile()
    else:
        from benchmarks import sampler
        from miracle_jax.sampler import solve

        rows = sampler.LATENTS[size]
        heads, (mean, logvar, aspects, weights) = sampler.our_heads("silu"), sampler.problem(rows)
        given = mean, logvar, aspects, weights, jnp.arange(rows), jax.random.key(0)
        began = time.perf_counter()
        solve.lower(heads, *given, Sample()).compile()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    given = measure.arguments(__doc__, argv, program="")
    if given.program:  # in a process of its own
        print(json.dumps(compiled(given.program, given.size, given.device)))
        return
    for program in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            took = {}
            own = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            for when in ("cold", "from the cache"):
                command = [sys.executable, "-m", "benchmarks.compile", "--size", given.size, "--device", given.device]
                done = subprocess.run(
                    [*command, "--program", program], capture_output=True, text=True, env=own, cwd=measure.ROOT
                )
                if done.returncode:
                    sys.exit(f"{program} could not be compiled: {done.stderr.strip().splitlines()[-1]}")
                seconds = json.loads(done.stdout.splitlines()[-1])
                took[f"{measure.OURS}, {when}"] = measure.Timing(seconds, [seconds], None, None)
        measure.rows("compile", f"compiling {program}", took, given, {})


if __name__ == "__main__":
    main()
