"""Compile inference before and after `jaxnorm.surgery.fold`, for chips that need not be there, and count what it costs.

    python benchmarks/fold_report.py                   # for every chip whose compiler is installed
    python benchmarks/fold_report.py --targets cpu --seconds
    python benchmarks/fold_report.py --targets tpu-v5e-1 --networks ResNet-18 --dtypes bfloat16

Bytes moved are in MB. Deterministic for a given compiler, but for the seconds, which are the best of many turns, one
program after the other, on the CPU of this machine. Results go to results/folded-<chip>.json.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import targets
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jaxnorm import linen, surgery, training

BATCH, SIZE, TURNS = 8, 224, 20
CHIPS = ("cpu", "tpu-v5e-1", "h200-1")
NETWORKS = {"ResNet-18": "resnet18", "ResNet-50": "resnet50"}
LIBRARIES, DTYPES = ("jaxnorm", "flax"), ("float32", "bfloat16")


def programs(name: str, library: str, dtype: Any) -> dict[str, tuple[Any, Any]]:
    """Inference, and inference folded: each a function and its variables."""
    model = training.make_model(NETWORKS[name], num_classes=1000, dtype=dtype)
    x = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), dtype)
    key = jax.random.key(0, impl="rbg")  # whose numbers compile in a tenth of the time
    variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, SIZE, SIZE, 3)), train=False))(key)

    def apply(variables, x):
        with nn.intercept_methods(_as_flax) if library == "flax" else surgery.frozen():
            return model.apply(variables, x, train=False)

    folded = surgery.fold(apply, variables, x)
    assert not folded.report.stayed, str(folded.report)
    return {"plain": (apply, variables), "folded": (folded.apply, folded.variables)}


def _as_flax(next_function, args, kwargs, context):
    """Flax's batch norm and ReLU in place of jaxnorm's."""
    module: Any = context.module
    if not isinstance(module, linen.BatchNorm):
        return next_function(*args, **kwargs)
    norm = nn.BatchNorm(True, epsilon=module.epsilon, dtype=module.dtype, parent=module.scope.rewound())
    y = norm(args[0])
    residual = kwargs.get("residual")
    y = y if residual is None else y + residual
    return nn.relu(y) if module.activation == "relu" else y


def seconds(both: dict[str, tuple[Any, Any]], dtype: Any) -> dict[str, float]:
    """Of one inference: the best of many turns."""
    x = jax.random.normal(jax.random.key(1), (BATCH, SIZE, SIZE, 3), dtype)
    compiled = {name: jax.jit(apply).lower(variables, x).compile() for name, (apply, variables) in both.items()}
    best = dict.fromkeys(both, float("inf"))
    for _ in range(TURNS):
        for name, (_, variables) in both.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](variables, x))
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def cost(target: str, name: str, library: str, dtype: str, timed: bool = False) -> dict[str, Any]:
    """What a network costs on one chip."""
    sharding = NamedSharding(targets.mesh_of(target), P())
    row: dict[str, Any] = {"network": name, "library": library, "dtype": dtype}
    both = programs(name, library, jnp.dtype(dtype))
    for kind, (apply, variables) in both.items():
        arguments = (variables, jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), dtype))
        shaped = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
        counts = hlo.count(hlo.parse(jax.jit(apply).lower(*shaped).compile().as_text()))
        row[kind] = {"MB": round(counts.bytes / 1e6, 1), "kernels": counts.kernels}
    if timed and target == "cpu" and dtype == "float32":
        for kind, best in seconds(both, jnp.dtype(dtype)).items():
            row[kind]["seconds"] = round(best, 4)
    return row


def main() -> None:
    """Print a table a chip, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, help="by default, all that can be")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--norms", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="of which library")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--seconds", action="store_true", help="time the float32 programs on this CPU too")
    options = parser.parse_args()
    for target in options.targets or [t for t in CHIPS if targets.available(t)]:
        chosen = itertools.product(options.networks, options.norms, options.dtypes)
        found = [cost(target, *which, timed=options.seconds) for which in chosen]
        table = Table(title=f"{target}, batch {BATCH}, {SIZE}x{SIZE}: plain -> folded")
        for column in ("network", "norms of", "dtype", "kernels", "MB", "seconds"):
            table.add_column(column)
        for row in found:
            both = [row["plain"], row["folded"]]
            cells = [" -> ".join(str(b.get(name, "")) for b in both) for name in ("kernels", "MB", "seconds")]
            table.add_row(row["network"], row["library"], row["dtype"], *cells)
        Console().print(table)
        path = Path(__file__).parent / "results" / f"folded-{target.rsplit('-', 1)[0]}.json"
        path.write_text(json.dumps({"versions": {"jax": jax.__version__}, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
