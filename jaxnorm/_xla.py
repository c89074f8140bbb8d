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
"""A function of which only the arguments are kept for the backward pass (`test_derivatives.py::test_residuals`)."""


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

    An array of rank six or more is reduced one axis at a time, as one of rank three: jaxlib 0.10 and 0.11 crash on
    reductions of high rank on a CPU (`JAXNORM_OPTIMIZE=1 python -m pytest tests/test_numerics.py`).
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
    """``center``, which is now the same number to all who read it (`tests/test_numerics.py`, at a mean of 1e5).

    Compilers contract ``x - sum * (1/n)`` to one operation and recompute it where they please: one reader would see the
    rounded product and another the exact one. They cannot contract across a minimum, even with the largest number.
    """
    if jnp.iscomplexobj(center):
        return lax.complex(settle(center.real), settle(center.imag))
    return jnp.minimum(center, jnp.full_like(center, jnp.finfo(center.dtype).max))


def is_large(shape: tuple[Any, ...]) -> bool:
    """Whether there are so many values that a sum of them on a CPU takes longer than to begin it."""
    return all(isinstance(size, int) for size in shape) and math.prod(shape) >= 2**17


def one_cpu() -> bool:
    """Whether the data cannot be split over several devices."""
    return jax.device_count("cpu") == 1


def by_itself(function: Function, *args: Any) -> Any:
    """``function(*args)``, on a CPU a call that XLA does not inline, nor its transpose: a sum that shares nothing.

    XLA's sums compute what they add as they read the data, if nobody else uses it. What two of them use becomes an
    array, and writing one takes longer than all the sums there are: without, a step of layer norm takes 2.5 times as
    long (`benchmarks/speed.py`). On several devices sums stay together, so that one collective can serve them.
    """
    if not (platform(args) == "cpu" and one_cpu() and any(is_large(a.shape) for a in jax.tree.leaves(args))):
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
    whose own derivative is that of the data.
    """
    return how(how.read(*stored), small, further).astype(how.dtype)


@partial(spread.defjvp, symbolic_zeros=True)
def _spread_tangent(how, primals, tangents):
    y, (data, stored, small, further) = spread(how, *primals), primals
    t_data, t_small, t_further = (tuple(None if is_zero(t) else t for t in tangents[i]) for i in (0, 2, 3))
    if not jax.tree.leaves((t_data, t_small, t_further)):
        return y, jnp.zeros_like(y)
    parts = partial(_parts, how, len(small), data[0].shape, data[0].dtype)
    return y, recomputed(parts)(t_data, (*t_small, *t_further), stored, (*small, *further))


def _parts(how: Map, n_small: int, shape, wide, t_data, ts, stored, arrays):
    """The tangent as a sum of parts, one for the data and one for each array, whose transposes are sums over the data.

    Where several parts read the cotangent times a derivative that takes the data to compute, XLA for GPUs would compute
    that once and store it in float32. With arrays of its own, behind a barrier, each part computes it as it reads: with
    a GELU inside, 8 passes instead of 11 (`benchmarks/compile_report.py --targets h200-1 --cases epilogues`). But that
    of a residual is stored anyway, and is that of what is added, too. On a TPU barriers cost 8 % of a ResNet-50.
    """

    def at(data, arrays):
        return how(data, arrays[:n_small], arrays[n_small:])

    def along_data(ts, stored, arrays):
        data = how.read(*stored)
        ts = tuple(d if d is None else jnp.zeros_like(d) if t is None else t for t, d in zip(ts, data, strict=True))
        return jax.jvp(lambda *data: at(data, arrays), data, ts)[1].astype(wide)

    def along(n, t, stored, arrays):
        def of_one(value):
            return at(how.read(*stored), (*arrays[:n], value, *arrays[n + 1 :]))

        return jax.jvp(of_one, (jnp.broadcast_to(arrays[n], t.shape),), (t,))[1].astype(wide)

    def along_both(m, n, t, stored, arrays):
        t = jnp.broadcast_to(t, shape)
        return along(m, t.real, stored, arrays) + along(n, t.imag, stored, arrays)

    where, own = platform(ts, stored, arrays), [arrays]

    def behind_a_barrier():
        if how.after is not None and where == "gpu":  # one for each: in one all would vary over replicas if one does
            own.append(tuple(map(lax.optimization_barrier, own[-1])))
        return own[-1]

    def own_of(n):
        return first if n == n_small - 1 and t_data[-1] is not None else behind_a_barrier()

    first, parts = behind_a_barrier(), []
    if any(t is not None for t in t_data):
        parts.append(along_data(t_data, stored, first))
    changed = {n: t for n, t in enumerate(ts) if t is not None}
    pair = [(n, t) for n, t in changed.items() if n < n_small]
    # Nor is a cotangent stored that one sum reads. So two sums are the parts of a complex one: with a SiLU outside of
    # the norm, 8 passes instead of 11 (the same command).
    alike = len({t.shape for _, t in pair}) == 1 and not any(jnp.iscomplexobj(t) for _, t in pair)
    if where == "gpu" and len(pair) == 2 and alike:
        (m, real), (n, imaginary) = pair
        parts.append(along_both(m, n, lax.complex(real, imaginary), stored, own_of(n)))
        del changed[m], changed[n]
    for n, t in changed.items():
        parts.append(by_itself(recomputed(partial(along, n)), t, stored, own_of(n)))
    return reduce(jnp.add, parts).astype(how.dtype)
