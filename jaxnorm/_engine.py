"""The rule put together: measure, merge over replicas, adjust, map; and all of it read from the output.

In the invertible mode (Rota Bulo et al., "In-Place Activated BatchNorm", 2018) the derivative is the same, but the data
is read from the output. That is all in which it differs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._epilogue import STATELESS, Function, hoist
from jaxnorm._moments import ChannelGroups, Moments, Statistics
from jaxnorm._replicas import merge_replicas, vary
from jaxnorm._rule import OUTPUT, How, as_stored, measured_statistics, named, normalized, relative, saved
from jaxnorm._xla import Map, apart, optimization_barrier, spread


def _measure(how: How, read: Function, data, stored, weights, near, origin=None, known=None, differentiated=False):
    """The statistics of this array, and of all replicas together."""
    function = measured_statistics.fun if how.plain else measured_statistics
    local = function(how, read, differentiated, data, stored, weights, near, origin, known)
    if not how.plain:
        local = local._replace(center=lax.stop_gradient(local.center))
    return local, merge_replicas(local, how.replicas, saved)


class Arguments(NamedTuple):
    """What is differentiated, all in the rank of ``x``; `standardize` says what it is."""

    x: jax.Array
    weights: jax.Array | None
    residual: jax.Array | None
    given: Statistics | None
    scale: jax.Array | None
    bias: jax.Array | None
    epsilon: jax.Array
    near: jax.Array | None = None
    of_adjust: tuple[jax.Array, ...] = ()
    of_activation: tuple[jax.Array, ...] = ()
    of_inverse: tuple[jax.Array, ...] = ()


def _standardize(
    how: How,
    a: Arguments,
    read: Function = as_stored,
    stored: Any = None,
    origin: Any = None,
    known: Any = None,
    differentiated: bool = False,
):
    """The output; the statistics measured and used; and, for who inverts it, those of this array."""
    data = as_stored(a.x, None, a.residual)  # of this only the derivative is used, which is that of what is stored
    stored = (a.x, a.weights, a.residual) if stored is None else stored
    local: Any = a.given
    statistics = used = local
    if local is None:
        local, statistics = _measure(how, read, data, stored, a.weights, a.near, origin, known, differentiated)
        adjust = apart(how.adjust) if isinstance(how.adjust, ChannelGroups) and not how.plain else how.adjust
        used = statistics if adjust is None else adjust(statistics, *a.of_adjust)
        if not isinstance(used, Statistics):
            used, statistics = used
    about = used if origin is None else relative(used, origin)
    y = normalized(how, read, data, stored, about, a.scale, a.bias, a.epsilon, a.of_activation)
    return y, statistics, used, local


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _invertible(how: How, a: Arguments):
    """`_standardize`, of which the derivative reads the output."""
    return _standardize(how, a)


@_invertible.defjvp
def _invertible_tangent(how, primals, tangents):
    y, *rest = _standardize(how, *primals, differentiated=True)
    y, (statistics, used, local) = named(OUTPUT, y), map(saved, rest)

    def recovered(y, a, used):
        z = how.inverse(y.astype(used.offset.dtype), *a.of_inverse)
        residual = None if a.residual is None else a.residual.astype(z.dtype)
        z = z if residual is None else z - residual
        z = z if a.bias is None else z - a.bias
        z = z if a.scale is None else z * (1 / a.scale)  # a division for every value would cost XLA an array
        return z * jnp.sqrt(used.var + a.epsilon), residual

    stored = (optimization_barrier(y), primals[0]._replace(x=None), used)
    _, t = jax.jvp(lambda a: _standardize(how, a, recovered, stored, used, local), primals, tangents)
    return (y, statistics, used, local), (optimization_barrier(t[0]), *t[1:])


def _run(how: How, a: Arguments) -> tuple[jax.Array, Moments]:
    y, statistics, *_ = (_standardize if how.inverse is None else _invertible)(how, a)
    return y, _moments(statistics)


def _moments(statistics: Statistics) -> Moments:
    return Moments(statistics.center + statistics.offset, statistics.var, statistics.count)


_compiled = jax.jit(_run, static_argnums=0, inline=True)


def standardize(how: How, a: Arguments) -> tuple[jax.Array, Moments]:
    """Normalize ``x`` by statistics ``given`` or by its own. What is reduced stays with size one in the moments.

    For the backward pass ``x`` is kept, in its own dtype, with statistics; the rest is recomputed. Where there is an
    inverse, the output is kept in its place.
    """
    own, stateless = isinstance(how.adjust, ChannelGroups | None), any(how.activation is f for f in STATELESS)
    if own and stateless:
        return _compiled(how, a)
    data = as_stored(a.x, a.weights, a.residual)
    if not stateless:
        activation, of_activation = hoist(how.activation, data[0].astype(how.dtype))
        how, a = how._replace(activation=activation), a._replace(of_activation=of_activation)
    if how.inverse is not None and not stateless:
        inverse, of_inverse = hoist(how.inverse, data[0])
        how, a = how._replace(inverse=inverse), a._replace(of_inverse=of_inverse)
    if how.inverse is not None and how.adjust is not None and not own:
        _, statistics = _measure(how, as_stored, data, (a.x, a.weights, a.residual), a.weights, a.near)
        adjust, of_adjust = hoist(how.adjust, statistics)
        how, a = how._replace(adjust=adjust), a._replace(of_adjust=of_adjust)
    return _run(how, a)


@partial(jax.jit, static_argnums=0, inline=True)
def statistics(how: How, x: jax.Array, weights: jax.Array | None, near: jax.Array | None) -> Statistics:
    """The statistics of ``x``, reduced axes kept with size one."""
    stored = (x, weights, None)
    return _measure(how, as_stored, as_stored(*stored), stored, weights, near)[1]


@partial(jax.jit, static_argnums=0, inline=True)
def moments(how: How, x: jax.Array, weights: jax.Array | None, near: jax.Array | None) -> Moments:
    """`statistics`, rounded."""
    return _moments(statistics(how, x, weights, near))


def pointwise(formula: Function, x: jax.Array, weights: jax.Array | None, *small: jax.Array | None) -> jax.Array:
    """``formula(x, *small)``, which need not be affine, in the dtype of ``x``; ``x`` alone is kept to derive it.

    The arithmetic is that of the statistics; NaN and inf that are masked out read as zero.
    """
    stored = (x, weights, None)
    how = Map(as_stored, lambda x, _, *small: formula(x, *small), None, x.dtype)
    return spread(how, as_stored(*stored), stored, vary(small, x), ())
