"""What all notebooks share: seeds, the look of figures, and the rule for verdicts."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from numpy.typing import ArrayLike
from scipy import stats

FULL = os.environ.get("FULL") == "1"
"""Whether to reproduce what is stored. The tests run fewer seeds and smaller sizes."""


def seeds(full: int = 20, short: int = 2) -> range:
    """The seeds of a notebook: from ``FIRST_SEED`` on, ``SEEDS`` many if that is set."""
    first, many = int(os.environ.get("FIRST_SEED", 0)), os.environ.get("SEEDS")
    return range(first, first + int(many or (full if FULL else short)))


COLORS = {
    "none": "#7f7f7f",
    "batch": "#0072b2",
    "layer": "#d55e00",
    "group": "#009e73",
    "instance": "#cc79a7",
    "renorm": "#56b4e9",
    "ghost": "#e69f00",
    "rms": "#808080",
}
"""One color a normalization, in every notebook, told apart by readers who see fewer colors too (Okabe and Ito 2008)."""

NEUTRAL = "#808080"
"""Text and axes, readable on white and on black."""

# What is claimed of batch normalization, in the order in which it is usually taught.
CLAIMS = {
    "formula": "mean and variance of the batch, then scale and shift; epsilon prevents division by zero",
    "undo": "scale and shift let the network undo the normalization",
    "stable": "it stabilizes training",
    "fast": "it speeds training up",
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
    "cost": "computing its means and variances has a cost",
    "sequences": "it serves recurrent networks badly, for sequences vary in length",
    "layer": "layer normalization takes its statistics over features, and suits recurrent networks",
    "instance": "instance normalization takes them for each image, and suits style transfer",
    "group": "group normalization takes them over groups of channels, and works on small batches",
    "adversarial": "it makes networks more vulnerable to adversarial examples",
    "test-batch": "statistics of the batch at test time let other examples change the answer for one",
    "clients": "it fails where clients with different data train one network together",
}
VERDICTS = ("holds", "holds under conditions", "contradicted", "not shown")
LEVEL = 0.05
"""How often a claim about which nothing is true may get another verdict than "not shown"."""


class Effect(NamedTuple):
    """One comparison: what the claim says is larger, minus what it says is smaller.

    Attributes:
      name: what is compared with what.
      differences: one per seed, positive where the seed supports the claim; a single one
        if it is a count, which is the same for every seed.
      smallest: the smallest mean difference that counts as an effect, chosen before looking.
      unit: what follows the figures; with "points", differences of accuracy are printed in percent.
    """

    name: str
    differences: Sequence[float] | np.ndarray
    smallest: float
    unit: str = "points"


class Decided(NamedTuple):
    """A verdict, and what it was decided on: the mean and the interval of each effect."""

    verdict: str
    means: np.ndarray
    low: np.ndarray
    high: np.ndarray


def interval(
    values: ArrayLike, level: float = LEVEL, axis: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and half the width of its confidence interval (Student's t)."""
    values = np.asarray(values, float)
    n = values.shape[axis]
    half = stats.t.ppf(1 - level / 2, n - 1) * values.std(axis, ddof=1) / np.sqrt(n)
    return values.mean(axis), half


def decide(effects: Sequence[Effect]) -> Decided:
    """The verdict on a claim, from every comparison that bears on it.

    Each mean is tested against zero (paired t-test, two-sided), with Holm's correction for
    the number of comparisons: if no effect exists, the chance of any verdict other than
    "not shown" is at most `LEVEL`. An effect counts if its corrected interval excludes zero
    and its mean is at least ``smallest``. The claim *holds* if all effects count, *holds
    under conditions* if some do, is *contradicted* if all count in the other direction, and
    otherwise is *not shown*.
    """
    means = np.array([np.mean(e.differences) for e in effects])
    pairs = [np.resize(e.differences, max(2, len(e.differences))) for e in effects]
    errors = np.array([stats.sem(pair) for pair in pairs])
    n = np.array([len(pair) for pair in pairs])
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(means) / errors, n - 1)
    p = np.where(np.isnan(p), 1.0, p)  # no difference in any seed
    order = np.argsort(p)
    steps = LEVEL / (len(p) - np.arange(len(p)))
    failed = np.append(
        p[order] > steps, True
    ).argmax()  # from here on nothing is tested
    levels = np.empty(len(p))
    levels[order] = steps[np.minimum(np.arange(len(p)), min(failed, len(p) - 1))]
    half = stats.t.ppf(1 - levels / 2, n - 1) * errors
    low, high = means - half, means + half
    smallest = np.array([e.smallest for e in effects])
    for_it = (low > 0) & (means >= smallest)
    against = (high < 0) & (means <= -smallest)
    if for_it.any():
        verdict = "holds" if for_it.all() else "holds under conditions"
    else:
        verdict = "contradicted" if against.all() else "not shown"
    return Decided(verdict, means, low, high)


def begin(devices: int = 1) -> None:
    """Set the look of figures, and how many devices a CPU simulates: before anything is computed."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)
    plt.rcParams.update(
        {
            "figure.dpi": 150,
            "figure.constrained_layout.use": True,
            "savefig.transparent": True,
            "svg.fonttype": "none",
            "text.color": NEUTRAL,
            "axes.labelcolor": NEUTRAL,
            "axes.edgecolor": NEUTRAL,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "xtick.color": NEUTRAL,
            "ytick.color": NEUTRAL,
            "grid.color": NEUTRAL,
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
    return Markdown(
        "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    )


def figures(mean: float, low: float, high: float, unit: str = "points") -> str:
    """A mean and its interval, to the digits that the interval supports."""
    factor = 100 if unit == "points" else 1
    digits = int(np.clip(np.ceil(-np.log10(max(high - low, 1e-9) * factor / 4)), 0, 3))
    center, *ends = (f"{factor * v:+.{digits}f}" for v in (mean, low, high))
    if low == high:
        return f"{center} {unit} (the same in all)"
    return f"{center} [{', '.join(ends)}] {unit}".strip()


def shown(values: ArrayLike, unit: str = "") -> str:
    """The mean of seeds with its interval, for tables; with ``unit="%"`` of shares."""
    mean, half = interval(100 * np.asarray(values) if unit == "%" else values)
    if not np.isfinite(half):
        return "not finite"
    digits = int(np.clip(np.ceil(-np.log10(max(half, 1e-9) / 5)), 0, 3))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def verdicts(**claims: Sequence[Effect]) -> Markdown:
    """The table that a notebook ends in: every claim that it decides, and the effects that decide it.

    A claim of `CLAIMS` is given by its key, with ``_`` in place of ``-``.
    """
    rows = []
    for key, effects in claims.items():
        claim = key.replace("_", "-")
        found = decide(effects)
        lines = [
            f"{e.name}: {figures(m, low, high, e.unit)}"
            for e, m, low, high in zip(
                effects, found.means, found.low, found.high, strict=True
            )
        ]
        looked = dict.fromkeys(
            f"{100 * e.smallest:g} points"
            if e.unit == "points"
            else f"{e.smallest:g} {e.unit}".strip()
            for e in effects
        )
        rows.append(
            (
                claim,
                CLAIMS[claim],
                "; ".join(lines),
                len(effects),
                ", ".join(looked),
                found.verdict,
            )
        )
    header = ("claim", "", "effect [interval]", "comparisons", "looked for", "verdict")
    return table(header, rows)
