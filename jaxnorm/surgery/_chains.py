"""What linear operations have for weights, and what chains of operations do to each channel: a factor and a shift.

Arrays are said to be *laid out* by a kernel if each of their axes is the axis of the kernel with that index or has size
one; so a factor of every output channel multiplies the kernel unchanged. ``dims`` says which axis of a kernel each axis
of a value in the program runs along, or None.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm.surgery._program import ARITHMETIC, INPUTS, MOVES, VARIABLES, Step, Value

Dims = tuple[int | None, ...]


class Linear(NamedTuple):
    """A convolution or matrix product with weights that depend on the variables alone.

    Attributes:
      step: which it is.
      data: the operand that is not the kernel.
      kernel: its index among the operands.
      out_dims: of the output.
      in_dims: of the data.
      groups: of channels; the kernel's axis of input channels has those of one group.
      pads: whether zeros may be summed along with the data.
    """

    step: Step
    data: Value
    kernel: int
    out_dims: Dims
    in_dims: Dims
    groups: int
    pads: bool

    @property
    def weights(self) -> Value:
        """The kernel."""
        return self.step.inputs[self.kernel]

    def spread_groups(self, a: Any) -> Any:
        """What belongs to each input channel, laid out by the kernel with its groups, along the output channels."""
        if self.groups == 1:
            return a
        out, inner = self.step.params["dimension_numbers"].rhs_spec[:2]
        shape = self.weights.shape
        rows = jnp.repeat(a.reshape(self.groups, -1), shape[out] // self.groups, axis=0)
        rows = rows if out < inner else rows.T
        return rows.reshape([n if i in (out, inner) else 1 for i, n in enumerate(shape)])


def as_linear(step: Step) -> Linear | None:
    """``step`` as a linear operation on what depends on the inputs, if it is one."""
    depends = [v.depends for v in step.inputs]
    if step.name == "conv_general_dilated" and depends == [INPUTS, VARIABLES] and step.params["batch_group_count"] == 1:
        numbers = step.params["dimension_numbers"]
        (out_kernel, in_kernel), rank = numbers.rhs_spec[:2], len(numbers.rhs_spec)
        out_dims = tuple(out_kernel if a == numbers.out_spec[1] else None for a in range(rank))
        in_dims = tuple(in_kernel if a == numbers.lhs_spec[1] else None for a in range(rank))
        pads = any(p != 0 for pair in step.params["padding"] for p in pair)
        pads = pads or any(d != 1 for d in step.params["lhs_dilation"])
        return Linear(step, step.inputs[0], 1, out_dims, in_dims, step.params["feature_group_count"], pads)
    if step.name == "dot_general" and sorted(depends) == [VARIABLES, INPUTS]:
        kernel = depends.index(VARIABLES)
        contracted, batch = step.params["dimension_numbers"]
        ranks = [len(v.shape) for v in step.inputs]
        free = [[a for a in range(ranks[i]) if a not in (*contracted[i], *batch[i])] for i in (0, 1)]
        out_dims = (*batch[kernel], *((None,) * len(free[0]) if kernel else free[0]))
        out_dims += tuple(free[1]) if kernel else (None,) * len(free[1])
        met = [(*contracted[i], *batch[i]) for i in (1 - kernel, kernel)]
        of_data = dict(zip(*met, strict=True))
        in_dims = tuple(of_data.get(a) for a in range(len(step.inputs[1 - kernel].shape)))
        return Linear(step, step.inputs[1 - kernel], kernel, out_dims, in_dims, 1, False)
    return None


class Link(NamedTuple):
    """One step of a chain.

    Attributes:
      step: which it is.
      kind: "add", "sub", "rsub" (constant minus value), "mul", "div", "neg" or "move".
      constant: the other operand, what only repeats it left out; or None.
      places: along which axis of the kernel each axis of the constant runs.
    """

    step: Step
    kind: str
    constant: Value | None = None
    places: Dims = ()

    @property
    def leaves(self) -> frozenset[tuple[str, ...]]:
        """Paths of the variables in it."""
        return self.constant.leaves if self.constant is not None else frozenset()


def arithmetic(step: Step) -> tuple[str, Value, Value | None] | None:
    """Kind, value and constant of a step that scales or shifts a floating point value by constants."""
    if step.name not in ARITHMETIC or not jnp.issubdtype(step.output.dtype, jnp.floating):
        return None
    if step.name == "neg":
        return ("neg", step.inputs[0], None) if step.output.depends == INPUTS else None
    left, right = step.inputs
    name = "add" if step.name == "add_any" else step.name
    if left.depends == INPUTS and right.depends < INPUTS:
        kind, value, constant = name, left, right
    elif right.depends == INPUTS and left.depends < INPUTS and name != "div":
        kind, value, constant = {"sub": "rsub"}.get(name, name), right, left
    else:
        return None
    return (kind, value, constant) if value.shape == step.output.shape else None


def next_link(step: Step, value: Value, dims: Dims) -> tuple[Link, Dims] | None:
    """What ``step`` does to each channel of ``value``, and where the channels are then; None if it does more."""
    if step.name in MOVES:
        moved = _move(step, value, dims)
        return None if moved is None else (Link(step, "move"), moved)
    found = arithmetic(step)
    if found is None:
        return None
    kind, _, constant = found
    if constant is None:
        return Link(step, kind), dims
    constant, axes = _unspread(constant)
    places = tuple(dims[a] for a in axes) if constant.shape else ()
    if any(p is None and n != 1 for p, n in zip(places, constant.shape, strict=True)):
        return None
    return Link(step, kind, constant, places), dims


def last_link(value: Value, dims: Dims) -> tuple[Link, Value, Dims] | None:
    """The step that made ``value``, as `next_link` has it, what it was made of, and where the channels are there."""
    step = value.step
    if step is None:
        return None
    found = arithmetic(step)
    source = found[1] if found else step.inputs[0] if step.name in MOVES else None
    if source is None or source.depends != INPUTS:
        return None
    if step.name in MOVES:
        before = _move_back(step, source, dims)
        return None if before is None else (Link(step, "move"), source, before)
    link = next_link(step, source, dims)
    return None if link is None else (link[0], source, dims)


def _unspread(value: Value) -> tuple[Value, tuple[int, ...]]:
    """What ``value`` repeats, and along which of the axes of ``value`` its axes run."""
    axes = tuple(range(len(value.shape)))
    while value.step is not None and value.step.spreads:
        axes = tuple(axes[a] for a in value.step.params["broadcast_dimensions"])
        value = value.step.inputs[0]
    return value, axes


def _move(step: Step, value: Value, dims: Dims) -> Dims | None:
    """``dims`` after a step that moves axes about; None if it splits or merges those of channels."""
    shape = step.output.shape
    if step.name == "convert_element_type":
        return dims if _both_floating(value, step.output) else None
    if step.name == "transpose":
        return tuple(dims[a] for a in step.params["permutation"])
    if step.name == "broadcast_in_dim":
        from_axis = {a: d for a, d in zip(step.params["broadcast_dimensions"], dims, strict=True)}
        return None if step.spreads else tuple(from_axis.get(a) for a in range(len(shape)))
    return _reshape(value.shape, shape, dims)


def _move_back(step: Step, source: Value, dims: Dims) -> Dims | None:
    """The inverse of `_move`."""
    if step.name == "convert_element_type":
        return dims if _both_floating(source, step.output) else None
    if step.name == "transpose":
        return tuple(dims[a] for a in np.argsort(step.params["permutation"]))
    if step.name == "broadcast_in_dim":
        return None if step.spreads else tuple(dims[a] for a in step.params["broadcast_dimensions"])
    return _reshape(step.output.shape, source.shape, dims)


def _reshape(old: Sequence[Any], new: Sequence[Any], dims: Dims) -> Dims | None:
    """``dims`` in another shape of the same values: an axis is where as many values are before it and as many in it."""
    moved: list[int | None] = [None] * len(new)
    places = {(_product(new[:a]), n): a for a, n in enumerate(new) if n != 1}
    for a, (n, dim) in enumerate(zip(old, dims, strict=True)):
        if dim is not None and n != 1:
            place = places.get((_product(old[:a]), n))
            if place is None:
                return None
            moved[place] = dim
    return tuple(moved)


def _both_floating(a: Value, b: Value) -> bool:
    return all(jnp.issubdtype(v.dtype, jnp.floating) for v in (a, b))


def _product(sizes: Sequence[Any]) -> Any:
    product = 1
    for size in sizes:
        product = product * size
    return product


def lay_out(constant: Any, places: Dims, rank: int, dtype: Any) -> Any:
    """``constant``, laid out by a kernel of that rank."""
    kept = [(place, a) for a, place in enumerate(places) if place is not None]
    constant = jnp.asarray(constant, dtype)
    constant = lax.squeeze(constant, [a for a, place in enumerate(places) if place is None])
    constant = constant.transpose([int(i) for i in np.argsort([place for place, _ in kept])])
    sizes = dict(zip(sorted(place for place, _ in kept), constant.shape, strict=True))
    return constant.reshape([sizes.get(i, 1) for i in range(rank)])


def compose(links: Sequence[Link], constants: Sequence[Any], rank: int, dtype: Any) -> tuple[Any, Any]:
    """Factor and shift of a chain, laid out by a kernel of that rank; None for a shift of zero."""
    a, b = jnp.ones((1,) * rank, dtype), None
    rest = iter(constants)
    for link in links:
        c: Any = lay_out(next(rest), link.places, rank, dtype) if link.constant is not None else None
        if link.kind == "add":
            b = c if b is None else b + c
        elif link.kind == "sub":
            b = -c if b is None else b - c
        elif link.kind == "rsub":
            a, b = -a, c if b is None else c - b
        elif link.kind == "neg":
            a, b = -a, None if b is None else -b
        elif link.kind == "mul":
            a, b = a * c, None if b is None else b * c
        elif link.kind == "div":
            a, b = a / c, None if b is None else b / c
    return a, b


def spread_out(constant: Any, dims: Dims) -> Any:
    """The inverse of `lay_out`: what a kernel lays out, to be broadcast against a value with those ``dims``."""
    kept = [dim for dim in dims if dim is not None]
    constant = lax.squeeze(constant, [a for a in range(constant.ndim) if a not in kept])
    constant = constant.transpose([sorted(kept).index(dim) for dim in kept])
    sizes = iter(constant.shape)
    return constant.reshape([1 if dim is None else next(sizes) for dim in dims])


def shifts(links: Sequence[Link]) -> bool:
    """Whether a chain may have a shift other than zero."""
    return any(link.kind in ("add", "sub", "rsub") for link in links)


def is_norm(links: Sequence[Link]) -> bool:
    """Whether a chain scales by variables."""
    return any(link.kind in ("mul", "div") and _is_variable(link) for link in links)


def count_variable(links: Sequence[Link]) -> int:
    """How many steps of a chain have variables for constants."""
    return sum(map(_is_variable, links))


def _is_variable(link: Link) -> bool:
    return link.constant is not None and link.constant.depends == VARIABLES
