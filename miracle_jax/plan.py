"""What a training step would need and take on hardware that is not here: it is compiled for virtual devices, not run.

    python -m miracle_jax.plan --config configs/paper.py --devices 256 [--chip v5e|v5p|v6e|h100|h200]

The very step of train.py is traced, sharded and compiled for 1, 8, 64, ... up to --devices virtual devices (several
numbers: for these), with the config's model and with decoders of other sizes (--sizes); no weight is ever made. A line
a plan: what each device holds (exact, from the shapes), its peak memory (XLA's own assignment), its FLOPs (products,
counted in the traced program), and the bytes that each kind of collective exchanges. With --chip also the time that
compute, memory and network each need at an assumed share of the chip's published figures, and the coarsest mesh whose
peak fits its memory (or --memory-gb). A step takes the largest of the three times if they overlap fully, their sum if
they do not at all.

    --devices N [N ...]    a ladder up to N, or these numbers
    --sizes [1b 3b 7b]     decoders beside the config's own: Llamas of these sizes, with remat; all unless given
    --chip NAME            published figures of TPU v5e, v5p, v6e, or of the SXM H100 and H200
    --memory-gb X          memory of a device, in place of the chip's
    --rows N               rows a device
    --compiler cpu|tpu     what the step is compiled for
    --out FILE.json        everything that is printed, and more

The batch has the longest bucket, unpacked. Where it has fewer rows than there are devices, each device gets one; --rows
N gives each device N. Programs are compiled for CPUs unless --compiler tpu is given, which needs libtpu (the extra
`tpu`), no TPU. A CPU's program computes bfloat16 in float32 and combines fewer collectives: it overstates peak memory
and what is exchanged.

Pretrained checkpoints are not fetched: one on this machine tells its shape, of one on the hub the config's fields do.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh as JaxMesh

from miracle_jax import abstract, chips, cost, examples, mesh, pretrained, storage
from miracle_jax.attributes import Schema
from miracle_jax.chips import Chip
from miracle_jax.command_line import read_config
from miracle_jax.config import Config, Llama, to_dict
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.hub import on_hub

SIZES = {  # the shapes of TinyLlama-1.1B, Llama-3.2-3B and Llama-2-7B
    "1b": Llama(vocab_size=32000, width=2048, depth=22, heads=32, kv_heads=4, mlp=5632, tied=False, dropout=0.0),
    "3b": Llama(vocab_size=128256, width=3072, depth=28, heads=24, kv_heads=8, mlp=8192, dropout=0.0),
    "7b": Llama(vocab_size=32000, width=4096, depth=32, heads=32, kv_heads=32, mlp=11008, tied=False, dropout=0.0),
}
QUICK = {
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True, "xla_cpu_use_fusion_emitters": False
}  # fmt: skip
"""For CPUs: the machine code is never run. The program's arrays and collectives do not depend on it."""


# ----------------------------------------------------------------------------------------------------- one plan


def rows_of(config: Config, devices: JaxMesh, rows: int = 0) -> int:
    """Rows of a micro-batch over all devices: the config's, at least one for each that has a part of the batch.

    rows: for each such device, in place of the config's. Raises UserError when they cannot share them evenly.
    """
    shares = mesh.shares_of(devices)
    if rows:
        return rows * shares
    configured = config.train.batch_size // config.train.accumulate
    if shares % configured:
        mesh.check_batch(configured, devices, "train.batch_size / train.accumulate")
    return max(configured, shares)


def plan(
    config: Config, sizes: tuple[int, ...], devices: Sequence[jax.Device], rows: int = 0, chip: Chip | None = None,
    room: float = math.inf,
) -> dict:  # fmt: skip
    """Traces and compiles the step of `config` (dtype and mesh included) for these devices.

    What each device holds is compared with `room` (bytes) first: what cannot fit is not compiled.
    """
    began = time.perf_counter()
    layout = mesh.make(config.mesh, devices)
    batch = abstract.batch_shapes(config, len(sizes), rows_of(config, layout, rows))
    step = abstract.abstract_step(config, sizes, layout, batch)
    held = step.held()
    found = {
        "devices": len(devices), "mesh": dict(layout.shape), "batch": math.prod(batch["reply"].shape[:2]),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves((step.state["params"], step.frozen))), "bytes": held,
    }  # fmt: skip
    if sum(held.values()) > room:
        return found | {"fits": False}
    on_cpu = devices[0].platform == "cpu"
    compiled = step.trace().lower().compile(compiler_options=QUICK if on_cpu else None)
    stats, exchanged = compiled.memory_analysis(), cost.collectives(compiled.as_text(), step.trips)
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    own = abstract.products(
        config, sizes, abstract.batch_shapes(config, len(sizes), batch["reply"].shape[1] // mesh.shares_of(layout))
    )
    by_kind = {kind: sum(one.bytes for one in exchanged if one.kind == kind) for kind in cost.COLLECTIVES}
    found |= {
        "arguments_bytes": stats.argument_size_in_bytes, "temporary_bytes": stats.temp_size_in_bytes,
        "peak_bytes": peak + stats.temp_size_in_bytes, "flops": own.flops / layout.shape["model"],
        # The optimizer reads and writes its state and the parameters; gradients are written and read.
        "memory_traffic_bytes": own.bytes / layout.shape["model"] + 2 * (sum(held.values()) - held["frozen"]),
        "collective_bytes": {kind: size for kind, size in by_kind.items() if size},
        "compiled_in_seconds": time.perf_counter() - began,
    }  # fmt: skip
    if chip:
        times = chips.seconds(chip, found["flops"], found["memory_traffic_bytes"], exchanged)
        found |= {
            "seconds": times, "step_seconds": [max(times.values()), sum(times.values())],
            "bound": max(times, key=times.get),
        }  # fmt: skip
    return found | {"fits": found["peak_bytes"] <= room}


def coarsest(config: Config, sizes: tuple[int, ...], devices: Sequence[jax.Device], **how) -> dict:
    """The plan of the first mesh that fits: the config's own if it splits anything, else parameters split over 1, 8,
    64, ... devices, at last over all with matrices multiplied in eight parts (`model`).

    Where none fits, the plan of the last.
    """
    splits = [(config.mesh.fsdp, config.mesh.model)]
    if splits == [(1, 1)]:
        splits = [(parts, 1) for parts in ladder(len(devices), 1)]
        splits += [(len(devices) // 8, 8)] if len(devices) % 8 == 0 else []
    for fsdp, model in splits:
        layout = dataclasses.replace(config.mesh, fsdp=fsdp, model=model)
        found = plan(dataclasses.replace(config, mesh=layout), sizes, devices, **how)
        if found["fits"]:
            break
    return found


def ladder(devices: int, group: int) -> list[int]:
    """1, 8, 64, ... as far as they divide a number of devices and `group` divides them, and that number."""
    return sorted({8**i for i in range(10) if devices % 8**i == 0 and 8**i % group == 0} | {devices})


# --------------------------------------------------------------------------------------------------- the command


def shapes_known(config: Config) -> tuple[Config, list[str]]:
    """The config with the shapes of those of its checkpoints that are on this machine, and a note on each other."""
    notes, parts = [], {}
    for part in ("encoder", "decoder"):
        shape = getattr(config, part)
        if on_hub(shape.pretrained):
            notes.append(
                f"{part}.pretrained {shape.pretrained} is on the hub, which is not asked; taken is what the config's "
                f"fields say: {shape.depth} layers of width {shape.width}, mlp {shape.mlp}, {shape.vocab_size} tokens"
            )
            parts[part] = dataclasses.replace(shape, pretrained="")
    return pretrained.resolve(dataclasses.replace(config, **parts)), notes


def virtual_devices(number: int) -> list[jax.Device]:
    """CPU devices that share this machine. To be called before JAX has looked for its devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    return jax.devices()


def tpu_devices(chip: str, number: int) -> list[jax.Device]:
    """TPUs as their compiler sees them. Raises UserError without libtpu, and for a number that no slice has."""
    from jax.experimental import topologies

    shapes = {math.prod(map(int, shape.split("x"))): shape for shape in chips.CHIPS[chip].topologies}
    if not shapes:
        raise UserError(f"--compiler tpu compiles for TPUs, but --chip is {chip}; leave --compiler out")
    shapes = {1: next(iter(shapes.values()))} | shapes  # one chip of the smallest slice
    if number not in shapes:
        raise UserError(
            f"--compiler tpu knows slices of {', '.join(map(str, shapes))} {chip} chips, not of {number}; choose "
            "--devices among these"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--compiler tpu needs libtpu, which is not installed; run bash launch/setup.sh tpu (no TPU is needed), or "
            "leave --compiler out"
        )
    jax.config.update("jax_platforms", "cpu")  # what is not compiled for them
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would ask a metadata server for the TPUs of this machine
    return topologies.get_topology_desc(f"{chip}:{shapes[number]}", platform="tpu").devices


def read_command(argv: list[str] | None):
    """(flags of this command, the config)."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--devices", type=int, nargs="+", default=[256])
    first.add_argument("--chip", default="")
    first.add_argument("--memory-gb", type=float, default=0.0)
    first.add_argument("--rows", type=int, default=0)
    first.add_argument("--sizes", nargs="*", default=list(SIZES))
    first.add_argument("--compiler", default="cpu")
    first.add_argument("--out", default="")
    given, rest = first.parse_known_args(argv)
    config, file, workdir = read_config("python -m miracle_jax.plan", __doc__, rest)
    if not file:
        raise UserError("--config is missing; the bundled ones are in configs/, for instance configs/paper.py")
    if workdir:
        raise UserError("--workdir is not understood: nothing is trained; --out FILE.json keeps what is printed")
    for name, holds in (("devices", min(given.devices) >= 1), ("rows", given.rows >= 0),
                        ("memory-gb", 0 <= given.memory_gb < math.inf)):  # fmt: skip
        if not holds:
            raise UserError(f"--{name} is {getattr(given, name.replace('-', '_'))}; it must be above 0")
    for size in given.sizes:
        if size not in SIZES:
            raise UserError(f"--sizes {size} is unknown; there are {', '.join(SIZES)}")
    if given.compiler not in ("cpu", "tpu"):
        raise UserError(f"--compiler {given.compiler} is unknown; there are cpu and tpu")
    if given.compiler == "tpu" and not given.chip:
        raise UserError("--compiler tpu needs --chip, for instance --chip v5e")
    if given.out:
        storage.local_file(given.out)
    return given, config


def plans(given, config: Config, chip: Chip | None) -> Iterator[dict]:
    """One after the other: the config's model, then the sizes, each for every number of devices."""
    memory = given.memory_gb * 1e9 or (chip.memory if chip else math.inf)
    numbers = sorted(set(given.devices))
    if len(numbers) == 1:
        numbers = ladder(numbers[0], config.mesh.fsdp * config.mesh.model)
    devices = {} if given.compiler == "tpu" else dict.fromkeys(numbers, virtual_devices(max(numbers)))
    schema = examples.load_frozen(config.data.frozen).schema if config.data.frozen else Schema.load(config.data.schema)
    models = {"as configured": config}
    for size in given.sizes:  # in full, and with what such sizes are trained with
        models[size] = dataclasses.replace(config, decoder=SIZES[size], remat=True)
    for name, model in models.items():
        for number in numbers:
            here = devices.get(number) or tpu_devices(given.chip, number)
            how = {"rows": given.rows, "chip": chip, "room": memory * chips.ROOM}
            yield {"model": name} | coarsest(model, schema.sizes, here[:number], **how)


COLUMNS = {
    "model": 13, "M parameters": 12, "devices": 7, "mesh": 27, "batch": 5, "parameters": 10, "gradients": 9,
    "optimizer": 9, "peak": 7, "TFLOP": 7, "collectives": 30, "compute": 7, "memory": 7, "network": 7,
    "step": 14, "bound": 7, "fits": 4,
}  # fmt: skip
"""Name and width. GB, TFLOP and ms, all of one device; GB that collectives exchange, by kind."""
SHORT = dict(zip(cost.COLLECTIVES, ("reduce", "gather", "scatter", "all-to-all", "permute"), strict=True))


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table that lines up."""
    padded = (cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))
    return f"| {' | '.join(padded)} |"


def cells_of(found: dict) -> list[str]:
    held = found["bytes"]
    cells = [
        found["model"], f"{found['parameters'] / 1e6:.1f}", str(found["devices"]),
        " x ".join(f"{name} {size}" for name, size in found["mesh"].items()), str(found["batch"]),
        *(f"{held[name] / 1e9:.3f}" for name in ("parameters", "gradients", "optimizer")),
    ]  # fmt: skip
    if "flops" in found:
        exchanged = [f"{SHORT[kind]} {size / 1e9:.3g}" for kind, size in found["collective_bytes"].items()]
        cells += [f"{found['peak_bytes'] / 1e9:.2f}", f"{found['flops'] / 1e12:.3g}", ", ".join(exchanged)]
    else:
        cells += [f"> {sum(held.values()) / 1e9:.1f}", "", ""]
    if "seconds" in found:
        cells += [f"{1e3 * time:.3g}" for time in found["seconds"].values()]
        cells += [" to ".join(f"{1e3 * time:.3g}" for time in found["step_seconds"]), found["bound"]]
    else:
        cells += [""] * 5
    return [*cells, "yes" if found["fits"] else "no"]


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        given, config = read_command(sys.argv[1:] if argv is None else argv)
        config, notes = shapes_known(config)
        chip = chips.find(given.chip) if given.chip else None
        if config.dtype == "auto":
            config = dataclasses.replace(config, dtype="bfloat16" if chip else "float32")
        for note in notes:
            print(f"note: {note}")
        how = (
            "by TPU's own compiler"
            if given.compiler == "tpu"
            else "for CPUs, which overstates the peak and what is exchanged"
        )
        print(f"compiled {how}; {config.dtype}; GB, TFLOP and ms are of one device, the longest bucket's")
        if chip:
            print(
                f"{chip.name}: {chip.flops / 1e12:g} TFLOP/s, {chip.memory / 1e9:g} GB at {chip.bandwidth / 1e9:g} "
                f"GB/s, {chip.link / 1e9:g} GB/s to {chip.domain} chips and {chip.beyond / 1e9:g} beyond; assumed are "
                f"{chips.COMPUTE:.0%}, {chips.ROOM:.0%}, {chips.BANDWIDTH:.0%} and {chips.NETWORK:.0%} of it"
            )
        print(line(list(COLUMNS)))
        print(line(["-" * width for width in COLUMNS.values()]), flush=True)
        found = []
        for one in plans(given, config, chip):
            found.append(one)
            print(line(cells_of(one)), flush=True)
        if given.out:
            about = {
                "config": to_dict(config), "compiler": given.compiler, "jax": jax.__version__,
                "chip": chip._asdict() if chip else None,
                "shares": {"flops": chips.COMPUTE, "bandwidth": chips.BANDWIDTH, "network": chips.NETWORK,
                           "memory": chips.ROOM},
            }  # fmt: skip
            with storage.replacing(given.out) as file:
                file.write(json.dumps(about | {"plans": found}, indent=1).encode())


if __name__ == "__main__":
    main()
