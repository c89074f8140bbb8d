"""Draw the figures of the documentation from stored results: transparent vectors, read on white and on black.

python docs/figures.py
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

DOCS = Path(__file__).parent
GRAY, BLUE, ORANGE, GREEN, PURPLE = "#808080", "#2f8fd8", "#e2703a", "#3a9d5d", "#9a6fd0"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.labelcolor": GRAY,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxnorm",
    "text.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
}

# Which axes ----------------------------------------------------------------------------------------------------------

SIZE = 4
NORMS = {
    "batch": {"batch": SIZE, "positions": SIZE},
    "ghost batch": {"batch": 2, "positions": SIZE},
    "layer, RMS": {"channels": SIZE},
    "group": {"channels": 2, "positions": SIZE},
    "instance": {"positions": SIZE},
}
"""How many indices of each axis share one statistic; one of those that are not named."""


def axes() -> Figure:
    """An array of ``(batch, positions, channels)`` for each norm, with the values that share one statistic."""
    figure = Figure(figsize=(6.5, 1.9), layout="constrained")
    for panel, (name, shared) in zip(figure.subplots(1, len(NORMS)), NORMS.items(), strict=True):
        for cell, corners in faces():
            together = all(SIZE - index <= shared.get(axis, 1) for axis, index in cell.items())
            color = BLUE if together else "none"
            panel.add_patch(Polygon(corners, facecolor=color, edgecolor=GRAY, linewidth=0.7))
        middle = SIZE / 2
        for label, at in (
            ("batch", (middle, SIZE + 0.6, 0)),
            ("channels", (SIZE + 0.6, middle, 0)),
            ("positions", (-0.5, SIZE + 0.5, middle)),
        ):
            rotation = {"batch": -30, "channels": 30, "positions": 90}[label]
            panel.text(*projected(at), label, ha="center", va="center", rotation=rotation, fontsize=8)
        panel.set(title=name, xlim=(-4.8, 4.2), ylim=(-5.4, 4.4), aspect="equal")
        panel.title.set_color(GRAY)
        panel.axis("off")
    return figure


def projected(point: tuple[float, float, float]) -> tuple[float, float]:
    """Batch to the lower right, channels to the lower left, positions upwards."""
    batch, channels, positions = point
    return (batch - channels) * 3**0.5 / 2, positions - (batch + channels) / 2


def faces():
    """The visible faces of all cells: which cell each belongs to, and its corners in the plane."""
    names, last = ("batch", "channels", "positions"), SIZE - 1
    for fixed in range(3):
        for i, j in np.ndindex(SIZE, SIZE):
            index = [i, j]
            index.insert(fixed, last)
            corners = []
            for di, dj in ((0, 0), (1, 0), (1, 1), (0, 1)):
                corner: list[float] = [i + di, j + dj]
                corner.insert(fixed, SIZE)
                corners.append(projected(tuple(corner)))  # pyright: ignore[reportArgumentType]
            yield dict(zip(names, index, strict=True)), corners


# Results -------------------------------------------------------------------------------------------------------------


def results(name: str) -> Any:
    """What a benchmark has stored."""
    return json.loads((DOCS.parent / "benchmarks" / "results" / f"{name}.json").read_text())


CONTENDERS = {
    "drop-in": ("import swapped", BLUE, "o"),
    "inside": ("activation inside", ORANGE, "s"),
    "invertible": ("invertible", GREEN, "D"),
    "inside, checkpoint": ("both under a checkpoint", PURPLE, "^"),
    "inside, policy": ("... and save_statistics", GRAY, "v"),
}


def networks() -> Figure:
    """Bytes moved and temporaries of a training step, divided by those with Flax's norms."""
    chips = {"H200": "compiled-h200", "TPU v5e": "compiled-tpu-v5e"}
    figure = Figure(figsize=(7.2, 8), layout="constrained")
    panels = figure.subplots(len(chips), 2, sharey="row")
    for (left, right), (chip, name) in zip(panels, chips.items(), strict=True):
        rows = [row for row in results(name)["rows"] if is_network(row.get("case", ""))]
        cases = list(dict.fromkeys(row["case"] for row in rows))
        for row in rows:
            if row["contender"] in CONTENDERS:
                label, color, marker = CONTENDERS[row["contender"]]
                flax = row["temporaries"] - row["temporaries more"]
                for panel, ratio in ((left, row["bytes / Flax"]), (right, row["temporaries"] / flax)):
                    style = {"color": color, "label": label, "alpha": 0.8, "markersize": 5}
                    panel.plot(ratio, cases.index(row["case"]), marker, **style)
        left.set_yticks(range(len(cases)), cases)
        left.invert_yaxis()
        for panel, what in ((left, "bytes moved"), (right, "temporaries")):
            panel.axvline(1, color=GRAY, linewidth=0.8)
            panel.grid(axis="x")
            panel.set(xlabel=f"{chip}: {what} / Flax's")
    found = {}
    for panel in figure.axes:
        found |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    labels = [label for label, *_ in CONTENDERS.values()]
    figure.legend([found[label] for label in labels], labels, loc="outside upper center", ncols=3)
    return figure


def is_network(case: str) -> bool:
    """Whether this is one of the larger programs: not a norm alone, nor a stack of less than eight layers."""
    return bool(case) and not case.startswith(("norm", "4 x (", "2 x ("))


LIBRARIES = {
    "flax.linen": (BLUE, "o"),
    "haiku": (GREEN, "D"),
    "equinox": (PURPLE, "^"),
    "torch": (ORANGE, "s"),
    "torch, channels first": (GRAY, "v"),
}


def speed() -> Figure:
    """How many times as fast as each library a norm is on a CPU."""
    summary = results("speed-cpu")["summary"]
    norms = list(product(("batch", "layer", "rms", "group", "instance"), ("float32", "bfloat16")))
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, kind in zip(panels, ("forward", "step"), strict=True):
        for library, (color, marker) in LIBRARIES.items():
            known = [
                (times[library]["geometric mean"], i)
                for i, (norm, dtype) in enumerate(norms)
                if library in (times := summary[f"{kind}, {norm}, {dtype}"])
            ]
            label = "torch, channels last" if library == "torch" else library
            panel.plot(*zip(*known, strict=True), marker, color=color, label=label, markersize=5, alpha=0.8)
        panel.axvline(1, color=GRAY, linewidth=0.8)
        panel.set(xscale="log", xlabel=f"{kind}: times as fast as the other library")
        panel.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        panel.minorticks_off()
        panel.grid(axis="x")
    panels[0].set_yticks(range(len(norms)), [f"{norm.replace('rms', 'RMS')}, {dtype}" for norm, dtype in norms])
    panels[0].invert_yaxis()
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


FIGURES = {"axes": axes, "networks": networks, "speed": speed}


def draw(folder: Path) -> None:
    """Write all figures as SVG, the same bytes for the same results."""
    folder.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, figure in FIGURES.items():
            figure().savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "figures")
    draw(parser.parse_args().out)
