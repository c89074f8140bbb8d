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
    """Everything that training changes. `init_state` makes one.

    Attributes:
      step: how many updates were made.
      params: parameters, which gradient descent learns.
      batch_stats: running averages of the batch normalization layers.
      opt_state: state of the optimizer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm import training
      >>> state = training.TrainState(jnp.array(0), {"w": jnp.ones(2)}, {}, ())
      >>> state._replace(step=state.step + 1).step.item()
      1
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def make_optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, decay_all: bool = False
) -> optax.GradientTransformation:
    """Make SGD with Nesterov momentum, or Adam, with decoupled weight decay.

    Args:
      name: "sgd" or "adam".
      learning_rate: a number or a schedule.
      weight_decay: times the learning rate, subtracted from the parameters at each step. Default: 0.
      decay_all: True decays scale and bias too. By default parameters that are vectors do not decay.

    Returns:
      An optax optimizer.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm import training
      >>> params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
      >>> optimizer = training.make_optimizer("sgd", 0.1, weight_decay=0.5)
      >>> updates, _ = optimizer.update({k: 0 * v for k, v in params.items()}, optimizer.init(params), params)
      >>> updates["kernel"][0].tolist(), updates["scale"].tolist()  # the scale does not decay
      ([-0.05000000074505806, -0.05000000074505806], [-0.0, -0.0])
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
    """Make the state before the first step, on every device of ``mesh``.

    Args:
      model: see `make_train_step`. An NNX module brings its parameters; those of a Linen module are made here.
      optimizer: an optimizer from optax.
      image_shape: shape of one image, for a Linen module.
      seed: seed of the parameters, for a Linen module. Default: 0.
      mesh: mesh of devices.

    Returns:
      A `TrainState`, which shares no array with ``model``.

    Example:
      >>> import jax
      >>> from jaxnorm import training
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model, optimizer = training.MLP(widths=(4,)), training.make_optimizer("sgd", 0.1)
      >>> state = training.init_state(model, optimizer, (2, 2, 1), mesh=mesh)
      >>> int(state.step), sorted(state.params), sorted(state.batch_stats)
      (0, ['Dense_0', 'Dense_1', 'Norm_0'], ['Norm_0'])
    """
    functions = functions_of(model)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def init(key):
        params, batch_stats = functions.init(key, image_shape)
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))

    return init(jax.random.key(seed))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Shard a batch over ``mesh``, from the part that each process holds.

    Args:
      batch: this process's part of the arrays, by name.
      mesh: mesh of devices, over all of whose axes the batch is sharded.

    Returns:
      The arrays of the whole batch.

    Example:
      >>> import jax, numpy as np
      >>> from jaxnorm import training
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> label = training.shard_batch({"label": np.arange(4)}, mesh)["label"]
      >>> label.sharding.spec == jax.sharding.PartitionSpec("data")
      True
    """
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
    """Gradients of the summed loss divided by ``total``, the metrics, and the other output of ``forward``."""

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
    """Compile a training step ``state, batch -> state, metrics``. It consumes the state that is passed in.

    Args:
      model: a Linen module, called as ``model(images, train=train, mask=mask)``, or an NNX module, called as
        ``model(images, mask=mask)``. The mask, of shape ``(batch,)``, is True for examples that count. With
        microbatches, the batch norms must be jaxnorm's, and a Linen module must pass them its attribute ``momentum``;
        for parallelism "shard_map" also its ``axis_name``.
      optimizer: an optimizer from optax.
      mesh: mesh of devices, over all of whose axes the batch is sharded.
      parallelism: "jit" or "shard_map", which give the same numbers. Default: "jit".
      accumulate: how many microbatches to add up before each update. The running averages see their moments merged,
        each by its count. Default: 1.

    Returns:
      The step. The metrics are sums over the examples that the mask keeps.

    Raises:
      ValueError: an unknown parallelism; or, in a step, a batch that does not split into the microbatches.

    Example:
      >>> import jax
      >>> from jaxnorm import training
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model, optimizer = training.MLP(widths=(4,)), training.make_optimizer("sgd", 0.1)
      >>> state = training.init_state(model, optimizer, (2, 2, 1), mesh=mesh)
      >>> (batch,) = training.batches(training.synthetic(8, (2, 2, 1)), 8)
      >>> batch = training.shard_batch(batch, mesh)
      >>> step = training.make_train_step(model, optimizer, mesh)
      >>> state, metrics = step(state, batch)
      >>> int(state.step), float(metrics["count"])
      (1, 8.0)
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
    """Compile a step ``state, batch -> metrics`` that normalizes by the running averages.

    Args:
      model: see `make_train_step`.
      mesh: mesh of devices, over all of whose axes the batch is sharded.

    Returns:
      The step. The metrics are sums over the examples that the mask keeps.

    Example:
      >>> import jax
      >>> from jaxnorm import training
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model, optimizer = training.MLP(widths=(4,)), training.make_optimizer("sgd", 0.1)
      >>> state = training.init_state(model, optimizer, (2, 2, 1), mesh=mesh)
      >>> (batch,) = training.batches(training.synthetic(8, (2, 2, 1)), 8)
      >>> batch = training.shard_batch(batch, mesh)
      >>> sorted(training.make_eval_step(model, mesh)(state, batch))
      ['correct', 'count', 'loss']
    """
    functions = functions_of(model)
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    @partial(jax.jit, in_shardings=(replicated, sharded), out_shardings=replicated)
    def step(state: TrainState, batch: Batch) -> Metrics:
        return _metrics(functions.predict(state.params, state.batch_stats, batch["image"]), batch)

    return step


def make_measure_step(model: nn.Module | nnx.Module, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[Metrics, Any]]:
    """Compile a step ``state, batch -> metrics, moments`` that normalizes by the statistics of the batch.

    Examples with a value that is not finite are left out. The metrics count them as ``left_out``, and they count as
    ``unmeasured`` batches in which the moments of some layer are still not finite.

    Args:
      model: see `make_train_step`.
      mesh: mesh of devices, over all of whose axes the batch is sharded.

    Returns:
      The step. The moments are a tree with the `jaxnorm.Moments` of each batch norm.

    Example:
      >>> import jax
      >>> from jaxnorm import training
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model, optimizer = training.MLP(widths=(4,)), training.make_optimizer("sgd", 0.1)
      >>> state = training.init_state(model, optimizer, (2, 2, 1), mesh=mesh)
      >>> (batch,) = training.batches(training.synthetic(8, (2, 2, 1)), 8)
      >>> batch = training.shard_batch(batch, mesh)
      >>> metrics, moments = training.make_measure_step(model, mesh)(state, batch)
      >>> moments["Norm_0"]["BatchNorm_0"].count.tolist()
      [8.0, 8.0, 8.0, 8.0]
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

    Example:
      The averages become the statistics of the data, here of one batch:

      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm import training
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model, optimizer = training.MLP(widths=(4,)), training.make_optimizer("sgd", 0.1)
      >>> state = training.init_state(model, optimizer, (2, 2, 1), mesh=mesh)
      >>> (batch,) = training.batches(training.synthetic(8, (2, 2, 1)), 8)
      >>> batch = training.shard_batch(batch, mesh)
      >>> measure_step = training.make_measure_step(model, mesh)
      >>> after = training.recalibrate(measure_step, state, [batch]).batch_stats["Norm_0"]["BatchNorm_0"]
      >>> measured = measure_step(state, batch)[1]["Norm_0"]["BatchNorm_0"]
      >>> state.batch_stats["Norm_0"]["BatchNorm_0"]["mean"].tolist()
      [0.0, 0.0, 0.0, 0.0]
      >>> bool(jnp.allclose(after["mean"], measured.mean)), bool(jnp.allclose(after["var"], measured.var))
      (True, True)

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
    """Average loss and accuracy over all examples of several batches.

    Args:
      metrics: what the steps returned: sums over examples, for each batch.

    Returns:
      ``{"loss": ..., "accuracy": ...}``.

    Example:
      >>> from jaxnorm import training
      >>> sums = [{"loss": 3.0, "correct": 1, "count": 2}, {"loss": 1.0, "correct": 2, "count": 2}]
      >>> training.mean_metrics(sums)
      {'loss': 1.0, 'accuracy': 0.75}
    """
    total = jax.tree.map(lambda *values: float(sum(values)), *metrics)
    return {"loss": total["loss"] / total["count"], "accuracy": total["correct"] / total["count"]}


def evaluate(
    eval_step: Callable[[TrainState, Batch], Metrics], state: TrainState, data: Iterable[Batch]
) -> dict[str, float]:
    """Evaluate ``state`` on the batches of ``data``.

    Args:
      eval_step: from `make_eval_step`.
      state: the state to evaluate.
      data: sharded batches.

    Returns:
      Mean loss and accuracy over all examples: ``{"loss": ..., "accuracy": ...}``.

    Raises:
      ValueError: no batches.

    Example:
      >>> import jax
      >>> from jaxnorm import training
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model, optimizer = training.MLP(widths=(4,)), training.make_optimizer("sgd", 0.1)
      >>> state = training.init_state(model, optimizer, (2, 2, 1), mesh=mesh)
      >>> (batch,) = training.batches(training.synthetic(8, (2, 2, 1)), 8)
      >>> batch = training.shard_batch(batch, mesh)
      >>> result = training.evaluate(training.make_eval_step(model, mesh), state, [batch])
      >>> sorted(result), 0 <= result["accuracy"] <= 1
      (['accuracy', 'loss'], True)
    """
    sums = [eval_step(state, batch) for batch in data]
    if not sums:
        raise ValueError("evaluate: data must hold at least one batch; got none.")
    return mean_metrics(sums)
