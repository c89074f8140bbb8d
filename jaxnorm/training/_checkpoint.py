"""Checkpoints with orbax: written aside, then renamed, so that there is always a whole one. Best and last are kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxnorm.training._steps import TrainState


class Checkpoints:
    """The checkpoints of one run, in ``folder``.

    Args:
      folder: created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        best = BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def last_step(self) -> int | None:
        """The step of the last checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Write ``state`` under its step, with the settings of the run and the metrics that say which is best."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),  # pyright: ignore[reportCallIssue]
                settings=ocp.args.JsonSave(settings),  # pyright: ignore[reportCallIssue]
            ),
            metrics=metrics,
        )

    def settings(self) -> dict[str, Any]:
        """The settings of the run that wrote the last checkpoint."""
        restored = self._manager.restore(
            self.last_step,
            args=ocp.args.Composite(settings=ocp.args.JsonRestore()),
        )
        return restored["settings"]

    def restore(self, like: TrainState) -> TrainState:
        """The last state written, with the shapes and shardings of ``like``."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        arguments = ocp.args.StandardRestore(abstract)  # pyright: ignore[reportCallIssue]
        restored = self._manager.restore(self.last_step, args=ocp.args.Composite(state=arguments))
        return TrainState(**restored["state"])

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close()
