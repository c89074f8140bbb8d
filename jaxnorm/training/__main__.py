"""Command line: train a small convolutional network with batch normalization on handwritten digits.

The batch is sharded over a mesh of devices; statistics are synchronized across all of them; the accuracy printed is
that of the running averages.
"""

import argparse
import math
import os
import time

import jax
import optax
from jax.sharding import AxisType
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxnorm.training._data import batches, load_digits
from jaxnorm.training._models import CNN
from jaxnorm.training._steps import evaluate, init_state, make_eval_step, make_train_step, mean_metrics


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings, checked against each other."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxnorm.training",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--devices", type=int, default=4, help="how many; simulated where there is only a CPU")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="examples per step, over all devices")
    parser.add_argument("--learning-rate", type=float, default=0.3, help="peak of the cosine schedule, for SGD")
    parser.add_argument("--seed", type=int, default=0, help="of initialization, split and order")
    settings = parser.parse_args(arguments)
    for name in ("devices", "epochs", "batch_size"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive; got {getattr(settings, name)}")
    if settings.batch_size % settings.devices:
        parser.error(f"--batch-size must be a multiple of --devices; got {settings.batch_size} and {settings.devices}")
    return settings


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train by the command line's settings; return loss and accuracy on the test images."""
    settings = parse(arguments)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", settings.devices)
    if jax.device_count() < settings.devices:
        raise SystemExit(
            f"--devices: {settings.devices} wanted, {jax.device_count()} found ({jax.devices()[0].platform})"
        )
    mesh = jax.make_mesh(
        (settings.devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[: settings.devices]
    )
    train, test = load_digits(seed=settings.seed)
    steps = math.ceil(len(train.labels) / settings.batch_size)
    schedule = optax.cosine_onecycle_schedule(settings.epochs * steps, settings.learning_rate)
    optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)
    model = CNN()
    state = init_state(model, optimizer, train.images.shape[1:], seed=settings.seed, mesh=mesh)
    train_step, eval_step = make_train_step(model, optimizer, mesh), make_eval_step(model, mesh)

    console = Console()
    table = Table("epoch", "train loss", "train accuracy", "test loss", "test accuracy")
    result = {}
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=settings.epochs * steps)
        for epoch in range(1, settings.epochs + 1):
            metrics = []
            for batch in batches(train, settings.batch_size, seed=settings.seed + epoch):
                state, step_metrics = train_step(state, batch)
                metrics.append(step_metrics)
                progress.advance(task)
            fit = mean_metrics(metrics)
            result = evaluate(eval_step, state, batches(test, settings.batch_size))
            values = (fit["loss"], fit["accuracy"], result["loss"], result["accuracy"])
            table.add_row(str(epoch), *(f"{v:.4f}" for v in values))
            progress.update(task, description=f"epoch {epoch}: test accuracy {result['accuracy']:.4f}")
    console.print(table)
    platform = jax.devices()[0].platform
    seconds = time.perf_counter() - started
    console.print(
        f"Test accuracy {result['accuracy']:.4f} from the running averages, after {settings.epochs} epochs"
        f" on {settings.devices} {platform} device(s) in {seconds:.1f} s."
    )
    return result


if __name__ == "__main__":
    main()
