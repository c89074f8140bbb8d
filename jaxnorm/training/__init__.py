"""Train image classifiers with normalization, on one device or a mesh of them: ``python -m jaxnorm.training``."""

try:
    from jaxnorm.training._checkpoint import Checkpoints
    from jaxnorm.training._data import Split, batches, load_cifar10, load_digits, load_mnist, synthetic
    from jaxnorm.training._failure import Failure
    from jaxnorm.training._models import CNN, MLP, MODELS, NORMS, ResNet, make_model
    from jaxnorm.training._run import Run
    from jaxnorm.training._settings import Settings
    from jaxnorm.training._steps import (
        TrainState,
        evaluate,
        init_state,
        make_eval_step,
        make_measure_step,
        make_optimizer,
        make_train_step,
        mean_metrics,
        recalibrate,
        shard_batch,
    )
except ModuleNotFoundError as error:
    if (error.name or "").startswith("jaxnorm"):
        raise
    message = f'jaxnorm.training needs {error.name}, which comes with: pip install "jaxnorm[training]"'
    raise ModuleNotFoundError(message, name=error.name) from None

__all__ = [
    "CNN",
    "MLP",
    "MODELS",
    "NORMS",
    "Checkpoints",
    "Failure",
    "ResNet",
    "Run",
    "Settings",
    "Split",
    "TrainState",
    "batches",
    "evaluate",
    "init_state",
    "load_cifar10",
    "load_digits",
    "load_mnist",
    "make_eval_step",
    "make_measure_step",
    "make_model",
    "make_optimizer",
    "make_train_step",
    "mean_metrics",
    "recalibrate",
    "shard_batch",
    "synthetic",
]
