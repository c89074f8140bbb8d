"""Ghost batch normalization: statistics of virtual batches, however many devices hold them."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm import _axes
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Formula
from jaxnorm._moments import Moments, Statistics, merge_along
from jaxnorm._replicas import Replicas, merge_replicas
from jaxnorm._rule import saved
from jaxnorm.functional import Array, Groups, normalize_array
from jaxnorm.variants._examples import check_examples, merge_labelled


def ghost_batch_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    virtual_batch_size: int,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> tuple[jax.Array, Moments]:
    r"""Normalize each virtual batch, a group of consecutive examples, by its own statistics.

    .. math:: y = \gamma \, \frac{x - \mu_v}{\sqrt{\sigma_v^2 + \epsilon}} + \beta

    The noise of small batches for large ones. Virtual batches are those of the whole batch, in the order of its
    examples, whether one device holds it, several under ``jit``, or the replicas of ``axis_name``: a virtual batch
    may be larger or smaller than what a device holds. Where none straddles devices, they exchange nothing for ``y``.

    Args:
      x: real or complex floating point array of shape ``(batch, ...)``.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)``; None for one.
      bias: beta, in the same shape; None for zero.
      virtual_batch_size: how many examples; divides the batch of all replicas together.
      axis: the feature axis, or several, not the first. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-5.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are normalized together. Leave
        it out under ``jit``.
      axis_index_groups: lists of replicas that together hold each once; each list is normalized separately.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``(y, batch)``: ``y`` in the shape and dtype of ``x``; and `Moments` in the shape of the feature axes, for
      `update_running`: the averages over virtual batches of mean and biased variance, and the count of all.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
      >>> y, batch = jaxnorm.ghost_batch_norm(x, virtual_batch_size=2, epsilon=0.0)
      >>> y.tolist(), batch.mean.tolist(), batch.var.tolist()
      ([[-1.0], [1.0], [-1.0], [1.0]], [11.0], [50.5])

    References:
      Hoffer, Hubara and Soudry, "Train Longer, Generalize Better: Closing the Generalization Gap in Large Batch
      Training of Neural Networks", NeurIPS 2017, algorithm 1.
    """
    function = "ghost_batch_norm"
    x, features, axes = check_examples(function, x, axis)
    replicas = Replicas(*_axes.check_replicas(function, axis_name, axis_index_groups))
    members, _ = _members(replicas)
    if isinstance(virtual_batch_size, bool) or not isinstance(virtual_batch_size, int | np.integer):
        rule = "virtual_batch_size must be an integer"
        _axes.fail(function, rule, {"virtual_batch_size": virtual_batch_size}, TypeError)
    if virtual_batch_size < 1 or any(x.shape[0] * n % virtual_batch_size for n in members):
        rule = "virtual_batch_size must divide the number of examples of all replicas"
        got = {"virtual_batch_size": virtual_batch_size, "batch": x.shape[0], "replicas": max(members)}
        _axes.fail(function, rule, got)
    return normalize_array(
        function,
        x,
        scale,
        bias,
        features=features,
        axes=axes,
        kept=features,
        epsilon=epsilon,
        adjust=VirtualBatches(int(virtual_batch_size), replicas),
        mask=mask,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )


@dataclass(frozen=True)
class VirtualBatches(Formula):
    """Consecutive examples share their statistics: the ``adjust`` of ghost batch normalization.

    Attributes:
      size: how many examples.
      replicas: whose examples they are.
    """

    size: int
    replicas: Replicas

    def __call__(self, examples: Statistics) -> tuple[Statistics, Statistics]:
        """The statistics of each virtual batch, given to its examples; and their averages."""
        batch, (members, place) = examples.var.shape[0], _members(self.replicas)
        piece = math.gcd(batch, self.size)  # of what lies here of one virtual batch, or of several
        pieces = Statistics(*(_axes.split(v, 0, (batch // piece, piece)) for v in examples))
        parts = merge_along(pieces, (1,))
        used = parts = Statistics(*(v[:, 0] for v in parts))
        if piece == self.size:
            reported = _averages(parts, self.replicas)
        else:
            labels = (place * (batch // piece) + jnp.arange(batch // piece)) // (self.size // piece)
            virtual, used = merge_labelled(parts, labels, batch * max(members) // self.size, self.replicas)
            reported = _averages(virtual, Replicas())
        repeated = (jnp.broadcast_to(u[:, None], p.shape) for u, p in zip(used, pieces, strict=True))
        return Statistics(*(_axes.joined(v, e) for v, e in zip(repeated, examples, strict=True))), reported


def _members(replicas: Replicas) -> tuple[list[int], jax.Array | int]:
    """How many replicas there are in each group, and which of its group this one is."""
    names, groups = replicas
    if not names:
        return [1], 0
    index = lax.axis_index(names)
    if groups is None:
        return [math.prod(lax.axis_size(name) for name in names)], index
    place = {i: n for group in groups for n, i in enumerate(group)}
    return [len(group) for group in groups], jnp.array([place[i] for i in range(len(place))])[index]


def _averages(virtual: Statistics, replicas: Replicas) -> Statistics:
    """Means and variances averaged over the virtual batches that hold anything, which is to merge single values."""
    mean, var, count = virtual.center + virtual.offset, virtual.var, virtual.count
    values = jnp.stack([mean, var.astype(mean.dtype), count.astype(mean.dtype)])
    there = jnp.broadcast_to((count > 0).astype(var.dtype), values.shape)
    parts = Statistics(there, values, jnp.zeros_like(values), jnp.zeros_like(there))
    merged = merge_replicas(merge_along(parts, (1,)), replicas, saved)
    mean, var, count = merged.center + merged.offset
    return Statistics(count.real * merged.count[0], mean, jnp.zeros_like(mean), var.real)
