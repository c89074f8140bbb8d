"""Checkpoints with orbax: written to another name, then renamed, so that one is always whole; verified when read."""

import logging
import shutil
import zlib
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxnorm.training._failure import Failure
from jaxnorm.training._steps import TrainState, all_finite


class Checkpoints:
    """Write and read the checkpoints of one run: the last two, and the one with the best accuracy.

    Args:
      folder: where they are; created if it does not exist.

    Raises:
      Failure: nothing can be written there.

    Example:
      >>> import tempfile, jax, optax
      >>> from jaxnorm import training
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> state = training.init_state(training.MLP(widths=(4,)), optax.sgd(0.1), (2, 2, 1), mesh=mesh)
      >>> with tempfile.TemporaryDirectory() as folder, training.Checkpoints(folder) as checkpoints:
      ...     checkpoints.save(state, {"seed": 0}, accuracy=0.1)
      ...     checkpoints.last_step, checkpoints.restore(state)[1]
      (0, {'seed': 0})
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()
        best = BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise Failure(f"{self.folder}: {error.strerror}; give a folder that can be written") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close()

    @property
    def last_step(self) -> int | None:
        """The step of the last checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, record: dict[str, Any], accuracy: float = -1.0) -> None:
        """Write ``state`` under its step, unless there is a checkpoint of that.

        Args:
          state: what to write.
          record: what JSON can hold, given back by `restore`.
          accuracy: says which checkpoint is best.

        Raises:
          Failure: the state holds a value that is not finite, from which training could not go on; or the disk is full
            or cannot be written.
        """
        step = int(state.step)
        if step == self.last_step:
            return
        last = self.last_step
        kept = "there is no checkpoint yet" if last is None else f"the last whole checkpoint is {self._path(last)}"
        if not all_finite(state):
            raise Failure(f"{self._path(step)}: not written, since not all of the state is finite; {kept}")
        free, needed = shutil.disk_usage(self.folder).free, sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
        remedy = f"{kept}. Make room, or the folder writable, and resume"
        if free < needed:  # what orbax says of a full disk is a hundred lines
            raise Failure(f"{self._path(step)}: not written, {needed:,} bytes are needed and {free:,} free; {remedy}")
        written = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),  # pyright: ignore[reportCallIssue]
            record=ocp.args.JsonSave({"record": record, "checksum": _checksum(state)}),  # pyright: ignore[reportCallIssue]
        )
        try:
            self._manager.save(step, args=written, metrics={"accuracy": accuracy})
        except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
            raise Failure(f"{self._path(step)}: could not be written ({_first_line(error)}); {remedy}") from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The last state that is whole, with the shapes and shardings of ``like``, and what was recorded with it.

        A damaged checkpoint after it is renamed, and its name and what is used instead are logged.

        Raises:
          Failure: none is whole.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        causes = []
        for step in steps:
            try:
                state, record = self._read(step, like)
            except Exception as error:  # orbax and tensorstore raise these themselves: there is nothing narrower
                causes.append(_first_line(error))
                continue
            self._set_aside(steps[: len(causes)], causes, step)
            return state, record
        raise Failure(
            f"{self.folder}: none of the checkpoints there ({', '.join(map(str, steps))}) is a whole one of this"
            f" network ({causes[0] if causes else 'it is empty'}); give another folder, or move them away"
        )

    def record(self) -> dict[str, Any] | None:
        """What was recorded with the last checkpoint of which it can be read; None if there is none."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._read_record(step)["record"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def _read_record(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        saved = self._read_record(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        arguments = ocp.args.StandardRestore(abstract)  # pyright: ignore[reportCallIssue]
        state = TrainState(**self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"])
        if _checksum(state) != saved["checksum"]:
            raise ValueError("its checksum is wrong")
        return state, saved["record"]

    def _set_aside(self, steps: list[int], causes: list[str], used: int) -> None:
        """Rename damaged checkpoints, so that theirs can be written again."""
        for step, cause in zip(steps, causes, strict=True):
            path = self._path(step)
            if jax.process_index() == 0:
                path.rename(f"{path}.damaged")
            logging.getLogger(__name__).warning(
                "%s is damaged (%s), renamed %s.damaged; going on from %s", path, cause, step, self._path(used)
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        self._manager.reload()

    def _path(self, step: int) -> Path:
        return self.folder / str(step)


def _checksum(state: TrainState) -> int:
    """Of all bytes of the state: what is stored does not notice when a bit of it flips."""
    checksum = 0
    for leaf in jax.tree.leaves(state):
        checksum = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).tobytes(), checksum)
    return checksum


def _first_line(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= 160 else f"{line[:70]} ... {line[-80:]}"
