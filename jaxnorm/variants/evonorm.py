"""EvoNorm: normalization and activation found together, by search."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm import _axes, _engine
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._moments import Moments
from jaxnorm._replicas import Replicas
from jaxnorm._rule import How
from jaxnorm.functional import Array, ChannelGroups, Groups
from jaxnorm.variants._examples import check_examples, check_running, merge_batch


def evonorm_b0(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    v: Array,
    *,
    running: Any = None,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
) -> tuple[jax.Array, Moments]:
    r"""EvoNorm-B0, normalization and activation in one, with statistics of the batch and of each instance.

    .. math:: y = \gamma \, \frac{x}{\max\left(\sqrt{\sigma_B^2 + \epsilon},\; v x + \sqrt{\sigma_{nc}^2 + \epsilon}
       \right)} + \beta

    Args:
      x: real floating point array of shape ``(batch, ...)``.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)``; None for one.
      bias: beta, in the same shape; None for zero.
      v: one number per feature, in the same shape; initialize it to one.
      running: `RunningStats` in place of the statistics of the batch, at inference; None in training.
      axis: the feature axis, or several, not the first. Default: the last.
      epsilon: added to the variances, in the squared unit of ``x``. Default: 1e-5.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are normalized together. Leave
        it out under ``jit``.
      axis_index_groups: lists of replicas that together hold each once; each list is normalized separately.

    Returns:
      ``(y, batch)``: ``y`` in the shape and dtype of ``x``, and the `Moments` of the batch for `update_running`.

    Raises:
      TypeError: an integer or complex array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x = jnp.array([[[1.0], [3.0]], [[-1.0], [-3.0]]])
      >>> y, batch = jaxnorm.evonorm_b0(x, None, None, jnp.zeros(1), epsilon=0.0)
      >>> jnp.allclose(y, x / jnp.sqrt(5.0)).tolist(), batch.var.tolist()
      (True, [5.0])

    References:
      Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, table 1.
    """
    function = "evonorm_b0"
    x, features, axes = check_examples(function, x, axis, real=True)
    replicas = Replicas(*_axes.check_replicas(function, axis_name, axis_index_groups))
    parameters = _check_parameters(function, features, x, scale=scale, bias=bias, v=v)
    instead = None if running is None else check_running(function, running, features, x)[1]
    epsilon, mask = _axes.check_epsilon(function, epsilon), _axes.check_mask(function, mask, x)
    return _normalized_b0(How(axes, features, replicas=replicas), x, mask, parameters, instead, epsilon)


@partial(jax.jit, static_argnums=0)
def _normalized_b0(how: How, x, mask, parameters, var, epsilon) -> tuple[jax.Array, Moments]:
    instance = _engine.statistics(how._replace(replicas=Replicas()), _engine.Arguments(x, mask))
    batch = merge_batch(instance, how.replicas)
    used = batch.var if var is None else _axes.laid_out(var, how.features, x)
    own, shared = (jnp.sqrt(var + epsilon) for var in (instance.var, used))
    y = _engine.pointwise(_b0, how.features, x, mask, parameters, instance.count, own, shared)
    moments = batch.center + batch.offset, batch.var, batch.count
    return y, Moments(*(_axes.extract(m, how.features) for m in moments))


def evonorm_s0(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    v: Array,
    *,
    num_groups: int,
    axis: int = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
) -> jax.Array:
    r"""EvoNorm-S0, normalization and activation in one, with statistics of groups of channels.

    .. math:: y = \gamma \, \frac{x \, \mathrm{sigmoid}(v x)}{\sqrt{\sigma_g^2 + \epsilon}} + \beta

    Independent of the batch.

    Args:
      x: real floating point array of shape ``(batch, ...)``.
      scale: gamma, one per channel, or ``(batch, channels)``; None for one.
      bias: beta, in the same shape; None for zero.
      v: one number per channel, in the same shape; initialize it to one.
      num_groups: how many groups; divides the number of channels.
      axis: the channel axis, not the first. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-5.
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
      >>> jaxnorm.evonorm_s0(jnp.array([[1.0, 3.0]]), None, None, jnp.zeros(2), num_groups=1, epsilon=0.0).tolist()
      [[0.5, 1.5]]

    References:
      Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, table 1.
    """
    function = "evonorm_s0"
    x, features, axes = check_examples(function, x, axis, real=True)
    if len(features) != 1:
        _axes.fail(function, "axis must be one axis, that of the channels", {"axis": axis})
    _axes.check_groups(function, num_groups, x.shape[features[0]])
    parameters = _check_parameters(function, features, x, scale=scale, bias=bias, v=v)
    epsilon, mask = _axes.check_epsilon(function, epsilon), _axes.check_mask(function, mask, x)
    return _normalized_s0(How(axes, features), num_groups, x, mask, parameters, epsilon)


@partial(jax.jit, static_argnums=(0, 1))
def _normalized_s0(how: How, num_groups: int, x, mask, parameters, epsilon) -> jax.Array:
    instance = _engine.statistics(how, _engine.Arguments(x, mask))
    group = ChannelGroups(how.features[0], num_groups)(instance)
    multiplier = (group.count > 0) / jnp.sqrt(group.var + epsilon)
    return _engine.pointwise(_s0, how.features, x, mask, parameters, multiplier)


def _affine(y, scale, bias):
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _b0(x, scale, bias, v, count, own, shared):
    return _affine(x / jnp.maximum(shared, v * x + own) * (count > 0), scale, bias)


def _s0(x, scale, bias, v, multiplier):
    return _affine(x * jax.nn.sigmoid(v * x) * multiplier, scale, bias)


def _check_parameters(function: str, features: tuple[int, ...], x: jax.Array, **values: Array | None) -> tuple:
    """Scale, bias and v, which must be given."""
    if values["v"] is None:
        _axes.fail(function, "v must be given, one number per feature", {"v": None}, TypeError)
    return tuple(_axes.check_parameter(function, name, value, features, x) for name, value in values.items())
