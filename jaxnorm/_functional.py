"""Layer, RMS, group and instance normalization: choose what shares its statistics, call the rule."""

import jax

from jaxnorm import _axes, _rule
from jaxnorm._activations import Activation, After
from jaxnorm._axes import Axes
from jaxnorm._moments import Reduction


def layer_norm(
    x: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    mask: jax.typing.ArrayLike | None = None,
    activation: Activation = None,
    residual: jax.typing.ArrayLike | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize every example by the statistics of its own features.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with mean and biased variance over the feature axes. Independent of the batch: the remedy where batches are small,
    and for recurrent networks.

    Args:
      x: real or complex floating point array, of any rank.
      scale: gamma, in the shape of the feature axes in the order given; None for one.
      bias: beta, likewise; None for zero.
      axis: the feature axis, or several.
      epsilon: added to the variance, in the squared unit of ``x``.
      mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured; all values are
        normalized. What is masked out may be NaN.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, which recovers the input from it, in place of the input.
        For activations that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Gradients are as
        exact as the dtype of ``y`` allows; where a scale is zero they are NaN.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> jaxnorm.layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]]), epsilon=0.0).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]

    References:
      Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    x = _axes.as_input("layer_norm", "x", x)
    features = _axes.canonical_axes("layer_norm", "axis", axis, x.ndim)
    reduction = Reduction(tuple(sorted(features)))
    return _rule.normalize_by_own(
        "layer_norm",
        x,
        scale,
        bias,
        features=features,
        reduction=reduction,
        epsilon=epsilon,
        mask=mask,
        after=After(activation, residual, invertible),
    )[0]


def rms_norm(
    x: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    mask: jax.typing.ArrayLike | None = None,
    activation: Activation = None,
    residual: jax.typing.ArrayLike | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Divide every example by the root mean square of its own features.

    .. math:: y = \gamma \, \frac{x}{\sqrt{\overline{x^2} + \epsilon}}

    Layer normalization with the mean fixed at zero.

    Args:
      x: real or complex floating point array, of any rank.
      scale: gamma, in the shape of the feature axes in the order given; None for one.
      axis: the feature axis, or several.
      epsilon: added to the mean square, in the squared unit of ``x``.
      mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured; all values are
        normalized. What is masked out may be NaN.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, which recovers the input from it, in place of the input.
        For activations that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Gradients are as
        exact as the dtype of ``y`` allows; where a scale is zero they are NaN.

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
    x = _axes.as_input("rms_norm", "x", x)
    features = _axes.canonical_axes("rms_norm", "axis", axis, x.ndim)
    reduction = Reduction(tuple(sorted(features)), centered=False)
    return _rule.normalize_by_own(
        "rms_norm",
        x,
        scale,
        None,
        features=features,
        reduction=reduction,
        epsilon=epsilon,
        mask=mask,
        after=After(activation, residual, invertible),
    )[0]


def group_norm(
    x: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    *,
    num_groups: int,
    axis: int = -1,
    epsilon: float = 1e-6,
    mask: jax.typing.ArrayLike | None = None,
    activation: Activation = None,
    residual: jax.typing.ArrayLike | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize every example by the statistics of groups of neighbouring channels.

    .. math:: y = \gamma \, \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta

    with mean and biased variance of group g over its channels and all axes but the first, which is the batch. One group
    is layer normalization over all of them; as many groups as channels is instance normalization.

    Args:
      x: real or complex floating point array of shape ``(batch, ...)``.
      scale: gamma, one per channel; None for one.
      bias: beta, one per channel; None for zero.
      num_groups: how many groups; divides the number of channels.
      axis: the channel axis, not the first.
      epsilon: added to the variance, in the squared unit of ``x``.
      mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured; all values are
        normalized. What is masked out may be NaN.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, which recovers the input from it, in place of the input.
        For activations that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Gradients are as
        exact as the dtype of ``y`` allows; where a scale is zero they are NaN.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> jaxnorm.group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), num_groups=2, epsilon=0.0).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]

    References:
      Wu and He, "Group Normalization", ECCV 2018.
    """
    function = "group_norm"
    x = _axes.as_input(function, "x", x)
    features = _axes.check_example_features(function, axis, x)
    if len(features) != 1:
        _axes.fail(function, "axis must be one axis, that of the channels", {"axis": axis})
    (channel,) = features
    _axes.check_groups(function, num_groups, x.shape[channel])
    axes = tuple(a for a in range(1, x.ndim) if a != channel)
    reduction = Reduction(axes, channel_groups=(channel, num_groups))
    return _rule.normalize_by_own(
        function,
        x,
        scale,
        bias,
        features=(channel,),
        reduction=reduction,
        epsilon=epsilon,
        mask=mask,
        after=After(activation, residual, invertible),
    )[0]


def instance_norm(
    x: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    mask: jax.typing.ArrayLike | None = None,
    activation: Activation = None,
    residual: jax.typing.ArrayLike | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize every channel of every example by its own statistics.

    .. math:: y = \gamma \, \frac{x - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}} + \beta

    with mean and biased variance over all axes but the first, which is the batch, and the features.

    Args:
      x: real or complex floating point array of shape ``(batch, ...)``.
      scale: gamma, in the shape of the feature axes in the order given; None for one.
      bias: beta, likewise; None for zero.
      axis: the feature axis, or several, not the first.
      epsilon: added to the variance, in the squared unit of ``x``.
      mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured; all values are
        normalized. What is masked out may be NaN.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, which recovers the input from it, in place of the input.
        For activations that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Gradients are as
        exact as the dtype of ``y`` allows; where a scale is zero they are NaN.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])  # one example, two positions, two channels
      >>> jaxnorm.instance_norm(x, epsilon=0.0).tolist()
      [[[-1.0, -1.0], [1.0, 1.0]]]

    References:
      Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.
    """
    x = _axes.as_input("instance_norm", "x", x)
    features = _axes.check_example_features("instance_norm", axis, x)
    axes = tuple(a for a in range(1, x.ndim) if a not in features)
    return _rule.normalize_by_own(
        "instance_norm",
        x,
        scale,
        bias,
        features=features,
        reduction=Reduction(axes),
        epsilon=epsilon,
        mask=mask,
        after=After(activation, residual, invertible),
    )[0]
