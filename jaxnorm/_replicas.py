"""Moments over replicas, and groups of them: every collective of the package.

Replicas are merged as everything is, by their counts. A group of replicas is a choice of slots in one sum over all of
them, which works in every mapped context; jax's own ``axis_index_groups`` does not.
"""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm._moments import Statistics, merge, merge_along

GATHER_LIMIT = 32
"""Up to so many replicas exchange their moments in one collective, each in a slot of its own; more of them agree on a
center first, so that what is exchanged does not grow with their number."""


class Replicas(NamedTuple):
    """Who is measured together. Hashable, so that it can be static under ``jit``.

    Attributes:
      axis_name: the mapped axes over which replicas share their statistics.
      axis_index_groups: which replicas do; None for all of them.
    """

    axis_name: tuple[Hashable, ...] = ()
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None


def vary(values: Any, *like: Any) -> Any:
    """Mark ``values``, a tree, as varying over the mapped axes that they or ``like`` vary over, in one step.

    Under ``shard_map`` with ``check_vma``, the transpose of this step is a collective: jax would insert one a value.
    """
    leaves, structure = jax.tree.flatten(values)
    axes = [jax.typeof(v).manual_axis_type.varying for v in leaves]
    wanted = frozenset().union(*axes, *(jax.typeof(v).manual_axis_type.varying for v in jax.tree.leaves(like)))
    for missing in {wanted - own for own in axes} - {frozenset()}:
        chosen = [n for n, own in enumerate(axes) if wanted - own == missing]
        flat = lax.pcast(jnp.concatenate([leaves[n].ravel() for n in chosen]), tuple(missing), to="varying")
        ends = np.cumsum([leaves[n].size for n in chosen])[:-1]
        for n, part in zip(chosen, jnp.split(flat, ends), strict=True):
            leaves[n] = (part if jnp.iscomplexobj(leaves[n]) else part.real).reshape(leaves[n].shape)
    return structure.unflatten(leaves)


def _stack(values: tuple[jax.Array, ...]) -> jax.Array:
    """All ``values`` in one array, so that one collective serves them."""
    return jnp.stack(jnp.broadcast_arrays(*values))


def _unstack(packed: jax.Array, like: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Undo `_stack`; what was real there is real again."""
    return tuple(p if jnp.iscomplexobj(v) else p.real for p, v in zip(packed, like, strict=True))


def _slots(packed: jax.Array, slot: jax.Array, slots: int) -> jax.Array:
    """An array of zeros with ``packed`` in its slot: the sum of such arrays over replicas gathers them."""
    chosen = jnp.expand_dims(jnp.arange(slots) == slot, range(1, 1 + packed.ndim))
    return jnp.where(chosen, packed, 0)


def _group_numbers(groups: tuple[tuple[int, ...], ...]) -> jax.Array:
    """The number of the group that each replica is in."""
    of_replica = {i: number for number, group in enumerate(groups) for i in group}
    return jnp.array([of_replica[i] for i in range(len(of_replica))])


def merge_replicas(local: Statistics, replicas: Replicas, named: Any) -> Statistics:
    """The statistics of all replicas of a group: one collective for few of them, two for many.

    ``named`` marks what collectives give, so that no backward pass repeats them.
    """
    names, groups = replicas
    if not names:
        return local
    size = math.prod(lax.axis_size(name) for name in names)
    index = lax.axis_index(names)
    number = jnp.zeros(size, int) if groups is None else _group_numbers(groups)
    if size <= GATHER_LIMIT:
        gathered = named(lax.psum(_slots(_stack(local), index, size), names))
        members = jnp.expand_dims(number == number[index], range(1, gathered.ndim))
        parts = gathered if groups is None else jnp.where(members, gathered, 0)
        merged = merge_along(Statistics(*_unstack(parts.swapaxes(0, 1), local)), (0,))
        return Statistics(*(m[0] for m in merged))

    def over_replicas(*values):
        packed = vary(_stack(values), index)
        if groups is None:
            return _unstack(named(lax.psum(packed, names)), values)
        return _unstack(named(lax.psum(_slots(packed, number[index], len(groups)), names))[number[index]], values)

    return merge(local, over_replicas)
