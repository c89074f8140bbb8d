"""Running averages for other weights, or for other data, outside of the training program."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import Moments, merge_moments
from jaxnorm.surgery._measure import Stats, measure, nothing_more


def recalibrate(
    model: Any,
    variables: Any,
    data: Iterable[Any],
    *,
    layer_by_layer: bool = False,
    mesh: Mesh | None = None,
    **kwargs: Any,
) -> Any:
    """Replace the running averages of all batch norms by the statistics of a data set: exact, merged by counts.

    In one pass, batch norms normalize by their batch as in training, and the moments of what each sees are merged.
    Layer by layer, those before already have their final averages, so that what each measures is what it will see at
    inference; that takes a pass for every norm. The remedy for averages that are stale, poisoned, or of other weights.

    Args:
      model: a Linen or an NNX module, of Flax's norms or ours. Nothing is changed in place.
      variables: of the Linen module; None for an NNX module, whose own are used.
      data: batches of inputs: arrays, or tuples of arrays for a model with several; of any sizes. An iterable that can
        be iterated again, for more than one pass.
      layer_by_layer: normalize what comes before each norm by final averages.
      mesh: to shard batches over, along all of its axes. Arrays that are sharded already need none.
      **kwargs: for each call of the model, as ``train=False``; batch norms do as said above whatever they are told.

    Returns:
      ``variables`` with other ``batch_stats``; for an NNX module, its state with other averages, for ``nnx.update``.

    Raises:
      ValueError: no batches, or no batch norms.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm import surgery
      >>> model, x = nn.BatchNorm(use_running_average=True), jnp.array([[1.0], [3.0], [5.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> variables = surgery.recalibrate(model, variables, [x[:2], x[2:]])
      >>> variables["batch_stats"]["mean"].tolist()
      [3.0]

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    graph, variables = _split(model, variables)
    order, settled = [frozenset[str]()], frozenset[str]()
    if layer_by_layer:
        paths = list(_merged("recalibrate", graph, variables, _first(data), mesh, kwargs, settled))
        order = [frozenset(paths[:i]) for i in range(len(paths))]
    for settled in order:
        merged = _merged("recalibrate", graph, variables, data, mesh, kwargs, settled)
        chosen = dict(list(merged.items())[:1]) if layer_by_layer else merged
        variables = _replaced(graph, variables, {path: Moments(**stats) for path, stats in chosen.items()})
    return variables


def adapt(
    model: Any,
    variables: Any,
    data: Iterable[Any],
    *,
    source_weight: float = 16.0,
    mesh: Mesh | None = None,
    **kwargs: Any,
) -> Any:
    r"""Move the running averages of all batch norms towards the statistics of data from elsewhere, without labels.

    With :math:`n` examples and the weight :math:`N` of the averages from training,

    .. math:: \mu = \frac{N \mu_s + n \mu_t}{N + n} \qquad \sigma^2 = \frac{N \sigma^2_s + n \sigma^2_t}{N + n}

    Args:
      model: as for `recalibrate`.
      variables: as for `recalibrate`.
      data: batches of inputs from where the model is to work.
      source_weight: N, in examples: zero to forget the training data.
      mesh: as for `recalibrate`.
      **kwargs: as for `recalibrate`.

    Returns:
      As `recalibrate`.

    Raises:
      ValueError: no batches, no batch norms, or a negative weight.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm import surgery
      >>> model, x = nn.BatchNorm(use_running_average=True), jnp.array([[1.0], [3.0]])
      >>> variables = surgery.adapt(model, model.init(jax.random.key(0), x), [x], source_weight=2.0)
      >>> variables["batch_stats"]["mean"].tolist()
      [1.0]

    References:
      Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020.
      Li et al., "Revisiting Batch Normalization for Practical Domain Adaptation", 2016, for N of zero.
    """
    if source_weight < 0:
        raise ValueError(f"adapt: source_weight must not be negative; got {source_weight}.")
    graph, variables = _split(model, variables)
    batches = [_arguments(batch) for batch in data]
    examples = sum(len(jax.tree.leaves(batch)[0]) for batch in batches)
    target = _merged("adapt", graph, variables, batches, mesh, kwargs, frozenset())
    weight = examples / (examples + source_weight)
    moved: dict[str, Moments] = {}
    for path, stats in target.items():
        old = _averages(graph, variables, path)
        mean, var = ((1 - weight) * old[name] + weight * stats[name] for name in ("mean", "var"))
        moved[path] = Moments(mean, var, old.get("count", stats["count"]))
    return _replaced(graph, variables, moved)


def _split(model: Any, variables: Any) -> tuple[Any, Any]:
    """What is static of a model, and its variables."""
    if isinstance(model, nn.Module):
        return model, variables
    if not isinstance(model, nnx.Module):
        raise TypeError(f"recalibrate: model must be a Linen or an NNX module; got {type(model).__name__}.")
    if variables is not None:
        raise TypeError("recalibrate: variables must be None for an NNX module, which has its own.")
    return nnx.split(model)


def _arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def _first(data: Iterable[Any]) -> Sequence[Any]:
    return [batch for batch, _ in zip(data, range(1), strict=False)]


def _merged(
    function: str,
    graph: Any,
    variables: Any,
    data: Iterable[Any],
    mesh: Mesh | None,
    kwargs: Any,
    settled: frozenset[str],
) -> Stats:
    """Merged moments of all batches, by path in the order of the network."""
    order: list[str] = []

    @jax.jit
    def step(variables, args):
        stats = measure(graph, variables, args, kwargs, settled, nothing_more)
        order.extend(path for path in stats if path not in order)
        return stats

    @jax.jit
    def merge(a, b):
        return {path: merge_moments(Moments(**a[path]), Moments(**b[path]))._asdict() for path in a}

    total = None
    for batch in data:
        args = _arguments(batch)
        if mesh is not None:
            args = jax.device_put(args, NamedSharding(mesh, P(mesh.axis_names)))
        stats = step(variables, args)
        total = stats if total is None else merge(total, stats)
    if total is None:
        raise ValueError(f"{function}: data must hold at least one batch; got none.")
    if not total:
        raise ValueError(f"{function}: the model must have at least one batch norm; found none.")
    return {path: total[path] for path in order}


def _averages(graph: Any, variables: Any, path: str) -> dict[str, Any]:
    """Mean, var and perhaps count of one norm."""
    names = path.split("/") if path else []
    part: Any
    if isinstance(graph, nn.Module):
        part = variables["batch_stats"]
        for name in names:
            part = part[name]
        return dict(part)
    part = nnx.to_pure_dict(nnx.filter_state(variables, nnx.BatchStat))
    for name in names:
        part = part[int(name) if name.isdigit() and int(name) in part else name]
    return part


def _replaced(graph: Any, variables: Any, moments: dict[str, Moments]) -> Any:
    """``variables`` with other averages, in their dtypes."""
    is_linen = isinstance(graph, nn.Module)
    tree = variables["batch_stats"] if is_linen else variables

    def new(keys, old):
        names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        if not is_linen and isinstance(keys[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
            names = names[:-1]
        batch = moments.get("/".join(names[:-1]))
        if batch is None or names[-1] not in batch._fields:
            return old
        return jnp.asarray(getattr(batch, names[-1]), old.dtype).reshape(np.shape(old))

    replaced = jax.tree_util.tree_map_with_path(new, tree)
    return {**variables, "batch_stats": replaced} if is_linen else replaced
