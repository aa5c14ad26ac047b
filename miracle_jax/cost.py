"""What a training step costs: products counted in the traced program, collectives read from the compiled one.

XLA's own cost analysis counts the body of a loop once, however often it runs, so both counts here multiply by trips.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

# ---------------------------------------------------------------------------------------- products, as traced


class Products(NamedTuple):
    """All matrix products of a program."""

    flops: int
    """Two for each multiplication and addition."""
    bytes: int
    """Of their operands and results: what is read and written if all else is fused into them."""


def products(jaxpr: Jaxpr | ClosedJaxpr, trips: int = 1) -> Products:
    """The matrix products of a traced program. What remat computes a second time counts twice.

    trips: of loops whose length the program does not say.
    """
    flops = size = 0
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, right, out = (variable.aval for variable in (*equation.invars, *equation.outvars))
            flops += 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
            size += sum(array.size * array.dtype.itemsize for array in (left, right, out))
        inside = [products(inner, trips) for inner in _inside(params)]
        if name == "cond":
            inside = [max(inside)]  # the dearest branch
        times = {"scan": params.get("length"), "while": trips}.get(name, 1)
        flops += times * sum(inner.flops for inner in inside)
        size += times * sum(inner.bytes for inner in inside)
    return Products(flops, size)


def _inside(params: dict) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, Jaxpr | ClosedJaxpr):
                yield part


# ------------------------------------------------------------------------------------ collectives, as compiled

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """A collective of one device, all its trips together."""

    kind: str
    bytes: int
    """Of the whole array that is reduced, gathered or exchanged: what one device has before or after."""
    groups: np.ndarray
    """(groups, members): the devices that take part together."""


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str
    """Operands and attributes."""


def collectives(text: str, trips: int = 1) -> list[Collective]:
    """Those of a compiled module's text (HLO), by what one device exchanges.

    trips: of loops whose length the program does not say.
    """
    computations, entry = _parse(text)
    times: dict[str, int] = defaultdict(int)
    _visit(entry, 1, computations, trips, times)
    return [
        Collective(kind, number * _exchanged(one), _groups(one))
        for name, number in times.items() for one in computations[name]
        if (kind := one.opcode.removesuffix("-start")) in COLLECTIVES
    ]  # fmt: skip


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _visit(name: str, times: int, computations, trips: int, found: dict[str, int]) -> None:
    """Adds up how often each computation runs."""
    found[name] += times
    for one in computations[name]:
        inner = times * (_length(one, computations, trips) if one.opcode == "while" else 1)
        called = _CALLED.findall(one.rest)
        for branches in _BRANCHES.findall(one.rest):
            called += re.findall(r"%?([\w.\-]+)", branches)
        for callee in called:
            _visit(callee, inner, computations, trips, found)


def _length(loop: _Instruction, computations, trips: int) -> int:
    """Trips of a loop: XLA's note of it (CPU, GPU), or the constant to which its condition compares (TPU)."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    last, constants = condition[-1], {c.name: c.rest for c in condition if c.opcode == "constant"}
    operands = re.findall(r"%([\w.\-]+)", last.rest.partition(")")[0])
    bounds = [constants[name] for name in operands if name in constants]
    if last.opcode == "compare" and "direction=LT" in last.rest and bounds:
        return int(bounds[0].partition(")")[0])
    return trips


def _bytes(type: str) -> int:
    total = 0
    for kind, shape in _ARRAY.findall(type):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        total += math.prod(int(size) for size in shape.split(",") if size) * bits // 8
    return total


def _exchanged(one: _Instruction) -> int:
    size, members = _bytes(one.type), _groups(one).shape[-1]
    kind = one.opcode.removesuffix("-start")
    if kind == "reduce-scatter":
        size *= members
    elif one.opcode == "all-gather-start":  # its result holds the operand too
        size = size * members // (members + 1)
    elif one.opcode == "collective-permute-start":
        size //= 2
    # XLA's CPU code cannot reduce bfloat16 and widens it: other devices do not.
    return size // 2 if "_promoted" in one.rest else size


def _groups(one: _Instruction) -> np.ndarray:
    """(groups, members) device numbers, from any of the three forms in which XLA writes them."""
    if one.opcode.startswith("collective-permute"):
        return np.array(re.findall(r"\{(\d+),(\d+)\}", one.rest.partition("source_target_pairs=")[2]), int)
    text = one.rest.partition("replica_groups=")[2]
    if text.startswith("mesh["):  # mesh['a'=8,'b'=4] {'a'}; part of an axis is 'a':(before)size
        axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", text.partition("]")[0])]
        named = {}
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", text.partition("{")[2].partition("}")[0]):
            named[name] = (int(before or 1), int(size or dict(axes)[name]))
        shape, chosen = [], []
        for name, size in axes:
            before, part = named.get(name, (size, 1))
            chosen.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        numbers = np.arange(math.prod(shape)).reshape(shape)
        others = [axis for axis in range(len(shape)) if axis not in chosen]
        return numbers.transpose(*others, *chosen).reshape(-1, math.prod(shape[axis] for axis in chosen))
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        target, shape, order = ([int(x) for x in part.split(",")] if part else [] for part in iota.groups())
        numbers = np.arange(math.prod(shape)).reshape(shape)
        return (numbers.transpose(order) if order else numbers).reshape(target)
    listed = re.match(r"\{(\{[\d,{}]*\})\}", text)
    if not listed:
        return np.zeros((1, 1), int)  # all devices, which one device is
    return np.array([[int(x) for x in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed[1])])
