"""Fold what scales and shifts channels into the linear operations beside it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.surgery import _report
from jaxnorm.surgery._chains import (
    Dims,
    Linear,
    Link,
    as_linear,
    compose,
    count_variable,
    is_norm,
    last_link,
    next_link,
    shifts,
    spread_out,
)
from jaxnorm.surgery._program import INPUTS, MOVES, VARIABLES, Program, Step, Value, evaluate
from jaxnorm.surgery._report import FoldedNorm, Report


class Folded(NamedTuple):
    """An inference program without the norms that could be folded, as `fold` makes it: see its example.

    Attributes:
      variables: a dictionary of arrays: the variables that are left, the folded ones among them, by path.
      apply: ``apply(variables, *inputs)``, to be jitted, exported, or called with other batch sizes.
      report: every norm: what it went into, or why it stayed.
    """

    variables: dict[str, jax.Array]
    apply: Callable[..., Any]
    report: Report


def fold(apply: Callable[..., Any], variables: Any, *inputs: Any) -> Folded:
    r"""Merge the norms of an inference program into the convolutions and matrix products beside them.

    .. math:: \gamma \, \frac{(w * x) - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta = (a w) * x + b \qquad
       a = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \quad b = \beta - a \mu

    ``apply`` is traced. Whatever scales and shifts each channel by values that depend on the variables alone is folded
    into the linear operation before it, or, where it does not pad, those after it. Weights are computed in float32 at
    least, and keep their dtype.

    Args:
      apply: the inference call, a pure function of ``variables`` and ``inputs``, from any framework.
      variables: pytree of arrays.
      *inputs: pytrees of arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      `Folded`: variables, the function of them, and a report.

    Raises:
      TypeError: a variable or an input that is no array.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm import surgery
      >>> variables = {"dense": {"kernel": jnp.array([[2.0]])}, "scale": jnp.array([[3.0]])}
      >>> def apply(v, x):
      ...     return (x @ v["dense"]["kernel"]) * v["scale"]
      >>> folded = surgery.fold(apply, variables, jnp.ones((1, 1)))
      >>> folded.variables
      {'dense/kernel': Array([[6.]], dtype=float32)}
      >>> print(folded.report)
      scale  folded into dense

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
      CVPR 2018, section 3.2.
    """
    paths, leaves = _flatten(variables)
    structs = jax.tree.structure(variables), [_struct("variables", leaf) for leaf in leaves]
    given = jax.tree.map(partial(_struct, "inputs"), inputs)
    plan = _Plan(apply, structs, paths, given)
    plans = {_signature(inputs): plan}
    _make_independent_of_batch(plan, lambda inputs: _Plan(apply, structs, paths, inputs), given)

    def folded_apply(variables, *inputs):
        key = _signature(inputs)
        if key not in plans:
            new = _Plan(apply, structs, paths, jax.tree.map(partial(_struct, "inputs"), inputs))
            for names in plan.later:
                new.leave_out(names)
            _agree(new.differ, plan, [new])
            if new.structs != plan.structs:
                raise ValueError("fold: the program for inputs of these shapes has other variables; fold for them too.")
            plans[key] = new
        return plans[key].run(variables, inputs)

    return Folded(plan.prepare(leaves), folded_apply, plan.report)


class _Plan:
    """The folded program for inputs of certain shapes."""

    def __init__(self, apply: Callable[..., Any], variables: Any, paths: Sequence[tuple[str, ...]], inputs: Any):
        tree, structs = variables
        closed, out = jax.make_jaxpr(apply, return_shape=True)(jax.tree.unflatten(tree, structs), *inputs)
        self.tree = jax.tree.structure(out)
        kinds = [(VARIABLES, frozenset({path})) for path in paths]
        kinds += [(INPUTS, frozenset())] * (len(closed.in_avals) - len(paths))
        arguments = [Value(a, d, leaves=ls) for a, (d, ls) in zip(closed.in_avals, kinds, strict=True)]
        self.program = Program(closed, arguments)
        self.report = _fold_program(self.program)
        self.later: list[set[str]] = []
        self._late: set[Value] = set()
        self.leave_out(set())

    def leave_out(self, names: set[str]) -> None:
        """Compute these of the values that were computed beforehand with the rest."""
        if names:
            self.later.append(names)
            self._late |= {v for name, v in zip(self.names, self.early, strict=True) if name in names}
        self.early, self.late = self.program.split(self._late)
        self.names = _report.names(self.early)
        self.structs = {name: (v.shape, v.dtype) for name, v in zip(self.names, self.early, strict=True)}

    def differ(self, other: "_Plan") -> set[str]:
        """The variables that have another shape in a program for other inputs."""
        same = set(self.names) == set(other.names)
        return {name for name in self.names if self.structs[name] != other.structs[name]} if same else set()

    def prepare(self, leaves: Sequence[Any]) -> dict[str, jax.Array]:
        """The variables of the folded program."""
        known = dict(zip(self.program.variables, leaves, strict=True))
        made = [v for v in self.early if v not in known]
        steps = [step for step in self.program.steps if step.output.depends <= VARIABLES]

        @jax.jit
        def compute(leaves):
            return evaluate(steps, dict(zip(self.program.variables, leaves, strict=True)), made)

        known.update(zip(made, compute(leaves), strict=True))
        return {name: jnp.asarray(known[v]) for name, v in zip(self.names, self.early, strict=True)}

    def run(self, variables: dict[str, Any], inputs: Any) -> Any:
        """The outputs."""
        if not isinstance(variables, dict) or set(variables) != set(self.names):
            raise ValueError(f"fold: variables must be those of the folded program, {', '.join(self.names)}.")
        known = {v: variables[name] for name, v in zip(self.names, self.early, strict=True)}
        known |= dict(zip(self.program.inputs, jax.tree.leaves(inputs), strict=True))
        return jax.tree.unflatten(self.tree, evaluate(self.late, known, self.program.outputs))


def _make_independent_of_batch(plan: _Plan, make: Callable[[Any], _Plan], inputs: Any) -> None:
    """Compute with the rest what is made of variables in the size of the batch, as a bias that is broadcast to it.

    What that is shows a program for another size, where there is one.
    """
    leaves, tree = jax.tree.flatten(inputs)
    sizes = {leaf.shape[0] for leaf in leaves if leaf.shape}
    made = [v for v in plan.early if v.step is not None and v.step.name != "folded"]
    if len(sizes) != 1 or not any(sizes & set(v.shape) for v in made):
        return
    (size,) = sizes
    shapes = [(size + 1, *leaf.shape[1:]) if leaf.shape else () for leaf in leaves]
    others = [jax.ShapeDtypeStruct(shape, leaf.dtype) for shape, leaf in zip(shapes, leaves, strict=True)]
    try:
        other = make(tree.unflatten(others))
    except Exception:  # a model for batches of one size
        return
    _agree(plan.differ, other, [plan, other])


def _agree(differ: Callable[[_Plan], set[str]], other: _Plan, plans: Sequence[_Plan]) -> None:
    """Let ``plans`` leave out what differs, as long as that changes something."""
    before = None
    while (names := differ(other)) and before != (before := [plan.early for plan in plans]):
        for plan in plans:
            plan.leave_out(names)


def _flatten(variables: Any) -> tuple[list[tuple[str, ...]], list[Any]]:
    found = jax.tree_util.tree_flatten_with_path(variables)[0]
    return [_report.path_of(keys) for keys, _ in found], [leaf for _, leaf in found]


def _struct(what: str, leaf: Any) -> jax.ShapeDtypeStruct:
    try:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    except AttributeError:
        if isinstance(leaf, int | float | complex):
            return jax.eval_shape(lambda: jnp.asarray(leaf))
        raise TypeError(f"fold: {what} must hold arrays only; got {type(leaf).__name__} {leaf!r:.60}.") from None


def _signature(inputs: Any) -> Any:
    leaves, tree = jax.tree.flatten(inputs)
    return tree, tuple((s.shape, s.dtype) for s in (_struct("inputs", leaf) for leaf in leaves))


def _fold_program(program: Program) -> Report:
    """Rewrite ``program``: first into what comes before, then into what comes after, then what that left to merge."""
    found: list[FoldedNorm] = []
    for attempt in (_fold_forward, _fold_backward, _fold_forward):
        for step in program.steps:
            linear = as_linear(step) if step in program else None
            if linear is not None:
                found += attempt(program, linear)
        program.settle()
    return Report(tuple(sorted(found + _report.stayed(program), key=lambda norm: norm.order)))


def _fold_forward(program: Program, linear: Linear) -> list[FoldedNorm]:
    """Fold the chain after ``linear`` into it."""
    if _report.is_shared(program, linear.weights):
        return []
    value, dims = linear.step.output, linear.out_dims
    links: list[Link] = []
    ends: tuple[int, Dims] = (0, dims)
    while (reader := _only_reader(program, value)) and (found := next_link(reader, value, dims)):
        link, dims = found
        links.append(link)
        value = link.step.output
        if link.kind != "move":
            ends = len(links), dims
    links, dims = links[: ends[0]], ends[1]
    if not is_norm(links) and count_variable(links) < 2:
        return []
    last = links[-1].step
    weights = _folded_weights(linear, links, after=True)
    product = _relinear(linear, linear.data, weights)
    moved = _replay(product.output, links, last.output.dtype)
    shifted = _shifted(linear, links, dims, moved[-1].output if moved else product.output, after=True)
    steps = [weights, product, *moved, *shifted]
    program.replace(last.output, steps[-1].output, last, steps)
    return _report.folded(links, [linear])


def _fold_backward(program: Program, linear: Linear) -> list[FoldedNorm]:
    """Fold the chain before ``linear`` into it and into everything that reads the end of the chain."""
    end = _strip_moves(program, linear)
    group = _readers_through_moves(program, end)
    if program.uses[end] != len(group):
        return []
    chains = [_chain_before(program, other, end) for other in group]
    for other, (links, _) in zip(group, chains, strict=True):
        arithmetic = [link for link in links if link.kind != "move"]
        if not is_norm(arithmetic) or (other.pads and shifts(links)) or _report.is_shared(program, other.weights):
            return []
        if len(arithmetic) != sum(link.kind != "move" for link in chains[0][0]):
            return []
    for other, (links, root) in zip(group, chains, strict=True):
        weights = _folded_weights(other, links, after=False)
        moved = _replay(root, links, other.data.dtype)
        product = _relinear(other, moved[-1].output if moved else root, weights)
        shifted = _shifted(other, links, other.out_dims, product.output, after=False)
        steps = [weights, *moved, product, *shifted]
        program.replace(other.step.output, steps[-1].output, other.step, steps)
    return _report.folded(chains[0][0], group)


def _only_reader(program: Program, value: Value) -> Step | None:
    return next(iter(program.readers[value]), None) if program.uses[value] == 1 else None


def _readers_through_moves(program: Program, end: Value) -> list[Linear]:
    """The linear operations whose data is ``end``, moved or not."""
    group: list[Linear] = []
    for reader in program.readers[end]:
        step: Step | None = reader
        while step is not None and as_linear(step) is None:
            step = _only_reader(program, step.output) if step.name in MOVES else None
        linear = as_linear(step) if step is not None else None
        if linear is not None and _strip_moves(program, linear) is end:
            group.append(linear)
    return group


def _strip_moves(program: Program, linear: Linear) -> Value:
    """The data of ``linear``, before what only moves it there."""
    uses, value, dims = program.uses, linear.data, linear.in_dims
    while uses[value] == 1 and (found := last_link(value, dims)) and found[0].kind == "move":
        _, value, dims = found
    return value


def _chain_before(program: Program, linear: Linear, end: Value) -> tuple[list[Link], Value]:
    """The chain before ``linear``, from its first arithmetic on, and what it starts from."""
    uses, value, dims = program.uses, linear.data, linear.in_dims
    links: list[Link] = []
    best: tuple[int, Value] = (0, value)
    while (value is end or uses[value] == 1) and (found := last_link(value, dims)):
        link, value, dims = found
        links.append(link)
        if link.kind != "move":
            best = len(links), value
    return links[: best[0]][::-1], best[1]


def _accumulator(values: Sequence[Value]) -> Any:
    return jnp.result_type(jnp.float32, *(v.dtype for v in values))


def _constants(links: Sequence[Link]) -> list[Value]:
    return [link.constant for link in links if link.constant is not None]


def _made(inputs: Sequence[Value], aval: Any, run: Callable[..., jax.Array], label: tuple[str, ...]) -> Step:
    """A step that computes one constant from others."""
    return Step("folded", inputs, [aval], lambda *args: [run(*args)], params={"label": label})


def _folded_weights(linear: Linear, links: Sequence[Link], after: bool) -> Step:
    """The kernel, multiplied by the factor of a chain."""
    wide, dtype = linear.weights, linear.weights.dtype
    while wide.step is not None and wide.step.name == "convert_element_type":
        wide = wide.step.inputs[0]
    constants = _constants(links)
    accumulator = _accumulator([wide, *constants])

    def run(kernel, *constants):
        a, _ = compose(links, constants, kernel.ndim, accumulator)
        return (kernel.astype(accumulator) * (a if after else linear.spread_groups(a))).astype(dtype)

    return _made([wide, *constants], linear.weights.aval, run, _report.label(linear, "kernel"))


def _relinear(linear: Linear, data: Value, weights: Step) -> Step:
    """``linear`` with other operands."""
    old, inputs = linear.step, [data, data]
    inputs[linear.kernel] = weights.output
    return Step(
        old.name, inputs, [old.output.aval], old.run, params=old.params, scope=old.scope, source_info=old.source_info
    )


def _replay(value: Value, links: Sequence[Link], dtype: Any) -> list[Step]:
    """The moves of a chain, without its arithmetic."""
    steps: list[Step] = []
    for link in links:
        old = link.step
        if link.kind == "move" and old.name != "convert_element_type":
            aval = old.output.aval.update(dtype=value.dtype)
            steps.append(Step(old.name, [value, *old.inputs[1:]], [aval], old.run, params=old.params))
            value = steps[-1].output
    if value.dtype != dtype:
        aval = value.aval.update(dtype=dtype)
        steps.append(Step("convert_element_type", [value], [aval], lambda x: [lax.convert_element_type(x, dtype)]))
    return steps


def _shifted(linear: Linear, links: Sequence[Link], dims: Dims, value: Value, after: bool) -> list[Step]:
    """The steps that add the shift of a chain to ``value``, if it has one."""
    if not shifts(links):
        return []
    constants = _constants(links)
    inputs = constants if after else [linear.weights, *constants]
    accumulator, rank = _accumulator(inputs), len(linear.weights.shape)
    shape = tuple(1 if dim is None else linear.weights.shape[dim] for dim in dims)

    def run(*args):
        _, b = compose(links, args if after else args[1:], rank, accumulator)
        if not after:
            summed = tuple(a for a in range(rank) if a not in linear.out_dims)
            b = jnp.sum(args[0].astype(accumulator) * linear.spread_groups(b), summed, keepdims=True)
        return jnp.broadcast_to(spread_out(b, dims), shape).astype(value.dtype)

    aval = linear.weights.aval.update(shape=shape, dtype=value.dtype)
    made = _made(inputs, aval, run, _report.label(linear, "shift"))
    return [made, Step("add", [value, made.output], [value.aval], lambda x, b: [x + b])]
