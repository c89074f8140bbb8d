"""What is normalized is the weights, and nothing depends on the batch."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm import _axes
from jaxnorm._axes import Axes
from jaxnorm._xla import sum_over
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
      axis: the output axis of the kernel, or several. Default: the last, as in Flax.
      epsilon: added to the variance, in the squared unit of ``w``. Default: 1e-5.

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
    w, outputs = _outputs(function, w, gain, axis)
    return normalize_array(function, w, gain, None, features=outputs, axes=_axes.others(outputs, w), epsilon=epsilon)[0]


def weight_norm(
    w: Array, gain: Array | None = None, *, axis: Axes = -1, epsilon: float | jax.Array = 1e-12
) -> jax.Array:
    r"""Divide the weights of each output by their length, and multiply by a gain.

    .. math:: \hat w = g \, \frac{w}{\sqrt{\sum w^2 + \epsilon}}

    with the sum over all axes but ``axis``: length and direction of the weights are learned apart.

    Args:
      w: real or complex floating point array: the kernel of a layer.
      gain: g, in the shape of the output axes in the order given; None for one.
      axis: the output axis of the kernel, or several; ``()`` for one length of the whole kernel. Default: the last, as
        in Flax.
      epsilon: added to the squared length, in the squared unit of ``w``. Default: 1e-12.

    Returns:
      The weights to use, in the shape and dtype of ``w``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> jaxnorm.weight_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]]), jnp.array([5.0, 1.0])).round(5).tolist()
      [[3.0, 0.0], [4.0, 1.0]]

    References:
      Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural
      Networks", NeurIPS 2016, equation 2.
    """
    function = "weight_norm"
    w, outputs = _outputs(function, w, gain, axis)
    axes = _axes.others(outputs, w)
    size = math.prod(w.shape[a] for a in axes)
    gain = jnp.ones([w.shape[a] for a in outputs], jnp.finfo(w.dtype).dtype) if gain is None else jnp.asarray(gain)
    dtype = _axes.statistics_dtype(jnp.promote_types(w.dtype, gain.dtype))
    epsilon = _axes.check_epsilon(function, epsilon) / size
    settings = {"features": outputs, "axes": axes, "epsilon": epsilon, "centered": False}
    return normalize_array(function, w, gain.astype(dtype) * size**-0.5, None, **settings)[0]


def spectral_norm(
    w: Array, u: Array, *, axis: Axes = -1, steps: int = 1, epsilon: float = 1e-12
) -> tuple[jax.Array, jax.Array]:
    r"""Divide the weights by their largest singular value, as power iteration estimates it.

    .. math:: v \leftarrow \frac{W u}{\lVert W u \rVert} \qquad u \leftarrow \frac{W^T v}{\lVert W^T v \rVert}
       \qquad \hat W = \frac{W}{v^T W u}

    where W has the outputs as its columns. To differentiation u and v are constants.

    Args:
      w: real floating point array: the kernel of a layer.
      u: one number per output, of any shape: the state of the iteration, initialized at random.
      axis: the output axis of the kernel, or several. Default: the last, as in Flax.
      steps: how many iterations, at least one. Default: 1.
      epsilon: added to squared lengths. Default: 1e-12.

    Returns:
      ``(w, u)``: the weights to use, in the shape and dtype of ``w``; and the new state, in the shape of ``u``. Keep it
      in training, throw it away at inference.

    Raises:
      TypeError: an integer or complex array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> w, u = jaxnorm.spectral_norm(jnp.diag(jnp.array([4.0, 2.0])), jnp.array([1.0, 1.0]), steps=20)
      >>> w.round(3).tolist()
      [[1.0, 0.0], [0.0, 0.5]]

    References:
      Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative Adversarial Networks", ICLR 2018,
      algorithm 1.
    """
    function = "spectral_norm"
    w, outputs = _outputs(function, w, None, axis)
    u = _axes.as_input(function, "u", u)
    if jnp.iscomplexobj(w) or jnp.iscomplexobj(u):
        _axes.fail(function, "w and u must be real", {"w": str(w.dtype), "u": str(u.dtype)}, TypeError)
    size = math.prod(w.shape[a] for a in outputs)
    if u.size != size:
        _axes.fail(function, f"u must hold one number per output, {size}", {"shape": u.shape})
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        _axes.fail(function, "steps must be a positive integer", {"steps": steps})
    normal, new, _ = iterate(w, u, outputs, steps, _axes.check_epsilon(function, epsilon))
    return normal, new


@partial(jax.jit, static_argnums=(2, 3))
def iterate(w: jax.Array, u: jax.Array, outputs: tuple[int, ...], steps: int, epsilon: Any) -> tuple[jax.Array, ...]:
    """The weights, the state after the last step, and the singular value; checked before."""
    wide, inputs = w.astype(_axes.statistics_dtype(jnp.promote_types(w.dtype, u.dtype))), _axes.others(outputs, w)

    def unit(vector):
        return vector * lax.rsqrt(jnp.sum(jnp.square(vector)) + epsilon)

    left, right = wide, _axes.expand(u.astype(wide.dtype).reshape([w.shape[a] for a in outputs]), outputs, w.ndim)
    for _ in range(steps):
        left = unit(sum_over(wide * right, outputs))
        right = unit(sum_over(wide * left, inputs))
    left, right = lax.stop_gradient((left, right))
    sigma = jnp.sum(wide * left * right)
    new = _axes.extract(right, outputs).reshape(u.shape)
    return (wide / jnp.where(sigma != 0, sigma, 1)).astype(w.dtype), new.astype(u.dtype), sigma


def _outputs(function: str, w: Array, gain: Array | None, axis: Axes) -> tuple[jax.Array, tuple[int, ...]]:
    w = _axes.as_input(function, "w", w)
    outputs = _axes.canonical_axes(function, "axis", axis, w.ndim)
    shape = tuple(w.shape[a] for a in outputs)
    if gain is not None and _axes.as_input(function, "gain", gain).shape != shape:
        rule = f"gain must have the shape of the output axes of w, {shape}"
        _axes.fail(function, rule, {"shape": _axes.as_input(function, "gain", gain).shape})
    return w, outputs
