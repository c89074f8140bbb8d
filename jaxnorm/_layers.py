"""What the Linen and the NNX layers share: Flax's conventions, in terms of the engine."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import jaxnorm
from jaxnorm import _axes
from jaxnorm._axes import Axes, fail
from jaxnorm._epilogue import Function, identity
from jaxnorm._moments import Moments, divisor
from jaxnorm.functional import Adjust, ChannelGroups
from jaxnorm.running import RunningStats, update_running

# Arguments -----------------------------------------------------------------------------------------------------------


def label(layer: Any, path: Sequence[str] = ()) -> str:
    """What messages call a layer: its class, and where it is in the model."""
    name = type(layer).__name__
    return f"{name} ({'/'.join(path)})" if path else name


def as_input(x: Any) -> jax.Array:
    """The input of a layer as an array; integers become float32, as in Flax."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def sorted_axes(function: str, name: str, axes: Axes, ndim: int) -> tuple[int, ...]:
    """``axes`` as Flax takes them: in ascending order and once each, whatever was given."""
    listed = axes if isinstance(axes, Sequence) else [axes]
    canonical = {_axes.canonical_axes(function, name, a, ndim)[0] for a in listed}
    return tuple(sorted(canonical))


def check_features(function: str, shape: tuple[int, ...], built_for: tuple[int, ...]) -> None:
    """An input must have the features that the layer was built for."""
    if shape != built_for:
        rule = "x must have the features that the layer was built for"
        fail(function, rule, {"features": shape, "built_for": built_for})


def one_axis(function: str, axis: Axes) -> int:
    """The axis of the features where there is only one."""
    listed = list(axis) if isinstance(axis, Sequence) else [axis]
    if len(listed) != 1:
        fail(function, "axis must be one axis", {"axis": axis})
    return listed[0]


def first_given(*values: Any) -> Any:
    """The first of ``values`` that is not None."""
    return next((value for value in values if value is not None), None)


def group_count(function: str, num_groups: int | None, group_size: int | None, channels: int) -> int:
    """How many groups: exactly one of ``num_groups`` and ``group_size`` says so."""
    if (num_groups is None) == (group_size is None):
        rule = "one of num_groups and group_size must be given, the other None"
        fail(function, rule, {"num_groups": num_groups, "group_size": group_size})
    if group_size is not None:
        if group_size < 1 or channels % group_size:
            rule = "group_size must divide the number of channels"
            fail(function, rule, {"group_size": group_size, "channels": channels})
        num_groups = channels // group_size
    _axes.check_groups(function, num_groups, channels)
    return int(num_groups or 0)


# Which axes ----------------------------------------------------------------------------------------------------------


class Reduction(NamedTuple):
    """What a layer asks of the engine."""

    features: tuple[int, ...]
    axes: tuple[int, ...]
    centered: bool = True
    adjust: Adjust | None = None


def given_axes(function: str, layer: Any, shape: tuple[int, ...], *, centered: bool = True) -> Reduction:
    """Layer and RMS normalization: the axes that the layer names."""
    features = sorted_axes(function, "feature_axes", layer.feature_axes, len(shape))
    return Reduction(features, sorted_axes(function, "reduction_axes", layer.reduction_axes, len(shape)), centered)


def group_axes(function: str, layer: Any, shape: tuple[int, ...], *, counted: bool = False) -> Reduction:
    """Group normalization: all axes but the first, or those that the layer names, the channels included."""
    (channel,) = sorted_axes(function, "axis", layer.axis, len(shape))
    axes = tuple({*range(int(layer.batched), len(shape)), channel})
    if layer.reduction_axes is not None:
        axes = sorted_axes(function, "reduction_axes", layer.reduction_axes, len(shape))
    if channel not in axes:
        rule = f"reduction_axes must include the channel axis, {channel}"
        fail(function, rule, {"reduction_axes": layer.reduction_axes})
    groups = layer.num_groups
    if not counted:
        groups = group_count(function, groups, layer.group_size, shape[channel])
    others = tuple(a for a in axes if a != channel)
    return Reduction((channel,), others, adjust=ChannelGroups(channel, groups))


def instance_axes(function: str, layer: Any, shape: tuple[int, ...]) -> Reduction:
    """Instance normalization: all axes but the first and the features."""
    features = sorted_axes(function, "feature_axes", layer.feature_axes, len(shape))
    first = int(layer.batched)
    if first and 0 in features:
        fail(function, "feature_axes must not include the first axis, the batch", {"feature_axes": features})
    return Reduction(features, tuple(a for a in range(first, len(shape)) if a not in features))


# Normalization -------------------------------------------------------------------------------------------------------


def epilogue(layer: Any, module: type) -> tuple[Any, Function]:
    """The activation inside of the rule, and what follows it: a ``module``, whose state the rule cannot hold."""
    if isinstance(layer.activation, module) and not layer.invertible:
        return None, layer.activation
    return layer.activation, identity


def check_start(function: str, layer: Any, init: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse a scale that starts where the invertible mode can recover nothing, also where ``init`` is traced."""
    if not (layer.invertible and layer.use_scale):
        return
    with jax.ensure_compile_time_eval():
        (scale,) = jax.tree.leaves(init(jax.random.key(0), shape, layer.param_dtype))
        smallest = float(jnp.min(jnp.abs(scale), initial=jnp.inf))
    if smallest <= float(jnp.finfo(dtype).eps):
        rule = (
            f"with invertible=True the input is recovered from the output, of dtype {jnp.dtype(dtype).name}, by"
            " dividing by the scale, which must not start at zero: let scale_init start it at one, or give this layer"
            " invertible=False"
        )
        fail(function, rule, {"smallest": smallest})


def warn(function: str, message: str) -> None:
    """Warn of what Flax's layer does without a word; logged, where warnings are errors: it is no reason to stop."""
    try:
        _axes.warn(function, message)
    except UserWarning as warning:
        _log_once(str(warning))


@cache
def _log_once(message: str) -> None:
    logging.getLogger("jaxnorm").warning(message)


def in_dtype(method: Callable[..., Any], base: Any, x: jax.Array, *args: Any, dtype: Any, **given: Any) -> Any:
    """What a ``method`` of a layer gives, in the ``dtype`` of the layer.

    That of the ``base`` class takes the dtype, and keeps ``x`` as it is for the backward pass. Any other works in the
    wider of both dtypes, and gives that of its input, as the functions of ``jaxnorm`` do.
    """
    if base is not None and getattr(method, "__func__", None) is base:
        return method(x, *args, dtype=dtype, **given)
    result = method(x.astype(jnp.promote_types(x.dtype, dtype)), *args, **given)
    return (result[0].astype(dtype), *result[1:]) if isinstance(result, tuple) else result.astype(dtype)


def without(function: str, layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` without what means nothing to the layer, which is refused."""
    names, why = layer._lacks
    wrong = {name: given[name] for name in names if given.get(name) is not None and given[name] is not False}
    refuse(function, wrong, why)
    return {name: value for name, value in given.items() if name not in names}


def replicas(layer: Any, initializing: bool) -> dict[str, Any]:
    """Whose statistics are shared: at initialization they need not exist, nor does the size of the input count."""
    if initializing:
        return {}
    return {"axis_name": layer.axis_name, "axis_index_groups": layer.axis_index_groups}


def check_momentum(function: str, momentum: float | None) -> None:
    """It is None or a weight."""
    if momentum is not None:
        _axes.check_number(function, "momentum", momentum, 0.0, 1.0)


def moved(running: RunningStats, batch: Moments, momentum: float | None, unbiased: bool) -> RunningStats:
    """Running averages after one more batch, as wide as what was averaged, as in Flax."""
    batch = Moments(*map(jax.lax.stop_gradient, batch))
    wide = (r.astype(jnp.promote_types(r.dtype, b.dtype)) for r, b in zip(running, batch, strict=True))
    alpha = None if momentum is None else 1 - momentum
    return update_running(RunningStats(*wide), batch, alpha=alpha, unbiased=unbiased)


def running_stats(
    function: str, stored: dict[str, Any], shape: tuple[int, ...], features: tuple[int, ...]
) -> RunningStats:
    """The averages that a layer holds, in ``shape``; those of a batch norm that was swapped serve all domains."""
    held = jnp.shape(stored["mean"])
    check_features(function, features, held[len(held) - len(features) :])
    return RunningStats(*(jnp.broadcast_to(stored.get(n, 0.0), shape) for n in RunningStats._fields))


def constant_unless(trainable: bool | None, values: Any) -> Any:
    """``values``, to differentiation constants unless they train."""
    return values if trainable else jax.lax.stop_gradient(values)


# Of several layers ---------------------------------------------------------------------------------------------------


def of_virtual_batches(batch: Moments, virtual: Any, unbiased: bool) -> Moments:
    """Where unbiased variances are averaged, ``n / (n - 1)`` is that of each of the ``virtual`` batches."""
    if not unbiased:
        return batch
    n, each = batch.count, batch.count / virtual
    return batch._replace(var=batch.var * ((n - 1) / n) * (each / divisor(each - 1)))


def mask_of(lengths: Any, x: Any) -> Any:
    """The mask of sequences of these lengths; None for all that there is."""
    if lengths is None:
        return None
    return jnp.expand_dims(jaxnorm.length_mask(lengths, jnp.shape(x)[1]), range(2, jnp.ndim(x)))


def of_steps(x: jax.Array, given: dict[str, Any]) -> dict[str, Any]:
    """Axes with that of time; scale and bias, the same for every time step, in the shape ``(time, *features)``."""
    wide = {
        n: None if (v := given[n]) is None else jnp.broadcast_to(v, (x.shape[1], *v.shape)) for n in ("scale", "bias")
    }
    return given | wide | {"axis": (1, *given["axis"])}


def of_all_steps(function: str, batch: Moments, max_length: int) -> Moments:
    """The moments of so many time steps; those that were not seen have a count of zero."""
    missing = max_length - len(batch.mean)
    if missing < 0:
        rule = "sequences must not be longer than max_length in training"
        fail(function, rule, {"length": len(batch.mean), "max_length": max_length})
    return Moments(*(jnp.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1)) for v in batch))


def styled(x: Any, style: Any, axis: int, epsilon: float) -> jax.Array:
    """``x`` with the mean and the deviation of every example and channel of ``style``."""
    feature = axis % jnp.ndim(style)
    of_style = jaxnorm.moments(style, tuple(a for a in range(1, jnp.ndim(style)) if a != feature))
    return jaxnorm.instance_norm(x, jnp.sqrt(of_style.var + epsilon), of_style.mean, axis=axis, epsilon=epsilon)


def along(x: jax.Array, axis: int, value: jax.Array) -> jax.Array:
    """A number of each example and feature, in a shape that broadcasts against ``x``."""
    return _axes.expand(value, (0, axis % x.ndim), x.ndim)


def recurrent_step(denses: Any, norms: Any, bias: Any, carry: Any, x: Any) -> tuple[Any, jax.Array]:
    """One step of an LSTM whose terms are normalized by the statistics of the step (Cooijmans et al., 2017)."""
    (dense_h, dense_x), (norm_h, norm_x, norm_c), (c, h) = denses, norms, carry
    gates = norm_h(dense_h(h)) + norm_x(dense_x(x))
    i, f, g, o = jnp.split(gates + jnp.broadcast_to(bias, gates.shape), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(norm_c(c))
    return (c, h), h


def refuse(function: str, given: dict[str, Any], why: str) -> None:
    """Raise if something is given that means nothing to the layer."""
    if given:
        fail(function, f"{', '.join(given)} must be left out: {why}", given)


def warn_if_never_updated(function: str, running: RunningStats) -> None:
    """Warn of averages that are still those of initialization, where their values can be seen: outside of ``jit``."""
    for value in (running.mean, running.var):
        if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
            return
    if np.all(np.asarray(running.mean) == 0) and np.all(np.asarray(running.var) == 1):
        message = (
            "the running averages in use were never updated, and the input passes almost unchanged;"
            " train with batch statistics and keep the averages, or load them"
        )
        warn(function, f"{message}.")
