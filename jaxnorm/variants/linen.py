"""The remedies as Flax Linen layers: parameters and collections, no arithmetic.

``params`` hold scale, bias and what a remedy learns besides; ``batch_stats`` hold ``mean`` and ``var`` of those with
running averages, and, of those with averages of each time step, ``count``. Where a condition modulates a norm,
``modulation``, a dense layer begun with zeros, computes the scale less one and the bias from it.
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
from jaxnorm.variants import _layers
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
    """A layer with scale and bias.

    Attributes:
      axis: the feature axis, or several.
      epsilon: added to the variance.
      dtype: of the output; None for the promotion of input and parameters.
      param_dtype: of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
    """

    axis: Axes = -1
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones

    def _parameters(self, shape: tuple[int, ...]) -> dict[str, Any]:
        used = {"scale": (self.use_scale, self.scale_init), "bias": (self.use_bias, self.bias_init)}
        return {n: self.param(n, init, shape, self.param_dtype) if use else None for n, (use, init) in used.items()}

    def _normalize(self, x, *inputs, parameters=None, use_running_average=None, **settings) -> jax.Array:
        name, layer = _layers.name_of(self), self
        remedy, x = _layers.REMEDIES[name], jnp.asarray(x)
        shape = tuple(x.shape[a] for a in _axes.canonical_axes(name, "axis", self.axis, x.ndim))
        parameters = self._parameters(shape) if parameters is None else parameters
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
    """A layer with running averages.

    Attributes:
      use_running_average: normalize by the running averages instead of the statistics of the batch.
      momentum: the weight of the *old* running average.
      axis_name: mapped axis or axes whose replicas are normalized together; need not exist at initialization.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
    """

    use_running_average: bool | None = None
    momentum: float = 0.99
    axis_name: AxisNames | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None

    def _average(self, x, *inputs, use_running_average=None, **settings) -> jax.Array:
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        return self._normalize(x, *inputs, use_running_average=use, **settings)


class GhostBatchNorm(_Averaged, kw_only=True):
    """`jaxnorm.ghost_batch_norm` with scale, bias and running averages.

    Attributes:
      virtual_batch_size: how many consecutive examples are normalized together.
      activation: applied last.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import GhostBatchNorm
      >>> layer = GhostBatchNorm(virtual_batch_size=2, use_running_average=False)
      >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
      >>> layer.init_with_output(jax.random.key(0), x)[0].round(3).tolist()
      [[-1.0], [1.0], [-1.0], [1.0]]
    """

    virtual_batch_size: int
    activation: Activation = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize ``x``; ``mask`` and ``residual`` as in `jaxnorm.standardize`."""
        settings = {"mask": mask, "residual": residual, "activation": self.activation}
        return self._average(x, use_running_average=use_running_average, **settings)


class BatchRenorm(_Averaged, kw_only=True):
    """`jaxnorm.batch_renorm` with scale, bias and running averages; ``batch_stats/steps`` counts the updates.

    Attributes:
      r_max: bound of r, or a schedule: a function of the number of updates, as optax has them.
      d_max: bound of d, likewise.
      activation: applied last.
    """

    r_max: float | Callable[[Any], Any] = 3.0
    d_max: float | Callable[[Any], Any] = 5.0
    activation: Activation = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize ``x``; ``mask`` and ``residual`` as in `jaxnorm.standardize`."""
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        steps = None  # at inference they are not asked for, and a batch norm that was swapped has none
        if not use or self.is_initializing():
            steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        settings = {"mask": mask, "residual": residual, "activation": self.activation}
        y = self._average(x, steps and steps.value, use_running_average=use_running_average, **settings)
        if steps is not None and not use and not self.is_initializing():
            steps.value += 1
        return y


class SplitBatchNorm(_Averaged, kw_only=True):
    """`jaxnorm.split_batch_norm` with running averages of every domain; scale and bias are shared, or one a domain.

    Attributes:
      num_domains: how many domains there are.
      split_affine: whether every domain has a scale and a bias of its own.
      activation: applied last.
    """

    num_domains: int
    split_affine: bool = False
    activation: Activation = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        domain: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize ``x``, whose examples are of ``domain``; the rest as in `jaxnorm.standardize`."""
        features = _axes.canonical_axes("SplitBatchNorm", "axis", self.axis, jnp.ndim(x))
        shape = tuple(jnp.shape(x)[a] for a in features)
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        parameters = self._parameters((self.num_domains, *shape) if self.split_affine else shape)
        if self.split_affine and use:
            parameters = {n: None if v is None else v[domain] for n, v in parameters.items()}
        settings = {"mask": mask, "residual": residual, "activation": self.activation}
        return self._normalize(x, domain, parameters=parameters, use_running_average=use, **settings)


class SwitchableNorm(_Averaged, kw_only=True):
    """`jaxnorm.switchable_norm` with ``params/mean_logits`` and ``params/var_logits``, begun with equal weights.

    Attributes:
      activation: applied last.
    """

    activation: Activation = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize ``x``; ``mask`` and ``residual`` as in `jaxnorm.standardize`."""
        settings = {"mask": mask, "residual": residual, "activation": self.activation}
        return self._average(x, use_running_average=use_running_average, **settings)


class EvoNormB0(_Averaged, kw_only=True):
    """`jaxnorm.evonorm_b0` with ``params/v``, begun with one. Activation included."""

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> jax.Array:
        """Normalize ``x``; ``mask`` as in `jaxnorm.standardize`."""
        return self._average(x, use_running_average=use_running_average, mask=mask)


class EvoNormS0(_Remedy, kw_only=True):
    """`jaxnorm.evonorm_s0` with ``params/v``, begun with one. Activation included.

    Attributes:
      num_groups: how many groups; divides the number of channels.
    """

    num_groups: int = 32

    @nn.compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> jax.Array:
        """Normalize ``x``; ``mask`` as in `jaxnorm.standardize`."""
        return self._normalize(x, mask=mask)


class FilterResponseNorm(_Remedy, kw_only=True):
    """`jaxnorm.filter_response_norm` with ``params/threshold``, begun with zero: a ReLU."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> jax.Array:
        """Normalize ``x``; ``mask`` as in `jaxnorm.standardize`."""
        return self._normalize(x, mask=mask)


class DynamicTanh(_Remedy, kw_only=True):
    """`jaxnorm.dynamic_tanh` with ``params/alpha``, begun with 0.5. There is no epsilon in it."""

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """Squash ``x``."""
        return self._normalize(x)


class SequenceBatchNorm(_Averaged, kw_only=True):
    """Batch normalization of ``(batch, time, *features)`` by statistics of each time step; scale and bias are shared.

    At inference a step beyond the last one seen has the averages of that one (Cooijmans et al., 2017).

    Attributes:
      max_length: how many steps have averages; sequences may be shorter, and longer at inference.
      activation: applied last.
    """

    max_length: int
    activation: Activation = None

    @nn.compact
    def __call__(self, x: Array, lengths: Array | None = None, use_running_average: bool | None = None) -> jax.Array:
        """Normalize ``x``, of which ``lengths`` steps of each sequence count; None for all."""
        mask = None if lengths is None else _mask(x, lengths)
        settings = {"mask": mask, "activation": self.activation}
        return self._average(x, use_running_average=use_running_average, **settings)


def _mask(x: Array, lengths: Array) -> jax.Array:
    mask = jaxnorm.length_mask(lengths, jnp.shape(x)[1])
    return jnp.expand_dims(mask, range(2, jnp.ndim(x)))


class _Modulated:
    """Scale and bias of each example, computed from a condition of shape ``(batch, conditions)``."""

    def _modulation(self, x: Array, condition: Array, parts: int = 2) -> list[jax.Array]:
        layer: Any = self
        features = jnp.shape(x)[layer.axis]
        dense = nn.Dense(parts * features, kernel_init=nn.initializers.zeros, name="modulation")
        scale, *rest = jnp.split(dense(condition), parts, axis=-1)
        return [1 + scale, *rest]


class ConditionalBatchNorm(_Averaged, _Modulated, kw_only=True):
    """Batch normalization with scale and bias from a condition, of classes a one-hot vector (de Vries et al., 2017).

    Attributes:
      activation: applied last.
    """

    activation: Activation = None

    @nn.compact
    def __call__(
        self, x: Array, condition: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> jax.Array:
        """Normalize ``x``, modulated by ``condition`` of shape ``(batch, conditions)``."""
        scale, bias = self._modulation(x, condition)
        settings = {"mask": mask, "activation": self.activation, "parameters": {"scale": scale, "bias": bias}}
        return self._average(x, use_running_average=use_running_average, **settings)


class ConditionalInstanceNorm(_Remedy, _Modulated, kw_only=True):
    """Instance normalization with scale and bias from a condition (Dumoulin et al., 2017)."""

    @nn.compact
    def __call__(self, x: Array, condition: Array, *, mask: Array | None = None) -> jax.Array:
        """Normalize ``x``, modulated by ``condition`` of shape ``(batch, conditions)``."""
        scale, bias = self._modulation(x, condition)
        return self._normalize(x, parameters={"scale": scale, "bias": bias}, mask=mask)


class ConditionalLayerNorm(_Remedy, _Modulated, kw_only=True):
    """Layer normalization with scale and bias from a condition: adaLN (Peebles and Xie, 2023)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, condition: Array, *, mask: Array | None = None) -> jax.Array:
        """Normalize ``x``, modulated by ``condition`` of shape ``(batch, conditions)``."""
        scale, bias = self._modulation(x, condition)
        return self._normalize(x, parameters={"scale": scale, "bias": bias}, mask=mask)


class AdaLN(nn.Module, _Modulated):
    """adaLN-Zero (Peebles and Xie, 2023): `ConditionalLayerNorm`, and a gate for what the block makes of its output.

    Attributes:
      axis: the feature axis.
      epsilon: added to the variance.
    """

    axis: int = -1
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> tuple[jax.Array, jax.Array]:
        """The normalized ``x``; and the gate, zero at first, in a shape that broadcasts against it."""
        scale, bias, gate = self._modulation(x, jax.nn.silu(condition), parts=3)
        x = jnp.asarray(x)
        x = x.astype(canonicalize_dtype(x, scale))
        y = jaxnorm.layer_norm(x, scale, bias, axis=self.axis, epsilon=self.epsilon)
        return y, _axes.expand(gate, (0, self.axis % x.ndim), x.ndim)


class FiLM(nn.Module, _Modulated):
    """Feature-wise linear modulation (Perez et al., 2018): scale and bias from a condition, and no normalization.

    Attributes:
      axis: the feature axis.
    """

    axis: int = -1

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> jax.Array:
        """Modulate ``x`` by ``condition`` of shape ``(batch, conditions)``."""
        x = jnp.asarray(x)
        scale, bias = (_axes.expand(v, (0, self.axis % x.ndim), x.ndim) for v in self._modulation(x, condition))
        return x * scale + bias


class AdaIN(nn.Module):
    """Adaptive instance normalization (Huang and Belongie, 2017): mean and deviation of a style. Nothing is learned.

    Attributes:
      axis: the feature axis.
      epsilon: added to the variances.
    """

    axis: int = -1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, style: Array) -> jax.Array:
        """The content ``x`` with the statistics of every example and channel of ``style``."""
        return _layers.adaptive(x, style, self.axis, self.epsilon)


class _Standardized(nn.Module):
    def param(self, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        """The parameter; of the kernel, what `jaxnorm.standardize_weights` makes of it."""
        value: Any = super().param(name, init_fn, *args, **kwargs)
        if name != "kernel":
            return value
        gain = super().param("gain", nn.initializers.ones, value.shape[-1:], value.dtype)
        return jaxnorm.standardize_weights(value, gain * (value[..., 0].size ** -0.5))


class StandardizedConv(_Standardized, nn.Conv):
    """``nn.Conv`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``params/gain``."""


class StandardizedDense(_Standardized, nn.Dense):
    """``nn.Dense`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``params/gain``."""


class StepBatchNorm(_Averaged, kw_only=True):
    """Batch normalization of one time step, within ``nn.scan``; begun with a scale of 0.1 and no bias."""

    scale_init: Initializer = nn.initializers.constant(0.1)
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> jax.Array:
        """Normalize ``x``; ``mask`` as in `jaxnorm.standardize`."""
        return self._average(x, use_running_average=use_running_average, mask=mask)


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
        """One step from ``carry``, cell and hidden state; ``mask`` of shape ``(batch, 1)``."""

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
