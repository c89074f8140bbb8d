"""The rule put together: measure, merge over replicas, adjust, map; and all of it read from the output.

In the invertible mode (Rota Bulo et al., "In-Place Activated BatchNorm", 2018) the derivative is the same, but the data
is read from the output. That is all in which it differs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxnorm._axes import extract, laid_out, statistics_dtype, weights_of
from jaxnorm._epilogue import Formula, Function, applied, hoist, identity, is_ours
from jaxnorm._moments import Moments, Statistics
from jaxnorm._replicas import merge_replicas, vary
from jaxnorm._rule import OUTPUT, How, as_stored, measured_statistics, named, normalized, relative, saved
from jaxnorm._xla import Map, spread


def _measure(how: How, read: Function, data, stored, weights, near, origin=None, known=None, differentiated=False):
    """The statistics of this array, and of all replicas together."""
    function = measured_statistics.fun if how.plain else measured_statistics
    local = function(how, read, differentiated, data, stored, weights, near, origin, known)
    if not how.plain:
        local = local._replace(center=lax.stop_gradient(local.center))
    return local, merge_replicas(local, how.replicas, saved)


class Arguments(NamedTuple):
    """What is differentiated, in the shapes in which `standardize` takes it, which says what it is."""

    x: jax.Array
    mask: Any = None
    residual: Any = None
    given: Any = None
    scale: Any = None
    bias: Any = None
    epsilon: Any = None
    near: Any = None
    of_adjust: tuple[Any, ...] = ()
    of_activation: tuple[Any, ...] = ()
    of_inverse: tuple[Any, ...] = ()


def _laid_out(how: How, a: Arguments) -> Arguments:
    """All in the rank of ``x``."""

    def lay(value):
        return laid_out(value, how.features, a.x)

    given = None
    if a.given is not None:
        mean, var = map(lay, a.given)
        given = Statistics(jnp.ones_like(var), mean, None, var)  # pyright: ignore[reportArgumentType]
    near = None if a.near is None else lax.stop_gradient(lay(a.near))
    mask = weights_of(a.mask, a.x)
    return a._replace(mask=mask, given=given, scale=lay(a.scale), bias=lay(a.bias), near=near)


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
    stored = (a.x, a.mask, a.residual) if stored is None else stored
    local = statistics = used = a.given
    if local is None:
        local, statistics = _measure(how, read, data, stored, a.mask, a.near, origin, known, differentiated)
        used = statistics if how.adjust is None else how.adjust(statistics, *a.of_adjust)
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
        z = how.inverse(y.astype(used.center.dtype), *a.of_inverse)
        residual = None if a.residual is None else a.residual.astype(z.dtype)
        z = z if residual is None else z - residual
        z = z if a.bias is None else z - a.bias
        z = z if a.scale is None else z * (1 / a.scale)  # a division for every value would cost XLA an array
        return z * jnp.sqrt(used.var + a.epsilon), residual

    stored = (y, primals[0]._replace(x=None), used)
    _, t = jax.jvp(lambda a: _standardize(how, a, recovered, stored, used, local), primals, tangents)
    return (y, statistics, used, local), t


def _moments(how: How, statistics: Statistics) -> Any:
    if how.kept is None:
        return None
    moments = statistics.center + statistics.offset, statistics.var, statistics.count
    return Moments(*(extract(m, how.kept) for m in moments))


@partial(jax.jit, static_argnums=0)
def _compiled(how: How, a: Arguments) -> tuple[jax.Array, Any]:
    """One program for each shape, traced and differentiated once, however many layers have it."""
    a = _laid_out(how, a)
    y, statistics, *_ = (_standardize if how.inverse is None else _invertible)(how, a)
    return y, _moments(how, statistics)


@partial(jax.jit, static_argnums=0)
def statistics(how: How, a: Arguments) -> Statistics:
    """The statistics of ``x``, reduced axes kept with size one."""
    a = _laid_out(how, a)
    stored = (a.x, a.mask, None)
    return _measure(how, as_stored, as_stored(*stored), stored, a.mask, a.near)[1]


@partial(jax.jit, static_argnums=0)
def moments(how: How, a: Arguments) -> Moments:
    """`statistics`, rounded."""
    return _moments(how, statistics(how, a))


@dataclass(frozen=True)
class Instead(Formula):
    """An ``adjust`` that was made before."""

    def __call__(self, measured: Statistics, adjusted: Any) -> Any:
        """What it was."""
        return adjusted


def standardize(how: How, a: Arguments) -> tuple[jax.Array, Any]:
    """Normalize ``x`` by statistics ``given`` or by its own, and report the `Moments` of the axes ``kept``.

    For the backward pass ``x`` is kept, in its own dtype, with statistics; the rest is recomputed. Where there is an
    inverse, the output is kept in its place. A function of the caller is called as it is where nobody differentiates,
    between programs of ours, so that none is traced for one call; else what it closes over becomes an argument.
    """
    traced = any(isinstance(v, Tracer) for v in jax.tree.leaves(a))
    if how.adjust is not None and not is_ours(how.adjust):
        measured = statistics(how._replace(kept=None, adjust=None, activation=identity, inverse=None), a)
        adjust, of_adjust = hoist(how.adjust, measured) if traced else (Instead(), (how.adjust(measured),))
        how, a = how._replace(adjust=adjust), a._replace(of_adjust=of_adjust)
    if is_ours(how.activation):
        return _compiled(how, a)
    if not traced:
        y, moments = _compiled(how._replace(activation=identity, inverse=None), a)
        return applied(how.activation, y), moments
    x = vary(a.x, a)
    activation, of_activation = hoist(how.activation, x.astype(how.dtype))
    inverse, of_inverse = how.inverse, ()
    if inverse is not None:
        inverse, of_inverse = hoist(inverse, x.astype(statistics_dtype(x.dtype)))
    how = how._replace(activation=activation, inverse=inverse)
    return _compiled(how, a._replace(of_activation=of_activation, of_inverse=of_inverse))


@partial(jax.jit, static_argnums=(0, 1))
def pointwise(
    formula: Function, features: tuple[int, ...], x: jax.Array, mask: Any, of_features: tuple[Any, ...], *small: Any
) -> jax.Array:
    """``formula(x, *of_features, *small)``, which need not be affine, in the dtype of ``x``; ``x`` alone is kept.

    The arithmetic is that of the statistics; NaN and inf that are masked out read as zero.
    """
    stored = (x, weights_of(mask, x), None)
    how = Map(as_stored, lambda x, _, *small: formula(x, *small), None, x.dtype)
    small = (*(laid_out(v, features, x) for v in of_features), *small)
    return spread(how, as_stored(*stored), stored, vary(small, x), ())
