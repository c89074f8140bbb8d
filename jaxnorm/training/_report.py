"""What a run leaves to look at: metrics as JSON lines, and plots of them."""

import json
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from jaxnorm import Moments

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class MetricsFile:
    """Metrics as JSON lines; a resumed run forgets what was written after its checkpoint.

    Args:
      path: of the file.
      step: the step the run starts from.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.records = [r for r in read_metrics(path) if r["step"] <= step] if step else []
        path.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def write(self, **record: Any) -> None:
        """Append one record."""
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole records of a file; one that was being written when the process ended is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def drift(batch_stats: Any, moments: Any) -> dict[str, float]:
    """How far a batch is from the running averages, by layer: the mean of |batch mean - running mean| / deviation."""
    layers = jax.tree_util.tree_leaves_with_path(moments, is_leaf=lambda node: isinstance(node, Moments))
    distances = {}
    for path, batch in layers:
        running = batch_stats
        for key in path:
            running = running[key.key]
        deviation = np.sqrt(np.asarray(running["var"]) + 1e-5)
        name = "/".join(key.key for key in path if key.key != "BatchNorm_0")
        distances[name] = float(np.mean(np.abs(np.asarray(batch.mean) - np.asarray(running["mean"])) / deviation))
    return distances


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy, learning rate and drift over the steps, in one picture."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    loss, accuracy, rate, drifts = axes.flat
    train = [r for r in records if r["kind"] == "train"]
    test = [r for r in records if r["kind"] == "epoch"]
    loss.plot([r["step"] for r in train], [r["loss"] for r in train], label="train, each step", alpha=0.6)
    loss.plot([r["step"] for r in test], [r["test_loss"] for r in test], "o-", label="test, running averages")
    loss.set(title="loss", yscale="log")
    loss.legend()
    accuracy.plot([r["step"] for r in test], [r["train_accuracy"] for r in test], "o-", label="train")
    accuracy.plot([r["step"] for r in test], [r["test_accuracy"] for r in test], "o-", label="test")
    accuracy.set(title="accuracy")
    accuracy.legend()
    rate.plot([r["step"] for r in train], [r["learning_rate"] for r in train])
    rate.set(title="learning rate")
    for layer in test[-1]["drift"] if test else {}:
        drifts.plot([r["step"] for r in test], [r["drift"][layer] for r in test], "o-", label=layer)
    drifts.set(title="drift: |batch mean - running mean| / deviation")
    if test and 0 < len(test[-1]["drift"]) <= 8:
        drifts.legend()
    for a in axes.flat:
        a.set_xlabel("step")
        a.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
