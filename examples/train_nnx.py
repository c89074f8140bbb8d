"""Train with batch normalization in Flax NNX, complete: train, evaluate, save, resume. Copy it, change the network.

    python examples/train_nnx.py

The batch is sharded over all devices (eight simulated ones where there is only a CPU), the arithmetic is bfloat16, and
each step adds up the gradients of four microbatches. The running averages see those as the one batch that they are.
Run it again, and it goes on from its last checkpoint.
"""

import argparse
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxnorm import nnx as norm
from jaxnorm import training


class CNN(nnx.Module):
    """Convolutions, each with batch normalization and ReLU.

    Args:
      widths: channels of the input and of each convolution.
      num_classes: how many logits.
      momentum: weight of the old running averages.
      dtype: of the arithmetic; parameters, statistics and averages stay float32.
      rngs: keys for the parameters.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (1, 32, 64, 64),
        num_classes: int = 10,
        momentum: float = 0.9,
        dtype: Any = jnp.bfloat16,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.convs, self.norms = nnx.List(), nnx.List()
        for i, (before, width) in enumerate(itertools.pairwise(widths)):
            strides, settings = 2 if i else 1, {"dtype": dtype, "rngs": rngs}
            self.convs.append(nnx.Conv(before, width, (3, 3), strides=strides, use_bias=False, **settings))
            self.norms.append(norm.BatchNorm(width, momentum=momentum, activation="relu", **settings))
        self.dense = nnx.Linear(widths[-1], num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Logits; ``mask``, of shape ``(batch,)``, says which examples are no padding."""
        mask = None if mask is None else mask[:, None, None, None]
        for conv, normalize in zip(self.convs, self.norms, strict=True):
            x = normalize(conv(x), mask=mask)
        return self.dense(x.mean((1, 2))).astype(jnp.float32)


def train(
    folder: str,
    *,
    epochs: int = 12,
    batch_size: int = 128,
    microbatches: int = 4,
    learning_rate: float = 0.3,
    model: nnx.Module | None = None,
    devices: list[jax.Device] | None = None,
) -> tuple[training.TrainState, list[dict[str, float]]]:
    """Train on what is left of the epochs; return the state, which the model then has too, and results."""
    devices = devices or jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
    train_data, test_data = training.load_digits()
    steps = -(-len(train_data.labels) // batch_size)
    schedule = optax.cosine_onecycle_schedule(epochs * steps, learning_rate)
    optimizer = training.make_optimizer("sgd", schedule, weight_decay=1e-4)

    model = model or CNN(rngs=nnx.Rngs(0))
    state = training.init_state(model, optimizer, mesh=mesh)
    train_step = training.make_train_step(model, optimizer, mesh, accumulate=microbatches)
    eval_step = training.make_eval_step(model, mesh)

    def batches(data, seed=None):
        return (training.shard_batch(batch, mesh) for batch in training.batches(data, batch_size, seed=seed))

    history = []
    with training.Checkpoints(folder) as checkpoints:
        if checkpoints.last_step is not None:
            state, record = checkpoints.restore(state)
            history = record["history"]
        for epoch in range(len(history), epochs):
            sums = []
            for batch in batches(train_data, seed=epoch):
                state, metrics = train_step(state, batch)
                sums.append(metrics)
            result = training.evaluate(eval_step, state, batches(test_data))
            history.append(result | {"train_loss": training.mean_metrics(sums)["loss"]})
            print(f"epoch {epoch + 1}: " + ", ".join(f"{k} {v:.4f}" for k, v in history[-1].items()))
            checkpoints.save(state, {"history": history}, result["accuracy"])
    nnx.update(model, state.params)
    nnx.update(model, state.batch_stats)
    return state, history


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/train_nnx", help="of the checkpoints")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    train(arguments.folder, epochs=arguments.epochs)


if __name__ == "__main__":
    main()
