"""What follows the affine map: a residual is added, an activation applied, and both undone in the invertible mode.

And the functions that the engine is given, activations and others: of ours, and of users.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from jaxnorm._axes import fail

Function = Callable[..., Any]
Activation = str | Function | None


class Formula:
    """A function of ours, which jit recognizes: a frozen dataclass, equal to what has its class and its settings.

    The arrays that it needs are arguments after its own, so that they can be differentiated, and none is kept.
    """


class InvertibleActivation(NamedTuple):
    """An activation from whose output its input can be recovered, for ``invertible=True``.

    Attributes:
      forward: elementwise and strictly monotonic.
      inverse: undoes ``forward``.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> arsinh = jaxnorm.InvertibleActivation(jnp.arcsinh, jnp.sinh)
      >>> y, _ = jaxnorm.batch_norm(jnp.array([[-1.0], [1.0]]), epsilon=0.0, activation=arsinh, invertible=True)
      >>> jnp.sinh(y).round(5).tolist()
      [[-1.0], [1.0]]
    """

    forward: Function
    inverse: Function

    def __call__(self, x: jax.Array) -> jax.Array:
        """``forward(x)``."""
        return self.forward(x)


def identity(x: jax.Array) -> jax.Array:
    """``x``."""
    return x


NAMED: dict[str, Function] = {
    name: getattr(jax.nn, name)
    for name in [
        "celu",
        "elu",
        "gelu",
        "hard_sigmoid",
        "hard_silu",
        "hard_swish",
        "hard_tanh",
        "identity",
        "leaky_relu",
        "log_sigmoid",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "soft_sign",
        "softplus",
        "sparse_plus",
        "sparse_sigmoid",
        "squareplus",
        "swish",
        "tanh",
    ]
}
"""The activations of ``jax.nn`` that leave each value by itself."""

STATELESS = frozenset((identity, *NAMED.values()))
"""Which close over nothing."""


def check_activation(function: str, activation: Any) -> Function:
    """The function that ``activation`` stands for: None, a name, or itself."""
    if activation is None:
        return identity
    if isinstance(activation, str) and activation in NAMED:
        return NAMED[activation]
    if isinstance(activation, str) or not callable(activation):
        rule = f"activation must be None, callable, or one of {', '.join(NAMED)}"
        fail(function, rule, {"activation": activation}, ValueError if isinstance(activation, str) else TypeError)
    return cast(Function, activation)


def is_ours(function: Any) -> bool:
    """Whether ``function`` closes over nothing, and is the same function whenever it is equal."""
    return function is None or isinstance(function, Formula) or any(function is f for f in STATELESS)


def hoist(function: Function, *example: Any) -> tuple[Function, tuple[Any, ...]]:
    """``function`` with the arrays that it closes over as arguments after its own; and those arrays.

    So that they can be differentiated, as the slope of a PReLU. Traced as a new function: what jax has traced it finds
    again by identity, though the function may close over something else by now, and keeps; from 0.12 on in the jaxpr.
    """
    closed, shape = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*example)
    whole, tree, n = closed.jaxpr, jax.tree.structure(shape), len(example)
    jaxpr = Jaxpr(whole.constvars, whole.invars, whole.outvars, whole.eqns, whole.effects, whole.debug_info)

    def hoisted(*args: Any) -> Any:
        return tree.unflatten(jaxpr_as_fun(ClosedJaxpr(jaxpr, args[n:]))(*jax.tree.leaves(args[:n])))

    return hoisted, tuple(closed.consts)


def applied(activation: Function, z: jax.Array, *closed_over: jax.Array) -> jax.Array:
    """``activation(z)``, which must have shape and dtype of ``z``."""
    y = activation(z, *closed_over)
    if (y.shape, y.dtype) != (z.shape, z.dtype):
        expected = f"{z.shape} and {z.dtype}"
        raise ValueError(f"activation must keep shape and dtype, {expected}; got {y.shape} and {y.dtype}.")
    return y


def _unsoftplus(y: jax.Array) -> jax.Array:
    """What has vanished, as that of any input below -100 has in float32, is as far out as can be told."""
    y = jnp.maximum(y, jnp.finfo(y.dtype).tiny)
    return y + jnp.log(-jnp.expm1(-y))


@cache
def _unleaky_relu(slope: float) -> Function:
    return lambda y: jnp.where(y >= 0, y, y * (1 / slope))


def inverse_of(function: str, activation: Any) -> Function:
    """The inverse of ``activation``."""
    chosen = check_activation(function, activation)
    if isinstance(chosen, InvertibleActivation):
        return chosen.inverse
    if chosen in (identity, jax.nn.identity):
        return identity
    if chosen is jax.nn.softplus:
        return _unsoftplus
    base, given = (chosen.func, chosen) if isinstance(chosen, partial) else (chosen, partial(chosen))
    if base is jax.nn.leaky_relu:
        bound = inspect.signature(jax.nn.leaky_relu).bind(0.0, *given.args, **given.keywords)
        bound.apply_defaults()
        slope = bound.arguments["negative_slope"]
        if isinstance(slope, int | float) and slope > 0:
            return _unleaky_relu(slope)
    rule = (
        "invertible needs an activation that forgets nothing: None, softplus, leaky_relu (also as a partial with a"
        " positive negative_slope) or an InvertibleActivation; take leaky_relu for relu"
    )
    fail(function, rule, {"activation": activation})
