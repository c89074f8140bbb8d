"""What a compiled program moves, launches and communicates, counted from its text.

One counter for all targets. An instruction of the entry computation moves the bytes of its result and of its operands;
loops count by their trips. Of a conditional, the branch that moves the least is counted: one that guards against rare
data does nothing in the usual case. Of an operand that a fusion only slices, were it in a fusion inside, the slices are
read. What the compiler keeps on the chip (a memory space other than zero) moves nothing.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
FREE = {
    "after-all", "bitcast", "constant", "copy-done", "get-tuple-element", "opt-barrier", "parameter", "partition-id",
    "replica-id", "tuple",
}  # fmt: skip
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
"""Calls with which a TPU names memory, and does nothing there."""
SAME_PLACE = {
    "abs", "add", "bitcast", "convert", "copy", "divide", "maximum", "minimum", "multiply", "negate", "select",
    "subtract",
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
BETWEEN_MEMORIES = ("copy-start", "slice-start")
INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One instruction: ``name = shape opcode(operands), attributes``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool


class Module(NamedTuple):
    """The computations of a program by name, and which of them is the entry."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Counts(NamedTuple):
    """What running a computation once costs."""

    bytes: int
    kernels: int
    collectives: Counter


def parse(text: str, *, one_memory: bool = False) -> Module:
    """The module printed by ``compiled.as_text()``.

    With ``one_memory``, as if the chip had one: what it keeps moves as all else does, and nothing is copied there.
    """
    computations, entry, body = {}, "", {}
    for line in re.sub(r"/\*.*?\*/|S\(\d+\)" if one_memory else r"/\*.*?\*/", "", text).splitlines():
        instruction = INSTRUCTION.match(line)
        if instruction:
            root, name, shape, opcode, rest = instruction.groups()
            depth, end = 1, 0
            while depth and end < len(rest):
                depth += (rest[end] == "(") - (rest[end] == ")")
                end += 1
            inside, attributes = rest[: end - 1], rest[end:]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            if one_memory and opcode in BETWEEN_MEMORIES:
                opcode = "bitcast"
            body[name] = Instruction(name, shape, opcode, operands, inside, attributes, bool(root))
        elif computation := COMPUTATION.match(line):
            body = computations[computation[2]] = {}
            entry = computation[2] if computation[1] else entry
    return Module(computations, entry)


def size(shape: str) -> int:
    """Bytes in main memory of an array, or of a tuple of arrays, of that shape."""
    total = 0
    for kind, dimensions, layout in ARRAY.findall(shape):
        if re.search(r"S\([1-9]", layout):
            continue
        bits = BITS[kind] if kind in BITS else int(re.search(r"\d+", kind)[0])
        total += math.prod(int(d.lstrip("<=")) for d in dimensions.split(",") if d) * bits // 8
    return total


def elements(shape: str) -> int:
    """How many numbers an array holds."""
    return math.prod(int(d.lstrip("<=")) for d in ARRAY.match(shape)[2].split(",") if d)


def called(instruction: Instruction) -> str:
    """The computation that an instruction runs."""
    return re.search(r"(?:calls|to_apply|body)=%?([\w.\-]+)", instruction.attributes)[1]


def branches(conditional: Instruction) -> list[str]:
    """The computations of which a conditional runs one."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", conditional.attributes)


def _read(body: dict[str, Instruction], name: str) -> float:
    """The share of an operand of a fusion that is read: of what is only sliced, or only written into, the slices."""
    total = 0.0
    for user in (i for i in body.values() if name in i.operands):
        if user.opcode in ("slice", "dynamic-slice") and user.operands[0] == name:
            total += elements(user.shape) / elements(body[name].shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode in SAME_PLACE and not user.is_root:
            total += _read(body, user.name)
        else:
            return 1.0
    return min(total, 1.0)


def _written(body: dict[str, Instruction], name: str) -> int:
    """Bytes that an instruction at the end of a fusion writes: of an update, the part updated."""
    instruction = body[name]
    if instruction.opcode == "tuple":
        return sum(_written(body, operand) for operand in instruction.operands)
    if instruction.opcode == "bitcast":
        return min(_written(body, instruction.operands[0]), size(instruction.shape))
    if instruction.opcode == "dynamic-update-slice":
        return size(body[instruction.operands[1]].shape)
    return size(instruction.shape)


def _inlined(module: Module, computation: str) -> dict[str, Instruction]:
    """The instructions of a fusion, those of fusions inside, which are no kernels, in their places."""
    body = {}
    for i in module.computations[computation].values():
        inside = _inlined(module, called(i)) if i.opcode == "fusion" else {}
        names = {j.name: i.name if j.is_root else f"{i.name}/{j.name}" for j in inside.values()}
        for j in inside.values():
            operands = tuple(names[o] for o in j.operands)
            if j.opcode == "parameter":
                j = j._replace(opcode="bitcast")
                operands = (i.operands[int(j.literal)],)
            is_root = j.is_root and i.is_root
            body[names[j.name]] = j._replace(name=names[j.name], operands=operands, is_root=is_root)
        if not inside:
            body[i.name] = i
    return body


def _fusion(module: Module, outer: dict[str, Instruction], fusion: Instruction) -> int:
    body = _inlined(module, called(fusion))
    arguments = {int(i.literal): i.name for i in body.values() if i.opcode == "parameter"}
    read = sum(int(_read(body, arguments[n]) * size(outer[o].shape)) for n, o in enumerate(fusion.operands))
    root = next(i.name for i in body.values() if i.is_root)
    return read + min(_written(body, root), size(fusion.shape))


def _trips(module: Module, outer: dict[str, Instruction], loop: Instruction) -> int:
    """How often a loop runs: what XLA says, or else the number with which its counter, zero at first, is compared.

    It counts by one, as `jax.lax.scan` does.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
    end = next(i for i in condition.values() if i.is_root)
    if end.opcode == "compare" and "direction=LT" in end.attributes:
        counter, limit = (condition[name] for name in end.operands)
        if counter.opcode == "get-tuple-element" and limit.opcode == "constant":
            place = int(re.search(r"index=(\d+)", counter.attributes)[1])
            start = outer[outer[loop.operands[0]].operands[place]]
            while start.opcode in ("bitcast", "copy"):
                start = outer[start.operands[0]]
            if (start.opcode, start.literal) == ("constant", "0"):
                return int(limit.literal)
    raise ValueError(f"how often %{loop.name} runs is not known: not until a counter reaches a constant")


def count(module: Module, computation: str | None = None) -> Counts:
    """Bytes moved, kernels launched and collectives called by a computation, by default the entry."""
    body = module.computations[computation or module.entry]
    total = Counts(0, 0, Counter())
    for i in body.values():
        times, inner = 1, None
        if i.opcode in FREE or i.opcode.endswith("-done") or i.opcode.endswith("-update"):
            continue
        if i.opcode == "custom-call" and any(f'"{name}"' in i.attributes for name in FREE_CALLS):
            continue
        if i.opcode in ("call", "while", "async-start"):
            times, inner = _trips(module, body, i) if i.opcode == "while" else 1, count(module, called(i))
        elif i.opcode == "conditional":
            inner = min((count(module, branch) for branch in branches(i)), key=lambda c: (c.bytes, c.kernels))
        else:
            if i.opcode == "fusion":
                moved = _fusion(module, body, i)
            elif i.opcode in ("slice", "dynamic-slice"):
                moved = 2 * size(i.shape)
            elif i.opcode == "dynamic-update-slice":
                moved = 2 * size(body[i.operands[1]].shape)
            elif i.opcode in BETWEEN_MEMORIES:  # (to, from, ...) and ((from), to, ...)
                to = ARRAY.findall(i.shape)[0 if i.opcode == "copy-start" else 1]
                whole = ARRAY.match(body[i.operands[0]].shape)
                share = elements(f"{to[0]}[{to[1]}]") / elements(whole[0])
                moved = size(f"{to[0]}[{to[1]}]{to[2]}") + int(share * size(whole[0]))
            else:
                # the result of a "-start" repeats its operands
                result = size(i.shape) if not i.opcode.endswith("-start") else size(body[i.operands[0]].shape)
                moved = result + sum(size(body[o].shape) for o in i.operands)
            kind = i.opcode.removesuffix("-start")
            inner = Counts(moved, 1, Counter([kind] if kind in COLLECTIVES else []))
        collectives = Counter({kind: times * n for kind, n in inner.collectives.items()})
        total = Counts(
            total.bytes + times * inner.bytes, total.kernels + times * inner.kernels, total.collectives + collectives
        )
    return total
