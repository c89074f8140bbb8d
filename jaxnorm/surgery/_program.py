"""A traced function as one flat list of steps, of which those that depend on the variables alone run beforehand."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend import core, source_info_util

CUSTOM = {"custom_jvp_call", "custom_vjp_call"}
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"} | CUSTOM
IDENTITIES = {"stop_gradient", "name", "copy", "copy_p", "optimization_barrier"}
ARITHMETIC = {"add", "add_any", "sub", "mul", "div", "neg"}
REARRANGEMENTS = {"convert_element_type", "transpose", "reshape", "squeeze", "rev", "broadcast_in_dim"}
MOVES = {"reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "convert_element_type"}
PLAIN = ARITHMETIC | MOVES | {"rsqrt", "sqrt", "max", "min", "square", "integer_pow"}
STANDARDIZED = "_compiled"
"""The function of ``jaxnorm._engine`` that all norms call."""
NOTHING, VARIABLES, INPUTS = range(3)
"""What a value depends on, at most."""


class Value:
    """An array of the program.

    Attributes:
      aval: its shape and dtype.
      depends: `NOTHING`, `VARIABLES` or `INPUTS`.
      step: what computes it, or None.
      literal: what it is, where that is known.
      leaves: paths of the variables that it depends on.
    """

    def __init__(self, aval, depends=INPUTS, step=None, literal=None, leaves=frozenset()):
        self.aval, self.depends, self.step, self.literal, self.leaves = aval, depends, step, literal, leaves

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of the array."""
        return self.aval.shape

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return self.aval.dtype


class Step:
    """One operation: ``outputs = run(*inputs)``.

    Attributes:
      name: of the primitive.
      params: of the primitive.
      scope: names of the modules that it belongs to, where the framework says them.
      source_info: where it is in the code, as jax has it, or None.
      effects: whether it does something else too.
      order: its place in the program as it was traced; -1 for steps added since.
    """

    def __init__(self, name, inputs, avals, run, *, params=None, scope="", source_info=None, effects=False, order=-1):
        self.name, self.inputs, self.run, self.params = name, list(inputs), run, params or {}
        self.scope, self.source_info, self.effects, self.order = scope, source_info, effects, order
        depends = INPUTS if effects else max((v.depends for v in self.inputs), default=NOTHING)
        leaves = frozenset().union(*(v.leaves for v in self.inputs)) if depends < INPUTS else frozenset()
        self.outputs = [Value(aval, depends, self, None, leaves) for aval in avals]

    @property
    def output(self) -> Value:
        """The only one."""
        return self.outputs[0]

    @cached_property
    def source(self) -> str:
        """File, line and function: of the user, not of the library that the layer is from."""
        if self.source_info is None:
            return ""
        frames = source_info_util.summarize(self.source_info, 100).split("\n")[::-1]
        own = (frame for frame in frames if not frame.startswith(_libraries()))
        return next(own, frames[0])

    @property
    def spreads(self) -> bool:
        """Whether this only repeats its input, so that what it makes is not worth keeping."""
        return self.name == "broadcast_in_dim" and self.inputs[0].aval.size != self.output.aval.size


def _libraries() -> tuple[str, ...]:
    loaded = (sys.modules.get(name) for name in ("flax", "jaxnorm", "haiku", "equinox", "keras"))
    return tuple(f"{Path(module.__file__).parent}/" for module in loaded if module is not None and module.__file__)


class Program:
    """Steps in order, from ``variables`` and ``inputs`` to ``outputs``.

    Attributes:
      steps: those that are needed, as of the last `settle`.
      readers: of each value, how often each step reads it.
      uses: how often each value is read; outputs of the program count.
      weight_uses: how many operations on what depends on the inputs read each variable, rearranged or not.
    """

    def __init__(self, closed: core.ClosedJaxpr, arguments: Sequence[Value]):
        self.variables = [v for v in arguments if v.depends == VARIABLES]
        self.inputs = [v for v in arguments if v.depends == INPUTS]
        self.steps: list[Step] = []
        self.outputs = self._inline(closed.jaxpr, closed.consts, arguments, "", None)
        self.readers: defaultdict[Value, Counter[Step]] = defaultdict(Counter)
        self.uses: Counter[Value] = Counter(self.outputs)
        self.weight_uses: Counter[Value] = Counter()
        self._alive: set[Step] = set()
        self._after: defaultdict[Step, list[Step]] = defaultdict(list)
        for step in self.steps:
            self._add(step)
        self._drop([step for step in self.steps[::-1] if self._is_idle(step)])
        self.settle()

    def __contains__(self, step: Step) -> bool:
        return step in self._alive

    def bodies(self, step: Step) -> list["Program"]:
        """The programs that a loop or a choice runs, one each."""
        if step.name == "scan":
            closed, given = [step.params["jaxpr"]], step.inputs
            # constants, carries, slices: told apart by rank, since newer jax has other names for their numbers
            sliced = sum(v.aval.ndim > a.ndim for v, a in zip(given, closed[0].in_avals, strict=True))
            kept = sum(v.aval.ndim == a.ndim for v, a in zip(step.outputs, closed[0].out_avals, strict=True))
            carried = range(len(given) - sliced - kept, len(given) - sliced)
        elif step.name == "cond":
            carried, closed, given = range(0), step.params["branches"], step.inputs[1:]
        else:
            return []
        depends = [INPUTS if i in carried else v.depends for i, v in enumerate(given)]
        avals = closed[0].in_avals
        arguments = [Value(a, d, leaves=v.leaves) for a, d, v in zip(avals, depends, given, strict=True)]
        return [Program(c, arguments) for c in closed]

    def _inline(
        self, jaxpr: Any, consts: Iterable[Any], arguments: Sequence[Value], scope: str, source_info: Any
    ) -> list[Value]:
        """Append the steps of ``jaxpr`` and of all that it calls; ``source_info`` stands for theirs, if not None."""
        env: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = Value(var.aval, VARIABLES if np.ndim(const) else NOTHING, literal=const)

        def read(atom):
            return Value(atom.aval, NOTHING, literal=atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs, inner = [read(atom) for atom in eqn.invars], f"{scope}/{eqn.source_info.name_stack}".strip("/")
            called = _called(eqn)
            if called is not None:
                jaxpr_called, used = called
                is_shared = eqn.params.get("name") == STANDARDIZED  # traced once for all layers of a shape
                place = source_info or (eqn.source_info if is_shared else None)
                outputs = self._inline(jaxpr_called.jaxpr, jaxpr_called.consts, inputs[used:], inner, place)
            elif eqn.primitive.name in IDENTITIES:
                outputs = inputs
            else:
                outputs = self._append(eqn, inputs, inner, source_info or eqn.source_info)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _append(self, eqn: Any, inputs: list[Value], scope: str, source_info: Any) -> list[Value]:
        step = Step(
            eqn.primitive.name,
            inputs,
            [v.aval for v in eqn.outvars],
            _runner(eqn),
            params=eqn.params,
            scope=scope,
            source_info=source_info,
            effects=bool(eqn.effects),
            order=len(self.steps),
        )
        self.steps.append(step)
        return step.outputs

    def _add(self, step: Step) -> None:
        self._alive.add(step)
        for value in step.inputs:
            self.readers[value][step] += 1
            self.uses[value] += 1
        self.weight_uses.update(_weights(step))

    def _is_idle(self, step: Step) -> bool:
        return step in self._alive and not step.effects and not any(self.uses[v] for v in step.outputs)

    def _drop(self, steps: list[Step]) -> None:
        """Leave out unused steps, and those that only they used."""
        while steps:
            step = steps.pop()
            if not self._is_idle(step):
                continue
            self._alive.remove(step)
            self.weight_uses.subtract(_weights(step))
            for value in step.inputs:
                self.uses[value] -= 1
                self.readers[value].pop(step, None)
                if value.step is not None:
                    steps.append(value.step)

    def replace(self, old: Value, new: Value, after: Step, added: Sequence[Step]) -> None:
        """Insert the steps ``added`` after one, and let all others read ``new`` for ``old``."""
        readers = self.readers.pop(old, Counter())
        for step in added:
            self._add(step)
        self._after[after] += added
        for step, times in readers.items():
            step.inputs = [new if v is old else v for v in step.inputs]
            self.readers[new][step] += times
        self.outputs = [new if v is old else v for v in self.outputs]
        self.uses[new] += self.uses.pop(old, 0)
        if old.step is not None:
            self._drop([old.step])

    def settle(self) -> None:
        """Bring ``steps`` up to date."""
        waiting, steps = self.steps[::-1], list[Step]()
        while waiting:
            step = waiting.pop()
            steps.append(step)
            waiting += self._after.pop(step, [])[::-1]
        self.steps = [step for step in steps if step in self._alive]

    def split(self, late: set[Value]) -> tuple[list[Value], list[Step]]:
        """The values to compute beforehand, but for those to be ``late``; and the steps to run on them."""
        needed, steps = set(self.outputs), []
        for step in reversed(self.steps):
            is_late = step.output.depends != VARIABLES or step.spreads or step.output in late
            if is_late and not needed.isdisjoint(step.outputs):
                needed.update(step.inputs)
                steps.append(step)
        made = {v for step in steps for v in step.outputs}
        order = [*self.variables, *(v for step in self.steps for v in step.outputs)]
        return [v for v in order if v.depends == VARIABLES and v in needed and v not in made], steps[::-1]


def base(value: Value) -> Value:
    """The variable of which ``value`` is a rearrangement."""
    while value.step is not None and value.step.name in REARRANGEMENTS:
        value = value.step.inputs[0]
    return value


def _weights(step: Step) -> set[Value]:
    if step.output.depends <= VARIABLES:
        return set()
    return {base(v) for v in step.inputs if v.depends == VARIABLES}


def evaluate(steps: Sequence[Step], known: dict[Value, Any], wanted: Sequence[Value]) -> list[Any]:
    """Run ``steps`` on what is ``known``."""
    known = dict(known)

    def read(value):
        return known.get(value, value.literal)

    for step in steps:
        with jax.named_scope(step.scope):
            results = step.run(*map(read, step.inputs))
        known.update((v, r) for v, r in zip(step.outputs, results, strict=True) if v not in known)
    return [read(v) for v in wanted]


def _called(eqn: Any) -> tuple[core.ClosedJaxpr, int] | None:
    """The function that ``eqn`` only calls, and how many arguments are not for it."""
    if eqn.primitive.name == "cond" and eqn.params.get("branches_platforms"):
        # What differs by platform stays so, lest it be exported for another; but not plain arithmetic.
        for platforms, branch in zip(eqn.params["branches_platforms"], eqn.params["branches"], strict=True):
            if (platforms is None or jax.default_backend() in platforms) and _is_plain(branch.jaxpr):
                return branch, 1
    if eqn.primitive.name not in CALLS:
        return None
    called = next(p for p in eqn.params.values() if isinstance(p, core.Jaxpr | core.ClosedJaxpr))
    return (called if isinstance(called, core.ClosedJaxpr) else core.ClosedJaxpr(called, ())), 0


def _is_plain(jaxpr: Any) -> bool:
    called = [p for eqn in jaxpr.eqns for p in eqn.params.values() if isinstance(p, core.Jaxpr | core.ClosedJaxpr)]
    plain = all(eqn.primitive.name in CALLS | IDENTITIES | PLAIN for eqn in jaxpr.eqns)
    return plain and all(_is_plain(c.jaxpr if isinstance(c, core.ClosedJaxpr) else c) for c in called)


def _runner(eqn: Any) -> Callable[..., Any]:
    """``eqn`` as a function of all its operands."""

    def run(*operands):
        bound = eqn.primitive.get_bind_params(eqn.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)  # as jax has it after 0.10, and before
        with eqn.ctx.manager:
            results = eqn.primitive.bind(*functions, *operands, **params)
        return results if eqn.primitive.multiple_results else [results]

    return run
