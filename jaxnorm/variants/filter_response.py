"""Filter response normalization with its thresholded unit: no dependence on the batch, nor on other channels."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxnorm import _axes
from jaxnorm._axes import Axes
from jaxnorm._epilogue import Formula
from jaxnorm.functional import Array, normalize_array
from jaxnorm.variants._examples import check_examples


def filter_response_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    threshold: Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: Array | None = None,
) -> jax.Array:
    r"""Divide every channel of every example by its root mean square, and cut off below a learned threshold.

    .. math:: y = \max\left(\gamma \, \frac{x}{\sqrt{\overline{x^2} + \epsilon}} + \beta,\; \tau\right)

    with the mean over all axes but the first, which is the batch, and the features.

    Args:
      x: real floating point array of shape ``(batch, ...)``.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)``; None for one.
      bias: beta, in the same shape; None for zero.
      threshold: tau, in the same shape; None for no threshold.
      axis: the feature axis, or several, not the first. Default: the last.
      epsilon: added to the mean square, in the squared unit of ``x``. Default: 1e-6.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer or complex array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x = jnp.array([[[3.0], [-3.0]]])  # one example, two positions, one channel
      >>> jaxnorm.filter_response_norm(x, threshold=jnp.zeros(1), epsilon=0.0).tolist()
      [[[1.0], [0.0]]]

    References:
      Singh and Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
      Neural Networks", CVPR 2020.
    """
    function = "filter_response_norm"
    x, features, axes = check_examples(function, x, axis, real=True)
    tau = _axes.check_parameter(function, "threshold", threshold, features, x)
    return normalize_array(
        function,
        x,
        scale,
        bias,
        features=features,
        axes=axes,
        epsilon=epsilon,
        centered=False,
        mask=mask,
        activation=None if tau is None else Thresholded(features),
        of_activation=() if tau is None else (tau,),
    )[0]


@dataclass(frozen=True)
class Thresholded(Formula):
    """The thresholded linear unit.

    Attributes:
      features: the axes of the thresholds.
    """

    features: tuple[int, ...]

    def __call__(self, z: jax.Array, threshold: jax.Array) -> jax.Array:
        """What is above the threshold, or that."""
        return jnp.maximum(z, _axes.laid_out(threshold, self.features, z).astype(z.dtype))
