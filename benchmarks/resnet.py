"""ResNet-50 on 224x224 images, bfloat16, compiled for chips that need not be there: collectives and memory per chip.

python benchmarks/resnet.py --targets tpu-v5e-4 tpu-v5e-256 h200-1 h200-8
"""

import argparse
import json
from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import targets
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import training


def compile_step(target: str, road: str, per_chip: int, **settings):
    """The training step compiled for ``target``, and its number of batch normalizations and parameters."""
    mesh = targets.mesh_of(target)
    model = training.make_model("resnet50", num_classes=1000, dtype=jnp.bfloat16, **settings)
    optimizer = training.make_optimizer("sgd", 0.1, weight_decay=1e-4)
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    state = jax.eval_shape(lambda: training.init_state(model, optimizer, (224, 224, 3), seed=0, mesh=mesh))
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), state)
    examples = per_chip * mesh.size
    batch = {
        "image": jax.ShapeDtypeStruct((examples, 224, 224, 3), jnp.float32, sharding=sharded),
        "label": jax.ShapeDtypeStruct((examples,), jnp.int32, sharding=sharded),
        "mask": jax.ShapeDtypeStruct((examples,), jnp.bool_, sharding=sharded),
    }
    step = training.make_train_step(model, optimizer, mesh, road=road)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return compiled, len(jax.tree.leaves(state.batch_stats)) // 2, len(jax.tree.leaves(state.params))


def main() -> None:
    """Compile, count, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["tpu-v5e-4", "tpu-v5e-256", "h200-1", "h200-8"])
    parser.add_argument("--roads", nargs="+", default=["jit", "shard_map"])
    parser.add_argument("--per-chip", type=int, default=32)
    settings = parser.parse_args()
    rows = []
    for target in settings.targets:
        for road in settings.roads:
            compiled, norms, arrays = compile_step(target, road, settings.per_chip)
            counts, memory = hlo.count(hlo.parse(compiled.as_text())), compiled.memory_analysis()
            rows.append(
                {
                    "target": target,
                    "road": road,
                    "examples per chip": settings.per_chip,
                    "batch norms": norms,
                    "parameter arrays": arrays,
                    "collectives": dict(counts.collectives),
                    "temporary MB per chip": memory.temp_size_in_bytes / 1e6,
                    "argument MB per chip": memory.argument_size_in_bytes / 1e6,
                    "kernels": counts.kernels,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            Path(f"/tmp/s/x/resnet_{target}_{road}.txt").write_text(compiled.as_text())


if __name__ == "__main__":
    main()
