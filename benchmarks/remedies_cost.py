"""What a step of each remedy costs, compiled for chips that need not be there: bytes in activations, and kernels.

    python benchmarks/remedies_cost.py

Forward and backward of one layer with ReLU, or the activation of its own, on (128, 56, 56, 64) in bfloat16. The
backward pass waits for the output, as in a network. Writes ``results/remedies-cost.json``.
"""

import json
from functools import partial
from pathlib import Path

import compile_report
import jax
import jax.numpy as jnp
import targets
from jax import lax

import jaxnorm

SHAPE, DTYPE = (128, 56, 56, 64), jnp.bfloat16
RESULTS = Path(__file__).parent / "results" / "remedies-cost.json"
C = SHAPE[-1]
RUNNING = jaxnorm.init_running(C)
DOMAIN = jnp.arange(SHAPE[0]) % 2
RELU = {"activation": "relu"}

REMEDIES = {
    "batch_norm": partial(jaxnorm.batch_norm, **RELU),
    "group_norm": partial(jaxnorm.group_norm, num_groups=8, **RELU),
    "ghost_batch_norm, 32": partial(jaxnorm.ghost_batch_norm, virtual_batch_size=32, **RELU),
    "batch_renorm": lambda x, s, b: jaxnorm.batch_renorm(x, RUNNING, s, b, r_max=3.0, d_max=5.0, **RELU),
    "split_batch_norm, 2": lambda x, s, b: jaxnorm.split_batch_norm(x, DOMAIN, s, b, num_domains=2, **RELU),
    "switchable_norm": lambda x, s, b: jaxnorm.switchable_norm(x, s[:3], b[:3], s, b, **RELU),
    "evonorm_b0": lambda x, s, b: jaxnorm.evonorm_b0(x, s, b, s + 1),
    "evonorm_s0": lambda x, s, b: jaxnorm.evonorm_s0(x, s, b, s + 1, num_groups=8),
    "filter_response_norm": lambda x, s, b: jaxnorm.filter_response_norm(x, s, b, b),
    "dynamic_tanh": lambda x, s, b: jaxnorm.dynamic_tanh(x, s[0], s, b),
}


def step(function):
    """Output and gradients, of which the latter wait for the former."""

    def run(x, scale, bias, dy):
        def output(x, scale, bias):
            y = function(x, scale, bias)
            return y[0] if isinstance(y, tuple) else y

        y, pullback = jax.vjp(output, x, scale, bias)
        y, dy = lax.optimization_barrier((y, dy))
        return y, pullback(dy)

    return run


def main() -> None:
    """Compile, print and keep."""
    found = {}
    for target in ("tpu-v5e-1", "h200-1"):
        if not targets.available(target):
            print(f"the compiler for {target} is not installed")
            continue
        mesh = targets.mesh_of(target)
        x, p = compile_report.shaped(SHAPE, DTYPE, mesh), compile_report.shaped((C,), jnp.float32, mesh)
        for name, function in REMEDIES.items():
            costs = compile_report.costs(
                jax.jit(step(function)).lower(x, p, p, x).compile(), compile_report.size(SHAPE, DTYPE, mesh)
            )
            found.setdefault(target, {})[name] = {k: costs[k] for k in ("bytes", "kernels", "temporaries")}
            print(target, name, found[target][name], flush=True)
    if found:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
