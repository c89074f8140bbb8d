"""Compile named cases for chips that need not be there, ours and Flax's side by side, and count what they cost.

    python benchmarks/compile_report.py                      # every case, for every chip whose compiler is installed
    python benchmarks/compile_report.py --targets h200-1 --cases stacks

``norms``: the five normalizations, forward and step. Training steps of `networks`, by contender: ``epilogues``, one
norm with activation and residual; ``stacks`` of convolutions; ``blocks``, residual and of transformers; ``resnet``:
ResNet-50; ``small``: what the tests compile. ``replicas``: ResNet-50 on many chips, with both kinds of parallelism of
`jaxnorm.training`, with its collectives.

Bytes moved and temporaries are in units of the activations, their size on one chip, of all layers; of a ResNet in MB.
What XLA keeps on the chip of a TPU moves no bytes; "accessed" is what kernels read and write, wherever that is,
and "copies", how many of the kernels only copy from one memory to the other, beside those that compute.
Deterministic for a given compiler; results go to results/compiled-<chip>.json.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import cases
import hlo
import jax
import jax.numpy as jnp
import networks
import targets
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jaxnorm import training
from jaxnorm.training import _steps

IMAGES, ROWS = (128, 56, 56, 64), (32768, 4096)


def costs(compiled: Any, activation: float) -> dict[str, Any]:
    """What a compiled program costs, on one chip."""
    text = compiled.as_text()
    counts, computing = hlo.count(hlo.parse(text)), hlo.count(hlo.parse(text, one_memory=True))
    return {
        "bytes": round(counts.bytes / activation, 3),
        "kernels": counts.kernels,
        "temporaries": round(compiled.memory_analysis().temp_size_in_bytes / activation, 3),
        "accessed": round(computing.bytes / activation, 3),
        "copies": counts.kernels - computing.kernels,
        "collectives": dict(counts.collectives),
    }


def shaped(shape: tuple[int, ...], dtype: Any, mesh: Mesh, *spec: str) -> jax.ShapeDtypeStruct:
    """An array that needs not exist, sharded over ``mesh``."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def size(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> float:
    """Bytes of an array on one chip."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize / mesh.size


def norms(target: str):
    """The five normalizations, isolated."""
    mesh = targets.mesh_of(target)
    for norm in cases.NORMS:
        shape = ROWS if norm in ("layer", "rms") else IMAGES
        for kind in cases.KINDS:
            for dtype in ("float32", "bfloat16"):
                row = {"norm": norm, "kind": kind, "dtype": dtype}
                for name, contender in (("jaxnorm", cases.jaxnorm_linen), ("flax", cases.linen)):
                    parameters, apply = contender(norm, jax.ShapeDtypeStruct(shape, dtype))
                    parameters = jax.tree.map(lambda a: shaped(a.shape, a.dtype, mesh), parameters)
                    data = shaped(shape, dtype, mesh, "data")
                    compiled = jax.jit(cases.KINDS[kind](apply)).lower(parameters, data, data).compile()
                    counted = costs(compiled, size(shape, dtype, mesh))
                    row[name] = {k: counted[k] for k in ("bytes", "kernels", "temporaries", "collectives")}
                yield row


def networks_of(cases_of: Callable[[], Iterator[networks.Case]], target: str):
    """Networks: bytes, kernels and temporaries of each contender, and in proportion to its rival."""
    sharding = NamedSharding(targets.mesh_of(target), P())
    for case, network, contenders in cases_of():
        counted: dict[str, dict[str, Any]] = {}
        for contender in contenders:
            program = network(contender)
            arguments = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), program.arguments
            )
            function, start = jax.jit(program.function, donate_argnums=program.donated), time.perf_counter()
            row = costs(function.lower(*arguments).compile(), program.unit)
            seconds, rival = time.perf_counter() - start, counted.get(networks.rival(contender), row)
            counted[contender] = row
            result = {
                "case": case,
                "contender": contender,
                **{k: row[k] for k in ("bytes", "kernels", "temporaries")},
                "bytes / Flax": round(row["bytes"] / rival["bytes"], 3),
                "kernels more a norm": round((row["kernels"] - rival["kernels"]) / program.norms, 2),
                "temporaries more": round(row["temporaries"] - rival["temporaries"], 3),
                "norms": program.norms,
            }
            if target.startswith("tpu"):
                result |= {
                    "accessed": row["accessed"],
                    "copies": row["copies"],
                    "accessed / Flax": round(row["accessed"] / rival["accessed"], 3),
                    "copies more a norm": round((row["copies"] - rival["copies"]) / program.norms, 2),
                }
            yield result
            print(f"{target}: {case}, {contender}: {seconds:.0f} s", file=sys.stderr)


def resnet_step(target: str, parallelism: str, per_chip: int) -> tuple[Any, int, int]:
    """A training step of ResNet-50, compiled; how many batch norms and parameter arrays it has."""
    mesh = targets.mesh_of(target)
    model = training.make_model("resnet50", num_classes=1000, dtype=jnp.bfloat16)
    optimizer = training.make_optimizer("sgd", 0.1, weight_decay=1e-4)
    state = jax.eval_shape(lambda: training.init_state(model, optimizer, (224, 224, 3), seed=0, mesh=mesh))
    state = jax.tree.map(lambda a: shaped(a.shape, a.dtype, mesh), state)
    examples = per_chip * mesh.size
    batch = {
        "image": shaped((examples, 224, 224, 3), jnp.float32, mesh, "data"),
        "label": shaped((examples,), jnp.int32, mesh, "data"),
        "mask": shaped((examples,), jnp.bool_, mesh, "data"),
    }
    step = training.make_train_step(model, optimizer, mesh, parallelism=parallelism)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return compiled, len(jax.tree.leaves(state.batch_stats)) // 2, len(jax.tree.leaves(state.params))


def replicas(target: str, per_chip: int = 32):
    """ResNet-50 with the training program's two kinds of parallelism."""
    for parallelism in _steps.PARALLELISM:
        compiled, layers, arrays = resnet_step(target, parallelism, per_chip)
        row = {
            "parallelism": parallelism,
            "examples per chip": per_chip,
            "batch norms": layers,
            "parameter arrays": arrays,
        }
        row |= {k: v for k, v in costs(compiled, 1e6).items() if k in ("kernels", "collectives")}
        yield row | {"temporary MB per chip": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)}


NETWORKS = {
    "small": networks.small,
    "epilogues": networks.epilogues,
    "stacks": networks.conv_stacks,
    "blocks": networks.other_stacks,
}
CASES = {
    "norms": norms,
    **{name: partial(networks_of, cases_of) for name, cases_of in NETWORKS.items()},
    "resnet": lambda target: networks_of(partial(networks.resnets, target), target),
    "replicas": replicas,
}
ALONE = ("norms", "epilogues", "stacks", "blocks", "resnet")
BY_DEFAULT = {"cpu": ("norms",), "tpu-v5e-1": ALONE, "h200-1": (*ALONE, "replicas")}
"""What is compiled by default: for several chips, their collectives alone."""


def flat(row: dict[str, Any]) -> dict[str, str]:
    """A row with one level, for printing."""
    result = {}
    for key, value in row.items():
        if isinstance(value, dict) and key != "collectives":
            result |= {f"{key}: {k}": str(v) for k, v in value.items() if k != "collectives" or v}
        else:
            result[key] = str(value)
    return result


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one case as a table."""
    rows = [flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    Console(width=200).print(table)


def save(path: Path, versions: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Write what there is, after every row and never by half: the next may take ten minutes to compile."""
    lines = ",\n".join(map(json.dumps, rows))
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')
    unfinished.replace(path)


def main() -> None:
    """Compile, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=targets.TARGETS, help="by default, all that can be")
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    settings = parser.parse_args()
    chosen = settings.targets or [t for t in targets.TARGETS if targets.available(t)]
    packages = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-pjrt")
    versions = {p: metadata.version(p) for p in packages if any(d.name == p for d in metadata.distributions())}
    settings.out.mkdir(exist_ok=True)
    by_chip: dict[str, list[dict[str, Any]]] = {}
    for target in chosen:
        chip = target.rpartition("-")[0] or target
        rows = by_chip.setdefault(chip, [])
        for case in settings.cases or BY_DEFAULT.get(target, ("replicas",)):
            before = len(rows)
            try:
                for row in CASES[case](target):
                    rows.append({"target": target, **row})
                    save(settings.out / f"compiled-{chip}.json", versions, rows)
            except targets.NotInstalledError as error:
                sys.exit(str(error))
            show(f"{case} for {target}", rows[before:])


if __name__ == "__main__":
    main()
