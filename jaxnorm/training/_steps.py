"""State and steps: pure functions, compiled for a mesh over which the batch is sharded.

There are two kinds of parallelism, which give the same numbers. With ``jit``, the batch is sharded and every mean is a
mean over the whole batch: of the loss, so that gradients need no ``pmean``, and in batch normalization, so that its
statistics are those of all devices. With ``shard_map``, each device sees its own examples; batch statistics are shared
by ``axis_name`` and gradients by ``pmean``.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm.training._functions import Batch, Functions, averaged, functions_of, is_moments, merged, replaced

Metrics = dict[str, jax.Array]
PARALLELISM = ("jit", "shard_map")
OPTIMIZERS = ("sgd", "adam")


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      step: how many updates were made.
      params: learned by gradient descent.
      batch_stats: running averages of the batch normalization layers.
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
    if name not in OPTIMIZERS:
        raise ValueError(f"make_optimizer: name must be one of {', '.join(OPTIMIZERS)}; got {name!r}.")

    def decayed(params):
        return jax.tree.map(lambda p: decay_all or p.ndim > 1, params)

    return optax.chain(
        optax.trace(0.9, nesterov=True) if name == "sgd" else optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def init_state(
    model: nn.Module | nnx.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...] | None = None,
    *,
    seed: int = 0,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, on every device of ``mesh``.

    Args:
      model: see `make_train_step`. A module of NNX brings its parameters; those of a Linen module are made here,
      optimizer: from optax.
      image_shape: for images of this shape,
      seed: from this seed.
      mesh: of devices.

    Returns:
      The state, which shares no array with ``model``.
    """
    functions = functions_of(model)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def init(key):
        params, batch_stats = functions.init(key, image_shape)
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))

    return init(jax.random.key(seed))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The parts of a batch that the processes hold, as one array sharded over ``mesh``."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


@jax.jit
def all_finite(state: Any) -> jax.Array:
    """Whether every number of ``state`` is finite."""
    numbers = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in numbers]))


def _metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """Sums over the examples, from which any number of batches give their mean loss and accuracy."""
    chex.assert_rank(logits, 2)
    chex.assert_equal_shape_prefix([logits, batch["label"], batch["mask"]], 1)
    weight = batch["mask"].astype(jnp.float32)
    # not ..._with_integer_labels, whose gradient scatters, which a mesh with explicit axes refuses
    losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))
    correct = jnp.argmax(logits, -1) == batch["label"]
    return {"loss": jnp.sum(weight * losses), "correct": jnp.sum(weight * correct), "count": jnp.sum(weight)}


def _gradients(forward: Callable, state: TrainState, batch: Batch, total: jax.Array) -> tuple[Any, Metrics, Any]:
    """Gradients of the summed loss divided by ``total``, the metrics, and what else ``forward`` returns."""

    def loss_of(params):
        logits, others = forward(params, state.batch_stats, batch)
        metrics = _metrics(logits, batch)
        return metrics["loss"] / total, (metrics, others)

    grads, (metrics, others) = jax.grad(loss_of, has_aux=True)(state.params)
    return grads, metrics, others


def _accumulated(
    functions: Functions, state: TrainState, batch: Batch, total: jax.Array, parts: int
) -> tuple[Any, Metrics, Any]:
    """`_gradients` over ``parts`` microbatches, one after the other, and averages that have seen all as one batch.

    Gradients and metrics are added, moments merged by count.
    """
    if parts == 1:
        return _gradients(functions.train, state, batch, total)
    # every part takes one example in so many, so that each device works on each part
    micro = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
    first = _gradients(functions.measure, state, jax.tree.map(lambda a: a[0], micro), total)

    def add(done, part):
        grads, metrics, moments = _gradients(functions.measure, state, part, total)
        return (*jax.tree.map(jnp.add, done[:2], (grads, metrics)), merged(done[2], moments)), None

    grads, metrics, moments = lax.scan(add, first, jax.tree.map(lambda a: a[1:], micro))[0]
    return grads, metrics, averaged(state.batch_stats, moments, functions.momentum)


def make_train_step(
    model: nn.Module | nnx.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    parallelism: str = "jit",
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled step ``state, batch -> state, metrics``. The state given is consumed.

    Args:
      model: of Linen, called as ``model(images, train=train, mask=mask)``, or of NNX, called as ``model(images,
        mask=mask)``; the mask, of shape ``(batch,)``, says which examples count. With microbatches, and for what else
        needs moments, the batch normalizations must be those of `jaxnorm`, and a Linen module must hand them its
        attribute ``momentum``; for parallelism "shard_map" also its ``axis_name``.
      optimizer: from optax.
      mesh: over all of whose axes the batch is sharded.
      parallelism: "jit" or "shard_map", which give the same numbers.
      accumulate: microbatches of which the gradients are added up before each update. The running averages see their
        moments merged, each by its count.

    Returns:
      The step. The metrics are sums over the examples that the mask keeps.

    Raises:
      ValueError: an unknown parallelism, or when called: a batch that does not split into so many parts.
    """
    if parallelism not in PARALLELISM:
        known = ", ".join(PARALLELISM)
        raise ValueError(f"make_train_step: parallelism must be one of {known}; got {parallelism!r}.")
    names = mesh.axis_names
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(names))
    functions = functions_of(model, None if parallelism == "jit" else names)

    def apply(state, grads, batch_stats):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)

    def with_jit(state, batch):
        grads, metrics, batch_stats = _accumulated(functions, state, batch, jnp.sum(batch["mask"]), accumulate)
        return apply(state, grads, batch_stats), metrics

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(names)), out_specs=(P(), P()))
    def with_shard_map(state, batch):
        mine = state._replace(params=lax.pcast(state.params, names, to="varying"))
        mean_count = lax.pmean(jnp.sum(batch["mask"], dtype=jnp.float32), names)
        grads, metrics, batch_stats = _accumulated(functions, mine, batch, mean_count, accumulate)
        return apply(state, lax.pmean(grads, names), batch_stats), lax.psum(metrics, names)

    compiled = jax.jit(
        with_jit if parallelism == "jit" else with_shard_map,
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


def make_eval_step(model: nn.Module | nnx.Module, mesh: Mesh) -> Callable[[TrainState, Batch], Metrics]:
    """A compiled step ``state, batch -> metrics`` that normalizes by the running averages."""
    functions = functions_of(model)
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    @partial(jax.jit, in_shardings=(replicated, sharded), out_shardings=replicated)
    def step(state: TrainState, batch: Batch) -> Metrics:
        return _metrics(functions.predict(state.params, state.batch_stats, batch["image"]), batch)

    return step


def make_measure_step(model: nn.Module | nnx.Module, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[Metrics, Any]]:
    """A compiled step ``state, batch -> metrics, moments`` that normalizes by the statistics of the batch.

    The moments are those of each batch normalization, in a tree of `jaxnorm.Moments`. Examples that hold a value that
    is not finite are left out; the metrics count them as ``left_out``, and as ``unmeasured`` batches of which the
    moments of some layer are not finite all the same.
    """
    functions = functions_of(model)
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    @partial(jax.jit, in_shardings=(replicated, sharded), out_shardings=replicated)
    def step(state: TrainState, batch: Batch) -> tuple[Metrics, Any]:
        finite = jnp.all(jnp.isfinite(batch["image"]), range(1, batch["image"].ndim))
        image = jnp.where(jnp.isfinite(batch["image"]), batch["image"], 0)
        kept = batch | {"image": image, "mask": batch["mask"] & finite}
        logits, moments = functions.measure(state.params, state.batch_stats, kept)
        metrics = _metrics(logits, kept)
        counts = [jnp.min(layer.count) for layer in jax.tree.leaves(moments, is_leaf=is_moments)]
        unmeasured = (jnp.min(jnp.array([*counts, jnp.inf])) == 0) & (metrics["count"] > 0)
        left_out = jnp.sum(batch["mask"] & ~finite)
        return metrics | {"left_out": left_out, "unmeasured": unmeasured.astype(jnp.int32)}, moments

    return step


@jax.jit
def _together(some: tuple[Metrics, Any], others: tuple[Metrics, Any]) -> tuple[Metrics, Any]:
    """What two measurements of different batches make together."""
    return jax.tree.map(jnp.add, some[0], others[0]), merged(some[1], others[1])


def measure(
    measure_step: Callable[[TrainState, Batch], tuple[Metrics, Any]], state: TrainState, data: Iterable[Batch]
) -> tuple[Metrics, Any]:
    """The sums and the moments of all batches together.

    Raises:
      ValueError: no batches.
    """
    total = None
    for batch in data:
        measured = measure_step(state, batch)
        total = measured if total is None else _together(total, measured)
    if total is None:
        raise ValueError("measure: data must hold at least one batch; got none.")
    return total


def recalibrate(
    measure_step: Callable[[TrainState, Batch], tuple[Metrics, Any]], state: TrainState, data: Iterable[Batch]
) -> TrainState:
    """Replace the running averages by the statistics of a data set, exactly; nothing else changes.

    Each layer's moments of all batches are merged by count, normalized by batch statistics below it as in training.
    The remedy for stale averages or for averages that are not finite, and what averaged weights need, since no averages
    were kept for them. Examples that hold a value that is not finite are left out, with a warning.

    Args:
      measure_step: from `make_measure_step`.
      state: with the parameters to calibrate for.
      data: batches, as for training.

    Returns:
      ``state`` with other ``batch_stats``.

    Raises:
      ValueError: no batches, no finite example, or parameters by which statistics are not finite.

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    sums, moments = measure(measure_step, state, data)
    left_out, count = int(sums["left_out"]), int(sums["count"])
    if left_out:
        found = f"{left_out} of {left_out + count} examples hold values that are not finite"
        if not count:
            raise ValueError(f"recalibrate: {found}; there is nothing to measure.")
        warnings.warn(f"recalibrate: {found}; they were left out.", stacklevel=2)
    if sums["unmeasured"]:
        rule = "the statistics of every batch of finite examples must be finite: check the parameters"
        raise ValueError(f"recalibrate: {rule}; those of {int(sums['unmeasured'])} batches are not.")
    return state._replace(batch_stats=replaced(state.batch_stats, moments))


def mean_metrics(metrics: Iterable[Metrics]) -> dict[str, float]:
    """Mean loss and accuracy over all examples of several batches."""
    total = jax.tree.map(lambda *values: float(sum(values)), *metrics)
    return {"loss": total["loss"] / total["count"], "accuracy": total["correct"] / total["count"]}


def evaluate(
    eval_step: Callable[[TrainState, Batch], Metrics], state: TrainState, data: Iterable[Batch]
) -> dict[str, float]:
    """Mean loss and accuracy of ``state`` over the batches of ``data``.

    Raises:
      ValueError: no batches.
    """
    sums = [eval_step(state, batch) for batch in data]
    if not sums:
        raise ValueError("evaluate: data must hold at least one batch; got none.")
    return mean_metrics(sums)
