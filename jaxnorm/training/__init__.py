"""Train image classifiers with normalization, on one device or a mesh of them: ``python -m jaxnorm.training``."""

from jaxnorm.training._data import Split, batches, load_digits
from jaxnorm.training._models import CNN
from jaxnorm.training._steps import TrainState, evaluate, init_state, make_eval_step, make_train_step

__all__ = [
    "CNN",
    "Split",
    "TrainState",
    "batches",
    "evaluate",
    "init_state",
    "load_digits",
    "make_eval_step",
    "make_train_step",
]
