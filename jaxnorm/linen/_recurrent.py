"""Recurrent batch normalization (Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017)."""

from typing import Any

import jax
from flax import linen as nn

from jaxnorm import _layers
from jaxnorm.functional import Array
from jaxnorm.linen._norms import BatchNorm, Initializer


class StepBatchNorm(BatchNorm):
    """Batch normalization of one time step, within ``nn.scan``; initialized with a scale of 0.1 and no bias.

    The norm of `BatchNormLSTMCell`, whose authors begin with 0.1 (Cooijmans et al., 2017).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import StepBatchNorm
      >>> layer, x = StepBatchNorm(use_running_average=False), jnp.array([[1.0], [3.0]])
      >>> print(layer.init_with_output(jax.random.key(0), x)[0].round(3).ravel())
      [-0.1  0.1]
    """

    scale_init: Initializer = nn.initializers.constant(0.1)
    use_bias: bool = False

    _counts = True


class BatchNormLSTMCell(nn.Module):
    """An LSTM cell with recurrent batch normalization (Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017).

    Under ``nn.scan(..., variable_axes={"batch_stats": 0}, variable_broadcast="params")`` every step has averages of its
    own; `jaxnorm.linen.extend_steps` continues them for longer sequences.

    Attributes:
      features: the size of the state.
      use_running_average: normalize by the running averages instead of the statistics of the batch.
      momentum: the weight of the *old* running average.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm.linen import BatchNormLSTMCell
      >>> axes = {"variable_axes": {"batch_stats": 0}, "variable_broadcast": "params", "split_rngs": {"params": False}}
      >>> rnn = nn.scan(BatchNormLSTMCell, in_axes=1, out_axes=1, **axes)(4, use_running_average=False)
      >>> x = jnp.ones((3, 5, 2))  # three sequences of five steps
      >>> variables = rnn.init(jax.random.key(0), (jnp.zeros((3, 4)),) * 2, x)
      >>> variables["batch_stats"]["norm_c"]["mean"].shape
      (5, 4)
    """

    features: int
    use_running_average: bool | None = None
    momentum: float = 0.99

    @nn.compact
    def __call__(self, carry: tuple[Any, Any], x: Array, mask: Array | None = None) -> tuple[Any, jax.Array]:
        """One step.

        Args:
          carry: cell and hidden state, each of shape ``(batch, features)``.
          x: array of shape ``(batch, inputs)``.
          mask: broadcasts against ``(batch, 1)``; which sequences are measured in this step. See `jaxnorm.standardize`.

        Returns:
          The new cell and hidden state, and the hidden state once more, as the output.

        Raises:
          ValueError: ``use_running_average`` is None, or the shapes do not fit.
        """

        def norm(name):
            layer = StepBatchNorm(
                use_running_average=self.use_running_average,
                momentum=self.momentum,
                use_bias=name == "norm_c",
                name=name,
            )
            return lambda v: layer(v, mask=mask)

        dense_h = nn.Dense(4 * self.features, use_bias=False, kernel_init=nn.initializers.orthogonal(), name="dense_h")
        dense_x = nn.Dense(4 * self.features, use_bias=False, name="dense_x")
        bias = self.param("bias", nn.initializers.zeros, (4 * self.features,))
        norms = [norm(name) for name in ("norm_h", "norm_x", "norm_c")]
        return _layers.recurrent_step((dense_h, dense_x), norms, bias[None], carry, x)
