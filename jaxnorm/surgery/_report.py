"""The report of norms that were folded, and of those that stayed."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxnorm.surgery._chains import Linear, Link, arithmetic, as_linear
from jaxnorm.surgery._program import INPUTS, MOVES, VARIABLES, Program, Step, Value, base

ACTIVATIONS = {"max", "min", "logistic", "tanh", "erf", "erfc", "exp", "clamp", "select_n", "custom_jvp_call"}


class FoldedNorm(NamedTuple):
    """One norm, of the report of `fold`: see its example.

    Attributes:
      path: of its variables, or of its module, or where its source is.
      source: file, line and function.
      into: the layers that it went into; empty if it stayed.
      reason: why it stayed; empty if it did not.
      order: its place in the program.
      remedy: what would let it be folded; empty if it was.
    """

    path: str
    source: str
    into: tuple[str, ...]
    reason: str
    order: int
    remedy: str = ""


class Report(NamedTuple):
    """All norms of a program, in order; ``print`` shows one a line, as in the example of `fold`.

    Attributes:
      norms: a `FoldedNorm` each.
      folded: those that are gone.
      stayed: those that are still there.
    """

    norms: tuple[FoldedNorm, ...]

    @property
    def folded(self) -> tuple[FoldedNorm, ...]:
        """Those that are gone."""
        return tuple(n for n in self.norms if n.into)

    @property
    def stayed(self) -> tuple[FoldedNorm, ...]:
        """Those that are still there."""
        return tuple(n for n in self.norms if not n.into)

    def __str__(self) -> str:
        width = max((len(n.path) for n in self.norms), default=0)
        rows = [f"folded into {', '.join(n.into)}" if n.into else f"stayed: {n.reason}" for n in self.norms]
        lines = [f"{n.path:{width}}  {row}" for n, row in zip(self.norms, rows, strict=True)]
        remedies = dict.fromkeys(n.remedy for n in self.norms if n.remedy)
        return "\n".join([*lines, *(f"To fold more: {remedy}." for remedy in remedies)]) or "no norms found"


def is_shared(program: Program, weights: Value) -> bool:
    """Whether more than one operation reads a variable, rearranged or not, as its weights."""
    return program.weight_uses[base(weights)] > 1


def path_of(keys: Any) -> tuple[str, ...]:
    """The names on the way to a leaf, without the one that NNX gives to all its variables."""
    names = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
    return tuple(names[:-1] if len(names) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value") else names)


def names(values: Sequence[Value]) -> list[str]:
    """A name for each value: of the variable that it is or is made of."""
    found: list[str] = []
    taken: Counter[str] = Counter()
    for value in values:
        path = value.step.params.get("label") if value.step is not None else None
        if path is None:
            path = next(iter(value.leaves)) if len(value.leaves) == 1 else (_run(value.leaves), "constant")
        path = "/".join(path)
        found.append(f"{path}:{taken[path]}" if taken[path] else path)
        taken[path] += 1
    return found


def label(linear: Linear, what: str) -> tuple[str, ...]:
    """What to call the folded weights of ``linear``, or its shift."""
    own = base(linear.weights).leaves
    if len(own) != 1:
        return (_run(own) or linear.step.scope, what)
    (path,) = own
    return path if what == "kernel" else (*path[:-1], what)


def folded(links: Sequence[Link], into: Sequence[Linear]) -> list[FoldedNorm]:
    """The norms in a chain that went into linear operations."""
    grouped = _Groups()
    for link in links:
        grouped.add(link.step, link.kind, link.constant, grouped.latest)
    layers = tuple(_layer(linear.step, linear.weights) for linear in into)
    return [group.norm(layers, "") for group in grouped.norms()]


def stayed(program: Program) -> list[FoldedNorm]:
    """The norms that are still in ``program``, and why."""
    norms = []
    for group in _norms(program):
        reason, remedy = _reason(program, group)
        norms.append(group.norm((), reason)._replace(remedy=remedy))
    for step in program.steps:
        for body in program.bodies(step):
            why = {"reason": f"it is in a {_describe(step)}", "order": step.order, "remedy": _UNROLL}
            norms += [norm._replace(**why) for norm in stayed(body)]
    return norms


def _norms(program: Program) -> list["_Group"]:
    grouped = _Groups()
    for step in program.steps:
        found = arithmetic(step)
        if found is None or step.order < 0 or found[2] is None:
            continue
        kind, value, constant = found
        before = value.step
        while before is not None and before not in grouped.of and (before.name in MOVES or arithmetic(before)):
            data = [v for v in before.inputs if v.depends == INPUTS]
            before = data[0].step if data else None
        grouped.add(step, kind, constant, grouped.of.get(before))
    return grouped.norms()


class _Group:
    """Steps of one norm."""

    def __init__(self):
        self.steps: list[Step] = []
        self.leaves: set[tuple[str, ...]] = set()
        self.scales = False

    def norm(self, into: tuple[str, ...], reason: str) -> FoldedNorm:
        first = self.steps[0]
        path = _run(self.leaves) or first.scope or first.source
        return FoldedNorm(path, first.source, into, reason, first.order)


class _Groups:
    """Steps, grouped by the modules that their variables belong to: those one level up."""

    def __init__(self):
        self.all: list[_Group] = []
        self.of: dict[Step | None, _Group] = {}
        self.latest: _Group | None = None

    def add(self, step: Step, kind: str, constant: Value | None, group: _Group | None) -> None:
        leaves = constant.leaves if constant is not None else frozenset()
        apart = group is not None and leaves and group.leaves and not _parents(leaves) & _parents(group.leaves)
        if group is None or (apart and not (step.scope and step.scope == group.steps[0].scope)):
            group = _Group()
            self.all.append(group)
        group.steps.append(step)
        group.leaves |= leaves
        group.scales |= kind in ("mul", "div") and constant is not None and constant.depends == VARIABLES
        self.of[step] = self.latest = group

    def norms(self) -> list[_Group]:
        return [group for group in self.all if group.scales]


def _parents(leaves: Any) -> set[tuple[str, ...]]:
    return {path[:-1] for path in leaves}


def _run(leaves: Any) -> str:
    """The longest run of names that the paths of the modules of ``leaves`` have in common."""
    first, *rest = sorted(path[:-1] or path for path in leaves) or [()]
    runs = [first[i:j] for i in range(len(first)) for j in range(len(first), i, -1)]
    common = [run for run in runs if all(_contains(path, run) for path in rest)]
    longest = max(common or [first, *rest], key=len)
    return "/".join(longest[1:] if longest[0:1] in (("params",), ("batch_stats",)) and len(longest) > 1 else longest)


def _contains(path: tuple[str, ...], run: tuple[str, ...]) -> bool:
    return any(path[i : i + len(run)] == run for i in range(len(path) - len(run) + 1))


def _layer(step: Step, weights: Value) -> str:
    made = base(weights).step
    leaves = base(weights).leaves if made is None or "label" not in made.params else {made.params["label"]}
    return _run(leaves) or step.scope or step.source


_PADS, _SHARED = "pads with zeros", "others use the weights of"
_UNROLL = "in the function that is folded, call the layers one after another instead of in a loop or a choice"
_NEIGHBOURS = "norms go into a linear layer directly before them, or into those directly after them that do not pad"


def _reason(program: Program, group: _Group) -> tuple[str, str]:
    """Why neither what comes before nor what comes after could take a norm, and what would let one of them."""
    uses = program.uses
    found = arithmetic(group.steps[0])
    assert found is not None
    before = _why_not_before(program, found[1], uses, group)
    after = _why_not_after(program, group.steps[-1].output, uses)
    remedy = _NEIGHBOURS
    if _PADS in after:
        remedy = "pad before the norm and let the layer after it not pad, or normalize after that layer"
    elif _SHARED in before + after:
        remedy = "give layers that share weights their own"
    return f"{before}, and {after}", remedy


def _why_not_before(program: Program, value: Value, uses: Any, group: _Group) -> str:
    while True:
        step = value.step
        if step is None:
            return "nothing is before it"
        linear = as_linear(step)
        if linear is not None:
            name = _layer(step, linear.weights)
            if is_shared(program, linear.weights):
                return f"{_SHARED} {name} too"
            if uses[value] > 1:
                return f"the output of {name} is used by {_others(program, value, group)} too"
            return f"it differs within a channel of {name}"
        if uses[value] > 1:
            return f"its input is used by {_others(program, value, group)} too"
        if step.name not in MOVES and arithmetic(step) is None:
            return f"{_describe(step)} comes before it"
        value = next(v for v in step.inputs if v.depends == INPUTS)


def _why_not_after(program: Program, value: Value, uses: Any) -> str:
    while True:
        if value in program.outputs:
            return "its output is returned"
        readers = list(program.readers[value])
        linears = [linear for linear in map(as_linear, readers) if linear is not None and linear.data is value]
        if len(linears) == len(readers):
            padding = [_layer(linear.step, linear.weights) for linear in linears if linear.pads]
            taken = [_layer(lin.step, lin.weights) for lin in linears if is_shared(program, lin.weights)]
            if padding:
                return f"{', '.join(padding)} after it {_PADS}"
            return f"{_SHARED} {taken[0]} too" if taken else "it differs within a channel of what follows"
        if len(readers) > 1:
            return f"several operations use its output: {', '.join(map(_describe, readers))}"
        if readers[0].name not in MOVES and arithmetic(readers[0]) is None:
            return f"{_describe(readers[0])} comes after it"
        value = readers[0].output


def _others(program: Program, value: Value, group: _Group) -> str:
    """The operations that read a value, but those of the norm; or the caller, to whom the program returns it."""
    readers = [_describe(step) for step in program.readers[value] if step not in group.steps]
    return " and ".join(dict.fromkeys(readers)) or "the caller"


def _describe(step: Step) -> str:
    """An operation, and where it is in the user's code."""
    name, found = step.name, arithmetic(step)
    if found is not None and found[2] is not None and found[2].leaves:
        name = _run(found[2].leaves)
    elif name in ACTIVATIONS:
        name = f"an activation ({name})"
    elif name in ("conv_general_dilated", "dot_general"):
        linear = as_linear(step)
        name = _layer(step, linear.weights) if linear else f"{name} with weights that depend on the inputs"
    place = re.match(r".*?([^/:]+:\d+)", step.source)
    return f"{name} at {place[1]}" if place else name
