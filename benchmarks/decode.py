"""Replies a second: latents to text through z alone, ours against PyTorch as released and Hugging Face `generate`.

    python -m benchmarks.decode [--size tiny|base|paper] [--device cpu|gpu] [--curves] [--replies 64]

Greedy, exactly 32 tokens a reply (`<eos>` is barred, so that all systems write as much), random weights, the same in
all systems; the share of equal tokens says whether they agree. On a GPU ours and the modernised ones compute in
bfloat16, in which near ties fall differently and the texts then part. Replies: 64 (tiny, base), 1,000 (paper).
"""

from functools import partial

from benchmarks import measure, sizes

TOKENS = 32
REPLIES = {"tiny": 64, "base": 64, "paper": 1000}
BATCHES = {"cpu": (64,), "gpu": (128, 512, 1024)}  # of the modernised systems; the best counts
CURVE = {"tiny": (1, 4, 16, 64, 256, 1024), "base": (1, 4, 16, 64), "paper": (1, 16, 128, 1024)}


def problem(settings, replies: int):
    """(z, allowed, bos, eos)."""
    import numpy as np

    vocabulary = settings.decoder.vocab_size
    bos, eos = vocabulary - 1, 0
    allowed = np.ones(vocabulary, bool)
    allowed[bos] = False
    return sizes.random_latents(replies, settings.latent.size), allowed, bos, eos


def ours(graphdef, params, z, allowed, bos: int, eos: int):
    """() -> (tokens, lengths) as NumPy arrays, as Model.decode makes them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from miracle_jax.config import Decode
    from miracle_jax.decode import generate
    from miracle_jax.pieces import in_pieces

    decoder, allowed = nnx.merge(graphdef, params).decoder, jnp.asarray(allowed)
    settings = Decode(min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    rows, key = np.arange(len(z)), jax.random.key(0)

    def write(z, rows):
        return generate(decoder, z, rows, allowed, bos, eos, settings, key, total=len(np.unique(rows)))

    return lambda: in_pieces(write, (z, rows), len(z), decoder)


def theirs(settings, params, device: str, z, allowed, bos: int, eos: int, released: bool = True) -> dict:
    """name -> (() -> (tokens, lengths))."""
    import torch

    from benchmarks import torch_decode
    from benchmarks.torch_model import TorchMiracle

    place = "cuda" if device == "gpu" else "cpu"
    systems = {}
    given = torch.from_numpy(z).to(place), torch.from_numpy(allowed).to(place), bos, eos, TOKENS, TOKENS
    if released:
        plain = TorchMiracle.from_ours(settings, sizes.SIZES, params, "eager").to(place).eval()
        systems["as released"] = lambda: numpy(torch_decode.generate_as_released(plain, *given))
    modern = TorchMiracle.from_ours(settings, sizes.SIZES, params, "sdpa").to(place).eval()
    if device == "gpu":
        modern = modern.to(torch.bfloat16)
        given = (given[0].to(torch.bfloat16), *given[1:])
    for batch in BATCHES[device]:
        if batch > BATCHES[device][0] and batch > len(z):
            continue
        note = f", batch {batch}" if len(BATCHES[device]) > 1 else ""
        for name, how in (("generate", {"cache": "dynamic"}), ("generate, static cache", {"cache": "static"}),
                          ("generate, static cache, torch.compile", {"cache": "static", "compile": True})):  # fmt: skip
            run = partial(torch_decode.generate_modern, modern, *given, batch_size=batch, **how)
            systems[f"modernised, {name}{note}"] = lambda run=run: numpy(run())
    return systems


def numpy(tensors):
    return tuple(tensor.cpu().numpy() for tensor in tensors)


def work_of(settings, replies: int) -> dict:
    """Floating-point operations, and the least bytes that have to be read: the weights once a step."""
    shape, Z = settings.decoder, settings.latent.size
    layer = 4 * shape.width**2 + 2 * shape.width * shape.mlp
    weights = shape.depth * layer + shape.vocab_size * shape.width + Z * shape.width * (shape.depth + 1)
    attention = 4 * shape.depth * shape.width * TOKENS / 2  # over half of the columns in the mean
    return {"flops": replies * TOKENS * (2 * weights + attention), "weights_read": TOKENS * weights}


def compare(given, replies: int, benchmark: str, title: str, released: bool = True) -> None:
    import numpy as np

    settings = sizes.config(given.size)
    graphdef, params = sizes.random_model(settings)
    task = problem(settings, replies)
    systems = {measure.OURS: ours(graphdef, params, *task)}
    systems |= theirs(settings, params, given.device, *task, released=released)
    timings = measure.in_turn(systems, given.repeats, given.device)
    reference = timings[measure.OURS].output[0]
    dtype = "bfloat16" if given.device == "gpu" else "float32"
    need = work_of(settings, replies)
    facts = {}
    for name, timing in timings.items():
        equal = float(np.mean(timing.output[0] == reference))
        agreement = "" if name == measure.OURS else f", {equal:.1%} equal"
        facts[name] = {
            "dtype": dtype if name != "as released" else "float32", "equal_tokens": equal, "flops": need["flops"],
            "correct": f"{replies / timing.median:.3g} replies/s{agreement}",
        }  # fmt: skip
    facts[measure.OURS]["bytes"] = need["weights_read"] * (2 if dtype == "bfloat16" else 4)
    measure.rows(benchmark, title, timings, given, facts, replies=replies)


def main(argv: list[str] | None = None) -> None:
    given = measure.arguments(__doc__, argv, replies=0)
    replies = given.replies or REPLIES[given.size]
    compare(given, replies, "decode", f"{replies} replies x {TOKENS} tokens")
    if given.curves:
        for number in CURVE[given.size]:
            compare(given, number, "decode scaling", f"{number} replies x {TOKENS} tokens", released=False)


if __name__ == "__main__":
    main()
