"""How far normalized outputs are from float64, for data with a large mean: ours, Flax's and, if installed, PyTorch's.

    python benchmarks/accuracy.py            # a table, results/accuracy.json and .png

Deterministic on one machine.
"""

import argparse
import json
from pathlib import Path

import flax.linen
import jax
import matplotlib.pyplot as plt
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


def plot(errors, path):
    """Errors by the mean of the data, on a transparent ground and in colors that are read on white and on black."""
    gray = "#808080"
    figure, axes = plt.subplots(figsize=(7, 2.6), constrained_layout=True)
    for color, (name, values) in zip(("#2f8fd8", "#e2703a", gray), errors.items(), strict=False):
        axes.plot(KAPPAS[1:], values[1:], "o-", color=color)
        axes.annotate(name, (KAPPAS[-1], values[-1]), (8, 0), textcoords="offset points", va="center", color=color)
    axes.set(xscale="log", yscale="log", xlabel="mean of the data, in standard deviations", ylabel="largest error of y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(gray)
    axes.tick_params(which="both", colors=gray)
    axes.xaxis.label.set_color(gray)
    axes.yaxis.label.set_color(gray)
    figure.savefig(path, dpi=160, transparent=True)
    plt.close(figure)


def main():
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    settings = parser.parse_args()
    functions = contenders()
    errors = {name: [] for name in functions}
    table = Table("kappa", *functions, title="largest error of batch norm, float32 N(kappa, 1), 4096 rows")
    for kappa in KAPPAS:
        x = (np.random.default_rng(0).standard_normal((4096, 8)) + kappa).astype(np.float32)
        exact = x.astype(np.float64)
        expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + EPSILON)
        for name, function in functions.items():
            errors[name].append(float(np.abs(np.asarray(function(x)) - expected).max()))
        table.add_row(f"{kappa:g}", *(f"{values[-1]:.1e}" for values in errors.values()))
    Console().print(table)
    settings.out.mkdir(exist_ok=True)
    result = {"kappa": KAPPAS, "largest error": errors}
    (settings.out / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(errors, settings.out / "accuracy.png")


if __name__ == "__main__":
    main()
