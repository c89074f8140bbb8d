"""The rule: statistics and their tangent, the affine map, and how the two are put together.

With weights w, n their sum and xc = x - mean, the statistics of an array have the tangents (Ioffe and Szegedy, "Batch
Normalization", 2015, section 3, read forwards)

    t_mean = sum(w * t) / n        t_var = 2 * sum(w * t * xc) / n

whichever way they were computed. That is a ``custom_jvp``, because it composes with every transformation: forward mode,
second derivatives, ``shard_map``, ``vmap``, ``pmap``. All else is plain jax: merging over replicas, what ``adjust``
makes of the statistics, and the map y = (x - mean) / sqrt(var + epsilon) * scale + bias. The transpose of it all is the
textbook backward pass, with two sums over the data and one collective.

What the derivative needs of the data it reads again from what is stored: the input, or in the invertible mode the
output (Rota Bulo et al., "In-Place Activated BatchNorm", 2018). That is all in which this mode differs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxnorm._axes import statistics_dtype
from jaxnorm._epilogue import STATELESS, Function, applied, hoist, identity
from jaxnorm._moments import ChannelGroups, Moments, Statistics, abs_sq, apply_weights, divisor, measure, measured
from jaxnorm._replicas import Replicas, merge_replicas, vary
from jaxnorm._xla import Map, apart, is_zero, optimization_barrier, recomputed, spread, sum_over

STATISTICS, OUTPUT = "jaxnorm_stats", "jaxnorm_output"
save_statistics = jax.checkpoint_policies.save_only_these_names(STATISTICS, OUTPUT)
"""A policy for ``jax.checkpoint``, ``nn.remat``, ``nnx.remat``: keeps statistics, and outputs of the invertible mode.

All else is computed again, but no reduction and no collective.
"""


class How(NamedTuple):
    """What does not depend on the data. Hashable, so that it can be static under ``jit``.

    Attributes:
      axes: what is reduced, in ascending order.
      centered: False where the mean is fixed at zero (RMS normalization).
      replicas: who shares the statistics.
      adjust: what becomes of them before they are used, or None. May give a pair: those used, and those reported.
      activation: applied last.
      inverse: of the activation, where the input is to be recovered from the output for the backward pass; or None.
      dtype: of the output.
      plain: True for ``jax.experimental.jet``, which knows neither conditionals nor derivatives of one's own.
    """

    axes: tuple[int, ...] = ()
    centered: bool = True
    replicas: Replicas = Replicas()
    adjust: Function | None = None
    activation: Function = identity
    inverse: Function | None = None
    dtype: Any = None
    plain: bool = False


def _named(name: str, value: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(value):  # jax 0.10 to 0.12 cannot save a complex number by name
        return lax.complex(_named(name, value.real), _named(name, value.imag))
    return checkpoint_name(value, name)


saved = partial(jax.tree.map, partial(_named, STATISTICS))
"""Statistics that `save_statistics` keeps."""


def _read(x: jax.Array, weights: jax.Array | None, residual: jax.Array | None) -> tuple[Any, Any]:
    """The data in the dtype of the arithmetic, zero where it is masked out and not finite."""
    x = x.astype(statistics_dtype(x.dtype))
    x = x if weights is None else jnp.where(measured(weights) | jnp.isfinite(x), x, 0)
    return x, None if residual is None else residual.astype(x.dtype)


def _from_mean(x: jax.Array, statistics: Statistics, origin: Statistics | None) -> jax.Array:
    """``x - mean``, where ``x`` is itself the distance from the mean of ``origin``, if there is one."""
    _, center, offset, _ = statistics if origin is None else _relative(statistics, origin)
    return (x - center) - offset


def _relative(statistics: Statistics, origin: Statistics) -> Statistics:
    center, offset = statistics.center - origin.center, statistics.offset - origin.offset
    return statistics._replace(center=lax.stop_gradient(center), offset=offset)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _statistics(how: How, read: Function, differentiated: bool, data, stored, weights, near, origin, known):
    """Of the data, which ``read(*stored)`` gives: ``known``, or measured. Of the mean, ``offset`` is differentiated."""
    if known is not None:
        return known
    settings = {"axes": how.axes, "centered": how.centered, "conditional": not how.plain}
    return measure(stored[0], weights, near, differentiated=differentiated, **settings)


@partial(_statistics.defjvp, symbolic_zeros=True)
def _statistics_tangent(how, read, _, primals, tangents):
    (t, _), _, t_weights, *_ = tangents
    _, stored, weights, _, origin, _ = primals
    statistics = saved(_statistics(how, read, True, *primals))

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


def _map(how: How, read: Function, data, stored, statistics, scale, bias, epsilon, closed_over) -> jax.Array:
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
    small, further = vary((small, closed_over), *data)
    after = None if how.activation is identity else partial(applied, how.activation)
    function = spread.fun if how.plain else spread
    return function(Map(read, _affine, after, how.dtype), data, stored, (center, *small), further)


def _measure(how: How, read: Function, data, stored, weights, near, origin=None, known=None, differentiated=False):
    """The statistics of this array, and of all replicas together."""
    function = _statistics.fun if how.plain else _statistics
    local = function(how, read, differentiated, data, stored, weights, near, origin, known)
    if not how.plain:
        local = local._replace(center=lax.stop_gradient(local.center))
    return local, merge_replicas(local, how.replicas, saved)


class Arguments(NamedTuple):
    """What is differentiated, all in the rank of ``x``; `standardize` says what it is."""

    x: jax.Array
    weights: jax.Array | None
    residual: jax.Array | None
    given: Statistics | None
    scale: jax.Array | None
    bias: jax.Array | None
    epsilon: jax.Array
    near: jax.Array | None = None
    of_adjust: tuple[jax.Array, ...] = ()
    of_activation: tuple[jax.Array, ...] = ()
    of_inverse: tuple[jax.Array, ...] = ()


def _standardize(
    how: How,
    a: Arguments,
    read: Function = _read,
    stored: Any = None,
    origin: Any = None,
    known: Any = None,
    differentiated: bool = False,
):
    """The output; the statistics measured and used; and, for who inverts it, those of this array."""
    data = _read(a.x, None, a.residual)  # of this only the derivative is used, which is that of what is stored
    stored = (a.x, a.weights, a.residual) if stored is None else stored
    local: Any = a.given
    statistics = used = local
    if local is None:
        local, statistics = _measure(how, read, data, stored, a.weights, a.near, origin, known, differentiated)
        adjust = apart(how.adjust) if isinstance(how.adjust, ChannelGroups) and not how.plain else how.adjust
        used = statistics if adjust is None else adjust(statistics, *a.of_adjust)
        if not isinstance(used, Statistics):
            used, statistics = used
    relative = used if origin is None else _relative(used, origin)
    y = _map(how, read, data, stored, relative, a.scale, a.bias, a.epsilon, a.of_activation)
    return y, statistics, used, local


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _invertible(how: How, a: Arguments):
    """`_standardize`, of which the derivative reads the output."""
    return _standardize(how, a)


@_invertible.defjvp
def _invertible_tangent(how, primals, tangents):
    y, *rest = _standardize(how, *primals, differentiated=True)
    y, (statistics, used, local) = _named(OUTPUT, y), map(saved, rest)

    def recovered(y, a, used):
        z = how.inverse(y.astype(used.offset.dtype), *a.of_inverse)
        residual = None if a.residual is None else a.residual.astype(z.dtype)
        z = z if residual is None else z - residual
        z = z if a.bias is None else z - a.bias
        z = z if a.scale is None else z * (1 / a.scale)  # a division for every value would cost XLA an array
        return z * jnp.sqrt(used.var + a.epsilon), residual

    stored = (optimization_barrier(y), primals[0]._replace(x=None), used)
    _, t = jax.jvp(lambda a: _standardize(how, a, recovered, stored, used, local), primals, tangents)
    return (y, statistics, used, local), (optimization_barrier(t[0]), *t[1:])


def _run(how: How, a: Arguments) -> tuple[jax.Array, Moments]:
    y, statistics, *_ = (_standardize if how.inverse is None else _invertible)(how, a)
    return y, _moments(statistics)


def _moments(statistics: Statistics) -> Moments:
    return Moments(statistics.center + statistics.offset, statistics.var, statistics.count)


_compiled = jax.jit(_run, static_argnums=0, inline=True)


def standardize(how: How, a: Arguments) -> tuple[jax.Array, Moments]:
    """Normalize ``x`` by statistics ``given`` or by its own. What is reduced stays with size one in the moments.

    For the backward pass ``x`` is kept, in its own dtype, with statistics; the rest is recomputed. Where there is an
    inverse, the output is kept in its place.
    """
    own, stateless = isinstance(how.adjust, ChannelGroups | None), any(how.activation is f for f in STATELESS)
    if own and stateless:
        return _compiled(how, a)
    data = _read(a.x, a.weights, a.residual)
    if not stateless:
        activation, of_activation = hoist(how.activation, data[0].astype(how.dtype))
        how, a = how._replace(activation=activation), a._replace(of_activation=of_activation)
    if how.inverse is not None and not stateless:
        inverse, of_inverse = hoist(how.inverse, data[0])
        how, a = how._replace(inverse=inverse), a._replace(of_inverse=of_inverse)
    if how.inverse is not None and how.adjust is not None and not own:
        _, statistics = _measure(how, _read, data, (a.x, a.weights, a.residual), a.weights, a.near)
        adjust, of_adjust = hoist(how.adjust, statistics)
        how, a = how._replace(adjust=adjust), a._replace(of_adjust=of_adjust)
    return _run(how, a)


@partial(jax.jit, static_argnums=0, inline=True)
def statistics(how: How, x: jax.Array, weights: jax.Array | None, near: jax.Array | None) -> Statistics:
    """The statistics of ``x``, reduced axes kept with size one."""
    stored = (x, weights, None)
    return _measure(how, _read, _read(*stored), stored, weights, near)[1]


@partial(jax.jit, static_argnums=0, inline=True)
def moments(how: How, x: jax.Array, weights: jax.Array | None, near: jax.Array | None) -> Moments:
    """`statistics`, rounded."""
    return _moments(statistics(how, x, weights, near))


def pointwise(formula: Function, x: jax.Array, weights: jax.Array | None, *small: jax.Array | None) -> jax.Array:
    """``formula(x, *small)``, which need not be affine, in the dtype of ``x``; ``x`` alone is kept to derive it.

    The arithmetic is that of the statistics; NaN and inf that are masked out read as zero.
    """
    stored = (x, weights, None)
    how = Map(_read, lambda x, _, *small: formula(x, *small), None, x.dtype)
    return spread(how, _read(*stored), stored, vary(small, x), ())
