"""Normalization layers for Flax NNX: parameters and running averages around the engine, no arithmetic.

They take the arguments of the ``flax.nnx`` class of the same name, by position and by keyword, and hold the same
variables, so that ``from jaxnorm.nnx import BatchNorm`` in place of ``from flax.nnx import BatchNorm`` is all that
changes. What Flax lacks:

- ``num_features`` may be the shape of several feature axes;
- ``mask`` may have any shape that broadcasts, and be boolean or real weights;
- ``axis_name`` may be several mapped axes, and ``axis_index_groups`` work under ``shard_map`` and ``vmap``;
- ``trainable=False`` keeps gradients from scale and bias, at construction, by ``nnx.view`` or per call;
- ``activation`` and ``residual`` are applied without being stored, ``invertible=True`` stores the output only;
- `BatchNorm` has ``momentum=None``, ``unbiased`` and ``update_running_average``; `GroupNorm` has ``axis``.

``use_fast_variance`` chooses between algorithms in Flax. Here there is one: either choice gives the stable statistics,
in float32 at least. What ``promote_dtype`` makes of input, scale and bias is used; running averages stay float32
whatever it makes of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.initializers import ones_init, zeros_init

from jaxnorm import _layers
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation
from jaxnorm.variants.nnx import *  # noqa: F403

Groups = Sequence[Sequence[int]]
Metadata = Mapping[str, Any]
Initializer = jax.nn.initializers.Initializer
NO_METADATA: Metadata = MappingProxyType({})
ZEROS, ONES = zeros_init(), ones_init()

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class _Layer(nnx.Module):
    """What all layers do with their parameters and settings."""

    scale: nnx.Param | None
    bias: nnx.Param | None
    num_features: int | tuple[int, ...]
    epsilon: float
    dtype: Any
    promote_dtype: Callable[..., Any]
    axis_name: AxisNames | None
    axis_index_groups: Groups | None
    trainable: bool
    activation: Activation
    invertible: bool

    def _create(self, rngs, param_dtype, scale, bias, **settings) -> None:
        """Keep ``settings``; make scale and bias from (used, initializer, metadata)."""
        for name, value in settings.items():
            setattr(self, name, tuple(value) if name == "num_features" and isinstance(value, Sequence) else value)
        self.param_dtype = param_dtype
        self.use_scale, self.use_bias = scale[0], bias[0]
        for name, (used, init, metadata) in (("scale", scale), ("bias", bias)):
            value = nnx.Param(init(rngs.params(), self._shape, param_dtype), **metadata) if used else nnx.data(None)
            setattr(self, name, value)

    @property
    def _shape(self) -> tuple[int, ...]:
        """The shape of the variables."""
        return self.num_features if isinstance(self.num_features, tuple) else (self.num_features,)

    def _fit(self, value: Any, shape: tuple[int, ...]) -> Any:
        """A variable in the shape of the feature axes; Flax keeps that of several axes as one vector."""
        name = type(self).__name__
        if self._shape != (math.prod(shape),):
            _layers.check_features(name, shape, self._shape)
        return None if value is None else value.reshape(shape)

    def _promoted(self, x, shape, trainable, *between) -> tuple[jax.Array, jax.Array | None, jax.Array | None, Any]:
        """Input, scale and bias as ``promote_dtype`` gives them, and the dtype of the output."""
        parameters = [None if p is None else p[...] for p in (self.scale, self.bias)]
        if not (self.trainable if trainable is None else trainable):
            parameters = [None if p is None else jax.lax.stop_gradient(p) for p in parameters]
        if isinstance(self, RMSNorm):
            x, scale = self.promote_dtype((x, parameters[0]), dtype=self.dtype)
            bias = None
        else:
            x, *_, scale, bias = self.promote_dtype((x, *between, *parameters), dtype=self.dtype)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        return _layers.as_input(x), self._fit(scale, shape), self._fit(bias, shape), dtype

    def _normalize(self, x, features, axes, mask, trainable, residual, **reduction) -> jax.Array:
        x, scale, bias, dtype = self._promoted(x, tuple(x.shape[a] for a in features), trainable)
        return _layers.normalize(
            type(self).__name__,
            x,
            scale,
            bias,
            features=features,
            axes=axes,
            replicas=_layers.Replicas(self.axis_name, self.axis_index_groups),
            epsilon=self.epsilon,
            mask=mask,
            dtype=dtype,
            activation=self.activation,
            residual=residual,
            invertible=self.invertible,
            **reduction,
        )

    def set_view(self, trainable: bool | None = None) -> None:
        """Used by ``nnx.view``.

        Args:
          trainable: whether scale and bias receive gradients.
        """
        if trainable is not None:
            self.trainable = trainable


class BatchNorm(_Layer):
    """Batch normalization (Ioffe and Szegedy, 2015), in place of ``flax.nnx.BatchNorm``.

    Variables: ``scale`` and ``bias`` (``nnx.Param``); ``mean`` and ``var``, float32, and, only with ``momentum=None``,
    ``count``, the number of values averaged (``nnx.BatchStat``).

    Three things can be switched separately, here, by ``nnx.view`` or in the call: which statistics normalize
    (``use_running_average``; ``train()`` and ``eval()`` set it too), whether the running averages move
    (``update_running_average``), whether scale and bias receive gradients (``trainable``).

    Args:
      num_features: how many features, or the shape of the feature axes.
      use_running_average: normalize by the running averages instead of the statistics of the batch.
      axis: the feature axis, or several.
      momentum: the weight of the *old* running average, in [0, 1]: ``1 - alpha`` of `jaxnorm.update_running`. None for
        the cumulative average.
      epsilon: added to the variance.
      dtype: of the output, and what ``promote_dtype`` converts to; None for the promotion of input and parameters.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: mapped axis or axes whose replicas are normalized together. Need not exist where the running averages
        are used. Under ``jit`` with a sharded batch leave it out: the statistics are global.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the stable statistics.
      promote_dtype: converts ``(x, mean, var, scale, bias)``, called with the keyword ``dtype``.
      rngs: keys for the initializers.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.
      unbiased: average the unbiased variance, as PyTorch does.
      update_running_average: None to update them when they are not used.
      trainable: whether scale and bias receive gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import BatchNorm
      >>> layer = BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [3.0]]))
      >>> layer.mean[...].tolist()
      [1.0]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        unbiased: bool = False,
        update_running_average: bool | None = None,
        trainable: bool = True,
        activation: Activation = None,
        invertible: bool = False,
    ) -> None:
        self._create(
            rngs,
            param_dtype,
            (use_scale, scale_init, scale_metadata),
            (use_bias, bias_init, bias_metadata),
            num_features=num_features,
            epsilon=epsilon,
            dtype=dtype,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            trainable=trainable,
            activation=activation,
            invertible=invertible,
        )
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.unbiased = unbiased
        self.update_running_average = update_running_average
        self.mean = nnx.BatchStat(jnp.zeros(self._shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(self._shape, jnp.float32))
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros(self._shape, jnp.float32))

    def __call__(
        self,
        x: jax.Array,
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
          use_running_average: None for the attribute; must be given here or there.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: None for the attribute.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those the layer was built for, or a batch holds one value per feature.
        """
        use_running = _layers.first_given(use_running_average, self.use_running_average)
        use_running = _layers.check_given("BatchNorm", "use_running_average", use_running)
        features = _layers.sorted_axes("BatchNorm", "axis", self.axis, jnp.ndim(x))
        shape = tuple(x.shape[a] for a in features)
        averages = [self.mean, self.var] + ([self.count] if self.momentum is None else [])
        x, scale, bias, dtype = self._promoted(x, shape, trainable, self.mean[...], self.var[...])
        y, _, running = _layers.batch_norm(
            x,
            scale,
            bias,
            [self._fit(average[...], shape) for average in averages],
            features=features,
            use_running_average=use_running,
            update_running_average=_layers.first_given(update_running_average, self.update_running_average),
            initializing=False,
            momentum=self.momentum,
            unbiased=self.unbiased,
            replicas=_layers.Replicas(self.axis_name, self.axis_index_groups),
            epsilon=self.epsilon,
            mask=mask,
            dtype=dtype,
            activation=self.activation,
            residual=residual,
            invertible=self.invertible,
        )
        for average, new in zip(averages, running or (), strict=False):
            average[...] = new.reshape(self._shape)
        return y

    def set_view(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        use_running_average: bool | None = None,
        update_running_average: bool | None = None,
        trainable: bool | None = None,
    ) -> None:
        """Used by ``nnx.view``.

        Args:
          use_running_average: normalize by the running averages instead of the statistics of the batch.
          update_running_average: whether the running averages move.
          trainable: whether scale and bias receive gradients.
        """
        super().set_view(trainable)
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_running_average is not None:
            self.update_running_average = update_running_average


class LayerNorm(_Layer):
    """Layer normalization (Ba, Kiros and Hinton, 2016), in place of ``flax.nnx.LayerNorm``.

    Variables: ``scale`` and ``bias`` (``nnx.Param``).

    Args:
      num_features: how many features, or the shape of the feature axes.
      epsilon: added to the variance.
      dtype: of the output, and what ``promote_dtype`` converts to; None for the promotion of input and parameters.
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
      promote_dtype: converts ``(x, scale, bias)``, called with the keyword ``dtype``.
      rngs: keys for the initializers.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.
      trainable: whether scale and bias receive gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import LayerNorm
      >>> LayerNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))(jnp.array([1.0, 3.0])).tolist()
      [-1.0, 1.0]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        trainable: bool = True,
        activation: Activation = None,
        invertible: bool = False,
    ) -> None:
        self._create(
            rngs,
            param_dtype,
            (use_scale, scale_init, scale_metadata),
            (use_bias, bias_init, bias_metadata),
            num_features=num_features,
            epsilon=epsilon,
            dtype=dtype,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            trainable=trainable,
            activation=activation,
            invertible=invertible,
        )
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.typing.ArrayLike | None = None,
        trainable: bool | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array of any shape with the axes named at construction.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those the layer was built for.
        """
        features = _layers.sorted_axes("LayerNorm", "feature_axes", self.feature_axes, jnp.ndim(x))
        axes = _layers.sorted_axes("LayerNorm", "reduction_axes", self.reduction_axes, jnp.ndim(x))
        return self._normalize(x, features, axes, mask, trainable, residual)


class RMSNorm(_Layer):
    """Root mean square normalization (Zhang and Sennrich, 2019), in place of ``flax.nnx.RMSNorm``.

    Variables: ``scale`` (``nnx.Param``).

    Args:
      num_features: how many features, or the shape of the feature axes.
      epsilon: added to the mean square.
      dtype: of the output, and what ``promote_dtype`` converts to; None for the promotion of input and parameters.
      param_dtype: of the scale.
      use_scale: whether there is a scale.
      scale_init: initializer of the scale.
      reduction_axes: axis or axes that share their statistics.
      feature_axes: axis or axes of the scale.
      axis_name: mapped axis or axes over which the reduced axes are split.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the same.
      promote_dtype: converts ``(x, scale)``, called with the keyword ``dtype``.
      rngs: keys for the initializers.
      scale_metadata: metadata of the scale.
      trainable: whether the scale receives gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import RMSNorm
      >>> RMSNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))(jnp.array([3.0, -3.0])).tolist()
      [1.0, -1.0]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ONES,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Metadata = NO_METADATA,
        trainable: bool = True,
        activation: Activation = None,
        invertible: bool = False,
    ) -> None:
        self._create(
            rngs,
            param_dtype,
            (use_scale, scale_init, scale_metadata),
            (False, ZEROS, NO_METADATA),
            num_features=num_features,
            epsilon=epsilon,
            dtype=dtype,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            trainable=trainable,
            activation=activation,
            invertible=invertible,
        )
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes

    def __call__(
        self,
        x: jax.Array,
        mask: jax.typing.ArrayLike | None = None,
        *,
        trainable: bool | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array of any shape with the axes named at construction.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those the layer was built for.
        """
        features = _layers.sorted_axes("RMSNorm", "feature_axes", self.feature_axes, jnp.ndim(x))
        axes = _layers.sorted_axes("RMSNorm", "reduction_axes", self.reduction_axes, jnp.ndim(x))
        return self._normalize(x, features, axes, mask, trainable, residual, centered=False)


class GroupNorm(_Layer):
    """Group normalization (Wu and He, 2018), in place of ``flax.nnx.GroupNorm``.

    Variables: ``scale`` and ``bias`` (``nnx.Param``), one per channel.

    Args:
      num_features: how many channels.
      num_groups: how many groups of neighbouring channels; None where ``group_size`` says it.
      group_size: how many channels a group has, with ``num_groups=None``.
      epsilon: added to the variance.
      dtype: of the output, and what ``promote_dtype`` converts to; None for the promotion of input and parameters.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: axes that share their statistics, that of the channels included; None for all but the first.
      axis_name: mapped axis or axes over which the reduced axes are split.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the stable statistics.
      promote_dtype: converts ``(x, scale, bias)``, called with the keyword ``dtype``.
      rngs: keys for the initializers.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.
      axis: the channel axis.
      trainable: whether scale and bias receive gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import GroupNorm
      >>> layer = GroupNorm(4, num_groups=2, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        reduction_axes: Axes | None = None,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        axis: int = -1,
        trainable: bool = True,
        activation: Activation = None,
        invertible: bool = False,
    ) -> None:
        self.num_groups = _layers.group_count("GroupNorm", num_groups, group_size, num_features)
        self.group_size = num_features // self.num_groups
        self._create(
            rngs,
            param_dtype,
            (use_scale, scale_init, scale_metadata),
            (use_bias, bias_init, bias_metadata),
            num_features=num_features,
            epsilon=epsilon,
            dtype=dtype,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            trainable=trainable,
            activation=activation,
            invertible=invertible,
        )
        self.reduction_axes = reduction_axes
        self.axis = axis

    def __call__(
        self,
        x: jax.Array,
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
          ValueError: the features are not those the layer was built for.
        """
        (channel,) = _layers.sorted_axes("GroupNorm", "axis", self.axis, jnp.ndim(x))
        axes = _layers.group_axes("GroupNorm", channel, self.reduction_axes, jnp.ndim(x))
        return self._normalize(
            x, (channel,), axes, mask, trainable, residual, channel_groups=(channel, self.num_groups)
        )


class InstanceNorm(_Layer):
    """Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016), in place of ``flax.nnx.InstanceNorm``.

    Variables: ``scale`` and ``bias`` (``nnx.Param``).

    Args:
      num_features: how many features, or the shape of the feature axes.
      epsilon: added to the variance.
      dtype: of the output, and what ``promote_dtype`` converts to; None for the promotion of input and parameters.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: axis or axes that keep statistics of their own, and of scale and bias; not the first, the batch.
      axis_name: mapped axis or axes over which the reduced axes are split.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      use_fast_variance: either choice gives the stable statistics.
      promote_dtype: converts ``(x, scale, bias)``, called with the keyword ``dtype``.
      rngs: keys for the initializers.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.
      trainable: whether scale and bias receive gradients.
      activation: applied last: None, a function, or the name of one (relu, leaky_relu, silu, gelu, ...).
      invertible: keep the output for the backward pass in place of the input; see `jaxnorm.batch_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import InstanceNorm
      >>> InstanceNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))(jnp.array([[[1.0], [3.0]]])).tolist()
      [[[-1.0], [1.0]]]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        feature_axes: Axes = -1,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        trainable: bool = True,
        activation: Activation = None,
        invertible: bool = False,
    ) -> None:
        self._create(
            rngs,
            param_dtype,
            (use_scale, scale_init, scale_metadata),
            (use_bias, bias_init, bias_metadata),
            num_features=num_features,
            epsilon=epsilon,
            dtype=dtype,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            trainable=trainable,
            activation=activation,
            invertible=invertible,
        )
        self.feature_axes = feature_axes

    def __call__(
        self,
        x: jax.Array,
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

        Raises:
          ValueError: the features are not those the layer was built for.
        """
        features = _layers.sorted_axes("InstanceNorm", "feature_axes", self.feature_axes, jnp.ndim(x))
        axes = _layers.instance_axes("InstanceNorm", features, jnp.ndim(x))
        return self._normalize(x, features, axes, mask, trainable, residual)
