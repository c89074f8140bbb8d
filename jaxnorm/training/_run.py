"""One run of training, from settings to metrics, plots and checkpoints."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxnorm.training import _data, _models, _report, _steps
from jaxnorm.training._checkpoint import Checkpoints
from jaxnorm.training._failure import Failure
from jaxnorm.training._interruption import Interrupted, Signals
from jaxnorm.training._settings import Settings, different


def connect(settings: Settings) -> jax.sharding.Mesh:
    """Join the other hosts, if any, and make a mesh of all devices."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", settings.devices)
    if settings.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                settings.coordinator,
                settings.num_processes,
                settings.process_id,
                initialization_timeout=60,
                heartbeat_timeout_seconds=20,
            )
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise Failure(f"--coordinator {settings.coordinator}: the processes do not meet there ({why})") from error
    wanted, found = settings.devices, jax.local_device_count()
    if found < wanted:
        kind = jax.devices()[0].platform
        raise Failure(f"--devices: {wanted} wanted, {found} found ({kind}); give --devices {found} or fewer")
    check_same(settings)
    hosts = [[d for d in jax.devices() if d.process_index == p][:wanted] for p in range(jax.process_count())]
    devices = [device for host in hosts for device in host]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def check_same(settings: Settings) -> None:
    """Refuse to start where another process was started with other settings: all see it, and none waits."""
    if jax.process_count() == 1:
        return
    counts = [sum(d.process_index == p for d in jax.devices()) for p in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise Failure(f"--devices must be the same on all hosts; got {', '.join(map(str, counts))}")
    shared = ("devices", "parallelism", "num_processes", "save_every", "resume")
    mine = settings.identity | {name: getattr(settings, name) for name in shared} | {"out": str(settings.out)}
    sent = np.frombuffer(json.dumps(mine).encode().ljust(8192), np.uint8)
    first, *others = (json.loads(bytes(row)) for row in multihost_utils.process_allgather(sent))
    for process, theirs in enumerate(others, 1):
        if found := different(first, theirs):
            raise Failure(f"process {process} was started with other settings than process 0: {found}")


def load(settings: Settings) -> tuple[_data.Split, _data.Split]:
    """Training and test images."""
    if settings.data == "digits":
        return _data.load_digits(seed=settings.seed)
    if settings.data == "synthetic":
        whole = _data.synthetic(5120, (settings.image_size, settings.image_size, 3), seed=settings.seed)
        return _data.Split(*(part[1024:] for part in whole)), _data.Split(*(part[:1024] for part in whole))
    assert settings.folder is not None
    return {"mnist": _data.load_mnist, "cifar10": _data.load_cifar10}[settings.data](settings.folder)


class Run:
    """One run of training: its data, steps and files. Call it to train.

    Args:
      settings: the settings of the run.
      signals: signals that stop it after a step; by default SIGINT and SIGTERM.

    Raises:
      Failure: data or devices are not what the settings say.

    Example:
      It sets how many devices are simulated, so make it before anything else uses jax:

      >>> from jaxnorm import training
      >>> def train(folder):
      ...     settings = training.Settings(model="mlp", epochs=1, devices=1, out=folder)
      ...     return training.Run(settings)()["accuracy"]
    """

    def __init__(self, settings: Settings, signals: Signals | None = None) -> None:
        self.settings, self.signals = settings, signals or Signals(settings.num_processes)
        self.mesh = connect(settings)
        self.train, self.test = load(settings)
        self.steps = math.ceil(len(self.train.labels) / settings.batch_size)
        total = settings.epochs * self.steps
        schedule = optax.cosine_onecycle_schedule(max(total, 4), settings.learning_rate)
        self.rates = np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(total)))
        self.model = _models.make_model(
            settings.model,
            num_classes=_data.num_classes(self.train, self.test),
            norm=settings.norm,
            place=settings.place,
            momentum=settings.momentum,
            activation=settings.activation,
            invertible=settings.invertible,
            dtype=jnp.dtype(settings.dtype),
        )
        optimizer = _steps.make_optimizer(settings.optimizer, schedule, weight_decay=settings.weight_decay)
        shape = self.train.images.shape[1:]
        self.state = _steps.init_state(self.model, optimizer, shape, seed=settings.seed, mesh=self.mesh)
        self.train_step = _steps.make_train_step(
            self.model, optimizer, self.mesh, parallelism=settings.parallelism, accumulate=settings.accumulate
        )
        self.eval_step = _steps.make_eval_step(self.model, self.mesh)
        self.measure_step = _steps.make_measure_step(self.model, self.mesh)
        self.epochs, self.times = 0, []
        self.out = settings.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
        self.metrics: _report.MetricsFile | None = None
        self.console = Console(quiet=jax.process_index() > 0)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        speed = TextColumn("{task.fields[speed]}")
        self.progress = Progress(*columns, speed, TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("training", total=total, speed="")

    def open(self) -> None:
        """Go on from the last checkpoint, where that is wanted; never write over a run where it is not."""
        metrics, last = self.out / "metrics.jsonl", self.checkpoints.last_step
        found = self.checkpoints.folder if last is not None else metrics if metrics.exists() else None
        if found and not self.settings.resume:
            raise Failure(f"--out: {found} is there already; give --resume to continue that run, or another folder")
        if last is not None:
            written = self.checkpoints.record()
            if written and (found := different(self.settings.identity, written.get("settings", {}))):
                raise Failure(f"--resume: the run in {self.out} was made with {found}")
            self.state, written = self.checkpoints.restore(self.state)
            self.epochs = written["epochs"]
        if jax.process_index() == 0:
            resumed = (int(self.state.step), self.epochs) if self.settings.resume else None
            self.metrics = _report.MetricsFile(metrics, resumed)
        self.progress.update(self.task, completed=int(self.state.step))

    def save(self, accuracy: float = -1.0) -> None:
        """Write a checkpoint, unless there is one of this step."""
        self.checkpoints.save(self.state, {"settings": self.settings.identity, "epochs": self.epochs}, accuracy)

    def stop_if_asked(self, signal: int) -> None:
        """Save and stop, where a signal came."""
        if signal:
            self.save()
            how = f"go on with the same settings and --out {self.out} --resume"
            raise Interrupted(signal, f"stopped after step {self.state.step}, which is saved; {how}")

    def batches(self, data: _data.Split, seed: int | None = None, done: int = 0) -> Iterator[_steps.Batch]:
        """This host's part of each batch, but for the first ``done``, placed on the mesh."""
        size, here, hosts = self.settings.batch_size, jax.process_index(), jax.process_count()
        parts = _data.batches(data, size, seed=seed, process_index=here, process_count=hosts)
        return (_steps.shard_batch(batch, self.mesh) for batch in islice(parts, done, None))

    def record(self, **values: Any) -> None:
        """Write metrics, on one host."""
        if self.metrics:
            self.metrics.write(**values)

    def report(self, step: int, sums: _steps.Metrics, finite: jax.Array) -> None:
        """Read the metrics of a step, which waits for it; refuse to go on from what is not finite."""
        metrics, rate = _steps.mean_metrics([sums]), float(self.rates[step - 1])
        if not (math.isfinite(metrics["loss"]) and finite):
            last = self.checkpoints.last_step
            kept = f"the checkpoint of step {last} is whole" if last else "there is no checkpoint yet"
            raise Failure(
                f"step {step}, with a learning rate of {rate:.3g}, gave a loss of {metrics['loss']} and parameters,"
                f" averages or gradients that are {'' if finite else 'not '}finite; {kept}."
                " Try a lower --learning-rate, or a normalization if there is none"
            )
        self.record(kind="train", step=step, learning_rate=rate, **metrics, examples=int(sums["count"]))
        self.times.append(time.perf_counter())
        self.progress.update(self.task, completed=step, speed=f"{self.speed():.0f} images/s")

    def speed(self) -> float:
        """Images a second in this epoch, after its first step, which may compile; NaN until there was a second one."""
        seconds = self.times[-1] - self.times[0] if self.times else 0.0
        return (len(self.times) - 1) * self.settings.batch_size / seconds if seconds else math.nan

    def train_epoch(self, number: int) -> None:
        """Train on what is left of an epoch.

        Each step is reported while the device works on the next, so that it never waits for the host.
        """
        last, every = (number + 1) * self.steps, self.settings.save_every
        step = int(self.state.step)
        waiting: deque[tuple[int, _steps.Metrics, jax.Array]] = deque()
        self.times = []
        for batch in self.batches(self.train, self.settings.seed + 1 + number, done=step - number * self.steps):
            self.state, sums = self.train_step(self.state, batch)
            step += 1
            waiting.append((step, sums, _steps.all_finite(self.state)))
            signal = self.signals.asked(step)
            saving = bool(every) and step % every == 0 and step < last
            while len(waiting) > (0 if saving or signal or step == last else 1):
                self.report(*waiting.popleft())
            self.stop_if_asked(signal)
            if saving:
                self.save()

    def test_batches(self) -> Iterator[_steps.Batch]:
        """The test images, in which one process can stop too."""
        for batch in self.batches(self.test):
            if jax.process_count() == 1:
                self.stop_if_asked(self.signals.received)
            yield batch

    def epoch(self, number: int) -> dict[str, Any]:
        """Train on what is left of an epoch; return its metrics and those on the test images."""
        self.train_epoch(number)
        step = int(self.state.step)
        tested = _steps.evaluate(self.eval_step, self.state, self.test_batches())
        by_batch, drift = tested, {}
        if self.state.batch_stats:
            sums, moments = _steps.measure(self.measure_step, self.state, self.test_batches())
            by_batch = _steps.mean_metrics([sums])
            drift = _report.drift(jax.device_get(self.state.batch_stats), jax.device_get(moments))
        values = {f"test_{name}": value for name, value in tested.items()}
        values |= {f"test_{name}_by_batch": value for name, value in by_batch.items()}
        if self.metrics:
            fit = _report.epoch_means(self.metrics.records, number * self.steps, step)
            values |= {f"train_{name}": value for name, value in fit.items()}
        values["examples_per_second"] = self.speed()
        self.record(kind="epoch", step=step, epoch=number + 1, **values, drift=drift)
        self.epochs = number + 1
        self.save(values["test_accuracy"])
        description = f"epoch {self.epochs}: test accuracy {values['test_accuracy']:.4f}"
        self.progress.update(self.task, description=description)
        return values

    def __call__(self) -> dict[str, float]:
        """Train, evaluate, and leave plots; return loss and accuracy on the test images.

        Raises:
          Interrupted: a signal came; what was trained is saved.
          Failure: training diverged, the disk is full, or the folder of the run is not what the settings say.
        """
        began = time.perf_counter()
        columns = ("train_loss", "test_loss", "test_loss_by_batch", "test_accuracy", "examples_per_second")
        table = Table("epoch", *(name.replace("_", " ") for name in columns))
        with Checkpoints(self.out / "checkpoints") as self.checkpoints:
            self.open()
            self.console.print(_report.network_table(self.model, self.train.images.shape[1:]))
            with self.progress:
                for number in range(self.epochs, self.settings.epochs):
                    values = self.epoch(number)
                    table.add_row(str(number + 1), *(f"{values.get(name, math.nan):.4g}" for name in columns))
            if self.settings.recalibrate:
                self.state = _steps.recalibrate(self.measure_step, self.state, self.batches(self.train))
            result = _steps.evaluate(self.eval_step, self.state, self.test_batches())
        self.record(kind="result", step=int(self.state.step), **result)
        if self.metrics:
            _report.plot(self.metrics.records, self.out / "training.png")
        source = "recalibrated statistics" if self.settings.recalibrate else "running averages"
        self.console.print(table)
        self.console.print(
            f"Test accuracy {result['accuracy']:.4f} from the {source}, after {self.settings.epochs} epochs on"
            f" {self.mesh.size} {jax.devices()[0].platform} device(s) in {time.perf_counter() - began:.1f} s.",
            f"Metrics, plots and checkpoints are in {self.out}.",
            sep="\n",
        )
        return result
