"""Batch norms that take their statistics otherwise, each a `BatchNorm` with another formula; and norms of examples.

Each paper is named in full with the function that a layer wraps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxnorm
from jaxnorm import _layers
from jaxnorm._axes import Axes
from jaxnorm.functional import Array
from jaxnorm.linen._norms import Affine, BatchNorm, Layer

OWN_ACTIVATION = ("activation", "residual", "invertible"), "the activation is part of this norm"


class GhostBatchNorm(BatchNorm, kw_only=True):
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

    @nn.nowrap
    def _by_batch(self, x, running, **given):
        y, batch = jaxnorm.ghost_batch_norm(x, virtual_batch_size=self.virtual_batch_size, **given)
        return y, _layers.of_virtual_batches(batch, x.shape[0] / self.virtual_batch_size, self.unbiased)


class TrackedInstanceNorm(BatchNorm):
    """Instance normalization with running averages, by which it normalizes at inference.

    PyTorch's ``InstanceNorm2d(track_running_stats=True)``, as in the checkpoints of CycleGAN, with ``unbiased=True``
    and ``momentum=0.9``. The averages are those of the means and the variances of the instances.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import TrackedInstanceNorm
      >>> layer, x = TrackedInstanceNorm(use_running_average=False, momentum=0.0), jnp.array([[[1.0], [3.0]]])
      >>> y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> layer.apply(variables, x, mutable="batch_stats")[1]["batch_stats"]["mean"].tolist()
      [2.0]
    """

    @nn.nowrap
    def _by_batch(self, x, running, **given):
        y, batch = jaxnorm.ghost_batch_norm(x, virtual_batch_size=1, **given)
        return y, _layers.of_virtual_batches(batch, x.shape[0], self.unbiased)


class BatchRenorm(BatchNorm, kw_only=True):
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
    """Bound of d, or a schedule."""

    @nn.nowrap
    def _by_batch(self, x, running, **given):
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        bounds = {n: b(steps.value) if callable(b) else b for n, b in (("r_max", self.r_max), ("d_max", self.d_max))}
        return jaxnorm.batch_renorm(x, running, **bounds, **given)

    @nn.nowrap
    def _updated(self):
        self.put_variable("batch_stats", "steps", self.get_variable("batch_stats", "steps") + 1)


class SplitBatchNorm(BatchNorm, kw_only=True):
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

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Array,
        domain: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        update_running_average: bool | None = None,
        trainable: bool | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize every example of ``x`` with those of its domain, or by the running averages of that.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          domain: integers of shape ``(batch,)``, from zero to ``num_domains - 1``.
          use_running_average: normalize by the running averages, not by the statistics of the batch; must be given here
            or as the attribute, not both.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: whether the running averages move; None for the attribute.
          trainable: whether scale and bias receive gradients; None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``use_running_average`` is not given, or an argument does not fit.
        """
        switches = {"update_running_average": update_running_average, "trainable": trainable}
        return self._output(x, use_running_average, mask=mask, residual=residual, domain=domain, **switches)

    @nn.nowrap
    def _variable_shapes(self, features):
        domains = (self.num_domains, *features)
        return domains, domains if self.split_affine else features

    @nn.nowrap
    def _by_batch(self, x, running, *, domain, **given):
        return jaxnorm.split_batch_norm(x, domain, num_domains=self.num_domains, **given)

    @nn.nowrap
    def _by_averages(self, x, running, *, domain, **given):
        if self.split_affine:
            given |= {n: None if given[n] is None else given[n][domain] for n in ("scale", "bias")}
        return super()._by_averages(x, jaxnorm.RunningStats(*(v[domain] for v in running)), **given)


class SwitchableNorm(BatchNorm):
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

    @nn.nowrap
    def _learned(self, features):
        return {"mean_logits": ((3,), 0.0), "var_logits": ((3,), 0.0)}

    @nn.nowrap
    def _by_batch(self, x, running, **given):
        return jaxnorm.switchable_norm(x, **given)

    @nn.nowrap
    def _by_averages(self, x, running, **given):
        return jaxnorm.switchable_norm(x, running=running, **given)[0]


class EvoNormB0(BatchNorm):
    """`jaxnorm.evonorm_b0` (Liu et al., 2020) with ``params/v``, initialized to one. Includes the activation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import EvoNormB0
      >>> layer, x = EvoNormB0(use_running_average=False), jnp.array([[-1.0], [3.0]])
      >>> layer.init_with_output(jax.random.key(0), x)[0].round(2).tolist()  # -1 by the deviation, 3 by its own size
      [[-0.5], [1.0]]
    """

    _lacks = OWN_ACTIVATION

    @nn.nowrap
    def _learned(self, features):
        return {"v": (features, 1.0)}

    @nn.nowrap
    def _by_batch(self, x, running, **given):
        return jaxnorm.evonorm_b0(x, **given)

    @nn.nowrap
    def _by_averages(self, x, running, **given):
        return jaxnorm.evonorm_b0(x, running=running, **given)[0]


class SequenceBatchNorm(BatchNorm, kw_only=True):
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

    _counts = True

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Array,
        lengths: Array | None = None,
        use_running_average: bool | None = None,
        *,
        update_running_average: bool | None = None,
        trainable: bool | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize every time step of ``x`` by its own statistics, which move its running averages, or by those.

        Args:
          x: array of shape ``(batch, time, *features)``.
          lengths: integers of shape ``(batch,)``: how many steps of each sequence count; None for all.
          use_running_average: normalize by the running averages, not by the statistics of the batch; must be given here
            or as the attribute, not both.
          update_running_average: whether the running averages move; None for the attribute.
          trainable: whether scale and bias receive gradients; None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``use_running_average`` is not given, or the sequences are longer than ``max_length`` and
            normalized by their own statistics.
        """
        mask = _layers.mask_of(lengths, x)
        switches = {"update_running_average": update_running_average, "trainable": trainable}
        return self._output(x, use_running_average, mask=mask, residual=residual, **switches)

    @nn.nowrap
    def _variable_shapes(self, features):
        return (self.max_length, *features), features

    @nn.nowrap
    def _by_batch(self, x, running, **given):
        y, batch = jaxnorm.batch_norm(x, **_layers.of_steps(x, given))
        return y, _layers.of_all_steps(_layers.label(self, self.path), batch, self.max_length)

    @nn.nowrap
    def _by_averages(self, x, running, **given):
        steps = jaxnorm.running_at(running, jnp.arange(x.shape[1]))
        return super()._by_averages(x, steps, **_layers.of_steps(x, given))


# Of examples ---------------------------------------------------------------------------------------------------------


class Example(Layer, Affine, kw_only=True):
    """A norm of single examples."""

    axis: Axes = -1
    """The feature axis, or several."""

    @nn.nowrap
    def _feature_axes(self, x):
        """``axis``, none of it negative."""
        return _layers.sorted_axes(_layers.label(self, self.path), "axis", self.axis, x.ndim)


class EvoNormS0(Example, kw_only=True):
    """`jaxnorm.evonorm_s0` (Liu et al., 2020) with ``params/v``, initialized to one. Includes the activation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import EvoNormS0
      >>> y, _ = EvoNormS0(num_groups=1).init_with_output(jax.random.key(0), jnp.array([[0.0, 10.0]]))
      >>> y.round(3).tolist()  # x sigmoid(x) by the deviation, 5
      [[0.0, 2.0]]
    """

    epsilon: float = 1e-5
    num_groups: int = 32
    """How many groups; divides the number of channels."""

    _lacks = OWN_ACTIVATION

    @nn.nowrap
    def _learned(self, features):
        return {"v": (features, 1.0)}

    @nn.nowrap
    def _by_examples(self, x, **given):
        return jaxnorm.evonorm_s0(x, num_groups=self.num_groups, **given)


class FilterResponseNorm(Example, kw_only=True):
    """`jaxnorm.filter_response_norm` (Singh and Krishnan, 2020) with ``params/threshold``, initialized to zero: a ReLU.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import FilterResponseNorm
      >>> x = jnp.array([[[3.0], [-3.0]]])  # one example, two positions, one channel
      >>> FilterResponseNorm().init_with_output(jax.random.key(0), x)[0].round(3).tolist()
      [[[1.0], [0.0]]]
    """

    _lacks = OWN_ACTIVATION

    @nn.nowrap
    def _learned(self, features):
        return {"threshold": (features, 0.0)}

    @nn.nowrap
    def _by_examples(self, x, **given):
        return jaxnorm.filter_response_norm(x, **given)


class DynamicTanh(Example, kw_only=True):
    """`jaxnorm.dynamic_tanh` (Zhu et al., 2025) with ``params/alpha``, initialized to 0.5. It has no epsilon.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import DynamicTanh
      >>> y, _ = DynamicTanh().init_with_output(jax.random.key(0), jnp.array([2.0]))
      >>> print(y.round(3), jnp.tanh(0.5 * 2.0).round(3))
      [0.762] 0.762
    """

    epsilon: float = 1e-5

    _lacks = (*OWN_ACTIVATION[0], "mask"), "nothing is measured, and the activation is part of this norm"

    @nn.nowrap
    def _learned(self, features):
        return {"alpha": ((), 0.5)}

    @nn.nowrap
    def _by_examples(self, x, *, epsilon, **given):
        return jaxnorm.dynamic_tanh(x, **given)


class GraphNorm(Example, kw_only=True):
    """Normalize the nodes of each graph in a batch, with a learned part of the mean (Cai et al., 2021).

    ``params/mean_scale`` begins with one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import GraphNorm
      >>> nodes, graph = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
      >>> GraphNorm(num_graphs=2).init_with_output(jax.random.key(0), nodes, graph)[0].round(3).tolist()
      [[-1.0], [1.0], [-1.0], [1.0]]
    """

    epsilon: float = 1e-5
    num_graphs: int | None = None
    """How many graphs there are, those of the padding included; or given in the call."""

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Array,
        graph: Array,
        *,
        num_graphs: int | None = None,
        mask: Array | None = None,
        trainable: bool | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize every node of ``x`` with those of its graph.

        Args:
          x: array of shape ``(nodes, *features)``.
          graph: integers of shape ``(nodes,)``, from zero to ``num_graphs - 1``.
          num_graphs: None for the attribute.
          mask: broadcasts against ``x``, of shape ``(nodes, 1)``, say; boolean, or non-negative weights. False for the
            nodes of the padding, which are normalized, but not measured.
          trainable: whether scale and bias receive gradients; None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          TypeError: ``num_graphs`` is not given.
          ValueError: an argument does not fit.
        """
        given = {"graph": graph, "num_graphs": _layers.first_given(num_graphs, self.num_graphs)}
        return self._output(x, mask=mask, trainable=trainable, residual=residual, **given)

    @nn.nowrap
    def _learned(self, features):
        return {"mean_scale": (features, 1.0)}

    @nn.nowrap
    def _by_examples(self, x, **given):
        return jaxnorm.graph_norm(x, **given)
