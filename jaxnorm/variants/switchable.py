"""Switchable normalization: a learned mixture of instance, layer and batch statistics."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm import _axes
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Formula
from jaxnorm._moments import Moments, Statistics, merge_along
from jaxnorm._replicas import Replicas
from jaxnorm.functional import Array, Groups, normalize_array
from jaxnorm.variants._examples import check_examples, check_running, given, merge_batch


def switchable_norm(
    x: Array,
    mean_logits: Array,
    var_logits: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    running: Any = None,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> tuple[jax.Array, Moments]:
    r"""Normalize by a mixture of the statistics of the instance, of its layer and of the batch.

    .. math:: y = \gamma \, \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma_k^2 + \epsilon}} + \beta
       \qquad w = \mathrm{softmax}(\lambda) \quad w' = \mathrm{softmax}(\lambda')

    over k = instance, layer, batch. The statistics of layers and batch are merged from those of the instances, so
    the data is read once for all of them.

    Args:
      x: real or complex floating point array of shape ``(batch, ...)``.
      mean_logits: three numbers: lambda of instance, layer and batch.
      var_logits: three numbers: lambda'.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)``; None for one.
      bias: beta, in the same shape; None for zero.
      running: `RunningStats` in place of the statistics of the batch, at inference; None in training.
      axis: the feature axis, or several, not the first. Default: the last. A layer is all of them.
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
      ``(y, batch)``: ``y`` in the shape and dtype of ``x``, and the `Moments` of the batch for `update_running`.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      Logits that leave the batch alone:

      >>> import jax.numpy as jnp, jaxnorm
      >>> x, logits = jnp.array([[1.0], [3.0]]), jnp.array([-100.0, -100.0, 0.0])
      >>> jaxnorm.switchable_norm(x, logits, logits, epsilon=0.0)[0].tolist()
      [[-1.0], [1.0]]

    References:
      Luo, Ren, Peng, Zhang and Li, "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019.
    """
    function = "switchable_norm"
    x, features, axes = check_examples(function, x, axis)
    replicas = Replicas(*_axes.check_replicas(function, axis_name, axis_index_groups))
    logits = [_check_logits(function, n, v) for n, v in (("mean_logits", mean_logits), ("var_logits", var_logits))]
    instead = () if running is None else check_running(function, running, features, x)
    return normalize_array(
        function,
        x,
        scale,
        bias,
        features=features,
        axes=axes,
        kept=features,
        epsilon=epsilon,
        adjust=Mixture(features, replicas),
        of_adjust=(*logits, *instead),
        mask=mask,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )


@dataclass(frozen=True)
class Mixture(Formula):
    """Of the statistics of instance, layer and batch: the ``adjust`` of switchable normalization.

    Attributes:
      features: the axes of a layer.
      replicas: who holds the batch.
    """

    features: tuple[int, ...]
    replicas: Replicas

    def __call__(self, instance: Statistics, mean_logits, var_logits, *running) -> tuple[Statistics, Statistics]:
        """The statistics used, and those of the batch."""
        reported = batch = merge_batch(instance, self.replicas)
        if running:
            batch = given(*(_axes.laid_out(v, self.features, instance.var) for v in running))
        mean_weights, var_weights = (jax.nn.softmax(v.astype(instance.var.dtype)) for v in (mean_logits, var_logits))
        parts = (instance, merge_along(instance, self.features), batch)
        offset = sum(w * ((p.center - instance.center) + p.offset) for w, p in zip(mean_weights, parts, strict=True))
        var = sum(w * p.var for w, p in zip(var_weights, parts, strict=True))
        return instance._replace(offset=offset, var=var), reported


def _check_logits(function: str, name: str, logits: Array) -> jax.Array:
    logits = _axes.as_input(function, name, logits)
    if logits.shape != (3,) or jnp.iscomplexobj(logits):
        rule = f"{name} must be three real numbers, of instance, layer and batch"
        _axes.fail(function, rule, {"shape": logits.shape, "dtype": str(logits.dtype)})
    return logits
