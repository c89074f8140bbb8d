"""Moments: measured over axes and masks, merged over everything else.

Statistics form a monoid. What is measured on one array is a triple (count, mean, variance); what several arrays
hold together (channels of a group, replicas, microbatches, a whole data set) is always obtained by *merging* such
triples, with the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
sample variances", 1979), and never by averaging means.

The mean is kept as a pair: a reference point ``center`` near it, and the ``offset`` from there. Values are compared
with the center first, so that a mean of 1e6 with a deviation of 1 loses nothing.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import _axes
from jaxnorm._xla import alone, settle, sum_alone, sum_over

GATHER_LIMIT = 32
"""Up to so many replicas exchange their moments in one collective, each in a slot of its own; more of them agree on a
center first, so that what is exchanged does not grow with their number."""

STRIDE = 256
"""The center is the mean of one position in so many of the data."""


class Moments(NamedTuple):
    """Mean, biased variance and number of values of each feature.

    Attributes:
      mean: the mean, in the dtype of the statistics.
      var: the variance about it, divided by ``count`` (not ``count - 1``); real.
      count: how many values they were measured on, or the sum of their weights; real, in the shape of ``mean``.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


class Statistics(NamedTuple):
    """`Moments` before rounding: the mean is ``center + offset``. All have the rank of the data."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    center: jax.Array
    offset: jax.Array
    var: jax.Array


class Reduction(NamedTuple):
    """Which values share their statistics. Hashable, so that it can be static under ``jit``.

    Attributes:
      axes: the axes that are summed over, in ascending order.
      channel_groups: (channel axis, number of groups), where neighbouring channels share their statistics.
      axis_name: the mapped axes over which replicas share theirs.
      axis_index_groups: which replicas do; None for all of them.
      centered: False where the mean is fixed at zero (RMS normalization).
    """

    axes: tuple[int, ...]
    channel_groups: tuple[int, int] | None = None
    axis_name: tuple[Hashable, ...] = ()
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    centered: bool = True


Total = Callable[..., tuple[jax.Array, ...]]
"""Sums each of its arguments over the parts that are being merged."""


def abs_sq(x: jax.Array) -> jax.Array:
    """|x|^2, without the square root that ``abs`` takes of a complex number."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def weigh(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """``weights * values``, zero wherever the weight is, whatever the value."""
    if weights is None:
        return values
    if weights.dtype == jnp.bool_:
        return jnp.where(weights, values, 0)
    return jnp.where(weights != 0, weights * values, 0)


def measured(weights: jax.Array) -> jax.Array:
    """Where values count."""
    return weights if weights.dtype == jnp.bool_ else weights != 0


def not_negative(var: jax.Array) -> jax.Array:
    """A variance that rounding may have left below zero; where it is zero, its gradient passes whole."""
    return jnp.where(var < 0, 0, var)


def divisor(count: jax.Array) -> jax.Array:
    """``count``, or one where it is zero: what was summed there is zero as well."""
    return jnp.where(count > 0, count, 1)


def count_over(sums: jax.Array, x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """How many values of ``x``, or how much weight, each of its ``sums`` over ``axes`` holds; typed as those are."""
    zero = jnp.zeros_like(sums.real)
    if weights is None:
        return zero + float(math.prod(x.shape[a] for a in axes))
    repeats = math.prod(x.shape[a] for a in axes if weights.shape[a] == 1)
    return zero + sum_over(weights.astype(zero.dtype), axes) * float(repeats)


def sliced(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A sample of the reduced axes that are neither the batch nor split over devices: one position in `STRIDE`.

    Or more often, so that there are four of them at least; they are spread over all of those axes. Of the last axis a
    part is read in one piece instead, since memory is read in lines.
    """
    spec, last = jax.typeof(x).sharding.spec, x.ndim - 1
    free = [a for a in axes if a > 0 and spec[a] is None]
    if free == [last]:
        length = x.shape[last]
        size = max(-(-length // STRIDE), min(length, 4))
        return lax.slice_in_dim(x, (length - size) // 2, (length + size) // 2, axis=last)
    free = [a for a in free if a != last]
    starts, strides = [0] * x.ndim, [1] * x.ndim
    for a in free:
        stride, positions = (round(n ** (1 / len(free))) for n in (STRIDE, 4))
        strides[a] = max(1, min(stride, x.shape[a] // positions))
        starts[a] = min(strides[a] // 2, (x.shape[a] - 1) % strides[a])
    return lax.slice(x, starts, x.shape, strides)


def measure_locally(x: jax.Array, weights: jax.Array | None, reduction: Reduction, once: bool) -> Statistics:
    """The statistics of one array over ``reduction.axes``, shifted by the mean of a slice.

    If the slice is a fraction f of the data, its mean K is never further from the mean than the square root of var / f,
    so that ``mean((x - K)^2) - mean(x - K)^2`` loses at most a factor 1 + 1/f to cancellation, for any data; what the
    sums themselves lose is besides. A weighted slice could be empty, so with weights, or where there is no axis to
    slice, the slice is everything. So it is, unless the data should be read ``once``, where rows are reduced that lie
    in one piece: on a GPU or a CPU one kernel can hold them, read them again, and normalize them too.
    """
    axes, dtype = reduction.axes, _axes.statistics_dtype(x.dtype)
    rows = axes == (x.ndim - 1,)

    def total(part, *center, power=lambda v: v):
        def of(part, weights, *center):
            values = part.astype(dtype)
            for c in center:
                values = values - c if weights is None else jnp.where(measured(weights), values - c, 0)
            return weigh(power(values), weights)

        if rows and not once:
            return sum_over(of(part, weights, *center), axes)
        return sum_alone(of, axes, in_turn=once)(part, weights, *center)

    def mean(part):
        first = total(part)
        return first / divisor(count_over(first, part, weights, axes))

    def mean_of_slice(x):
        return mean(sliced(x, axes))

    if not reduction.centered:
        second = total(x, power=abs_sq)
        count, zero = count_over(second, x, weights, axes), jnp.zeros_like(second, dtype)
        return Statistics(count, zero, zero, second / divisor(count))

    if weights is not None:
        center = mean(x)
    elif rows and not once:
        center = lax.platform_dependent(x, tpu=mean_of_slice, default=mean)
    else:
        center = mean_of_slice(x)
    center = settle(center)
    count = count_over(center, x, weights, axes)
    offset, var = total(x, center) / divisor(count), total(x, center, power=abs_sq) / divisor(count)
    return Statistics(count, center, offset, jnp.maximum(var - abs_sq(offset), 0))


def merge(parts: Statistics, total: Total) -> Statistics:
    """The statistics of all parts together (Chan et al., equation 2.1b), about a common center."""
    count, center = total(parts.count, parts.count * parts.center)
    center = settle(center / divisor(count))
    share = parts.count / divisor(count)
    shift = (parts.center - center) + parts.offset
    offset, second = total(share * shift, share * (parts.var + abs_sq(shift)))
    return Statistics(count, center, offset, not_negative(second - abs_sq(offset)))


def stack(values: tuple[jax.Array, ...]) -> jax.Array:
    """All ``values`` in one array, so that one collective serves them."""
    return jnp.stack(jnp.broadcast_arrays(*values))


def unstack(packed: jax.Array, like: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Undo `stack`; what was real there is real again."""
    return tuple(p if jnp.iscomplexobj(v) else p.real for p, v in zip(packed, like, strict=True))


def merge_stacked(parts: Statistics) -> Statistics:
    """Merge parts that lie along the first axis."""
    merged = merge(parts, lambda *values: tuple(jnp.sum(v, 0, keepdims=True) for v in values))
    return Statistics(*(m[0] for m in merged))


def total_over_channels(reduction: Reduction) -> Total:
    """Sums over the channels of a group, given back to each of them."""
    axis, groups = reduction.channel_groups or (0, 1)
    place = axis - sum(a < axis for a in reduction.axes)

    def one(v):
        v = jnp.squeeze(v, reduction.axes)
        by_group = v.reshape(*v.shape[:place], groups, v.shape[place] // groups, *v.shape[place + 1 :])
        total = jnp.broadcast_to(jnp.sum(by_group, place + 1, keepdims=True), by_group.shape)
        return jnp.expand_dims(total.reshape(v.shape), reduction.axes)

    return lambda *values: tuple(map(alone(one), values))


def varying(*values: jax.Array) -> frozenset[Any]:
    """The mapped axes over which any of ``values`` varies, as far as jax keeps track of it."""
    return frozenset().union(*(jax.typeof(v).manual_axis_type.varying for v in values))


def vary(values: tuple[jax.Array, ...], *like: jax.Array) -> tuple[jax.Array, ...]:
    """Mark ``values`` as varying over the mapped axes that ``like`` varies over, in one step.

    Under ``shard_map`` with ``check_vma``, the transpose of this step is a collective: jax would insert one a value.
    """
    axes = tuple(varying(*like) - varying(*values))
    return unstack(lax.pcast(stack(values), axes, to="varying"), values) if axes else values


def _slots(packed: jax.Array, slot: jax.Array, slots: int) -> jax.Array:
    """An array of zeros with ``packed`` in its slot: the sum of such arrays over replicas gathers them."""
    chosen = jnp.expand_dims(jnp.arange(slots) == slot, range(1, 1 + packed.ndim))
    return jnp.where(chosen, packed, 0)


def _group_numbers(groups: tuple[tuple[int, ...], ...]) -> jax.Array:
    """The number of the group that each replica is in."""
    of_replica = {i: number for number, group in enumerate(groups) for i in group}
    return jnp.array([of_replica[i] for i in range(len(of_replica))])


def total_over_replicas(reduction: Reduction) -> Total:
    """Sums over the replicas of a group, in one collective for all values.

    A group is a choice of slots, which works in every mapped context; jax's own ``axis_index_groups`` does not.
    """
    names, groups = reduction.axis_name, reduction.axis_index_groups

    def total(*values):
        index = lax.axis_index(names)
        (packed,) = vary((stack(values),), index)
        if groups is None:
            return unstack(lax.psum(packed, names), values)
        own = _group_numbers(groups)[index]
        return unstack(lax.psum(_slots(packed, own, len(groups)), names)[own], values)

    return total


def merge_replicas(local: Statistics, reduction: Reduction) -> Statistics:
    """The statistics of all replicas of a group: one collective for few of them, two for many."""
    names, groups = reduction.axis_name, reduction.axis_index_groups
    size = math.prod(lax.axis_size(name) for name in names)
    if size > GATHER_LIMIT:
        return merge(local, total_over_replicas(reduction))
    index = lax.axis_index(names)
    gathered = lax.psum(_slots(stack(local), index, size), names)
    if groups is not None:
        number = _group_numbers(groups)
        gathered = jnp.where(jnp.expand_dims(number == number[index], range(1, gathered.ndim)), gathered, 0)
    parts = Statistics(*unstack(gathered.swapaxes(0, 1), local))
    return merge_stacked(parts)
