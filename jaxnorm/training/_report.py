"""What a run leaves to look at: the network, metrics as JSON lines, and plots of them."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure
from rich.table import Table

from jaxnorm.training._failure import Failure
from jaxnorm.training._functions import is_moments


def network_table(model: nn.Module, image_shape: tuple[int, ...]) -> Table:
    """The layers of a network that hold parameters, in the order of their calls: kinds, outputs and parameters."""
    table, sizes = Table("layer", "kind", "output", "parameters"), []

    def note(call, arguments, settings, context):
        output, layer = call(*arguments, **settings), context.module
        if context.method_name != "__call__":
            return output
        held = layer.variables.get("params", {}).values()
        if own := sum(parameter.size for parameter in held if not isinstance(parameter, dict)):
            shape = " x ".join(map(str, output.shape[1:]))
            table.add_row("/".join(layer.path), type(layer).__name__, shape, f"{own:,}")
            sizes.append(own)
        return output

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))
    table.add_section()
    table.add_row("all", "", "", f"{sum(sizes):,}")
    return table


class MetricsFile:
    """Metrics as JSON lines, only ever added to.

    A resumed run adds ``{"kind": "resume", "step": n, "epoch": k}``, by which readers know that of what is above only
    the first n steps and k epochs count. A file with other lines in it is renamed, and its records are written again.

    Args:
      path: of the file.
      resumed: the step and epochs of the checkpoint from which the run goes on; None for a new run.

    Raises:
      Failure: the file cannot be written.
    """

    def __init__(self, path: Path, resumed: tuple[int, int] | None) -> None:
        self.path = path
        self.records, whole = read_metrics(path)
        if not whole:
            aside = path.with_suffix(f".{len(list(path.parent.glob('metrics.*')))}.jsonl")
            with _writing(path):
                path.rename(aside)
            logging.getLogger(__name__).warning("%s has lines that are no records: renamed %s", path, aside.name)
            self._append(self.records)
        if resumed is not None:
            self.write(kind="resume", step=resumed[0], epoch=resumed[1])

    def write(self, **record: Any) -> None:
        """Append one record, numbers that are not finite as null."""
        record = json.loads(json.dumps(record), parse_constant=lambda name: None)
        _add(self.records, record)
        self._append([record])

    def _append(self, records: list[dict[str, Any]]) -> None:
        with _writing(self.path), self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; make room, or the folder writable, and resume") from error


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The records of a file that count, and whether it has nothing else in it, such as half a line."""
    records, whole = [], True
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if line.endswith("\n") and isinstance(record, dict) and {"kind", "step"} <= record.keys():
            _add(records, record)
        else:
            whole = False
    return records, whole


def _add(records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Add one record, after which those that a resumed run makes again no longer count."""
    if record["kind"] != "resume":
        records.append(record)
        return
    step, epoch = record["step"], record["epoch"]
    records[:] = [r for r in records if r["step"] <= step and r.get("epoch", 0) <= epoch and r["kind"] != "result"]


def drift(batch_stats: Any, moments: Any) -> dict[str, float]:
    """How far images are from the running averages, by layer: the mean of |their mean - running mean| / deviation."""
    distances = {}
    for path, measured in jax.tree_util.tree_leaves_with_path(moments, is_leaf=is_moments):
        running = batch_stats
        for key in path:
            running = running[key.key]
        deviation = np.sqrt(np.asarray(running["var"]) + 1e-5)
        name = "/".join(key.key for key in path if key.key != "BatchNorm_0")
        distances[name] = float(np.mean(np.abs(np.asarray(measured.mean) - np.asarray(running["mean"])) / deviation))
    return distances


def epoch_means(records: list[dict[str, Any]], first: int, last: int) -> dict[str, float]:
    """Mean loss and accuracy over the examples of the steps after ``first`` up to ``last``."""
    steps = [r for r in records if r["kind"] == "train" and first < r["step"] <= last]
    total = sum(r["examples"] for r in steps)
    means = {}
    for name in ("loss", "accuracy"):
        means[name] = sum(r[name] * r["examples"] for r in steps) / total if total else math.nan
    return means


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy, learning rate and drift over the steps, in one picture.

    Test images are normalized in two ways: by the running averages, as in use, and by their own batch's statistics, as
    in training. Where the curves part, the averages are stale, or batches too small.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")  # not pyplot's, whose backend is the caller's to choose
    axes = figure.subplots(2, 2)
    loss, accuracy, rate, drifts = axes.flat
    train = [r for r in records if r["kind"] == "train"]
    test = [r for r in records if r["kind"] == "epoch"]
    labels = {"test_{}": "test, running averages", "test_{}_by_batch": "test, batch statistics"}
    for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
        axis.plot([r["step"] for r in train], [r[name] for r in train], label="train, each step", alpha=0.5)
        for key, label in labels.items():
            known = [(r["step"], r[key.format(name)]) for r in test if r.get(key.format(name)) is not None]
            axis.plot(*zip(*known, strict=True), "o-", label=label) if known else None
        axis.set(title=name)
        axis.legend()
    loss.set(yscale="log")
    rate.plot([r["step"] for r in train], [r["learning_rate"] for r in train])
    rate.set(title="learning rate")
    for layer in test[-1]["drift"] if test else {}:
        drifts.plot([r["step"] for r in test], [r["drift"][layer] for r in test], "o-", label=layer)
    drifts.set(title="drift: |mean of the test images - running mean| / deviation")
    if test and 0 < len(test[-1]["drift"]) <= 8:
        drifts.legend()
    for a in axes.flat:
        a.set_xlabel("step")
        a.grid(alpha=0.3)
    with _writing(path):
        figure.savefig(path, dpi=110)
