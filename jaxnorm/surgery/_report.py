"""What is said of norms that were folded, or were not."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxnorm.surgery._chains import Linear, Link, arithmetic, as_linear
from jaxnorm.surgery._program import INPUTS, MOVES, VARIABLES, Program, Step, Value

_REARRANGEMENTS = ("convert_element_type", "transpose", "reshape", "squeeze", "rev", "broadcast_in_dim")
ACTIVATIONS = {"max", "min", "logistic", "tanh", "erf", "erfc", "exp", "clamp", "select_n", "custom_jvp_call"}


class FoldedNorm(NamedTuple):
    """One norm, of the report of `fold`: see its example.

    Attributes:
      path: of its variables, or of its module, or where its source is.
      source: file, line and function.
      into: the layers that it went into; empty if it stayed.
      reason: why it stayed; empty if it did not.
      order: its place in the program.
    """

    path: str
    source: str
    into: tuple[str, ...]
    reason: str
    order: int


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
        return "\n".join(lines) or "no norms found"


def shared(program: Program) -> set[Value]:
    """Variables, rearranged or not, that more than one operation reads as its weights."""
    seen: set[Value] = set()
    twice: set[Value] = set()
    for step in program.steps:
        for value in (
            {base(v) for v in step.inputs if v.depends == VARIABLES} if step.output.depends > VARIABLES else ()
        ):
            (twice if value in seen else seen).add(value)
    return twice


def base(value: Value) -> Value:
    """The variable of which ``value`` is a rearrangement."""
    while value.step is not None and value.step.name in _REARRANGEMENTS:
        value = value.step.inputs[0]
    return value


def path_of(keys: Any) -> tuple[str, ...]:
    """The names on the way to a leaf, without the one that NNX gives to all its variables."""
    names = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
    return tuple(names[:-1] if len(names) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value") else names)


def names(values: Sequence[Value]) -> list[str]:
    """A name for each value: of the variable that it is or is made of."""
    found: list[str] = []
    for value in values:
        path = value.step.params.get("label") if value.step is not None else None
        if path is None:
            path = next(iter(value.leaves)) if len(value.leaves) == 1 else (_run(value.leaves), "constant")
        path = "/".join(path)
        taken = sum(name == path or name.startswith(f"{path}:") for name in found)
        found.append(f"{path}:{taken}" if taken else path)
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
    norms = [group.norm((), _reason(program, group)) for group in _norms(program)]
    for step in program.steps:
        for body in program.bodies(step):
            norms += [norm._replace(reason=f"it is in a {step.name}", order=step.order) for norm in stayed(body)]
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
    return _run(base(weights).leaves) or step.scope or step.source


def _reason(program: Program, group: _Group) -> str:
    """Why neither what comes before nor what comes after could take a norm."""
    uses = program.uses()
    found = arithmetic(group.steps[0])
    assert found is not None
    before, after = _why_not_before(program, found[1], uses), _why_not_after(program, group.steps[-1].output, uses)
    return f"{before}, and {after}"


def _why_not_before(program: Program, value: Value, uses: Any) -> str:
    while True:
        step = value.step
        if step is None:
            return "nothing is before it"
        linear = as_linear(step)
        if linear is not None:
            name = _layer(step, linear.weights)
            if base(linear.weights) in shared(program):
                return f"others use the weights of {name} too"
            return (
                f"others use the output of {name} too" if uses[value] > 1 else f"it differs within a channel of {name}"
            )
        if uses[value] > 1:
            return "others use its input too"
        if step.name not in MOVES and arithmetic(step) is None:
            return f"{_describe(step)} comes before it"
        value = next(v for v in step.inputs if v.depends == INPUTS)


def _why_not_after(program: Program, value: Value, uses: Any) -> str:
    while True:
        if value in program.outputs:
            return "its output is returned"
        readers = [step for step in program.steps if value in step.inputs]
        linears = [linear for linear in map(as_linear, readers) if linear is not None and linear.data is value]
        if len(linears) == len(readers):
            padding = [_layer(linear.step, linear.weights) for linear in linears if linear.pads]
            taken = [_layer(lin.step, lin.weights) for lin in linears if base(lin.weights) in shared(program)]
            if padding:
                return f"{', '.join(padding)} after it pads with zeros"
            return (
                f"others use the weights of {taken[0]} too" if taken else "it differs within a channel of what follows"
            )
        if len(readers) > 1:
            return "several operations use its output"
        if readers[0].name not in MOVES and arithmetic(readers[0]) is None:
            return f"{_describe(readers[0])} comes after it"
        value = readers[0].output


def _describe(step: Step) -> str:
    if step.name in ACTIVATIONS:
        return f"an activation ({step.name})"
    if step.name in ("conv_general_dilated", "dot_general"):
        return f"{step.name} with weights that depend on the inputs"
    return step.name
