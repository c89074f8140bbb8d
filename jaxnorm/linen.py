"""Normalization layers for Flax Linen: parameters and collections around the engine, no arithmetic.

They take the arguments of the ``flax.linen`` class of the same name, by position and by keyword, and hold the same
variables, so that ``from jaxnorm.linen import BatchNorm`` in place of ``from flax.linen import BatchNorm`` is all that
changes. What Flax lacks comes after what it has:

- ``mask`` may have any shape that broadcasts, and be boolean or real weights, on every layer;
- ``axis_name`` may be several mapped axes, ``axis_index_groups`` work under ``shard_map`` and ``vmap``, and neither is
  needed at initialization;
- ``trainable=False`` keeps gradients from scale and bias, at construction or per call; `trainable_mask` keeps weight
  decay from them;
- ``activation`` and ``residual`` are applied without being stored, ``invertible=True`` stores the output only;
- `BatchNorm` has ``momentum=None``, ``unbiased`` and ``update_running_average``; `GroupNorm` has ``axis``.

``use_fast_variance`` and ``force_float32_reductions`` choose between algorithms in Flax. Here there is one: either
choice gives the stable statistics, in float32 at least.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype

from jaxnorm import _layers
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Function
from jaxnorm.variants.linen import *  # noqa: F403

Array = jax.typing.ArrayLike
Groups = Sequence[Sequence[int]]
Initializer = nn.initializers.Initializer

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "trainable_mask"]


# Helpers are functions, not methods: Flax would take those for calls of the module.


def _parameters(layer: Any, label: str, shape: tuple[int, ...], trainable: bool | None) -> tuple[Any, Any]:
    """Scale and bias of ``shape``, or None; constants to differentiation where they do not train."""

    def parameter(name):
        if not getattr(layer, f"use_{name}", False):
            return None
        if layer.has_variable("params", name):
            stored = meta.unbox(layer.get_variable("params", name))
            _layers.check_features(label, shape, jnp.shape(stored))
        value = layer.param(name, getattr(layer, f"{name}_init"), shape, layer.param_dtype)
        return value if _layers.first_given(trainable, layer.trainable) else jax.lax.stop_gradient(value)

    return parameter("scale"), parameter("bias")


def _arguments(
    layer: Any, label: str, x: jax.Array, features: tuple[int, ...], trainable: bool | None
) -> tuple[dict[str, Any], Function]:
    """What the engine is told by every layer, and the module that follows it."""
    shape = tuple(x.shape[a] for a in features)
    scale, bias = _parameters(layer, label, shape, trainable)
    dtype = canonicalize_dtype(x, scale, bias, dtype=layer.dtype)
    if layer.is_initializing():
        _layers.check_start(label, layer, layer.scale_init, shape, dtype)
    activation, after = _layers.epilogue(layer, nn.Module)
    arguments = {"x": x, "scale": scale, "bias": bias, "epsilon": layer.epsilon, "dtype": dtype}
    return arguments | {"activation": activation, "invertible": layer.invertible}, after


class _Layer(nn.Module):
    """What all layers have, at the end: fields of the first base come last."""

    force_float32_reductions: bool = True
    """Either choice gives statistics in float32 at least."""
    trainable: bool = True
    """Whether scale and bias receive gradients. Weight decay moves them all the same: see `trainable_mask`."""
    activation: Activation = None
    """Applied last: None, a function, or the name of one in ``jax.nn`` (relu, silu, ...). A module, as ``nn.PReLU()``,
    is applied to the output: that of this layer is stored then."""
    invertible: bool = False
    """Keep the output for the backward pass in place of the input; see `jaxnorm.standardize`. Needs a scale that does
    not start at zero."""

    _reduction: ClassVar[Callable[[str, Any, tuple[int, ...]], _layers.Reduction]]

    @nn.compact
    def __call__(
        self, x: Array, *, mask: Array | None = None, trainable: bool | None = None, residual: Array | None = None
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array with the axes that the attributes name; the first is the batch for group and instance normalization.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those of initialization, or an argument does not fit.

        Example:
          The third value is not measured; the residual, 10, is added last:

          >>> import jax, jax.numpy as jnp
          >>> from jaxnorm.linen import LayerNorm
          >>> layer, x = LayerNorm(epsilon=0.0), jnp.array([1.0, 3.0, 5.0])
          >>> given = {"mask": jnp.array([True, True, False]), "residual": jnp.full(3, 10.0)}
          >>> layer.init_with_output(jax.random.key(0), x, **given)[0].tolist()
          [9.0, 11.0, 13.0]
        """
        x, label = _layers.as_input(x), _layers.label(self, self.path)
        reduction, initializing = self._reduction(label, self, x.shape), self.is_initializing()
        arguments, after = _arguments(self, label, x, reduction.features, trainable)
        called = {"mask": mask, "residual": residual, "initializing": initializing}
        y = _layers.normalize(label, self, reduction, **called, **arguments)
        return after(y)


class _Replicated(nn.Module):
    axis_name: AxisNames | None = None
    """Mapped axis or axes whose replicas share their statistics. Need not exist at initialization, nor where running
    averages are used. Under ``jit`` with sharded arrays leave it out: the statistics are global."""
    axis_index_groups: Groups | None = None
    """Lists of replicas; each is normalized with its own list only."""
    use_fast_variance: bool = True
    """Either choice gives the stable statistics."""


class _Typed(nn.Module):
    epsilon: float = 1e-6
    """Added to the variance, or the mean square."""
    dtype: Any = None
    """Of the output; None for the promotion of input and parameters."""
    param_dtype: Any = jnp.float32
    """Of scale and bias."""


class _Scaled(_Typed):
    use_scale: bool = True
    """Whether there is a scale."""
    scale_init: Initializer = nn.initializers.ones
    """Initializer of the scale."""


class _Affine(_Typed):
    use_bias: bool = True
    """Whether there is a bias."""
    use_scale: bool = True
    """Whether there is a scale."""
    bias_init: Initializer = nn.initializers.zeros
    """Initializer of the bias."""
    scale_init: Initializer = nn.initializers.ones
    """Initializer of the scale."""


class _Averaged(nn.Module):
    use_running_average: bool | None = None
    """Normalize by the running averages instead of the statistics of the batch."""
    axis: Axes = -1
    """The feature axis, or several."""
    momentum: float | None = 0.99
    """The weight of the *old* running average, in [0, 1]: ``1 - alpha`` of `jaxnorm.update_running`. None for the
    cumulative average, which begins anew where there is no ``count`` yet, as in a checkpoint of Flax's layer."""


class _Reduced(nn.Module):
    reduction_axes: Axes = -1
    """Axis or axes that share their statistics."""
    feature_axes: Axes = -1
    """Axis or axes of scale and bias."""


class _Grouped(nn.Module):
    num_groups: int | None = 32
    """How many groups of neighbouring channels; None where ``group_size`` says it."""
    group_size: int | None = None
    """How many channels a group has, with ``num_groups=None``."""


class _GroupReduced(nn.Module):
    reduction_axes: Axes | None = None
    """Axes that share their statistics, that of the channels included; None for all but the first."""


class _InstanceFeatures(nn.Module):
    feature_axes: Axes = -1
    """Axis or axes that keep statistics of their own, and of scale and bias; not the first, the batch."""


@_layers.documented("Attributes")
class BatchNorm(_Layer, _Replicated, _Affine, _Averaged):
    """Batch normalization (Ioffe and Szegedy, 2015), in place of ``flax.linen.BatchNorm``.

    Variables, all in the shape of the feature axes: ``params/scale`` and ``params/bias`` of dtype ``param_dtype``,
    ``batch_stats/mean`` and ``batch_stats/var`` of dtype float32 (wider or complex once they averaged what is), and,
    only with ``momentum=None``, ``batch_stats/count``, the number of values averaged.

    Where the collection ``intermediates`` is mutable, the last batch leaves its `jaxnorm.Moments` there, as
    ``batch_mean``, ``batch_var`` and ``batch_count``.

    Three things can be switched separately, here or in the call: which statistics normalize
    (``use_running_average``), whether the running averages move (``update_running_average``), whether scale and bias
    receive gradients (``trainable``).

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

    epsilon: float = 1e-5
    unbiased: bool = False
    """Average the unbiased variance, as PyTorch does."""
    update_running_average: bool | None = None
    """None to update them when they are not used. With False no collection needs to be mutable."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        update_running_average: bool | None = None,
        trainable: bool | None = None,
        residual: Array | None = None,
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
          ValueError: the features are not those of initialization, or an argument does not fit.

        Warns:
          UserWarning: a batch of one value per feature, or averages in use that were never updated.

        Example:
          The third value is not measured; the residual, 10, is added last:

          >>> import jax, jax.numpy as jnp
          >>> from jaxnorm.linen import BatchNorm
          >>> layer, x = BatchNorm(use_running_average=False, epsilon=0.0), jnp.array([[1.0], [3.0], [5.0]])
          >>> given = {"mask": jnp.array([[True], [True], [False]]), "residual": jnp.full((3, 1), 10.0)}
          >>> layer.init_with_output(jax.random.key(0), x, **given)[0].tolist()
          [[9.0], [11.0], [13.0]]
        """
        use_running = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        update = _layers.first_given(update_running_average, self.update_running_average, not use_running)
        x, label, initializing = _layers.as_input(x), _layers.label(self, self.path), self.is_initializing()
        features = _layers.sorted_axes(label, "axis", self.axis, x.ndim)
        shape = tuple(x.shape[a] for a in features)
        start = {"mean": jnp.zeros, "var": jnp.ones}
        if self.momentum is None and (update or initializing):
            start["count"] = jnp.zeros
        averages = [self.variable("batch_stats", name, init, shape, jnp.float32) for name, init in start.items()]
        _layers.check_features(label, shape, jnp.shape(averages[0].value))
        arguments, after = _arguments(self, label, x, features, trainable)
        switches = {"use_running_average": use_running, "update": update and not initializing}
        values, state = [average.value for average in averages], {"initializing": initializing, "mask": mask}
        y, batch, running = _layers.batch_norm(
            label, self, averages=values, features=features, residual=residual, **switches, **state, **arguments
        )
        for average, new in zip(averages, running or (), strict=False):
            average.value = new
        for name, value in ({} if batch is None or initializing else batch._asdict()).items():
            self.sow("intermediates", f"batch_{name}", value, lambda old, new: new, lambda: None)
        return after(y)


@_layers.documented("Attributes")
class LayerNorm(_Layer, _Replicated, _Reduced, _Affine):
    """Layer normalization (Ba, Kiros and Hinton, 2016), in place of ``flax.linen.LayerNorm``.

    Variables: ``params/scale`` and ``params/bias``, in the shape of the feature axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import LayerNorm
      >>> LayerNorm(epsilon=0.0).init_with_output(jax.random.key(0), jnp.array([1.0, 3.0]))[0].tolist()
      [-1.0, 1.0]
    """

    _reduction = staticmethod(_layers.given_axes)


@_layers.documented("Attributes")
class RMSNorm(_Layer, _Replicated, _Reduced, _Scaled):
    """Root mean square normalization (Zhang and Sennrich, 2019), in place of ``flax.linen.RMSNorm``.

    Variables: ``params/scale``, in the shape of the feature axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import RMSNorm
      >>> RMSNorm(epsilon=0.0).init_with_output(jax.random.key(0), jnp.array([3.0, -3.0]))[0].tolist()
      [1.0, -1.0]
    """

    _reduction = staticmethod(partial(_layers.given_axes, centered=False))


@_layers.documented("Attributes")
class GroupNorm(_Layer, _Replicated, _GroupReduced, _Affine, _Grouped):
    """Group normalization (Wu and He, 2018), in place of ``flax.linen.GroupNorm``.

    Variables: ``params/scale`` and ``params/bias``, one per channel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import GroupNorm
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> GroupNorm(num_groups=2, epsilon=0.0).init_with_output(jax.random.key(0), x)[0].tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    axis: int = -1
    """The channel axis."""

    _reduction = staticmethod(_layers.group_axes)


@_layers.documented("Attributes")
class InstanceNorm(_Layer, _Replicated, _InstanceFeatures, _Affine):
    """Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016), in place of ``flax.linen.InstanceNorm``.

    Variables: ``params/scale`` and ``params/bias``, in the shape of the feature axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import InstanceNorm
      >>> x = jnp.array([[[1.0], [3.0]]])
      >>> InstanceNorm(epsilon=0.0).init_with_output(jax.random.key(0), x)[0].tolist()
      [[[-1.0], [1.0]]]
    """

    _reduction = staticmethod(_layers.instance_axes)


def trainable_mask(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """Which parameters train: all but scale and bias of the layers with ``trainable=False``.

    Their gradients are zero, but an optimizer may move them all the same: weight decay does. With
    ``optax.adamw(1e-3, mask=mask)`` it does not.

    Args:
      model: the module.
      variables: its variables.
      *args: the inputs, and whatever else ``model`` is called with.
      **kwargs: likewise, and options of ``model.apply``.

    Returns:
      True or False, in the structure of ``variables["params"]``.

    Raises:
      flax.errors.FlaxError: ``variables`` are not those of ``model``, or lack something that the call needs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm.linen import LayerNorm, trainable_mask
      >>> model, x = nn.Sequential([nn.Dense(2), LayerNorm(trainable=False)]), jnp.ones((1, 2))
      >>> trainable_mask(model, model.init(jax.random.key(0), x), x)
      {'layers_0': {'bias': True, 'kernel': True}, 'layers_1': {'bias': False, 'scale': False}}
    """
    still = set()

    def note(next_function, args, kwargs, context):
        layer = context.module
        if isinstance(layer, _Layer) and not _layers.first_given(kwargs.get("trainable"), layer.trainable):
            still.update((*layer.path, name) for name in ("scale", "bias"))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda v: model.apply(v, *args, **{"mutable": True, **kwargs}), variables)

    def trains(path, _):
        return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)) not in still

    return jax.tree_util.tree_map_with_path(trains, variables["params"])
