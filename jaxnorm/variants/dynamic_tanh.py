"""Dynamic tanh: no statistics at all."""

import jax
import jax.numpy as jnp

from jaxnorm import _axes, _engine
from jaxnorm._axes import Axes
from jaxnorm.functional import Array


def dynamic_tanh(
    x: Array, alpha: Array, scale: Array | None = None, bias: Array | None = None, *, axis: Axes = -1
) -> jax.Array:
    r"""Squash each value separately, instead of layer normalization.

    .. math:: y = \gamma \tanh(\alpha x) + \beta

    Args:
      x: real floating point array, of any rank.
      alpha: one learned number, initialized to 0.5.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)``; None for one.
      bias: beta, in the same shape; None for zero.
      axis: the feature axis, or several. Default: the last.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer or complex array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> jaxnorm.dynamic_tanh(jnp.array([0.0, 100.0]), 0.5, jnp.array([2.0, 2.0])).tolist()
      [0.0, 2.0]

    References:
      Zhu, Chen, He, LeCun and Liu, "Transformers without Normalization", CVPR 2025.
    """
    function = "dynamic_tanh"
    x, features = _axes.check_input(function, x, axis)
    if jnp.iscomplexobj(x):
        _axes.fail(function, "x must be real", {"dtype": str(x.dtype)}, TypeError)
    _axes.check_number(function, "alpha", alpha, -float("inf"), float("inf"))
    scale, bias = (_axes.check_parameter(function, n, p, features, x) for n, p in (("scale", scale), ("bias", bias)))
    return _engine.pointwise(_formula, features, x, None, (scale, bias), alpha)


def _formula(x, scale, bias, alpha):
    y = jnp.tanh(alpha.astype(x.dtype) * x)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias
