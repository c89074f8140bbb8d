"""What has to be said to XLA so that it computes what is meant, in as few passes as it can.

Nothing here changes a value, but for rounding; a reader of the mathematics may skip it. The rest of the package says
`spread` of a few numbers a feature that become a map of the data, `total` of a sum over the data, and `by_platform` of
what is worth doing on some chips only.
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
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Function = Callable[..., Any]

recomputed = partial(jax.checkpoint, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
"""A function of which only the arguments are kept for the backward pass."""


def is_zero(tangent: Any) -> bool:
    """Whether nothing is differentiated here."""
    return tangent is None or isinstance(tangent, SymbolicZero) or tangent.dtype == float0


def by_platform(*args: Any, while_tracing: bool, default: Function, **platforms: Function) -> Any:
    """What ``platforms`` have for the platform that the program is compiled for, of ``args``.

    Chosen ``while_tracing``, it is the platform of the mesh or the default one, and the program has no branches, which
    converters of jaxprs do not know.
    """
    if not while_tracing:
        return lax.platform_dependent(*args, default=default, **platforms)
    meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(args))
    devices = [d for d in (getattr(m, "abstract_device", None) for m in meshes) if d is not None]
    platform = devices[0].platform if devices else jax.default_backend()
    return platforms.get(platform, default)(*args)


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


def optimization_barrier(value: Any) -> Any:
    """``value``, of which XLA cannot, on a GPU, compute and store in the forward pass what the backward pass needs."""
    return lax.platform_dependent(value, cuda=lax.optimization_barrier, default=lambda v: v)


def one_cpu() -> bool:
    """Whether there is a CPU to compute on, as one device."""
    try:
        return jax.device_count("cpu") == 1
    except RuntimeError:  # of JAX_PLATFORMS that leave it out
        return False


# On one CPU --------------------------------------------------------------------------------------------------------
#
# XLA's sums compute what they add as they read the data, if nobody else uses it. What two of them use, were it but the
# data in float32, becomes an array, and writing one takes longer than all the sums there are. Outlined, that is,
# compiled by themselves, they have nothing in common. Where the data may be split over several devices they stay
# together, so that one collective can serve them.


def outlined(function: Function) -> Function:
    """``function``, as a call that XLA does not inline, and so its transpose."""
    call = jax.jit(function)

    def marked(*args):
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return marked


def apart(function: Function) -> Function:
    """``function`` of small arrays, which XLA computes, and its derivative, before any of them is spread over the data.

    It would compute it for every value, and read all of its arguments there: with a thousand features or more the
    nearest cache does not hold those beside the data.
    """
    if not one_cpu():
        return function
    function = partial(function)  # jax wants weak references, of which a named tuple that can be called has none

    def chosen(function, *args, differentiated):
        return by_platform(*args, while_tracing=not differentiated, cpu=outlined(function), default=function)

    def derivative(primals, tangents):
        return jax.jvp(function, primals, tangents)[1]

    @jax.custom_jvp
    def separate(*args):
        return chosen(function, *args, differentiated=False)

    @separate.defjvp
    def _(*args):
        of_derivative = recomputed(partial(chosen, derivative, differentiated=True))
        return chosen(function, *args[0], differentiated=True), of_derivative(*args)

    return separate


def total(function: Function, axes: tuple[int, ...], *data: Any, differentiated: bool) -> jax.Array:
    """The sum over ``axes`` of what ``function`` makes of the data.

    A sum that keeps the examples apart is twice as fast over the last axis first, for some more bytes.
    """

    def added(axes, *data):
        return sum_over(function(*data), axes)

    def on_cpu(*data):
        if not differentiated:
            return outlined(default)(*data)
        if 0 in axes:
            return outlined(recomputed(default))(*data)
        return sum_over(outlined(recomputed(partial(added, axes[-1:])))(*data), axes)

    default = partial(added, axes)
    if not one_cpu():
        return default(*data)
    return by_platform(*data, while_tracing=not differentiated, default=default, cpu=on_cpu)


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
    tangent = _by_parts
    if how.after is not None:
        tangent = by_platform(primals, while_tracing=True, cpu=lambda _: _in_turn, default=lambda _: _by_parts)
    return spread(how, *primals), tangent(how, primals, tangents)


def _in_turn(how, primals, tangents):
    """The tangent of the affine map, then that of what comes after.

    XLA's sums on a CPU do not compute a comparison as they read, as in the derivative of a ReLU: each would store the
    cotangent that it sums, in float32. So it is stored once, in the dtype of the result.
    """
    _, stored, small, further = primals
    before = how._replace(after=None)

    def after(t, stored, small, further):
        z = before(how.read(*stored), small, ()).astype(how.dtype)
        t = [jnp.zeros_like(v) if t is None else t for v, t in zip((z, *further), t, strict=True)]
        return jax.jvp(how.after, (z, *further), tuple(t))[1].astype(how.dtype)

    t = _by_parts(before, (*primals[:3], ()), (*tangents[:3], ()))
    return recomputed(after)([None if is_zero(v) else v for v in (t, *tangents[3])], stored, small, further)


def _by_parts(how, primals, tangents):
    """The tangent as the sum of what each of the tangents contributes; None of nothing."""
    data, stored, *arrays = primals
    t_data, _, *t_arrays = tangents
    wide = data[0].dtype

    def along_data(t, stored, *arrays):
        data = how.read(*stored)
        t = tuple(d if d is None else jnp.zeros_like(d) if t is None else t for t, d in zip(t, data, strict=True))
        return jax.jvp(lambda *data: how(data, *arrays), data, t)[1].astype(wide)

    def along(place, n, t, stored, *arrays):
        def of_one(value):
            changed = (*arrays[place][:n], value, *arrays[place][n + 1 :])
            return how(how.read(*stored), *arrays[:place], changed, *arrays[place + 1 :])

        return jax.jvp(of_one, (jnp.broadcast_to(arrays[place][n], t.shape),), (t,))[1].astype(wide)

    # Where several parts read the cotangent times a derivative that takes the data to compute, XLA would compute that
    # once and store it in float32. With arrays of its own, behind a barrier, each part computes it as it reads. But
    # that of a residual is stored anyway, and is that of what is added, too. On a TPU a ResNet-50 moves 8 % more with
    # barriers, in 211 kernels more (`benchmarks/compile_report.py --targets tpu-v5e-1 --cases resnet`).
    own = [arrays]
    stored_anyway = not is_zero(t_data[-1])

    def barrier(arrays):
        small, further = arrays  # in one barrier all would vary over the replicas over which one of them does
        return [lax.optimization_barrier(small), tuple(map(lax.optimization_barrier, further))]

    def behind_a_barrier():
        if how.after is not None:  # the types differ: no branches
            own.append(by_platform(own[-1], while_tracing=True, tpu=lambda v: v, default=barrier))
        return own[-1]

    first, parts = behind_a_barrier(), []
    if not all(map(is_zero, t_data)):
        parts.append(recomputed(along_data)([None if is_zero(t) else t for t in t_data], stored, *first))
    for place, ts in enumerate(t_arrays):
        changed = [n for n, t in enumerate(ts) if not is_zero(t)]
        shared = len(ts) - 1 if place == 0 and stored_anyway else None
        args = [ts[n] for n in changed], stored, [first if n == shared else behind_a_barrier() for n in changed]
        functions = [partial(along, place, n) for n in changed]
        separate = partial(_separately, functions, how.dtype)
        if place == 0 and _are_a_pair(args[0]):
            paired = partial(_paired, functions, data[0].shape)
            parts.append(recomputed(partial(by_platform, while_tracing=False, cuda=paired, default=separate))(*args))
        elif changed:
            parts.append(separate(*args))
    return reduce(jnp.add, parts).astype(how.dtype) if parts else None


def _separately(functions, dtype, ts, stored, arrays):
    """The sum of what each function makes of its tangent."""
    return reduce(jnp.add, (_part(f, dtype, t, stored, *own) for f, t, own in zip(functions, ts, arrays, strict=True)))


def _are_a_pair(ts):
    return len(ts) == 2 and ts[0].shape == ts[1].shape and not any(map(jnp.iscomplexobj, ts))


def _paired(functions, shape, ts, stored, arrays):
    """The same of two tangents that are made the parts of a complex one: in the transpose, a single sum over the data.

    A cotangent that two sums read XLA for GPUs computes and stores first, if that takes more than a comparison; for
    one sum it computes it as it reads. With a SiLU outside of the norm that is 11 passes over the data or 8
    (`benchmarks/compile_report.py --targets h200-1 --cases epilogues`).
    """

    def both(t, stored, *arrays):
        t = jnp.broadcast_to(t, shape)
        return functions[0](t.real, stored, *arrays) + functions[1](t.imag, stored, *arrays)

    return recomputed(both)(lax.complex(*ts), stored, *arrays[-1])


def _part(function: Function, dtype: Any, t: jax.Array, *rest: Any) -> jax.Array:
    """What ``function`` makes of the tangent ``t`` of one small argument, so that its transpose is a `total`.

    A cotangent has the dtype of the result, and would be an array in float32 again. A result that becomes part of an
    output in bfloat16, as ``dtype`` says, is handed over in `halves` instead, so that its cotangent stays as it is.
    """

    def on_cpu(t, *rest):
        shape = jax.eval_shape(function, t, *rest).shape
        if t.ndim == len(shape):
            axes = [a for a, size in enumerate(shape) if t.shape[a] != size]
            if 0 not in axes:
                t = jnp.broadcast_to(t, [1 if a in axes[-1:] else size for a, size in enumerate(shape)])
        if dtype != jnp.bfloat16:
            return outlined(recomputed(function))(t, *rest)
        return joined(outlined(recomputed(lambda *args: halves(function(*args))))(t, *rest))

    if one_cpu():
        return recomputed(lambda *args: lax.platform_dependent(*args, cpu=on_cpu, default=function))(t, *rest)
    return recomputed(function)(t, *rest)


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
