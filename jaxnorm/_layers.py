"""What the Linen and the NNX layers share: Flax's conventions, in terms of the engine."""

import ast
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxnorm import _axes
from jaxnorm._axes import Axes, fail
from jaxnorm._epilogue import Function, identity
from jaxnorm._moments import Moments
from jaxnorm.functional import Adjust, ChannelGroups, measure_array, normalize_array
from jaxnorm.running import RunningStats, update_running

Class = TypeVar("Class", bound=type)

# Documentation -------------------------------------------------------------------------------------------------------


@cache
def _field_docs(module: str) -> dict[str, dict[str, str]]:
    """The strings below the fields of the classes of ``module``, which Python itself throws away."""
    classes = [
        node for node in ast.parse(inspect.getsource(sys.modules[module])).body if isinstance(node, ast.ClassDef)
    ]
    return {
        c.name: {
            field.target.id: inspect.cleandoc(str(doc.value.value))
            for field, doc in pairwise(c.body)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
        }
        for c in classes
    }


def documented(heading: str) -> Callable[[Class], Class]:
    """Write all fields of a class into its docstring, those it inherits too, under ``heading``, before the example.

    So each is described once, below the field, where type checkers and editors look, and ``help`` shows them all.
    """

    def decorate(cls: Class) -> Class:
        docs: dict[str, str] = {}
        try:
            for base in reversed([c for c in cls.__mro__ if c.__module__ == cls.__module__]):
                docs |= _field_docs(cls.__module__)[base.__name__]
        except OSError:  # installed without its source
            return cls
        if not cls.__doc__:  # python -OO
            return cls
        names = [name for name in inspect.signature(cls.__init__).parameters if name in docs]
        fields = [f"  {name}: {docs[name]}".replace("\n", "\n    ") for name in names]
        before, example, after = inspect.cleandoc(cls.__doc__).partition("Example:\n")
        cls.__doc__ = before + "\n".join([f"{heading}:", *fields]) + "\n\n" + example + after
        return cls

    return decorate


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


def first_given(*values: bool | None) -> bool | None:
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
    axes = tuple({*range(1, len(shape)), channel})
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
    if 0 in features:
        fail(function, "feature_axes must not include the first axis, the batch", {"feature_axes": features})
    return Reduction(features, tuple(a for a in range(1, len(shape)) if a not in features))


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


def by_own(function: str, layer: Any, *, initializing: bool = False, **settings: Any) -> tuple[jax.Array, Moments]:
    """Normalize by the statistics of the input and its replicas, which need not exist at initialization.

    Nor does the size of the input mean anything then.
    """
    replicas: dict[str, Any] = {"axis_name": layer.axis_name, "axis_index_groups": layer.axis_index_groups}
    settings |= {"warn": None} if initializing else {"warn": warn, **replicas}
    return normalize_array(function, **settings)


def normalize(function: str, layer: Any, reduction: Reduction, **settings: Any) -> jax.Array:
    """The output of a layer that normalizes by the statistics of its input, and has no others."""
    return by_own(function, layer, **reduction._asdict(), **settings)[0]


def batch_norm(
    function: str,
    layer: Any,
    x: jax.Array,
    averages: Sequence[jax.Array],
    *,
    features: tuple[int, ...],
    use_running_average: bool,
    update: bool,
    initializing: bool = False,
    mask: Any,
    **settings: Any,
) -> tuple[jax.Array, Moments | None, RunningStats | None]:
    """The output of a batch normalization layer, the moments of the batch if measured, and averages if they change.

    ``averages`` are mean, variance and, where momentum is None and there is one, count.
    """
    mean, var, *count = averages
    running = RunningStats(mean, var, count[0] if count else jnp.zeros_like(var))
    if layer.momentum is not None:
        _axes.check_number(function, "momentum", layer.momentum, 0.0, 1.0)
    axes, batch = _axes.others(features, x), None
    if use_running_average:
        if not initializing:
            warn_if_never_updated(function, running)
        y, _ = normalize_array(function, x, features=features, given=(mean, var), **settings)
        if update:
            replicas = (layer.axis_name, layer.axis_index_groups)
            batch = measure_array(function, x, axes, features, mask, *replicas, near=mean)
    else:
        own = {"x": x, "features": features, "axes": axes, "kept": features, "near": mean, "mask": mask}
        own |= {"initializing": initializing}
        y, batch = by_own(function, layer, **own, **settings)
    if batch is None:
        return y, None, None
    batch = Moments(*map(jax.lax.stop_gradient, batch))
    if not update:
        return y, batch, None
    alpha = None if layer.momentum is None else 1 - layer.momentum
    # What is averaged becomes as wide as what it is averaged with, as in Flax.
    running = RunningStats(
        *(r.astype(jnp.promote_types(r.dtype, b.dtype)) for r, b in zip(running, batch, strict=True))
    )
    return y, batch, update_running(running, batch, alpha=alpha, unbiased=layer.unbiased)


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
