"""The remedies as Flax NNX layers: parameters and running averages, no arithmetic.

Scale, bias and what a remedy learns besides are ``nnx.Param``; ``mean`` and ``var`` of those with running averages,
and, of those with averages of each time step, ``count`` are ``nnx.BatchStat``. ``train()`` and ``eval()`` choose the
statistics. Each paper is named in full with the function that a layer wraps, or with the Linen layer of the same name.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

import jaxnorm
from jaxnorm import _axes
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation
from jaxnorm.variants import _calls, _layers
from jaxnorm.variants._layers import documented, extend_steps

Array = jax.typing.ArrayLike
Initializer = jax.nn.initializers.Initializer
ZEROS, ONES = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
AFFINE = ("use_bias", "use_scale", "bias_init", "scale_init")

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
    "StandardizedLinear",
    "StepBatchNorm",
    "SwitchableNorm",
]

# The module is the first base and `_calls` come after it: `surgery.swap` assigns ``__class__`` of a norm, for which
# Python wants objects that are laid out alike.


class _Remedy(nnx.Module):
    """A layer with scale and bias.

    Args:
      num_features: how many features, or the shape of the feature axes.
      axis: the feature axis, or several.
      epsilon: added to the variance, or the mean square, in the squared unit of the input.
      dtype: of the output; None for the promotion of input and parameters.
      param_dtype: of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      rngs: keys for the initializers.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        axis: Axes = -1,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (num_features,) if isinstance(num_features, int) else tuple(num_features)
        self.num_features = shape
        self.axis, self.epsilon, self.dtype = axis, epsilon, dtype
        self.remedy = _layers.name_of(self)
        affine = (*_layers.REMEDIES[self.remedy].affine(self), *shape)
        for name, (used, init) in {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}.items():
            value = nnx.Param(init(rngs.params(), affine, param_dtype)) if used else nnx.data(None)
            setattr(self, name, value)
        for extra, (own, start) in _layers.REMEDIES[self.remedy].parameters.items():
            setattr(self, extra, nnx.Param(jnp.full(shape if own is None else own, start, param_dtype)))

    def _parameters(self) -> dict[str, Any]:
        names = ("scale", "bias", *_layers.REMEDIES[self.remedy].parameters)
        stored = {name: getattr(self, name) for name in names}
        return {name: None if value is None else value[...] for name, value in stored.items()}

    def _normalize(self, x, *inputs, parameters=None, running=None, use_running_average=None, **settings):
        parameters = self._parameters() if parameters is None else parameters
        x = jnp.asarray(x)
        features = _axes.canonical_axes(self.remedy, "axis", self.axis, x.ndim)
        if tuple(x.shape[a] for a in features) != self.num_features:
            rule = "x must have the features that the layer was built for"
            _axes.fail(self.remedy, rule, {"x_shape": x.shape, "built_for": self.num_features})
        x = x.astype(dtypes.canonicalize_dtype(x, *parameters.values(), dtype=self.dtype))
        return _layers.call(
            self, x, parameters, running, inputs, settings,
            use_running_average=use_running_average, initializing=False,
        )  # fmt: skip

    def _output(self, x, **settings) -> jax.Array:
        return self._normalize(x, **settings)[0]


@documented
class _Averaged(_Remedy):
    """A layer with running averages.

    Args:
      use_running_average: normalize by the running averages instead of the statistics of the batch.
      momentum: the weight of the *old* running average, in [0, 1].
      axis_name: mapped axis or axes whose replicas are normalized together.
      axis_index_groups: lists of replicas; each is normalized with its own list only.
      steps: how many time steps have averages of their own, each seen by itself under ``nnx.scan``; None for none.
      settings: as of every layer.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        axis_name: AxisNames | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        steps: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, **settings)
        self.use_running_average, self.momentum = use_running_average, momentum
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups
        leading = _layers.REMEDIES[self.remedy].leading
        shape = self.num_features if leading is None else (leading(self), *self.num_features)
        shape = shape if steps is None else (steps, *shape)
        for name in _layers.REMEDIES[self.remedy].averages:
            setattr(self, name, nnx.BatchStat(_layers.START[name](shape, jnp.float32)))

    def _output(self, x, *inputs, use_running_average=None, **settings) -> jax.Array:
        use = self.use_running_average if use_running_average is None else use_running_average
        stored = {name: getattr(self, name) for name in _layers.REMEDIES[self.remedy].averages}
        averages = {name: variable[...] for name, variable in stored.items()}
        running = _layers.running_stats(averages, averages["var"].shape)
        y, new = self._normalize(x, *inputs, running=running, use_running_average=use, **settings)
        if new is not None:
            for name, variable in stored.items():
                variable[...] = getattr(new, name)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Used by ``nnx.view``.

        Args:
          use_running_average: normalize by the running averages instead of the statistics of the batch.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


@documented
class GhostBatchNorm(_Averaged, _calls.Finished):
    """`jaxnorm.ghost_batch_norm` (Hoffer, Hubara and Soudry, 2017) with scale, bias and running averages.

    Args:
      virtual_batch_size: how many consecutive examples are normalized together.
      activation: applied last.
      settings: as of every layer with averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import GhostBatchNorm
      >>> layer = GhostBatchNorm(1, virtual_batch_size=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0], [3.0], [10.0], [30.0]])).round(3).tolist()
      [[-1.0], [1.0], [-1.0], [1.0]]
    """

    def __init__(
        self, num_features, *, virtual_batch_size: int, activation: Activation = None, **settings: Any
    ) -> None:
        super().__init__(num_features, **settings)
        self.virtual_batch_size, self.activation = virtual_batch_size, activation


@documented
class BatchRenorm(_Averaged, _calls.Finished):
    """`jaxnorm.batch_renorm` (Ioffe, 2017) with scale, bias and running averages; ``steps`` counts the updates.

    Args:
      r_max: bound of r, or a schedule: a function of the number of updates, as optax has them.
      d_max: bound of d, likewise.
      activation: applied last.
      settings: as of every layer with averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import BatchRenorm
      >>> layer = BatchRenorm(1, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0], [3.0]])).tolist(), int(layer.steps[...])  # as by the averages before
      ([[1.0], [3.0]], 1)
    """

    def __init__(
        self,
        num_features,
        *,
        r_max: float | Callable[[Any], Any] = 3.0,
        d_max: float | Callable[[Any], Any] = 5.0,
        activation: Activation = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, **settings)
        self.r_max, self.d_max, self.activation = r_max, d_max, activation
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def _output(self, x, *, use_running_average=None, **settings) -> jax.Array:
        y = super()._output(x, self.steps[...], use_running_average=use_running_average, **settings)
        if not (self.use_running_average if use_running_average is None else use_running_average):
            self.steps[...] += 1
        return y


@documented
class SplitBatchNorm(_Averaged, _calls.OfDomains):
    """`jaxnorm.split_batch_norm` (Xie et al., 2020; Chang et al., 2019) with running averages of every domain.

    Args:
      num_domains: how many domains there are.
      split_affine: whether every domain has a scale and a bias of its own.
      activation: applied last.
      settings: as of every layer with averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import SplitBatchNorm
      >>> model = nnx.Sequential(SplitBatchNorm(1, num_domains=2, epsilon=0.0, rngs=nnx.Rngs(0)))
      >>> x, domain = jnp.array([[1.0], [10.0], [3.0], [30.0]]), jnp.array([0, 1, 0, 1])
      >>> nnx.view(model, domain=domain)(x).tolist()
      [[-1.0], [-1.0], [1.0], [1.0]]
    """

    def __init__(
        self,
        num_features,
        *,
        num_domains: int,
        split_affine: bool = False,
        activation: Activation = None,
        **settings: Any,
    ) -> None:
        self.num_domains, self.split_affine, self.activation = num_domains, split_affine, activation
        self.domain = nnx.data(None)
        super().__init__(num_features, **settings)

    def set_view(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, use_running_average: bool | None = None, domain: Array | None = None
    ) -> None:
        """Used by ``nnx.view``.

        Args:
          use_running_average: normalize by the running averages instead of the statistics of the batch.
          domain: of the examples to come, for a model that does not pass it on to its norms.
        """
        super().set_view(use_running_average)
        if domain is not None:
            self.domain = jnp.asarray(domain)

    def __call__(
        self,
        x: Array,
        domain: Array | None = None,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize every example of ``x`` with those of its domain, or by the running averages of that.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          domain: integers of shape ``(batch,)``, from zero to ``num_domains - 1``; None for those from ``nnx.view``.
          use_running_average: None for the attribute; must be given here or there.
          mask: as in `jaxnorm.standardize`.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``domain`` or ``use_running_average`` is not given, or an argument does not fit.
        """
        domain = self.domain if domain is None else domain
        if domain is None:
            _axes.fail("SplitBatchNorm", "domain must be given in the call or by nnx.view", {"domain": None})
        return super().__call__(x, domain, use_running_average, mask=mask, residual=residual)


@documented
class SwitchableNorm(_Averaged, _calls.Finished):
    """`jaxnorm.switchable_norm` (Luo et al., 2019) with ``mean_logits`` and ``var_logits``, begun with equal weights.

    Args:
      activation: applied last.
      settings: as of every layer with averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import SwitchableNorm
      >>> layer = SwitchableNorm(2, rngs=nnx.Rngs(0))
      >>> layer.mean_logits[...] = jnp.array([0.0, 50.0, 0.0])  # of instance, layer and batch
      >>> layer.var_logits[...] = jnp.array([0.0, 50.0, 0.0])
      >>> layer(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    def __init__(self, num_features, *, activation: Activation = None, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.activation = activation


@documented
class EvoNormB0(_Averaged, _calls.Averaged):
    """`jaxnorm.evonorm_b0` (Liu et al., 2020) with ``v``, begun with one. Activation included.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import EvoNormB0
      >>> layer = EvoNormB0(1, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[-1.0], [3.0]])).round(2).tolist()  # -1 by the deviation, 3 by itself
      [[-0.5], [1.0]]
    """


@documented
class EvoNormS0(_Remedy, _calls.Masked):
    """`jaxnorm.evonorm_s0` (Liu et al., 2020) with ``v``, begun with one. Activation included.

    Args:
      num_features: how many channels.
      num_groups: how many groups; divides the number of channels.
      settings: as of every layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import EvoNormS0
      >>> layer = EvoNormS0(2, num_groups=1, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[0.0, 10.0]])).round(3).tolist()  # x sigmoid(x) by the deviation, 5
      [[0.0, 2.0]]
    """

    def __init__(self, num_features, *, num_groups: int = 32, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.num_groups = num_groups


@documented
class FilterResponseNorm(_Remedy, _calls.Masked):
    """`jaxnorm.filter_response_norm` (Singh and Krishnan, 2020) with ``threshold``, begun with zero: a ReLU.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import FilterResponseNorm
      >>> layer = FilterResponseNorm(1, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[[3.0], [-3.0]]])).round(3).tolist()  # one example, two positions, one channel
      [[[1.0], [0.0]]]
    """

    def __init__(self, num_features, *, epsilon: float = 1e-6, **settings: Any) -> None:
        super().__init__(num_features, epsilon=epsilon, **settings)


@documented
class DynamicTanh(_Remedy, _calls.Plain):
    """`jaxnorm.dynamic_tanh` (Zhu et al., 2025) with ``alpha``, begun with 0.5. There is no epsilon in it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import DynamicTanh
      >>> layer = DynamicTanh(1, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.array([2.0])).round(3), jnp.tanh(0.5 * 2.0).round(3))
      [0.762] 0.762
    """


@documented
class SequenceBatchNorm(_Averaged, _calls.OfSteps):
    """Batch normalization of ``(batch, time, *features)`` by statistics of each time step; scale and bias are shared.

    At inference a step beyond the last one seen has the averages of that one (Cooijmans et al., 2017).

    Args:
      max_length: how many steps have averages; sequences may be shorter, and longer at inference.
      activation: applied last.
      settings: as of every layer with averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import SequenceBatchNorm
      >>> layer = SequenceBatchNorm(1, max_length=3, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[[1.0], [10.0]], [[3.0], [30.0]]])).round(3).tolist()  # two sequences of two steps
      [[[-1.0], [-1.0]], [[1.0], [1.0]]]
    """

    def __init__(self, num_features, *, max_length: int, activation: Activation = None, **settings: Any) -> None:
        self.max_length, self.activation = max_length, activation
        super().__init__(num_features, **settings)


class _Modulation(nnx.Module):
    """Scale and bias of each example, computed from a condition of shape ``(batch, conditions)``."""

    def __init__(self, conditions: int, features: int, *, parts: int = 2, rngs: nnx.Rngs) -> None:
        self.parts = parts
        self.dense = nnx.Linear(conditions, parts * features, kernel_init=ZEROS, rngs=rngs)

    def __call__(self, condition: Array) -> list[jax.Array]:
        """Scale, bias and what else there is."""
        scale, *rest = jnp.split(self.dense(jnp.asarray(condition)), self.parts, axis=-1)
        return [1 + scale, *rest]


class _Modulated:
    def _modulation(self: Any, x: Array, condition: Array, parts: int = 2) -> list[jax.Array]:
        return self.modulation(condition)


@partial(documented, without=AFFINE)
class ConditionalBatchNorm(_Averaged, _calls.ConditionedAveraged, _Modulated):
    """Batch normalization with scale and bias from a condition, of classes a one-hot vector (de Vries et al., 2017).

    Args:
      num_features: how many features.
      conditions: the size of the condition.
      activation: applied last.
      rngs: keys for the initializers.
      settings: as of every layer with averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import ConditionalBatchNorm
      >>> layer = ConditionalBatchNorm(1, 1, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> layer.modulation.dense.kernel[...] = jnp.array([[1.0, 10.0]])  # scale 1 + c, bias 10 c
      >>> layer(jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [1.0]])).tolist()
      [[-1.0], [12.0]]
    """

    def __init__(
        self, num_features: int, conditions: int, *, activation: Activation = None, rngs: nnx.Rngs, **settings: Any
    ) -> None:
        super().__init__(num_features, use_scale=False, use_bias=False, rngs=rngs, **settings)
        self.activation, self.modulation = activation, _Modulation(conditions, num_features, rngs=rngs)


@partial(documented, without=AFFINE)
class ConditionalInstanceNorm(_Remedy, _calls.Conditioned, _Modulated):
    """Instance normalization with scale and bias from a condition (Dumoulin et al., 2017).

    Args:
      num_features: how many features.
      conditions: the size of the condition.
      rngs: keys for the initializers.
      settings: as of every layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import ConditionalInstanceNorm
      >>> layer = ConditionalInstanceNorm(1, 1, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> layer.modulation.dense.kernel[...] = jnp.array([[1.0, 10.0]])  # scale 1 + c, bias 10 c
      >>> layer(jnp.array([[[1.0], [3.0]]]), jnp.array([[1.0]])).tolist()
      [[[8.0], [12.0]]]
    """

    def __init__(self, num_features: int, conditions: int, *, rngs: nnx.Rngs, **settings: Any) -> None:
        super().__init__(num_features, use_scale=False, use_bias=False, rngs=rngs, **settings)
        self.modulation = _Modulation(conditions, num_features, rngs=rngs)


@documented
class ConditionalLayerNorm(ConditionalInstanceNorm):
    """Layer normalization with scale and bias from a condition: adaLN (Peebles and Xie, 2023).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import ConditionalLayerNorm
      >>> layer = ConditionalLayerNorm(2, 1, rngs=nnx.Rngs(0))  # begins as layer normalization
      >>> layer(jnp.array([[1.0, 3.0]]), jnp.array([[1.0]])).round(3).tolist()
      [[-1.0, 1.0]]
    """

    def __init__(self, num_features: int, conditions: int, *, epsilon: float = 1e-6, **settings: Any) -> None:
        super().__init__(num_features, conditions, epsilon=epsilon, **settings)


class AdaLN(nnx.Module, _calls.Gated, _Modulated):
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
        self.modulation = _Modulation(conditions, num_features, parts=3, rngs=rngs)


class FiLM(nnx.Module, _calls.Modulated, _Modulated):
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
        self.axis, self.modulation = axis, _Modulation(conditions, num_features, rngs=rngs)


class AdaIN(nnx.Module, _calls.Styled):
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


class _Standardized:
    """A layer whose kernel is standardized before it is used, where its arguments are promoted."""

    kernel: Any
    gain: Any

    def __init__(self, *args: Any, promote_dtype: Callable[..., Any] = dtypes.promote_dtype, **settings: Any) -> None:
        super().__init__(*args, **settings)
        del self.promote_dtype  # of the instance: that of the class follows
        self.promoted = promote_dtype
        self.gain = nnx.Param(jnp.ones(self.kernel.shape[-1:], self.kernel.dtype))

    def promote_dtype(self, arguments: Any, *, dtype: Any) -> Any:
        """Standardize the kernel, then promote the dtypes of input, kernel and bias."""
        x, kernel, bias = arguments
        gain = self.gain[...] * (math.prod(kernel.shape[:-1]) ** -0.5)
        return self.promoted((x, jaxnorm.standardize_weights(kernel, gain), bias), dtype=dtype)


class StandardizedConv(_Standardized, nnx.Conv):
    """``nnx.Conv`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``gain``.

    Args: those of ``nnx.Conv``; gain and bias have the shape ``(out_features,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import StandardizedConv
      >>> layer = StandardizedConv(5, 3, (2,), padding="VALID", rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(layer(jnp.ones((1, 4, 5))), 0, atol=1e-6))  # the weights of an output sum to zero
      True
    """


class StandardizedLinear(_Standardized, nnx.Linear):
    """``nnx.Linear`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``gain``.

    Args: those of ``nnx.Linear``; gain and bias have the shape ``(out_features,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import StandardizedLinear
      >>> layer = StandardizedLinear(5, 3, rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(layer(jnp.ones((1, 5))), 0, atol=1e-6))  # the weights of an output sum to zero
      True
    """


@documented
class StepBatchNorm(_Averaged, _calls.Averaged):
    """Batch normalization of one time step (Cooijmans et al., 2017); begun with a scale of 0.1 and no bias.

    Args:
      scale_init: initializer of the scale.
      use_bias: whether there is a bias.
      settings: as of every layer with averages, ``steps`` among them.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import StepBatchNorm
      >>> layer = StepBatchNorm(1, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.array([[1.0], [3.0]])).round(3).ravel())
      [-0.1  0.1]
    """

    def __init__(
        self,
        num_features: int,
        *,
        scale_init: Initializer = jax.nn.initializers.constant(0.1),  # noqa: B008
        use_bias: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, scale_init=scale_init, use_bias=use_bias, **settings)


class BatchNormLSTMCell(nnx.Module):
    """An LSTM cell with recurrent batch normalization (Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017).

    Every step has averages of its own, which ``nnx.scan`` splits along the first axis.

    Args:
      in_features: the size of the input.
      features: the size of the state.
      steps: how many steps there are.
      rngs: keys for the initializers.
      settings: of the norms: use_running_average, momentum, axis_name, axis_index_groups.

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

    def __init__(self, in_features: int, features: int, *, steps: int, rngs: nnx.Rngs, **settings: Any) -> None:
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
          steps: how many steps there are to be.
        """
        for norm in (self.norm_h, self.norm_x, self.norm_c):
            stored = {name: getattr(norm, name) for name in ("mean", "var", "count")}
            for name, value in extend_steps({n: v[...] for n, v in stored.items()}, steps).items():
                setattr(norm, name, nnx.BatchStat(value))
