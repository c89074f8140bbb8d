"""The five norms of Flax, with what all layers share: fields, parameters, averages. No arithmetic."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.initializers import ones_init, zeros_init

from jaxnorm import _axes, _layers
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Function
from jaxnorm._moments import Moments
from jaxnorm.functional import normalize_array
from jaxnorm.running import RunningStats

Array = jax.typing.ArrayLike
Groups = Sequence[Sequence[int]]
Metadata = Mapping[str, Any]
Initializer = jax.nn.initializers.Initializer
NO_METADATA: Metadata = MappingProxyType({})
ZEROS, ONES = zeros_init(), ones_init()
Class = TypeVar("Class", bound=type)


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def layer() -> Callable[[Class], Class]:
    """A dataclass of variables: compared by identity, shown as nnx shows modules, with a signature that can be seen."""
    return lambda cls: signed(dataclass(eq=False, repr=False, kw_only=True)(cls))


def signed(cls: Class) -> Class:
    """A module whose signature is that of its ``__init__``, not of what nnx makes modules by."""
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    cls.__signature__ = inspect.Signature(parameters)
    return cls


@layer()
class Layer(nnx.Module):
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
    zero_centered_scale: bool = False
    """Store the scale as its distance from one, so that weight decay pulls it to one. ``scale_init`` still says where
    the scale itself starts."""

    scale: nnx.Param | None = field(init=False)
    bias: nnx.Param | None = field(init=False)
    _lacks: ClassVar[tuple[tuple[str, ...], str]] = ((), "")  # What of the above means nothing to a norm, and why.
    _reduction: ClassVar[Callable[[str, Any, tuple[int, ...]], _layers.Reduction]]

    def __post_init__(self, scale_init: Any, rngs: nnx.Rngs, scale_metadata: Metadata, *of_bias: Any) -> None:
        """Make scale and bias."""
        if isinstance(self.num_features, Sequence):
            self.num_features = tuple(self.num_features)
        dtype = self.param_dtype if self.dtype is None else self.dtype
        _layers.check_start(_layers.label(self), self, scale_init, self._shape, dtype)
        initial = {"scale": (scale_init, scale_metadata), "bias": of_bias or (ZEROS, NO_METADATA)}
        _, shape = self._variable_shapes(self._shape)
        for name, (init, metadata) in initial.items():
            value = nnx.data(None)
            if getattr(self, f"use_{name}", False):
                start = init(rngs.params(), shape, self.param_dtype)
                value = nnx.Param(start - 1 if name == "scale" and self.zero_centered_scale else start, **metadata)
            setattr(self, name, value)
        for name, (shape, start) in self._learned(self._shape).items():
            setattr(self, name, nnx.Param(jnp.full(shape, start, self.param_dtype)))

    @property
    def _shape(self) -> tuple[int, ...]:
        """The shape of the features."""
        return self.num_features if isinstance(self.num_features, tuple) else (self.num_features,)  # pyright: ignore

    def _fit(self, value: Any, shape: tuple[int, ...]) -> Any:
        """A variable in the shape of the feature axes; Flax keeps that of several axes as one vector."""
        if self._shape != (math.prod(shape),):
            _layers.check_features(_layers.label(self), shape, self._shape)
        if value is None:
            return None
        leading = value.shape[: value.ndim - len(self._shape)]
        return value.reshape(*leading, *shape)

    def _arguments(
        self,
        x: jax.Array,
        axis: tuple[int, ...],
        trainable: bool | None,
        *between: jax.Array,
        affine: tuple[Any, Any] | None = None,
    ) -> tuple[jax.Array, dict[str, Any], Function]:
        """The input; the arguments of a formula that all layers have, after ``promote_dtype``; the module that follows.

        ``affine`` stands for scale and bias.
        """
        features, trains = tuple(x.shape[a] for a in axis), _layers.first_given(trainable, self.trainable)
        used = {"scale": self.scale, "bias": self.bias} | {
            name: getattr(self, name) for name in self._learned(features)
        }
        used = {n: None if v is None else _layers.constant_unless(trains, v[...]) for n, v in used.items()}
        if affine is not None:
            used |= dict(zip(("scale", "bias"), _layers.constant_unless(trains, affine), strict=True))
        names = ["scale", "bias"] if hasattr(self, "use_bias") else ["scale"]
        x, *promoted = self.promote_dtype((x, *between, *(used[name] for name in names)), dtype=self.dtype)
        scale, bias, *_ = (*promoted[len(between) :], None)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        if affine is None:
            scale, bias = self._fit(scale, features), self._fit(bias, features)
        if self.zero_centered_scale and scale is not None:
            scale = 1 + scale.astype(_axes.statistics_dtype(scale.dtype))
        used |= {"scale": scale, "bias": bias}
        activation, after = _layers.epilogue(self, nnx.Module)
        given = {"axis": axis, "epsilon": self.epsilon, "activation": activation, "invertible": self.invertible}
        return _layers.as_input(x), used | given | {"dtype": dtype}, after

    def __call__(
        self, x: jax.Array, *, mask: Array | None = None, trainable: bool | None = None, residual: Array | None = None
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array with the axes named at construction; the first is the batch for group and instance normalization.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: whether scale and bias receive gradients; None for the attribute.
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
        return self._output(x, mask=mask, trainable=trainable, residual=residual)

    # What other norms override: with an underscore, for `nnx.tabulate` takes other methods for calls of the module. --

    def _by_examples(self, x: jax.Array, *, axis: tuple[int, ...], dtype: Any = None, **given: Any) -> jax.Array:
        """The output, of the shape and the dtype of ``x``.

        Args:
          x: array.
          axis: the feature axes.
          dtype: of the output, where it is another.
          **given: scale and bias, everything that is `_learned`, epsilon, mask, residual, activation, invertible; and
            what the call of the layer passes on.

        Returns:
          An array of the shape of ``x``.
        """
        label = _layers.label(self)
        given |= self._reduction(label, self, x.shape)._asdict() | _layers.replicas(self, False)
        return normalize_array(label, x, dtype=dtype, warn=_layers.warn, **given)[0]

    def _feature_axes(self, x: jax.Array) -> tuple[int, ...]:
        """The axes of scale and bias.

        Args:
          x: array.

        Returns:
          Axes, none of them negative.
        """
        return self._reduction(_layers.label(self), self, jnp.shape(x)).features

    def _variable_shapes(self, features: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the running averages, if there are any, and of scale and bias.

        Args:
          features: the shape of the feature axes.

        Returns:
          Both shapes, which end in ``features``.
        """
        return features, features

    def _learned(self, features: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], float]]:
        """The learned parameters other than scale and bias: shape and initial value, by name.

        Args:
          features: the shape of the feature axes.

        Returns:
          A dictionary; what normalizes gets the values by these names.
        """
        return {}

    def _output(self, x: jax.Array, *, trainable: bool | None, affine: Any = None, **given: Any) -> jax.Array:
        """The output; ``affine`` stands for scale and bias, and the formula gets everything else."""
        x = jnp.asarray(x)
        x, settings, after = self._arguments(x, self._feature_axes(x), trainable, affine=affine)
        settings = _layers.without(_layers.label(self), self, settings | given)
        return after(_layers.in_dtype(self._by_examples, Layer._by_examples, x, **settings))

    def set_view(self, trainable: bool | None = None) -> None:
        """Used by ``nnx.view``.

        Args:
          trainable: whether scale and bias receive gradients.
        """
        if trainable is not None:
            self.trainable = trainable


@layer()
class Affine(Layer):
    use_bias: bool = True
    """Whether there is a bias."""
    bias_init: InitVar[Initializer] = ZEROS
    """Initializer of the bias."""
    bias_metadata: InitVar[Metadata] = NO_METADATA
    """Metadata of the bias."""


@layer()
class Replicated(Layer):
    axis_name: AxisNames | None = None
    """Mapped axis or axes whose replicas share their statistics. Need not exist where running averages are used. Under
    ``jit`` with sharded arrays leave it out: the statistics are global."""
    axis_index_groups: Groups | None = None
    """Lists of replicas; each is normalized with its own list only."""
    use_fast_variance: bool = True
    """Either choice gives the stable statistics."""


@layer()
class BatchNorm(Affine, Replicated):
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
    cumulative average, which starts again where ``count`` is zero, as after loading a checkpoint of Flax's layer."""
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
        shape, _ = self._variable_shapes(self._shape)
        self.mean = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))
        if self._counts or self.momentum is None:
            self.count = nnx.BatchStat(jnp.zeros(shape, jnp.float32))

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
          use_running_average: normalize by the running averages, not by the statistics of the batch; None for the
            attribute. Must be given here or there.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: whether the running averages move; None for the attribute.
          trainable: whether scale and bias receive gradients; None for the attribute.
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
        switches = {"update_running_average": update_running_average, "trainable": trainable}
        return self._output(x, use_running_average, mask=mask, residual=residual, **switches)

    # What other batch norms override -------------------------------------------------------------------------------

    _counts: ClassVar[bool] = False  # Whether the averages have a count whatever the momentum.

    def _by_batch(
        self, x: jax.Array, running: RunningStats, *, axis: tuple[int, ...], dtype: Any = None, **given: Any
    ) -> tuple[jax.Array, Moments]:
        """The output by the statistics of the batch; and those, which the running averages take.

        Args:
          x: array.
          running: the averages before.
          axis: the feature axes.
          dtype: of the output, where it is another than that of ``x``.
          **given: scale and bias, everything that is `_learned`, epsilon, mask, axis_name, axis_index_groups, residual,
            activation, invertible; and what the call of the layer passes on.

        Returns:
          ``(y, batch)``: an array of the shape of ``x``, and `jaxnorm.Moments` of the shape of the averages.
        """
        own = {"features": axis, "axes": _axes.others(axis, x), "kept": axis, "near": running.mean, "dtype": dtype}
        return normalize_array(_layers.label(self), x, warn=_layers.warn, **own, **given)

    def _by_averages(
        self, x: jax.Array, running: RunningStats, *, axis: tuple[int, ...], mask: Any, dtype: Any = None, **given: Any
    ) -> jax.Array:
        """The output by the running averages.

        Args:
          x: array.
          running: the averages.
          axis: the feature axes.
          mask: which values would be measured.
          dtype: of the output, where it is another than that of ``x``.
          **given: as of `_by_batch`, but for axis_name and axis_index_groups.

        Returns:
          An array of the shape of ``x``.
        """
        own = {"features": axis, "given": (running.mean, running.var), "dtype": dtype}
        return normalize_array(_layers.label(self), x, **own, **given)[0]

    def _feature_axes(self, x: jax.Array) -> tuple[int, ...]:
        """``axis``, none of it negative.

        Args:
          x: array.

        Returns:
          The axes.
        """
        return _layers.sorted_axes(_layers.label(self), "axis", self.axis, jnp.ndim(x))

    def _updated(self) -> None:
        """The averages have moved."""

    def _output(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: jax.Array,
        use_running_average: bool | None,
        *,
        update_running_average: bool | None,
        trainable: bool | None,
        affine: Any = None,
        **given: Any,
    ) -> jax.Array:
        """The output; averages move. ``affine`` stands for scale and bias; the formula gets the rest."""
        label, use_running = _layers.label(self), _layers.first_given(use_running_average, self.use_running_average)
        if use_running is None:
            _layers.fail(label, "use_running_average must be given at construction or in the call", {"given": None})
        update = _layers.first_given(update_running_average, self.update_running_average, not use_running)
        x = jnp.asarray(x)
        axis, between = self._feature_axes(x), (self.mean[...], self.var[...])
        averages = {name: getattr(self, name) for name in ("mean", "var", "count") if hasattr(self, name)}
        x, settings, after = self._arguments(x, axis, trainable, *between, affine=affine)
        settings = _layers.without(label, self, settings | given)
        features = tuple(x.shape[a] for a in axis)
        stored = {name: self._fit(average[...], features) for name, average in averages.items()}
        running = _layers.running_stats(label, stored, self._variable_shapes(features)[0], features)
        _layers.check_momentum(label, self.momentum)
        y: Any = None
        by_batch: Any = None
        batch: Any = None
        if use_running:
            _layers.warn_if_never_updated(label, running)
            method, base = self._by_averages, BatchNorm._by_averages
            y = _layers.in_dtype(method, base, x, running, **settings)
        if update or not use_running:
            method, base = self._by_batch, BatchNorm._by_batch
            replicas = _layers.replicas(self, False)
            by_batch, batch = _layers.in_dtype(method, base, x, running, **settings, **replicas)
        if update:
            new = _layers.moved(running, batch, self.momentum, self.unbiased)
            shape, _ = self._variable_shapes(self._shape)
            for name, average in averages.items():
                # In its own type, as in Flax, but for what no real number holds; whole, since its sharding may change.
                value = getattr(new, name)
                dtype = value.dtype if jnp.iscomplexobj(value) else average[...].dtype
                average.set_value(value.reshape(shape).astype(dtype))
            self._updated()
        return after(y if use_running else by_batch)

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


@layer()
class LayerNorm(Affine, Replicated):
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


@layer()
class RMSNorm(Replicated):
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
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: whether scale and bias receive gradients; None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: the features are not those the layer was built for, or an argument does not fit.
        """
        return super().__call__(x, mask=mask, trainable=trainable, residual=residual)


@layer()
class GroupNorm(Affine, Replicated):
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
    batched: bool = True
    """False for one example, without a batch axis, as under ``vmap``: the first axis is one of the others."""

    _reduction = staticmethod(partial(_layers.group_axes, counted=True))

    def __post_init__(self, *initial: Any) -> None:
        """Make scale and bias, and count the groups."""
        super().__post_init__(*initial)
        channels = math.prod(self._shape)
        self.num_groups = _layers.group_count("GroupNorm", self.num_groups, self.group_size, channels)
        self.group_size = channels // self.num_groups


@layer()
class InstanceNorm(Affine, Replicated):
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

    batched: bool = True
    """False for one example, without a batch axis, as under ``vmap``: the first axis is one of the others."""

    _reduction = staticmethod(_layers.instance_axes)


def trainable_mask(model: nnx.Module) -> nnx.State:
    """Which parameters train: all but those of the layers with ``trainable=False``.

    Their gradients are zero, but an optimizer may move them all the same: weight decay does. With
    ``optax.adamw(1e-3, mask=mask)`` it does not, under ``nnx.Optimizer`` too.

    Args:
      model: the module.

    Returns:
      True or False, in the structure of ``nnx.as_pure(nnx.state(model, nnx.Param))``.

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
    modules = nnx.iter_modules(model)
    still = [path for path, layer in modules if isinstance(layer, Layer) and not layer.trainable]

    def trains(path):
        return not any(path[: len(layer)] == layer for layer in still)

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.from_flat_state([(path, trains(path)) for path, _ in flat])
