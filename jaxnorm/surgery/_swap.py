"""Other norms in the place of those of a model."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxnorm.surgery._norms import (
    FLAX_LINEN,
    FLAX_NNX,
    LINEN,
    Where,
    accepted,
    call_arguments,
    chosen,
    linen_fields,
    nnx_norms,
)


@contextmanager
def swapped(into: type[nn.Module] | None = None, *, where: Where = None, **settings: Any) -> Iterator[list[str]]:
    """Run Linen models with other norms, with no change to their code, around ``init`` and ``apply``.

    Without ``into``, Flax's norms become ours, of the same variables. With it, all norms chosen become that one; what
    the two have in common, settings, parameters and running averages, is carried over. It acts while a function is
    traced: what ``jax.jit`` has compiled before stays as it was.

    Args:
      into: a norm of `jaxnorm.linen`, or any module whose parameters of the same name mean the same; None for ours of
        the same name as Flax's.
      where: a regular expression that matches the whole path of a norm, as in "Block_[01]/.*"; a function of the path;
        or None for all.
      **settings: attributes of the new norms, and arguments of their calls, as ``domain`` of `linen.SplitBatchNorm`.

    Yields:
      The paths of the norms swapped so far. None are, and nothing is raised, where ``where`` matches no norm.

    Raises:
      TypeError: the new norm has no attribute of a name in ``settings``; when the first norm is called.
      re.error: ``where`` is no regular expression; likewise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm import linen, surgery
      >>> model, x = nn.BatchNorm(use_running_average=False), 1e5 + jnp.array([[-1.0], [1.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> with surgery.swapped(epsilon=0.0):
      ...     model.apply(variables, x, mutable="batch_stats")[0].tolist()
      [[-1.0], [1.0]]
      >>> with surgery.swapped(linen.LayerNorm):
      ...     model.apply(variables, x, mutable="batch_stats")[0].tolist()
      [[0.0], [0.0]]
    """
    choose, seen = chosen(where), []
    kinds = tuple(FLAX_LINEN) if into is None else LINEN
    inputs: dict[str, Any] = {}
    if into is not None:
        own = accepted(into, settings)
        inputs = {name: value for name, value in accepted(into.__call__, settings).items() if name not in own}
    attributes = {name: value for name, value in settings.items() if name not in inputs}

    def interceptor(next_function, args, kwargs, context):
        module = context.module
        is_norm = type(module) in kinds and context.method_name == "__call__" and type(module) is not into
        path = "/".join(module.path) if is_norm else ""
        if not is_norm or not choose(path):
            return next_function(*args, **kwargs)
        seen.extend([] if path in seen else [path])
        new = FLAX_LINEN[type(module)] if into is None else into
        fields = accepted(new, linen_fields(module)) | attributes
        given = call_arguments(type(module).__call__, (module, *args), kwargs)
        del given["self"]
        norm: Any = new(**fields, parent=module.scope.rewound())
        return norm(given.pop("x"), **accepted(new.__call__, given), **inputs)

    with nn.intercept_methods(interceptor):
        yield seen


def swap(model: nnx.Module, into: type[nnx.Module] | None = None, *, where: Where = None, **settings: Any) -> list[str]:
    """Put other norms in the place of those of an NNX module, in place.

    Without ``into``, Flax's norms become ours. With it, all norms chosen become that one. Settings and variables that
    the two have in common are carried over; the variables are the same objects. Where there is one for each domain,
    each begins with what there was for all.

    Args:
      model: the module; a norm by itself becomes another.
      into: a norm of `jaxnorm.nnx`, or any module made with ``num_features`` and ``rngs`` whose variables of the same
        name mean the same; None for ours of the same name as Flax's.
      where: a regular expression that matches the whole path of a norm, as in "blocks/[01]/.*"; a function of the path;
        or None for all.
      **settings: arguments of the new norms.

    Returns:
      The paths of the norms swapped.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: no norm is chosen.

    Example:
      >>> from flax import nnx
      >>> from jaxnorm import surgery
      >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> surgery.swap(model, unbiased=True)
      ['layers/1']
      >>> type(model.layers[1]).__module__
      'jaxnorm.nnx'
    """
    paths: list[str] = []
    for path, old in list(nnx_norms("swap", model, where)):
        new = FLAX_NNX.get(type(old)) if into is None else into
        if new is None or type(old) is new:
            continue
        paths.append(path)
        made = _make(new, old, settings)
        for name, value in vars(old).items():
            own = vars(made).get(name)
            if isinstance(value, nnx.Variable) and isinstance(own, nnx.Variable):
                _give_to_all(value, own, getattr(made, "num_features", None))
                setattr(made, name, value)
        object.__setattr__(old, "__class__", new)
        vars(old).clear()
        vars(old).update(vars(made))
    return paths


def _make(new: type[nnx.Module], old: Any, settings: dict[str, Any]) -> nnx.Module:
    """A new norm with what it takes of the settings of the old one."""
    features = getattr(old, "num_features", None)
    if features is None:  # Flax's group norm keeps only what follows from it
        features = old.num_groups * old.group_size
    kept = {name: value for name, value in vars(old).items() if name in _arguments(new)}
    if "num_groups" in kept:
        kept["group_size"] = None
    make: Any = new
    return make(**{"num_features": features, **kept, **settings, "rngs": nnx.Rngs(0)})


def _arguments(new: type[nnx.Module]) -> set[str]:
    """What a norm can be made with, what it only passes on included."""
    names: set[str] = set()
    for kind in (k for k in new.__mro__ if "__init__" in vars(k)):
        parameters = inspect.signature(vars(kind)["__init__"]).parameters
        names |= parameters.keys()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def _give_to_all(value: nnx.Variable, own: nnx.Variable, features: Any) -> None:
    """Repeat ``value`` along the axes that ``own`` has before those of the features, after those of a stack."""
    rank = len(features) if isinstance(features, tuple) else 1
    leading, stack = own.shape[: own.ndim - rank], value.shape[: value.ndim - rank]
    if leading:
        array = jnp.expand_dims(value[...], range(len(stack), len(stack) + len(leading)))
        value.set_value(jnp.broadcast_to(array, stack + own.shape))
