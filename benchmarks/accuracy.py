"""How far normalized outputs are from float64, for data with a large mean: jaxnorm, Flax and, if installed, PyTorch.

    python benchmarks/accuracy.py            # a table, results/accuracy.json and .png

Deterministic on one machine.
"""

import argparse
import json
from functools import partial
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


def flax_batch_norm(x, **settings):
    """Flax's layer in training, with its defaults unless ``settings`` say otherwise."""
    layer = flax.linen.BatchNorm(use_running_average=False, epsilon=EPSILON, **settings)
    return layer.apply(layer.init(jax.random.key(0), x), x, mutable="batch_stats")[0]


def at_inference(x):
    """Normalized by running averages that hold exactly the statistics of ``x``."""
    running = jaxnorm.update_running(jaxnorm.init_running(x.shape[-1]), jaxnorm.moments(x, 0), alpha=1.0)
    return jaxnorm.normalize(x, running, epsilon=EPSILON)


def contenders():
    """Functions from a float32 array to its normalized output, by name."""
    functions = {
        "jaxnorm": lambda x: jaxnorm.batch_norm(x, epsilon=EPSILON)[0],
        "jaxnorm, at inference": at_inference,
        f"flax {flax.__version__}": flax_batch_norm,
        f"flax {flax.__version__}, use_fast_variance=False": partial(flax_batch_norm, use_fast_variance=False),
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
    colors = {"jaxnorm": "#2f8fd8", "flax": "#e2703a", "torch": gray}
    figure, axes = plt.subplots(figsize=(8.5, 3), constrained_layout=True)
    above = 0.0
    for name, values in sorted(errors.items(), key=lambda item: item[1][-1]):
        color = colors[name.split()[0].rstrip(",")]
        axes.plot(KAPPAS[1:], values[1:], "o--" if "," in name else "o-", color=color)
        above = max(np.log10(values[-1]), above + 0.9 if above else -np.inf)  # labels do not overlap
        axes.annotate(name, (KAPPAS[-1], 10**above), (8, 0), textcoords="offset points", va="center", color=color)
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
