"""What the remedies share that measure every example by itself, and merge examples as they need.

A remedy passes no ``axis_name`` to the engine, which would merge the first example of one replica with the first of
another: it merges examples, and replicas, in its ``adjust``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def check_running(function: str, running: Any, features: tuple[int, ...], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of ``running`` averages."""
    if not (hasattr(running, "mean") and hasattr(running, "var")):
        rule = "running must be RunningStats or Moments"
        _axes.fail(function, rule, {"type": type(running).__name__}, TypeError)
    mean, var = (
        _axes.check_parameter(function, f"running.{name}", getattr(running, name), features, x)
        for name in ("mean", "var")
    )
    if mean is None or var is None:
        _axes.fail(function, "running must have a mean and a variance", {"running": running}, TypeError)
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


def of_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """The value of each label, zero if there is none: a gather that can be sharded, and whose transpose is a sum."""
    return jnp.sum(jnp.where(_own(labels, len(values), values.ndim + 1), values[:, None], 0), axis=0)


def _own(labels: jax.Array, size: int, ndim: int) -> jax.Array:
    """Whether the second index of an array of rank ``ndim`` has the first as its label."""
    return jnp.expand_dims(jnp.arange(size)[:, None] == labels[None], range(2, ndim))


def regroup(examples: Statistics, parts: int) -> Statistics:
    """Examples that can be split into so many parts: gathered, if their explicit sharding does not allow for it."""
    typed = jax.typeof(examples.var).sharding
    names = typed.spec[0] if isinstance(typed.spec[0], tuple) else (typed.spec[0],)
    if typed.spec[0] is None or parts % math.prod(typed.mesh.shape[name] for name in names) == 0:
        return examples
    whole = NamedSharding(typed.mesh, P(None, *typed.spec[1:]))
    return Statistics(*(jax.sharding.reshard(v, whole) for v in examples))


def repeated(values: jax.Array, examples: jax.Array) -> jax.Array:
    """``values``, each as often as is needed for as many as there are ``examples``, and sharded as those."""
    shape = (len(values), len(examples) // len(values), *values.shape[1:])
    wide = jnp.broadcast_to(values[:, None], shape)
    return lax.reshape(wide, examples.shape, out_sharding=jax.typeof(examples).sharding)
