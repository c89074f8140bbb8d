"""What XLA has to be told so that it computes what is meant, in as few passes over the data as it can.

Nothing here changes a value, except by rounding; a reader of the mathematics may skip it. What pays depends on the
platform, which is chosen while tracing: a program holds one way, and no branches that converters of jaxprs do not know.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0
from jax.experimental.xla_metadata import set_xla_metadata

Function = Callable[..., Any]

recomputed = partial(jax.checkpoint, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
"""A function of which only the arguments are kept for the backward pass."""


def is_zero(tangent: Any) -> bool:
    """Whether nothing is differentiated here."""
    return tangent is None or isinstance(tangent, SymbolicZero) or tangent.dtype == float0


def platform(*arrays: Any) -> str:
    """``cpu``, ``gpu`` or ``tpu``: of the mesh that some of the arrays are on, or else the default one."""
    meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(arrays))
    devices = [d for d in (getattr(m, "abstract_device", None) for m in meshes) if d is not None]
    name = devices[0].platform if devices else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


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
    return jnp.minimum(center, jnp.full_like(center, jnp.finfo(center.dtype).max))


def gpu_barrier(value: Any) -> Any:
    """``value``, of which XLA cannot, on a GPU, compute and store in the forward pass what the backward pass needs."""
    return lax.optimization_barrier(value) if platform(value) == "gpu" else value


def one_cpu() -> bool:
    """Whether the data cannot be split over several devices."""
    return jax.device_count("cpu") == 1


def by_itself(function: Function, *args: Any) -> Any:
    """``function(*args)``, on a CPU as a call that XLA does not inline, and so its transpose: a sum that shares nothing.

    XLA's sums compute what they add as they read the data, if nobody else uses it. What two of them use, were it but the
    data in float32, becomes an array, and writing one takes longer than all the sums there are. Where the data may be
    split over several devices sums stay together, so that one collective can serve them.
    """
    if platform(args) != "cpu" or not one_cpu():
        return function(*args)
    with set_xla_metadata(inlineable="false"):
        return jax.jit(function)(*args)


class Map(NamedTuple):
    """A map of the data that `spread` applies: ``after(affine(*data, *small), *further)``.

    Attributes:
      read: gives the data from what is stored: arrays of one shape, or None.
      affine: linear in the data; the last of ``small`` is added to its result as the last of the data is.
      after: applied to what has ``dtype``; None for nothing.
      dtype: of the result.
    """

    read: Function
    affine: Function
    after: Function | None
    dtype: Any

    def __call__(self, data: Any, small: tuple[Any, ...], further: tuple[Any, ...]) -> jax.Array:
        """The result, not yet rounded where nothing comes after."""
        z = self.affine(*data, *small)
        return z if self.after is None else self.after(z.astype(self.dtype), *further)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def spread(how: Map, data: Any, stored: Any, small: tuple[Any, ...], further: tuple[Any, ...]) -> jax.Array:
    """What ``how`` makes of the ``data``, and of arrays that are spread over it.

    The derivative is the usual one. But the data is read again for it, so that nothing is kept but what is stored,
    whose own derivative is that of the data; and each argument has a part of the derivative to itself, so that the sums
    over the data that are the transposes of these parts read what they need by themselves.
    """
    return how(how.read(*stored), small, further).astype(how.dtype)


@partial(spread.defjvp, symbolic_zeros=True)
def _spread_tangent(how, primals, tangents):
    """The tangent, computed again for the backward pass."""
    y, (data, *arguments) = spread(how, *primals), primals
    ts = [tuple(None if is_zero(t) else t for t in tangents[i]) for i in (0, 2, 3)]
    if not jax.tree.leaves(ts):
        return y, jnp.zeros_like(y)
    parts = partial(_parts, how, platform(primals), data[0].shape, data[0].dtype)
    return y, recomputed(parts)(*ts, *arguments)


def _parts(how: Map, where: str, shape, wide, t_data, t_small, t_further, stored, small, further):
    """The tangent as the sum of what each of the tangents contributes."""

    def along_data(ts, stored, *arrays):
        data = how.read(*stored)
        ts = tuple(d if d is None else jnp.zeros_like(d) if t is None else t for t, d in zip(ts, data, strict=True))
        return jax.jvp(lambda *data: how(data, *arrays), data, ts)[1].astype(wide)

    def along(place, n, t, stored, *arrays):
        def of_one(value):
            changed = (*arrays[place][:n], value, *arrays[place][n + 1 :])
            return how(how.read(*stored), *arrays[:place], changed, *arrays[place + 1 :])

        return jax.jvp(of_one, (jnp.broadcast_to(arrays[place][n], t.shape),), (t,))[1].astype(wide)

    # Where several parts read the cotangent times a derivative that takes the data to compute, XLA would compute that
    # once and store it in float32. With arrays of its own, behind a barrier, each part computes it as it reads. But
    # that of a residual is stored anyway, and is that of what is added, too. On a TPU a ResNet-50 moves 8 % more with
    # barriers, in 211 kernels more (`benchmarks/compile_report.py --targets tpu-v5e-1 --cases resnet`).
    own = [(small, further)]
    stored_anyway = t_data[-1] is not None

    def behind_a_barrier():
        if how.after is not None and where == "gpu":
            small, further = own[-1]  # in one barrier all would vary over the replicas over which one of them does
            own.append((lax.optimization_barrier(small), tuple(map(lax.optimization_barrier, further))))
        return own[-1]

    first, parts = behind_a_barrier(), []
    if any(t is not None for t in t_data):
        parts.append(along_data(t_data, stored, *first))
    for place, ts in enumerate((t_small, t_further)):
        changed = [n for n, t in enumerate(ts) if t is not None]
        shared = len(ts) - 1 if place == 0 and stored_anyway else None
        own_of = [first if n == shared else behind_a_barrier() for n in changed]
        functions, given = [partial(along, place, n) for n in changed], [ts[n] for n in changed]
        if place == 0 and where == "gpu" and _are_a_pair(given):
            parts.append(_paired(functions, shape, given, stored, own_of[-1]))
        else:
            parts += [by_itself(recomputed(f), t, stored, *own) for f, t, own in zip(functions, given, own_of, strict=True)]
    return reduce(jnp.add, parts).astype(how.dtype)


def _are_a_pair(ts):
    return len(ts) == 2 and ts[0].shape == ts[1].shape and not any(map(jnp.iscomplexobj, ts))


def _paired(functions, shape, ts, stored, arrays):
    """The parts of two tangents that are made those of a complex one: in the transpose, a single sum over the data.

    A cotangent that two sums read XLA for GPUs computes and stores first, if that takes more than a comparison; for
    one sum it computes it as it reads. With a SiLU outside of the norm that is 11 passes over the data or 8
    (`benchmarks/compile_report.py --targets h200-1 --cases epilogues`).
    """

    def both(t, stored, *arrays):
        t = jnp.broadcast_to(t, shape)
        return functions[0](t.real, stored, *arrays) + functions[1](t.imag, stored, *arrays)

    return both(lax.complex(*ts), stored, *arrays)
