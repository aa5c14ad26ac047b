"""Latents a second: the ODE down the energy of three attributes, ours against torchdiffeq and torchode.

    python -m benchmarks.sampler [--size tiny|base|paper] [--device cpu|gpu] [--curves]

Real latents of size 768 with heads trained on them (latents.npz; make_latents.py says how), each context with each of
the eight personalities, weight 1 an attribute. The error of a result is the mean over 64 latents of the root mean
square over their dimensions against a tight solution in float64: diffrax's Dopri5 at 1e-9 for SiLU; for ReLU, whose
field jumps, Heun with 20,000 equal steps. Sizes: tiny 512 latents, base 4,096, paper 65,536.
"""

from benchmarks import measure

LATENTS = {"tiny": 512, "base": 4096, "paper": 65536}
_UP = (1, 8, 64, 512, 4096, 16384, 65536)
CURVE = {"tiny": _UP[:4], "base": _UP, "paper": _UP}
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
JUDGED = 64  # latents of which the error is known
WEIGHT = 1.0


def problem(latents: int):
    """mean, logvar (B, Z), aspects (B, 3), weights (B, 3): contexts in turn, personalities after each round of them."""
    import numpy as np

    from benchmarks.make_latents import FILE

    with np.load(FILE) as stored:
        mean, logvar = (stored[name].astype(np.float32) for name in ("mean", "logvar"))
    number = np.arange(latents)
    personality = number // len(mean) % 8
    aspects = (personality[:, None] >> np.arange(3) & 1).astype(np.int32)
    return mean[number % len(mean)], logvar[number % len(mean)], aspects, np.full((latents, 3), WEIGHT, np.float32)


def parameters(activation: str) -> dict:
    """Of the trained heads: w1 (A, Z, F), b1, w2 (A, F, N), b2, float32 NumPy arrays."""
    import numpy as np

    from benchmarks.make_latents import FILE

    with np.load(FILE) as stored:
        return {name: stored[f"{activation}.{name}"].astype(np.float32) for name in ("w1", "b1", "w2", "b2")}


def our_heads(activation: str):
    import jax.numpy as jnp
    from flax import nnx

    from miracle_jax.config import Latent
    from miracle_jax.latent import Heads

    heads = Heads(Latent(activation=activation), (2, 2, 2), nnx.Rngs(0))
    for name, value in parameters(activation).items():
        getattr(heads, name)[...] = jnp.asarray(value)
    return heads


def judged(latents: int):
    """Numbers of the latents of which the error is taken, spread over all."""
    import numpy as np

    return np.unique(np.linspace(0, latents - 1, min(JUDGED, latents)).astype(int))


def reference(activation: str, latents: int):
    """The tight float64 solution of the judged latents, (64, Z), by a program that shares nothing with the fast one."""
    import diffrax
    import jax
    import jax.numpy as jnp
    import numpy as np

    from miracle_jax.energy import energy_gradient

    mean, _, aspects, weights = (x[judged(latents)] for x in problem(latents))
    with jax.enable_x64(True):
        w1, b1, w2, b2 = (jnp.asarray(x, jnp.float64) for x in parameters(activation).values())
        act = {"relu": jax.nn.relu, "silu": jax.nn.silu}[activation]

        def heads(z):
            return jnp.einsum("af,afn->an", act(jnp.einsum("z,azf->af", z, w1) + b1), w2) + b2

        def move(z, aspects, weights):
            field = diffrax.ODETerm(lambda t, z, _: (0.1 + t * 19.9) / 2 * energy_gradient(heads, z, aspects, weights))
            smooth = activation == "silu"
            return diffrax.diffeqsolve(
                field, diffrax.Dopri5() if smooth else diffrax.Heun(), 1.0, 0.0, None if smooth else -1 / 20000, z,
                stepsize_controller=diffrax.PIDController(1e-9, 1e-9) if smooth else diffrax.ConstantStepSize(),
                adjoint=diffrax.ForwardMode(), max_steps=None,
            ).ys[0]  # fmt: skip

        return np.asarray(jax.jit(jax.vmap(move))(jnp.asarray(mean, jnp.float64), aspects, jnp.asarray(weights, float)))


def error(z, tight, latents: int) -> float:
    """Mean over the judged latents of the root mean square over their dimensions."""
    import numpy as np

    return float(np.mean(np.sqrt(np.mean((np.asarray(z)[judged(latents)] - tight) ** 2, axis=1))))


def ours(activation: str, latents: int, tolerance: float | None = None, **settings):
    """() -> SampleResult of the public sampler, with the default tolerance unless one is given."""
    import jax
    import numpy as np

    from miracle_jax.config import Sample
    from miracle_jax.sampler import sample

    if tolerance:
        settings |= {"rtol": tolerance, "atol": tolerance}
    config = Sample(batch_size=max(latents, 1), **settings)
    heads, given, key = our_heads(activation), tuple(map(np.asarray, problem(latents))), jax.random.key(0)
    return lambda: sample(heads, *given, config, key)


def theirs(activation: str, latents: int, device: str) -> dict:
    """The PyTorch systems: name -> (tolerance -> Solved)."""
    import torch

    from benchmarks import torch_sampler as peers

    place = "cuda" if device == "gpu" else "cpu"
    mean, _, aspects, weights = problem(latents)
    given = peers.tensors((mean, aspects, weights), place, torch.float32)
    plain = peers.Heads(parameters(activation), activation).to(place)
    stacked = peers.StackedHeads(parameters(activation), activation).to(place)
    systems = {
        "as released, with its syncs and its factor": lambda t: peers.solve_as_released(
            plain, *given, t, syncs=True, slip=True
        ),
        "as released, with its syncs": lambda t: peers.solve_as_released(plain, *given, t, syncs=True),
        "as released": lambda t: peers.solve_as_released(plain, *given, t),
        "modernised, torchdiffeq": lambda t: peers.solve_modernised(stacked, *given, t, "torchdiffeq"),
        "modernised, torchode": lambda t: peers.solve_modernised(stacked, *given, t, "torchode"),
    }
    if device == "gpu":
        systems["modernised, torchdiffeq, torch.compile"] = lambda t: peers.solve_modernised(
            stacked, *given, t, "torchdiffeq", compiled=True
        )
    return systems


def counted(name: str, output, latents: int) -> float:
    """Floating-point operations of the products that a system needed."""
    Z, D = 768, 384
    if name != measure.OURS:
        return output.evaluations * latents * 4 * Z * D  # there and back through the first layers
    # Into the row space and out of it; three evaluations a step there, and two at the start, each a Gram product.
    return latents * 4 * Z * D + (3 * float(output.steps.sum()) + 2 * latents) * 2 * D * D


def compare(activation: str, given) -> None:
    """The table of one activation."""
    import numpy as np

    latents = LATENTS[given.size]
    tight = reference(activation, latents)
    move = ours(activation, latents)
    systems = {measure.OURS: move}
    systems |= {name: (lambda run=run: run(1e-3)) for name, run in theirs(activation, latents, given.device).items()}
    timings = measure.in_turn(systems, 2 * given.repeats, given.device)  # ours are short calls, which scatter
    facts = {}
    for name, timing in timings.items():
        output = timing.output
        evaluations = 3 * float(np.mean(output.steps)) + 2 if name == measure.OURS else output.evaluations
        wrong = error(output.z, tight, latents)
        facts[name] = {
            "flops": counted(name, output, latents), "error": wrong, "evaluations": evaluations,
            "correct": f"error {wrong:.1e}, {evaluations:.0f} evaluations",
        }  # fmt: skip
    work = f"{latents} latents x 768, 3 attributes, {activation}"
    measure.rows("sampler", work, timings, given, facts, latents=latents)


def accuracy_curve(activation: str, given) -> None:
    """Error against time, by tolerance: ours with each solver, and the best of the others."""
    latents = LATENTS[given.size]
    tight = reference(activation, latents)
    for tolerance in TOLERANCES:
        systems = {measure.OURS + f", {solver}": ours(activation, latents, tolerance, solver=solver)
                   for solver in ("bosh3", "dopri5", "tsit5")}  # fmt: skip
        peers = theirs(activation, latents, given.device)
        systems["modernised, torchdiffeq"] = lambda t=tolerance, run=peers["modernised, torchdiffeq"]: run(t)
        timings = measure.in_turn(systems, 1, given.device)
        facts = {name: {"error": (wrong := error(timing.output.z, tight, latents)), "correct": f"error {wrong:.1e}"}
                 for name, timing in timings.items()}  # fmt: skip
        work = f"{latents} latents, {activation}, tolerance {tolerance:g}"
        measure.rows("sampler accuracy", work, timings, given, facts, latents=latents, tolerance=tolerance)


def scaling_curve(given) -> None:
    for latents in CURVE[given.size]:
        systems = {measure.OURS: ours("silu", latents)}
        peers = theirs("silu", latents, given.device)
        for name in ("as released", "modernised, torchdiffeq"):
            if latents <= 4096 or name != "as released":
                systems[name] = lambda run=peers[name]: run(1e-3)
        timings = measure.in_turn(systems, given.repeats, given.device)
        measure.rows("sampler scaling", f"{latents} latents, silu", timings, given, {}, latents=latents)


def main(argv: list[str] | None = None) -> None:
    given = measure.arguments(__doc__, argv)
    for activation in ("relu", "silu"):
        compare(activation, given)
        if given.curves:
            accuracy_curve(activation, given)
    if given.curves:
        scaling_curve(given)


if __name__ == "__main__":
    main()
