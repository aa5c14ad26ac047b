"""Training steps a second: real batches of the bundled corpus, ours against PyTorch as released and modernised.

    python -m benchmarks.train_step [--size tiny|base|paper] [--device cpu|gpu] [--curves] [--batch 16] [--steps 2]

One call is the same few optimizer steps on the same batches, dropout 0.1, AdamW, clipping, all losses; on a GPU in
bfloat16 (autocast in PyTorch). Ours gets the batches as its pipeline makes them, filled up to their bucket; PyTorch
gets them cut to the longest text of each batch, which costs it nothing. Batch: 16 (tiny, base), 64 (paper).

The share of matmul is model FLOPs utilisation: multiplications and additions of the products of one forward and two
backward passes, over the tokens of ours' buckets, against the rate of a large product on the same machine. The paper's
20 epochs of 42,322 turns are extrapolated from the measured step, without validation and checkpoints.
"""

import gc
import itertools

from benchmarks import measure, sizes

BATCH = {"tiny": 16, "base": 16, "paper": 64}
CURVE = {"tiny": (8, 32, 128, 512), "base": (8, 16, 32), "paper": (8, 16, 32, 64, 128, 256, 512)}
EPOCHS, TURNS = 20, 42_322  # of the paper


def problem(size: str, batch: int, steps: int):
    """(config, batches): consecutive steps of an epoch that share the commonest bucket, (1, B, ...) NumPy arrays."""
    import dataclasses

    from miracle_jax import pipeline
    from miracle_jax.config import Train

    settings = sizes.config(size)
    settings = dataclasses.replace(settings, train=Train(batch_size=batch, steps=1000))
    corpus = pipeline.prepare(settings)
    stream = pipeline.Batches(corpus.train, settings.data.buckets, batch, 1, settings.seed)
    buckets = [stream.bucket(step) for step in range(min(stream.steps_per_epoch, 200))]
    commonest = max(set(buckets), key=buckets.count)
    chosen = itertools.islice(itertools.cycle([i for i, b in enumerate(buckets) if b == commonest]), steps)
    return settings, [stream[step] for step in chosen]


def ours(settings, graphdef, params, batches):
    """() -> losses of the last step."""
    import jax
    import jax.numpy as jnp

    from miracle_jax.train import make_optimizer, make_train_step

    optimizer, _ = make_optimizer(settings, 1000)
    params = jax.tree.map(jnp.array, params)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(100)}
    step = make_train_step(settings, graphdef, optimizer, jax.random.key(0))
    batches = [jax.device_put(batch) for batch in batches]

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
    batch = {name: array[0] for name, array in batch.items()}
    return batch | {name: batch[name][:, : batch[f"{name}_length"].max()] for name in ("context", "joint", "reply")}


def flops(settings, batches) -> float:
    """Of the products of all steps: forward, and twice as much backward. What frames the layers (embeddings' gradients,
    norms, the optimizer) is not counted."""

    def layers(shape, texts, width):
        products = 4 * shape.width**2 + 2 * shape.width * shape.mlp
        return shape.depth * texts * width * 2 * (products + 2 * width * shape.width)

    total = 0.0
    for batch in batches:
        texts = batch["reply"].shape[1]
        widths = {name: batch[name].shape[2] for name in ("context", "joint", "reply")}
        total += layers(settings.encoder, texts, widths["context"]) + layers(settings.encoder, texts, widths["joint"])
        total += layers(settings.decoder, texts, widths["reply"])
        scored = int(batch["reply_length"].max()) - 1  # what lies behind the longest reply is not scored
        total += texts * scored * 2 * settings.decoder.width * settings.decoder.vocab_size
    return 3 * total


def compare(given, batch: int, steps: int, benchmark: str, released: bool = True) -> None:
    """Ours in turn with each of the others, one after another: two training states are all that memory has room for."""
    import jax

    settings, batches = problem(given.size, batch, steps)
    graphdef, params = sizes.random_model(settings)
    params = jax.device_get(params)
    run = ours(settings, graphdef, params, batches)
    for name, make in theirs(settings, params, batches, given.device).items():
        if released or name != "as released":
            systems = {measure.OURS: run, name: make()}
            report(settings, batches, systems, given, benchmark)
            del systems
            gc.collect()


def report(settings, batches, systems: dict, given, benchmark: str) -> None:
    batch, steps = batches[0]["reply"].shape[1], len(batches)
    timings = measure.in_turn(systems, given.repeats, given.device)
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
    given = measure.arguments(__doc__, argv, batch=0, steps=2)
    compare(given, given.batch or BATCH[given.size], given.steps, "train_step")
    if given.curves:
        for batch in CURVE[given.size]:
            compare(given, batch, given.steps, "train_step scaling", released=False)


if __name__ == "__main__":
    main()
