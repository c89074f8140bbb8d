"""The remedies as Flax Linen layers: parameters and collections, no arithmetic.

``params`` hold scale, bias and what a remedy learns besides; ``batch_stats`` hold ``mean`` and ``var`` of those with
running averages, and, of those with averages of each time step, ``count``. Where a condition modulates a norm,
``modulation``, a dense layer begun with zeros, computes the scale less one and the bias from it. Each paper is named in
full with the function that a layer wraps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype

import jaxnorm
from jaxnorm import _axes
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation
from jaxnorm._layers import documented
from jaxnorm.variants import _calls, _layers
from jaxnorm.variants._layers import extend_steps

Array = jax.typing.ArrayLike
Initializer = nn.initializers.Initializer

__all__ = [
    "AdaIN",
    "AdaLN",
    "BatchNormLSTMCell",
    "BatchRenorm",
    "ConditionalBatchNorm",
    "ConditionalInstanceNorm",
    "ConditionalLayerNorm",
    "DynamicTanh",
    "EvoNormB0",
    "EvoNormS0",
    "FiLM",
    "FilterResponseNorm",
    "GhostBatchNorm",
    "SequenceBatchNorm",
    "SplitBatchNorm",
    "StandardizedConv",
    "StandardizedDense",
    "StepBatchNorm",
    "SwitchableNorm",
    "extend_steps",
]


class _Remedy(nn.Module, kw_only=True):
    """A layer with scale and bias."""

    axis: Axes = -1
    """The feature axis, or several."""
    epsilon: float = 1e-5
    """Added to the variance, or the mean square, in the squared unit of the input."""
    dtype: Any = None
    """Of the output; None for the promotion of input and parameters."""
    param_dtype: Any = jnp.float32
    """Of the parameters."""
    use_bias: bool = True
    """Whether there is a bias."""
    use_scale: bool = True
    """Whether there is a scale."""
    bias_init: Initializer = nn.initializers.zeros
    """Initializer of the bias."""
    scale_init: Initializer = nn.initializers.ones
    """Initializer of the scale."""

    def _parameters(self, shape: tuple[int, ...]) -> dict[str, Any]:
        used = {"scale": (self.use_scale, self.scale_init), "bias": (self.use_bias, self.bias_init)}
        return {n: self.param(n, init, shape, self.param_dtype) if use else None for n, (use, init) in used.items()}

    def _output(self, x, *inputs, parameters=None, use_running_average=None, **settings) -> jax.Array:
        name, layer = _layers.name_of(self), self
        remedy, x = _layers.REMEDIES[name], jnp.asarray(x)
        shape = tuple(x.shape[a] for a in _axes.canonical_axes(name, "axis", self.axis, x.ndim))
        parameters = self._parameters((*remedy.affine(layer), *shape)) if parameters is None else parameters
        for extra, (own, start) in remedy.parameters.items():
            init = nn.initializers.constant(start)
            parameters[extra] = self.param(extra, init, shape if own is None else own, self.param_dtype)
        x = x.astype(canonicalize_dtype(x, *parameters.values(), dtype=self.dtype))
        stored, running = {}, None
        if remedy.infer is not None:
            shape = shape if remedy.leading is None else (remedy.leading(layer), *shape)
            for n in remedy.averages:
                stored[n] = self.variable("batch_stats", n, _layers.START[n], shape, jnp.float32)
            running = _layers.running_stats({n: variable.value for n, variable in stored.items()}, shape)
        initializing = self.is_initializing()
        y, new = _layers.call(
            layer, x, parameters, running, inputs, settings,
            use_running_average=use_running_average, initializing=initializing,
        )  # fmt: skip
        if new is not None:
            for n, variable in stored.items():
                variable.value = getattr(new, n)
        return y


class _Averaged(_Remedy, kw_only=True):
    """A layer with running averages."""

    use_running_average: bool | None = None
    """Normalize by the running averages instead of the statistics of the batch."""
    momentum: float = 0.99
    """The weight of the *old* running average, in [0, 1]."""
    axis_name: AxisNames | None = None
    """Mapped axis or axes whose replicas are normalized together; need not exist at initialization."""
    axis_index_groups: Sequence[Sequence[int]] | None = None
    """Lists of replicas; each is normalized with its own list only."""

    def _output(self, x, *inputs, use_running_average=None, **settings) -> jax.Array:
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        return super()._output(x, *inputs, use_running_average=use, **settings)


@documented("Attributes")
class GhostBatchNorm(_calls.Finished, _Averaged, kw_only=True):
    """`jaxnorm.ghost_batch_norm` (Hoffer, Hubara and Soudry, 2017) with scale, bias and running averages.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import GhostBatchNorm
      >>> layer = GhostBatchNorm(virtual_batch_size=2, use_running_average=False)
      >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
      >>> layer.init_with_output(jax.random.key(0), x)[0].round(3).tolist()
      [[-1.0], [1.0], [-1.0], [1.0]]
    """

    virtual_batch_size: int
    """How many consecutive examples are normalized together."""
    activation: Activation = None
    """Applied last."""

    __call__ = nn.compact(_calls.Finished.__call__)


@documented("Attributes")
class BatchRenorm(_calls.Finished, _Averaged, kw_only=True):
    """`jaxnorm.batch_renorm` (Ioffe, 2017) with scale, bias and running averages.

    ``batch_stats/steps`` counts the updates.

    Example:
      Within the bounds, training normalizes as inference does, here by averages that begin with mean 0 and variance 1:

      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import BatchRenorm
      >>> layer, x = BatchRenorm(use_running_average=False, epsilon=0.0), jnp.array([[1.0], [3.0]])
      >>> layer.init_with_output(jax.random.key(0), x)[0].tolist()
      [[1.0], [3.0]]
    """

    r_max: float | Callable[[Any], Any] = 3.0
    """Bound of r, or a schedule: a function of the number of updates, as optax has them."""
    d_max: float | Callable[[Any], Any] = 5.0
    """Bound of d, likewise."""
    activation: Activation = None
    """Applied last."""

    __call__ = nn.compact(_calls.Finished.__call__)

    def _output(self, x, *, use_running_average=None, **settings) -> jax.Array:
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        steps = None  # at inference they are not asked for, and a batch norm that was swapped has none
        if not use or self.is_initializing():
            steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        y = super()._output(x, steps and steps.value, use_running_average=use_running_average, **settings)
        if steps is not None and not use and not self.is_initializing():
            steps.value += 1
        return y


@documented("Attributes")
class SplitBatchNorm(_calls.OfDomains, _Averaged, kw_only=True):
    """`jaxnorm.split_batch_norm` (Xie et al., 2020; Chang et al., 2019) with running averages of every domain.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import SplitBatchNorm
      >>> layer = SplitBatchNorm(num_domains=2, use_running_average=False)
      >>> x, domain = jnp.array([[1.0], [10.0], [3.0], [30.0]]), jnp.array([0, 1, 0, 1])
      >>> layer.init_with_output(jax.random.key(0), x, domain)[0].round(3).tolist()
      [[-1.0], [-1.0], [1.0], [1.0]]
    """

    num_domains: int
    """How many domains there are."""
    split_affine: bool = False
    """Whether every domain has a scale and a bias of its own."""
    activation: Activation = None
    """Applied last."""

    __call__ = nn.compact(_calls.OfDomains.__call__)


@documented("Attributes")
class SwitchableNorm(_calls.Finished, _Averaged, kw_only=True):
    """`jaxnorm.switchable_norm` (Luo et al., 2019) with running averages.

    ``params/mean_logits`` and ``params/var_logits``, of shape ``(3,)``, begin with equal weights.

    Example:
      The means of 1 over its instance, layer and batch are 1, 2 and 3, the variances 0, 1 and 4:

      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import SwitchableNorm
      >>> layer, x = SwitchableNorm(use_running_average=False), jnp.array([[1.0, 3.0], [5.0, 7.0]])
      >>> y = layer.init_with_output(jax.random.key(0), x)[0]
      >>> f"{y[0, 0]:.3f}", f"{(1 - (1 + 2 + 3) / 3) / ((0 + 1 + 4) / 3) ** 0.5:.3f}"
      ('-0.775', '-0.775')
    """

    activation: Activation = None
    """Applied last."""

    __call__ = nn.compact(_calls.Finished.__call__)


@documented("Attributes")
class EvoNormB0(_calls.Averaged, _Averaged, kw_only=True):
    """`jaxnorm.evonorm_b0` (Liu et al., 2020) with ``params/v``, begun with one. Activation included.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import EvoNormB0
      >>> layer, x = EvoNormB0(use_running_average=False), jnp.array([[-1.0], [3.0]])
      >>> layer.init_with_output(jax.random.key(0), x)[0].round(2).tolist()  # -1 by the deviation, 3 by itself
      [[-0.5], [1.0]]
    """

    __call__ = nn.compact(_calls.Averaged.__call__)


@documented("Attributes")
class EvoNormS0(_calls.Masked, _Remedy, kw_only=True):
    """`jaxnorm.evonorm_s0` (Liu et al., 2020) with ``params/v``, begun with one. Activation included.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import EvoNormS0
      >>> y, _ = EvoNormS0(num_groups=1).init_with_output(jax.random.key(0), jnp.array([[0.0, 10.0]]))
      >>> y.round(3).tolist()  # x sigmoid(x) by the deviation, 5
      [[0.0, 2.0]]
    """

    num_groups: int = 32
    """How many groups; divides the number of channels."""

    __call__ = nn.compact(_calls.Masked.__call__)


@documented("Attributes")
class FilterResponseNorm(_calls.Masked, _Remedy, kw_only=True):
    """`jaxnorm.filter_response_norm` (Singh and Krishnan, 2020) with ``params/threshold``, begun with zero: a ReLU.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import FilterResponseNorm
      >>> x = jnp.array([[[3.0], [-3.0]]])  # one example, two positions, one channel
      >>> FilterResponseNorm().init_with_output(jax.random.key(0), x)[0].round(3).tolist()
      [[[1.0], [0.0]]]
    """

    epsilon: float = 1e-6

    __call__ = nn.compact(_calls.Masked.__call__)


@documented("Attributes")
class DynamicTanh(_calls.Plain, _Remedy, kw_only=True):
    """`jaxnorm.dynamic_tanh` (Zhu et al., 2025) with ``params/alpha``, begun with 0.5. There is no epsilon in it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import DynamicTanh
      >>> y, _ = DynamicTanh().init_with_output(jax.random.key(0), jnp.array([2.0]))
      >>> print(y.round(3), jnp.tanh(0.5 * 2.0).round(3))
      [0.762] 0.762
    """

    __call__ = nn.compact(_calls.Plain.__call__)


@documented("Attributes")
class SequenceBatchNorm(_calls.OfSteps, _Averaged, kw_only=True):
    """Batch normalization of ``(batch, time, *features)`` by statistics of each time step; scale and bias are shared.

    At inference a step beyond the last one seen has the averages of that one (Cooijmans et al., 2017).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import SequenceBatchNorm
      >>> layer = SequenceBatchNorm(max_length=3, use_running_average=False)
      >>> x = jnp.array([[[1.0], [10.0]], [[3.0], [30.0]]])  # two sequences of two steps
      >>> layer.init_with_output(jax.random.key(0), x)[0].round(3).tolist()
      [[[-1.0], [-1.0]], [[1.0], [1.0]]]
    """

    max_length: int
    """How many steps have averages; sequences may be shorter, and longer at inference."""
    activation: Activation = None
    """Applied last."""

    __call__ = nn.compact(_calls.OfSteps.__call__)


class _Modulated:
    """Scale and bias of each example, computed from a condition of shape ``(batch, conditions)``."""

    def _modulation(self, x: Array, condition: Array, parts: int = 2) -> list[jax.Array]:
        layer: Any = self
        features = jnp.shape(x)[layer.axis]
        dense = nn.Dense(parts * features, kernel_init=nn.initializers.zeros, name="modulation")
        scale, *rest = jnp.split(dense(condition), parts, axis=-1)
        return [1 + scale, *rest]


@documented("Attributes")
class ConditionalBatchNorm(_calls.ConditionedAveraged, _Averaged, _Modulated, kw_only=True):
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

    activation: Activation = None
    """Applied last."""

    __call__ = nn.compact(_calls.ConditionedAveraged.__call__)


@documented("Attributes")
class ConditionalInstanceNorm(_calls.Conditioned, _Remedy, _Modulated, kw_only=True):
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

    __call__ = nn.compact(_calls.Conditioned.__call__)


@documented("Attributes")
class ConditionalLayerNorm(_calls.Conditioned, _Remedy, _Modulated, kw_only=True):
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

    epsilon: float = 1e-6

    __call__ = nn.compact(_calls.Conditioned.__call__)


@documented("Attributes")
class AdaLN(_calls.Gated, nn.Module, _Modulated):
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

    __call__ = nn.compact(_calls.Gated.__call__)


@documented("Attributes")
class FiLM(_calls.Modulated, nn.Module, _Modulated):
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

    __call__ = nn.compact(_calls.Modulated.__call__)


@documented("Attributes")
class AdaIN(_calls.Styled, nn.Module):
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

    __call__ = nn.compact(_calls.Styled.__call__)


class _Standardized(nn.Module):
    def param(self, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        """The parameter; of the kernel, what `jaxnorm.standardize_weights` makes of it."""
        value: Any = super().param(name, init_fn, *args, **kwargs)
        if name != "kernel":
            return value
        gain = super().param("gain", nn.initializers.ones, value.shape[-1:], value.dtype)
        return jaxnorm.standardize_weights(value, gain * (value[..., 0].size ** -0.5))


class StandardizedConv(_Standardized, nn.Conv):
    """``nn.Conv`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``params/gain``.

    Attributes:
      features, kernel_size, strides, ...: all those of ``nn.Conv``; gain and bias have the shape ``(features,)``.

    Example:
      The weights of every output sum to zero, so that what is constant is not seen:

      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import StandardizedConv
      >>> layer, x = StandardizedConv(features=3, kernel_size=(2,), padding="VALID"), jnp.ones((1, 4, 5))
      >>> bool(jnp.allclose(layer.init_with_output(jax.random.key(0), x)[0], 0, atol=1e-6))
      True
    """


class StandardizedDense(_Standardized, nn.Dense):
    """``nn.Dense`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``params/gain``.

    Attributes:
      features, use_bias, dtype, ...: all those of ``nn.Dense``; gain and bias have the shape ``(features,)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import StandardizedDense
      >>> y, _ = StandardizedDense(features=3).init_with_output(jax.random.key(0), jnp.ones((1, 5)))
      >>> bool(jnp.allclose(y, 0, atol=1e-6))  # as in `StandardizedConv`
      True
    """


@documented("Attributes")
class StepBatchNorm(_calls.Averaged, _Averaged, kw_only=True):
    """Batch normalization of one time step, within ``nn.scan``; begun with a scale of 0.1 and no bias.

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

    __call__ = nn.compact(_calls.Averaged.__call__)


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
