"""Normalization layers for Flax Linen: parameters and collections around the engine, no arithmetic.

They take the arguments of the ``flax.linen`` class of the same name, by position and by keyword, and hold the same
variables, so that ``from jaxnorm.linen import BatchNorm`` in place of ``from flax.linen import BatchNorm`` is all that
changes. What Flax lacks comes after what it has:

- ``mask`` may have any shape that broadcasts, and be boolean or real weights, on every layer;
- ``axis_name`` may be several mapped axes, ``axis_index_groups`` work under ``shard_map`` and ``vmap``, and neither is
  needed at initialization;
- ``trainable=False`` keeps gradients from scale and bias, at construction or per call;
- ``activation`` and ``residual`` are applied without being stored, ``invertible=True`` stores the output only;
- `BatchNorm` has ``momentum=None``, ``unbiased`` and ``update_running_average``; `GroupNorm` has ``axis``.

``use_fast_variance`` and ``force_float32_reductions`` choose between algorithms in Flax. Here there is one: either
choice gives the stable statistics, in float32 at least.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype

from jaxnorm import _layers
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation
from jaxnorm.variants.linen import *  # noqa: F403

Groups = Sequence[Sequence[int]]
Initializer = nn.initializers.Initializer

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class _Layer(nn.Module):
    """What all layers do with their variables and settings."""

    def _parameters(self, shape: tuple[int, ...], trainable: bool | None) -> tuple[Any, Any]:
        """Scale and bias of ``shape``, or None; constants to differentiation where they do not train."""
        layer: Any = self
        trainable = layer.trainable if trainable is None else trainable

        def parameter(name, init, used):
            if not used:
                return None
            if self.has_variable("params", name):
                stored = meta.unbox(self.get_variable("params", name))
                _layers.check_features(type(self).__name__, shape, jnp.shape(stored))
            value = self.param(name, init, shape, layer.param_dtype)
            return value if trainable else jax.lax.stop_gradient(value)

        scale = parameter("scale", layer.scale_init, layer.use_scale)
        has_bias = getattr(layer, "use_bias", False)
        return scale, parameter("bias", layer.bias_init, True) if has_bias else None

    def _replicas(self) -> _layers.Replicas:
        layer: Any = self
        if self.is_initializing():
            return _layers.Replicas(None, None)
        return _layers.Replicas(layer.axis_name, layer.axis_index_groups)

    def _normalize(self, x, scale, bias, mask, residual, **reduction) -> jax.Array:
        layer: Any = self
        return _layers.normalize(
            type(self).__name__,
            x,
            scale,
            bias,
            replicas=self._replicas(),
            epsilon=layer.epsilon,
            mask=mask,
            dtype=canonicalize_dtype(x, scale, bias, dtype=layer.dtype),
            activation=layer.activation,
            residual=residual,
            invertible=layer.invertible,
            **reduction,
        )


class BatchNorm(_Layer):
    """Batch normalization (Ioffe and Szegedy, 2015), in place of ``flax.linen.BatchNorm``.

    Variables, all in the shape of the feature axes: ``params/scale`` and ``params/bias`` of dtype ``param_dtype``,
    ``batch_stats/mean`` and ``batch_stats/var`` of dtype float32, and, only with ``momentum=None``,
    ``batch_stats/count``, the number of values averaged.

    The `jaxnorm.Moments` of each batch are sown as ``intermediates/moments``, where that collection is mutable.

    Three things can be switched separately, here or in the call: which statistics normalize
    (``use_running_average``), whether the running averages move (``update_running_average``), whether scale and bias
    receive gradients (``trainable``).

    Attributes:
      use_running_average: normalize by the running averages instead of the statistics of the batch.
      axis: the feature axis, or several.
      momentum: the weight of the *old* running average, in [0, 1]: ``1 - alpha`` of `jaxnorm.update_running`. None for
        the cumulative average.
      epsilon: added to the variance.
      dtype: of the output; None for the promotion of input and parameters.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: mapped axis or axes whose replicas are normalized together. Need not exist at initialization or where
        the running averages are used. Under ``jit`` with a sharded batch leave it out: the statistics are global.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the stable statistics.
      force_float32_reductions: either choice gives statistics in float32 at least.
      unbiased: average the unbiased variance, as PyTorch does.
      update_running_average: None to update them when they are not used. With False no collection needs to be mutable.
      trainable: whether scale and bias receive gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import BatchNorm
      >>> layer = BatchNorm(use_running_average=False, momentum=0.5)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, updates = layer.apply(variables, x, mutable="batch_stats")
      >>> updates["batch_stats"]["mean"].tolist()
      [1.0]
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    unbiased: bool = False
    update_running_average: bool | None = None
    trainable: bool = True
    activation: Activation = None
    invertible: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.typing.ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: jax.typing.ArrayLike | None = None,
        update_running_average: bool | None = None,
        trainable: bool | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize ``x``; the other arguments are as the attributes of that name, and override them.

        Args:
          x: array with the features on ``axis``.
          use_running_average: must be given here or as the attribute, not both.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: None for the attribute.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those of initialization, or a batch holds one value per feature.
        """
        use_running = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = _layers.as_input(x)
        features = _layers.sorted_axes("BatchNorm", "axis", self.axis, x.ndim)
        shape = tuple(x.shape[a] for a in features)
        start = {"mean": jnp.zeros, "var": jnp.ones} | ({"count": jnp.zeros} if self.momentum is None else {})
        averages = [self.variable("batch_stats", name, init, shape, jnp.float32) for name, init in start.items()]
        _layers.check_features("BatchNorm", shape, jnp.shape(averages[0].value))
        scale, bias = self._parameters(shape, trainable)
        y, batch, running = _layers.batch_norm(
            x,
            scale,
            bias,
            [average.value for average in averages],
            features=features,
            use_running_average=bool(use_running),
            update_running_average=_layers.first_given(update_running_average, self.update_running_average),
            initializing=self.is_initializing(),
            momentum=self.momentum,
            unbiased=self.unbiased,
            replicas=self._replicas(),
            epsilon=self.epsilon,
            mask=mask,
            dtype=canonicalize_dtype(x, scale, bias, dtype=self.dtype),
            activation=self.activation,
            residual=residual,
            invertible=self.invertible,
        )
        for average, new in zip(averages, running or (), strict=False):
            average.value = new
        if batch is not None and not self.is_initializing():
            self.sow("intermediates", "moments", batch)
        return y


class LayerNorm(_Layer):
    """Layer normalization (Ba, Kiros and Hinton, 2016), in place of ``flax.linen.LayerNorm``.

    Variables: ``params/scale`` and ``params/bias``, in the shape of the feature axes.

    Attributes:
      epsilon: added to the variance.
      dtype: of the output; None for the promotion of input and parameters.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: axis or axes that share their statistics.
      feature_axes: axis or axes of scale and bias.
      axis_name: mapped axis or axes over which the reduced axes are split.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the stable statistics.
      force_float32_reductions: either choice gives statistics in float32 at least.
      trainable: whether scale and bias receive gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import LayerNorm
      >>> LayerNorm(epsilon=0.0).init_with_output(jax.random.key(0), jnp.array([1.0, 3.0]))[0].tolist()
      [-1.0, 1.0]
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    trainable: bool = True
    activation: Activation = None
    invertible: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.typing.ArrayLike,
        *,
        mask: jax.typing.ArrayLike | None = None,
        trainable: bool | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array of any shape with the axes named by the attributes.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.
        """
        x = _layers.as_input(x)
        features = _layers.sorted_axes("LayerNorm", "feature_axes", self.feature_axes, x.ndim)
        axes = _layers.sorted_axes("LayerNorm", "reduction_axes", self.reduction_axes, x.ndim)
        scale, bias = self._parameters(tuple(x.shape[a] for a in features), trainable)
        return self._normalize(x, scale, bias, mask, residual, features=features, axes=axes)


class RMSNorm(_Layer):
    """Root mean square normalization (Zhang and Sennrich, 2019), in place of ``flax.linen.RMSNorm``.

    Variables: ``params/scale``, in the shape of the feature axes.

    Attributes:
      epsilon: added to the mean square.
      dtype: of the output; None for the promotion of input and parameters.
      param_dtype: of the scale.
      use_scale: whether there is a scale.
      scale_init: initializer of the scale.
      reduction_axes: axis or axes that share their statistics.
      feature_axes: axis or axes of the scale.
      axis_name: mapped axis or axes over which the reduced axes are split.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the same.
      force_float32_reductions: either choice gives statistics in float32 at least.
      trainable: whether the scale receives gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import RMSNorm
      >>> RMSNorm(epsilon=0.0).init_with_output(jax.random.key(0), jnp.array([3.0, -3.0]))[0].tolist()
      [1.0, -1.0]
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    trainable: bool = True
    activation: Activation = None
    invertible: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.typing.ArrayLike,
        *,
        mask: jax.typing.ArrayLike | None = None,
        trainable: bool | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array of any shape with the axes named by the attributes.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.
        """
        x = _layers.as_input(x)
        features = _layers.sorted_axes("RMSNorm", "feature_axes", self.feature_axes, x.ndim)
        axes = _layers.sorted_axes("RMSNorm", "reduction_axes", self.reduction_axes, x.ndim)
        scale, _ = self._parameters(tuple(x.shape[a] for a in features), trainable)
        return self._normalize(x, scale, None, mask, residual, features=features, axes=axes, centered=False)


class GroupNorm(_Layer):
    """Group normalization (Wu and He, 2018), in place of ``flax.linen.GroupNorm``.

    Variables: ``params/scale`` and ``params/bias``, one per channel.

    Attributes:
      num_groups: how many groups of neighbouring channels; None where ``group_size`` says it.
      group_size: how many channels a group has, with ``num_groups=None``.
      epsilon: added to the variance.
      dtype: of the output; None for the promotion of input and parameters.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: axes that share their statistics, that of the channels included; None for all but the first.
      axis_name: mapped axis or axes over which the reduced axes are split.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the stable statistics.
      force_float32_reductions: either choice gives statistics in float32 at least.
      axis: the channel axis.
      trainable: whether scale and bias receive gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import GroupNorm
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> GroupNorm(num_groups=2, epsilon=0.0).init_with_output(jax.random.key(0), x)[0].tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: Axes | None = None
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    axis: int = -1
    trainable: bool = True
    activation: Activation = None
    invertible: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.typing.ArrayLike,
        *,
        mask: jax.typing.ArrayLike | None = None,
        trainable: bool | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array of shape ``(batch, ...)`` with the channels on ``axis``.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the groups do not divide the channels.
        """
        x = _layers.as_input(x)
        (channel,) = _layers.sorted_axes("GroupNorm", "axis", self.axis, x.ndim)
        channels = x.shape[channel]
        groups = _layers.group_count("GroupNorm", self.num_groups, self.group_size, channels)
        axes = _layers.group_axes("GroupNorm", channel, self.reduction_axes, x.ndim)
        scale, bias = self._parameters((channels,), trainable)
        return self._normalize(
            x, scale, bias, mask, residual, features=(channel,), axes=axes, channel_groups=(channel, groups)
        )


class InstanceNorm(_Layer):
    """Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016), in place of ``flax.linen.InstanceNorm``.

    Variables: ``params/scale`` and ``params/bias``, in the shape of the feature axes.

    Attributes:
      epsilon: added to the variance.
      dtype: of the output; None for the promotion of input and parameters.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: axis or axes that keep statistics of their own, and of scale and bias; not the first, the batch.
      axis_name: mapped axis or axes over which the reduced axes are split.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the stable statistics.
      force_float32_reductions: either choice gives statistics in float32 at least.
      trainable: whether scale and bias receive gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import InstanceNorm
      >>> x = jnp.array([[[1.0], [3.0]]])
      >>> InstanceNorm(epsilon=0.0).init_with_output(jax.random.key(0), x)[0].tolist()
      [[[-1.0], [1.0]]]
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    feature_axes: Axes = -1
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    trainable: bool = True
    activation: Activation = None
    invertible: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.typing.ArrayLike,
        *,
        mask: jax.typing.ArrayLike | None = None,
        trainable: bool | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array of shape ``(batch, ...)``.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.
        """
        x = _layers.as_input(x)
        features = _layers.sorted_axes("InstanceNorm", "feature_axes", self.feature_axes, x.ndim)
        axes = _layers.instance_axes("InstanceNorm", features, x.ndim)
        scale, bias = self._parameters(tuple(x.shape[a] for a in features), trainable)
        return self._normalize(x, scale, bias, mask, residual, features=features, axes=axes)
