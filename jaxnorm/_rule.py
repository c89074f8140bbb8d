"""The rule: statistics and their tangent, and the affine map.

With weights w, n their sum and xc = x - mean, the statistics of an array have the tangents (Ioffe and Szegedy, "Batch
Normalization", 2015, section 3, read forwards)

    t_mean = sum(w * t) / n        t_var = 2 * sum(w * t * xc) / n

whichever way they were computed. That is a ``custom_jvp``, because it composes with every transformation: forward mode,
second derivatives, ``shard_map``, ``vmap``, ``pmap``. All else is plain jax: merging over replicas, what ``adjust``
makes of the statistics, and the map y = (x - mean) / sqrt(var + epsilon) * scale + bias. The transpose of it all is the
textbook backward pass, with two sums over the data and one collective.

What the derivative needs of the data it reads again from what is stored: `as_stored` reads the input, and in the
invertible mode another function reads the output. `_engine` puts it all together.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxnorm._axes import statistics_dtype
from jaxnorm._epilogue import Function, applied, identity
from jaxnorm._moments import Statistics, abs_sq, apply_weights, divisor, measure, measured
from jaxnorm._replicas import Replicas, vary
from jaxnorm._xla import Map, is_zero, platform, recomputed, spread, sum_over

STATISTICS, OUTPUT = "jaxnorm_stats", "jaxnorm_output"


class How(NamedTuple):
    """What does not depend on the data. Hashable, so that it can be static under ``jit``.

    Attributes:
      axes: what is reduced, in ascending order.
      features: the axes of scale, bias and statistics that are given, in their order.
      kept: the axes of the moments that are reported; None for no report.
      centered: False where the mean is fixed at zero (RMS normalization).
      replicas: who shares the statistics.
      adjust: what becomes of them before they are used, or None. May give a pair: those used, and those reported.
      activation: applied last.
      inverse: of the activation, where the input is to be recovered from the output for the backward pass; or None.
      dtype: of the output.
      plain: True for ``jax.experimental.jet``, which knows neither conditionals nor derivatives of one's own.
    """

    axes: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    kept: tuple[int, ...] | None = None
    centered: bool = True
    replicas: Replicas = Replicas()
    adjust: Function | None = None
    activation: Function = identity
    inverse: Function | None = None
    dtype: Any = None
    plain: bool = False


def named(name: str, value: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(value):  # jax 0.10 to 0.12 cannot save a complex number by name
        return lax.complex(named(name, value.real), named(name, value.imag))
    return checkpoint_name(value, name)


saved = partial(jax.tree.map, partial(named, STATISTICS))
"""Statistics that `save_statistics` keeps."""


def as_stored(x: jax.Array, weights: jax.Array | None, residual: jax.Array | None) -> tuple[Any, Any]:
    """The data in the dtype of the arithmetic, zero where it is masked out and not finite."""
    x = x.astype(statistics_dtype(x.dtype))
    x = x if weights is None else jnp.where(measured(weights) | jnp.isfinite(x), x, 0)
    return x, None if residual is None else residual.astype(x.dtype)


def _from_mean(x: jax.Array, statistics: Statistics, origin: Statistics | None) -> jax.Array:
    """``x - mean``, where ``x`` is itself the distance from the mean of ``origin``, if there is one."""
    _, center, offset, _ = statistics if origin is None else relative(statistics, origin)
    return (x - center) - offset


def relative(statistics: Statistics, origin: Statistics) -> Statistics:
    center, offset = statistics.center - origin.center, statistics.offset
    return statistics._replace(center=center, offset=None if offset is None else offset - origin.offset)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def measured_statistics(how: How, read: Function, differentiated: bool, data, stored, weights, near, origin, known):
    """Of the data, which ``read(*stored)`` gives: ``known``, or measured. Of the mean, ``offset`` is differentiated."""
    if known is not None:
        return known
    settings = {"axes": how.axes, "centered": how.centered, "conditional": not how.plain}
    return measure(stored[0], weights, near, differentiated=differentiated, **settings)


@partial(measured_statistics.defjvp, symbolic_zeros=True)
def _statistics_tangent(how, read, _, primals, tangents):
    (t, _), _, t_weights, *_ = tangents
    _, stored, weights, _, origin, _ = primals
    statistics = saved(measured_statistics(how, read, True, *primals))

    def tangent(t, t_weights, stored, weights, origin, statistics):
        x, n = read(*stored)[0], divisor(statistics.count)
        xc = _from_mean(x, statistics, origin) if how.centered else x
        first = second = third = jnp.zeros_like(x)
        if not is_zero(t):
            first, second = apply_weights(t, weights), 2 * apply_weights((xc.conj() * t).real, weights)
        if not is_zero(t_weights):
            third = jnp.broadcast_to(t_weights, x.shape)
            first, second = first + third * xc, second + third * (abs_sq(xc) - statistics.var)
        t_mean, t_var, t_count = (sum_over(v, how.axes) for v in (first, second, third.real))
        t_mean = t_mean / n if how.centered else jnp.zeros_like(t_mean)
        return Statistics(t_count, jnp.zeros_like(t_mean), t_mean, t_var / n)

    t, t_weights = (None if is_zero(v) else v for v in (t, t_weights))
    return statistics, recomputed(tangent)(t, t_weights, stored, weights, origin, statistics)


def _affine(x, residual, center, offset, multiplier, scale, constant) -> jax.Array:
    """``(x - center - offset) * multiplier * scale + constant + residual``, in which much may be missing."""
    z = x if center is None else x - center
    z = z if offset is None else z - offset
    z = z * multiplier if scale is None else z * multiplier * scale
    z = z if constant is None else z + constant
    return z if residual is None else z + residual


def normalized(how: How, read: Function, data, stored, statistics, scale, bias, epsilon, closed_over) -> jax.Array:
    """``(x - mean) / sqrt(var + epsilon) * scale + bias``, then the epilogue; of what has no values, ``bias``."""
    count, center, offset, var = statistics
    rstd = (count > 0).astype(var.dtype) / jnp.sqrt(var + epsilon)
    if scale is None:
        scale = jnp.ones_like(rstd)
    if not how.centered:
        center = offset = None
    elif bias is None:
        bias = jnp.zeros_like(scale)
    small = (offset, rstd, scale, bias)
    if jnp.broadcast_shapes(rstd.shape, scale.shape) != data[0].shape:  # their product is smaller than the data
        offset, rstd, scale, bias = vary(small)
        multiplier = rstd * scale
        small = (None, multiplier, None, bias if offset is None else bias - offset * multiplier)
    small = vary((center, *small), *data)  # what the activation closes over it varies by itself
    function = spread.fun if how.plain else spread
    if how.activation is identity:
        return function(Map(read, _affine, None, how.dtype), data, stored, small, ())
    after = partial(applied, how.activation)
    if platform(data) != "cpu":
        return function(Map(read, _affine, after, how.dtype), data, stored, small, closed_over)
    # XLA's sums on a CPU do not compute the derivative of an activation as they read: each would store the cotangent
    # that it sums, in float32. So there the activation is a map of its own, which computes its input again.
    affine = Map(read, _affine, None, how.dtype)
    z = function(affine, data, stored, small, ())
    after = Map(lambda *stored: (spread.fun(affine, (), *stored, ()),), lambda z: z, after, how.dtype)
    return function(after, (z,), (stored, small), (), closed_over)
