"""Along which axis the channels of a value lie: where the convolution or matrix product before it puts its outputs."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

PREFIX = "jaxnorm.surgery:"
STATE = -1
"""In the place of an axis: made of variables alone, as a kernel is."""
AS_BEFORE = {"reduce_window", "reduce_window_max", "reduce_window_sum", "reduce_window_min", "pad", "slice", "rev"}


def marked(x: jax.Array, path: str) -> jax.Array:
    """``x``, to be found again in a traced program."""
    return checkpoint_name(x, f"{PREFIX}{path}")


def channel_axes(jaxpr: Any, variables: int) -> dict[str, int]:
    """By path, the axis of the channels of what was marked; what does not follow from the program is left out.

    ``variables`` counts the arguments, the first ones, that are variables of the model.
    """
    found: dict[str, int] = {}
    _walk(jaxpr, [STATE] * variables + [None] * (len(jaxpr.invars) - variables), found)
    return found


def _walk(jaxpr: Any, given: list[int | None], found: dict[str, int]) -> list[int | None]:
    axes: dict[Any, int | None] = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom):
        return STATE if isinstance(atom, core.Literal) else axes.get(atom)

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "name" and eqn.params["name"].startswith(PREFIX) and operands[0] not in (None, STATE):
            found.setdefault(eqn.params["name"].removeprefix(PREFIX), operands[0])
        inner = [getattr(p, "jaxpr", p) for p in eqn.params.values() if isinstance(p, core.Jaxpr | core.ClosedJaxpr)]
        results: list[int | None] = [None] * len(eqn.outvars)
        for body in inner:
            same = len(body.invars) == len(operands) and eqn.primitive.name not in ("scan", "while")
            known = operands if same else [STATE if axis == STATE else None for axis in operands]
            out = _walk(body, known if len(known) == len(body.invars) else [None] * len(body.invars), found)
            results = out if same and len(out) == len(results) else results
        axes.update(zip(eqn.outvars, results if inner else [_axis(eqn, operands)] * len(results), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _axis(eqn: Any, operands: list[int | None]) -> int | None:
    """Where the channels of the result are."""
    name, shape = eqn.primitive.name, getattr(eqn.outvars[0].aval, "shape", ())
    if all(axis == STATE for axis in operands):
        return STATE
    if name == "conv_general_dilated":
        return eqn.params["dimension_numbers"].out_spec[1] if operands[1] == STATE else None
    if name == "dot_general":
        if STATE not in operands:
            return None
        kernel, (contracted, batch) = operands.index(STATE), eqn.params["dimension_numbers"]
        free = eqn.invars[kernel].aval.ndim - len(contracted[kernel]) - len(batch[kernel])
        return (len(shape) - 1 if kernel else len(batch[0])) if free == 1 else None
    if name == "transpose" and operands[0] is not None:
        return eqn.params["permutation"].index(operands[0])
    places = [(axis, atom.aval.shape) for axis, atom in zip(operands, eqn.invars, strict=True)]
    places = [(axis, own) for axis, own in places if axis not in (None, STATE)]
    known, whole = {axis for axis, _ in places}, all(own == shape for _, own in places)
    return known.pop() if len(known) == 1 and (whole or name in AS_BEFORE) else None
