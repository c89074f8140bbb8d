"""Replace the norms of a model."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxnorm import Moments, merge_moments
from jaxnorm.surgery._freeze import freeze, intercepted
from jaxnorm.surgery._norms import (
    BATCH_NORMS,
    FLAX_LINEN,
    FLAX_NNX,
    OUR_NNX,
    Where,
    accepted,
    base_of,
    chosen,
    is_frozen,
    linen_fields,
    nnx_norms,
)


@contextmanager
def swapped(into: type[nn.Module] | None = None, *, where: Where = None, **settings: Any) -> Iterator[list[str]]:
    """Run Linen models with other norms, with no change to their code, around ``init`` and ``apply``.

    Without ``into``, Flax's norms and their subclasses become jaxnorm's, with the same variables. With it, the norms
    chosen become that one. What the two have in common, settings, parameters and running averages, is carried over. It
    acts while a function is traced: what ``jax.jit`` has compiled before stays as it was.

    Args:
      into: a norm of `jaxnorm.linen` or of Flax, or any module whose parameters of the same name mean the same; None
        for jaxnorm's of the same name.
      where: a regular expression that matches the whole path of a norm, as in "Block_[01]/.*"; a kind of norm, or
        several, as ``nn.BatchNorm``; a function of the path; or None: for all of Flax's norms without ``into``, with it
        for the norms with running averages.
      **settings: attributes of the new norms, and arguments of their calls, as ``domain`` of `linen.SplitBatchNorm`.
        Without ``where`` they are for norms with running averages alone: ``axis_name`` would change layer norms too.

    Yields:
      The paths of the norms swapped so far.

    Raises:
      TypeError: a new norm has no attribute of a name in ``settings``; when the first norm is called.
      re.error: ``where`` is no regular expression; when the first norm is called.

    Warns:
      UserWarning: a norm has a setting that the new one has not; at the end, modules were called and no norm was
        swapped, or ``settings`` went to none, or some modules with running averages are not known.

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
    choose, seen, got = chosen(where), list[str](), list[str]()
    attributes, inputs = settings, dict[str, Any]()
    if into is not None:
        own = accepted(into, settings)
        inputs = {name: value for name, value in accepted(into.__call__, settings).items() if name not in own}
        attributes = {name: value for name, value in settings.items() if name not in inputs}

    def is_meant(module):
        return where is not None or isinstance(module, BATCH_NORMS)

    def choose_call(path, module, method):
        if into is None:
            return _is_of_flax(module, method, FLAX_LINEN) and choose(path, module)
        return type(module) is not into and is_meant(module) and choose(path, module)

    def call(path, module, given, next_function):
        new: Any = FLAX_LINEN[_base(module, FLAX_LINEN)] if into is None else into
        seen.extend([] if path in seen else [path])
        got.extend([path] if is_meant(module) else [])
        fields = linen_fields(module)
        kept = accepted(new, fields)
        _warn_of_lost("swapped", path, module, fields, kept | settings)
        norm: Any = new(**kept | (attributes if is_meant(module) else {}), parent=module.scope.rewound())
        return norm(given.pop("x"), **accepted(new.__call__, given), **inputs)

    with intercepted("swapped", choose_call, call):
        yield seen
    if seen and not got:
        _warn_of_nobody("swapped", settings)


def swap(model: nnx.Module, into: type[nnx.Module] | None = None, *, where: Where = None, **settings: Any) -> list[str]:
    """Replace the norms of an NNX module, in place.

    Without ``into``, Flax's norms and their subclasses become jaxnorm's. With it, the norms chosen become that one.
    Settings and variables that the two have in common are carried over; the variables are the same objects. Where the
    new norm keeps averages per domain, or per step, each starts with the old ones; back, they are merged by their
    counts. Averages that the new norm does not use stay in the module, for the way back, as in
    ``surgery.swap(model, nnx.BatchNorm, where=jaxnorm.nnx.GroupNorm)``.

    Args:
      model: the module; a single norm becomes another.
      into: a norm of `jaxnorm.nnx` or of Flax, or any module made with ``num_features`` and ``rngs`` whose variables of
        the same name mean the same; None for jaxnorm's of the same name.
      where: a regular expression that matches the whole path of a norm, as in "blocks/[01]/.*"; a kind of norm, or
        several, as ``nnx.BatchNorm``; a function of the path; or None: for all of Flax's norms without ``into``, with
        it for the norms with running averages.
      **settings: arguments of the new norms. Without ``where`` they are for norms with running averages alone:
        ``axis_name`` would change layer norms too.

    Returns:
      The paths of the norms swapped.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: no norm is chosen; or the variables do not fit, as a scale for each domain.

    Warns:
      UserWarning: nothing was swapped, or ``settings`` went to no norm; a norm has a setting that the new one has not;
        or modules with running averages are not known.

    Example:
      >>> from flax import nnx
      >>> from jaxnorm import surgery
      >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> surgery.swap(model, unbiased=True)
      ['layers/1']
      >>> model.layers[1].unbiased
      True
    """
    paths, got = list[str](), list[str]()
    for path, old in list(nnx_norms("swap", model, where)):
        kind, is_meant = base_of(old), where is not None or isinstance(old, BATCH_NORMS)
        if into is None:
            is_wanted = _is_of_flax(old, inspect.unwrap(kind.__call__), FLAX_NNX)
        else:
            is_wanted = is_meant and kind is not into
        if not is_wanted:
            continue
        paths.append(path)
        got.extend([path] if is_meant else [])
        new = FLAX_NNX[_base(old, FLAX_NNX)] if into is None else into
        _replace(path, old, new, settings if is_meant else {})
    if not paths:
        kinds = "all norms are jaxnorm's already" if into is None else f"none has running averages but {into.__name__}"
        warnings.warn(f"swap: nothing was swapped, for {kinds}; choose other norms by where.", stacklevel=2)
    elif not got:
        _warn_of_nobody("swap", settings)
    return paths


AVERAGES = ("mean", "var", "count")
MEANINGFUL = {"activation": None, "zero_centered_scale": False, "unbiased": False, "trainable": True}
"""Settings that change what a norm computes or learns, and the values by which they do not."""


def _base(norm: Any, kinds: dict[Any, Any]) -> Any:
    """The norm of Flax's that this is, or a subclass of."""
    return next((kind for kind in type(norm).__mro__ if kind in kinds), None)


def _is_of_flax(norm: Any, method: Any, kinds: dict[Any, Any]) -> bool:
    """Whether this computes what Flax's norm computes: a subclass may have a call of its own."""
    base = _base(norm, kinds)
    return base is not None and method is inspect.unwrap(base.__call__)


def _warn_of_lost(function: str, path: str, old: Any, had: dict[str, Any], kept: Any) -> None:
    lost = {name: had[name] for name, same in MEANINGFUL.items() if name in had and had[name] != same}
    lost = [f"{name}={value!r}" for name, value in lost.items() if name not in kept]
    if lost:
        what = f"{type(old).__name__} {path}".strip()
        warnings.warn(f"{function}: the new norm has no {', '.join(lost)}, which {what} has.", stacklevel=4)


def _warn_of_nobody(function: str, settings: dict[str, Any]) -> None:
    if settings:
        rule = "without where, settings are for norms with running averages, and there are none"
        warnings.warn(f"{function}: {rule}; got {', '.join(settings)}.", stacklevel=4)


def _replace(path: str, old: Any, new: Any, settings: dict[str, Any]) -> None:
    """Make of an NNX norm a ``new`` one, with what it takes of the settings and the variables."""
    had = dict(vars(old))
    features = had.get("num_features")
    if features is None:  # Flax's group norm keeps only what follows from it
        features = old.num_groups * old.group_size
    given = {name: value for name, value in had.items() if name in inspect.signature(new.__init__).parameters}
    _warn_of_lost("swap", path, old, had, [*given, *settings])
    if "num_groups" in given:
        given["group_size"] = None
    made: Any = new(**{"num_features": features, **given, **settings, "rngs": nnx.Rngs(0)})
    variables = {name: value for name, value in had.items() if isinstance(value, nnx.Variable)}
    owned = {name: own for name in variables if isinstance(own := vars(made).get(name), nnx.Variable)}
    fitted = {name: _fit(path, old, name, variables[name][...], own, features) for name, own in owned.items()}
    for name, array in fitted.items():
        variables[name].set_value(array)
    kept = owned if hasattr(made, "mean") else {*owned, *AVERAGES}
    for name, value in variables.items():
        if name in kept:
            setattr(made, name, value)
    was_frozen = is_frozen(old)
    object.__setattr__(old, "__class__", new)
    vars(old).clear()
    vars(old).update(vars(made))
    if was_frozen and isinstance(old, BATCH_NORMS):
        freeze(old)


def _fit(path: str, old: Any, name: str, array: Any, own: nnx.Variable, features: Any) -> Any:
    """``array`` in the shape of ``own``, but for the axes of a stack, which come first.

    For an axis of domains or steps what there was for all is repeated; without it averages are merged.
    """
    features = tuple(features) if isinstance(features, list | tuple) else (features,)
    of_averages, of_parameters = old._variable_shapes(features) if isinstance(old, OUR_NNX) else (features, features)
    had = of_averages if name in AVERAGES else of_parameters
    wanted, axis = own.shape, array.ndim - len(had)
    if had == wanted:
        return array
    if had == features:
        stack, rest = array.shape[:axis], array.shape[axis:]
        domains = wanted[: len(wanted) - len(features)]
        return jnp.broadcast_to(array.reshape(*stack, *(1 for _ in domains), *rest), (*stack, *domains, *rest))
    if name in AVERAGES and len(had) == len(wanted) + 1:
        return getattr(_merged(old, axis), name)
    raise ValueError(f"swap: {name} of {path} must fit the new norm; got shape {had} for {wanted}.")


def _merged(old: Any, axis: int) -> Moments:
    """The averages of all domains together; in equal parts where they have no counts."""
    mean, var = old.mean[...], old.var[...]
    count = old.count[...] if hasattr(old, "count") else jnp.ones_like(var)
    count = jnp.where(count.sum(axis, keepdims=True) > 0, count, 1)
    domains = (Moments(*(jnp.take(m, i, axis) for m in (mean, var, count))) for i in range(mean.shape[axis]))
    return reduce(merge_moments, domains)
