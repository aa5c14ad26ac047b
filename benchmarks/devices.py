"""One piece of work shared by 1, 2, 4 and 8 devices: latents of the sampler, and training steps, by miracle_jax.mesh.

    python -m benchmarks.devices [--device cpu|gpu] [--number 4]

On a GPU machine the first so many GPUs, as far as there are any. On a CPU the devices are virtual and share the same
cores: the times show what splitting the work costs, and no speed-up. (Where two are faster than one, one left cores
idle.) There the model has the size tiny whatever --size says. Every number of devices has a process of its own;
--number runs one.
"""

import os
import subprocess
import sys

from benchmarks import measure

NUMBERS = (1, 2, 4, 8)
LATENTS = {"cpu": 4096, "gpu": 65536}
BATCH, STEPS = 64, 2


def make_visible(number: int, device: str) -> None:
    """Gives this process so many devices. To be called before JAX looks for them."""
    if device == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={number}"
    else:
        found = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(number)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(found.split(",")[:number])


def sampling(latents: int):
    """() -> z: every device solves its share of the latents and asks the others nothing."""
    import jax
    from jax.sharding import PartitionSpec as P

    from benchmarks import sampler as benchmark
    from miracle_jax import mesh, sampler
    from miracle_jax.config import Mesh, Sample

    devices, settings = mesh.make(Mesh()), Sample(batch_size=1)  # `solve` takes all rows, whatever batch_size is
    rows = P(mesh.BATCH_AXES)

    @jax.jit
    @jax.shard_map(mesh=devices, in_specs=(P(), rows, P()), out_specs=rows, check_vma=False)
    def solve(heads, arrays, key):
        return sampler.solve(heads, *arrays, key, settings).z

    arrays = (*benchmark.problem(latents), jax.numpy.arange(latents))
    arrays = jax.device_put(arrays, jax.NamedSharding(devices, rows))
    heads, key = jax.device_put((benchmark.our_heads("silu"), jax.random.key(0)), mesh.replicated(devices))
    return lambda: jax.device_get(solve(heads, arrays, key))


def training(size: str, batch: int, steps: int):
    """() -> the losses of the last step: the batch is split over the devices, parameters are copied to all."""
    from benchmarks import sizes, train_step
    from miracle_jax import mesh

    devices = mesh.make(sizes.config(size).mesh)
    settings, batches = train_step.problem(size, batch, steps, mesh.shares_of(devices))
    return train_step.ours(settings, *sizes.random_model(settings), batches, devices)


def compare(given, number: int) -> None:
    """Both works in this process, which has `number` devices."""
    import jax
    import numpy as np

    if jax.device_count() < number:
        measure.note(f"{number} devices are left out: {jax.device_count()} here")
        return
    on = f"on {number} device{'s' * (number > 1)}"
    latents = LATENTS[given.device]
    timings = measure.in_turn({measure.OURS: sampling(latents)}, given.repeats, given.device)
    distance = float(np.sqrt(np.mean(timings[measure.OURS].output ** 2)))
    facts = {measure.OURS: {"correct": f"RMS of z(0) {distance:.6f}"}}
    measure.rows("devices", f"{latents} latents, silu, {on}", timings, given, facts, devices=number, latents=latents)

    timings = measure.in_turn({measure.OURS: training(given.size, BATCH, STEPS)}, given.repeats, given.device)
    loss = float(timings[measure.OURS].output["reconstruct"])
    facts = {measure.OURS: {"correct": f"loss after {STEPS} steps {loss:.6f}"}}
    work = f"{STEPS} training steps of {BATCH}, {on}"
    measure.rows("devices", work, timings, given, facts, devices=number, batch=BATCH)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    given = measure.arguments(__doc__, argv, number=0)
    if given.number:
        given.size = "tiny" if given.device == "cpu" else given.size
        make_visible(given.number, given.device)
        compare(given, given.number)
        return
    for number in NUMBERS:
        command = [sys.executable, "-m", "benchmarks.devices", *argv, "--number", str(number)]
        # Where it is started from, `benchmarks` was found; --out may be relative to the folder.
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
