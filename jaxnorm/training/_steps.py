"""State and steps: pure functions, compiled for a mesh over which the batch is sharded.

Under ``jit`` with a sharded batch every mean is a mean over the whole batch: of the loss, so that gradients need no
``pmean`` by hand, and in batch normalization, so that its statistics are those of all devices together.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]


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


def _metrics(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """The mean loss, and the sums from which any number of batches give their mean loss and accuracy."""
    chex.assert_equal_shape_prefix([logits, batch["label"], batch["mask"]], 1)
    weight = batch["mask"].astype(jnp.float32)
    count = jnp.sum(weight)
    loss = jnp.sum(weight * optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))
    correct = jnp.sum(weight * (jnp.argmax(logits, -1) == batch["label"]))
    return loss / count, {"loss": loss, "correct": correct, "count": count}


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled step ``state, batch -> state, metrics``. The state given is consumed."""
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    @partial(jax.jit, donate_argnums=0, in_shardings=(replicated, sharded), out_shardings=(replicated, replicated))
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                mask=batch["mask"],
                mutable=["batch_stats"],
            )
            loss, metrics = _metrics(logits, batch)
            return loss, (metrics, updates.get("batch_stats", {}))

        grads, (metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state), metrics

    return step


def make_eval_step(model: nn.Module, mesh: Mesh) -> Callable[[TrainState, Batch], Metrics]:
    """A compiled step ``state, batch -> metrics`` that normalizes by the running averages."""
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    @partial(jax.jit, in_shardings=(replicated, sharded), out_shardings=replicated)
    def step(state: TrainState, batch: Batch) -> Metrics:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = model.apply(variables, batch["image"], train=False)
        return _metrics(cast(jax.Array, logits), batch)[1]

    return step


def mean_metrics(metrics: Iterable[Metrics]) -> dict[str, float]:
    """Mean loss and accuracy over all examples of several batches."""
    total = jax.tree.map(lambda *values: float(sum(values)), *metrics)
    return {"loss": total["loss"] / total["count"], "accuracy": total["correct"] / total["count"]}


def evaluate(eval_step: Callable[[TrainState, Batch], Metrics], state: TrainState, data: Iterable[Batch]) -> dict:
    """Mean loss and accuracy of ``state`` over the batches of ``data``."""
    return mean_metrics([eval_step(state, batch) for batch in data])
