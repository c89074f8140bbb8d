"""Running averages as explicit state: start and update them; and merge moments."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnorm import _axes
from jaxnorm._moments import Moments, Statistics, divisor, merge_along


class RunningStats(NamedTuple):
    """Running averages of `Moments`, which you pass in and get back. `init_running` makes them.

    Attributes:
      mean: average of the batch means, in the shape of the features and the unit of the data.
      var: average of the batch variances, real, in the same shape and the squared unit.
      count: how many values per feature they have seen, real, in the same shape: the weight in a cumulative average.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def _check_statistics(function: str, name: str, value: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, variance and count of ``value`` as floating point arrays of one shape."""
    try:
        mean, var, count = value
    except (TypeError, ValueError):
        _axes.fail(function, f"{name} must hold mean, var and count", {name: value}, TypeError)
    mean, var = _axes.as_input(function, f"{name}.mean", mean), _axes.as_input(function, f"{name}.var", var)
    count = _axes.as_array(function, f"{name}.count", count).astype(_axes.statistics_dtype(var.dtype))
    if not mean.shape == var.shape == count.shape:
        shapes = {"mean": mean.shape, "var": var.shape, "count": count.shape}
        _axes.fail(function, f"{name} must hold arrays of one shape", shapes)
    return mean, var, count


def merge_moments(a: Moments, b: Moments) -> Moments:
    r"""Merge the moments of two sets of values: the moments of all values together.

    With :math:`n = n_a + n_b` and :math:`\delta = \mu_b - \mu_a` (Chan, Golub and LeVeque, 1979),

    .. math:: \mu = \mu_a + \tfrac{n_b}{n} \delta \qquad
       n \sigma^2 = n_a \sigma_a^2 + n_b \sigma_b^2 + \tfrac{n_a n_b}{n} \delta^2

    The merge is associative and commutative up to rounding, and a count of zero is neutral. Batches of any sizes merge
    to the moments of the data set.

    Args:
      a: `Moments` of any shape.
      b: `Moments` of the same shape.

    Returns:
      `Moments` of that shape.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x = jnp.arange(5.0)
      >>> both = jaxnorm.merge_moments(jaxnorm.moments(x[:1], 0), jaxnorm.moments(x[1:], 0))
      >>> [float(m) for m in both]
      [2.0, 2.0, 5.0]

    References:
      Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    a, b = (Moments(*_check_statistics("merge_moments", name, m)) for name, m in (("a", a), ("b", b)))
    if a.mean.shape != b.mean.shape:
        _axes.fail("merge_moments", "a and b must be of one shape", {"a": a.mean.shape, "b": b.mean.shape})
    return _merged(a, b)


@jax.jit
def _merged(a: Moments, b: Moments) -> Moments:
    mean, var, count = (jnp.stack(pair) for pair in zip(a, b, strict=True))
    mean, var = (jnp.where(count > 0, m, 0) for m in (mean, var))
    merged = merge_along(Statistics(count, mean, jnp.zeros_like(mean), var), (0,))
    return Moments(*(m[0] for m in (merged.center + merged.offset, merged.var, merged.count)))


def init_running(features: int | Sequence[int], *, dtype: Any = jnp.float32) -> RunningStats:
    """Start running averages: mean zero and variance one, so that `normalize` changes nothing yet.

    Args:
      features: how many features, or the shape of the feature axes.
      dtype: dtype of the mean; the variance is real, the count float32 at least. Default: float32.

    Returns:
      `RunningStats` of that shape.

    Raises:
      TypeError: ``features`` is no integer or sequence of them.
      ValueError: a negative number of features, or a dtype that is not floating point or complex.

    Example:
      >>> import jaxnorm
      >>> jaxnorm.init_running(2).var.tolist()
      [1.0, 1.0]
    """
    shape = _axes.check_shape("init_running", "features", features)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        _axes.fail("init_running", "dtype must be floating point or complex", {"dtype": str(dtype)})
    real = jnp.finfo(dtype).dtype
    return RunningStats(jnp.zeros(shape, dtype), jnp.ones(shape, real), jnp.zeros(shape, _axes.statistics_dtype(real)))


def update_running(
    running: RunningStats, batch: Moments, *, alpha: float | jax.Array | None = 0.1, unbiased: bool = False
) -> RunningStats:
    r"""Update running averages with the moments of one more batch.

    .. math:: \mu \leftarrow (1 - \alpha) \mu + \alpha \mu_B \qquad
       \sigma^2 \leftarrow (1 - \alpha) \sigma^2 + \alpha \sigma_B^2

    A batch with a statistic that is not finite changes nothing, and neither does a feature without values in the batch.
    An average that is not finite itself starts again from the batch.

    Args:
      running: the averages so far.
      batch: the `Moments` of a batch, in the same shape.
      alpha: the weight of the *new* value, in [0, 1]: PyTorch's momentum, one minus Flax's. None for the cumulative
        average, in which each batch weighs by its count: after equal batches, the plain average of their statistics.
        Default: 0.1.
      unbiased: average ``n / (n - 1)`` times the variance, as PyTorch does. A batch of one value has no such variance
        and leaves the averages unchanged. Default: False.

    Returns:
      `RunningStats` of the same shape and dtypes; the mean becomes complex where that of the batch is.

    Raises:
      TypeError: alpha is not one number.
      ValueError: alpha is outside [0, 1], or the shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> running, batch = jaxnorm.init_running(1), jaxnorm.moments(jnp.array([[1.0], [5.0]]), 0)
      >>> new = jaxnorm.update_running(running, batch, alpha=0.5)
      >>> new.mean.tolist(), new.var.tolist()
      ([1.5], [2.5])
      >>> jaxnorm.update_running(running, batch, alpha=None).mean.tolist()
      [3.0]

    References:
      Ioffe and Szegedy, "Batch Normalization", ICML 2015, section 3.1.
    """
    function = "update_running"
    old_mean, old_var, old_count = _check_statistics(function, "running", running)
    mean, var, count = _check_statistics(function, "batch", batch)
    if old_mean.shape != mean.shape:
        rule = "running and batch must have features of one shape"
        _axes.fail(function, rule, {"running": old_mean.shape, "batch": mean.shape})
    if alpha is not None:
        _axes.check_number(function, "alpha", alpha, 0.0, 1.0)

    running, batch = RunningStats(old_mean, old_var, old_count), Moments(mean, var, count)
    return _updated(running, batch, alpha, unbiased)


@partial(jax.jit, static_argnums=3)
def _updated(running: RunningStats, batch: Moments, alpha: Any, unbiased: bool) -> RunningStats:
    """One program for all layers of a shape."""
    (old_mean, old_var, old_count), (mean, var, count) = running, batch
    values = (old_mean, old_var, old_count, mean, var, count)
    if len({jax.typeof(v).sharding for v in values}) > 1:  # part of the types: all take that of their sum
        zero = sum((jnp.zeros_like(v).real for v in values), jnp.zeros(()))
        old_mean, old_var, old_count, mean, var, count = (v + zero.astype(v.dtype) for v in values)
    kind = jnp.promote_types(old_mean.dtype, mean.dtype) if jnp.iscomplexobj(mean) else old_mean.dtype
    finite = jnp.isfinite(mean) & jnp.isfinite(var) & jnp.isfinite(count)
    mean, var, count = (jnp.where(finite, value, 0) for value in (mean, var, count))
    weight = count / divisor(old_count + count) if alpha is None else alpha
    if unbiased:
        var = var * (count / divisor(count - 1))
    old_mean, old_var = (jnp.where(jnp.isfinite(o), o, n) for o, n in ((old_mean, mean), (old_var, var)))
    new = RunningStats(
        ((1 - weight) * old_mean + weight * mean).astype(kind),
        ((1 - weight) * old_var + weight * var).astype(running.var.dtype),
        (old_count + count).astype(old_count.dtype),
    )
    kept = jnp.all(finite & jnp.isfinite(new.mean) & jnp.isfinite(new.var))
    usable = kept & (count > (1 if unbiased else 0))
    old = (old_mean.astype(kind), old_var, old_count)
    return RunningStats(*(jnp.where(usable, n, o.astype(n.dtype)) for n, o in zip(new, old, strict=True)))
