"""Run a model and measure the inputs of its batch norms, in the variables that hold their averages.

Those exist wherever the model may run, within ``nn.scan``, ``nn.remat``, ``nnx.vmap`` and their like, and are prepared
before it runs: what a loop carries keeps its structure. A norm that is called several times merges what it sees.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import meta

from jaxnorm import Moments, merge_moments, moments
from jaxnorm.surgery._channels import marked
from jaxnorm.surgery._norms import (
    BATCH_NORMS,
    OUR_BATCH_NORMS,
    SWITCHES,
    Where,
    accepted,
    base_of,
    chosen,
    is_frozen,
    linen_call,
    linen_fields,
    linen_method,
    linen_stranger,
    nnx_norms,
    warn_of_strangers,
)

Stats = dict[str, dict[str, Any]]
"""By path: mean, var and count of what a norm saw, and whatever ``extra`` makes of it, in the shape of the averages."""
Extra = Callable[[jax.Array, tuple[int, ...], Moments], dict[str, jax.Array]]


def nothing_more(x: jax.Array, features: tuple[int, ...], batch: Moments) -> dict[str, jax.Array]:
    """No extra."""
    return {}


@dataclass(frozen=True)
class Measuring:
    """How to measure the norms of a model.

    Attributes:
      function: of the user's, for messages.
      names: of what ``extra`` gives.
      extra: more statistics of the input of each norm.
      where: the norms that are measured; all others normalize by their running averages.
      features: the feature axes of each norm, by path, once the model was traced.
      ranks: of the moments of one norm, without the axes of a stack, by path in the order of the calls, once traced.
    """

    function: str
    names: tuple[str, ...] = ()
    extra: Extra = nothing_more
    where: Where = None
    features: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def prepared(self, mean: Any, settled: Any) -> dict[str, jax.Array]:
        """Variables in the shape of a running mean, for what is measured, and whether the averages are settled."""
        mean = jnp.zeros_like(mean)
        start = {name: jnp.zeros_like(mean.real) for name in ("var", "count", *self.names)}
        return {_name(n): v for n, v in {"mean": mean, **start, "settled": mean.real + settled}.items()}

    def measures(self, path: str, norm: Any) -> bool:
        """Whether this norm is measured: those chosen, or all that `freeze` has not frozen."""
        return not is_frozen(norm) if self.where is None else chosen(self.where)(path, norm)

    def write(self, get: Any, put: Any, path: str, x: Any, batch: Moments, features: tuple[int, ...]) -> None:
        """Merge what one call saw into the variables."""
        self.ranks.setdefault(path, batch.mean.ndim)
        self.features.setdefault(path, features)
        x = marked(x, path) if self.names else x
        old = {name: get(_name(name)) for name in (*Moments._fields, *self.names)}
        shape = old["mean"].shape
        now = Moments(*(jnp.broadcast_to(value, batch.mean.shape).reshape(shape) for value in batch))
        merged = merge_moments(Moments(*(old[name] for name in Moments._fields)), now)
        share = now.count / jnp.where(merged.count > 0, merged.count, 1)
        more = {name: value.reshape(shape) for name, value in self.extra(x, features, batch).items()}
        more = {name: (1 - share) * old[name] + share * value for name, value in more.items()}
        for name, value in (merged._asdict() | more).items():
            put(_name(name), value.astype(old[name].dtype))


def _name(name: str) -> str:
    return f"surgery_{name}"


def measure(
    how: Measuring, model: Any, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settled: dict[str, Any]
) -> Stats:
    """What each batch norm sees.

    It normalizes by its running averages where they are ``settled`` (by path, true or in the shape of the running
    mean), else by the statistics of the batch, as in training. ``variables`` are those of a Linen module, or the state
    of an NNX module that ``model`` is the graph definition of.
    """
    if isinstance(model, nn.Module):
        return _measure_linen(how, model, variables, args, kwargs, settled)
    return _measure_nnx(how, nnx.merge(model, variables), args, kwargs, settled)


class _Tape:
    """Moments that one call of our layer measured, and whether its averages are settled."""

    batch: Moments
    settled: jax.Array


def _taped(kind: Any, tape: _Tape) -> Any:
    """A batch norm of jaxnorm that records what it measures, by the hooks of its class."""

    class Taped(kind):
        @nn.nowrap
        def _by_batch(self, x, running, **given):
            y, tape.batch = kind._by_batch(self, x, running, **given)
            given = {n: value for n, value in given.items() if n not in ("axis_name", "axis_index_groups")}
            return jnp.where(tape.settled, self._by_averages(x, running, **given), y), tape.batch

    return Taped


def _features(norm: Any, x: jax.Array) -> tuple[int, ...]:
    axis = norm.axis if isinstance(norm.axis, tuple | list) else (norm.axis,)
    return tuple(sorted(a % x.ndim for a in axis))


def _bound(norm: Any) -> tuple[Any, Any]:
    """Axis name and groups of replicas where that axis is mapped; without one there is one replica."""
    try:
        if norm.axis_name is not None:
            jax.lax.axis_index(norm.axis_name)
    except NameError:
        return None, None
    return norm.axis_name, norm.axis_index_groups


def _measure_nnx(how: Measuring, network: Any, args: Any, kwargs: dict[str, Any], settled: dict[str, Any]) -> Stats:
    recording = cache(lambda kind: _recording(kind, how))
    norms = {path: norm for path, norm in nnx_norms(how.function, network, None) if isinstance(norm, BATCH_NORMS)}
    for path, norm in norms.items():
        if not how.measures(path, norm):
            norm.use_running_average = True
            continue
        for name, value in how.prepared(norm.mean[...], settled.get(path, False)).items():
            setattr(norm, name, nnx.BatchStat(value))
        norm.surgery_path = path
        object.__setattr__(norm, "__class__", recording(base_of(norm)))
    network(*args, **kwargs)
    names = (*Moments._fields, *how.names)
    return {path: {name: getattr(norms[path], _name(name))[...] for name in names} for path in how.ranks}


def _recording(kind: Any, how: Measuring) -> type:
    """A batch norm of NNX that writes into its variables what it sees."""
    tape = _Tape()
    own = _taped(kind, tape) if issubclass(kind, OUR_BATCH_NORMS) else kind

    class Recording(own):
        def __call__(self, x, *args, **kwargs):
            given = dict(inspect.signature(kind.__call__).bind(self, x, *args, **kwargs).arguments)
            given = {name: value for name, value in list(given.items())[2:] if name not in SWITCHES}
            x, before = jnp.asarray(x), vars(self).copy()
            averages = {name: getattr(self, name)[...] for name in ("mean", "var")}

            def call(use_running_average):
                switches = dict.fromkeys(SWITCHES, False) | {"use_running_average": use_running_average}
                self.use_running_average = use_running_average
                y = kind.__call__(self, x, **given, **accepted(kind.__call__, switches))
                for name, value in averages.items():
                    getattr(self, name)[...] = value
                return y

            self.axis_name, self.axis_index_groups = _bound(self)
            y, batch = _both(call, tape, self, x, given.get("mask"), self.surgery_settled[...])
            how.write(lambda n: getattr(self, n)[...], _setter(self), self.surgery_path, x, batch, _features(self, x))
            for name in ("axis_name", "axis_index_groups", "use_running_average"):
                setattr(self, name, before[name])
            return y

    return Recording


def _setter(norm: Any) -> Callable[[str, Any], None]:
    return lambda name, value: getattr(norm, name).set_value(value)


def _measure_linen(
    how: Measuring, model: nn.Module, variables: Any, args: Any, kwargs: dict[str, Any], settled: dict[str, Any]
) -> Stats:
    tape, inside, strangers = _Tape(), [False], dict[str, Any]()
    taped = cache(lambda kind: _taped(kind, tape))

    def interceptor(next_function, args, kwargs, context):
        module: Any = context.module
        given = None if inside[0] else linen_call(context, args, kwargs)
        path = "/".join(module.path)
        if given is None:
            y = next_function(*args, **kwargs)
            strangers.update({path: module} if not inside[0] and linen_stranger(module) else {})
            return y
        if not isinstance(module, BATCH_NORMS):
            return next_function(*args, **kwargs)
        given = {name: value for name, value in given.items() if name not in SWITCHES}
        x, method = jnp.asarray(given.pop("x")), linen_method(module)
        held = {"params": module.variables.get("params", {}), "batch_stats": module.variables["batch_stats"]}
        axis_name, groups = _bound(module)
        off = {"axis_name": axis_name, "axis_index_groups": groups, **dict.fromkeys(SWITCHES)}
        kind = taped(type(module)) if isinstance(module, OUR_BATCH_NORMS) else type(module)
        pure = kind(**linen_fields(module) | accepted(kind, off), parent=None)

        def call(use_running_average):
            switches = dict.fromkeys(SWITCHES, False) | {"use_running_average": use_running_average}
            return pure.apply(held, x, method=method, **given, **accepted(method, switches), mutable="batch_stats")[0]

        inside[0] = True
        try:
            if not how.measures(path, module):
                return call(True)
            get = lambda name: module.get_variable("batch_stats", name)  # noqa: E731
            y, batch = _both(call, tape, pure, x, given.get("mask"), get(_name("settled")))
        finally:
            inside[0] = False
        put = lambda name, value: module.put_variable("batch_stats", name, value)  # noqa: E731
        how.write(get, put, path, x, batch, _features(module, x))
        return y

    def prepared(tree, path):
        if not isinstance(tree, Mapping):
            return tree
        new = {name: prepared(inner, (*path, name)) for name, inner in tree.items()}
        if {"mean", "var"} <= set(tree):
            new |= how.prepared(meta.unbox(tree["mean"]), settled.get("/".join(path), False))
        return new

    variables = {**variables, "batch_stats": prepared(variables.get("batch_stats", {}), ())}
    with nn.intercept_methods(interceptor):
        _, updates = model.apply(variables, *args, **kwargs, mutable=["batch_stats"])
    warn_of_strangers(how.function, strangers)
    names = (*Moments._fields, *how.names)
    found = {path: at(updates["batch_stats"], path) for path in how.ranks}
    return {path: {name: stats[_name(name)] for name in names} for path, stats in found.items()}


def at(tree: Any, path: str) -> Any:
    """The part of a nested dictionary at ``path``."""
    for name in path.split("/") if path else ():
        tree = tree[name]
    return tree


def _both(
    call: Callable[[bool], Any], tape: _Tape, norm: Any, x: jax.Array, mask: Any, settled: jax.Array
) -> tuple[jax.Array, Moments]:
    """The output of a norm, by its averages where they are settled; and the moments of its batch."""
    tape.settled = settled.any()
    if isinstance(norm, OUR_BATCH_NORMS):
        return call(False), tape.batch
    axes = tuple(a for a in range(x.ndim) if a not in _features(norm, x))
    batch = moments(x, axes, mask=mask, axis_name=norm.axis_name, axis_index_groups=norm.axis_index_groups)
    return jnp.where(tape.settled, call(True), call(False)), batch
