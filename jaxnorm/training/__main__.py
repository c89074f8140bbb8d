"""Command line: train an image classifier, its batch sharded over a mesh of devices, on one host or several.

Without arguments: a small convolutional network with batch normalization on handwritten digits, on 4 devices (simulated
where there is only a CPU). The accuracy printed is that of the running averages. Metrics, plots and checkpoints go to
the output folder.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import deque
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxnorm.training import _data, _models, _report, _steps
from jaxnorm.training._checkpoint import Checkpoints

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings, checked against each other."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxnorm.training",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", default="cnn", choices=_models.MODELS, help="the network")
    what.add_argument("--norm", default="batch", choices=_models.NORMS, help="its normalization")
    what.add_argument("--place", default="before", choices=_models.PLACES, help="normalize before or after activation")
    what.add_argument("--activation", default="relu", choices=_models.ACTIVATIONS, help="of the network")
    what.add_argument("--invertible", action="store_true", help="store less of normalizations; with leaky_relu")
    what.add_argument("--momentum", type=float, default=0.9, help="weight of the old running averages")
    what.add_argument("--data", default="digits", choices=("digits", "mnist", "cifar10", "synthetic"), help="images")
    what.add_argument("--folder", type=Path, help="where the files of mnist or cifar10 are")
    what.add_argument("--image-size", type=int, default=32, help="pixels a side, of synthetic images")
    how = parser.add_argument_group("how")
    how.add_argument("--epochs", type=int, default=15, help="passes over the training images")
    how.add_argument("--batch-size", type=int, default=128, help="examples per step, over all devices and hosts")
    how.add_argument("--accumulate", type=int, default=1, help="microbatches added up for each step")
    how.add_argument("--optimizer", default="sgd", choices=("sgd", "adam"))
    how.add_argument("--learning-rate", type=float, default=0.3, help="peak of the one-cycle cosine schedule")
    how.add_argument("--weight-decay", type=float, default=0.0, help="of all but scale and bias")
    how.add_argument("--dtype", default="float32", choices=DTYPES, help="of the computation; parameters stay float32")
    how.add_argument("--recalibrate", action="store_true", help="end with the statistics of all training images")
    how.add_argument("--seed", type=int, default=0, help="of initialization, split and order")
    where = parser.add_argument_group("where")
    where.add_argument("--devices", type=int, default=4, help="on this host; simulated where there is only a CPU")
    where.add_argument("--road", default="jit", choices=_steps.ROADS, help="automatic sharding, or by hand with pmean")
    where.add_argument("--coordinator", help="host:port of process 0, for several hosts")
    where.add_argument("--num-processes", type=int, default=1, help="how many hosts")
    where.add_argument("--process-id", type=int, default=0, help="which of them this is")
    out = parser.add_argument_group("what is left")
    out.add_argument("--out", type=Path, help="folder for metrics, plots and checkpoints; runs/<time> if not given")
    out.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    out.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0 for each epoch")
    settings = parser.parse_args(arguments)
    for name in ("devices", "epochs", "batch_size", "accumulate", "num_processes", "image_size"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive; got {getattr(settings, name)}")
    parts = settings.devices * settings.num_processes * settings.accumulate
    if settings.batch_size % parts:
        parser.error(
            "--batch-size must be a multiple of devices times processes times microbatches,"
            f" {settings.devices} x {settings.num_processes} x {settings.accumulate}; got {settings.batch_size}"
        )
    if not 0 <= settings.momentum <= 1:
        parser.error(f"--momentum must lie in [0, 1]; got {settings.momentum}")
    if settings.norm == "instance" and settings.model == "mlp":
        parser.error("--norm instance needs positions to normalize over, which --model mlp does not have")
    if settings.invertible and (settings.norm == "none" or settings.activation != "leaky_relu"):
        parser.error("--invertible needs a --norm and --activation leaky_relu")
    if settings.data in ("mnist", "cifar10") and settings.folder is None:
        parser.error(f"--data {settings.data} needs --folder, where its files are")
    if settings.num_processes > 1 and settings.coordinator is None:
        parser.error("--num-processes above 1 needs --coordinator host:port, the same on all hosts")
    if settings.resume and settings.out is None:
        parser.error("--resume needs --out, the folder of the run to resume")
    return settings


def connect(settings: argparse.Namespace) -> jax.sharding.Mesh:
    """Join the other hosts, if any, and make a mesh of all devices."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", settings.devices)
    if settings.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            settings.coordinator,
            settings.num_processes,
            settings.process_id,
            initialization_timeout=60,
            heartbeat_timeout_seconds=20,
        )
    wanted, found = settings.devices, jax.local_device_count()
    if found < wanted:
        raise SystemExit(
            f"--devices: {wanted} wanted, {found} found ({jax.devices()[0].platform}); give --devices {found} or fewer"
        )
    hosts = [[d for d in jax.devices() if d.process_index == p][:wanted] for p in range(jax.process_count())]
    devices = [device for host in hosts for device in host]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def load(settings: argparse.Namespace) -> tuple[_data.Split, _data.Split]:
    """Training and test images."""
    if settings.data == "digits":
        return _data.load_digits(seed=settings.seed)
    if settings.data == "synthetic":
        shape = (settings.image_size, settings.image_size, 3)
        whole = _data.synthetic(5120, shape, seed=settings.seed)
        return _data.Split(whole.images[1024:], whole.labels[1024:]), _data.Split(
            whole.images[:1024], whole.labels[:1024]
        )
    return {"mnist": _data.load_mnist, "cifar10": _data.load_cifar10}[settings.data](settings.folder)


class Run:
    """One run of training: its data, steps and files.

    Args:
      settings: of the command line.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.mesh = connect(settings)
        self.chief = jax.process_index() == 0
        self.train, self.test = load(settings)
        self.steps = math.ceil(len(self.train.labels) / settings.batch_size)
        total = settings.epochs * self.steps
        schedule = optax.cosine_onecycle_schedule(max(total, 4), settings.learning_rate)
        self.rates = np.asarray(jax.vmap(schedule)(jnp.arange(total)))
        self.model = _models.make_model(
            settings.model,
            num_classes=int(self.train.labels.max()) + 1,
            norm=settings.norm,
            place=settings.place,
            momentum=settings.momentum,
            activation=settings.activation,
            invertible=settings.invertible,
            dtype=DTYPES[settings.dtype],
        )
        optimizer = _steps.make_optimizer(settings.optimizer, schedule, weight_decay=settings.weight_decay)
        shape = self.train.images.shape[1:]
        self.state = _steps.init_state(self.model, optimizer, shape, seed=settings.seed, mesh=self.mesh)
        self.train_step = _steps.make_train_step(
            self.model, optimizer, self.mesh, road=settings.road, accumulate=settings.accumulate
        )
        self.eval_step = _steps.make_eval_step(self.model, self.mesh)
        self.moments_step = _steps.make_moments_step(self.model, self.mesh)

        self.out = settings.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(self.out / "checkpoints")
        self.restore()
        self.metrics = _report.MetricsFile(self.out / "metrics.jsonl", int(self.state.step)) if self.chief else None

    def restore(self) -> None:
        """Go on from the last checkpoint, where that is wanted; never over one where it is not."""
        last = self.checkpoints.last_step
        if last is not None and not self.settings.resume:
            raise SystemExit(f"--out: {self.out} holds a run already; give --resume to continue it, or another folder")
        if last is not None:
            ours, theirs = identity(self.settings), self.checkpoints.settings()
            different = [f"--{k.replace('_', '-')} {theirs[k]} (now {ours[k]})" for k in ours if ours[k] != theirs[k]]
            if different:
                raise SystemExit(f"--resume: the run in {self.out} was made with {', '.join(different)}")
            self.state = self.checkpoints.restore(self.state)

    def batches(self, data: _data.Split, seed: int | None = None):
        """This host's part of each batch, placed on the mesh."""
        size, here, hosts = self.settings.batch_size, jax.process_index(), jax.process_count()
        for batch in _data.batches(data, size, seed=seed, process_index=here, process_count=hosts):
            yield _steps.shard_batch(batch, self.mesh)

    def record(self, **values: Any) -> None:
        """Write metrics, on one host."""
        if self.metrics:
            self.metrics.write(**values)

    def report(self, done: tuple[int, _steps.Metrics], progress: Progress, task: Any) -> None:
        """Read the metrics of a step, which waits for it; refuse to go on from a loss that is not finite."""
        step, sums = done
        metrics, rate = _steps.mean_metrics([sums]), float(self.rates[step])
        if not math.isfinite(metrics["loss"]):
            raise SystemExit(
                f"the loss is {metrics['loss']} at step {step + 1}, with a learning rate of {rate:.3g}; the last"
                " checkpoint is whole. Try a lower --learning-rate, or a normalization if there is none"
            )
        self.record(kind="train", step=step + 1, learning_rate=rate, **metrics)
        now = time.perf_counter()
        speed, self.reported = self.settings.batch_size / (now - self.reported), now
        progress.update(task, completed=step + 1, speed=f"{speed:.0f} images/s")

    def train_epoch(self, number: int, progress: Progress, task: Any) -> dict[str, float]:
        """Train on what is left of an epoch; return its metrics.

        Each step is reported while the device works on the next, so that it never waits for the host.
        """
        done, every = int(self.state.step) - number * self.steps, self.settings.save_every
        history: list[_steps.Metrics] = []
        waiting: deque[tuple[int, _steps.Metrics]] = deque()
        self.reported = time.perf_counter()
        for index, batch in enumerate(self.batches(self.train, self.settings.seed + 1 + number)):
            if index < done:
                continue
            self.state, sums = self.train_step(self.state, batch)
            history.append(sums)
            waiting.append((number * self.steps + index, sums))
            last = index + 1 == self.steps
            saving = bool(every) and (number * self.steps + index + 1) % every == 0 and not last
            while len(waiting) > (0 if saving or last else 1):
                self.report(waiting.popleft(), progress, task)
            if saving:
                self.save({"accuracy": -1.0})
        return _steps.mean_metrics(history) if history else {"loss": math.nan, "accuracy": math.nan}

    def epoch(self, number: int, progress: Progress, task: Any) -> dict[str, float]:
        """Train on what is left of an epoch; return its metrics and those on the test images."""
        fit = self.train_epoch(number, progress, task)
        result = _steps.evaluate(self.eval_step, self.state, self.batches(self.test))
        moments = self.moments_step(self.state, next(self.batches(self.train, self.settings.seed)))
        values = {
            "train_loss": fit["loss"],
            "train_accuracy": fit["accuracy"],
            "test_loss": result["loss"],
            "test_accuracy": result["accuracy"],
        }
        self.record(
            kind="epoch",
            step=int(self.state.step),
            epoch=number + 1,
            **values,
            drift=_report.drift(jax.device_get(self.state.batch_stats), jax.device_get(moments)),
        )
        self.save({"accuracy": result["accuracy"]})
        return values

    def save(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self.checkpoints.last_step != int(self.state.step):
            self.checkpoints.save(self.state, identity(self.settings), metrics)


def identity(settings: argparse.Namespace) -> dict[str, Any]:
    """The settings that must not change when a run is resumed: those on which its numbers depend."""
    free = ("out", "resume", "save_every", "devices", "coordinator", "num_processes", "process_id", "folder", "road")
    return json.loads(json.dumps({k: v for k, v in vars(settings).items() if k not in free}))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train by the command line's settings; return loss and accuracy on the test images."""
    settings = parse(arguments)
    run = Run(settings)
    console = Console(quiet=not run.chief)
    table = Table("epoch", "train loss", "train accuracy", "test loss", "test accuracy")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    started, first = time.perf_counter(), int(run.state.step) // run.steps
    with Progress(*columns, console=console) as progress:
        total = settings.epochs * run.steps
        task = progress.add_task("training", total=total, completed=int(run.state.step), speed="")
        for number in range(first, settings.epochs):
            values = run.epoch(number, progress, task)
            table.add_row(str(number + 1), *(f"{v:.4f}" for v in values.values()))
            progress.update(task, description=f"epoch {number + 1}: test accuracy {values['test_accuracy']:.4f}")
    if settings.recalibrate:
        run.state = _steps.recalibrate(run.moments_step, run.state, run.batches(run.train))
    result = _steps.evaluate(run.eval_step, run.state, run.batches(run.test))
    run.checkpoints.close()
    if run.metrics:
        _report.plot(run.metrics.records, run.out / "training.png")
        run.record(kind="result", step=int(run.state.step), **result)
    console.print(table)
    source = "recalibrated statistics" if settings.recalibrate else "running averages"
    console.print(
        f"Test accuracy {result['accuracy']:.4f} from the {source}, after {settings.epochs} epochs on"
        f" {run.mesh.size} {jax.devices()[0].platform} device(s) in {time.perf_counter() - started:.1f} s.",
        f"Metrics, plots and checkpoints are in {run.out}.",
        sep="\n",
    )
    return result


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
