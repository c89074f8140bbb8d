"""What the remedies share that measure every example separately, and merge examples as they need.

A remedy passes no ``axis_name`` to the engine, which would merge the first example of one replica with the first of
another: it merges examples, and replicas, in its ``adjust``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxnorm import _axes
from jaxnorm._axes import Axes
from jaxnorm._moments import Statistics, merge_along
from jaxnorm._replicas import Replicas, merge_replicas, vary
from jaxnorm._rule import saved


def check_examples(
    function: str, x: Any, axis: Axes, *, real: bool = False
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """``x`` of shape ``(batch, ...)``, its feature axes, and those over which one example is measured."""
    x, features = _axes.check_input(function, x, axis, batched=True)
    if real and jnp.iscomplexobj(x):
        _axes.fail(function, "x must be real", {"dtype": str(x.dtype)}, TypeError)
    return x, features, _axes.others(features, x, first=1)


def check_labels(function: str, name: str, count: str, labels: Any, number: Any, x: jax.Array) -> jax.Array:
    """``labels`` as integers, one an example; in range where they are known."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer):
        _axes.fail(function, f"{count} must be an integer", {count: number}, TypeError)
    if number < 1:
        _axes.fail(function, f"{count} must be positive", {count: number})
    labels = _axes.as_array(function, name, labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        _axes.fail(function, f"{name} must hold integers", {"dtype": str(labels.dtype)}, TypeError)
    if labels.shape != x.shape[:1]:
        _axes.fail(function, f"{name} must have one number per example, {x.shape[:1]}", {"shape": labels.shape})
    if not isinstance(labels, Tracer) and labels.size:
        known = np.asarray(labels)
        if known.min() < 0 or known.max() >= number:
            got = {"smallest": int(known.min()), "largest": int(known.max()), count: number}
            _axes.fail(function, f"{name} must lie in [0, {count})", got)
    return labels


def check_running(function: str, running: Any, features: tuple[int, ...], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of ``running`` averages."""
    if not (hasattr(running, "mean") and hasattr(running, "var")):
        rule = "running must be RunningStats or Moments"
        _axes.fail(function, rule, {"type": type(running).__name__}, TypeError)
    mean, var = (
        _axes.check_statistic(function, f"running.{name}", getattr(running, name), features, x)
        for name in ("mean", "var")
    )
    return mean, var


def given(mean: jax.Array, var: jax.Array) -> Statistics:
    """The statistics that averages stand for, in the rank of the data."""
    center = lax.stop_gradient(mean)
    return Statistics(jnp.ones_like(var), center, mean - center, var)


def merge_batch(parts: Statistics, replicas: Replicas) -> Statistics:
    """All examples of all replicas, merged."""
    return merge_replicas(merge_along(parts, (0,)), replicas, saved)


def merge_labelled(
    parts: Statistics, labels: jax.Array, size: int, replicas: Replicas
) -> tuple[Statistics, Statistics]:
    """The statistics of each of ``size`` labels over all replicas; and, for each part, those of its label."""
    count, *rest = (v[None] for v in parts)
    own = jnp.broadcast_arrays(jnp.where(_own(labels, size, count.ndim), count, 0), *rest)
    merged = merge_replicas(Statistics(*(v[:, 0] for v in merge_along(Statistics(*own), (1,)))), replicas, saved)
    return merged, Statistics(*(of_label(v, labels) for v in vary(merged, labels)))


def shared_by_label(values: jax.Array, labels: jax.Array, size: int) -> jax.Array:
    """The sum of the values of each label, given to all that have it; zero where there is no such label.

    For many labels: `merge_labelled` takes time and memory for each label times each example.
    """
    typed, settings = jax.typeof(values).sharding, {"mode": "fill", "fill_value": 0}
    explicit = any(typed.spec)
    add = {"out_sharding": NamedSharding(typed.mesh, PartitionSpec(None, *typed.spec[1:]))} if explicit else {}
    get = {"out_sharding": typed} if explicit else {}
    zeros = vary(jnp.zeros((size, *values.shape[1:]), values.dtype), values)
    return zeros.at[labels].add(values, mode="drop", **add).at[labels].get(**settings, **get)


def of_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """The value of each label, zero if there is none: a gather that can be sharded, and whose transpose is a sum."""
    return jnp.sum(jnp.where(_own(labels, len(values), values.ndim + 1), values[:, None], 0), axis=0)


def _own(labels: jax.Array, size: int, ndim: int) -> jax.Array:
    """Whether the second index of an array of rank ``ndim`` has the first as its label."""
    return jnp.expand_dims(jnp.arange(size)[:, None] == labels[None], range(2, ndim))
