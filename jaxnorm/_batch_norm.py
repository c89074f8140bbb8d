"""Batch normalization: statistics over everything but the features, and their running averages."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnorm import _axes, _rule
from jaxnorm._activations import Activation, After
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._moments import Moments, Reduction, Statistics, divisor, merge_stacked


class RunningStats(NamedTuple):
    """Running averages of `Moments`, passed in and handed back.

    Attributes:
      mean: average of the batch means.
      var: average of the batch variances.
      count: how many values per feature they have seen; what a cumulative average weighs them by.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def moments(
    x: jax.typing.ArrayLike,
    axes: Axes,
    *,
    mask: jax.typing.ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    r"""Mean, biased variance and count of ``x`` over ``axes``, a mask and replicas.

    With weights :math:`w` (one everywhere, the mask, or real numbers) and :math:`n = \sum w`,

    .. math:: \mu = \frac1n \sum w x \qquad \sigma^2 = \frac1n \sum w (x - \mu)^2

    Stable for any mean: the variance is exact to a few roundings where ``E[x^2] - E[x]^2`` has lost every digit. Where
    the count is zero, so are mean and variance.

    Args:
      x: real or complex floating point array of any shape.
      axes: axis or axes to reduce.
      mask: broadcasts against ``x``; boolean, or non-negative weights. What is masked out may be NaN.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are measured together, each by
        its own count.
      axis_index_groups: lists of replicas that together hold each once; each is measured with its own list only.

    Returns:
      `Moments` in the shape of the axes of ``x`` that are left; float32, or float64 for float64 input (the mean of
      complex input is complex).

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: axes, mask, axis_name or axis_index_groups that do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x = 1e6 + jnp.array([[-1.0, 0.0], [1.0, 0.0]])
      >>> jaxnorm.moments(x, 0).var.tolist()
      [1.0, 0.0]
    """
    function = "moments"
    x = _axes.as_input(function, "x", x)
    axes = tuple(sorted(_axes.canonical_axes(function, "axes", axes, x.ndim)))
    weights = _axes.check_mask(function, mask, x)
    names, groups = _axes.check_replicas(function, axis_name, axis_index_groups)
    reduction = Reduction(axes, axis_name=names, axis_index_groups=groups)
    kept = tuple(a for a in range(x.ndim) if a not in axes)
    return Moments(*(_axes.extract(m, kept) for m in _rule.moments(x, weights, reduction)))


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
    r"""The moments of two sets of values together, from the moments of each.

    With :math:`n = n_a + n_b` and :math:`\delta = \mu_b - \mu_a` (Chan, Golub and LeVeque, 1979),

    .. math:: \mu = \mu_a + \tfrac{n_b}{n} \delta \qquad
       n \sigma^2 = n_a \sigma_a^2 + n_b \sigma_b^2 + \tfrac{n_a n_b}{n} \delta^2

    Associative and commutative up to rounding; a count of zero is neutral. Batches of a data set merge to the moments
    of the data set, whatever their sizes.

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
    """
    a, b = (Moments(*_check_statistics("merge_moments", name, m)) for name, m in (("a", a), ("b", b)))
    if a.mean.shape != b.mean.shape:
        _axes.fail("merge_moments", "a and b must be of one shape", {"a": a.mean.shape, "b": b.mean.shape})
    mean, var, count = (jnp.stack(pair) for pair in zip(a, b, strict=True))
    mean, var = (jnp.where(count > 0, m, 0) for m in (mean, var))
    parts = Statistics(count, mean, jnp.zeros_like(mean), var)
    merged = merge_stacked(parts)
    return Moments(merged.center + merged.offset, merged.var, merged.count)


def batch_norm(
    x: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    mask: jax.typing.ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    activation: Activation = None,
    residual: jax.typing.ArrayLike | None = None,
    invertible: bool = False,
) -> tuple[jax.Array, Moments]:
    r"""Normalize every feature by the statistics of this batch: batch normalization as in training.

    .. math:: y = \gamma \, \frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} + \beta

    with the mean and the biased variance of each feature over all other axes, the replicas of ``axis_name`` included.
    Under ``jit`` with a sharded batch the statistics are those of the whole batch, with no ``axis_name``.

    Args:
      x: real or complex floating point array, of any rank.
      scale: gamma, in the shape of the feature axes in the order given; None for one.
      bias: beta, likewise; None for zero.
      axis: the feature axis, or several.
      epsilon: added to the variance, in the squared unit of ``x``.
      mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured; all values are
        normalized. What is masked out may be NaN.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are normalized together.
      axis_index_groups: lists of replicas that together hold each once; each is normalized with its own list only.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, which recovers the input from it, in place of the input.
        For activations that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Gradients are as
        exact as the dtype of ``y`` allows; where a scale is zero they are NaN.

    Returns:
      ``(y, batch)``: ``y`` in the shape and dtype of ``x``, and the `Moments` of the batch in the shape of the feature
      axes, for `update_running`.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit, or one value per feature, whose variance is zero whatever it is.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> y, batch = jaxnorm.batch_norm(jnp.array([[1.0], [3.0]]), epsilon=0.0)
      >>> y.tolist(), batch.mean.tolist(), batch.var.tolist()
      ([[-1.0], [1.0]], [2.0], [1.0])

    References:
      Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
      Shift", ICML 2015. Rota Bulo, Porzi and Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
      of DNNs", CVPR 2018, for ``invertible``.
    """
    function = "batch_norm"
    x = _axes.as_input(function, "x", x)
    features = _axes.canonical_axes(function, "axis", axis, x.ndim)
    reduction = batch_reduction(function, x, features, axis_name, axis_index_groups)
    y, batch = _rule.normalize_by_own(
        function,
        x,
        scale,
        bias,
        features=features,
        reduction=reduction,
        epsilon=epsilon,
        mask=mask,
        after=After(activation, residual, invertible),
    )
    return y, Moments(*(_axes.extract(m, features) for m in batch))


def batch_reduction(
    function: str,
    x: jax.Array,
    features: tuple[int, ...],
    axis_name: AxisNames | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> Reduction:
    """Everything but the features shares its statistics, over all replicas."""
    names, groups = _axes.check_replicas(function, axis_name, axis_index_groups)
    axes = tuple(a for a in range(x.ndim) if a not in features)
    _axes.check_batch(function, x, axes, names, groups)
    return Reduction(axes, axis_name=names, axis_index_groups=groups)


def normalize(
    x: jax.typing.ArrayLike,
    mean: jax.typing.ArrayLike,
    var: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    activation: Activation = None,
    residual: jax.typing.ArrayLike | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize by statistics given: batch normalization as in inference.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Args:
      x: real or complex floating point array, of any rank.
      mean: the mean of each feature, in the shape of the feature axes in the order given.
      var: the variance of each feature, likewise.
      scale: gamma, likewise; None for one.
      bias: beta, likewise; None for zero.
      axis: the feature axis, or several.
      epsilon: added to the variance, in the squared unit of ``x``.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, which recovers the input from it, in place of the input.
        For activations that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Gradients are as
        exact as the dtype of ``y`` allows; where a scale is zero they are NaN.

    Returns:
      ``y`` in the shape and dtype of ``x``. Each value depends on its own input alone; replicas need not communicate.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> running = jaxnorm.init_running(1)
      >>> jaxnorm.normalize(jnp.array([[5.0]]), running.mean, running.var, epsilon=0.0).tolist()
      [[5.0]]

    References:
      Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 2.
    """
    function = "normalize"
    x = _axes.as_input(function, "x", x)
    features = _axes.canonical_axes(function, "axis", axis, x.ndim)
    for name, value in (("mean", mean), ("var", var)):
        if value is None:
            _axes.fail(function, f"{name} must be an array", {name: value}, TypeError)
    if jnp.iscomplexobj(var):
        _axes.fail(function, "var must be real", {"dtype": str(jnp.asarray(var).dtype)}, TypeError)
    return _rule.normalize_by_given(
        function,
        x,
        mean,
        var,
        scale,
        bias,
        features=features,
        epsilon=epsilon,
        after=After(activation, residual, invertible),
    )


def init_running(features: int | Sequence[int], *, dtype: Any = jnp.float32) -> RunningStats:
    """Running averages that have seen nothing: mean zero, variance one, so that `normalize` changes nothing.

    Args:
      features: how many features, or the shape of the feature axes.
      dtype: of the mean; the variance is real, the count float32 at least.

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
    r"""Running averages after one more batch.

    .. math:: \mu \leftarrow (1 - \alpha) \mu + \alpha \mu_B \qquad
       \sigma^2 \leftarrow (1 - \alpha) \sigma^2 + \alpha \sigma_B^2

    Never poisoned: a batch with a statistic that is not finite leaves all as it was, and a feature of which the batch
    holds no value stays as it was.

    Args:
      running: the averages so far.
      batch: the `Moments` of a batch, in the same shape.
      alpha: the weight of the *new* value, in [0, 1] (PyTorch's momentum; one minus Flax's). None for the cumulative
        average, in which every batch weighs by its count: after equal batches, the plain average of their statistics.
      unbiased: average ``n / (n - 1)`` times the variance, as PyTorch does, instead of the variance itself. Of one
        value there is none: such a batch leaves the averages as they were.

    Returns:
      `RunningStats` of the same shape and dtypes.

    Raises:
      TypeError: alpha is not a number.
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
    if jnp.iscomplexobj(mean) and not jnp.iscomplexobj(old_mean):
        rule = "running.mean must be complex where batch.mean is"
        _axes.fail(function, rule, {"running": str(old_mean.dtype), "batch": str(mean.dtype)}, TypeError)
    if alpha is not None:
        _axes.check_number(function, "alpha", alpha, 0.0, 1.0)

    finite = jnp.isfinite(mean) & jnp.isfinite(var) & jnp.isfinite(count)
    mean, var, count = (jnp.where(finite, value, 0) for value in (mean, var, count))
    weight = count / divisor(old_count + count) if alpha is None else alpha
    if unbiased:
        var = var * (count / divisor(count - 1))
    new = RunningStats(
        ((1 - weight) * old_mean + weight * mean).astype(old_mean.dtype),
        ((1 - weight) * old_var + weight * var).astype(old_var.dtype),
        old_count + count,
    )
    kept = jnp.all(finite & jnp.isfinite(new.mean) & jnp.isfinite(new.var))
    usable = kept & (count > (1 if unbiased else 0))
    return RunningStats(*(jnp.where(usable, n, o) for n, o in zip(new, (old_mean, old_var, old_count), strict=True)))
