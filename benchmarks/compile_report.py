"""Compile named cases for chips that need not be there, ours and Flax's side by side, and count what they cost.

    python benchmarks/compile_report.py                      # every case, for every chip whose compiler is installed
    python benchmarks/compile_report.py --targets h200-1 --cases stack

``norms``: the five normalizations, forward and step. ``stack``: eight blocks of convolution, batch norm and activation,
unrolled and under ``lax.scan``, and the gradient of a loss. ``resnet``: a training step of ResNet-50 on 224x224 images,
bfloat16, on both roads of `jaxnorm.training`, with collectives. ``memory``: temporaries of ResNet-50, batch 256.

Bytes moved and temporaries are in units of the activation: its size on one chip. Deterministic for a given compiler;
results go to results/compiled-<chip>.json.
"""

import argparse
import json
import math
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import hlo
import jax
import jax.numpy as jnp
import targets
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import jaxnorm
from jaxnorm import training
from jaxnorm.training import _models, _steps

IMAGES, ROWS = (128, 56, 56, 64), (32768, 4096)
LAYERS = 8


def costs(compiled: Any, activation: float) -> dict[str, Any]:
    """What a compiled program costs, on one chip."""
    counts = hlo.count(hlo.parse(compiled.as_text()))
    return {
        "bytes": round(counts.bytes / activation, 3),
        "kernels": counts.kernels,
        "temporaries": round(compiled.memory_analysis().temp_size_in_bytes / activation, 3),
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
                    row[name] = costs(compiled, size(shape, dtype, mesh))
                yield row


def _block(name: str, norm_first: bool):
    def normalized(x, scale, bias):
        if name == "flax":
            layer, stats = nn.BatchNorm(use_running_average=False, dtype=x.dtype), jnp.zeros(x.shape[-1])
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": stats, "var": stats + 1}}
            return jax.nn.relu(layer.apply(variables, x, mutable=["batch_stats"])[0])
        invertible = name.endswith("invertible")
        activation = "leaky_relu" if invertible else "relu"
        return jaxnorm.batch_norm(x, scale, bias, activation=activation, invertible=invertible)[0]

    def convolved(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=numbers)

    def block(x, parameters):
        kernel, scale, bias = parameters
        if norm_first:
            return convolved(normalized(x, scale, bias), kernel)
        return normalized(convolved(x, kernel), scale, bias)

    return block


def stack(target: str):
    """Eight blocks: what is kept for the backward pass, a layer."""
    mesh, channels = targets.mesh_of(target), IMAGES[-1]
    parameters = (
        shaped((LAYERS, 3, 3, channels, channels), jnp.float32, mesh),
        shaped((LAYERS, channels), jnp.float32, mesh),
        shaped((LAYERS, channels), jnp.float32, mesh),
    )
    x = shaped(IMAGES, jnp.bfloat16, mesh, "data")
    for how in ("scan", "unrolled", "scan, norm first"):
        for name in ("flax", "jaxnorm", "jaxnorm invertible"):
            block = _block(name, how.endswith("norm first"))

            def loss(parameters, x, how=how, block=block):
                if how == "unrolled":
                    for i in range(LAYERS):
                        x = block(x, jax.tree.map(lambda a, i=i: a[i], parameters))
                else:
                    x, _ = lax.scan(lambda x, p: (block(x, p), None), x, parameters)
                return jnp.sum(jnp.square(x.astype(jnp.float32)))

            compiled = jax.jit(jax.grad(loss)).lower(parameters, x).compile()
            yield {"case": f"{how}, {name}", **costs(compiled, LAYERS * size(IMAGES, jnp.bfloat16, mesh))}


def resnet_step(target: str, road: str, per_chip: int) -> tuple[Any, int, int]:
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
    step = training.make_train_step(model, optimizer, mesh, road=road)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return compiled, len(jax.tree.leaves(state.batch_stats)) // 2, len(jax.tree.leaves(state.params))


def resnet(target: str, per_chip: int = 32):
    """ResNet-50 on the training program's two roads."""
    for road in _steps.ROADS:
        compiled, layers, arrays = resnet_step(target, road, per_chip)
        row = {"road": road, "examples per chip": per_chip, "batch norms": layers, "parameter arrays": arrays}
        row |= {k: v for k, v in costs(compiled, 1e6).items() if k in ("kernels", "collectives")}
        yield row | {"temporary MB per chip": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)}


class FlaxNorm(_models.Norm):
    """The normalization of the networks with Flax's layer in place of ours."""

    @nn.compact
    def __call__(self, x, train, mask, residual=None):
        """Batch norm, residual and activation, one after the other."""
        x = nn.BatchNorm(not train, momentum=self.momentum, dtype=self.dtype)(x)
        x = x if residual is None else x + residual
        return x if self.activation is None else _models.ACTIVATIONS[self.activation](x)


def memory(target: str, examples: int = 256):
    """Gradients of ResNet-50 on 224x224 images: temporaries by activation and mode, beside Flax's batch norm."""
    mesh = targets.mesh_of(target)
    for activation in ("relu", "leaky_relu"):
        for name in ("flax", "jaxnorm", "jaxnorm invertible"):
            if (activation, name) == ("relu", "jaxnorm invertible"):
                continue
            settings = {"activation": activation, "invertible": name.endswith("invertible")}
            model = training.make_model("resnet50", num_classes=1000, dtype=jnp.bfloat16, **settings)
            with mock.patch.object(_models, "Norm", FlaxNorm if name == "flax" else _models.Norm):
                images = shaped((examples, 224, 224, 3), jnp.bfloat16, mesh, "data")
                variables = jax.eval_shape(
                    lambda m=model: m.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False)
                )
                variables = jax.tree.map(lambda a: shaped(a.shape, a.dtype, mesh), variables)

                def loss(params, stats, x, model=model):
                    y, new = model.apply(
                        {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
                    )
                    return jnp.mean(jax.nn.logsumexp(y, -1)), new

                grad = jax.jit(jax.grad(loss, has_aux=True))
                compiled = grad.lower(variables["params"], variables["batch_stats"], images).compile()
            temporary = round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)
            yield {"case": f"ResNet-50, {activation}, {name}", "examples": examples, "temporary MB": temporary}


CASES = {"norms": norms, "stack": stack, "memory": memory, "resnet": resnet}
BY_DEFAULT = {"cpu": ("norms",), "tpu-v5e-1": ("norms", "stack"), "h200-1": ("norms", "stack", "memory", "resnet")}
"""What is compiled by default: for several chips, ResNet-50 alone."""


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
        rows = by_chip.setdefault(target.rpartition("-")[0] or target, [])
        for case in settings.cases or BY_DEFAULT.get(target, ("resnet",)):
            try:
                found = [{"target": target, **row} for row in CASES[case](target)]
            except targets.NotInstalledError as error:
                sys.exit(str(error))
            show(f"{case} for {target}", found)
            rows += found
    for chip, rows in by_chip.items():
        text = json.dumps({"versions": versions, "rows": rows}, indent=1)
        (settings.out / f"compiled-{chip}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
