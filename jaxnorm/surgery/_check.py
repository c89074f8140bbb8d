"""What the tools of this package do with a model: tried, and compared with the model itself."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxnorm.surgery._fold import fold
from jaxnorm.surgery._freeze import freeze, frozen
from jaxnorm.surgery._inspect import inspect
from jaxnorm.surgery._norms import BATCH_NORMS, NNX, linen_norms
from jaxnorm.surgery._recalibrate import recalibrate
from jaxnorm.surgery._swap import swap, swapped

TOLERANCE = 1e-3
"""How far outputs may be apart, relative to the largest: rounding of a deep network in float32."""


class Checked(NamedTuple):
    """What one tool did with a model, as `check` tells it: see its example.

    Attributes:
      tool: its name.
      ok: whether it did what it says; None if the model has nothing for it.
      what: what it did, or why it did not.
    """

    tool: str
    ok: bool | None
    what: str

    def __str__(self) -> str:
        return f"{self.tool:12} {'--' if self.ok is None else 'ok' if self.ok else 'NO'}  {self.what}"


def check(
    model: Any,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Checked, ...]:
    """Try fold, swap, freeze, inspect and recalibrate on a model, each compared with the model itself.

    ``python -m jaxnorm.surgery check PACKAGE.MODULE:FACTORY``, or ``FILE.py:FACTORY``, does the same from the command
    line, with a function that returns these four arguments; the last two are optional.

    Args:
      model: a Linen or an NNX module, which is not changed.
      inputs: positional arguments of its call, with two examples or more.
      kwargs: keyword arguments of a call in evaluation, as ``{"train": False}``.
      train_kwargs: those that differ in training, as ``{"train": True}``.

    Returns:
      A `Checked` each, to be printed.

    Raises:
      TypeError: ``model`` is no Flax module.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm import surgery
      >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> print(surgery.check(model, (jnp.eye(2),))[2])
      freeze       ok  1 norm frozen in training; averages stay
    """
    if not isinstance(model, nn.Module | nnx.Module):
        raise TypeError(f"check: model must be a Linen or an NNX module; got {type(model).__name__}.")
    calls = _Linen if isinstance(model, nn.Module) else _NNX
    kwargs = dict(kwargs or {})
    tried = calls(model, inputs, kwargs, {**kwargs, **(train_kwargs or {})})
    norms, averaged = tried.has(None), tried.has(BATCH_NORMS)
    tools = {"fold": (tried.fold, True), "swap": (tried.swap, norms), "freeze": (tried.freeze, averaged)}
    tools |= {"inspect": (tried.inspect, norms), "recalibrate": (tried.recalibrate, averaged)}
    return tuple(_tried(name, *tool) for name, tool in tools.items())


def _tried(name: str, tool: Callable[[], tuple[bool | None, str]], applies: bool) -> Checked:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            ok, what = tool()
        except Exception as error:  # whatever a model of somebody else's raises
            ok, what = (False if applies else None), f"{type(error).__name__}: {str(error).splitlines()[0]:.160}"
    own = [str(w.message) for w in said if str(w.message).startswith(f"{name}") or "passed over" in str(w.message)]
    return Checked(name, ok, "; ".join([what, *dict.fromkeys(own)]))


def _norms(n: int) -> str:
    return f"{n} norm{'s' * (n != 1)}"


def _apart(a: Any, b: Any) -> float:
    """The largest distance of two outputs, relative to the largest value."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    size = max((float(jnp.max(jnp.abs(y))) for _, y in pairs), default=1.0)
    return max((float(jnp.max(jnp.abs(x - y))) for x, y in pairs), default=0.0) / (size or 1.0)


def _same(tree: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


class _Calls:
    """A model, its inputs and how it is called."""

    def __init__(self, model: Any, inputs: Any, kwargs: dict[str, Any], training: dict[str, Any]) -> None:
        self.model, self.inputs, self.kwargs, self.training = model, inputs, kwargs, training
        self.begin()
        self.expected = self.evaluated(self.variables)

    # What differs between Linen and NNX.
    variables: Any

    def begin(self) -> None: ...

    def evaluated(self, variables: Any) -> Any: ...

    def pure(self) -> Callable[..., Any]: ...

    def has(self, kinds: Any) -> bool: ...

    def inspected(self, variables: Any) -> Any: ...

    def fold(self) -> tuple[bool | None, str]:
        folded = fold(self.pure(), self.variables, *self.inputs)
        went, stayed = len(folded.report.folded), len(folded.report.stayed)
        off = _apart(jax.jit(folded.apply)(folded.variables, *self.inputs), self.expected)
        reasons = {norm.reason for norm in folded.report.stayed}
        why = f", as {min(reasons)}" if reasons else ""
        ok = None if not went + stayed else off < TOLERANCE
        return ok, f"{_norms(went)} folded, {stayed} stayed{why}; outputs differ by {off:.2g}"

    def compared(self, paths: list[str], other: Any) -> tuple[bool | None, str]:
        off = _apart(other, self.expected)
        return (off < TOLERANCE if paths else None), f"{_norms(len(paths))} swapped; outputs differ by {off:.2g}"

    def inspect(self) -> tuple[bool | None, str]:
        report = inspect(self.model, self.variables_of_inspect(), *self.inputs, **self.kwargs)
        measured = sum(norm.drift is not None for norm in report.norms)
        return True, f"{_norms(len(report.norms))} in the table, {measured} of them compared with the batch"

    def variables_of_inspect(self) -> Any:
        return self.variables

    def recalibrate(self) -> tuple[bool | None, str]:
        """Against inspection: what was measured is what it sees."""
        variables = self.variables_of_inspect()
        inputs = {"inputs": lambda batch: (batch, {})}
        new = recalibrate(self.model, variables, [self.inputs], **inputs, **self.kwargs)
        seen = self.inspected(new)
        off = max((norm.drift for norm in seen.norms if norm.drift is not None), default=0.0)
        measured = sum(norm.drift is not None for norm in seen.norms)
        finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(self.evaluated(new)))
        what = f"{_norms(measured)} measured; averages and batch differ by {off:.2g} deviations"
        return off < TOLERANCE * 10 and finite, what


class _Linen(_Calls):
    def begin(self) -> None:
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        make = functools.partial(self.model.init, keys, **self.training)
        self.variables = _trained_a_little(jax.jit(make)(*self.inputs))

    def evaluated(self, variables: Any) -> Any:
        return jax.jit(functools.partial(self.model.apply, **self.kwargs))(variables, *self.inputs)

    def pure(self) -> Callable[..., Any]:
        return functools.partial(self.model.apply, **self.kwargs)

    def has(self, kinds: Any) -> bool:
        return bool(linen_norms(self.model, self.variables, *self.inputs, where=kinds, **self.kwargs))

    def swap(self) -> tuple[bool | None, str]:
        with swapped() as paths:
            return self.compared(paths, self.evaluated(self.variables))

    def freeze(self) -> tuple[bool | None, str]:
        with frozen() as paths:
            run = functools.partial(
                self.model.apply, **self.training, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"]
            )
            _, new = jax.jit(run)(self.variables, *self.inputs)
        still = _same(new.get("batch_stats", {}), self.variables.get("batch_stats", {}))
        return (still if paths else None), f"{_norms(len(paths))} frozen in training; averages {_moved(still)}"

    def inspected(self, variables: Any) -> Any:
        return inspect(self.model, variables, *self.inputs, **self.kwargs)


class _NNX(_Calls):
    def begin(self) -> None:
        self.model = nnx.clone(self.model)
        self.model.eval()
        nnx.update(self.model, _trained_a_little(nnx.state(self.model)))
        self.graph, self.variables = nnx.split(self.model)

    def evaluated(self, variables: Any) -> Any:
        return jax.jit(self.pure())(variables, *self.inputs)

    def pure(self) -> Callable[..., Any]:
        return lambda state, *inputs: nnx.merge(self.graph, state)(*inputs, **self.kwargs)

    def has(self, kinds: Any) -> bool:
        return any(isinstance(module, kinds or NNX) for _, module in nnx.iter_modules(self.model))

    def swap(self) -> tuple[bool | None, str]:
        other = nnx.clone(self.model)
        paths = swap(other)
        return self.compared(paths, nnx.jit(lambda m, *inputs: m(*inputs, **self.kwargs))(other, *self.inputs))

    def freeze(self) -> tuple[bool | None, str]:
        other = nnx.clone(self.model)
        paths = freeze(other)
        other.train()
        before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(other, nnx.BatchStat)))
        nnx.jit(lambda m, *inputs: m(*inputs, **self.training))(other, *self.inputs)
        still = _same(nnx.to_pure_dict(nnx.state(other, nnx.BatchStat)), before)
        return (still if paths else None), f"{_norms(len(paths))} frozen in training; averages {_moved(still)}"

    def variables_of_inspect(self) -> Any:
        return None

    def inspected(self, variables: Any) -> Any:
        return inspect(nnx.merge(self.graph, variables), None, *self.inputs, **self.kwargs)


def _moved(still: bool) -> str:
    return "stay" if still else "move"


def _trained_a_little(variables: Any) -> Any:
    """Averages other than the initial ones, so that a tool could lose them."""

    def other(keys, value):
        name = jax.tree_util.keystr(keys)
        if "mean" in name and jnp.issubdtype(value.dtype, jnp.floating) and value.ndim == 1:
            return value + 0.1 * jnp.sin(jnp.arange(value.size, dtype=value.dtype))
        return value * 1.5 if "var" in name and value.ndim == 1 else value

    return jax.tree_util.tree_map_with_path(other, variables)


def load(place: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """What the factory at ``PACKAGE.MODULE:FACTORY`` or ``FILE.py:FACTORY`` returns."""
    module, _, name = place.rpartition(":")
    if not module:
        raise ValueError(f"check: the factory must be given as PACKAGE.MODULE:FACTORY; got {place!r}.")
    if module.endswith(".py"):
        spec: Any = importlib.util.spec_from_file_location(Path(module).stem, module)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(module)
    model, inputs, *more = getattr(loaded, name)()
    kwargs, training = (*more, {}, {})[:2]
    return model, inputs if isinstance(inputs, tuple) else (inputs,), kwargs, training
