"""Freeze norms: running statistics, no updates, scale and bias untrained if wanted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jaxnorm.surgery._norms import BATCH_NORMS, LINEN, OUR_NNX, Where, accepted, call_arguments, chosen, nnx_norms


@contextmanager
def frozen(where: Where = None, *, affine: bool = False) -> Iterator[list[str]]:
    """Freeze the norms of Linen models that are called within: no change to their code.

    Batch norms use their running statistics, whatever they are told, and do not update them. It acts while a function
    is traced: what ``jax.jit`` has compiled before stays as it was. As a decorator it cannot be forgotten:
    ``jax.jit(surgery.frozen()(step))``.

    Args:
      where: a regular expression that matches the whole path of a norm, as in "Block_[01]/.*"; a function of the path;
        or None for all.
      affine: no gradients for scale and bias either, of any norm chosen. Weight decay would still move them: see
        `frozen_mask`.

    Yields:
      The paths of the norms frozen so far. None are, and nothing is raised, where ``where`` matches no norm.

    Raises:
      re.error: ``where`` is no regular expression; when the first norm is called.

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
    choose, seen, inside = chosen(where), [], [False]

    def interceptor(next_function, args, kwargs, context):
        is_norm = isinstance(context.module, LINEN) and context.method_name == "__call__"
        module: Any = context.module
        path = "/".join(module.path) if is_norm else ""
        if not is_norm or inside[0] or not choose(path) or not (affine or isinstance(module, BATCH_NORMS)):
            return next_function(*args, **kwargs)
        seen.extend([] if path in seen else [path])
        if module.is_initializing():
            return next_function(*args, **kwargs)
        given = call_arguments(type(module).__call__, (module, *args), kwargs)
        inside[0] = True
        try:
            return _call_frozen(module, given, affine)
        finally:
            inside[0] = False

    with nn.intercept_methods(interceptor):
        yield seen


def _call_frozen(module: Any, given: dict[str, Any], affine: bool) -> jax.Array:
    """The output of a norm that a pure function makes of its variables."""
    is_batch = isinstance(module, BATCH_NORMS)
    off: dict[str, Any] = {"use_running_average": True, "update_running_average": False} if is_batch else {}
    given = {name: value for name, value in given.items() if name not in ("self", *off)}
    pure = module.clone(parent=None, name=None, **accepted(type(module), off))
    variables = {name: collection for name, collection in module.variables.items()}
    if affine and "params" in variables:
        variables["params"] = jax.lax.stop_gradient(variables["params"])
    return pure.apply(variables, given.pop("x"), **given)


def freeze(model: nnx.Module, where: Where = None, *, affine: bool = False) -> None:
    """Freeze the norms of an NNX module, in place, by their attributes.

    ``model.train()`` sets the same attributes: freeze after it.

    Args:
      model: the module.
      where: a regular expression that matches the whole path of a norm, as in "blocks/[01]/.*"; a function of the path;
        or None for all.
      affine: no gradients for scale and bias either. Weight decay would still move them: see `frozen_mask`.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: no norm is chosen; or ``affine`` for one of Flax's, which cannot be told so.

    Example:
      >>> from flax import nnx
      >>> from jaxnorm import surgery
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> surgery.freeze(model, "layers/1")
      >>> model.layers[1].use_running_average
      True
    """
    _set("freeze", model, where, affine, running=True)


def unfreeze(model: nnx.Module, where: Where = None) -> None:
    """Undo `freeze`: batch statistics, updates of the averages, gradients of scale and bias.

    Args:
      model: the module.
      where: as for `freeze`.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: no norm is chosen.

    Example:
      >>> from flax import nnx
      >>> from jaxnorm import surgery
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> surgery.freeze(model)
      >>> surgery.unfreeze(model)
      >>> model.use_running_average
      False
    """
    _set("unfreeze", model, where, False, running=False)


def _set(function: str, model: nnx.Module, where: Where, affine: bool, running: bool) -> None:
    norms = list(nnx_norms(function, model, where))
    flax = [path for path, norm in norms if not isinstance(norm, OUR_NNX)]
    if affine and flax:
        rule = "Flax's norms always train their scale and bias; swap them for ours, or use frozen_mask alone"
        raise ValueError(f"{function}: {rule}; got affine=True for {', '.join(flax)}.")
    for _, norm in norms:
        if isinstance(norm, OUR_NNX):
            norm.trainable = not affine
        if isinstance(norm, BATCH_NORMS):
            norm.use_running_average = running
            if isinstance(norm, OUR_NNX):
                norm.update_running_average = False if running else None


def frozen_mask(model: Any, *args: Any, where: Where = None, **kwargs: Any) -> Any:
    """Which parameters are scale and bias of norms, for optax.

    ``optax.chain(optimizer, optax.masked(optax.set_to_zero(), mask))`` leaves them as they are, weight decay included.

    Args:
      model: an NNX module, or a Linen one.
      *args: for a Linen module, those of ``model.apply``: the variables and the inputs; arrays or shapes.
      where: as for `frozen`.
      **kwargs: for a Linen module, those of ``model.apply``.

    Returns:
      True for scale and bias of the norms chosen, False for all others: in the structure of ``variables["params"]``,
      or of ``nnx.state(model, nnx.Param)``.

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
        paths = {tuple(path.split("/")) if path else () for path, _ in nnx_norms("frozen_mask", model, where)}
        tree: Any = nnx.state(model, nnx.Param)
    else:
        with frozen(where, affine=True) as seen:
            jax.eval_shape(lambda *args: model.apply(*args, **{"mutable": True, **kwargs}), *args)
        if not seen:
            raise ValueError(f"frozen_mask: where must choose at least one norm; got {where!r}.")
        paths, tree = {tuple(path.split("/")) if path else () for path in seen}, args[0]["params"]
    return jax.tree_util.tree_map_with_path(lambda keys, _: _module_of(keys) in paths, tree)


def _module_of(keys: Any) -> tuple[str, ...]:
    """The path of the module that a variable belongs to."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
    return tuple(names[:-2] if isinstance(keys[-1], jax.tree_util.GetAttrKey) else names[:-1])
