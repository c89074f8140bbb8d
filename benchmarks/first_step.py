"""How long a training step of ResNet-50 takes to begin: traced, lowered and compiled for this machine.

    python benchmarks/first_step.py

With Flax's norms, with ours in their place, and with ours told of the activation; in turn, nothing cached. Medians of
the rounds, and of each round's ratio to Flax.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator

import jax
import networks
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

CONTENDERS = ("flax", "drop-in", "inside")
STAGES = ("trace", "lower", "compile")


def stages(contender: str, name: str, pixels: int) -> Iterator[float]:
    """Seconds for each of `STAGES`."""
    program = networks.resnet(name, "relu", 8, pixels, contender)
    jax.clear_caches()
    done = jax.jit(program.function)
    for advance in (lambda f: f.trace(*program.arguments), lambda t: t.lower(), lambda lowered: lowered.compile()):
        began = time.perf_counter()
        done = advance(done)
        yield time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=("resnet18", "resnet50"))
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    seconds = defaultdict(list)
    for _ in track(range(settings.rounds), "compiling", console=Console(stderr=True)):
        for contender in CONTENDERS:
            seconds[contender].append(list(stages(contender, settings.model, settings.pixels)))
    table = Table("", *(f"{stage}, s (of Flax's)" for stage in STAGES))
    for contender in CONTENDERS:
        found = np.array(seconds[contender])
        ratio = np.median(found / np.array(seconds["flax"]), 0)
        table.add_row(contender, *(f"{s:.2f} ({r:.2f})" for s, r in zip(np.median(found, 0), ratio, strict=True)))
    Console().print(table)


if __name__ == "__main__":
    main()
