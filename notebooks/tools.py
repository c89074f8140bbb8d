"""What all notebooks share: how long they run, how their figures look, and the table they end in."""

import os
from collections.abc import Sequence

import jax
import matplotlib.pyplot as plt
from IPython.display import Markdown

FULL = os.environ.get("FULL") == "1"
"""Whether to reproduce what is stored. Otherwise fewer seeds and sizes, as the tests run them."""

COLORS = {
    "none": "#7f7f7f",
    "batch": "#0072b2",
    "layer": "#d55e00",
    "group": "#009e73",
    "instance": "#cc79a7",
    "renorm": "#56b4e9",
    "ghost": "#e69f00",
    "rms": "#000000",
}
"""One color a normalization, in every notebook, told apart by readers who see fewer colors too (Okabe and Ito 2008)."""

# What is claimed of batch normalization, in the order in which it is usually taught.
CLAIMS = {
    "formula": "mean and variance of the batch, then scale and shift; epsilon prevents division by zero",
    "undo": "scale and shift let the network undo the normalization",
    "stable": "it stabilizes training",
    "fast": "it speeds training up",
    "shift": "distributions drift from layer to layer in training, and normalization holds them",
    "shift-cause": "that drift is what slows training, and its reduction what helps",
    "gradients": "it keeps gradients of deep networks from vanishing and exploding",
    "rates": "it allows higher learning rates",
    "initialization": "it makes training less sensitive to how weights are initialized",
    "noise": "the noise of batch statistics regularizes mildly",
    "dropout": "it reduces the need for dropout, and the two go together",
    "generalization": "it can improve generalization and reduce overfitting",
    "position": "it goes before the activation, or after it",
    "placement": "it serves between convolutions and in dense layers",
    "inference": "running averages of the batch statistics give stable outputs at inference",
    "small-batches": "it fails on very small batches, whose statistics are unreliable",
    "cost": "its means and variances cost time",
    "sequences": "it serves recurrent networks badly, for sequences vary in length",
    "layer": "layer normalization takes its statistics over features, and suits recurrent networks",
    "instance": "instance normalization takes them for each image, and suits style transfer",
    "group": "group normalization takes them over groups of channels, and works on small batches",
}
VERDICTS = ("holds", "holds under conditions", "contradicted")


def begin(devices: int = 1) -> None:
    """Set the look of figures, and how many devices a CPU simulates: before anything is computed."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)
    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "errorbar.capsize": 3,
        }
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markdown:
    """A table, for rows whose cells are text or anything else that `str` can show."""
    lines = [header, ["---"] * len(header), *rows]
    return Markdown("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines))


def verdicts(*rows: tuple[str, str, str]) -> Markdown:
    """The table that a notebook ends in.

    Args:
      rows: a key of `CLAIMS`, the figures that decide, made from variables and not typed, and one of `VERDICTS`.
    """
    for claim, _, verdict in rows:
        if claim not in CLAIMS or verdict not in VERDICTS:
            expected = f"a claim of {list(CLAIMS)} and a verdict of {VERDICTS}"
            raise ValueError(f"verdicts: a row must be {expected}; got {claim!r}, {verdict!r}.")
    return table(("claim", "", "measured here", "verdict"), [(c, CLAIMS[c], figures, v) for c, figures, v in rows])
