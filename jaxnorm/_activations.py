"""Activations by name, and the inverses of those that have one."""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxnorm import _axes

Function = Callable[[jax.Array], jax.Array]
Activation = str | Function | None


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


class After(NamedTuple):
    """What follows the affine map, as it was given.

    Attributes:
      activation: None, a name or a function.
      residual: None, or an array that is added before the activation.
      invertible: whether the backward pass recovers the input from the output.
    """

    activation: Any = None
    residual: Any = None
    invertible: bool = False


NOTHING = After()


def identity(x: jax.Array) -> jax.Array:
    """``x``."""
    return x


def _unsoftplus(y: jax.Array) -> jax.Array:
    return y + jnp.log(-jnp.expm1(-y))


@cache
def _unleaky_relu(slope: float) -> Function:
    return lambda y: jnp.where(y >= 0, y, y / slope)


NAMED: dict[str, Function] = {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "leaky_relu": jax.nn.leaky_relu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}


def check_activation(function: str, activation: Any) -> Function:
    """The function that ``activation`` stands for: None, a name, or itself."""
    if activation is None:
        return identity
    if isinstance(activation, str) and activation in NAMED:
        return NAMED[activation]
    if isinstance(activation, str) or not callable(activation):
        rule = f"activation must be None, callable, or one of {', '.join(NAMED)}"
        _axes.fail(function, rule, {"activation": activation}, ValueError if isinstance(activation, str) else TypeError)
    return cast(Function, activation)


def inverse_of(function: str, activation: Any) -> Function:
    """The inverse of ``activation``."""
    chosen = check_activation(function, activation)
    if isinstance(chosen, InvertibleActivation):
        return chosen.inverse
    if chosen is identity:
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
    _axes.fail(function, rule, {"activation": activation})
