"""What the remedies share that measure every example by itself, and merge examples as they need.

A remedy passes no ``axis_name`` to the engine, which would merge the first example of one replica with the first of
another: it merges examples, and replicas, in its ``adjust``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import _axes
from jaxnorm._axes import Axes
from jaxnorm._moments import Moments, Statistics, merge_along
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


def given(function: str, running: Any, features: tuple[int, ...], x: jax.Array) -> Statistics:
    """The statistics that ``running`` averages stand for."""
    if not (hasattr(running, "mean") and hasattr(running, "var")):
        rule = "running must be RunningStats or Moments"
        _axes.fail(function, rule, {"type": type(running).__name__}, TypeError)
    mean, var = (
        _axes.check_parameter(function, f"running.{name}", getattr(running, name), features, x)
        for name in ("mean", "var")
    )
    if mean is None or var is None:
        _axes.fail(function, "running must have a mean and a variance", {"running": running}, TypeError)
    center = lax.stop_gradient(mean)
    return Statistics(jnp.ones_like(var), center, mean - center, var)


def merge_batch(parts: Statistics, replicas: Replicas) -> Statistics:
    """All examples of all replicas, merged."""
    return merge_replicas(merge_along(parts, (0,)), replicas, saved)


def merge_labelled(
    parts: Statistics, labels: jax.Array, size: int, replicas: Replicas
) -> tuple[Statistics, Statistics]:
    """The statistics of each of ``size`` labels over all replicas; and, for each part, those of its label."""
    own = jnp.arange(size)[:, None] == labels[None]
    own = jnp.expand_dims(own, range(2, 1 + parts.var.ndim))
    count, center, offset, var = (v[None] for v in parts)
    spread = jnp.broadcast_arrays(jnp.where(own, count, 0), center, offset, var)
    merged = merge_replicas(Statistics(*(v[:, 0] for v in merge_along(Statistics(*spread), (1,)))), replicas, saved)
    used = (jnp.take(v, labels, axis=0, mode="fill", fill_value=0) for v in vary(merged, labels))
    return merged, Statistics(*used)


def extract(batch: Moments, axes: Sequence[int]) -> Moments:
    """The moments in the shape of ``axes``."""
    return Moments(*(_axes.extract(m, tuple(axes)) for m in batch))
