"""Real-world shapes, and the five normalizations as each library writes them.

A contender is a pair ``(parameters, apply)`` with ``apply(parameters, x) -> y``, normalizing by the statistics of ``x``
with scale and bias, in the dtype of ``x``. Running averages are updated where the library does so, and left out.
"""

from collections.abc import Callable
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp

import jaxnorm.linen
import jaxnorm.nnx

SHAPES = {
    "batch": {
        "ResNet, 112x112x64": (8, 112, 112, 64),
        "ResNet, 56x56x256": (16, 56, 56, 256),
        "ResNet, 14x14x1024": (32, 14, 14, 1024),
        "ResNet, 7x7x2048": (32, 7, 7, 2048),
        "CIFAR, 32x32x64": (128, 32, 32, 64),
        "MLP, 1024": (4096, 1024),
    },
    "layer": {"BERT, 512x768": (16, 512, 768), "ViT, 197x1024": (32, 197, 1024)},
    "rms": {"LLM, 512x4096": (4, 512, 4096), "LLM, 2048x1024": (4, 2048, 1024)},
    "group": {"UNet, 64x64x128": (8, 64, 64, 128), "ResNet, 14x14x1024": (32, 14, 14, 1024)},
    "instance": {"style, 128x128x64": (4, 128, 128, 64), "UNet, 64x64x128": (8, 64, 64, 128)},
}
"""Channels last; the first axis is the batch."""

NORMS = tuple(SHAPES)
GROUPS = 32
Contender = tuple[Any, Callable[[Any, jax.Array], jax.Array]]


def linen(norm: str, x: jax.ShapeDtypeStruct, library: Any = flax.linen) -> Contender:
    """A layer of ``flax.linen``, or of ``jaxnorm.linen``."""
    layer = {
        "batch": lambda: library.BatchNorm(use_running_average=False, dtype=x.dtype),
        "layer": lambda: library.LayerNorm(dtype=x.dtype),
        "rms": lambda: library.RMSNorm(dtype=x.dtype),
        "group": lambda: library.GroupNorm(GROUPS, dtype=x.dtype),
        "instance": lambda: library.InstanceNorm(dtype=x.dtype),
    }[norm]()
    variables = layer.init(jax.random.key(0), jnp.zeros((2, *x.shape[1:]), x.dtype))

    def apply(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    return variables, apply


def jaxnorm_linen(norm: str, x: jax.ShapeDtypeStruct) -> Contender:
    """A layer of ``jaxnorm.linen``."""
    return linen(norm, x, jaxnorm.linen)


def flax_nnx(norm: str, x: jax.ShapeDtypeStruct) -> Contender:
    """A layer of ``flax.nnx``."""
    library, channels, rngs = flax.nnx, x.shape[-1], flax.nnx.Rngs(0)
    layer = {
        "batch": lambda: library.BatchNorm(channels, dtype=x.dtype, rngs=rngs),
        "layer": lambda: library.LayerNorm(channels, dtype=x.dtype, rngs=rngs),
        "rms": lambda: library.RMSNorm(channels, dtype=x.dtype, rngs=rngs),
        "group": lambda: library.GroupNorm(channels, GROUPS, dtype=x.dtype, rngs=rngs),
        "instance": lambda: library.InstanceNorm(channels, dtype=x.dtype, rngs=rngs),
    }[norm]()
    graph, parameters, rest = flax.nnx.split(layer, flax.nnx.Param, ...)

    def apply(parameters, x):
        merged = flax.nnx.merge(graph, parameters, rest, copy=True)
        y = merged(x)
        return y, flax.nnx.state(merged, flax.nnx.BatchStat)

    return parameters, apply


def haiku(norm: str, x: jax.ShapeDtypeStruct) -> Contender:
    """A module of Haiku."""
    import haiku as hk

    def network(x):
        if norm == "batch":
            return hk.BatchNorm(True, True, 0.99)(x, is_training=True)
        module = {
            "layer": lambda: hk.LayerNorm(-1, True, True),
            "rms": lambda: hk.RMSNorm(-1),
            "group": lambda: hk.GroupNorm(GROUPS),
            "instance": lambda: hk.InstanceNorm(True, True),
        }[norm]()
        return module(x)

    transformed = hk.transform_with_state(network)
    parameters, state = transformed.init(None, jnp.zeros((2, *x.shape[1:]), x.dtype))
    return parameters, lambda parameters, x: transformed.apply(parameters, state, None, x)


def equinox(norm: str, x: jax.ShapeDtypeStruct) -> Contender:
    """A module of Equinox, which sees one example at a time, channels first."""
    import equinox as eqx

    channels = x.shape[-1]
    if norm in ("layer", "rms"):
        module = {"layer": eqx.nn.LayerNorm, "rms": eqx.nn.RMSNorm}[norm](channels)
        every = jax.vmap if x.ndim == 2 else (lambda f: jax.vmap(jax.vmap(f)))
        return module, lambda module, x: every(module)(x).astype(x.dtype)
    if norm == "batch":
        module, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(channels, "batch", mode="batch", dtype=jnp.float32)
        dynamic, static = eqx.partition(module, eqx.is_inexact_array)

        def apply(dynamic, x):
            layer = eqx.combine(dynamic, static)
            y, new = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(first(x), state)
            return last(y).astype(x.dtype), new.get(layer.batch_state_index) if hasattr(
                layer, "batch_state_index"
            ) else 0

        return dynamic, apply
    module = eqx.nn.GroupNorm(channels if norm == "instance" else GROUPS, channels)
    return module, lambda module, x: last(jax.vmap(module)(first(x))).astype(x.dtype)


def first(x: jax.Array) -> jax.Array:
    """Channels first."""
    return jnp.moveaxis(x, -1, 1)


def last(x: jax.Array) -> jax.Array:
    """Channels last."""
    return jnp.moveaxis(x, 1, -1)


JAX_CONTENDERS = {
    "jaxnorm": jaxnorm_linen,
    "flax.linen": linen,
    "flax.nnx": flax_nnx,
    "haiku": haiku,
    "equinox": equinox,
}


def forward(apply: Callable) -> Callable:
    """``parameters, x, dy -> y``, and whatever else the layer returns."""
    return lambda parameters, x, dy: apply(parameters, x)


def step(apply: Callable) -> Callable:
    """``parameters, x, dy -> y, gradients``, and whatever else the layer returns.

    The cotangent waits for the output, as in any network: without, forward and backward pass read ``x`` together.
    """

    def run(parameters, x, dy):
        def values(parameters, x):
            result = apply(parameters, x)
            return result if isinstance(result, tuple) else (result, None)

        frozen = {k: v for k, v in parameters.items() if k == "batch_stats"} if isinstance(parameters, dict) else {}
        trained = {k: v for k, v in parameters.items() if k not in frozen} if frozen else parameters
        with_frozen = (lambda p, x: values({**p, **frozen}, x)) if frozen else values
        y, pullback, rest = jax.vjp(with_frozen, trained, x, has_aux=True)
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, pullback(dy), rest

    return run


KINDS = {"forward": forward, "step": step}
