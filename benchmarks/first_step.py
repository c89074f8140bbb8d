"""How long a training step takes to begin: traced, lowered and compiled, for this machine or for a chip.

    python benchmarks/first_step.py                    # for one CPU: a table, and results/first-step-cpu.json
    python benchmarks/first_step.py --target h200-1    # for a chip whose compiler is installed

ResNet-50, and a transformer of 12 blocks with layer norm; of Linen and of NNX; with Flax's norms, with ours in their
place, and with ours told of the activation, where there is one. In turn, nothing cached. Medians over the rounds of
the processor's time, and of each round's ratio to Flax.
"""

import argparse
import gc
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax
import networks
import numpy as np
import targets
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

STAGES = ("trace", "lower", "compile")
CASES = {
    f"{name}, {library}": (contenders, library, name)
    for name, contenders in (("ResNet-50", networks.PLAIN), ("transformer", networks.PLAIN[:2]))
    for library in ("linen", "nnx")
}


def stages(case: str, contender: str, target: str, compiled: bool) -> Iterator[float]:
    """Seconds of the processor for each of `STAGES`."""
    _, library, name = CASES[case]
    program = networks.first_step(name, library, contender)
    sharding = NamedSharding(targets.mesh_of(target), P())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), program.arguments)
    jax.clear_caches()
    gc.collect()
    gc.disable()  # it takes 0.2 s, now in one stage and now in another
    done = jax.jit(program.function)
    advances = [lambda f: f.trace(*arguments), lambda traced: traced.lower(), lambda lowered: lowered.compile()]
    for advance in advances if compiled else advances[:2]:
        began = time.process_time()
        done = advance(done)
        yield time.process_time() - began
    gc.enable()


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", choices=targets.TARGETS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled-rounds", type=int, default=2, help="in how many of them it is compiled as well")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    settings = parser.parse_args()
    rows = []
    for case in settings.cases:
        seconds = defaultdict(list)
        for n in track(range(settings.rounds), case, console=Console(stderr=True)):
            for contender in CASES[case][0]:
                found = list(stages(case, contender, settings.target, n < settings.compiled_rounds))
                for stage, value in zip(STAGES, found, strict=False):
                    seconds[contender, stage].append(value)
        for contender in CASES[case][0]:
            row = {"case": case, "contender": contender}
            for stage in STAGES:
                ours, theirs = np.array(seconds[contender, stage]), np.array(seconds["flax", stage])
                row[stage] = {
                    "s": round(float(np.median(ours)), 2),
                    "of Flax's": round(float(np.median(ours / theirs)), 2),
                }
            rows.append(row)
    table = Table("network", "norms", *(f"{stage}, s (of Flax's)" for stage in STAGES), title=settings.target)
    for row in rows:
        cells = ("{s:.2f} ({ratio:.2f})".format(s=row[stage]["s"], ratio=row[stage]["of Flax's"]) for stage in STAGES)
        table.add_row(row["case"], row["contender"], *cells)
    Console().print(table)
    versions = {p: metadata.version(p) for p in ("jax", "jaxlib", "flax")}
    lines = ",\n".join(map(json.dumps, rows))
    path = settings.out / f"first-step-{settings.target}.json"
    path.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
