"""Batch norms that take their statistics otherwise, each a `BatchNorm` with another formula; and norms of examples.

Each paper is named in full with the function that a layer wraps.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxnorm
from jaxnorm import _layers
from jaxnorm._axes import Axes
from jaxnorm.functional import Array
from jaxnorm.nnx._norms import Affine, BatchNorm, layer

OWN_ACTIVATION = ("activation", "residual", "invertible"), "the activation is part of this norm"


@layer()
class GhostBatchNorm(BatchNorm):
    """`jaxnorm.ghost_batch_norm` (Hoffer, Hubara and Soudry, 2017) with scale, bias and running averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import GhostBatchNorm
      >>> layer = GhostBatchNorm(1, virtual_batch_size=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0], [3.0], [10.0], [30.0]])).round(3).tolist()
      [[-1.0], [1.0], [-1.0], [1.0]]
    """

    virtual_batch_size: int
    """How many consecutive examples are normalized together."""

    def _by_batch(self, x, running, **given):
        y, batch = jaxnorm.ghost_batch_norm(x, virtual_batch_size=self.virtual_batch_size, **given)
        return y, _layers.of_virtual_batches(batch, x.shape[0] / self.virtual_batch_size, self.unbiased)


@layer()
class TrackedInstanceNorm(BatchNorm):
    """Instance normalization with running averages, by which it normalizes at inference.

    PyTorch's ``InstanceNorm2d(track_running_stats=True)``, as in the checkpoints of CycleGAN, with ``unbiased=True``
    and ``momentum=0.9``. The averages are those of the means and the variances of the instances.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import TrackedInstanceNorm
      >>> layer = TrackedInstanceNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[[1.0], [3.0]]])).round(3).tolist(), layer.mean[...].tolist()
      ([[[-1.0], [1.0]]], [2.0])
    """

    def _by_batch(self, x, running, **given):
        y, batch = jaxnorm.ghost_batch_norm(x, virtual_batch_size=1, **given)
        return y, _layers.of_virtual_batches(batch, x.shape[0], self.unbiased)


@layer()
class BatchRenorm(BatchNorm):
    """`jaxnorm.batch_renorm` (Ioffe, 2017) with scale, bias and running averages; ``steps`` counts the updates.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import BatchRenorm
      >>> layer = BatchRenorm(1, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0], [3.0]])).tolist(), int(layer.steps[...])  # as by the averages before
      ([[1.0], [3.0]], 1)
    """

    r_max: float | Callable[[Any], Any] = 3.0
    """Bound of r, or a schedule: a function of the number of updates, as optax has them."""
    d_max: float | Callable[[Any], Any] = 5.0
    """Bound of d, or a schedule."""

    steps: nnx.BatchStat = field(init=False)

    def __post_init__(self, *initial: Any) -> None:
        """Make the variables."""
        super().__post_init__(*initial)
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def _by_batch(self, x, running, **given):
        steps = self.steps[...]
        bounds = {n: b(steps) if callable(b) else b for n, b in (("r_max", self.r_max), ("d_max", self.d_max))}
        return jaxnorm.batch_renorm(x, running, **bounds, **given)

    def _updated(self):
        self.steps[...] += 1


@layer()
class SplitBatchNorm(BatchNorm):
    """`jaxnorm.split_batch_norm` (Xie et al., 2020; Chang et al., 2019) with running averages of every domain.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import SplitBatchNorm
      >>> model = nnx.Sequential(SplitBatchNorm(1, num_domains=2, epsilon=0.0, rngs=nnx.Rngs(0)))
      >>> x, domain = jnp.array([[1.0], [10.0], [3.0], [30.0]]), jnp.array([0, 1, 0, 1])
      >>> nnx.view(model, domain=domain)(x).tolist()
      [[-1.0], [-1.0], [1.0], [1.0]]
    """

    num_domains: int
    """How many domains there are."""
    split_affine: bool = False
    """Whether every domain has a scale and a bias of its own."""

    domain: Any = field(init=False)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: jax.Array,
        domain: Array | None = None,
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
          domain: integers of shape ``(batch,)``, from zero to ``num_domains - 1``; None for those from ``nnx.view``.
          use_running_average: normalize by the running averages, not by the statistics of the batch; None for the
            attribute. Must be given here or there.
          mask: broadcasts against ``x``; boolean, or non-negative weights. Says which values are measured.
          update_running_average: whether the running averages move; None for the attribute.
          trainable: whether scale and bias receive gradients; None for the attribute.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``domain`` or ``use_running_average`` is not given, or an argument does not fit.
        """
        domain = self.domain if domain is None else domain
        if domain is None:
            _layers.fail(_layers.label(self), "domain must be given in the call or by nnx.view", {"domain": None})
        switches = {"update_running_average": update_running_average, "trainable": trainable}
        return self._output(x, use_running_average, mask=mask, residual=residual, domain=domain, **switches)

    def set_view(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        use_running_average: bool | None = None,
        update_running_average: bool | None = None,
        trainable: bool | None = None,
        domain: Array | None = None,
    ) -> None:
        """Used by ``nnx.view``.

        Args:
          use_running_average: normalize by the running averages instead of the statistics of the batch.
          update_running_average: whether the running averages move.
          trainable: whether the parameters receive gradients.
          domain: of the examples to come, for a model that does not pass it on to its norms.
        """
        super().set_view(use_running_average, update_running_average, trainable)
        if domain is not None:
            self.domain = jnp.asarray(domain)

    def __post_init__(self, *initial: Any) -> None:
        """Make the variables."""
        super().__post_init__(*initial)
        self.domain = nnx.data(None)

    def _variable_shapes(self, features):
        domains = (self.num_domains, *features)
        return domains, domains if self.split_affine else features

    def _by_batch(self, x, running, *, domain, **given):
        return jaxnorm.split_batch_norm(x, domain, num_domains=self.num_domains, **given)

    def _by_averages(self, x, running, *, domain, **given):
        if self.split_affine:
            given |= {n: None if given[n] is None else given[n][domain] for n in ("scale", "bias")}
        return super()._by_averages(x, jaxnorm.RunningStats(*(v[domain] for v in running)), **given)


@layer()
class SwitchableNorm(BatchNorm):
    """`jaxnorm.switchable_norm` (Luo et al., 2019) with ``mean_logits`` and ``var_logits``, equal weights at first.

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

    mean_logits: nnx.Param = field(init=False)
    var_logits: nnx.Param = field(init=False)

    def _learned(self, features):
        return {"mean_logits": ((3,), 0.0), "var_logits": ((3,), 0.0)}

    def _by_batch(self, x, running, **given):
        return jaxnorm.switchable_norm(x, **given)

    def _by_averages(self, x, running, **given):
        return jaxnorm.switchable_norm(x, running=running, **given)[0]


@layer()
class EvoNormB0(BatchNorm):
    """`jaxnorm.evonorm_b0` (Liu et al., 2020) with ``v``, initialized to one. Includes the activation.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import EvoNormB0
      >>> layer = EvoNormB0(1, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[-1.0], [3.0]])).round(2).tolist()  # -1 by the deviation, 3 by its own size
      [[-0.5], [1.0]]
    """

    v: nnx.Param = field(init=False)

    _lacks = OWN_ACTIVATION

    def _learned(self, features):
        return {"v": (features, 1.0)}

    def _by_batch(self, x, running, **given):
        return jaxnorm.evonorm_b0(x, **given)

    def _by_averages(self, x, running, **given):
        return jaxnorm.evonorm_b0(x, running=running, **given)[0]


@layer()
class SequenceBatchNorm(BatchNorm):
    """Batch normalization of ``(batch, time, *features)`` by statistics of each time step; scale and bias are shared.

    At inference a step beyond the last one seen has the averages of that one (Cooijmans et al., 2017).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import SequenceBatchNorm
      >>> layer = SequenceBatchNorm(1, max_length=3, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[[1.0], [10.0]], [[3.0], [30.0]]])).round(3).tolist()  # two sequences of two steps
      [[[-1.0], [-1.0]], [[1.0], [1.0]]]
    """

    max_length: int
    """How many steps have averages; sequences may be shorter, and longer at inference."""

    _counts = True

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: jax.Array,
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
          use_running_average: normalize by the running averages, not by the statistics of the batch; None for the
            attribute. Must be given here or there.
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

    def _variable_shapes(self, features):
        return (self.max_length, *features), features

    def _by_batch(self, x, running, **given):
        y, batch = jaxnorm.batch_norm(x, **_layers.of_steps(x, given))
        return y, _layers.of_all_steps(_layers.label(self), batch, self.max_length)

    def _by_averages(self, x, running, **given):
        steps = jaxnorm.running_at(running, jnp.arange(x.shape[1]))
        return super()._by_averages(x, steps, **_layers.of_steps(x, given))


# Of examples ---------------------------------------------------------------------------------------------------------


@layer()
class Example(Affine):
    """A norm of single examples."""

    axis: Axes = -1
    """The feature axis, or several."""

    def _feature_axes(self, x):
        """``axis``, none of it negative."""
        return _layers.sorted_axes(_layers.label(self), "axis", self.axis, jnp.ndim(x))


@layer()
class EvoNormS0(Example):
    """`jaxnorm.evonorm_s0` (Liu et al., 2020) with ``v``, initialized to one. Includes the activation.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import EvoNormS0
      >>> layer = EvoNormS0(2, num_groups=1, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[0.0, 10.0]])).round(3).tolist()  # x sigmoid(x) by the deviation, 5
      [[0.0, 2.0]]
    """

    epsilon: float = 1e-5
    num_groups: int = 32
    """How many groups; divides the number of channels."""

    v: nnx.Param = field(init=False)

    _lacks = OWN_ACTIVATION

    def _learned(self, features):
        return {"v": (features, 1.0)}

    def _by_examples(self, x, **given):
        return jaxnorm.evonorm_s0(x, num_groups=self.num_groups, **given)


@layer()
class FilterResponseNorm(Example):
    """`jaxnorm.filter_response_norm` (Singh and Krishnan, 2020) with ``threshold``, initialized to zero: a ReLU.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import FilterResponseNorm
      >>> layer = FilterResponseNorm(1, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[[3.0], [-3.0]]])).round(3).tolist()  # one example, two positions, one channel
      [[[1.0], [0.0]]]
    """

    threshold: nnx.Param = field(init=False)

    _lacks = OWN_ACTIVATION

    def _learned(self, features):
        return {"threshold": (features, 0.0)}

    def _by_examples(self, x, **given):
        return jaxnorm.filter_response_norm(x, **given)


@layer()
class DynamicTanh(Example):
    """`jaxnorm.dynamic_tanh` (Zhu et al., 2025) with ``alpha``, initialized to 0.5. It has no epsilon.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import DynamicTanh
      >>> layer = DynamicTanh(1, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.array([2.0])).round(3), jnp.tanh(0.5 * 2.0).round(3))
      [0.762] 0.762
    """

    epsilon: float = 1e-5

    alpha: nnx.Param = field(init=False)

    _lacks = (*OWN_ACTIVATION[0], "mask"), "nothing is measured, and the activation is part of this norm"

    def _learned(self, features):
        return {"alpha": ((), 0.5)}

    def _by_examples(self, x, *, epsilon, **given):
        return jaxnorm.dynamic_tanh(x, **given)


@layer()
class GraphNorm(Example):
    """Normalize the nodes of each graph in a batch, with a learned part of the mean (Cai et al., 2021).

    ``mean_scale`` begins with one.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import GraphNorm
      >>> nodes, graph = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
      >>> GraphNorm(1, num_graphs=2, rngs=nnx.Rngs(0))(nodes, graph).round(3).tolist()
      [[-1.0], [1.0], [-1.0], [1.0]]
    """

    epsilon: float = 1e-5
    num_graphs: int | None = None
    """How many graphs there are, those of the padding included; or given in the call."""

    mean_scale: nnx.Param = field(init=False)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: jax.Array,
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

    def _learned(self, features):
        return {"mean_scale": (features, 1.0)}

    def _by_examples(self, x, **given):
        return jaxnorm.graph_norm(x, **given)
