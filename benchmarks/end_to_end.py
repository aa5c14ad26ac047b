"""Contexts to replies: encode, solve, decode, ours against PyTorch as released and modernised.

    python -m benchmarks.end_to_end [--size tiny|base|paper] [--device cpu|gpu] [--run runs/tiny] [--replies 160]

Ours is the public `Model.replies`, tokenising and all. With --run it is a trained run of ours (a GPT-2 decoder that
does not see the context), whose parameters PyTorch gets too; replies end where they end. Without, weights are random
and every reply has 32 tokens. Contexts and personalities are those of the bundled test set, spread over it. Energy
weight and lengths are the run's in all systems; PyTorch solves at the released tolerance, 1e-3, ours at its own.

As released: contexts in batches of 128 as they come, latents in batches of 128, replies in batches of 4 with no cache.
Modernised: contexts by length, all latents at once (torchdiffeq), Hugging Face generate with the best cache, batch 128.
Replies: 160 (tiny, base), 1,000 (paper: the paper's protocol, which took 121 s on one RTX 4090).
"""

from benchmarks import decode, measure, sizes

REPLIES = {"tiny": 160, "base": 160, "paper": 1000}


def random_run(size: str):
    """A Model of random weights whose replies have 32 tokens."""
    from flax import nnx

    from miracle_jax import pipeline
    from miracle_jax.config import Decode
    from miracle_jax.model import Model

    settings = sizes.config(size, decode=Decode(min_new_tokens=decode.TOKENS, max_new_tokens=decode.TOKENS))
    corpus = pipeline.prepare(settings)
    miracle = nnx.merge(*sizes.random_model(settings))
    return Model(settings, corpus.schema, corpus.tokenizers, miracle, {"joint": miracle.heads}, "joint")


def problem(model, replies: int) -> tuple[list[dict], list[dict]]:
    """(contexts, personalities)."""
    from miracle_jax import dataset

    instances = dataset.read_files(dataset.bundled("test"), model.schema)
    chosen = [instances[i * len(instances) // replies] for i in range(replies)]
    contexts = [{"input": i.questions, "output": i.replies} for i in chosen]
    return contexts, [model.schema.describe(i.labels) for i in chosen]


def theirs(model, contexts, personalities, device: str) -> dict:
    """name -> (() -> replies). Tokenising is ours, and timed, in all of them."""
    import numpy as np
    import torch
    from flax import nnx

    from benchmarks import torch_decode, torch_sampler
    from benchmarks.torch_model import TorchMiracle
    from miracle_jax.model import turns

    settings, place = model.config, "cuda" if device == "gpu" else "cpu"
    params = nnx.to_pure_dict(nnx.state(model.miracle))
    heads = nnx.to_pure_dict(nnx.state(model.heads[model.default_heads]))
    heads = {name: np.asarray(value) for name, value in heads.items()}
    sizes_, activation = model.schema.sizes, settings.latent.activation
    limit = min(settings.sample.context_tokens or settings.data.buckets[-1][0], settings.data.buckets[-1][0])
    encoder, decoder = model.tokenizers.encoder, model.tokenizers.decoder
    allowed = np.arange(settings.decoder.vocab_size) < decoder.size
    allowed[decoder.bos_id] = False
    allowed = torch.from_numpy(allowed).to(place)
    lengths = settings.decode.min_new_tokens, settings.decode.max_new_tokens

    def tokenised():
        rows = [encoder.context(*turns(context), limit) for context in contexts]
        length = np.array([len(row) for row in rows])
        tokens = np.full((len(rows), length.max()), encoder.pad_id)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        aspects = np.array([model.schema.parse(personality) for personality in personalities])
        weights = np.full(aspects.shape, settings.sample.weight, np.float32)
        return torch.from_numpy(tokens), torch.from_numpy(length), aspects, weights

    def texts(tokens, length):
        rows = zip(tokens.cpu().numpy(), length.cpu().numpy(), strict=True)
        return [decoder.decode(row[:n].tolist()).strip() for row, n in rows]

    def system(released: bool, generate):
        torch_model = TorchMiracle.from_ours(settings, sizes_, params, "eager" if released else "sdpa").to(place).eval()
        if device == "gpu" and not released:
            torch_model = torch_model.to(torch.bfloat16)
        own_heads = (torch_sampler.Heads if released else torch_sampler.StackedHeads)(heads, activation).to(place)

        def run():
            tokens, length, aspects, weights = tokenised()
            mean, _ = torch_decode.encode_contexts(torch_model, tokens, length, 128, by_length=not released)
            mean = mean.float().clone()
            given = torch_sampler.tensors((mean.cpu().numpy(), aspects, weights), place, torch.float32)
            if released:
                z = torch_sampler.solve_as_released(own_heads, *given, 1e-3).z
            else:
                z = torch_sampler.solve_modernised(own_heads, *given, 1e-3, "torchdiffeq").z
            z = z.to(place, next(torch_model.parameters()).dtype)
            return texts(*generate(torch_model, z, allowed, decoder.bos_id, decoder.eos_id, *lengths))

        return run

    modern = torch_decode.generate_modern
    systems = {
        "as released": system(True, torch_decode.generate_as_released),
        "modernised, dynamic cache": system(False, lambda *a: modern(*a, batch_size=128, cache="dynamic")),
        "modernised, static cache": system(False, lambda *a: modern(*a, batch_size=128, cache="static")),
    }
    if device == "gpu":
        systems["modernised, static cache, torch.compile"] = system(
            False, lambda *a: modern(*a, batch_size=128, cache="static", compile=True)
        )
    return systems


def main(argv: list[str] | None = None) -> None:
    given = measure.arguments(__doc__, argv, run="", replies=0)
    from miracle_jax import model

    speaker = model.load(given.run) if given.run else random_run(given.size)
    replies = given.replies or REPLIES[given.size]
    contexts, personalities = problem(speaker, replies)
    systems = {measure.OURS: lambda: [reply.text for reply in speaker.replies(contexts, personalities)]}
    systems |= theirs(speaker, contexts, personalities, given.device)
    timings = measure.in_turn(systems, given.repeats, given.device)
    wanted = timings[measure.OURS].output
    words = sum(len(text.split()) for text in wanted) / len(wanted)
    facts = {}
    for name, timing in timings.items():
        equal = sum(a == b for a, b in zip(timing.output, wanted, strict=True)) / replies
        agreement = f"{words:.1f} words a reply" if name == measure.OURS else f"{equal:.0%} equal"
        facts[name] = {
            "equal_replies": equal, "correct": f"{replies / timing.median:.3g} replies/s, {agreement}",
        }  # fmt: skip
    what = f"run {given.run}" if given.run else "random weights, 32 tokens a reply"
    measure.rows("end_to_end", f"{replies} test contexts end to end, {what}", timings, given, facts, replies=replies)


if __name__ == "__main__":
    main()
