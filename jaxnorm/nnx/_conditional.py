"""Norms whose scale and bias are computed from a condition, of shape ``(batch, conditions)``."""

from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxnorm
from jaxnorm import _layers
from jaxnorm.functional import Array
from jaxnorm.nnx._norms import ONES, ZEROS, BatchNorm, layer, signed
from jaxnorm.nnx._remedies import Example


class Modulation(nnx.Module):
    """Scale and bias of each example, computed from a condition of shape ``(batch, conditions)``."""

    def __init__(self, conditions: int, features: int, *, parts: int = 2, rngs: nnx.Rngs) -> None:
        self.parts = parts
        self.dense = nnx.Linear(conditions, parts * features, kernel_init=ZEROS, rngs=rngs)

    def __call__(self, condition: Array) -> list[jax.Array]:
        """Scale, bias and the other parts."""
        scale, *rest = jnp.split(self.dense(jnp.asarray(condition)), self.parts, axis=-1)
        return [1 + scale, *rest]


def _modulate(
    norm: Any, rngs: nnx.Rngs, scale_init: Any, scale_metadata: Any, bias_init: Any, bias_metadata: Any
) -> None:
    """Give a norm, which has no scale and no bias of its own, what computes them."""
    given = {"scale_init": scale_init} if scale_init is not ONES else {}
    given |= {"bias_init": bias_init} if bias_init is not ZEROS else {}
    given |= {n: v for n, v in (("scale_metadata", scale_metadata), ("bias_metadata", bias_metadata)) if v}
    given |= {n: v for n in ("use_scale", "use_bias") if not (v := getattr(norm, n))}
    given |= {"zero_centered_scale": True} if norm.zero_centered_scale else {}
    _layers.refuse(_layers.label(norm), given, "scale and bias are computed from the condition")
    norm.use_scale = norm.use_bias = False
    norm.modulation = Modulation(norm.conditions, norm.num_features, rngs=rngs)


@layer()
class ConditionalBatchNorm(BatchNorm):
    """Batch normalization with scale and bias from a condition, of classes a one-hot vector (de Vries et al., 2017).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import ConditionalBatchNorm
      >>> layer = ConditionalBatchNorm(1, 1, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> layer.modulation.dense.kernel[...] = jnp.array([[1.0, 10.0]])  # scale 1 + c, bias 10 c
      >>> layer(jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [1.0]])).tolist()
      [[-1.0], [12.0]]
    """

    conditions: int = field(kw_only=False)
    """The size of the condition."""
    modulation: Modulation = field(init=False)

    def __post_init__(self, scale_init, rngs, scale_metadata, bias_init, bias_metadata) -> None:
        """Make the variables."""
        _modulate(self, rngs, scale_init, scale_metadata, bias_init, bias_metadata)
        super().__post_init__(scale_init, rngs, scale_metadata, bias_init, bias_metadata)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: jax.Array,
        condition: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        update_running_average: bool | None = None,
        trainable: bool | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize ``x`` by its own statistics, which move the running averages, or by those.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``, from which scale and bias are computed.
          use_running_average: normalize by the running averages, not by the statistics of the batch; None for the
            attribute. Must be given here or there.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: whether the running averages move; None for the attribute.
          trainable: whether scale and bias receive gradients; None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: an argument does not fit.
        """
        switches = {"update_running_average": update_running_average, "trainable": trainable}
        affine = self.modulation(condition)
        return self._output(x, use_running_average, mask=mask, residual=residual, affine=affine, **switches)


@layer()
class Conditional(Example):
    """Of single examples, each with its own scale and bias."""

    conditions: int = field(kw_only=False)
    """The size of the condition."""
    modulation: Modulation = field(init=False)

    def __post_init__(self, scale_init, rngs, scale_metadata, bias_init, bias_metadata) -> None:
        """Make the variables."""
        _modulate(self, rngs, scale_init, scale_metadata, bias_init, bias_metadata)
        super().__post_init__(scale_init, rngs, scale_metadata, bias_init, bias_metadata)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: jax.Array,
        condition: Array,
        *,
        mask: Array | None = None,
        trainable: bool | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize each example of ``x`` separately, with scale and bias from ``condition``.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: whether scale and bias receive gradients; None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: an argument does not fit.
        """
        affine = self.modulation(condition)
        return self._output(x, mask=mask, trainable=trainable, residual=residual, affine=affine)


@layer()
class ConditionalInstanceNorm(Conditional):
    """Instance normalization with scale and bias from a condition (Dumoulin et al., 2017).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import ConditionalInstanceNorm
      >>> layer = ConditionalInstanceNorm(1, 1, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> layer.modulation.dense.kernel[...] = jnp.array([[1.0, 10.0]])  # scale 1 + c, bias 10 c
      >>> layer(jnp.array([[[1.0], [3.0]]]), jnp.array([[1.0]])).tolist()
      [[[8.0], [12.0]]]
    """

    epsilon: float = 1e-5

    def _by_examples(self, x, **given):
        return jaxnorm.instance_norm(x, **given)


@layer()
class ConditionalLayerNorm(Conditional):
    """Layer normalization with scale and bias from a condition: adaLN (Peebles and Xie, 2023).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import ConditionalLayerNorm
      >>> layer = ConditionalLayerNorm(2, 1, rngs=nnx.Rngs(0))  # begins as layer normalization
      >>> layer(jnp.array([[1.0, 3.0]]), jnp.array([[1.0]])).round(3).tolist()
      [[-1.0, 1.0]]
    """

    def _by_examples(self, x, **given):
        return jaxnorm.layer_norm(x, **given)


@signed
class AdaLN(nnx.Module):
    """adaLN-Zero (Peebles and Xie, 2023): `ConditionalLayerNorm`, and a gate for what the block makes of its output.

    Args:
      num_features: how many features.
      conditions: the size of the condition.
      axis: the feature axis.
      epsilon: added to the variance.
      rngs: keys for the initializers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import AdaLN
      >>> y, gate = AdaLN(2, 5, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0]]), jnp.ones((1, 5)))
      >>> y.round(3).tolist(), gate.tolist()
      ([[-1.0, 1.0]], [[0.0, 0.0]])
    """

    def __init__(
        self, num_features: int, conditions: int, *, axis: int = -1, epsilon: float = 1e-6, rngs: nnx.Rngs
    ) -> None:
        self.axis, self.epsilon = axis, epsilon
        self.modulation = Modulation(conditions, num_features, parts=3, rngs=rngs)

    def __call__(self, x: Array, condition: Array) -> tuple[jax.Array, jax.Array]:
        """Normalize each example of ``x`` separately, with scale, bias and gate from ``condition``.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``.

        Returns:
          An array of the shape of ``x``; and the gate, zero at first, in a shape that broadcasts against it.

        Raises:
          ValueError: an argument does not fit.
        """
        scale, bias, gate = self.modulation(jax.nn.silu(jnp.asarray(condition)))
        x = jnp.asarray(x)
        x = x.astype(jnp.result_type(x, scale))
        y = jaxnorm.layer_norm(x, scale, bias, axis=self.axis, epsilon=self.epsilon)
        return y, _layers.along(x, self.axis, gate)


@signed
class FiLM(nnx.Module):
    """Feature-wise linear modulation (Perez et al., 2018): scale and bias from a condition, and no normalization.

    Args:
      num_features: how many features.
      conditions: the size of the condition.
      axis: the feature axis.
      rngs: keys for the initializers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import FiLM
      >>> layer = FiLM(1, 1, rngs=nnx.Rngs(0))
      >>> layer.modulation.dense.kernel[...] = jnp.array([[1.0, 10.0]])  # scale 1 + c, bias 10 c
      >>> layer(jnp.array([[3.0]]), jnp.array([[1.0]])).tolist()
      [[16.0]]
    """

    def __init__(self, num_features: int, conditions: int, *, axis: int = -1, rngs: nnx.Rngs) -> None:
        self.axis, self.modulation = axis, Modulation(conditions, num_features, rngs=rngs)

    def __call__(self, x: Array, condition: Array) -> jax.Array:
        """Scale and shift every example of ``x`` by what is computed from ``condition``.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``.

        Returns:
          An array of the shape of ``x``.
        """
        x = jnp.asarray(x)
        scale, bias = (_layers.along(x, self.axis, v) for v in self.modulation(condition))
        return x * scale + bias


@signed
class AdaIN(nnx.Module):
    """Adaptive instance normalization (Huang and Belongie, 2017): mean and deviation of a style. Nothing is learned.

    Args:
      axis: the feature axis.
      epsilon: added to the variances.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm.nnx import AdaIN
      >>> content, style = jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0], [10.0], [30.0]]])
      >>> AdaIN(epsilon=0.0)(content, style).tolist()
      [[[10.0], [30.0]]]
    """

    def __init__(self, *, axis: int = -1, epsilon: float = 1e-5) -> None:
        self.axis, self.epsilon = axis, epsilon

    def __call__(self, x: Array, style: Array) -> jax.Array:
        """Give the content ``x`` the mean and the deviation of every example and channel of ``style``.

        Args:
          x: array of shape ``(batch, ...)`` with the channels on ``axis``.
          style: array of shape ``(batch, ...)`` with as many channels on ``axis``; the other axes may have other sizes.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: examples or channels are not as many in both.
        """
        return _layers.styled(x, style, self.axis, self.epsilon)
