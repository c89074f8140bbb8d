"""Add and norm: the residual stream of transformers, and what a block reads of it."""

import jax
import jax.numpy as jnp

from jaxnorm import _axes
from jaxnorm._axes import Axes
from jaxnorm._epilogue import Activation
from jaxnorm.functional import Array, layer_norm, rms_norm


def add_layer_norm(
    x: Array,
    residual: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: Array | None = None,
    activation: Activation = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Add to the residual stream, and normalize what it is then.

    .. math:: h = x + r \qquad y = \mathrm{layer\_norm}(h)

    Args:
      x: real or complex floating point array: the output of a block.
      residual: r, array of that shape: the stream, perhaps in a wider dtype.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)`` for one per example;
        None for one.
      bias: beta, in the shape of ``scale``; None for zero.
      axis: the feature axis, or several. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-6.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.

    Returns:
      ``(h, y)``: the stream in the wider of both dtypes, and the input of the next block in the dtype of ``x``. The sum
      that is normalized is not rounded to the dtype of ``x`` if that of the stream is wider.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> h, y = jaxnorm.add_layer_norm(jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0]), epsilon=0.0)
      >>> h.tolist(), y.tolist()
      ([1.0, 3.0], [-1.0, 1.0])

    References:
      Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.1.
    """
    x, h = _add("add_layer_norm", x, residual)
    y = layer_norm(h, scale, bias, axis=axis, epsilon=epsilon, mask=mask, activation=activation)
    return h, y.astype(x.dtype)


def add_rms_norm(
    x: Array,
    residual: Array,
    scale: Array | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: Array | None = None,
    activation: Activation = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Add to the residual stream, and divide what it is then by its root mean square.

    .. math:: h = x + r \qquad y = \mathrm{rms\_norm}(h)

    Args:
      x: real or complex floating point array: the output of a block.
      residual: r, array of that shape: the stream, perhaps in a wider dtype.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)`` for one per example;
        None for one.
      axis: the feature axis, or several. Default: the last.
      epsilon: added to the mean square, in the squared unit of ``x``. Default: 1e-6.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.

    Returns:
      ``(h, y)``: the stream in the wider of both dtypes, and the input of the next block in the dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> h, y = jaxnorm.add_rms_norm(jnp.array([1.0, 1.0]), jnp.array([2.0, -4.0]), epsilon=0.0)
      >>> h.tolist(), y.tolist()
      ([3.0, -3.0], [1.0, -1.0])

    References:
      Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
    """
    x, h = _add("add_rms_norm", x, residual)
    return h, rms_norm(h, scale, axis=axis, epsilon=epsilon, mask=mask, activation=activation).astype(x.dtype)


def _add(function: str, x: Array, residual: Array) -> tuple[jax.Array, jax.Array]:
    x = _axes.as_input(function, "x", x)
    stream = _axes.check_residual(function, residual, x)
    if stream is None:
        _axes.fail(function, "residual must be an array in the shape of x", {"residual": None}, TypeError)
    return x, jnp.add(x, stream)
