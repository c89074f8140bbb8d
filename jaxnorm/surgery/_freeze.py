"""Freeze norms: running statistics, no updates, scale and bias untrained if wanted."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jaxnorm.surgery._norms import (
    BATCH_NORMS,
    OUR_NNX,
    SWITCHES,
    Where,
    accepted,
    base_of,
    chosen,
    linen_call,
    linen_fields,
    linen_method,
    linen_norms,
    linen_stranger,
    nnx_norms,
    warn_of_strangers,
)


@contextmanager
def frozen(where: Where = None, *, affine: bool = False) -> Iterator[list[str]]:
    """Freeze the norms of Linen models that are called within: no change to their code.

    Batch norms use their running statistics, whatever they are called with, and do not update them. It acts while a
    function is traced: what ``jax.jit`` has compiled before stays as it was. As a decorator it cannot be forgotten:
    ``jax.jit(surgery.frozen()(step))``.

    Args:
      where: a regular expression that matches the whole path of a norm, as in "Block_[01]/.*"; a kind of norm, or
        several, as ``nn.BatchNorm``; a function of the path; or None for all.
      affine: no gradients for scale and bias either, of any norm chosen. Weight decay would still move them: see
        `frozen_mask`.

    Yields:
      The paths of the norms frozen so far.

    Raises:
      re.error: ``where`` is no regular expression; when the first norm is called.

    Warns:
      UserWarning: at the end, modules were called and no norm was frozen; or some with running averages are not known.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm import surgery
      >>> model, x = nn.BatchNorm(use_running_average=False, epsilon=0.0), jnp.array([[1.0], [3.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> with surgery.frozen():
      ...     model.apply(variables, x).tolist()
      [[1.0], [3.0]]
    """
    choose, seen, inside = chosen(where), list[str](), [False]

    def choose_call(path, module, method):
        return not inside[0] and (affine or isinstance(module, BATCH_NORMS)) and choose(path, module)

    def call(path, module, given, next_function):
        seen.extend([] if path in seen else [path])
        if module.is_initializing():
            return next_function()
        inside[0] = True
        try:
            return _call_frozen(module, given, affine)
        finally:
            inside[0] = False

    with intercepted("frozen", choose_call, call):
        yield seen


@contextmanager
def intercepted(function: str, choose: Any, call: Any) -> Iterator[None]:
    """``call(path, module, arguments, next_function)`` in place of the calls of Linen norms chosen; warn of none.

    ``choose`` gets path and module, and the method that is called, which may be that of a base class.
    """
    called, found, strangers = list[str](), list[str](), dict[str, Any]()

    def interceptor(next_function, args, kwargs, context):
        module: Any = context.module
        given, path = linen_call(context, args, kwargs), "/".join(module.path)
        if given is not None and choose(path, module, context.orig_method.func):
            found.append(path)
            return call(path, module, given, lambda: next_function(*args, **kwargs))
        y = next_function(*args, **kwargs)
        called.append(type(module).__name__)
        if linen_stranger(module):
            strangers[path] = module
        return y

    with nn.intercept_methods(interceptor):
        yield
    warn_of_strangers(function, strangers)
    if called and not found and not strangers:
        warnings.warn(f"{function}: no norm that was called in {called[-1]} was chosen.", stacklevel=4)


def _call_frozen(module: Any, given: dict[str, Any], affine: bool) -> jax.Array:
    """The output of a norm that uses its averages; with ``affine``, of a pure function of its variables."""
    is_batch, method = isinstance(module, BATCH_NORMS), linen_method(module)
    off: dict[str, Any] = {"use_running_average": True, "update_running_average": False} if is_batch else {}
    fields = linen_fields(module) | accepted(type(module), dict.fromkeys(off))
    given = {name: value for name, value in given.items() if name not in off} | accepted(method, off)
    if not affine:
        return method(type(module)(**fields, parent=module.scope.rewound()), **given)
    variables = {**module.variables, "params": jax.lax.stop_gradient(module.variables.get("params", {}))}
    return type(module)(**fields, parent=None).apply(variables, **given, method=method)


def freeze(model: nnx.Module, where: Where = None, *, affine: bool = False) -> list[str]:
    """Freeze the norms of an NNX module, in place, until `unfreeze`.

    Batch norms use their running statistics and do not update them, whatever ``model.train()`` sets or their calls say.
    Their class becomes a subclass of what it was, which says so.

    Args:
      model: the module.
      where: a regular expression that matches the whole path of a norm, as in "blocks/[01]/.*"; a kind of norm, or
        several, as ``nnx.BatchNorm``; a function of the path; or None for all.
      affine: no gradients for scale and bias either. Weight decay would still move them: see `frozen_mask`.

    Returns:
      The paths of the norms frozen.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: nothing is frozen: no norm is chosen, or none with running averages and without ``affine``; or
        ``affine`` for one of Flax's, which have no such setting.

    Warns:
      UserWarning: modules with running averages are not known.

    Example:
      >>> from flax import nnx
      >>> from jaxnorm import surgery
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> surgery.freeze(model, "layers/1")
      ['layers/1']
      >>> model.train()
      >>> model.layers[1].use_running_average
      True
    """
    norms = {path: n for path, n in nnx_norms("freeze", model, where) if affine or isinstance(n, BATCH_NORMS)}
    if not norms:
        rule = "without affine, where must choose a norm with running averages"
        raise ValueError(f"freeze: {rule}; got {where!r}.")
    flax = [path for path, norm in norms.items() if not isinstance(norm, OUR_NNX)]
    if affine and flax:
        rule = "Flax's norms always train their scale and bias; swap them for jaxnorm's, or use frozen_mask alone"
        raise ValueError(f"freeze: {rule}; got affine=True for {', '.join(flax)}.")
    for norm in norms.values():
        if isinstance(norm, OUR_NNX):
            norm.trainable = not affine
        if isinstance(norm, BATCH_NORMS):
            object.__setattr__(norm, "__class__", _frozen(base_of(norm)))
            norm.use_running_average = True
    return list(norms)


def unfreeze(model: nnx.Module, where: Where = None) -> list[str]:
    """Undo `freeze`: batch statistics, updates of the averages, gradients of scale and bias.

    Args:
      model: the module.
      where: a regular expression that matches the whole path of a norm, as in "blocks/[01]/.*"; a kind of norm, or
        several, as ``nnx.BatchNorm``; a function of the path; or None for all.

    Returns:
      The paths of the norms chosen.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: no norm is chosen.

    Example:
      >>> from flax import nnx
      >>> from jaxnorm import surgery
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> surgery.freeze(model), surgery.unfreeze(model)
      ([''], [''])
      >>> model.use_running_average
      False
    """
    norms = dict(nnx_norms("unfreeze", model, where))
    for norm in norms.values():
        object.__setattr__(norm, "__class__", base_of(norm))
        if isinstance(norm, OUR_NNX):
            norm.trainable = True
        if isinstance(norm, BATCH_NORMS):
            norm.use_running_average = False
    return list(norms)


@cache
def _frozen(kind: Any) -> type:
    """A batch norm of NNX that is frozen, whatever its call says."""

    class FrozenNorm(kind):
        surgery_frozen = True
        use_running_average = property(lambda self: True, lambda self, _: vars(self).update(use_running_average=True))

        def __call__(self, *args, **kwargs):
            given = dict(inspect.signature(kind.__call__).bind(self, *args, **kwargs).arguments)
            given = {name: value for name, value in list(given.items())[1:] if name not in SWITCHES}
            switches = {"use_running_average": True, "update_running_average": False}
            return kind.__call__(self, **given, **accepted(kind.__call__, switches))

    FrozenNorm.__name__ = FrozenNorm.__qualname__ = f"Frozen{kind.__name__}"
    return FrozenNorm


def frozen_mask(model: Any, *args: Any, where: Where = None, **kwargs: Any) -> Any:
    """Which parameters are scale and bias of norms, for optax.

    ``optax.chain(optimizer, optax.masked(optax.set_to_zero(), mask))`` leaves them unchanged, weight decay included;
    under ``nnx.Optimizer`` too.

    Args:
      model: an NNX module, or a Linen one.
      *args: for a Linen module, those of ``model.apply``: the variables and the inputs; arrays or shapes.
      where: a regular expression that matches the whole path of a norm, as in "Block_[01]/.*"; a kind of norm, or
        several, as ``nn.BatchNorm``; a function of the path; or None for all.
      **kwargs: for a Linen module, those of ``model.apply``.

    Returns:
      True for scale and bias of the norms chosen, False for all others: in the structure of ``variables["params"]``,
      or of ``nnx.as_pure(nnx.state(model, nnx.Param))``.

    Raises:
      ValueError: no norm is chosen.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm import surgery
      >>> model = nn.Sequential([nn.Dense(2), nn.LayerNorm()])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> surgery.frozen_mask(model, variables, jnp.ones((1, 2)))
      {'layers_0': {'bias': False, 'kernel': False}, 'layers_1': {'bias': True, 'scale': True}}
    """
    if isinstance(model, nnx.Module):
        found, tree = dict(nnx_norms("frozen_mask", model, where)), nnx.state(model, nnx.Param)
    else:
        found, tree = linen_norms(model, *args, where=where, **kwargs), args[0]["params"]
        if not found:
            raise ValueError(f"frozen_mask: where must choose at least one norm; got {where!r}.")
    paths = {tuple(path.split("/")) if path else () for path in found}
    mask = jax.tree_util.tree_map_with_path(lambda keys, _: _module_of(keys) in paths, tree)
    return nnx.as_pure(mask) if isinstance(model, nnx.Module) else mask  # as `nnx.Optimizer` hands parameters to optax


def _module_of(keys: Any) -> tuple[str, ...]:
    """The path of the module that a variable belongs to."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
    return tuple(names[:-2] if isinstance(keys[-1], jax.tree_util.GetAttrKey) else names[:-1])
