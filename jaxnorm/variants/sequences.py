"""Sequences of varying length: masks from lengths, and statistics for each time step."""

from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxnorm import _axes
from jaxnorm.functional import Array
from jaxnorm.running import RunningStats
from jaxnorm.variants._examples import of_label


def length_mask(lengths: Array, length: int) -> jax.Array:
    """Which time steps belong to sequences of these lengths.

    A step that is padding is not measured: statistics over sequences of varying length are those of their values.

    Args:
      lengths: integers of any shape, one a sequence.
      length: how many steps the arrays have.

    Returns:
      Booleans of shape ``(*lengths.shape, length)``. With features last, the ``mask`` is ``[..., None]`` of it.

    Raises:
      TypeError: ``lengths`` are no integers, or ``length`` is none.
      ValueError: ``length`` is negative.

    Example:
      Shared by all steps, or for each of them, features being time and channel:

      >>> import jax.numpy as jnp, jaxnorm
      >>> x = jnp.array([[[1.0], [2.0]], [[3.0], [0.0]]])
      >>> mask = jaxnorm.length_mask(jnp.array([2, 1]), 2)[..., None]
      >>> y, shared = jaxnorm.batch_norm(x, mask=mask)
      >>> y, steps = jaxnorm.batch_norm(x, axis=(1, 2), mask=mask)
      >>> shared.mean.tolist(), steps.mean.tolist()
      ([2.0], [[2.0], [2.0]])

    References:
      Laurent, Pereyra, Brakel, Zhang and Bengio, "Batch Normalized Recurrent Neural Networks", 2016, for shared
      statistics; Cooijmans et al., "Recurrent Batch Normalization", ICLR 2017, for those of each step.
    """
    lengths = _axes.as_array("length_mask", "lengths", lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        _axes.fail("length_mask", "lengths must be integers", {"dtype": str(lengths.dtype)}, TypeError)
    if isinstance(length, bool) or not (isinstance(length, int | np.integer) or jax.export.is_symbolic_dim(length)):
        _axes.fail("length_mask", "length must be an integer", {"length": length}, TypeError)
    if isinstance(length, int | np.integer) and length < 0:
        _axes.fail("length_mask", "length must not be negative", {"length": length})
    return _longer(length, lengths)


@partial(jax.jit, static_argnums=0)
def _longer(length: Any, lengths: jax.Array) -> jax.Array:
    return jnp.expand_dims(lengths, -1) > jnp.expand_dims(jnp.arange(length), range(lengths.ndim))


def running_at(running: RunningStats, steps: Array) -> RunningStats:
    """The running averages of time steps, those of the last step that was seen for the steps beyond it.

    Args:
      running: `RunningStats` of shape ``(time, *features)``, as `update_running` makes of the statistics of each step.
      steps: integers of any shape, zero or more: one step, or ``jnp.arange(length)`` for all of a sequence.

    Returns:
      `RunningStats` of shape ``(*steps.shape, *features)``.

    Raises:
      TypeError: ``steps`` are no integers.
      ValueError: ``running`` has no axis of time.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> seen = jaxnorm.Moments(jnp.array([[1.0], [2.0], [0.0]]), jnp.ones((3, 1)), jnp.array([[8.0], [4.0], [0.0]]))
      >>> running = jaxnorm.update_running(jaxnorm.init_running((3, 1)), seen, alpha=1.0)
      >>> jaxnorm.running_at(running, jnp.arange(5)).mean.ravel().tolist()
      [1.0, 2.0, 2.0, 2.0, 2.0]

    References:
      Cooijmans, Ballas, Laurent, Gulcehre and Courville, "Recurrent Batch Normalization", ICLR 2017, section 3.
    """
    steps = _axes.as_array("running_at", "steps", steps)
    if not jnp.issubdtype(steps.dtype, jnp.integer):
        _axes.fail("running_at", "steps must be integers", {"dtype": str(steps.dtype)}, TypeError)
    shape = jnp.shape(running.count)
    if not shape or not shape[0]:
        _axes.fail("running_at", "running must have time as its first axis", {"shape": shape})
    return _at(running, steps)


@jax.jit
def _at(running: RunningStats, steps: jax.Array) -> RunningStats:
    seen = jnp.any(running.count.reshape(len(running.count), -1) > 0, axis=1)
    last = jnp.max(jnp.where(seen, jnp.arange(len(seen)), 0))
    at = jnp.minimum(steps, last)
    return RunningStats(*(of_label(v, at.ravel()).reshape(*at.shape, *v.shape[1:]) for v in running))


def extend_steps(batch_stats: Any, length: int) -> Any:
    """The averages of every step for ``length`` of them, those of the last step seen for the steps beyond it.

    Args:
      batch_stats: the collection of a cell under ``nn.scan``: of each norm ``mean``, ``var`` and ``count`` in the shape
        ``(time, *features)``, or dictionaries of them by name.
      length: the new number of steps.

    Returns:
      The collection, in which they have the shape ``(length, *features)``.

    Raises:
      KeyError: a norm without ``var`` or ``count``.
      ValueError: averages that have no axis of time.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm.linen import extend_steps
      >>> seen = {"mean": jnp.array([1.0, 2.0]), "var": jnp.ones(2), "count": jnp.array([8.0, 8.0])}
      >>> extend_steps({"norm_h": seen}, 4)["norm_h"]["mean"].tolist()
      [1.0, 2.0, 2.0, 2.0]

    References:
      Cooijmans, Ballas, Laurent, Gulcehre and Courville, "Recurrent Batch Normalization", ICLR 2017, section 3.
    """
    if "mean" in batch_stats:
        running = RunningStats(batch_stats["mean"], batch_stats["var"], batch_stats["count"])
        return dict(running_at(running, jnp.arange(length))._asdict())
    return {name: extend_steps(value, length) for name, value in batch_stats.items()}
