"""Which axes are features, which are reduced: every check of an argument, and its message.

Every public function calls these checks first, so that nothing is computed from bad input. A message names
the function, the argument, the rule and the value: ``group_norm: num_groups must divide ...; got ...``.
"""

import math
import numbers
import operator
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

Axes = int | Sequence[int]
AxisNames = Hashable | Sequence[Hashable]


def fail(function: str, rule: str, got: dict[str, Any], error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` saying which rule of which function was broken, and by which values."""
    values = ", ".join(f"{name}={value!r}" for name, value in got.items())
    raise error(f"{function}: {rule}; got {values}.")


def warn(function: str, message: str) -> None:
    """Warn of ``message``, at the line of the caller that is neither in this package nor in JAX or Flax."""
    inside = tuple(
        os.path.dirname(sys.modules[name].__file__ or "") for name in ("jaxnorm", "jax", "flax") if name in sys.modules
    )
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{function}: {message}", stacklevel=level)


def as_array(function: str, name: str, value: Any) -> jax.Array:
    """``value`` as an array of whatever dtype it has; of either byte order."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        got = {"type": type(value).__name__, "dtype": str(value.dtype)} if hasattr(value, "dtype") else {name: value}
        fail(function, f"{name} must be what jax can make an array of ({str(error).splitlines()[0]})", got, TypeError)


def as_input(function: str, name: str, value: Any) -> jax.Array:
    """``value`` as an array of real or complex floating point numbers."""
    array = as_array(function, name, value)
    if not jnp.issubdtype(array.dtype, jnp.inexact) or jnp.finfo(array.dtype).bits < 16:
        rule = f"{name} must have a floating point or complex dtype of 16 bits or more"
        fail(function, rule, {"dtype": str(array.dtype)}, TypeError)
    return array


def statistics_dtype(dtype: Any) -> np.dtype:
    """The dtype of statistics and arithmetic: float32 at least, the input's own where it is wider or complex."""
    info = jnp.finfo(dtype)
    return np.dtype(dtype if info.bits >= 32 else jnp.float32)


def _index(value: Any) -> int:
    """An integer, which a bool is not."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def canonical_axes(function: str, name: str, axes: Axes, ndim: int) -> tuple[int, ...]:
    """``axes`` as distinct indices in ``[0, ndim)``, in the order given."""
    try:
        listed = [_index(a) for a in (axes if isinstance(axes, Sequence) else [axes])]
    except TypeError:
        fail(function, f"{name} must be an integer or a sequence of integers", {name: axes}, TypeError)
    if any(not -ndim <= a < ndim for a in listed):
        fail(function, f"{name} must lie in [{-ndim}, {ndim}), the axes of x", {name: axes, "ndim": ndim})
    canonical = tuple(a % ndim for a in listed)
    if len(set(canonical)) != len(canonical):
        fail(function, f"{name} must not name an axis twice", {name: axes, "ndim": ndim})
    return canonical


def expand(value: jax.Array, axes: tuple[int, ...], ndim: int) -> jax.Array:
    """Lay ``value``, whose dimensions are ``axes`` in that order, along those axes of an array of rank ``ndim``."""
    value = jnp.transpose(value, np.argsort(axes).tolist())
    return jnp.expand_dims(value, [a for a in range(ndim) if a not in axes])


def extract(value: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Undo `expand`: keep only ``axes``, in that order."""
    value = jnp.squeeze(value, [a for a in range(value.ndim) if a not in axes])
    return jnp.transpose(value, np.argsort(np.argsort(axes)).tolist())


def split(v: jax.Array, axis: int, sizes: tuple[int, int]) -> jax.Array:
    """One axis as two of these sizes; gathered, if an explicit sharding of it does not allow for it."""
    typed = jax.typeof(v).sharding
    names = typed.spec[axis] if isinstance(typed.spec[axis], tuple) else (typed.spec[axis],)
    if typed.spec[axis] is not None and sizes[0] % math.prod(typed.mesh.shape[name] for name in names):
        whole = [None if a == axis else name for a, name in enumerate(typed.spec)]
        v = jax.sharding.reshard(v, NamedSharding(typed.mesh, PartitionSpec(*whole)))
    return v.reshape(*v.shape[:axis], *sizes, *v.shape[axis + 1 :])


def joined(v: jax.Array, like: jax.Array) -> jax.Array:
    """In the shape of ``like``, and sharded as that."""
    return lax.reshape(v, like.shape, out_sharding=jax.typeof(like).sharding)


def check_parameter(function: str, name: str, value: Any, axes: tuple[int, ...], x: jax.Array) -> jax.Array | None:
    """A vector of the features (scale, bias, mean, var), or one for each example; not yet `laid_out`."""
    if value is None:
        return None
    value = as_input(function, name, value)
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(x):
        fail(function, f"{name} must be real where x is", {"dtype": str(value.dtype)}, TypeError)
    features = tuple(x.shape[a] for a in axes)
    if value.shape != features and not (0 not in axes and value.shape == (x.shape[0], *features)):
        rule = f"{name} must have the shape of the feature axes of x, {features}, or (batch, *features)"
        fail(function, rule, {"shape": value.shape, "axis": axes, "x_shape": x.shape})
    return value


def laid_out(value: Any, axes: tuple[int, ...], x: jax.Array) -> Any:
    """A parameter that was checked, along its axes of ``x`` and in the dtype of the arithmetic; None stays None."""
    if value is None:
        return None
    dtype = statistics_dtype(x.dtype)
    dtype = dtype if jnp.iscomplexobj(value) else jnp.finfo(dtype).dtype
    return expand(value.astype(dtype), axes if value.ndim == len(axes) else (0, *axes), x.ndim)


def check_statistic(function: str, name: str, value: Any, axes: tuple[int, ...], x: jax.Array) -> jax.Array:
    """A mean or variance that is given, as any parameter, but not optional; a variance is real."""
    checked = check_parameter(function, name, value, axes, x)
    if checked is None:
        fail(function, f"{name} must be an array", {name: value}, TypeError)
    if name.endswith("var") and jnp.iscomplexobj(checked):
        fail(function, f"{name} must be real", {"dtype": str(checked.dtype)}, TypeError)
    return checked


def check_mask(function: str, mask: Any, x: jax.Array) -> jax.Array | None:
    """``mask``, boolean or weights, which broadcasts against ``x``."""
    if mask is None:
        return None
    mask = as_array(function, "mask", mask)
    if jnp.iscomplexobj(mask):
        fail(function, "mask must be boolean or real weights", {"dtype": str(mask.dtype)}, TypeError)
    aligned = (1,) * (x.ndim - mask.ndim) + mask.shape
    if len(aligned) != x.ndim or any(m not in (1, n) for m, n in zip(aligned, x.shape, strict=True)):
        rule = "mask must broadcast against x"
        if mask.shape == x.shape[: mask.ndim]:
            shape = mask.shape + (1,) * (x.ndim - mask.ndim)
            rule = f"mask must have as many axes as x: reshape it to {shape}"
        fail(function, rule, {"mask_shape": mask.shape, "x_shape": x.shape})
    if mask.ndim < x.ndim and mask.shape == x.shape[: mask.ndim] and mask.size > 1:
        rule = "mask must have as many axes as x where its shape fits both the first and the last of them"
        fail(function, rule, {"mask_shape": mask.shape, "x_shape": x.shape})
    if mask.dtype != jnp.bool_ and not isinstance(mask, Tracer):
        known = np.asarray(mask)
        if not (np.isfinite(known) & (known >= 0)).all():
            fail(function, "mask must hold finite, non-negative weights", {"smallest": float(known.min())})
    return mask


def weights_of(mask: Any, x: jax.Array) -> Any:
    """A mask that was checked, with the rank of ``x``: boolean, or weights in the dtype of the statistics."""
    if mask is None:
        return None
    if mask.dtype != jnp.bool_:
        mask = mask.astype(jnp.finfo(statistics_dtype(x.dtype)).dtype)
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


def check_residual(function: str, residual: Any, x: jax.Array) -> jax.Array | None:
    """An array in the shape of ``x``, that is added to its normalized values; in its own dtype."""
    if residual is None:
        return None
    residual = as_input(function, "residual", residual)
    if residual.shape != x.shape:
        rule = f"residual must have the shape of x, {x.shape}"
        fail(function, rule, {"shape": residual.shape})
    if jnp.iscomplexobj(residual) and not jnp.iscomplexobj(x):
        fail(function, "residual must be real where x is", {"dtype": str(residual.dtype)}, TypeError)
    return residual


def check_invertible_scale(function: str, scale: Any, dtype: Any) -> None:
    """Refuse a scale from which nothing can be recovered of what ``dtype`` holds; one that is traced passes."""
    if scale is None or isinstance(scale, Tracer):
        return
    least, smallest = float(jnp.finfo(dtype).eps), float(np.min(np.abs(np.asarray(scale)), initial=np.inf))
    if smallest <= least:
        rule = f"invertible needs a scale above {least:.1e}, the rounding of the output: start it at one"
        fail(function, rule, {"smallest": smallest})


def check_number(function: str, name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no real number in ``[low, high]``; of one known only when compiled, what is no real scalar."""
    if isinstance(value, jax.Array | np.ndarray):
        if value.ndim != 0 or jnp.iscomplexobj(value):
            fail(
                function,
                f"{name} must be one real number",
                {"shape": value.shape, "dtype": str(value.dtype)},
                TypeError,
            )
        if isinstance(value, Tracer):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        fail(function, f"{name} must be a real number", {name: value}, TypeError)
    if not low <= float(value) <= high:
        fail(function, f"{name} must lie in [{low:g}, {high:g}]", {name: value})


def check_epsilon(function: str, epsilon: Any) -> Any:
    """``epsilon``, which is finite and not negative, or known only when compiled."""
    check_number(function, "epsilon", epsilon, 0.0, float(np.finfo(np.float32).max))
    return epsilon if isinstance(epsilon, Tracer) else float(epsilon)


def check_replicas(
    function: str, axis_name: AxisNames | None, axis_index_groups: Sequence[Sequence[int]] | None
) -> tuple[tuple[Hashable, ...], tuple[tuple[int, ...], ...] | None]:
    """The names of the mapped axes as a tuple, and the groups of replicas as tuples."""
    if axis_name is None:
        if axis_index_groups is not None:
            fail(function, "axis_index_groups needs an axis_name", {"axis_index_groups": axis_index_groups})
        return (), None
    names = tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)
    if len(set(names)) != len(names):
        fail(function, "axis_name must not name an axis twice", {"axis_name": axis_name})
    try:
        size = math.prod(lax.axis_size(name) for name in names)
    except (NameError, KeyError, ValueError, TypeError):
        rule = "axis_name must name axes bound by shard_map, vmap or pmap around this call"
        fail(function, rule, {"axis_name": axis_name})
    if axis_index_groups is None:
        return names, None
    try:
        groups = tuple(tuple(operator.index(i) for i in group) for group in axis_index_groups)
    except TypeError:
        rule = "axis_index_groups must be a sequence of sequences of integers"
        fail(function, rule, {"axis_index_groups": axis_index_groups}, TypeError)
    if not all(groups) or sorted(i for group in groups for i in group) != list(range(size)):
        rule = f"axis_index_groups must hold each of the {size} replicas of {axis_name!r} once"
        fail(function, rule, {"axis_index_groups": axis_index_groups})
    return names, groups


def warn_of_one_value(
    warn: Callable[[str, str], None],
    function: str,
    x: jax.Array,
    axes: tuple[int, ...],
    channels: int,
    axis_name: tuple[Hashable, ...],
    axis_index_groups: tuple[tuple[int, ...], ...] | None,
) -> None:
    """Warn where every statistic is of one value: its variance is zero, and so is the normalized value, whatever it is.

    None at all is a batch to which nothing happens. A size that is a symbol may be anything.
    """
    replicas = math.prod(lax.axis_size(name) for name in axis_name)
    if axis_index_groups is not None:
        replicas = min(map(len, axis_index_groups))
    sizes = [channels, replicas, *(x.shape[a] for a in axes)]
    if all(isinstance(size, int) and size == 1 for size in sizes):
        message = "every statistic is of one value, which is normalized to zero whatever it is"
        warn(function, f"{message}; got x of shape {x.shape}.")


def check_input(function: str, x: Any, axis: Axes, *, batched: bool = False) -> tuple[jax.Array, tuple[int, ...]]:
    """``x`` as an array, and its feature axes; any but the first where every example is treated by itself."""
    x = as_input(function, "x", x)
    features = canonical_axes(function, "axis", axis, x.ndim)
    if batched and 0 in features:
        fail(function, "axis must not be the first axis of x, which is the batch", {"axis": axis, "x_shape": x.shape})
    return x, features


def others(features: tuple[int, ...], x: jax.Array, first: int = 0) -> tuple[int, ...]:
    """The axes of ``x`` from the ``first`` on that are no features."""
    return tuple(a for a in range(first, x.ndim) if a not in features)


def check_groups(function: str, num_groups: Any, channels: int) -> None:
    """``num_groups`` must be a positive divisor of the number of channels."""
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | np.integer):
        fail(function, "num_groups must be an integer", {"num_groups": num_groups}, TypeError)
    if num_groups < 1 or channels % num_groups:
        rule = "num_groups must divide the number of channels"
        fail(function, rule, {"num_groups": num_groups, "channels": channels})


def check_shape(function: str, name: str, shape: Any) -> tuple[int, ...]:
    """``shape`` as a tuple of non-negative integers."""
    try:
        sizes = tuple(_index(n) for n in (shape if isinstance(shape, Sequence) else [shape]))
    except TypeError:
        fail(function, f"{name} must be an integer or a sequence of integers", {name: shape}, TypeError)
    if any(n < 0 for n in sizes):
        fail(function, f"{name} must not be negative", {name: shape})
    return sizes
