"""What the Linen and the NNX layers share: Flax's conventions, in terms of the pure functions."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxnorm import _axes, _rule
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._batch_norm import RunningStats, batch_reduction, update_running
from jaxnorm._moments import Reduction


def sorted_axes(function: str, name: str, axes: Axes, ndim: int) -> tuple[int, ...]:
    """``axes`` as Flax takes them: in ascending order, whatever the order given."""
    return tuple(sorted(_axes.canonical_axes(function, name, axes, ndim)))


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: RunningStats,
    *,
    features: tuple[int, ...],
    use_running_average: bool,
    momentum: float | None,
    epsilon: float,
    axis_name: AxisNames | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    mask: Any,
    dtype: Any,
    initializing: bool,
) -> tuple[jax.Array, RunningStats]:
    """The output of a batch normalization layer and its new running averages.

    While initializing, the batch may be of any size, no replicas need exist and nothing is averaged.
    """
    function = "BatchNorm"
    x = _axes.as_input(function, "x", x)
    if use_running_average:
        y = _rule.normalize_by_given(
            function, x, running.mean, running.var, scale, bias, features=features, epsilon=epsilon, dtype=dtype
        )
        return y, running
    if initializing:
        reduction = Reduction(tuple(a for a in range(x.ndim) if a not in features))
    else:
        reduction = batch_reduction(function, x, features, axis_name, axis_index_groups)
    y, batch = _rule.normalize_by_own(
        function, x, scale, bias, features=features, reduction=reduction, epsilon=epsilon, mask=mask, dtype=dtype
    )
    if initializing:
        return y, running
    batch = jax.tree.map(lambda m: _axes.extract(m, features), batch)
    alpha = None if momentum is None else 1 - momentum
    return y, update_running(running, batch, alpha=alpha)
