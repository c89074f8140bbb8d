"""Train image classifiers with normalization, on one device or a mesh of them: ``python -m jaxnorm.training``."""

from jaxnorm.training._data import Split, batches, load_cifar10, load_digits, load_mnist, synthetic
from jaxnorm.training._models import CNN, MLP, MODELS, NORMS, ResNet, make_model
from jaxnorm.training._steps import (
    TrainState,
    evaluate,
    init_state,
    make_eval_step,
    make_moments_step,
    make_optimizer,
    make_train_step,
    recalibrate,
    shard_batch,
)

__all__ = [
    "CNN",
    "MLP",
    "MODELS",
    "NORMS",
    "ResNet",
    "Split",
    "TrainState",
    "batches",
    "evaluate",
    "init_state",
    "load_cifar10",
    "load_digits",
    "load_mnist",
    "make_eval_step",
    "make_model",
    "make_moments_step",
    "make_optimizer",
    "make_train_step",
    "recalibrate",
    "shard_batch",
    "synthetic",
]
