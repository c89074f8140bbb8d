"""The five norms of Flax, with what all layers share: fields, parameters, averages. No arithmetic."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype

from jaxnorm import _axes, _layers
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Function
from jaxnorm._moments import Moments
from jaxnorm.functional import normalize_array
from jaxnorm.running import RunningStats

Array = jax.typing.ArrayLike
Groups = Sequence[Sequence[int]]
Initializer = nn.initializers.Initializer


# Helpers are functions, or methods under `nn.nowrap`: Flax would take others for calls of the module.


def parameter(layer: Any, name: str, shape: tuple[int, ...], trainable: bool | None, init: Any) -> tuple[Any, Any]:
    """A parameter, stored and used: the latter is a constant to differentiation where it does not train."""
    if layer.has_variable("params", name):
        label = _layers.label(layer, layer.path)
        _layers.check_features(label, shape, jnp.shape(meta.unbox(layer.get_variable("params", name))))
    stored = layer.param(name, init, shape, layer.param_dtype)
    return stored, _layers.constant_unless(_layers.first_given(trainable, layer.trainable), stored)


def _less_one(init: Initializer) -> Any:
    return lambda *args: jax.tree.map(lambda value: value - 1, init(*args))


def arguments(
    layer: Any, x: jax.Array, axis: tuple[int, ...], trainable: bool | None, affine: tuple[Any, Any] | None = None
) -> tuple[dict[str, Any], Function]:
    """The arguments that all formulas take, and the module that follows; ``affine`` stands for scale and bias."""
    features = tuple(x.shape[a] for a in axis)
    _, shape = layer._variable_shapes(features)
    stored: dict[str, Any] = {"scale": None, "bias": None}
    used = dict(stored)
    if affine is None:
        for name in stored:
            if getattr(layer, f"use_{name}", False):
                init = getattr(layer, f"{name}_init")
                init = _less_one(init) if name == "scale" and layer.zero_centered_scale else init
                stored[name], used[name] = parameter(layer, name, shape, trainable, init)
        if layer.is_initializing():
            dtype = canonicalize_dtype(x, *stored.values(), dtype=layer.dtype)
            _layers.check_start(_layers.label(layer, layer.path), layer, layer.scale_init, shape, dtype)
        if layer.zero_centered_scale and used["scale"] is not None:
            used["scale"] = 1 + used["scale"].astype(_axes.statistics_dtype(used["scale"].dtype))
    else:
        trains = _layers.first_given(trainable, layer.trainable)
        stored = used = dict(zip(used, _layers.constant_unless(trains, affine), strict=True))
    for name, (own, start) in layer._learned(features).items():
        _, used[name] = parameter(layer, name, own, trainable, nn.initializers.constant(start))
    activation, after = _layers.epilogue(layer, nn.Module)
    given = {"axis": axis, "epsilon": layer.epsilon, "activation": activation, "invertible": layer.invertible}
    return used | given | {"dtype": canonicalize_dtype(x, *stored.values(), dtype=layer.dtype)}, after


class Layer(nn.Module):
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
    zero_centered_scale: bool = False
    """Store the scale as its distance from one, so that weight decay pulls it to one. ``scale_init`` still says where
    the scale itself starts."""

    _lacks: ClassVar[tuple[tuple[str, ...], str]] = ((), "")  # What of the above means nothing to a norm, and why.
    _reduction: ClassVar[Callable[[str, Any, tuple[int, ...]], _layers.Reduction]]

    @nn.compact
    def __call__(
        self, x: Array, *, mask: Array | None = None, trainable: bool | None = None, residual: Array | None = None
    ) -> jax.Array:
        """Normalize ``x``.

        Args:
          x: array with the axes that the attributes name; the first is the batch for group and instance normalization.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          trainable: whether scale and bias receive gradients; None for the attribute.
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
        return self._output(x, mask=mask, trainable=trainable, residual=residual)

    # What other norms override -------------------------------------------------------------------------------------

    @nn.nowrap
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
        label, initializing = _layers.label(self, self.path), self.is_initializing()
        given |= self._reduction(label, self, x.shape)._asdict() | _layers.replicas(self, initializing)
        return normalize_array(label, x, dtype=dtype, warn=None if initializing else _layers.warn, **given)[0]

    @nn.nowrap
    def _feature_axes(self, x: jax.Array) -> tuple[int, ...]:
        """The axes of scale and bias.

        Args:
          x: array.

        Returns:
          Axes, none of them negative.
        """
        return self._reduction(_layers.label(self, self.path), self, x.shape).features

    @nn.nowrap
    def _variable_shapes(self, features: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the running averages, if there are any, and of scale and bias.

        Args:
          features: the shape of the feature axes.

        Returns:
          Both shapes, which end in ``features``.
        """
        return features, features

    @nn.nowrap
    def _learned(self, features: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], float]]:
        """The learned parameters other than scale and bias: shape and initial value, by name.

        Args:
          features: the shape of the feature axes.

        Returns:
          A dictionary; what normalizes gets the values by these names.
        """
        return {}

    @nn.nowrap
    def _output(self, x: Array, *, trainable: bool | None, affine: Any = None, **given: Any) -> jax.Array:
        """The output; ``affine`` stands for scale and bias, and the formula gets everything else."""
        x = _layers.as_input(x)
        settings, after = arguments(self, x, self._feature_axes(x), trainable, affine)
        settings = _layers.without(_layers.label(self, self.path), self, settings | given)
        return after(_layers.in_dtype(self._by_examples, Layer._by_examples, x, **settings))


class Replicated(nn.Module):
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


class Affine(_Typed):
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
    cumulative average, which starts again where there is no ``count`` yet, as in a checkpoint of Flax's layer."""


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


class BatchNorm(Layer, Replicated, Affine, _Averaged):
    """Batch normalization (Ioffe and Szegedy, 2015), in place of ``flax.linen.BatchNorm``.

    Variables, all in the shape of the feature axes: ``params/scale`` and ``params/bias`` of dtype ``param_dtype``,
    ``batch_stats/mean`` and ``batch_stats/var`` of dtype float32 (wider or complex once they averaged what is), and,
    only with ``momentum=None``, ``batch_stats/count``, the number of values averaged.

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
          use_running_average: normalize by the running averages, not by the statistics of the batch; must be given here
            or as the attribute, not both.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: whether the running averages move; None for the attribute.
          trainable: whether scale and bias receive gradients; None for the attribute.
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
        switches = {"update_running_average": update_running_average, "trainable": trainable}
        return self._output(x, use_running_average, mask=mask, residual=residual, **switches)

    # What other batch norms override -------------------------------------------------------------------------------

    _counts: ClassVar[bool] = False  # Whether the averages have a count whatever the momentum.

    @nn.nowrap
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
        warn = None if self.is_initializing() else _layers.warn
        return normalize_array(_layers.label(self, self.path), x, warn=warn, **own, **given)

    @nn.nowrap
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
        return normalize_array(_layers.label(self, self.path), x, **own, **given)[0]

    @nn.nowrap
    def _feature_axes(self, x: jax.Array) -> tuple[int, ...]:
        """``axis``, none of it negative.

        Args:
          x: array.

        Returns:
          The axes.
        """
        return _layers.sorted_axes(_layers.label(self, self.path), "axis", self.axis, x.ndim)

    @nn.nowrap
    def _updated(self) -> None:
        """The averages have moved."""

    @nn.nowrap
    def _output(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Array,
        use_running_average: bool | None,
        *,
        update_running_average: bool | None,
        trainable: bool | None,
        affine: Any = None,
        **given: Any,
    ) -> jax.Array:
        """The output; averages move. ``affine`` stands for scale and bias; the formula gets the rest."""
        use_running = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        update = _layers.first_given(update_running_average, self.update_running_average, not use_running)
        x, label, initializing = _layers.as_input(x), _layers.label(self, self.path), self.is_initializing()
        update = update and not initializing
        axis = self._feature_axes(x)
        features = tuple(x.shape[a] for a in axis)
        shape, _ = self._variable_shapes(features)
        start = {"mean": jnp.zeros, "var": jnp.ones}
        if self._counts or (self.momentum is None and (update or initializing)):
            start["count"] = jnp.zeros
        averages = {name: self.variable("batch_stats", name, init, shape, jnp.float32) for name, init in start.items()}
        running = _layers.running_stats(label, {n: average.value for n, average in averages.items()}, shape, features)
        settings, after = arguments(self, x, axis, trainable, affine)
        settings = _layers.without(label, self, settings | given)
        _layers.check_momentum(label, self.momentum)
        y: Any = None
        by_batch: Any = None
        batch: Any = None
        if use_running:
            if not initializing:
                _layers.warn_if_never_updated(label, running)
            method, base = self._by_averages, BatchNorm._by_averages
            y = _layers.in_dtype(method, base, x, running, **settings)
        if update or not use_running:
            method, base = self._by_batch, BatchNorm._by_batch
            replicas = _layers.replicas(self, initializing)
            by_batch, batch = _layers.in_dtype(method, base, x, running, **settings, **replicas)
        if update:
            new = _layers.moved(running, batch, self.momentum, self.unbiased)
            for name, average in averages.items():
                average.value = getattr(new, name)
            self._updated()
        return after(y if use_running else by_batch)


class LayerNorm(Layer, Replicated, _Reduced, Affine):
    """Layer normalization (Ba, Kiros and Hinton, 2016), in place of ``flax.linen.LayerNorm``.

    Variables: ``params/scale`` and ``params/bias``, in the shape of the feature axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import LayerNorm
      >>> LayerNorm(epsilon=0.0).init_with_output(jax.random.key(0), jnp.array([1.0, 3.0]))[0].tolist()
      [-1.0, 1.0]
    """

    _reduction = staticmethod(_layers.given_axes)


class RMSNorm(Layer, Replicated, _Reduced, _Scaled):
    """Root mean square normalization (Zhang and Sennrich, 2019), in place of ``flax.linen.RMSNorm``.

    Variables: ``params/scale``, in the shape of the feature axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import RMSNorm
      >>> RMSNorm(epsilon=0.0).init_with_output(jax.random.key(0), jnp.array([3.0, -3.0]))[0].tolist()
      [1.0, -1.0]
    """

    _reduction = staticmethod(partial(_layers.given_axes, centered=False))


class GroupNorm(Layer, Replicated, _GroupReduced, Affine, _Grouped):
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
    batched: bool = True
    """False for one example, without a batch axis, as under ``vmap``: the first axis is one of the others."""

    _reduction = staticmethod(_layers.group_axes)


class InstanceNorm(Layer, Replicated, _InstanceFeatures, Affine):
    """Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016), in place of ``flax.linen.InstanceNorm``.

    Variables: ``params/scale`` and ``params/bias``, in the shape of the feature axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import InstanceNorm
      >>> x = jnp.array([[[1.0], [3.0]]])
      >>> InstanceNorm(epsilon=0.0).init_with_output(jax.random.key(0), x)[0].tolist()
      [[[-1.0], [1.0]]]
    """

    batched: bool = True
    """False for one example, without a batch axis, as under ``vmap``: the first axis is one of the others."""

    _reduction = staticmethod(_layers.instance_axes)


def trainable_mask(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """Which parameters train: all but those of the layers with ``trainable=False``.

    Their gradients are zero, but an optimizer may move them all the same: weight decay does. With
    ``optax.adamw(1e-3, mask=mask)`` it does not.

    Args:
      model: the module.
      variables: its variables.
      *args: the inputs, and whatever else ``model`` is called with.
      **kwargs: keyword arguments and options of ``model.apply``.

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
        if isinstance(layer, Layer) and not _layers.first_given(kwargs.get("trainable"), layer.trainable):
            still.add(layer.path)
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda v: model.apply(v, *args, **{"mutable": True, **kwargs}), variables)

    def trains(path, _):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return not any(names[: len(layer)] == layer for layer in still)

    return jax.tree_util.tree_map_with_path(trains, variables["params"])
