"""Training steps a second: real batches of the bundled corpus, ours against PyTorch as released and modernised.

    python -m benchmarks.train_step [--size tiny|base|paper] [--device cpu|gpu] [--curves] [--batch 16] [--steps 2]

One call is the same few optimizer steps on the same batches, dropout 0.1, AdamW, clipping, all losses; on a GPU in
bfloat16 (autocast in PyTorch). Ours gets the batches as its pipeline makes them: filled up to their bucket, and packed,
so that only attention meets most of the padding; PyTorch gets them cut to the longest text of each batch, which costs
it nothing. Batch: 16 (tiny, base), 64 (paper).

The share of matmul is model FLOPs utilisation: multiplications and additions of the step's products, as `plan` counts
them, of ours' packed batches, against the rate of a large product on the same machine. PyTorch's is taken of the same
number, although it computes more for the padding that is left to it. The paper's 20 epochs of 42,322 turns are
extrapolated from the measured step, without validation and checkpoints.
"""

import dataclasses
import itertools
import json
import subprocess
import sys

from benchmarks import measure, sizes

BATCH = {"tiny": 16, "base": 16, "paper": 64}
CURVE = {"tiny": (8, 32, 128, 512), "base": (8, 16, 32), "paper": (8, 16, 32, 64, 128, 256, 512)}
ROUNDS = 2
EPOCHS, TURNS = 20, 42_322  # of the paper


def problem(size: str, batch: int, steps: int, shares: int = 1):
    """(config, batches): consecutive steps of an epoch that share the commonest bucket, (1, B, ...) NumPy arrays.

    shares: number of devices that the batches are packed for.
    """
    from miracle_jax import pipeline
    from miracle_jax.config import Train

    settings = sizes.config(size)
    settings = dataclasses.replace(settings, train=Train(batch_size=batch, steps=1000))
    corpus = pipeline.prepare(settings)
    stream = pipeline.Batches(corpus.train, settings.data.buckets, batch, 1, settings.seed, shares=shares)
    buckets = [stream.bucket(step) for step in range(min(stream.steps_per_epoch, 200))]
    commonest = max(set(buckets), key=buckets.count)
    chosen = itertools.islice(itertools.cycle([i for i, b in enumerate(buckets) if b == commonest]), steps)
    return settings, [stream[step] for step in chosen]


def ours(settings, graphdef, params, batches, devices=None):
    """() -> losses of the last step.

    devices: a mesh over which each batch is split and which parameters are copied to; None: one device.
    """
    import jax
    import jax.numpy as jnp

    from miracle_jax import mesh
    from miracle_jax.train import make_optimizer, make_train_step

    optimizer, _ = make_optimizer(settings, 1000)
    params = jax.tree.map(jnp.array, params)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(100)}
    shardings = mesh.parameter_shardings(state, devices, settings.mesh) if devices else None
    if devices:
        state = jax.device_put(state, shardings)
        batches = [mesh.put_batch(batch, devices, batch_axis=1) for batch in batches]
    else:
        batches = [jax.device_put(batch) for batch in batches]
    step = make_train_step(settings, graphdef, optimizer, jax.random.key(0), shardings)

    def run():
        nonlocal state
        for batch in batches:
            state, losses = step(state, batch)
        return jax.device_get(losses)

    return run


def theirs(settings, params, batches, device: str) -> dict:
    """name -> (() -> (() -> losses of the last step)): the outer call makes the system."""
    import torch

    from benchmarks import torch_train
    from benchmarks.torch_model import TorchMiracle

    place = "cuda" if device == "gpu" else "cpu"

    def system(style, compiled=False):
        model = TorchMiracle.from_ours(settings, sizes.SIZES, params, "eager" if style == "released" else "sdpa")
        step = torch_train.make_step(model.to(place), settings, style, compile=compiled)
        step.number = 100
        given = [torch_train.to_torch(cut(batch), place, style) for batch in batches]

        def run():
            for batch in given:
                losses = step(batch)
            if device == "gpu":
                torch.cuda.synchronize()
            return {name: float(value) for name, value in losses.items()}

        return run

    systems = {"as released": lambda: system("released"), "modernised": lambda: system("modernised")}
    if device == "gpu":
        systems["modernised, torch.compile"] = lambda: system("modernised", compiled=True)
    return systems


def cut(batch: dict) -> dict:
    """One micro-batch as wide as its longest texts."""
    batch = {name: array[0] for name, array in batch.items() if not name.endswith("_tokens")}
    return batch | {name: batch[name][:, : batch[f"{name}_length"].max()] for name in ("context", "joint", "reply")}


def flops(settings, batches) -> float:
    """Of the products of all steps, as traced: forward and backward."""
    from miracle_jax import abstract

    scored = [int(each["reply_length"].sum() if "reply_tokens" in each else each["reply_length"].max()) - 1
              for each in batches]  # fmt: skip
    return sum(abstract.products(settings, sizes.SIZES, *each).flops for each in zip(batches, scored, strict=True))


def apart(given, batch: int, names: list[str]) -> dict[str, measure.Timing]:
    """Each system in a process of its own, in turn, twice: memory has no room for two training states at once."""
    repeats = -(-given.repeats // ROUNDS)
    timings: dict[str, measure.Timing] = {}
    for _ in range(ROUNDS):
        for name in names:
            measure.note(name)
            command = [sys.executable, "-m", "benchmarks.train_step", "--size", given.size, "--batch", str(batch)]
            command += ["--steps", str(given.steps), "--repeats", str(repeats), "--system", name]
            done = subprocess.run(command, capture_output=True, text=True, cwd=measure.ROOT)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"status {done.returncode}; out of memory?"])[-1]
                measure.note(f"{name} is left out: {last}")
                continue
            found = measure.Timing(**json.loads(done.stdout.splitlines()[-1]))
            if name in timings:
                timings[name].seconds += found.seconds
            else:
                timings[name] = found
    return timings


def one(given, batch: int, name: str) -> measure.Timing:
    """One system in this process."""
    import jax

    settings, batches = problem(given.size, batch, given.steps)
    graphdef, params = sizes.random_model(settings)
    if name == measure.OURS:
        run = ours(settings, graphdef, params, batches)
    else:
        run = theirs(settings, jax.device_get(params), batches, given.device)[name]()
    del params
    # The first call after the one that compiles tends to be slower than those that follow.
    timing = measure.in_turn({name: run}, given.repeats, given.device, least=2)[name]
    timing.output = {loss: float(value) for loss, value in timing.output.items()}
    return timing


def compare(given, batch: int, benchmark: str, released: bool = True) -> None:
    settings, batches = problem(given.size, batch, given.steps)
    names = [measure.OURS, *(name for name in theirs(settings, None, batches, given.device))]
    names = [name for name in names if released or name != "as released"]
    if given.device == "cpu" and given.size != "tiny":  # tiny goes the way of GPUs, which can so be rehearsed
        timings = apart(given, batch, names)
    else:
        graphdef, params = sizes.random_model(settings)
        peers = theirs(settings, params, batches, given.device)
        systems = {name: peers[name]() for name in names[1:]}
        timings = measure.in_turn(
            {measure.OURS: ours(settings, graphdef, params, batches)} | systems, given.repeats, given.device
        )
    steps = given.steps
    reference = timings[measure.OURS].output["reconstruct"]
    facts = {}
    for name, timing in timings.items():
        step = timing.median / steps
        hours = step * EPOCHS * TURNS / batch / 3600
        facts[name] = {
            "flops": flops(settings, batches), "dtype": "bfloat16" if given.device == "gpu" else "float32",
            "step_seconds": step, "reconstruct": float(timing.output["reconstruct"]), "hours_of_the_paper": hours,
            "correct": f"{measure.seconds(step)} a step, loss {timing.output['reconstruct']:.3f} "
                       f"(ours {reference:.3f}), paper's 20 epochs {hours:.3g} h",
        }  # fmt: skip
    context, joint, reply = (batches[0][name].shape[2] for name in ("context", "joint", "reply"))
    work = f"{steps} training steps of {batch}, lengths ({context}, {joint}, {reply})"
    measure.rows(benchmark, work, timings, given, facts, batch=batch, steps=steps)


def main(argv: list[str] | None = None) -> None:
    given = measure.arguments(__doc__, argv, batch=0, steps=2, system="")
    batch = given.batch or BATCH[given.size]
    if given.system:
        print(json.dumps(dataclasses.asdict(one(given, batch, given.system))))
        return
    compare(given, batch, "train_step")
    if given.curves:
        for number in CURVE[given.size]:
            compare(given, number, "train_step scaling", released=False)


if __name__ == "__main__":
    main()
