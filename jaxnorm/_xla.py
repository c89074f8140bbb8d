"""What has to be said to XLA so that it computes what is meant, in as few passes as it can.

None of these changes a value, but for rounding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def sum_over(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum over ``axes``, which stay with size one.

    An array of rank six or more is reduced one axis at a time, as an array of rank three: jaxlib 0.10 and 0.11 crash on
    reductions of high rank on CPU.
    """
    if x.ndim <= 5:
        return jnp.sum(x, axes, keepdims=True)
    shape = x.shape
    for a in sorted(axes, reverse=True):
        kept = (*shape[:a], 1, *shape[a + 1 :])
        x = x.reshape(math.prod(shape[:a]), shape[a], math.prod(shape[a + 1 :]))
        x, shape = jnp.sum(x, 1).reshape(kept), kept
    return x


def settle(center: jax.Array) -> jax.Array:
    """``center``, which is now the same number to all who read it.

    Compilers contract ``x - sum * (1/n)`` to one operation and recompute it where they please: one reader would see the
    rounded product and another the exact one, a difference that matters where the mean is large. They cannot contract
    across a minimum, even one with the largest number that there is.
    """
    if jnp.iscomplexobj(center):
        return lax.complex(settle(center.real), settle(center.imag))
    return jnp.minimum(center, float(jnp.finfo(center.dtype).max))


def fence(value: jax.Array) -> jax.Array:
    """``value``, of which XLA cannot, on a GPU, compute and store in the forward pass what the backward pass needs."""
    return lax.platform_dependent(value, cuda=lax.optimization_barrier, default=lambda v: v)


def one_cpu() -> bool:
    """Whether there is a CPU to compute on, as one device."""
    try:
        return jax.device_count("cpu") == 1
    except RuntimeError:  # of JAX_PLATFORMS that leave it out
        return False


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled by itself where the CPU is one device, and so its transpose.

    XLA's sums compute what they add as they read the data, if nobody else uses it. What two of them use, were it but
    the data in float32, becomes an array, and writing one takes longer than all the sums there are. Compiled by
    themselves, they have nothing in common. Where the data may be split over several devices they stay together, so
    that one collective can serve them.
    """
    return _on_one_cpu(_apart(function), function)


def sum_alone(function: Callable[..., jax.Array], axes: tuple[int, ...], in_turn: bool) -> Callable[..., jax.Array]:
    """The sum over ``axes`` of what ``function`` makes of the data, `alone`.

    A sum that keeps the examples apart is twice as fast ``in_turn``, over the last axis first, for some more bytes.
    """

    def total(axes, *args):
        return sum_over(function(*args), axes)

    def on_cpu(*args):
        if 0 in axes or not in_turn:
            return _apart(partial(total, axes))(*args)
        return sum_over(_apart(partial(total, axes[-1:]))(*args), axes)

    return _on_one_cpu(on_cpu, partial(total, axes))


def spread_alone(function: Callable[..., jax.Array], dtype: Any) -> Callable[..., jax.Array]:
    """``function``, which spreads its first argument over the data, so that its transpose is a `sum_alone`, in turn.

    A cotangent has the dtype of the result, and would be an array in float32 again. A result that becomes part of an
    output in bfloat16, as ``dtype`` says, is handed over in `halves` instead, so that its cotangent stays as it is.
    """

    def on_cpu(small, *args):
        shape = jax.eval_shape(function, small, *args).shape
        axes = [a for a, size in enumerate(shape) if small.shape[a] == 1 < size]
        if 0 not in axes:
            small = jnp.broadcast_to(small, [1 if a in axes[-1:] else size for a, size in enumerate(shape)])
        if dtype != jnp.bfloat16:
            return _apart(function)(small, *args)
        return joined(_apart(lambda *args: halves(function(*args)))(small, *args))

    return _on_one_cpu(on_cpu, function)


def _on_one_cpu(function: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` where the CPU is one device, ``default`` elsewhere."""
    return lambda *args: lax.platform_dependent(*args, cpu=function if one_cpu() else default, default=default)


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, as a call that XLA does not inline."""
    call = jax.jit(jax.checkpoint(function, prevent_cse=False))  # pyright: ignore[reportPrivateImportUsage]

    def marked(*args):
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return marked


def halves(whole: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers in bfloat16 that add up to ``whole``, but for the last third of its bits.

    A sum has one cotangent, so only the first of them passes it back.
    """
    high = whole.astype(jnp.bfloat16)
    return high, _forward_only.bind((whole - high.astype(whole.dtype)).astype(jnp.bfloat16))


def joined(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
    """What `halves` were made of, in float32."""
    high, low = parts
    return high.astype(jnp.float32) + low.astype(jnp.float32)


_forward_only = Primitive("forward_only")
"""The identity, and so its derivative, but what is transposed passes nothing back."""

_forward_only.def_impl(lambda x: x)
_forward_only.def_abstract_eval(lambda x: x)
ad.deflinear2(_forward_only, lambda cotangent, x: [None])
batching.defvectorized(_forward_only)
mlir.register_lowering(_forward_only, lambda context, x: [x])
