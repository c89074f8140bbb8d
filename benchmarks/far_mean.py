"""Time batch norm on a CPU for data with a mean far from zero, beside Flax's.

    python benchmarks/far_mean.py

The layer of `jaxnorm.linen` with running averages that have caught up, and as they begin; means of 0, 5 and 100
deviations; the shapes of `cases`, interleaved. Ratios of medians to Flax's at a mean of zero, which does not depend on
the mean; geometric means over the shapes.
"""

import argparse
import os
import sys
import time

import cases
import jax
import numpy as np
import speed
from rich.console import Console
from rich.progress import track
from rich.table import Table

MEANS = (0.0, 5.0, 100.0)


def runners(kind: str, shape: tuple[int, ...], dtype: str) -> dict[tuple[str, float], object]:
    """By who and mean: Flax, and ours with averages that have caught up or not."""
    found = {}
    dy = jax.random.normal(jax.random.key(1), shape, dtype)
    for mean in MEANS:
        x = (jax.random.normal(jax.random.key(0), shape) + mean).astype(dtype)
        for who, library in (("flax", cases.linen), ("caught up", cases.jaxnorm_linen), ("begun", cases.jaxnorm_linen)):
            variables, apply = library("batch", jax.ShapeDtypeStruct(shape, dtype))
            if who == "caught up":
                variables["batch_stats"]["mean"] += mean + 0.01
            run = jax.jit(cases.KINDS[kind](apply))
            found[who, mean] = lambda run=run, v=variables, x=x: jax.block_until_ready(run(v, x, dy))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape")
    settings = parser.parse_args()
    table = Table(
        "of Flax's speed", *(f"mean {mean:g}" for mean in MEANS), *(f"{mean:g}, averages at zero" for mean in MEANS[1:])
    )
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        for kind in cases.KINDS:
            ratios = {}
            for shape in track(
                list(cases.SHAPES["batch"].values()), f"{dtype}, {kind}", console=Console(file=sys.stderr)
            ):
                found = runners(kind, shape, dtype)
                times, began = {who: [] for who in found}, time.perf_counter()
                for run in found.values():
                    run()
                while time.perf_counter() - began < settings.seconds or len(times["flax", 0.0]) < 5:
                    for i in rng.permutation(len(found)):
                        who, start = list(found)[i], time.perf_counter()
                        found[who]()
                        times[who].append(time.perf_counter() - start)
                flax = np.median(times["flax", 0.0])
                for who, values in times.items():
                    ratios.setdefault(who, []).append(flax / np.median(values))
            wanted = [("caught up", mean) for mean in MEANS] + [("begun", mean) for mean in MEANS[1:]]
            table.add_row(f"{dtype}, {kind}", *(f"{speed.geometric_mean(ratios[who]):.2f}" for who in wanted))
    Console().print(table)


if __name__ == "__main__":
    if not speed.KEEPING.keys() <= os.environ.keys():
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {k: str(v) for k, v in speed.KEEPING.items()}
        )
    main()
