"""Norms whose scale and bias are computed from a condition, of shape ``(batch, conditions)``.

``modulation``, a dense layer initialized with zeros, computes the scale less one and the bias.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxnorm
from jaxnorm import _layers
from jaxnorm.functional import Array
from jaxnorm.linen._norms import BatchNorm
from jaxnorm.linen._remedies import Example


def modulation(layer: nn.Module, x: Array, axis: Any, condition: Array, parts: int = 2) -> list[jax.Array]:
    """Scale, bias and the other parts, per example."""
    features = jnp.shape(x)[_layers.one_axis(_layers.label(layer, layer.path), axis)]
    dense = nn.Dense(parts * features, kernel_init=nn.initializers.zeros, name="modulation")
    scale, *rest = jnp.split(dense(condition), parts, axis=-1)
    return [1 + scale, *rest]


class ConditionalBatchNorm(BatchNorm):
    """Batch normalization with scale and bias from a condition, of classes a one-hot vector (de Vries et al., 2017).

    Example:
      It begins as batch normalization, whatever the condition:

      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import ConditionalBatchNorm
      >>> layer, x = ConditionalBatchNorm(use_running_average=False), jnp.array([[1.0], [3.0]])
      >>> layer.init_with_output(jax.random.key(0), x, jax.nn.one_hot(jnp.array([0, 1]), 2))[0].round(3).tolist()
      [[-1.0], [1.0]]

    References:
      de Vries et al., "Modulating early visual processing by language", NeurIPS 2017.
    """

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Array,
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
          use_running_average: normalize by the running averages, not by the statistics of the batch; must be given here
            or as the attribute, not both.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: whether the running averages move; None for the attribute.
          trainable: whether scale and bias receive gradients; None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: an argument does not fit.
        """
        _refuse(self)
        affine = modulation(self, x, self.axis, condition)
        switches = {"update_running_average": update_running_average, "trainable": trainable}
        return self._output(x, use_running_average, mask=mask, residual=residual, affine=affine, **switches)


class Conditional(Example):
    """Of single examples, each with its own scale and bias."""

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Array,
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
        _refuse(self)
        affine = modulation(self, x, self.axis, condition)
        return self._output(x, mask=mask, trainable=trainable, residual=residual, affine=affine)


def _refuse(layer: nn.Module) -> None:
    names = ("use_scale", "use_bias", "scale_init", "bias_init", "zero_centered_scale")
    given = {n: getattr(layer, n) for n in names if getattr(layer, n) != getattr(BatchNorm, n)}
    _layers.refuse(_layers.label(layer, layer.path), given, "scale and bias are computed from the condition")


class ConditionalInstanceNorm(Conditional):
    """Instance normalization with scale and bias from a condition (Dumoulin et al., 2017).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import ConditionalInstanceNorm
      >>> modulation = {"kernel": jnp.array([[1.0, 10.0]]), "bias": jnp.zeros(2)}  # scale 1 + c, bias 10 c
      >>> x, condition = jnp.array([[[1.0], [3.0]], [[1.0], [3.0]]]), jnp.array([[0.0], [1.0]])
      >>> layer = ConditionalInstanceNorm(epsilon=0.0)
      >>> layer.apply({"params": {"modulation": modulation}}, x, condition).tolist()
      [[[-1.0], [1.0]], [[8.0], [12.0]]]

    References:
      Dumoulin, Shlens and Kudlur, "A Learned Representation for Artistic Style", ICLR 2017.
    """

    epsilon: float = 1e-5

    @nn.nowrap
    def _by_examples(self, x, **given):
        return jaxnorm.instance_norm(x, **given)


class ConditionalLayerNorm(Conditional):
    """Layer normalization with scale and bias from a condition: adaLN (Peebles and Xie, 2023).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import ConditionalLayerNorm
      >>> modulation = {"kernel": jnp.array([[1.0, 1.0, 10.0, 10.0]]), "bias": jnp.zeros(4)}  # scale 1 + c, bias 10 c
      >>> layer, x = ConditionalLayerNorm(epsilon=0.0), jnp.array([[1.0, 3.0], [1.0, 3.0]])
      >>> layer.apply({"params": {"modulation": modulation}}, x, jnp.array([[0.0], [1.0]])).tolist()
      [[-1.0, 1.0], [8.0, 12.0]]

    References:
      Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023.
    """

    @nn.nowrap
    def _by_examples(self, x, **given):
        return jaxnorm.layer_norm(x, **given)


class AdaLN(nn.Module):
    """adaLN-Zero (Peebles and Xie, 2023): `ConditionalLayerNorm`, and a gate for what the block makes of its output.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import AdaLN
      >>> x, condition = jnp.array([[1.0, 3.0]]), jnp.ones((1, 5))
      >>> y, gate = AdaLN(epsilon=0.0).init_with_output(jax.random.key(0), x, condition)[0]
      >>> y.tolist(), gate.tolist()
      ([[-1.0, 1.0]], [[0.0, 0.0]])
    """

    axis: int = -1
    """The feature axis."""
    epsilon: float = 1e-6
    """Added to the variance, in the squared unit of the input."""

    @nn.compact
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
        scale, bias, gate = modulation(self, x, self.axis, jax.nn.silu(condition), parts=3)
        x = jnp.asarray(x)
        x = x.astype(jnp.result_type(x, scale))
        y = jaxnorm.layer_norm(x, scale, bias, axis=self.axis, epsilon=self.epsilon)
        return y, _layers.along(x, self.axis, gate)


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al., 2018): scale and bias from a condition, and no normalization.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm.linen import FiLM
      >>> modulation = {"kernel": jnp.array([[1.0, 10.0]]), "bias": jnp.zeros(2)}  # scale 1 + c, bias 10 c
      >>> FiLM().apply({"params": {"modulation": modulation}}, jnp.array([[3.0]]), jnp.array([[1.0]])).tolist()
      [[16.0]]

    References:
      Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
    """

    axis: int = -1
    """The feature axis."""

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> jax.Array:
        """Scale and shift every example of ``x`` by what is computed from ``condition``.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``.

        Returns:
          An array of the shape of ``x``.
        """
        x = jnp.asarray(x)
        scale, bias = (_layers.along(x, self.axis, v) for v in modulation(self, x, self.axis, condition))
        return x * scale + bias


class AdaIN(nn.Module):
    """Adaptive instance normalization (Huang and Belongie, 2017): mean and deviation of a style. Nothing is learned.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm.linen import AdaIN
      >>> content, style = jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0], [10.0], [30.0]]])
      >>> AdaIN(epsilon=0.0).apply({}, content, style).tolist()
      [[[10.0], [30.0]]]

    References:
      Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization", ICCV 2017.
    """

    axis: int = -1
    """The feature axis."""
    epsilon: float = 1e-5
    """Added to the variances, in the squared unit of the input."""

    @nn.compact
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
