"""The five normalizations: each chooses axes and calls `standardize`, which checks its arguments and calls the rule."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm import _axes, _engine
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Formula, check_activation, inverse_of
from jaxnorm._moments import Moments, Statistics, merge_along
from jaxnorm._replicas import Replicas
from jaxnorm._rule import OUTPUT, STATISTICS, How

Array = jax.typing.ArrayLike
Groups = Sequence[Sequence[int]]
Adjust = Callable[[Statistics], Statistics]
Warn = Callable[[str, str], None]


@dataclass(frozen=True)
class ChannelGroups(Formula):
    """Neighbouring channels share their statistics: the ``adjust`` of group normalization.

    Attributes:
      axis: that of the channels.
      num_groups: how many groups there are.
    """

    axis: int
    num_groups: int

    def __call__(self, statistics: Statistics) -> Statistics:
        """The statistics of each group, given to all of its channels."""
        shape = statistics.var.shape
        channels = (self.num_groups, shape[self.axis] // self.num_groups)
        merged = merge_along(Statistics(*(_axes.split(v, self.axis, channels) for v in statistics)), (self.axis + 1,))
        wide = (*shape[: self.axis], *channels, *shape[self.axis + 1 :])
        return Statistics(
            *(_axes.joined(jnp.broadcast_to(m, wide), v) for m, v in zip(merged, statistics, strict=True))
        )


def normalize_array(
    function: str,
    x: jax.Array,
    scale: Array | None,
    bias: Array | None,
    *,
    features: tuple[int, ...],
    axes: tuple[int, ...] = (),
    kept: tuple[int, ...] | None = None,
    given: tuple[Array, ...] | None = None,
    near: Array | None = None,
    epsilon: Any,
    centered: bool = True,
    adjust: Callable[..., Any] | None = None,
    of_adjust: tuple[Any, ...] = (),
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    activation: Any = None,
    of_activation: tuple[Any, ...] = (),
    residual: Array | None = None,
    invertible: bool = False,
    dtype: Any = None,
    warn: Warn | None = _axes.warn,
) -> tuple[jax.Array, Any]:
    """Check every argument of ``function``, and normalize by statistics ``given`` or by those over ``axes``.

    What the normalizations and the layers call. The moments are in the shape of the axes ``kept``. ``near`` is a point
    for each feature, if one is known, that its mean is not far from. ``adjust`` may give a pair: the statistics used,
    and those whose moments are reported. ``warn`` gets ``function`` and the message; None where the size of the input
    means nothing.
    """
    replicas = Replicas(*_axes.check_replicas(function, axis_name, axis_index_groups))
    mask = _axes.check_mask(function, mask, x)
    scale, bias = (_axes.check_parameter(function, n, v, features, x) for n, v in (("scale", scale), ("bias", bias)))
    how = How(
        axes=tuple(sorted(axes)),
        features=features,
        kept=kept,
        centered=centered,
        replicas=replicas,
        adjust=adjust,
        activation=check_activation(function, activation),
        inverse=inverse_of(function, activation) if invertible else None,
        dtype=x.dtype if dtype is None else jnp.dtype(dtype),
        plain=_is_jet(x),
    )
    if invertible:
        _axes.check_invertible_scale(function, scale, how.dtype)
    if given is not None:
        mean, var = given
        given = tuple(_axes.check_statistic(function, n, v, features, x) for n, v in (("mean", mean), ("var", var)))
    elif warn and centered and (adjust is None or isinstance(adjust, ChannelGroups)):
        group = x.shape[adjust.axis] // adjust.num_groups if isinstance(adjust, ChannelGroups) else 1
        _axes.warn_of_one_value(warn, function, x, how.axes, group, *replicas)
    arguments = _engine.Arguments(
        x=x,
        mask=mask,
        residual=_axes.check_residual(function, residual, x),
        given=given,
        scale=scale,
        bias=bias,
        epsilon=_axes.check_epsilon(function, epsilon),
        near=_axes.check_parameter(function, "near", near, features, x),
        of_adjust=of_adjust,
        of_activation=of_activation,
    )
    return _engine.standardize(how, arguments)


def standardize(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axes: Axes,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    centered: bool = True,
    adjust: Adjust | None = None,
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> tuple[jax.Array, Moments]:
    r"""Standardize ``x`` over ``axes``. Every normalization here is a call of this function.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    The statistics are right to a few roundings at any mean. In float32 that holds, gradients included, for values and
    deviations from 1e-15 to 1e15; with weights, from 1e-12 to 1e12 if their totals are from 1e-7 to 1e7.

    Args:
      x: real or complex floating point array, of any rank.
      scale: gamma, in the shape of the axes ``axis`` in the order given, or ``(batch, *features)`` for one per example;
        None for one.
      bias: beta, in the shape of ``scale``; None for zero.
      axes: the axis or axes over which statistics are shared.
      axis: the axis or axes of scale and bias. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-5.
      centered: False fixes the mean at zero. Default: True.
      adjust: a differentiable function from the `Statistics` that were measured, over all replicas, to those that
        normalize. The mean is ``center + offset``; reduced axes have size one, and may return another that broadcasts.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are normalized together. Leave
        it out under ``jit``.
      axis_index_groups: lists of replicas that together hold each once; each list is normalized separately.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`.
        Gradients are as exact as the dtype of ``y`` allows: a rounding of ``y`` is divided by the scale. A scale of
        zero is refused if its value is known; if it is traced, gradients of that feature are NaN. Default: False.

    Returns:
      ``(y, moments)``: ``y`` in the shape and dtype of ``x``, and the `Moments` over ``axes`` before they were
      adjusted, as `moments` gives them.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Warns:
      UserWarning: every statistic is of one value, which is normalized to zero whatever it is.

    Example:
      A normalization by half the deviation:

      >>> import jax.numpy as jnp, jaxnorm
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, _ = jaxnorm.standardize(x, axes=0, epsilon=0.0, adjust=lambda s: s._replace(var=s.var / 4))
      >>> y.tolist()
      [[-2.0], [2.0]]

    References:
      Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
      Shift", ICML 2015. Rota Bulo, Porzi and Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
      of DNNs", CVPR 2018, for ``invertible``.
    """
    x, features = _axes.check_input("standardize", x, axis)
    reduced = _axes.canonical_axes("standardize", "axes", axes, x.ndim)
    return normalize_array(
        "standardize",
        x,
        scale,
        bias,
        features=features,
        axes=reduced,
        kept=_axes.others(reduced, x),
        epsilon=epsilon,
        centered=centered,
        adjust=adjust,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )


def batch_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> tuple[jax.Array, Moments]:
    r"""Normalize each feature by its statistics over the batch, as in training.

    .. math:: y = \gamma \, \frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} + \beta

    with the mean and the biased variance of each feature over all other axes and over the replicas of ``axis_name``.
    Under ``jit`` with a sharded batch the statistics are those of the whole batch. Use it with batches of 32 and more,
    and `normalize` with running averages at inference.

    Args:
      x: real or complex floating point array, of any rank.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)`` for one per example;
        None for one.
      bias: beta, in the shape of ``scale``; None for zero.
      axis: the feature axis, or several. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-5.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are normalized together. Leave
        it out under ``jit``.
      axis_index_groups: lists of replicas that together hold each once; each list is normalized separately.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``(y, batch)``: ``y`` in the shape and dtype of ``x``, and the `Moments` of the batch in the shape of the feature
      axes, for `update_running`.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Warns:
      UserWarning: one value per feature, which is normalized to zero whatever it is.

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
    x, features = _axes.check_input("batch_norm", x, axis)
    return normalize_array(
        "batch_norm",
        x,
        scale,
        bias,
        features=features,
        axes=_axes.others(features, x),
        kept=features,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )


def layer_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: Array | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize each example by the statistics of its own features.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with mean and biased variance over the feature axes. It does not depend on the batch: use it for transformers,
    recurrent networks and small batches.

    Args:
      x: real or complex floating point array, of any rank.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)`` for one per example;
        None for one.
      bias: beta, in the shape of ``scale``; None for zero.
      axis: the feature axis, or several. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-6.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Warns:
      UserWarning: every statistic is of one value, which is normalized to zero whatever it is.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> jaxnorm.layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]]), epsilon=0.0).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]

    References:
      Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    x, features = _axes.check_input("layer_norm", x, axis)
    return normalize_array(
        "layer_norm",
        x,
        scale,
        bias,
        features=features,
        axes=features,
        epsilon=epsilon,
        mask=mask,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )[0]


def rms_norm(
    x: Array,
    scale: Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: Array | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Divide each example by the root mean square of its own features.

    .. math:: y = \gamma \, \frac{x}{\sqrt{\overline{x^2} + \epsilon}}

    This is layer normalization with the mean fixed at zero. Use it for transformers.

    Args:
      x: real or complex floating point array, of any rank.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)`` for one per example;
        None for one.
      axis: the feature axis, or several. Default: the last.
      epsilon: added to the mean square, in the squared unit of ``x``. Default: 1e-6.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> jaxnorm.rms_norm(jnp.array([3.0, -3.0]), epsilon=0.0).tolist()
      [1.0, -1.0]

    References:
      Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
    """
    x, features = _axes.check_input("rms_norm", x, axis)
    return normalize_array(
        "rms_norm",
        x,
        scale,
        None,
        features=features,
        axes=features,
        epsilon=epsilon,
        centered=False,
        mask=mask,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )[0]


def group_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    num_groups: int,
    axis: int = -1,
    epsilon: float | jax.Array = 1e-6,
    batched: bool = True,
    mask: Array | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize each example by the statistics of groups of neighboring channels.

    .. math:: y = \gamma \, \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta

    with mean and biased variance of group g over its channels and all axes but the first, which is the batch. One group
    normalizes the whole example; as many groups as channels is instance normalization. Use it for convolutions with
    small batches.

    Args:
      x: real or complex floating point array of shape ``(batch, ...)``.
      scale: gamma, one per channel; None for one.
      bias: beta, one per channel; None for zero.
      num_groups: how many groups; divides the number of channels.
      axis: the channel axis, not the first. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-6.
      batched: False for one example without a batch axis, as under ``vmap``. Default: True.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Warns:
      UserWarning: every statistic is of one value, which is normalized to zero whatever it is.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> jaxnorm.group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), num_groups=2, epsilon=0.0).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]

    References:
      Wu and He, "Group Normalization", ECCV 2018.
    """
    x, features = _axes.check_input("group_norm", x, axis, batched=batched)
    if len(features) != 1:
        _axes.fail("group_norm", "axis must be one axis, that of the channels", {"axis": axis})
    _axes.check_groups("group_norm", num_groups, x.shape[features[0]])
    return normalize_array(
        "group_norm",
        x,
        scale,
        bias,
        features=features,
        axes=_axes.others(features, x, first=int(batched)),
        epsilon=epsilon,
        adjust=ChannelGroups(*features, num_groups),
        mask=mask,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )[0]


def instance_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    batched: bool = True,
    mask: Array | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize each channel of each example by its own statistics.

    .. math:: y = \gamma \, \frac{x - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}} + \beta

    with mean and biased variance over all axes but the first, which is the batch, and the features. Use it for style
    transfer and generation.

    Args:
      x: real or complex floating point array of shape ``(batch, ...)``.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)`` for one per example;
        None for one.
      bias: beta, in the shape of ``scale``; None for zero.
      axis: the feature axis, or several, not the first. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-6.
      batched: False for one example without a batch axis, as under ``vmap``. Default: True.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Warns:
      UserWarning: every statistic is of one value, which is normalized to zero whatever it is.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])  # one example, two positions, two channels
      >>> jaxnorm.instance_norm(x, epsilon=0.0).tolist()
      [[[-1.0, -1.0], [1.0, 1.0]]]

    References:
      Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.
    """
    x, features = _axes.check_input("instance_norm", x, axis, batched=batched)
    return normalize_array(
        "instance_norm",
        x,
        scale,
        bias,
        features=features,
        axes=_axes.others(features, x, first=int(batched)),
        epsilon=epsilon,
        mask=mask,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )[0]


def normalize(
    x: Array,
    statistics: Any,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize by given statistics, as batch normalization does at inference.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Args:
      x: real or complex floating point array, of any rank.
      statistics: `RunningStats`, `Moments` or a pair ``(mean, var)``, in the shape of the feature axes in the order
        given, or ``(batch, *features)``.
      scale: gamma, in one of the same shapes; None for one.
      bias: beta, in the shape of ``scale``; None for zero.
      axis: the feature axis, or several. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-5.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``y`` in the shape and dtype of ``x``. Each value depends on its own input alone; replicas need not communicate.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> jaxnorm.normalize(jnp.array([[5.0]]), jaxnorm.init_running(1), epsilon=0.0).tolist()
      [[5.0]]

    References:
      Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 2.
    """
    x, features = _axes.check_input("normalize", x, axis)
    return normalize_array(
        "normalize",
        x,
        scale,
        bias,
        features=features,
        given=_mean_and_var(statistics),
        epsilon=epsilon,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )[0]


def _mean_and_var(statistics: Any) -> tuple[Array, Array]:
    if hasattr(statistics, "mean") and hasattr(statistics, "var") and not hasattr(statistics, "dtype"):
        return statistics.mean, statistics.var
    if isinstance(statistics, tuple | list) and len(statistics) == 2:
        return statistics[0], statistics[1]
    rule = "statistics must be RunningStats, Moments or a pair (mean, var)"
    _axes.fail("normalize", rule, {"type": type(statistics).__name__}, TypeError)


def moments(
    x: Array,
    axes: Axes,
    *,
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
) -> Moments:
    r"""Measure mean, biased variance and count of ``x`` over ``axes``.

    With weights :math:`w` (one everywhere, the mask, or real numbers) and :math:`n = \sum w`,

    .. math:: \mu = \frac1n \sum w x \qquad \sigma^2 = \frac1n \sum w (x - \mu)^2

    Stable for any mean: the variance is exact to a few roundings where ``E[x^2] - E[x]^2`` has lost every digit. If the
    count is zero, mean and variance are zero.

    Args:
      x: real or complex floating point array of any shape.
      axes: axis or axes to reduce.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value is measured. What is masked out may
        be NaN. Default: None, every value is measured.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are measured together, each by
        its own count.
      axis_index_groups: lists of replicas that together hold each once; each list is measured separately.

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

    References:
      Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance: Analysis and Recommendations", The
      American Statistician, 1983, for shifted data; `merge_moments` for replicas.
    """
    x = _axes.as_input("moments", "x", x)
    axes = tuple(sorted(_axes.canonical_axes("moments", "axes", axes, x.ndim)))
    return measure_array("moments", x, axes, _axes.others(axes, x), mask, axis_name, axis_index_groups)


def measure_array(
    function: str,
    x: jax.Array,
    axes: tuple[int, ...],
    kept: tuple[int, ...],
    mask: Array | None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    near: Array | None = None,
) -> Any:
    """Check the arguments of ``function``; the moments over ``axes``, in the shape of those ``kept``."""
    replicas = Replicas(*_axes.check_replicas(function, axis_name, axis_index_groups))
    how = How(axes, features=kept, kept=kept, replicas=replicas, plain=_is_jet(x))
    return _engine.moments(how, _engine.Arguments(x, _axes.check_mask(function, mask, x), near=near))


def _is_jet(x: jax.Array) -> bool:
    jet: Any = sys.modules.get("jax.experimental.jet")
    return jet is not None and isinstance(x, jet.JetTracer)


_policy = jax.checkpoint_policies.save_only_these_names(STATISTICS, OUTPUT)


def save_statistics(primitive: Any, *avals: Any, **params: Any) -> Any:
    """Keep statistics and invertible outputs: a policy for ``jax.checkpoint``, ``nn.remat``, ``nnx.remat``.

    Everything else is computed again in the backward pass, but no reduction and no collective.

    Args:
      primitive: the operation that jax asks about.
      *avals: shapes and dtypes of its inputs.
      **params: its parameters.

    Returns:
      Whether to keep its outputs.

    Example:
      >>> import jax, jaxnorm, jax.numpy as jnp
      >>> block = lambda x: jaxnorm.batch_norm(x, activation="relu")[0].sum()
      >>> kept = jax.checkpoint(block, policy=jaxnorm.save_statistics)
      >>> jax.grad(kept)(jnp.arange(6.0).reshape(3, 2)).shape
      (3, 2)
    """
    return _policy(primitive, *avals, **params)
