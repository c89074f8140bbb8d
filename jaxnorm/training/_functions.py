"""What training needs of a network, as pure functions: the same of a Linen module and of an NNX module."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxnorm import Moments, RunningStats, merge_moments, update_running
from jaxnorm import nnx as norms
from jaxnorm._axes import AxisNames

Batch = dict[str, Any]
_NOT_OURS = (
    "training: the batch normalizations of the network must be those of jaxnorm, and a network of Linen must hand them"
    " its attribute momentum."
)


class Functions(NamedTuple):
    """A network without its state.

    Attributes:
      init: a key and the shape of an image -> parameters and running averages.
      predict: parameters, running averages, images -> logits, normalized by the running averages.
      train: parameters, running averages, a batch -> logits, normalized by the statistics of the batch, and averages.
      measure: as ``train``, but with those statistics as `Moments` in the places of the averages.
      momentum: the path of a layer's averages -> the weight of the old ones, or None for the cumulative average.
    """

    init: Callable[[jax.Array, tuple[int, ...] | None], tuple[Any, Any]]
    predict: Callable[[Any, Any, jax.Array], jax.Array]
    train: Callable[[Any, Any, Batch], tuple[jax.Array, Any]]
    measure: Callable[[Any, Any, Batch], tuple[jax.Array, Any]]
    momentum: Callable[[Any], float | None]


def functions_of(model: nn.Module | nnx.Module, axis_name: AxisNames | None = None) -> Functions:
    """The functions of a network whose batch normalizations share their statistics over ``axis_name``.

    A layer with ``momentum=None`` whose averages begin at zero ends a forward pass with the moments of the batch: so
    a network can measure them for who has to merge those of several batches before they are averaged.

    Args:
      model: see `make_train_step`.
      axis_name: mapped axis or axes.

    Returns:
      Pure functions, of dictionaries of arrays.
    """
    return _of_nnx(model, axis_name) if isinstance(model, nnx.Module) else _of_linen(model, axis_name)


def _of_linen(model: Any, axis_name: AxisNames | None) -> Functions:
    training = model if axis_name is None else model.clone(axis_name=axis_name)
    measuring = training.clone(momentum=None) if hasattr(model, "momentum") else training

    def init(key, shape):
        variables = model.init(key, jnp.zeros((1, *shape)), train=False)
        return variables["params"], variables.get("batch_stats", {})

    def predict(params, batch_stats, images):
        return model.apply({"params": params, "batch_stats": batch_stats}, images, train=False)

    def apply(network, params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        images, mask = batch["image"], batch["mask"]
        logits, updates = network.apply(variables, images, train=True, mask=mask, mutable=["batch_stats"])
        return logits, updates.get("batch_stats", {})

    def measure(params, batch_stats, batch):
        logits, measured = apply(measuring, params, jax.tree.map(jnp.zeros_like, batch_stats), batch)
        return logits, _as_moments(measured)

    return Functions(init, predict, partial(apply, training), measure, lambda path: getattr(model, "momentum", None))


def _of_nnx(model: nnx.Module, axis_name: AxisNames | None) -> Functions:
    params, averages, rest = map(nnx.to_pure_dict, nnx.state(model, nnx.Param, nnx.BatchStat, ...))
    predicting, training, measuring, momenta = nnx.clone(model), nnx.clone(model), nnx.clone(model), {}
    predicting.eval()
    training.train()
    measuring.train()
    for network in (training, measuring):
        for path, layer in nnx.iter_modules(network):
            if isinstance(layer, norms.BatchNorm):
                layer.axis_name = axis_name or layer.axis_name
                momenta.setdefault(path, layer.momentum)
                if network is measuring:
                    layer.momentum, layer.count = None, nnx.BatchStat(jnp.zeros_like(layer.mean[...]))
    predicting, training, measuring = map(nnx.graphdef, (predicting, training, measuring))

    def init(key, shape):
        return jax.tree.map(jnp.copy, (params, averages))

    def predict(params, batch_stats, images):
        network: Any = nnx.merge(predicting, params, batch_stats, rest)
        return network(images, mask=None)

    def apply(graph, params, batch_stats, batch):
        network: Any = nnx.merge(graph, params, batch_stats, rest)
        logits = network(batch["image"], mask=batch["mask"])
        return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    def measure(params, batch_stats, batch):
        start = jax.tree.map(_counting_from_zero, batch_stats, is_leaf=is_averages)
        if len(momenta) != len(jax.tree.leaves(start, is_leaf=is_averages)):
            raise ValueError(_NOT_OURS)
        logits, measured = apply(measuring, params, start, batch)
        return logits, _as_moments(measured)

    def momentum(path):
        return momenta[tuple(key.key for key in path)]

    return Functions(init, predict, partial(apply, training), measure, momentum)


def is_averages(node: Any) -> bool:
    """Whether these are the running averages of a layer: a dictionary of mean, variance and perhaps count."""
    return isinstance(node, dict) and "var" in node and not isinstance(node["var"], dict)


def is_moments(node: Any) -> bool:
    """Whether this is what a layer measured."""
    return isinstance(node, Moments)


def _counting_from_zero(averages: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return dict.fromkeys(("mean", "var", "count"), jnp.zeros_like(averages["var"]))


def _as_moments(batch_stats: Any) -> Any:
    def moments(measured):
        if "count" not in measured:
            raise ValueError(_NOT_OURS)
        return Moments(measured["mean"], measured["var"], measured["count"])

    return jax.tree.map(moments, batch_stats, is_leaf=is_averages)


def merged(a: Any, b: Any) -> Any:
    """The moments of two batches together, layer by layer."""
    return jax.tree.map(merge_moments, a, b, is_leaf=is_moments)


def averaged(batch_stats: Any, moments: Any, momentum: Callable[[Any], float | None]) -> Any:
    """The running averages after a batch with these moments."""

    def update(path, old, batch):
        running = RunningStats(old["mean"], old["var"], old.get("count", jnp.zeros_like(old["var"])))
        weight = momentum(path)
        new = update_running(running, batch, alpha=None if weight is None else 1 - weight)
        return {name: getattr(new, name) for name in old}

    return jax.tree.map_with_path(update, batch_stats, moments, is_leaf=is_averages)


def replaced(batch_stats: Any, moments: Any) -> Any:
    """These moments as running averages, whatever those were."""
    return jax.tree.map(
        lambda old, m: {name: getattr(m, name).astype(old[name].dtype) for name in old},
        batch_stats,
        moments,
        is_leaf=is_averages,
    )
