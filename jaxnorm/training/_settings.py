"""The settings of a run: one frozen dataclass, from which the command line is derived."""

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from jaxnorm.training import _models, _steps
from jaxnorm.training._data import DATA

DTYPES = ("float32", "bfloat16")
_WHAT, _HOW, _WHERE, _LEFT = "what is trained", "how", "where", "what is left"


def _setting(default: Any, group: str, description: str, choices: Any = None, numbers: bool = True) -> Any:
    """A field; ``numbers``: whether the numbers of a run depend on it, so that a resumed one must keep it."""
    metadata = {"group": group, "help": description, "choices": choices, "numbers": numbers}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run: what ``python -m jaxnorm.training --help`` lists.

    Raises:
      ValueError: a value is out of range, or two do not fit together.

    Example:
      >>> from jaxnorm import training
      >>> training.Settings(norm="group", epochs=3).batch_size
      128
      >>> training.Settings(batch_size=3)
      Traceback (most recent call last):
      ValueError: --batch-size must be a multiple of devices times processes times microbatches, 4 x 1 x 1; got 3
    """

    model: str = _setting("cnn", _WHAT, "the network", _models.MODELS)
    norm: str = _setting("batch", _WHAT, "its normalization", _models.NORMS)
    place: str = _setting("before", _WHAT, "normalize before or after activation", _models.PLACES)
    activation: str = _setting("relu", _WHAT, "the activation of the network", _models.ACTIVATIONS)
    invertible: bool = _setting(False, _WHAT, "store only the outputs of norms; needs leaky_relu")
    momentum: float = _setting(0.9, _WHAT, "weight of the old value in the running averages")
    data: str = _setting("digits", _WHAT, "which images to train on", DATA)
    folder: Path | None = _setting(None, _WHAT, "where the files of mnist or cifar10 are", numbers=False)  # noqa: RUF009
    image_size: int = _setting(32, _WHAT, "pixels per side of synthetic images")
    epochs: int = _setting(15, _HOW, "passes over the training images")
    batch_size: int = _setting(128, _HOW, "examples per step, over all devices and hosts")
    accumulate: int = _setting(1, _HOW, "microbatches to add up for each step")
    optimizer: str = _setting("sgd", _HOW, "sgd with Nesterov momentum, or adam", _steps.OPTIMIZERS)
    learning_rate: float = _setting(0.3, _HOW, "peak of the one-cycle cosine schedule")
    weight_decay: float = _setting(0.0, _HOW, "weight decay of everything but scale and bias")
    dtype: str = _setting("float32", _HOW, "dtype of the computation; parameters stay float32", DTYPES)
    recalibrate: bool = _setting(
        False, _HOW, "replace the running averages by statistics of all training images at the end"
    )
    seed: int = _setting(0, _HOW, "seed of initialization, split and order")
    devices: int = _setting(4, _WHERE, "devices on this host; simulated if there is only a CPU", numbers=False)
    parallelism: str = _setting(
        "jit", _WHERE, "sharded by jit, or shard_map with pmean", _steps.PARALLELISM, numbers=False
    )
    coordinator: str | None = _setting(None, _WHERE, "host:port of process 0, for several hosts", numbers=False)
    num_processes: int = _setting(1, _WHERE, "how many hosts", numbers=False)
    process_id: int = _setting(0, _WHERE, "which of them this is", numbers=False)
    out: Path | None = _setting(None, _LEFT, "folder of the run; runs/<time> if not given", numbers=False)  # noqa: RUF009
    resume: bool = _setting(False, _LEFT, "continue from the last checkpoint in --out, if there is one", numbers=False)
    save_every: int = _setting(0, _LEFT, "steps between checkpoints; 0 for each epoch", numbers=False)

    def __post_init__(self) -> None:
        def require(holds: Any, name: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"{flag(name)} {rule}; got {getattr(self, name)}")

        for field in dataclasses.fields(self):
            if field.metadata["choices"] is not None:
                known = field.metadata["choices"]
                require(getattr(self, field.name) in known, field.name, f"must be one of {', '.join(known)}")
        for name in ("devices", "epochs", "batch_size", "accumulate", "num_processes", "image_size"):
            require(getattr(self, name) >= 1, name, "must be positive")
        for name in ("learning_rate", "weight_decay", "save_every"):
            require(0 <= getattr(self, name) < math.inf, name, "must be finite and at least 0")
        parts = (self.devices, self.num_processes, self.accumulate)
        rule = f"must be a multiple of devices times processes times microbatches, {' x '.join(map(str, parts))}"
        require(self.batch_size % math.prod(parts) == 0, "batch_size", rule)
        require(0 <= self.momentum <= 1, "momentum", "must lie in [0, 1]")
        require(0 <= self.seed < 2**31, "seed", "must lie in [0, 2^31)")
        require(0 <= self.process_id < self.num_processes, "process_id", "must lie in [0, --num-processes)")
        require(self.norm != "instance" or self.model != "mlp", "norm", "needs positions, which --model mlp lacks")
        undone = self.norm != "none" and self.activation == "leaky_relu"
        require(not self.invertible or undone, "invertible", "needs a --norm and --activation leaky_relu")
        require(self.data in ("digits", "synthetic") or self.folder, "data", "needs --folder, where its files are")
        require(self.out or not self.resume, "resume", "needs --out, the folder of the run to resume")
        if self.num_processes > 1:
            address = re.fullmatch(r".+:\d+", self.coordinator or "")
            require(address, "coordinator", "must be host:port of process 0, the same on all hosts")
            require(self.out, "out", "must be given with several processes: a folder that all of them share")

    @property
    def identity(self) -> dict[str, Any]:
        """The settings on which the numbers of a run depend: what must not change when it is resumed."""
        fields = [field.name for field in dataclasses.fields(self) if field.metadata["numbers"]]
        return json.loads(json.dumps({name: getattr(self, name) for name in fields}))


def flag(name: str) -> str:
    """The option of the command line that sets the field called ``name``."""
    return f"--{name.replace('_', '-')}"


def different(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What differs between two sets of settings, as options; empty if nothing does."""
    return ", ".join(f"{flag(k)} {theirs.get(k)} instead of {ours[k]}" for k in ours if ours[k] != theirs.get(k))


def parse(arguments: list[str] | None = None, description: str | None = None) -> Settings:
    """The settings given on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxnorm.training",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = {title: parser.add_argument_group(title) for title in (_WHAT, _HOW, _WHERE, _LEFT)}
    hints = get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        hint = hints[field.name]
        (kind,) = {*(get_args(hint) or (hint,))} - {NoneType}
        how: dict[str, Any] = (
            {"action": "store_true"} if kind is bool else {"type": kind, "choices": field.metadata["choices"]}
        )
        help_ = field.metadata["help"]
        groups[field.metadata["group"]].add_argument(flag(field.name), default=field.default, help=help_, **how)
    given = vars(parser.parse_args(arguments))
    try:
        return Settings(**given)
    except ValueError as error:
        parser.error(str(error))
