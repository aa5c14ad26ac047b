"""What a training step costs: products counted in the traced program, traffic read from the compiled one.

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


def products(jaxpr: Jaxpr | ClosedJaxpr, trips: int = 1) -> int:
    """FLOPs of the matrix products of a traced program, two for each multiplication and addition, over all devices.

    What remat computes a second time counts twice. Of a conditional the dearest branch counts.

    trips: of loops whose length the program does not say.
    """
    total = 0
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
        elif name == "cond":
            total += max(products(branch, trips) for branch in params["branches"])
        else:
            times = {"scan": params.get("length"), "while": trips}.get(name, 1)
            total += times * sum(products(inner, trips) for inner in _inside(params))
    return total


def _inside(params: dict) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, Jaxpr | ClosedJaxpr):
                yield part


# -------------------------------------------------------------------------------------- traffic, as compiled

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "iota"}  # fmt: skip
"""Instructions that read and write nothing, or whose inside is counted."""
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
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
    trips: int


class Traffic(NamedTuple):
    """What one device moves in a step."""

    memory: int
    """Bytes that its instructions read and write in its own memory; a fusion counts its inputs and outputs."""
    collectives: list[Collective]


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


def traffic(text: str, trips: int = 1) -> Traffic:
    """Reads a compiled module's text (HLO).

    trips: of loops whose length the program does not say.
    """
    computations, entry = _parse(text)
    times: dict[str, int] = defaultdict(int)
    _visit(entry, 1, computations, trips, times)
    memory, collectives = 0, []
    for name, number in times.items():
        types = {one.name: one.type for one in computations[name]}
        for one in computations[name]:
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                collectives.append(Collective(kind, number * _exchanged(one), _groups(one), number))
            if one.opcode not in _FREE and not one.opcode.endswith("-done"):
                memory += number * _moved(one, types, computations)
    return Traffic(memory, collectives)


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
    """Adds up how often each computation runs that is a program of its own (no fusion, no reducer)."""
    found[name] += times
    for one in computations[name]:
        if one.opcode in ("while", "call", "conditional", "async-start"):
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
    bounds = [constants[name] for name in last.operands if name in constants]
    if last.opcode == "compare" and "direction=LT" in last.rest and bounds:
        return int(bounds[0].partition(")")[0])
    return trips


def _main(type: str) -> int:
    """Bytes in the main memory: without what a TPU keeps on the chip, S(1) in its layouts."""
    return _bytes(_ARRAY.sub(lambda array: "" if "S(1)" in (array[3] or "") else array[0], type))


def _bytes(type: str) -> int:
    total = 0
    for kind, shape, _ in _ARRAY.findall(type):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        total += math.prod(int(size) for size in shape.split(",") if size) * bits // 8
    return total


def _moved(one: _Instruction, types: dict[str, str], computations) -> int:
    """Bytes read and written. Of what is sliced or updated in place only the slice counts."""
    operands = [types.get(name, "") for name in one.operands]
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * _main(one.type)
    if one.opcode == "dynamic-update-slice":
        return 2 * _main(operands[1])
    called = _CALLED.search(one.rest) if one.opcode == "fusion" else None
    inner = computations.get(called[1], []) if called else []
    if not inner:
        return _main(one.type) + sum(map(_main, operands))
    read, written = 0, _main(one.type)
    inside = {part.name: part for part in inner}
    for part in inner:
        if part.opcode == "parameter":
            users = [user for user in inner if part.name in user.operands]
            sliced = [user for user in users if user.opcode in ("dynamic-slice", "gather")]
            updated = [u for u in users if u.opcode == "dynamic-update-slice" and u.operands[0] == part.name]
            if users and len(sliced) == len(users):
                read += sum(_main(user.type) for user in sliced)
            elif users and len(updated) == len(users):
                updates = sum(_main(inside[user.operands[1]].type) for user in updated)
                written += updates - sum(_main(user.type) for user in updated)
            else:
                read += _main(part.type)
    return read + max(written, 0)


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
    return size // 2 if "promoted" in one.rest else size


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
