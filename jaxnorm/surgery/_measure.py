"""Run a model of Flax and measure the inputs of its batch norms, in the variables that hold their averages.

Those exist wherever the model may run: within ``nn.scan``, ``nn.remat``, ``nnx.vmap`` and their like.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxnorm import Moments, moments
from jaxnorm.surgery._norms import BATCH_NORMS, LINEN, accepted, call_arguments, linen_fields, nnx_norms

Stats = dict[str, dict[str, Any]]
"""By path: mean, var and count of the batch, and whatever ``extra`` makes of the input."""
Extra = Callable[[jax.Array, int | tuple[int, ...], Moments], dict[str, jax.Array]]


def nothing_more(x: jax.Array, axis: int | tuple[int, ...], batch: Moments) -> dict[str, jax.Array]:
    """No extra."""
    return {}


def measure(
    model: Any, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settled: frozenset[str], extra: Extra
) -> Stats:
    """What each batch norm sees, those ``settled`` left out.

    They normalize by their running averages, all others by the statistics of the batch, as in training. ``variables``
    are those of a Linen module, or the state of an NNX module that ``model`` is the graph definition of.
    """
    if isinstance(model, nn.Module):
        return _measure_linen(model, variables, args, kwargs, settled, extra)
    return _measure_nnx(nnx.merge(model, variables), args, kwargs, settled, extra)


def _measure_nnx(
    network: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any], settled: frozenset[str], extra: Extra
) -> Stats:
    norms = {path: norm for path, norm in nnx_norms("measure", network, None) if isinstance(norm, BATCH_NORMS)}
    called: list[str] = []
    recording = cache(lambda kind: _recording(kind, settled, extra, called))
    names: dict[str, list[str]] = {}
    for path, norm in norms.items():
        mean, var = norm.mean[...], norm.var[...]
        made = jax.eval_shape(lambda m=mean, v=var: extra(jnp.zeros((2, *m.shape)), m.ndim, Moments(m, v, v)))
        names[path] = [*Moments._fields, *made]
        norm.surgery_path = path
        for name in names[path][2:]:
            setattr(norm, name, nnx.BatchStat(jnp.zeros_like(mean)))
        object.__setattr__(norm, "__class__", recording(type(norm)))
    network(*args, **kwargs)
    return {path: {name: getattr(norms[path], name)[...] for name in names[path]} for path in dict.fromkeys(called)}


def _recording(kind: type, settled: frozenset[str], extra: Extra, called: list[str]) -> type:
    """A batch norm that writes into its averages what it sees."""

    class Recording(kind):
        def __call__(self, x, use_running_average=None, **given):
            use_running_average = self.surgery_path in settled
            given |= accepted(kind.__call__, {"update_running_average": False})
            axis_name, self.axis_name = self.axis_name, None
            y = kind.__call__(self, x, use_running_average, **given)
            self.axis_name = axis_name
            if not use_running_average:
                called.append(self.surgery_path)
                for name, value in _seen(x, self.axis, given.get("mask"), extra).items():
                    getattr(self, name)[...] = value.reshape(self.mean.shape)
            return y

    return Recording


def _seen(x: jax.Array, axis: Any, mask: Any, extra: Extra) -> dict[str, jax.Array]:
    features = tuple(a % x.ndim for a in (axis if isinstance(axis, tuple | list) else (axis,)))
    batch = moments(x, tuple(a for a in range(x.ndim) if a not in features), mask=mask)
    return {**batch._asdict(), **extra(x, features, batch)}


def _measure_linen(
    model: nn.Module,
    variables: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settled: frozenset[str],
    extra: Extra,
) -> Stats:
    inside, seen = [False], list[tuple[str, ...]]()

    def interceptor(next_function, args, kwargs, context):
        module: Any = context.module
        if inside[0] or not isinstance(module, BATCH_NORMS) or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        path = "/".join(module.path)
        given = call_arguments(type(module).__call__, (module, *args), kwargs)
        off = {"use_running_average": path in settled, "update_running_average": False}
        off |= {"axis_name": None, "axis_index_groups": None}
        given = {name: value for name, value in given.items() if name not in ("self", *off)}
        pure = module.clone(parent=None, name=None, **accepted(type(module), off))
        held = {"params": module.variables.get("params", {}), "batch_stats": module.variables["batch_stats"]}
        x = given.pop("x")
        inside[0] = True
        try:
            y, _ = pure.apply(held, x, **given, mutable="batch_stats")
        finally:
            inside[0] = False
        if path not in settled:
            seen.append(module.path)
            for name, value in _seen(x, module.axis, given.get("mask"), extra).items():
                module.put_variable("batch_stats", name, value)
        return y

    with nn.intercept_methods(interceptor):
        _, updates = model.apply(variables, *args, **kwargs, mutable=["batch_stats"])
    return {"/".join(path): at(updates["batch_stats"], path) for path in dict.fromkeys(seen)}


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """The part of a nested dictionary at ``path``."""
    for name in path:
        tree = tree[name]
    return tree


def linen_norms(model: nn.Module, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Kind and attributes of all norms that are called, by path, in order."""
    found: dict[str, Any] = {}

    def interceptor(next_function, args, kwargs, context):
        module = context.module
        if isinstance(module, LINEN) and context.method_name == "__call__":
            found.setdefault("/".join(module.path), {"kind": type(module).__name__, **linen_fields(module)})
        return next_function(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        jax.eval_shape(lambda variables, args: model.apply(variables, *args, **kwargs, mutable=True), variables, args)
    return found
