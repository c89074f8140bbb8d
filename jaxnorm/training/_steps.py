"""State and steps: pure functions, compiled for a mesh over which the batch is sharded.

There are two roads, and they give the same numbers. On the main one, ``jit``, the batch is sharded and every mean is a
mean over the whole batch: of the loss, so that gradients need no ``pmean``, and in batch normalization, so that its
statistics are those of all devices. On the explicit one, ``shard_map``, each device sees its own examples; batch
statistics are shared by ``axis_name`` and gradients by ``pmean``.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import Moments, RunningStats, merge_moments, update_running

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]
ROADS = ("jit", "shard_map")


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      step: how many updates were made.
      params: learned by gradient descent.
      batch_stats: running averages, written by the batch normalization layers.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def make_optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, decay_all: bool = False
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum, or Adam, with decoupled weight decay.

    Args:
      name: "sgd" or "adam".
      learning_rate: a number or a schedule.
      weight_decay: multiplied by the learning rate, taken off the parameters at each step.
      decay_all: decay scale and bias too, which decay leaves alone otherwise: all parameters that are vectors.

    Returns:
      An optax optimizer.

    Raises:
      ValueError: an unknown name.
    """
    scalings = {"sgd": optax.trace(0.9, nesterov=True), "adam": optax.scale_by_adam()}
    if name not in scalings:
        raise ValueError(f"make_optimizer: name must be one of {', '.join(scalings)}; got {name!r}.")

    def decayed(params):
        return jax.tree.map(lambda p: decay_all or p.ndim > 1, params)

    return optax.chain(
        scalings[name], optax.add_decayed_weights(weight_decay, decayed), optax.scale_by_learning_rate(learning_rate)
    )


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...], *, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, on every device of ``mesh``."""

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def init(key):
        variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
        )

    return init(jax.random.key(seed))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The parts of a batch that the processes hold, as one array sharded over ``mesh``."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def _metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """Sums over the examples, from which any number of batches give their mean loss and accuracy."""
    chex.assert_equal_shape_prefix([logits, batch["label"], batch["mask"]], 1)
    weight = batch["mask"].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = jnp.argmax(logits, -1) == batch["label"]
    return {"loss": jnp.sum(weight * losses), "correct": jnp.sum(weight * correct), "count": jnp.sum(weight)}


def _is_moments(node: Any) -> bool:
    return isinstance(node, Moments)


def _forward(model: nn.Module, params: Any, batch_stats: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """Logits by batch statistics, and the `Moments` of each batch normalization in the places of its averages."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updates = model.apply(
        variables, batch["image"], train=True, mask=batch["mask"], mutable=["batch_stats", "intermediates"]
    )

    def moments(stats, sown):
        if "mean" in stats:
            return Moments(sown["batch_mean"], sown["batch_var"], sown["batch_count"])
        return {name: moments(inner, sown[name]) for name, inner in stats.items()}

    return logits, moments(batch_stats, updates.get("intermediates", {}))


def _averaged(batch_stats: Any, moments: Any, momentum: float) -> Any:
    """Running averages after the batches of which ``moments`` are the merged moments."""

    def update(stats, batch):
        if isinstance(batch, Moments):
            old = RunningStats(stats["mean"], stats["var"], jnp.zeros_like(batch.count))
            new = update_running(old, batch, alpha=1 - momentum)
            return {"mean": new.mean, "var": new.var}
        return {name: update(inner, batch[name]) for name, inner in stats.items()}

    return update(batch_stats, moments)


def _gradients(model: nn.Module, state: TrainState, batch: Batch, total: jax.Array) -> tuple[Any, Metrics, Any]:
    """Gradients of the summed loss divided by ``total``, the metrics, and the moments."""

    def loss_of(params):
        logits, moments = _forward(model, params, state.batch_stats, batch)
        metrics = _metrics(logits, batch)
        return metrics["loss"] / total, (metrics, moments)

    grads, (metrics, moments) = jax.grad(loss_of, has_aux=True)(state.params)
    return grads, metrics, moments


def _accumulated(
    model: nn.Module, state: TrainState, batch: Batch, total: jax.Array, parts: int
) -> tuple[Any, Metrics, Any]:
    """`_gradients` over ``parts`` microbatches, one after the other: sums are added, moments merged by count."""
    if parts == 1:
        return _gradients(model, state, batch, total)
    # every part takes one example in so many, so that each device works on each part
    micro = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
    first = _gradients(model, state, jax.tree.map(lambda a: a[0], micro), total)

    def add(done, part):
        grads, metrics, moments = _gradients(model, state, part, total)
        merged = jax.tree.map(merge_moments, done[2], moments, is_leaf=_is_moments)
        return (*jax.tree.map(jnp.add, done[:2], (grads, metrics)), merged), None

    return lax.scan(add, first, jax.tree.map(lambda a: a[1:], micro))[0]


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    road: str = "jit",
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled step ``state, batch -> state, metrics``. The state given is consumed.

    Args:
      model: one of the networks of this package.
      optimizer: from optax.
      mesh: over all of whose axes the batch is sharded.
      road: "jit" or "shard_map", which give the same numbers.
      accumulate: microbatches of which the gradients are added up before each update. The running averages see their
        moments merged, each by its count.

    Returns:
      The step. The metrics are sums over the examples that the mask keeps.

    Raises:
      ValueError: an unknown road, or when called: a batch that does not split into so many parts.
    """
    if road not in ROADS:
        raise ValueError(f"make_train_step: road must be one of {', '.join(ROADS)}; got {road!r}.")
    names = mesh.axis_names
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(names))

    def apply(state, grads, moments):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        batch_stats = _averaged(state.batch_stats, moments, model.momentum)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)

    def with_jit(state, batch):
        grads, metrics, moments = _accumulated(model, state, batch, jnp.sum(batch["mask"]), accumulate)
        return apply(state, grads, moments), metrics

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(names)), out_specs=(P(), P()))
    def with_shard_map(state, batch):
        mine = state._replace(params=lax.pcast(state.params, names, to="varying"))
        mean_count = lax.pmean(jnp.sum(batch["mask"], dtype=jnp.float32), names)
        grads, metrics, moments = _accumulated(model.clone(axis_name=names), mine, batch, mean_count, accumulate)
        return apply(state, lax.pmean(grads, names), moments), lax.psum(metrics, names)

    compiled = jax.jit(
        with_jit if road == "jit" else with_shard_map,
        donate_argnums=0,
        in_shardings=(replicated, sharded),
        out_shardings=(replicated, replicated),
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        size, parts = len(batch["label"]), mesh.size * accumulate
        if size % parts:
            raise ValueError(
                f"train step: the batch size must be a multiple of devices times microbatches, {mesh.size} x"
                f" {accumulate}; got {size}."
            )
        return compiled(state, batch)

    return step


def make_eval_step(model: nn.Module, mesh: Mesh) -> Callable[[TrainState, Batch], Metrics]:
    """A compiled step ``state, batch -> metrics`` that normalizes by the running averages."""
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    @partial(jax.jit, in_shardings=(replicated, sharded), out_shardings=replicated)
    def step(state: TrainState, batch: Batch) -> Metrics:
        variables: Any = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = model.apply(variables, batch["image"], train=False)
        return _metrics(logits, batch)

    return step


def make_moments_step(model: nn.Module, mesh: Mesh) -> Callable[[TrainState, Batch], Any]:
    """A compiled step ``state, batch -> moments``: what each batch normalization measures, in a tree of `Moments`."""
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    @partial(jax.jit, in_shardings=(replicated, sharded), out_shardings=replicated)
    def step(state: TrainState, batch: Batch) -> Any:
        return _forward(model, state.params, state.batch_stats, batch)[1]

    return step


def recalibrate(
    moments_step: Callable[[TrainState, Batch], Any], state: TrainState, data: Iterable[Batch]
) -> TrainState:
    """Replace the running averages by the statistics of a data set, exactly; nothing else changes.

    Each layer's moments of all batches are merged by count, normalized by batch statistics below it as in training.
    The remedy for stale averages, and what averaged weights need, since no averages were kept for them.

    Args:
      moments_step: from `make_moments_step`.
      state: with the parameters to calibrate for.
      data: batches, as for training.

    Returns:
      ``state`` with other ``batch_stats``.

    Raises:
      ValueError: no batches.

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    merge = jax.jit(lambda a, b: jax.tree.map(merge_moments, a, b, is_leaf=_is_moments))
    total = None
    for batch in data:
        moments = moments_step(state, batch)
        total = moments if total is None else merge(total, moments)
    if total is None:
        raise ValueError("recalibrate: data must hold at least one batch; got none.")
    return state._replace(batch_stats=_averaged(state.batch_stats, total, momentum=0.0))


def mean_metrics(metrics: Iterable[Metrics]) -> dict[str, float]:
    """Mean loss and accuracy over all examples of several batches."""
    total = jax.tree.map(lambda *values: float(sum(values)), *metrics)
    return {"loss": total["loss"] / total["count"], "accuracy": total["correct"] / total["count"]}


def evaluate(
    eval_step: Callable[[TrainState, Batch], Metrics], state: TrainState, data: Iterable[Batch]
) -> dict[str, float]:
    """Mean loss and accuracy of ``state`` over the batches of ``data``."""
    return mean_metrics([eval_step(state, batch) for batch in data])
