"""What the Linen and the NNX layers share: Flax's conventions, in terms of the engine."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxnorm import _axes
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._moments import ChannelGroups, Moments
from jaxnorm.functional import measure_array, normalize_array
from jaxnorm.running import RunningStats, update_running


class Replicas(NamedTuple):
    """Who is normalized together; nobody while initializing, when no mapped axis needs to exist."""

    axis_name: AxisNames | None
    axis_index_groups: Sequence[Sequence[int]] | None


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
        _axes.fail(function, rule, {"features": shape, "built_for": built_for})


def first_given(*values: bool | None) -> bool | None:
    """The first of ``values`` that is not None."""
    return next((value for value in values if value is not None), None)


def check_given(function: str, name: str, value: bool | None) -> bool:
    """A setting that must be given at construction or in the call."""
    if value is None:
        _axes.fail(function, f"{name} must be given at construction or in the call", {name: value})
    return value


def group_count(function: str, num_groups: int | None, group_size: int | None, channels: int) -> int:
    """How many groups: exactly one of ``num_groups`` and ``group_size`` says so."""
    if (num_groups is None) == (group_size is None):
        rule = "one of num_groups and group_size must be given, the other None"
        _axes.fail(function, rule, {"num_groups": num_groups, "group_size": group_size})
    if group_size is not None:
        if group_size < 1 or channels % group_size:
            rule = "group_size must divide the number of channels"
            _axes.fail(function, rule, {"group_size": group_size, "channels": channels})
        num_groups = channels // group_size
    _axes.check_groups(function, num_groups, channels)
    return int(num_groups or 0)


def group_axes(function: str, channel: int, reduction_axes: Axes | None, ndim: int) -> tuple[int, ...]:
    """The axes that group normalization reduces besides that of the channels: all but the first, unless given."""
    if reduction_axes is None:
        return tuple(a for a in range(1, ndim) if a != channel)
    axes = sorted_axes(function, "reduction_axes", reduction_axes, ndim)
    if channel not in axes:
        rule = f"reduction_axes must include the channel axis, {channel}"
        _axes.fail(function, rule, {"reduction_axes": reduction_axes})
    return tuple(a for a in axes if a != channel)


def instance_axes(function: str, features: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The axes that instance normalization reduces: all but the first and the features."""
    if 0 in features:
        _axes.fail(function, "feature_axes must not include the first axis, the batch", {"feature_axes": features})
    return tuple(a for a in range(1, ndim) if a not in features)


def normalize(
    function: str,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    replicas: Replicas,
    channel_groups: tuple[int, int] | None = None,
    **settings: Any,
) -> jax.Array:
    """The output of a layer that normalizes by the statistics of its input over ``axes``."""
    adjust = None if channel_groups is None else ChannelGroups(*channel_groups)
    return normalize_array(function, x, scale, bias, adjust=adjust, **replicas._asdict(), **settings)[0]


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    averages: Sequence[jax.Array],
    *,
    features: tuple[int, ...],
    use_running_average: bool,
    update_running_average: bool | None,
    initializing: bool,
    momentum: float | None,
    unbiased: bool,
    replicas: Replicas,
    mask: Any,
    **settings: Any,
) -> tuple[jax.Array, Moments | None, RunningStats | None]:
    """The output of a batch normalization layer, the moments of the batch if measured, and averages if they change.

    ``averages`` are mean, variance and, where momentum is None, count. While initializing nothing is averaged, and the
    batch may be of any size.
    """
    function = "BatchNorm"
    mean, var, *count = averages
    running = RunningStats(mean, var, count[0] if count else jnp.zeros_like(var))
    if momentum is not None:
        _axes.check_number(function, "momentum", momentum, 0.0, 1.0)
    update = not use_running_average if update_running_average is None else update_running_average
    update = update and not initializing
    if initializing:
        replicas = Replicas(None, None)
    axes = _axes.others(features, x)
    batch = None
    if use_running_average:
        if not initializing:
            warn_if_never_updated(running)
        y, _ = normalize_array(
            function, x, scale, bias, features=features, given=(running.mean, running.var), **settings
        )
        if update:
            batch = measure_array(function, x, axes, mask, *replicas, near=_axes.expand(running.mean, features, x.ndim))
    else:
        y, batch = normalize_array(
            function,
            x,
            scale,
            bias,
            features=features,
            axes=axes,
            near=running.mean,
            mask=mask,
            **replicas._asdict(),
            **settings,
        )
    if batch is None:
        return y, None, None
    batch = Moments(*(jax.lax.stop_gradient(_axes.extract(m, features)) for m in batch))
    if not update:
        return y, batch, None
    alpha = None if momentum is None else 1 - momentum
    return y, batch, update_running(running, batch, alpha=alpha, unbiased=unbiased)


def warn_if_never_updated(running: RunningStats) -> None:
    """Warn of averages that are still those of initialization, where their values can be seen: outside of ``jit``."""
    if isinstance(running.mean, Tracer) or isinstance(running.var, Tracer):
        return
    if np.all(np.asarray(running.mean) == 0) and np.all(np.asarray(running.var) == 1):
        message = "BatchNorm: the running averages in use were never updated; the input passes almost unchanged."
        warnings.warn(message, stacklevel=2)
