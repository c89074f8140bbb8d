"""The norms of a model: Flax's and ours, Linen and NNX, chosen by their paths."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn
from flax import nnx

from jaxnorm import linen as our_linen
from jaxnorm import nnx as our_nnx
from jaxnorm.linen import _norms as our_linen_norms
from jaxnorm.nnx import _norms as our_nnx_norms

Where = str | Callable[[str], bool] | None
"""Which norms: a regular expression that matches the whole path, a function of it, or None for all."""

NAMES = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
FLAX_LINEN = {getattr(nn, name): getattr(our_linen, name) for name in NAMES}
FLAX_NNX = {getattr(nnx, name): getattr(our_nnx, name) for name in NAMES}
OUR_LINEN: Any = our_linen_norms.Layer
OUR_NNX: Any = our_nnx_norms.Layer
LINEN: Any = (*FLAX_LINEN, OUR_LINEN)
NNX: Any = (*FLAX_NNX, OUR_NNX)
BATCH_NORMS: Any = (nn.BatchNorm, our_linen.BatchNorm, nnx.BatchNorm, our_nnx.BatchNorm)


def chosen(where: Where) -> Callable[[str], bool]:
    """``where`` as a function of a path."""
    if callable(where):
        return where
    return lambda path: where is None or re.fullmatch(where, path) is not None


def nnx_norms(function: str, model: Any, where: Where) -> Iterator[tuple[str, Any]]:
    """Paths and modules of the norms in an NNX module; raise if there are none."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"{function}: model must be an nnx.Module; got {type(model).__name__}.")
    modules = [("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    norms = [(path, module) for path, module in modules if isinstance(module, NNX)]
    found = [(path, module) for path, module in norms if chosen(where)(path)]
    if not found:
        have = ", ".join(path or "the module itself" for path, _ in norms) or f"none in {type(model).__name__}"
        raise ValueError(f"{function}: where must choose at least one norm; got {where!r}, and there are {have}.")
    yield from found


def linen_fields(module: nn.Module) -> dict[str, Any]:
    """The attributes that a Linen module was made with, but for its name and place."""
    fields = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    return {name: getattr(module, name) for name in fields}


def accepted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """What of the arguments ``given`` a function takes."""
    return {name: value for name, value in given.items() if name in inspect.signature(function).parameters}


def call_arguments(method: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(inspect.signature(method).bind(*args, **kwargs).arguments)
