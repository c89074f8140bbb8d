"""The differentiation rule, and the one affine map that every normalization is.

Only the statistics have a rule of their own, and it is a ``custom_jvp``, because that composes with every
transformation: forward mode, second derivatives, ``shard_map``, ``vmap``, ``pmap``. With weights w, n their sum and
xc = x - mean, their tangents are (Ioffe and Szegedy, "Batch Normalization", 2015, section 3, read forwards)

    t_mean = sum(w * t) / n        t_var = 2 * sum(w * t * xc) / n

whichever way the statistics themselves were computed. The rest, y = (x - mean) * rstd * scale + bias, is differentiated
by jax; the transpose of the two together is the textbook backward pass, with two sums over the data and one collective.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxnorm import _axes
from jaxnorm._moments import (
    Moments,
    Reduction,
    Statistics,
    abs_sq,
    divisor,
    measure_locally,
    measured,
    merge,
    merge_replicas,
    sum_over,
    total_over_channels,
    total_over_replicas,
    vary,
    weigh,
)

STATISTICS = "jaxnorm_stats"
"""The name of the statistics in a ``jax.checkpoint`` policy."""

_save_only_statistics = partial(
    jax.checkpoint,  # pyright: ignore[reportPrivateImportUsage]
    policy=jax.checkpoint_policies.save_only_these_names(STATISTICS),
    prevent_cse=False,
)


def _named(statistics: Statistics) -> Statistics:
    def name(s):
        if jnp.iscomplexobj(s):  # jax 0.10 to 0.12 cannot save a complex number by name
            return lax.complex(name(s.real), name(s.imag))
        return checkpoint_name(s, STATISTICS)

    return Statistics(*map(name, statistics))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def measure(x: jax.Array, weights: jax.Array | None, reduction: Reduction) -> Statistics:
    """The statistics of ``x``. Of the two parts of the mean, only ``offset`` is differentiated."""
    statistics = measure_locally(x, weights, reduction)
    if reduction.channel_groups:
        statistics = merge(statistics, total_over_channels(reduction))
    if reduction.axis_name:
        statistics = merge_replicas(statistics, reduction)
    return _named(statistics)


@partial(measure.defjvp, symbolic_zeros=True)
def _measure_tangent(reduction, primals, tangents):
    x, weights = primals
    t, t_weights = tangents
    statistics = _named(measure(x, weights, reduction))
    count, center, offset, var = statistics
    centered = (x - center) - offset

    first = second = jnp.zeros_like(x)
    if not isinstance(t, SymbolicZero):
        first, second = weigh(t, weights), 2 * weigh((centered.conj() * t).real, weights)
    values = (first, second)
    if weights is not None and not isinstance(t_weights, SymbolicZero):
        t_weights = jnp.broadcast_to(t_weights, x.shape)
        values = (first + t_weights * centered, second.real + t_weights * (abs_sq(centered) - var), t_weights)

    sums = _total(values, reduction)
    t_mean, t_var = (s / divisor(count) for s in sums[:2])
    t_count = sums[2] if len(sums) > 2 else jnp.zeros_like(count)
    if not reduction.centered:
        t_mean = jnp.zeros_like(offset)
    return statistics, Statistics(t_count, jnp.zeros_like(center), t_mean, t_var)


def _total(values: tuple[jax.Array, ...], reduction: Reduction) -> tuple[jax.Array, ...]:
    """Sums over everything that shares its statistics."""
    values = tuple(sum_over(v, reduction.axes) for v in values)
    if reduction.channel_groups:
        values = total_over_channels(reduction)(*values)
    if reduction.axis_name:
        values = total_over_replicas(reduction)(*values)
    return values


def _constant_center(statistics: Statistics) -> Statistics:
    """Drop the tangent of ``center``, which is zero: whatever uses it need not carry zeros along."""
    return statistics._replace(center=lax.stop_gradient(statistics.center))


def _affine(
    x: jax.Array,
    statistics: Statistics,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    """``(x - mean) * rsqrt(var + epsilon) * scale + bias``, in the fewest steps over the data."""
    _, center, offset, var = statistics
    scale = jnp.ones_like(var) if scale is None else scale
    bias = jnp.zeros_like(scale) if bias is None else bias

    rstd = lax.rsqrt(var + epsilon)
    rstd, shift = vary((rstd, -offset * rstd), scale, bias)
    scale, bias = vary((scale, bias), rstd)
    if jnp.broadcast_shapes(scale.shape, rstd.shape) == rstd.shape:  # both are small: one multiplication and one sum
        multiplier, constant = vary((rstd * scale, shift * scale + bias), x)
        return (x - center) * multiplier + constant
    scale, bias = vary((scale, bias), x)
    return ((x - center) * rstd + shift) * scale + bias


def _prepare(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """``x`` in the dtype of the arithmetic; what is masked out may hold anything, so NaN and inf there become zero."""
    x = x.astype(_axes.statistics_dtype(x.dtype))
    return x if weights is None else jnp.where(measured(weights) | jnp.isfinite(x), x, 0)


def _moments(statistics: Statistics) -> Moments:
    return Moments(statistics.center + statistics.offset, statistics.var, statistics.count)


@partial(jax.jit, static_argnames="reduction", inline=True)
def moments(x: jax.Array, weights: jax.Array | None, reduction: Reduction) -> Moments:
    """The moments of ``x`` over ``reduction``, reduced axes kept with size one."""

    @_save_only_statistics
    def run(x, weights):
        return _moments(_constant_center(measure(_prepare(x, weights), weights, reduction)))

    return run(x, weights)


@partial(jax.jit, static_argnames=("reduction", "epsilon", "dtype"), inline=True)
def standardize(
    x: jax.Array,
    weights: jax.Array | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    reduction: Reduction,
    epsilon: float,
    dtype: Any,
) -> tuple[jax.Array, Moments]:
    """Normalize ``x`` by its own statistics. All arguments have the rank of ``x``.

    For the backward pass ``x`` is kept, in its own dtype, with the statistics; the rest is recomputed.
    """

    @_save_only_statistics
    def run(x, weights, scale, bias):
        x = _prepare(x, weights)
        statistics = _constant_center(measure(x, weights, reduction))
        return _affine(x, statistics, scale, bias, epsilon).astype(dtype), _moments(statistics)

    return run(x, weights, scale, bias)


@partial(jax.jit, static_argnames=("epsilon", "dtype"), inline=True)
def standardize_by(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: float,
    dtype: Any,
) -> jax.Array:
    """Normalize ``x`` by statistics given. All arguments have the rank of ``x``."""

    @_save_only_statistics
    def run(x, mean, var, scale, bias):
        center = lax.stop_gradient(mean)
        statistics = Statistics(jnp.ones_like(var), center, mean - center, var)
        return _affine(_prepare(x, None), statistics, scale, bias, epsilon).astype(dtype)

    return run(x, mean, var, scale, bias)


def normalize_by_own(
    function: str,
    x: jax.Array,
    scale: Any,
    bias: Any,
    *,
    features: tuple[int, ...],
    reduction: Reduction,
    epsilon: Any,
    mask: Any = None,
    dtype: Any = None,
) -> tuple[jax.Array, Moments]:
    """Check the arguments of ``function``; `standardize` by them. The moments keep the rank of ``x``."""
    return standardize(
        x,
        _axes.check_mask(function, mask, x),
        _axes.check_parameter(function, "scale", scale, features, x),
        _axes.check_parameter(function, "bias", bias, features, x),
        reduction=reduction,
        epsilon=_axes.check_epsilon(function, epsilon),
        dtype=x.dtype if dtype is None else dtype,
    )


def normalize_by_given(
    function: str,
    x: jax.Array,
    mean: Any,
    var: Any,
    scale: Any,
    bias: Any,
    *,
    features: tuple[int, ...],
    epsilon: Any,
    dtype: Any = None,
) -> jax.Array:
    """Check the arguments of ``function``; `standardize_by` them."""
    named = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    return standardize_by(
        x,
        *(_axes.check_parameter(function, name, value, features, x) for name, value in named.items()),
        epsilon=_axes.check_epsilon(function, epsilon),
        dtype=x.dtype if dtype is None else dtype,
    )
