"""Moments: measured over axes and masks, merged over everything else.

Statistics form a monoid. What is measured on one array is a triple (count, mean, variance); what several arrays
hold together (channels of a group, replicas, microbatches, a whole data set) is always obtained by *merging* such
triples, with the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
sample variances", 1979), and never by averaging means.

The mean is kept as a pair: a reference point ``center`` near it, and the ``offset`` from there. Values are compared
with the center first, so that a mean of 1e6 with a deviation of 1 loses nothing.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._axes import statistics_dtype
from jaxnorm._xla import by_itself, is_large, platform, settle, sum_over

STRIDE = 256
"""A center that is sampled is the mean of one position in so many of the data."""

NEAR = 4
"""Sums about zero are good enough while the square of the mean is at most so many variances, of every feature."""


class Moments(NamedTuple):
    """Mean, biased variance and number of values of each feature, as `moments` measures them: see its example.

    Attributes:
      mean: the mean, in the shape of the axes not reduced, the dtype of the statistics and the unit of the data.
      var: the variance about it, divided by ``count`` (not ``count - 1``); real, in that shape and the squared unit.
      count: how many values they were measured on, or the sum of their weights; real, in the same shape.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


class Statistics(NamedTuple):
    """`Moments` before rounding, as the argument ``adjust`` of `standardize` gets them and gives them back.

    The example of `standardize` changes one. All have the rank of the data, with size one where it was reduced.

    Attributes:
      count: how many values there are, or the sum of their weights. Where it is zero, nothing is normalized.
      center: a point near the mean, in the unit of the data; to differentiation a constant.
      offset: the mean less the center.
      var: the biased variance, real, in the squared unit.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    center: jax.Array
    offset: jax.Array
    var: jax.Array


def abs_sq(x: jax.Array) -> jax.Array:
    """|x|^2, without the square root that ``abs`` takes of a complex number."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def apply_weights(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """``weights * values``, zero wherever the weight is, whatever the value."""
    if weights is None:
        return values
    return jnp.where(measured(weights), values if weights.dtype == jnp.bool_ else weights * values, 0)


def measured(weights: jax.Array) -> jax.Array:
    """Where values count."""
    return weights if weights.dtype == jnp.bool_ else weights != 0


def divisor(count: jax.Array) -> jax.Array:
    """``count``, or one where it is zero: what was summed there is zero as well."""
    return count + (count == 0).astype(count.dtype)


def count_over(sums: jax.Array, x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """How many values of ``x``, or how much weight, each of its ``sums`` over ``axes`` holds; typed as those are."""
    zero = jnp.zeros_like(sums.real)
    summed = [x.shape[a] for a in axes if weights is None or weights.shape[a] == 1]
    size = jnp.asarray(math.prod(summed), zero.dtype)  # of a dimension that is a symbol as well
    return zero + (size if weights is None else sum_over(weights.astype(zero.dtype), axes) * size)


def sample(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A sample of the reduced axes that are neither the batch nor split over devices: one position in `STRIDE`.

    Or more often, so that there are four of them at least; they are spread over all of those axes. Of the last axis a
    part is read in one piece instead, since memory is read in lines.
    """
    spec, last = jax.typeof(x).sharding.spec, x.ndim - 1
    free = [a for a in axes if a > 0 and spec[a] is None and isinstance(x.shape[a], int)]
    if free == [last]:
        length = x.shape[last]
        size = max(-(-length // STRIDE), min(length, 4))
        return lax.slice_in_dim(x, (length - size) // 2, (length + size) // 2, axis=last)
    free = [a for a in free if a != last]
    starts, strides = [0] * x.ndim, [1] * x.ndim
    for a in free:
        stride, positions = int(STRIDE ** (1 / len(free))), math.ceil(4 ** (1 / len(free)))
        strides[a] = max(1, min(stride, x.shape[a] // positions))
        starts[a] = min(strides[a] // 2, (x.shape[a] - 1) % strides[a])
    return lax.slice(x, starts, x.shape, strides) if free else x


def measure(
    x: jax.Array,
    weights: jax.Array | None,
    near: jax.Array | None,
    *,
    axes: tuple[int, ...],
    centered: bool,
    differentiated: bool,
    conditional: bool,
) -> Statistics:
    """The statistics of one array over ``axes``, in as few passes over it as the platform allows.

    Sums about a point K lose a factor of about ``1 + (mean - K)^2 / var`` roundings to cancellation. The mean of a
    `sample` serves as K: if it is a fraction f of the data, ``(mean - K)^2 <= var / f`` for any data. What is known
    before the data is costs less: ``near``, or zero.

    - A CPU tries what is known, and measures again if the bound of `NEAR` is broken, unless nothing is ``conditional``.
    - Chips take what is known for bfloat16 data: sums about it are computed by the convolution that the data comes
      from. Rounding to eight bits has changed the variance by ``2^-19 (mean / std)^2`` already, and sums in float32
      about zero change it by less.
    - Rows that lie in one piece and that nobody differentiates can be held by a kernel of a GPU or a CPU, read again,
      and normalized too. So K is the mean there, and so it is with weights, by which a sample could be empty.
    """
    rows = axes == (x.ndim - 1,) and not differentiated
    dtype, where = statistics_dtype(x.dtype), platform(x)

    def sum_of(power, part, *center):
        values = part.astype(dtype)
        for c in center:
            values = values - c if weights is None else jnp.where(measured(weights), values - c, 0)
        return sum_over(apply_weights(power(values), weights), axes)

    def mean_of(part):
        first = sum_of(lambda v: v, part)
        return settle(first / divisor(count_over(first, part, weights, axes)))

    def about(x, *center, call=lambda function, *args: function(*args)):
        offset, second = (call(partial(sum_of, power), x, *center) for power in (lambda v: v, abs_sq))
        count = count_over(offset, x, weights, axes)
        n = divisor(count)
        offset, second, start = offset / n, second / n, sum(center, jnp.zeros_like(offset))
        return Statistics(count, start, offset, jnp.maximum(second - abs_sq(offset), 0))

    def about_sample(x):
        return about(x, mean_of(sample(x, axes)))

    if not centered:
        second = sum_of(abs_sq, x)
        count, zero = count_over(second, x, weights, axes), jnp.zeros_like(second, dtype)
        return Statistics(count, zero, zero, second / divisor(count))
    if weights is not None or (rows and where != "tpu"):
        return about(x, mean_of(x))
    known = () if near is None else (near,)
    if where == "cpu" and is_large(x.shape) and conditional:
        computed = known or x.dtype != dtype  # what both sums read
        found = about(x, *known, call=by_itself) if computed else about(x)
        good = jnp.all(abs_sq(found.offset) <= NEAR * found.var)
        return lax.cond(good, lambda x: found, about_sample, x)._replace(count=found.count)
    if where != "cpu" and x.dtype == jnp.bfloat16:
        return about(x, *known)
    return about_sample(x)


Total = Callable[..., tuple[jax.Array, ...]]
"""Sums each of its arguments over the parts that are being merged."""


def merge(parts: Statistics, total: Total) -> Statistics:
    """The statistics of all parts together (Chan et al., equation 2.1b), about a common center."""
    count, center = total(parts.count, parts.count * (parts.center + parts.offset))
    center = lax.stop_gradient(settle(center / divisor(count)))
    share = parts.count / divisor(count)
    shift = (parts.center - center) + parts.offset
    offset, second = total(share * shift, share * (parts.var + abs_sq(shift)))
    var = second - abs_sq(offset)
    return Statistics(count, center, offset, jnp.where(var < 0, 0, var))  # where it is zero, its gradient passes whole


def merge_along(parts: Statistics, axes: tuple[int, ...]) -> Statistics:
    """Merge parts that lie along ``axes``, which stay with size one."""
    return merge(parts, lambda *values: tuple(jnp.sum(v, axes, keepdims=True) for v in values))
