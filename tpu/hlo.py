"""Collectives and memory traffic of a compiled program, read from its HLO text.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as
the loops around it run; all branches of a condition count, except in the named scope `rarely`. On a
GPU each instruction that moves data is a kernel.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota",
}  # fmt: skip
_BITS = {"pred": 8, "bf16": 16}  # other types have their number of bits in their name
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_PARTS = (
    "encoder",
    "decoder",
    "main_network",
    "chunk",
    "dechunk",
    "residual_proj",
    "routing_module",
)


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device moves in one step."""

    kind: str
    """kind of traffic: ``hbm`` or the kind of collective"""
    part: str
    """part of the network, as in `hnet.cost`"""
    num_bytes: float
    count: float
    group: int = 1
    """number of devices that take part"""
    span: int = 1
    """size of the range from the lowest to the highest device number in such a group, inclusive"""


def shape_bytes(shape: str, *, hbm_only: bool = False) -> int:
    """Bytes of an array or of all elements of a tuple; `hbm_only` excludes on-chip buffers."""
    total = 0
    for kind, dims, layout in _SHAPE.findall(shape):
        if hbm_only and re.search(r"S\([1-9]", layout):
            continue
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind) or (int(digits[0]) if digits else 0)
        total += math.prod(int(d.strip("<=")) for d in dims.split(",") if d) * bits // 8
    return total


def part_of(op_name: str) -> str:
    """The part of the network that an operation belongs to, from its named scopes."""
    words = re.split(r"[/()]+", op_name)
    stage = next((w[5:] for w in reversed(words) if re.fullmatch(r"stage\d+", w)), "0")
    for word in reversed(words):
        if word in _PARTS:
            return f"stage{stage}/{word}"
        if word in ("embeddings", "lm_head", "loss", "optimizer"):
            return word
    return "other"


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions of each computation, name of the entry computation)."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*->.*\{$", line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
            rest = found[3]
            shape_end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
            opcode, _, rest = rest.partition("(")
            end = _closing("(" + rest) - 1
            current.append(
                Instruction(found[2], opcode, shape, rest[:end], rest[end + 1 :], bool(found[1]))
            )
    return computations, entry


def _closing(text: str) -> int:
    """Index of the bracket that closes the one at 0."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return i
    return len(text) - 1


def moved(text: str) -> list[Traffic]:
    """All traffic of a compiled step, on one device."""
    computations, entry = parse(text)
    found: list[Traffic] = []
    spread: set[str] = set()
    for run in _runs(computations, _Run(entry)):
        instructions = computations[run.name]
        shapes = {i.name: i.shape for i in instructions}
        parts = _parts(instructions, run.part)
        for one in instructions:
            kind, part = one.opcode.removesuffix("-start"), parts[one.name]
            if kind in COLLECTIVES:
                if "async_collective_fusion_config" in one.attributes:
                    # one collective, repeated in every fusion that it overlaps with
                    channel = re.search(r"channel_id=\d+", one.attributes)[0]
                    if channel in spread:
                        continue
                    spread.add(channel)
                if kind == "all-reduce" and run.name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # each device slices its part and receives no more
                size = run.times * _collective_bytes(one, kind, shapes)
                found.append(Traffic(kind, part, size, run.times, *_group(one.attributes)))
            elif not (run.fused or _moves_nothing(one, computations)):
                size = _traffic(one, shapes, computations)
                found.append(Traffic("hbm", part, run.times * size, run.times))
    return found


def _moves_nothing(one: Instruction, computations: dict[str, list[Instruction]]) -> bool:
    """Whether an instruction does no work, or work that is counted elsewhere."""
    if one.opcode == "async-start":  # the collective is in the computation it calls
        inside = computations.get(one.called("calls"), [])
        return any(i.opcode in COLLECTIVES for i in inside)
    return one.opcode in _NO_TRAFFIC or one.opcode.endswith("-done")


def _parts(instructions: list[Instruction], around: str) -> dict[str, str]:
    """Part of each instruction; one that the compiler added gets the part of its user or operand.

    around: part of the instruction that calls these, for those without any other sign.
    """
    parts = {i.name: part_of(i.op_name) for i in instructions}
    for _ in range(3):  # through a start, its end, and a bitcast
        for i in reversed(instructions):
            for operand in i.operands:
                if parts.get(operand) == "other":
                    parts[operand] = parts[i.name]
    for i in instructions:
        if parts[i.name] == "other":
            near = (parts[o] for o in i.operands if parts.get(o, "other") != "other")
            parts[i.name] = next(near, around)
    return parts


class _Run(NamedTuple):
    """A computation in its place in the running program."""

    name: str
    times: float = 1.0
    fused: bool = False
    """whether it is inside a fusion, which moves only its inputs and outputs"""
    part: str = "other"
    trips: float = 1.0
    """trip count of the innermost enclosing loop"""


def _runs(computations: dict[str, list[Instruction]], run: _Run) -> Iterator[_Run]:
    """This computation and those that it calls, callers first."""
    yield run
    parts = _parts(computations[run.name], run.part)
    for one in computations[run.name]:
        part = parts[one.name]
        if one.opcode == "while":
            condition = computations[one.called("condition")]
            # Run-time length inside a loop over n blocks: causal attention over earlier blocks.
            trips = _trip_count(condition, one) or (run.trips + 1) / 2
            body, times = one.called("body"), run.times * trips
            yield from _runs(computations, _Run(body, times, run.fused, part, trips))
        elif one.opcode == "conditional":
            if "rarely" in one.op_name.split("/"):
                continue
            branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
            names += [one.called(f"{case}_computation") for case in ("true", "false")]
            for branch in filter(None, names):
                yield from _runs(computations, run._replace(name=branch, part=part))
        elif (callee := one.called("calls") or one.called("to_apply")) in computations:
            fused = run.fused or one.opcode not in ("call", "async-start")
            yield from _runs(computations, _Run(callee, run.times, fused, part, run.trips))


def _trip_count(condition: list[Instruction], loop: Instruction) -> int | None:
    """Trip count of a loop that counts from 0; None if it is known at run time only."""
    known = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
    if known:
        return int(known[1])
    root = next(i for i in condition if i.is_root)
    constants = {i.name: i.arguments for i in condition if i.opcode == "constant"}
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    numbers = [constants[o] for o in root.operands if constants.get(o, "").isdecimal()]
    return int(numbers[0]) if numbers else None


def _collective_bytes(one: Instruction, kind: str, shapes: dict[str, str]) -> float:
    """Bytes that one device sends, in a ring over n devices."""
    n, _ = _group(one.attributes)
    size = sum(shape_bytes(shapes.get(o, "")) for o in one.operands) or shape_bytes(one.shape)
    share = (n - 1) / n
    factors = {"all-reduce": 2 * share, "all-gather": n - 1, "reduce-scatter": share,
               "all-to-all": share, "collective-permute": 1}  # fmt: skip
    return size * factors[kind]


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # iota of this shape, with its axes permuted


def _group(attributes: str) -> tuple[int, int]:
    """(number of devices in each group of a collective, range of their numbers)."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return 2, 1 + abs(int(pairs[1]) - int(pairs[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        members = _ints(listed[1])
    elif grid := re.search(rf"replica_groups=\[\d+,(\d+)\]<={_IOTA}", attributes):
        members = _iota(grid[2], grid[3])[: int(grid[1])]
    elif mesh := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        along = re.findall(r"'(\w+)'", mesh[4])
        numbers = np.asarray(_iota(mesh[2] or str(math.prod(sizes.values())), mesh[3]))
        at = tuple(slice(None) if name in along else 0 for name in sizes)
        members = numbers.reshape(*sizes.values())[at].ravel().tolist()
    else:
        raise ValueError(f"devices of a collective in an unknown form: {attributes[:200]}")
    return len(members), 1 + max(members) - min(members)


def _ints(text: str) -> list[int]:
    return [int(digits) for digits in text.split(",")]


def _iota(shape: str, permutation: str | None) -> list[int]:
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return numbers.transpose(_ints(permutation) if permutation else None).ravel().tolist()


def _traffic(one: Instruction, shapes: dict[str, str], computations: dict) -> float:
    """HBM bytes that an instruction reads and writes; for slices only the slice."""
    output = one.shape
    if one.opcode.endswith("-start"):  # prefetch: reads there, writes here
        shown = [f[0] for f in _SHAPE.finditer(output)]
        result = shown[0] if one.opcode == "copy-start" else shown[-2]
        source = shown[1] if one.opcode == "copy-start" else shown[0]
        read = shape_bytes(result) if shape_bytes(source, hbm_only=True) else 0
        return read + shape_bytes(result, hbm_only=True)
    inside = computations.get(one.called("calls") or "", [])
    sliced = _sliced_parameters(inside) if one.opcode == "fusion" else {}
    if one.opcode == "dynamic-slice":
        return 2 * shape_bytes(one.shape, hbm_only=True)
    updates = [i for i in inside if i.opcode == "dynamic-update-slice"]
    total = shape_bytes(output, hbm_only=True)
    for i in updates:  # written in place
        update = next((j.shape for j in inside if j.name == i.operands[1]), "")
        total -= max(0, shape_bytes(i.shape, hbm_only=True) - shape_bytes(update))
    for index, operand in enumerate(one.operands):
        whole = shape_bytes(shapes.get(operand, ""), hbm_only=True)
        total += min(whole, sliced.get(index, whole))
    return max(0, total)


def _sliced_parameters(inside: list[Instruction]) -> dict[int, int]:
    """Bytes that a fusion reads or writes of the parameters of which it uses only slices."""
    parameters = {i.name: int(i.arguments) for i in inside if i.opcode == "parameter"}
    needed: dict[int, int] = {}
    for name, index in parameters.items():
        users = [i for i in inside if name in i.operands]
        slices = [
            i for i in users if i.opcode in ("dynamic-slice", "slice") and i.operands[0] == name
        ]
        replaced = [
            i for i in users if i.opcode == "dynamic-update-slice" and i.operands[0] == name
        ]
        if users and len(slices) + len(replaced) == len(users):
            needed[index] = sum(shape_bytes(i.shape) for i in slices)
    return needed
