"""Weight standardization: what is normalized is the weights, and nothing depends on the batch."""

import jax

from jaxnorm import _axes
from jaxnorm._axes import Axes
from jaxnorm.functional import Array, normalize_array


def standardize_weights(
    w: Array, gain: Array | None = None, *, axis: Axes = -1, epsilon: float | jax.Array = 1e-5
) -> jax.Array:
    r"""Standardize the weights of each output over all of its inputs.

    .. math:: \hat w = g \, \frac{w - \mu}{\sqrt{\sigma^2 + \epsilon}}

    Together with group normalization this trains on batches of one as batch normalization does on large ones. Scaled
    weight standardization, which keeps the variance of what a layer passes on, has a gain of
    ``1 / sqrt(w[..., 0].size)`` times the gain of the activation.

    Args:
      w: real or complex floating point array: the kernel of a layer.
      gain: g, in the shape of the output axes in the order given; None for one.
      axis: the output axis of the kernel, or several; the last in Flax.
      epsilon: added to the variance, in the squared unit of ``w``.

    Returns:
      The weights to use, in the shape and dtype of ``w``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> w = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> jaxnorm.standardize_weights(w, epsilon=0.0).tolist()
      [[-1.0, -1.0], [1.0, 1.0]]

    References:
      Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight
      Standardization", 2019. Brock, De and Smith, "Characterizing Signal Propagation to Close the Performance Gap in
      Unnormalized ResNets", ICLR 2021, for the gain.
    """
    function = "standardize_weights"
    w = _axes.as_input(function, "w", w)
    outputs = _axes.canonical_axes(function, "axis", axis, w.ndim)
    shape = tuple(w.shape[a] for a in outputs)
    if gain is not None and _axes.as_input(function, "gain", gain).shape != shape:
        rule = f"gain must have the shape of the output axes of w, {shape}"
        _axes.fail(function, rule, {"shape": _axes.as_input(function, "gain", gain).shape})
    return normalize_array(function, w, gain, None, features=outputs, axes=_axes.others(outputs, w), epsilon=epsilon)[0]
