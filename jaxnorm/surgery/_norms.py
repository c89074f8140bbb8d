"""The norms of a model: Flax's and jaxnorm's, Linen and NNX, chosen by path or by kind."""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jaxnorm import linen as our_linen
from jaxnorm import nnx as our_nnx
from jaxnorm.linen import _norms as our_linen_norms
from jaxnorm.nnx import _norms as our_nnx_norms

Where = str | type | tuple[type, ...] | Callable[[str], bool] | None
"""Which norms: a regular expression of the whole path, kinds of norms, a function of the path, or None for all."""

NAMES = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
FLAX_LINEN = {getattr(nn, name): getattr(our_linen, name) for name in NAMES}
FLAX_NNX = {getattr(nnx, name): getattr(our_nnx, name) for name in NAMES}
OUR_LINEN: Any = our_linen_norms.Layer
OUR_NNX: Any = our_nnx_norms.Layer
OUR_BATCH_NORMS: Any = (our_linen.BatchNorm, our_nnx.BatchNorm)
LINEN: Any = (*FLAX_LINEN, OUR_LINEN)
NNX: Any = (*FLAX_NNX, OUR_NNX)
BATCH_NORMS: Any = (nn.BatchNorm, nnx.BatchNorm, *OUR_BATCH_NORMS)
SWITCHES = ("use_running_average", "update_running_average")


def chosen(where: Where) -> Callable[[str, Any], bool]:
    """``where`` as a function of a path and the norm there."""
    if isinstance(where, type | tuple):
        return lambda path, norm: isinstance(norm, where)
    if callable(where):
        return lambda path, norm: where(path)
    return lambda path, norm: where is None or re.fullmatch(where, path) is not None


def base_of(norm: Any) -> type:
    """The class of an NNX norm before `freeze`, which makes a subclass of it."""
    return next(kind for kind in type(norm).__mro__ if "surgery_frozen" not in vars(kind))


def is_frozen(norm: Any) -> bool:
    """Whether `freeze` froze this NNX norm."""
    return base_of(norm) is not type(norm)


def nnx_norms(function: str, model: Any, where: Where) -> Iterator[tuple[str, Any]]:
    """Paths and modules of the norms in an NNX module; raise if there are none."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"{function}: model must be an nnx.Module; got {type(model).__name__}.")
    modules = [("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    warn_of_strangers(function, {path: module for path, module in modules if _is_stranger(module, vars(module))})
    norms = [(path, module) for path, module in modules if isinstance(module, NNX)]
    found = [(path, module) for path, module in norms if chosen(where)(path, module)]
    if not found:
        have = ", ".join(path or "the module itself" for path, _ in norms) or f"none in {type(model).__name__}"
        raise ValueError(f"{function}: where must choose at least one norm; got {where!r}, and there are {have}.")
    yield from found


def _is_stranger(module: Any, names: Iterable[str]) -> bool:
    return {"mean", "var"} <= set(names) and not isinstance(module, (*LINEN, *NNX))


def linen_stranger(module: Any) -> bool:
    """Whether a Linen module keeps running averages and is no norm that is known."""
    averages = module.variables.get("batch_stats", {}) if module.scope is not None else {}
    return isinstance(averages, Mapping) and _is_stranger(module, averages)


def warn_of_strangers(function: str, strangers: Mapping[str, Any]) -> None:
    """Name the modules that keep running averages and are passed over."""
    if strangers:
        names = ", ".join(f"{path or 'the module itself'} ({type(m).__name__})" for path, m in strangers.items())
        rule = "modules with running averages that are neither Flax's norms nor jaxnorm's are passed over"
        warnings.warn(f"{function}: {rule}: {names}.", stacklevel=4)


def linen_fields(module: nn.Module) -> dict[str, Any]:
    """The attributes that a Linen module was made with, but for its name and place."""
    fields = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    return {name: getattr(module, name) for name in fields}


def accepted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """What of the arguments ``given`` a function takes."""
    return {name: value for name, value in given.items() if name in inspect.signature(function).parameters}


def linen_call(context: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """The arguments of a call of a Linen norm by name, the input first; None for any other call.

    A subclass may have a call of its own that passes them on to its base: then it is the call of that.
    """
    module = context.module
    if not isinstance(module, LINEN) or context.method_name != "__call__":
        return None
    signature = inspect.signature(context.orig_method)
    if isinstance(module, BATCH_NORMS) and "use_running_average" not in signature.parameters:
        return None
    given = dict(signature.bind(*args, **kwargs).arguments)
    return {"x": given.pop(next(iter(given))), **given}


def linen_method(module: Any) -> Callable[..., Any]:
    """The method whose arguments `linen_call` gives."""
    kinds = [kind for kind in type(module).__mro__ if "__call__" in vars(kind)]
    takes = [k.__call__ for k in kinds if "use_running_average" in inspect.signature(k.__call__).parameters]
    return takes[0] if isinstance(module, BATCH_NORMS) else kinds[0].__call__


def linen_norms(model: nn.Module, *args: Any, where: Where = None, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """Kind and attributes of the norms that are called in ``model.apply(*args, **kwargs)``, by path, in order."""
    found: dict[str, Any] = {}

    def interceptor(next_function, args, kwargs, context):
        if linen_call(context, args, kwargs) is not None:
            module, path = context.module, "/".join(context.module.path)
            if chosen(where)(path, module):
                found.setdefault(path, {"kind": type(module).__name__, **linen_fields(module)})
        return next_function(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        jax.eval_shape(lambda *args: model.apply(*args, **{"mutable": True, **kwargs}), *args)
    return found
