"""Train with batch normalization in Flax Linen, complete: train, evaluate, save, resume. Copy it, change the network.

    python examples/train_linen.py

The batch is sharded over all devices (eight simulated ones where there is only a CPU), the arithmetic is bfloat16, and
each step adds up the gradients of four microbatches. The running averages see those as the one batch that they are.
Run it again, and it goes on from its last checkpoint.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxnorm import linen as norm
from jaxnorm import training


class CNN(nn.Module):
    """Convolutions, each with batch normalization and ReLU.

    Attributes:
      widths: channels of each convolution.
      num_classes: how many logits.
      momentum: weight of the old running averages; the training step needs it to be an attribute.
      dtype: of the arithmetic; parameters, statistics and averages stay float32.
    """

    widths: tuple[int, ...] = (32, 64, 64)
    num_classes: int = 10
    momentum: float | None = 0.9
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Logits; ``mask``, of shape ``(batch,)``, says which examples are no padding."""
        mask = None if mask is None else mask[:, None, None, None]
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=2 if i else 1, use_bias=False, dtype=self.dtype)(x)
            x = norm.BatchNorm(not train, momentum=self.momentum, dtype=self.dtype, activation="relu")(x, mask=mask)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


def train(
    folder: str,
    *,
    epochs: int = 12,
    batch_size: int = 128,
    microbatches: int = 4,
    learning_rate: float = 0.3,
    model: nn.Module | None = None,
    devices: list[jax.Device] | None = None,
) -> tuple[training.TrainState, list[dict[str, float]]]:
    """Train on what is left of the epochs; return the state and, for each of them, loss and accuracy on test images."""
    devices = devices or jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
    train_data, test_data = training.load_digits()
    steps = -(-len(train_data.labels) // batch_size)
    schedule = optax.cosine_onecycle_schedule(epochs * steps, learning_rate)
    optimizer = training.make_optimizer("sgd", schedule, weight_decay=1e-4)

    model = model or CNN()
    state = training.init_state(model, optimizer, train_data.images.shape[1:], seed=0, mesh=mesh)
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
    return state, history


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/train_linen", help="of the checkpoints")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    train(arguments.folder, epochs=arguments.epochs)


if __name__ == "__main__":
    main()
