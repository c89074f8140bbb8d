"""Normalization layers for Flax NNX: parameters and running averages around the engine, no arithmetic.

They take the arguments of the ``flax.nnx`` class of the same name, by position and by keyword, and hold the same
variables, so that ``from jaxnorm.nnx import BatchNorm`` in place of ``from flax.nnx import BatchNorm`` is all that
changes. What Flax lacks:

- ``num_features`` may be the shape of several feature axes;
- ``mask`` may have any shape that broadcasts, and be boolean or real weights;
- ``axis_name`` may be several mapped axes, and ``axis_index_groups`` work under ``shard_map`` and ``vmap``;
- ``trainable=False`` keeps gradients from scale and bias, at construction, by ``nnx.view`` or per call;
  `trainable_mask` keeps weight decay from them;
- ``activation`` and ``residual`` are applied without being stored, ``invertible=True`` stores the output only;
- `BatchNorm` has ``momentum=None``, ``unbiased`` and ``update_running_average``; `GroupNorm` has ``axis``.

``use_fast_variance`` chooses between algorithms in Flax. Here there is one: either choice gives the stable statistics,
in float32 at least. What ``promote_dtype`` makes of input, scale and bias is used; running averages stay float32
whatever it makes of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.initializers import ones_init, zeros_init

from jaxnorm import _layers
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Function
from jaxnorm.variants.nnx import *  # noqa: F403

Array = jax.typing.ArrayLike
Groups = Sequence[Sequence[int]]
Metadata = Mapping[str, Any]
Initializer = jax.nn.initializers.Initializer
NO_METADATA: Metadata = MappingProxyType({})
ZEROS, ONES = zeros_init(), ones_init()

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "trainable_mask"]


@dataclass(eq=False, repr=False, kw_only=True)
class _Layer(nnx.Module):
    """What all layers have."""

    num_features: int | Sequence[int] = field(kw_only=False)
    """How many features, or the shape of the feature axes."""
    epsilon: float = 1e-6
    """Added to the variance, or the mean square."""
    dtype: Any = None
    """Of the output, and what ``promote_dtype`` converts to; None for the promotion of input and parameters."""
    param_dtype: Any = jnp.float32
    """Of scale and bias."""
    use_scale: bool = True
    """Whether there is a scale."""
    scale_init: InitVar[Initializer] = ONES
    """Initializer of the scale."""
    axis_name: AxisNames | None = None
    """Mapped axis or axes whose replicas share their statistics. Need not exist where running averages are used. Under
    ``jit`` with sharded arrays leave it out: the statistics are global."""
    axis_index_groups: Groups | None = None
    """Lists of replicas; each is normalized with its own list only."""
    use_fast_variance: bool = True
    """Either choice gives the stable statistics."""
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype
    """Converts ``(x, scale, bias)``, without bias in `RMSNorm`, ``(x, mean, var, scale, bias)`` in `BatchNorm`; called
    with the keyword ``dtype``."""
    rngs: InitVar[nnx.Rngs]
    """Keys for the initializers."""
    scale_metadata: InitVar[Metadata] = NO_METADATA
    """Metadata of the scale."""
    trainable: bool = True
    """Whether scale and bias receive gradients. Weight decay moves them all the same: see `trainable_mask`."""
    activation: Activation = None
    """Applied last: None, a function, or the name of one in ``jax.nn`` (relu, silu, ...). A module, as ``nnx.PReLU()``,
    is applied to the output: that of this layer is stored then."""
    invertible: bool = False
    """Keep the output for the backward pass in place of the input; see `jaxnorm.standardize`. Needs a scale that does
    not start at zero."""

    scale: nnx.Param | None = field(init=False)
    bias: nnx.Param | None = field(init=False)
    _reduction: ClassVar[Callable[[str, Any, tuple[int, ...]], _layers.Reduction]]

    def __post_init__(self, scale_init: Any, rngs: nnx.Rngs, scale_metadata: Metadata, *of_bias: Any) -> None:
        """Make scale and bias."""
        if isinstance(self.num_features, Sequence):
            self.num_features = tuple(self.num_features)
        dtype = self.param_dtype if self.dtype is None else self.dtype
        _layers.check_start(_layers.label(self), self, scale_init, self._shape, dtype)
        initial = {"scale": (scale_init, scale_metadata), "bias": of_bias or (ZEROS, NO_METADATA)}
        for name, (init, metadata) in initial.items():
            used = getattr(self, f"use_{name}", False)
            value = (
                nnx.Param(init(rngs.params(), self._shape, self.param_dtype), **metadata) if used else nnx.data(None)
            )
            setattr(self, name, value)

    @property
    def _shape(self) -> tuple[int, ...]:
        """The shape of the variables."""
        return self.num_features if isinstance(self.num_features, tuple) else (self.num_features,)  # pyright: ignore

    def _fit(self, value: Any, shape: tuple[int, ...]) -> Any:
        """A variable in the shape of the feature axes; Flax keeps that of several axes as one vector."""
        if self._shape != (math.prod(shape),):
            _layers.check_features(_layers.label(self), shape, self._shape)
        return None if value is None else value.reshape(shape)

    def _arguments(
        self, x: jax.Array, features: tuple[int, ...], trainable: bool | None, *between: jax.Array
    ) -> tuple[dict[str, Any], Function]:
        """What the engine is told by every layer, as ``promote_dtype`` gives it, and the module that follows it."""
        shape = tuple(x.shape[a] for a in features)
        names = ["scale", "bias"] if hasattr(self, "use_bias") else ["scale"]
        parameters = [None if getattr(self, name) is None else getattr(self, name)[...] for name in names]
        if not _layers.first_given(trainable, self.trainable):
            parameters = jax.lax.stop_gradient(parameters)
        x, *promoted = self.promote_dtype((x, *between, *parameters), dtype=self.dtype)
        scale, bias, *_ = (*promoted[len(between) :], None)
        activation, after = _layers.epilogue(self, nnx.Module)
        arguments = {"x": _layers.as_input(x), "epsilon": self.epsilon, "activation": activation}
        arguments |= {"scale": self._fit(scale, shape), "bias": self._fit(bias, shape), "invertible": self.invertible}
        return arguments | {"dtype": dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)}, after

    def __call__(
        self, x: jax.Array, *, mask: Array | None = None, trainable: bool | None = None, residual: Array | None = None
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array with the axes named at construction; the first is the batch for group and instance normalization.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those the layer was built for, or an argument does not fit.

        Example:
          The third value is not measured; the residual, 10, is added last:

          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from jaxnorm.nnx import LayerNorm
          >>> layer, x = LayerNorm(3, epsilon=0.0, rngs=nnx.Rngs(0)), jnp.array([1.0, 3.0, 5.0])
          >>> layer(x, mask=jnp.array([True, True, False]), residual=jnp.full(3, 10.0)).tolist()
          [9.0, 11.0, 13.0]
        """
        label = _layers.label(self)
        reduction = self._reduction(label, self, jnp.shape(x))
        arguments, after = self._arguments(x, reduction.features, trainable)
        y = _layers.normalize(label, self, reduction, mask=mask, residual=residual, **arguments)
        return after(y)

    def set_view(self, trainable: bool | None = None) -> None:
        """Used by ``nnx.view``.

        Args:
          trainable: whether scale and bias receive gradients.
        """
        if trainable is not None:
            self.trainable = trainable


@dataclass(eq=False, repr=False, kw_only=True)
class _Affine(_Layer):
    use_bias: bool = True
    """Whether there is a bias."""
    bias_init: InitVar[Initializer] = ZEROS
    """Initializer of the bias."""
    bias_metadata: InitVar[Metadata] = NO_METADATA
    """Metadata of the bias."""


@_layers.documented("Args")
@dataclass(eq=False, repr=False, kw_only=True)
class BatchNorm(_Affine):
    """Batch normalization (Ioffe and Szegedy, 2015), in place of ``flax.nnx.BatchNorm``.

    Variables: ``scale`` and ``bias`` (``nnx.Param``); ``mean`` and ``var``, float32 (the mean becomes complex once it
    averaged what is), and, only with ``momentum=None``, ``count``, the number of values averaged (``nnx.BatchStat``).

    Three things can be switched separately, here, by ``nnx.view`` or in the call: which statistics normalize
    (``use_running_average``; ``train()`` and ``eval()`` set it too), whether the running averages move
    (``update_running_average``), whether scale and bias receive gradients (``trainable``).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import BatchNorm
      >>> layer = BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [3.0]]))
      >>> layer.mean[...].tolist()
      [1.0]
    """

    use_running_average: bool | None = False
    """Normalize by the running averages instead of the statistics of the batch."""
    axis: Axes = -1
    """The feature axis, or several."""
    momentum: float | None = 0.99
    """The weight of the *old* running average, in [0, 1]: ``1 - alpha`` of `jaxnorm.update_running`. None for the
    cumulative average, which begins anew where ``count`` is zero, as after loading a checkpoint of Flax's layer."""
    epsilon: float = 1e-5
    unbiased: bool = False
    """Average the unbiased variance, as PyTorch does."""
    update_running_average: bool | None = None
    """None to update them when they are not used."""

    mean: nnx.BatchStat = field(init=False)
    var: nnx.BatchStat = field(init=False)

    def __post_init__(self, *initial: Any) -> None:
        """Make scale, bias and averages."""
        super().__post_init__(*initial)
        self.mean = nnx.BatchStat(jnp.zeros(self._shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(self._shape, jnp.float32))
        if self.momentum is None:
            self.count = nnx.BatchStat(jnp.zeros(self._shape, jnp.float32))

    def __call__(
        self,
        x: jax.Array,
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
          use_running_average: None for the attribute; must be given here or there.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: None for the attribute.
          trainable: None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those the layer was built for, or an argument does not fit.

        Warns:
          UserWarning: a batch of one value per feature, or averages in use that were never updated.

        Example:
          The third value is not measured; the residual, 10, is added last:

          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from jaxnorm.nnx import BatchNorm
          >>> layer, x = BatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0)), jnp.array([[1.0], [3.0], [5.0]])
          >>> layer(x, mask=jnp.array([[True], [True], [False]]), residual=jnp.full((3, 1), 10.0)).tolist()
          [[9.0], [11.0], [13.0]]
        """
        label, use_running = _layers.label(self), _layers.first_given(use_running_average, self.use_running_average)
        if use_running is None:
            _layers.fail(label, "use_running_average must be given at construction or in the call", {"given": None})
        update = _layers.first_given(update_running_average, self.update_running_average, not use_running)
        features = _layers.sorted_axes(label, "axis", self.axis, jnp.ndim(x))
        averages = [self.mean, self.var, *([self.count] if self.momentum is None else [])]
        arguments, after = self._arguments(x, features, trainable, self.mean[...], self.var[...])
        shape = tuple(arguments["x"].shape[a] for a in features)
        values = [self._fit(average[...], shape) for average in averages]
        switches = {"use_running_average": use_running, "update": update}
        y, _, running = _layers.batch_norm(
            label, self, averages=values, features=features, mask=mask, residual=residual, **switches, **arguments
        )
        for average, new in zip(averages, running or (), strict=False):
            # In its own type, as in Flax, but for what no real number holds; whole, since its sharding may change.
            dtype = new.dtype if jnp.iscomplexobj(new) else average[...].dtype
            average.set_value(new.reshape(self._shape).astype(dtype))
        return after(y)

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


@_layers.documented("Args")
@dataclass(eq=False, repr=False, kw_only=True)
class LayerNorm(_Affine):
    """Layer normalization (Ba, Kiros and Hinton, 2016), in place of ``flax.nnx.LayerNorm``.

    Variables: ``scale`` and ``bias`` (``nnx.Param``).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import LayerNorm
      >>> LayerNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))(jnp.array([1.0, 3.0])).tolist()
      [-1.0, 1.0]
    """

    reduction_axes: Axes = -1
    """Axis or axes that share their statistics."""
    feature_axes: Axes = -1
    """Axis or axes of scale and bias."""

    _reduction = staticmethod(_layers.given_axes)


@_layers.documented("Args")
@dataclass(eq=False, repr=False, kw_only=True)
class RMSNorm(_Layer):
    """Root mean square normalization (Zhang and Sennrich, 2019), in place of ``flax.nnx.RMSNorm``.

    Variables: ``scale`` (``nnx.Param``).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import RMSNorm
      >>> RMSNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))(jnp.array([3.0, -3.0])).tolist()
      [1.0, -1.0]
    """

    reduction_axes: Axes = -1
    """Axis or axes that share their statistics."""
    feature_axes: Axes = -1
    """Axis or axes of the scale."""

    _reduction = staticmethod(partial(_layers.given_axes, centered=False))

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: jax.Array, mask: Array | None = None, *, trainable: bool | None = None, residual: Array | None = None
    ) -> jax.Array:
        """Normalize ``x``, as the other layers do; Flax takes this mask by position too.

        Args:
          x: array with the axes named at construction.
          mask, trainable, residual: as of `LayerNorm`.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those the layer was built for, or an argument does not fit.
        """
        return super().__call__(x, mask=mask, trainable=trainable, residual=residual)


@_layers.documented("Args")
@dataclass(eq=False, repr=False, kw_only=True)
class GroupNorm(_Affine):
    """Group normalization (Wu and He, 2018), in place of ``flax.nnx.GroupNorm``.

    Variables: ``scale`` and ``bias`` (``nnx.Param``), one per channel.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import GroupNorm
      >>> layer = GroupNorm(4, num_groups=2, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int | None = field(default=32, kw_only=False)
    """How many groups of neighbouring channels; None where ``group_size`` says it."""
    group_size: int | None = field(default=None, kw_only=False)
    """How many channels a group has, with ``num_groups=None``."""
    reduction_axes: Axes | None = None
    """Axes that share their statistics, that of the channels included; None for all but the first."""
    axis: int = -1
    """The channel axis."""

    _reduction = staticmethod(partial(_layers.group_axes, counted=True))

    def __post_init__(self, *initial: Any) -> None:
        """Make scale and bias, and count the groups."""
        super().__post_init__(*initial)
        channels = math.prod(self._shape)
        self.num_groups = _layers.group_count("GroupNorm", self.num_groups, self.group_size, channels)
        self.group_size = channels // self.num_groups


@_layers.documented("Args")
@dataclass(eq=False, repr=False, kw_only=True)
class InstanceNorm(_Affine):
    """Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016), in place of ``flax.nnx.InstanceNorm``.

    Variables: ``scale`` and ``bias`` (``nnx.Param``).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import InstanceNorm
      >>> InstanceNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))(jnp.array([[[1.0], [3.0]]])).tolist()
      [[[-1.0], [1.0]]]
    """

    feature_axes: Axes = -1
    """Axis or axes that keep statistics of their own, and of scale and bias; not the first, the batch."""

    _reduction = staticmethod(_layers.instance_axes)


def trainable_mask(model: nnx.Module) -> nnx.State:
    """Which parameters train: all but scale and bias of the layers with ``trainable=False``.

    Their gradients are zero, but an optimizer may move them all the same: weight decay does. With
    ``optax.adamw(1e-3, mask=mask)`` it does not.

    Args:
      model: the module.

    Returns:
      True or False, in the structure of ``nnx.state(model, nnx.Param)``.

    Raises:
      TypeError: ``model`` is not a module.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from jaxnorm.nnx import LayerNorm, trainable_mask
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), LayerNorm(2, trainable=False, rngs=rngs))
      >>> jax.tree.leaves(trainable_mask(model))  # bias and kernel, then bias and scale
      [True, True, False, False]
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"trainable_mask: model must be an nnx.Module; got {type(model).__name__}.")
    still = {
        (*path, name)
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, _Layer) and not layer.trainable
        for name in ("scale", "bias")
    }
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.from_flat_state([(path, variable.replace(path not in still)) for path, variable in flat])
