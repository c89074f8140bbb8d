"""Recurrent batch normalization (Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017)."""

from dataclasses import InitVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxnorm import _layers
from jaxnorm._axes import AxisNames
from jaxnorm.functional import Array, Groups
from jaxnorm.nnx._norms import BatchNorm, Initializer, layer, signed
from jaxnorm.variants.sequences import extend_steps

SMALL = jax.nn.initializers.constant(0.1)


@layer()
class StepBatchNorm(BatchNorm):
    """Batch normalization of one time step (Cooijmans et al., 2017); initialized with a scale of 0.1 and no bias.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import StepBatchNorm
      >>> layer = StepBatchNorm(1, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.array([[1.0], [3.0]])).round(3).ravel())
      [-0.1  0.1]
    """

    scale_init: InitVar[Initializer] = SMALL
    use_bias: bool = False
    steps: int | None = None
    """How many time steps have averages of their own, each seen separately under ``nnx.scan``; None for none."""

    _counts = True

    def __post_init__(self, *initial: Any) -> None:
        """Make the variables, with an axis of time to be split by ``nnx.scan``."""
        super().__post_init__(*initial)
        if self.steps is not None:
            for name in ("mean", "var", "count"):
                value = getattr(self, name)[...]
                setattr(self, name, nnx.BatchStat(jnp.broadcast_to(value, (self.steps, *value.shape))))


@signed
class BatchNormLSTMCell(nnx.Module):
    """An LSTM cell with recurrent batch normalization (Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017).

    Every step has averages of its own, which ``nnx.scan`` splits along the first axis.

    Args:
      in_features: the size of the input.
      features: the size of the state.
      steps: how many steps there are.
      use_running_average: normalize by the running averages, not by the statistics of the batch. Default: False.
      momentum: the weight of the *old* running average; None for the cumulative average. Default: 0.99.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are normalized together.
      axis_index_groups: lists of replicas that together hold each once; each list is normalized separately.
      rngs: keys for the initializers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import BatchNormLSTMCell
      >>> cell = BatchNormLSTMCell(2, 4, steps=5, rngs=nnx.Rngs(0))
      >>> axes = nnx.StateAxes({nnx.BatchStat: 0, ...: None})
      >>> scan = nnx.scan(lambda cell, c, x: cell(c, x), in_axes=(axes, nnx.Carry, 1), out_axes=(nnx.Carry, 1))
      >>> _, y = scan(cell, (jnp.zeros((3, 4)),) * 2, jnp.ones((3, 5, 2)))
      >>> y.shape, cell.norm_c.mean.shape
      ((3, 5, 4), (5, 4))
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        steps: int,
        use_running_average: bool | None = False,
        momentum: float | None = 0.99,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        settings: dict[str, Any] = {"use_running_average": use_running_average, "momentum": momentum}
        settings |= {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
        orthogonal = nnx.initializers.orthogonal()
        self.dense_h = nnx.Linear(features, 4 * features, use_bias=False, kernel_init=orthogonal, rngs=rngs)
        self.dense_x = nnx.Linear(in_features, 4 * features, use_bias=False, rngs=rngs)
        self.norm_h, self.norm_x = (StepBatchNorm(4 * features, steps=steps, rngs=rngs, **settings) for _ in range(2))
        self.norm_c = StepBatchNorm(features, steps=steps, use_bias=True, rngs=rngs, **settings)
        self.bias = nnx.Param(jnp.zeros(4 * features))

    def __call__(self, carry: tuple[Any, Any], x: Array, mask: Array | None = None) -> tuple[Any, jax.Array]:
        """One step.

        Args:
          carry: cell and hidden state, each of shape ``(batch, features)``.
          x: array of shape ``(batch, in_features)``.
          mask: broadcasts against ``(batch, 1)``; which sequences are measured in this step. See `jaxnorm.standardize`.

        Returns:
          The new cell and hidden state, and the hidden state once more, as the output.

        Raises:
          ValueError: the shapes do not fit.
        """
        norms = [lambda v, norm=norm: norm(v, mask=mask) for norm in (self.norm_h, self.norm_x, self.norm_c)]
        return _layers.recurrent_step((self.dense_h, self.dense_x), norms, self.bias[...][None], carry, x)

    def extend(self, steps: int) -> None:
        """Continue the averages: steps beyond the last one seen have its averages, as by `jaxnorm.linen.extend_steps`.

        Args:
          steps: the new number of steps.
        """
        for norm in (self.norm_h, self.norm_x, self.norm_c):
            stored = {name: getattr(norm, name) for name in ("mean", "var", "count")}
            for name, value in extend_steps({n: v[...] for n, v in stored.items()}, steps).items():
                setattr(norm, name, nnx.BatchStat(value))
