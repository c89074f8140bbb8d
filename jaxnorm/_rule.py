"""The differentiation rule, and the one affine map that every normalization is.

The statistics have a rule of their own, and it is a ``custom_jvp``, because that composes with every
transformation: forward mode, second derivatives, ``shard_map``, ``vmap``, ``pmap``. With weights w, n their sum and
xc = x - mean, their tangents are (Ioffe and Szegedy, "Batch Normalization", 2015, section 3, read forwards)

    t_mean = sum(w * t) / n        t_var = 2 * sum(w * t * xc) / n

whichever way the statistics themselves were computed. The rest, y = (x - mean) * rstd * scale + bias, has the
derivative that jax would find; the transpose of the two together is the textbook backward pass, with two sums over the
data and one collective.

The invertible mode is the same tangent, read from the output instead of the input; `_normalized_tangent` says how.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0

from jaxnorm import _axes
from jaxnorm._activations import NOTHING, After, check_activation, inverse_of
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
    total_over_channels,
    total_over_replicas,
    vary,
    weigh,
)
from jaxnorm._xla import fence, spread_alone, sum_over

STATISTICS, OUTPUT = "jaxnorm_stats", "jaxnorm_output"
"""Names in a ``jax.checkpoint`` policy: of the statistics, and of an output from which the input can be recovered."""

_save_only_named = partial(
    jax.checkpoint,  # pyright: ignore[reportPrivateImportUsage]
    policy=jax.checkpoint_policies.save_only_these_names(STATISTICS, OUTPUT),
    prevent_cse=False,
)


class Ends(NamedTuple):
    """What happens between the statistics and the output. Hashable, so that it can be static under ``jit``.

    Attributes:
      epsilon: added to the variance.
      dtype: of the output.
      activation: applied last, to what has the dtype of the output.
      inverse: of the activation, where the input is to be recovered from the output for the backward pass; or None.
    """

    epsilon: float
    dtype: Any
    activation: Callable[[jax.Array], jax.Array]
    inverse: Callable[[jax.Array], jax.Array] | None


def _named(statistics: Statistics) -> Statistics:
    def name(s):
        if jnp.iscomplexobj(s):  # jax 0.10 to 0.12 cannot save a complex number by name
            return lax.complex(name(s.real), name(s.imag))
        return checkpoint_name(s, STATISTICS)

    return Statistics(*map(name, statistics))


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def measure(
    x: jax.Array, stored: jax.Array, weights: jax.Array | None, reduction: Reduction, once: bool = False
) -> Statistics:
    """The statistics of ``x``. Of the two parts of the mean, only ``offset`` is differentiated.

    They are read from ``stored``, which is ``x`` in its own dtype and without derivative; in as few passes as can be
    where ``once``, as they are when somebody differentiates.
    """
    statistics = measure_locally(stored, weights, reduction, once)
    if reduction.channel_groups:
        statistics = merge(statistics, total_over_channels(reduction))
    if reduction.axis_name:
        statistics = merge_replicas(statistics, reduction)
    return _named(statistics)


@partial(measure.defjvp, symbolic_zeros=True)
def _measure_tangent(reduction, _, primals, tangents):
    x, stored, weights = primals
    t, _, t_weights = tangents
    statistics = _named(measure(x, stored, weights, reduction, True))
    centered = (x - statistics.center) - statistics.offset if reduction.centered else x
    return statistics, _tangent(statistics, centered, t, weights, t_weights, reduction)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero) or tangent is None or tangent.dtype == float0


def _tangent(
    statistics: Statistics, centered: jax.Array, t: Any, weights: jax.Array | None, t_weights: Any, reduction: Reduction
) -> Statistics:
    """The tangent of ``statistics``; ``t`` is that of the values, which lie ``centered`` about their mean."""
    count, _, offset, var = statistics
    first = second = jnp.zeros_like(centered)
    if not _is_zero(t):
        first, second = weigh(t, weights), 2 * weigh((centered.conj() * t).real, weights)
    values = (first, second)
    if weights is not None and not _is_zero(t_weights):
        t_weights = jnp.broadcast_to(t_weights, centered.shape)
        values = (first + t_weights * centered, second.real + t_weights * (abs_sq(centered) - var), t_weights)

    sums = _total(values, reduction)
    t_mean, t_var = (s / divisor(count) for s in sums[:2])
    t_count = sums[2] if len(sums) > 2 else jnp.zeros_like(count)
    if not reduction.centered:
        t_mean = jnp.zeros_like(offset)
    return Statistics(t_count, jnp.zeros_like(statistics.center), t_mean, t_var)


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


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _transform(dtype, values, x, weights, center, offset, rstd, scale, bias, residual):
    """``(values - center - offset) * rstd * scale + bias + residual``, in ``dtype``.

    All but ``values`` and ``rstd`` may be missing. ``values`` are what `_prepare` makes of ``x``; ``center`` is a
    constant. The derivative is the usual one, written out so that each sum of its transpose can read ``x`` and the
    cotangent `alone`.
    """
    z = values if center is None else values - center
    z = z if offset is None else z - offset
    z = z * rstd if scale is None else z * rstd * scale
    z = z if bias is None else z + bias
    z = z if residual is None else z + residual.astype(z.dtype)
    return z.astype(dtype)


@partial(_transform.defjvp, symbolic_zeros=True)
def _transform_tangent(dtype, primals, tangents):
    values, x, weights, center, offset, rstd, scale, *_ = primals
    t, _, _, _, t_offset, t_rstd, t_scale, t_bias, t_residual = tangents
    spread, zeros = partial(spread_alone, dtype=dtype), partial(jnp.zeros_like, values)

    def factor(t, rest, x, weights, center, offset):
        return _transform(values.dtype, _prepare(x, weights), x, weights, center, offset, t, rest, None, None)

    def summand(t, rest):
        return zeros() + (t if rest is None else t * rest)

    t_shift: Any = None
    if offset is not None and not (_is_zero(t_offset) and _is_zero(t_rstd)):
        t_shift = -(_dense(t_offset, offset) * rstd + offset * _dense(t_rstd, rstd))
    parts = (
        (t, lambda: t * rstd if scale is None else t * rstd * scale),
        (t_rstd, lambda: spread(factor)(t_rstd, scale, x, weights, center, None)),
        (t_shift, lambda: spread(summand)(t_shift, scale)),
        (t_scale, lambda: spread(factor)(t_scale, rstd, x, weights, center, offset)),
        (t_bias, lambda: spread(summand)(t_bias, None)),
        (t_residual, lambda: t_residual.astype(values.dtype)),
    )
    t_z = reduce(jnp.add, (part() for tangent, part in parts if not _is_zero(tangent)), zeros())
    return _transform(dtype, *primals), t_z.astype(dtype)


def _dense(tangent: Any, primal: jax.Array) -> jax.Array:
    return jnp.zeros_like(primal) if _is_zero(tangent) else tangent


def _affine(
    values: jax.Array,
    x: jax.Array,
    weights: jax.Array | None,
    statistics: Statistics,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    dtype: Any,
    centered: bool,
    epsilon: float,
) -> jax.Array:
    """``(x - mean) * rsqrt(var + epsilon) * scale + bias + residual``, in the fewest steps over the data."""
    _, center, offset, var = statistics
    rstd, transform = lax.rsqrt(var + epsilon), partial(_transform, dtype, values, x, weights)
    scale = jnp.ones_like(var) if scale is None else scale
    if not centered and bias is None:
        return transform(None, None, rstd, *vary((scale,), x), None, residual)
    bias = jnp.zeros_like(scale) if bias is None else bias

    rstd, offset = vary((rstd, offset), scale, bias)
    scale, bias = vary((scale, bias), rstd)
    if jnp.broadcast_shapes(scale.shape, rstd.shape) == rstd.shape:  # both are small: one multiplication and one sum
        multiplier = rstd * scale
        multiplier, constant = vary((multiplier, bias - offset * multiplier), x)
        return transform(center, None, multiplier, None, constant, residual)
    scale, bias = vary((scale, bias), x)
    return transform(center, offset, rstd, scale, bias, residual)


def _unaffine(
    z: jax.Array,
    statistics: Statistics,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    """``x - mean``, from what `_affine` made of it."""
    z = z if residual is None else z - residual.astype(z.dtype)
    z = z if bias is None else z - bias
    z = z if scale is None else z / scale
    return z * jnp.sqrt(statistics.var + epsilon)


def _prepare(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """``x`` in the dtype of the arithmetic; what is masked out may hold anything, so NaN and inf there become zero."""
    x = x.astype(_axes.statistics_dtype(x.dtype))
    return x if weights is None else jnp.where(measured(weights) | jnp.isfinite(x), x, 0)


def _normalized(x, weights, given, scale, bias, residual, reduction: Reduction | None, ends: Ends, once: bool = False):
    """The output, and the statistics: those ``given``, or where there is a ``reduction``, those of ``x``."""
    values, statistics = _prepare(x, weights), given
    if reduction is not None:
        statistics = measure(values, lax.stop_gradient(x), weights, reduction, once)
        statistics = _named(statistics) if once else statistics
    statistics = _constant_center(statistics)
    centered = reduction is None or reduction.centered
    z = _affine(
        values, x, weights, statistics, scale, bias, residual, dtype=ends.dtype, centered=centered, epsilon=ends.epsilon
    )
    y = ends.activation(z)
    if (y.shape, y.dtype) != (z.shape, ends.dtype):
        expected = f"{z.shape} and {ends.dtype}"
        raise ValueError(f"activation must keep shape and dtype, {expected}; got {y.shape} and {y.dtype}.")
    return y, statistics


_invertibly_normalized = jax.custom_jvp(_normalized, nondiff_argnums=(6, 7, 8))


@_invertibly_normalized.defjvp
def _normalized_tangent(reduction, ends, _, primals, tangents):
    """That of `_normalized`, from its output alone (Rota Bulo et al., "In-Place Activated BatchNorm", 2018).

    What is recovered is the input less its mean, on which nothing depends.
    """
    x, weights, given, scale, bias, residual = primals
    t, t_weights, t_statistics, *t_parameters = tangents
    y, statistics = _normalized(x, weights, given, scale, bias, residual, reduction, ends, True)
    y = checkpoint_name(y, OUTPUT)
    z = ends.inverse(fence(y).astype(statistics.offset.dtype))
    centered = _unaffine(z, statistics, scale, bias, residual, ends.epsilon)
    t = t.astype(centered.dtype)
    if reduction is not None:
        t_statistics = _tangent(statistics, centered, t, weights, t_weights, reduction)

    at_zero = statistics._replace(center=jnp.zeros_like(centered, shape=()), offset=jnp.zeros_like(statistics.offset))
    t_at_zero = t_statistics._replace(center=jnp.zeros_like(at_zero.center))

    def affine(values, *rest):
        return _affine(
            values,
            values,
            None,
            *rest,
            dtype=values.dtype,
            centered=reduction is None or reduction.centered,
            epsilon=ends.epsilon,
        )

    _, t_z = jax.jvp(affine, (centered, at_zero, scale, bias, residual), (t, t_at_zero, *t_parameters))
    _, t_y = jax.jvp(lambda z: ends.activation(z).astype(ends.dtype), (z,), (t_z,))
    return (y, statistics), (fence(t_y), t_statistics)


def _moments(statistics: Statistics) -> Moments:
    return Moments(statistics.center + statistics.offset, statistics.var, statistics.count)


@partial(jax.jit, static_argnames="reduction", inline=True)
def moments(x: jax.Array, weights: jax.Array | None, reduction: Reduction) -> Moments:
    """The moments of ``x`` over ``reduction``, reduced axes kept with size one."""

    @_save_only_named
    def run(x, weights):
        values = _prepare(x, weights)
        return _moments(_constant_center(measure(values, lax.stop_gradient(x), weights, reduction)))

    return run(x, weights)


@partial(jax.jit, static_argnames=("reduction", "ends"), inline=True)
def standardize(
    x: jax.Array,
    weights: jax.Array | None,
    given: Statistics | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    reduction: Reduction | None,
    ends: Ends,
) -> tuple[jax.Array, Moments]:
    """Normalize ``x`` by statistics ``given`` or by its own over ``reduction``. All arguments have the rank of ``x``.

    For the backward pass ``x`` is kept, in its own dtype, with the statistics; the rest is recomputed. Where there is
    an inverse, the output is kept in its place.
    """
    normalized = _normalized if ends.inverse is None else _invertibly_normalized

    @_save_only_named
    def run(x, weights, given, scale, bias, residual):
        y, statistics = normalized(x, weights, given, scale, bias, residual, reduction, ends, False)
        return y, _moments(statistics)

    return run(x, weights, given, scale, bias, residual)


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
    after: After = NOTHING,
) -> tuple[jax.Array, Moments]:
    """Check the arguments of ``function``; `standardize` by them. The moments keep the rank of ``x``."""
    weights = _axes.check_mask(function, mask, x)
    parameters = _parameters(function, x, features, scale=scale, bias=bias)
    residual = _axes.check_residual(function, after.residual, x)
    ends = _ends(function, x, scale, epsilon, dtype, after)
    return standardize(x, weights, None, *parameters, residual, reduction=reduction, ends=ends)


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
    after: After = NOTHING,
) -> jax.Array:
    """Check the arguments of ``function``; `standardize` by them."""
    mean, var, *parameters = _parameters(function, x, features, mean=mean, var=var, scale=scale, bias=bias)
    residual = _axes.check_residual(function, after.residual, x)
    ends = _ends(function, x, scale, epsilon, dtype, after)
    center = lax.stop_gradient(mean)
    given = Statistics(jnp.ones_like(var), center, mean - center, var)
    return standardize(x, None, given, *parameters, residual, reduction=None, ends=ends)[0]


def _parameters(function: str, x: jax.Array, features: tuple[int, ...], **named: Any) -> list[Any]:
    return [_axes.check_parameter(function, name, value, features, x) for name, value in named.items()]


def _ends(function: str, x: jax.Array, scale: Any, epsilon: Any, dtype: Any, after: After) -> Ends:
    epsilon, dtype = _axes.check_epsilon(function, epsilon), x.dtype if dtype is None else dtype
    activation, inverse = check_activation(function, after.activation), None
    if after.invertible:
        _axes.check_invertible_scale(function, scale)
        inverse = inverse_of(function, after.activation)
    return Ends(epsilon, dtype, activation, inverse)
