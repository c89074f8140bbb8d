"""How far normalized outputs are from float64, for data with a large mean: ours, Flax's and, if installed, PyTorch's.

    python benchmarks/accuracy.py

Prints a table; deterministic on one machine.
"""

import flax.linen
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxnorm

KAPPAS = (0.0, 1e2, 1e3, 1e4, 1e5, 1e6)
EPSILON = 1e-5


def flax_batch_norm(x):
    """Flax's layer with its defaults, in training."""
    layer = flax.linen.BatchNorm(use_running_average=False, epsilon=EPSILON)
    return layer.apply(layer.init(jax.random.key(0), x), x, mutable="batch_stats")[0]


def contenders():
    """Functions from a float32 array to its normalized output, by name."""
    functions = {
        "jaxnorm": lambda x: jaxnorm.batch_norm(x, epsilon=EPSILON)[0],
        f"flax {flax.__version__}": flax_batch_norm,
    }
    try:
        import torch
    except ImportError:
        return functions
    functions[f"torch {torch.__version__}"] = lambda x: torch.nn.functional.batch_norm(
        torch.from_numpy(x), None, None, training=True, eps=EPSILON
    ).numpy()
    return functions


def main():
    """Measure and print."""
    functions = contenders()
    table = Table("kappa", *functions, title="largest error of batch norm, float32 N(kappa, 1), 4096 rows")
    for kappa in KAPPAS:
        x = (np.random.default_rng(0).standard_normal((4096, 8)) + kappa).astype(np.float32)
        exact = x.astype(np.float64)
        expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + EPSILON)
        errors = [np.abs(np.asarray(function(x)) - expected).max() for function in functions.values()]
        table.add_row(f"{kappa:g}", *(f"{error:.1e}" for error in errors))
    Console().print(table)


if __name__ == "__main__":
    main()
