"""Normalization layers for Flax Linen: parameters and collections around the pure functions, no arithmetic.

They take the arguments of the ``flax.linen`` class of the same name and hold the same variables, so that
``from jaxnorm import linen as nn`` in place of the import is the only change to a model.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype

from jaxnorm import _layers
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._batch_norm import RunningStats


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy, 2015), in place of ``flax.linen.BatchNorm``.

    Variables, all in the shape of the feature axes: ``params/scale`` and ``params/bias`` of dtype ``param_dtype``,
    ``batch_stats/mean`` and ``batch_stats/var`` of dtype float32.

    Attributes:
      use_running_average: normalize by the running averages instead of the statistics of the batch. May be given here
        or in the call.
      axis: the feature axis, or several.
      momentum: the weight of the *old* running average; ``1 - alpha`` of `jaxnorm.update_running`.
      epsilon: added to the variance.
      dtype: of the output; None for the promotion of input and parameters.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: mapped axis or axes whose replicas are normalized together. Need not exist at initialization or where
        the running averages are used. Under ``jit`` with a sharded batch leave it out: the statistics are global.
      axis_index_groups: lists of replicas; each is normalized with its own list only. Works under ``shard_map``,
        ``vmap`` and ``pmap``.
      use_fast_variance: either choice gives the stable statistics, at the same speed.
      force_float32_reductions: either choice gives float32 statistics.

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
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: AxisNames | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.typing.ArrayLike | None = None
    ) -> jax.Array:
        """Normalize ``x``; update the running averages unless they are used, or while initializing.

        Args:
          x: array with the features on ``axis``.
          use_running_average: as the attribute, where that is None.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.

        Returns:
          An array of the shape of ``x``.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        features = _layers.sorted_axes("BatchNorm", "axis", self.axis, x.ndim)
        shape = tuple(x.shape[a] for a in features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        y, running = _layers.batch_norm(
            x,
            scale,
            bias,
            RunningStats(mean.value, var.value, jnp.zeros(shape)),
            features=features,
            use_running_average=use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            mask=mask,
            dtype=canonicalize_dtype(x, scale, bias, dtype=self.dtype),
            initializing=self.is_initializing(),
        )
        if not (use_running_average or self.is_initializing()):
            mean.value, var.value = running.mean, running.var
        return y
