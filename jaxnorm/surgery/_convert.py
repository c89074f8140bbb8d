"""The same norm in other libraries: what its arrays are called, and what its settings mean."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

KINDS = ("batch", "layer", "group", "instance", "rms")


class Convention(NamedTuple):
    """How a library has its norms: `convert`, whose example reads some of PyTorch's, knows all of ``CONVENTIONS``.

    Attributes:
      scale: name of the scale.
      bias: name of the bias.
      mean: name of the running mean.
      var: name of the running variance.
      updates: name of the number of updates, where there is one.
      momentum: name of the setting of the running averages.
      weighs: which value it is the weight of, "old" or "new".
      epsilon: name of that setting.
      unbiased: whether the unbiased variance is averaged.
      debiased: whether the averages start from zero, and are divided by what is missing to a weight of one.
      default_momentum: None where there is none.
      default_epsilon: by kind, in the order of `KINDS`; None where the library has no such norm.
    """

    scale: str
    bias: str
    mean: str
    var: str
    updates: str | None
    momentum: str
    weighs: str
    epsilon: str
    unbiased: bool
    debiased: bool
    default_momentum: float | None
    default_epsilon: tuple[float | None, ...]


_FLAX = (None, "momentum", "old", "epsilon", False, False, 0.99, (1e-5, 1e-6, 1e-6, 1e-6, 1e-6))
_IN_LINEN = ("params/scale", "params/bias", "batch_stats/mean", "batch_stats/var")
_IN_NNX = ("scale", "bias", "mean", "var")
CONVENTIONS = {
    "torch": Convention(
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
        *("momentum", "new", "eps", True, False, 0.1, (1e-5, 1e-5, 1e-5, 1e-5, float(np.finfo(np.float32).eps))),
    ),
    "jaxnorm.linen": Convention(*_IN_LINEN, *_FLAX),
    "jaxnorm.nnx": Convention(*_IN_NNX, *_FLAX),
    "flax.linen": Convention(*_IN_LINEN, *_FLAX),
    "flax.nnx": Convention(*_IN_NNX, *_FLAX),
    "haiku": Convention(
        *("params/scale", "params/offset", "state/mean_ema/average", "state/var_ema/average", "state/mean_ema/counter"),
        *("decay_rate", "old", "eps", False, True, None, (1e-5,) * 5),
    ),
    "equinox": Convention(
        *("weight", "bias", "hidden_mean", "hidden_var", "counter"),
        *("momentum", "old", "eps", False, True, 0.99, (1e-5, 1e-5, 1e-5, None, 1e-5)),
    ),
    "keras": Convention(
        *("gamma", "beta", "moving_mean", "moving_variance", None),
        *("momentum", "old", "epsilon", False, False, 0.99, (1e-3, 1e-3, 1e-3, None, 1e-6)),
    ),
}
"""The same for all users; docs/conventions.md has it as a table."""


class Converted(NamedTuple):
    """A norm, as another library has it, made by `convert`: see its example.

    Attributes:
      variables: its arrays, under the names of that library.
      settings: its settings, under the names of that library, none left to a default.
      updates: how often its running averages were updated, if known.
      notes: what that library cannot express.
    """

    variables: dict[str, Any]
    settings: dict[str, Any]
    updates: int | None
    notes: tuple[str, ...]


def convert(
    values: Mapping[str, Any],
    source: str,
    target: str,
    *,
    kind: str = "batch",
    prefix: str = "",
    updates: int | None = None,
    batch_values: int | None = None,
    ndim: int | None = None,
    **settings: Any,
) -> Converted:
    r"""A norm of one library as another has it: names, layout, the sense of momentum, epsilon, debiased averages.

    Haiku, and Equinox with ``mode="batch"``, average from zero: after t updates the average is
    :math:`h / (1 - m^t)`. What of t is not known counts as infinite.

    Args:
      values: arrays by name, nested or with "." or "/" in the names: a ``state_dict``, a tree of variables.
      source: the library that they come from: torch, jaxnorm.linen, jaxnorm.nnx, flax.linen, flax.nnx, haiku, equinox
        or keras.
      target: the library to convert to, likewise.
      kind: "batch", "layer", "group", "instance" or "rms".
      prefix: of the names of this layer, where ``values`` are those of a whole network.
      updates: how often the running averages were updated, where ``values`` do not say.
      batch_values: how many values of each feature a batch had: what a cumulative average weighs batches by.
      ndim: rank of the input, for Haiku, whose batch norms have parameters of that rank.
      **settings: of the layer, under the names of ``source``: momentum and epsilon; others become those of ``target``
        unchanged. Those not given are the defaults of ``source``.

    Returns:
      `Converted`.

    Raises:
      ValueError: names that ``source`` does not have, of which the message says which there are; or a setting that is
        missing.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import surgery
      >>> state = {"bn.weight": np.ones(2), "bn.bias": np.zeros(2)}
      >>> state |= {"bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2), "bn.num_batches_tracked": np.array(7)}
      >>> converted = surgery.convert(state, "torch", "jaxnorm.linen", prefix="bn", momentum=0.2)
      >>> converted.settings
      {'momentum': 0.8, 'epsilon': 1e-05, 'unbiased': True}
      >>> sorted(converted.variables), converted.updates
      (['batch_stats', 'params'], 7)
    """
    for what, value, known in (("source", source, CONVENTIONS), ("target", target, CONVENTIONS), ("kind", kind, KINDS)):
        if value not in known:
            raise ValueError(f"convert: {what} must be one of {', '.join(known)}; got {value!r}.")
    old, new = CONVENTIONS[source], CONVENTIONS[target]
    if new.default_epsilon[KINDS.index(kind)] is None:
        raise ValueError(f"convert: {target} has no {kind} norm.")
    arrays = _read(values, source, prefix)
    if kind == "batch" and not {"mean", "var"} <= set(arrays):
        raise ValueError(f"convert: a batch norm of {source} has {old.mean} and {old.var}; got {_listed(values)}.")
    notes: list[str] = []
    alpha, translated = _settings(settings, source, target, kind, notes)
    if "updates" in arrays:
        updates = int(arrays.pop("updates"))
    if kind == "batch":
        arrays = _averages(arrays, source, target, alpha, updates, batch_values)
    variables = _write(arrays, target, kind)
    if (kind, target) == ("batch", "haiku"):
        variables = _as_haiku(variables, alpha, ndim)
    if (kind, target) == ("batch", "equinox"):
        translated["mode"] = "batch"
    return Converted(variables, translated, updates, tuple(notes))


def _read(values: Mapping[str, Any], source: str, prefix: str) -> dict[str, Any]:
    """Arrays by the names that they have here."""
    known = _names(source)
    found: dict[str, Any] = {}
    unknown: list[str] = []
    layer = tuple(_split(prefix)) if prefix else ()
    for path, value in _flatten(values):
        place = next((i for i in range(len(path)) if path[i : i + len(layer)] == layer), None)
        if place is None:
            continue
        own = tuple(p for p in path[:place] + path[place + len(layer) :] if p != "~")
        fitting = [name for name in known if own[-len(name) :] == name or name[-len(own) :] == own]
        if len(fitting) == 1:
            found[known[fitting[0]]] = _array(value)
        elif source != "haiku" or own[-1] not in ("hidden", "counter"):  # those follow from what else there is
            unknown.append("/".join(own))
    if unknown or not found:
        names = ", ".join("/".join(name) for name in known)
        raise ValueError(f"convert: a norm of {source} has {names}; got {', '.join(unknown) or _listed(values)}.")
    return found


def _names(library: str) -> dict[tuple[str, ...], str]:
    """What arrays are called there, and here."""
    convention = CONVENTIONS[library]
    names = {getattr(convention, array): array for array in ("scale", "bias", "mean", "var", "updates")}
    if library.startswith("jaxnorm"):
        names[convention.var.replace("var", "count")] = "count"
    if library == "keras":
        names["scale"] = "scale"  # of RMSNormalization only
    return {tuple(name.split("/")): array for name, array in names.items() if name is not None}


def _flatten(values: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(values, Mapping):
        return [(path, values)]
    return [leaf for name, value in values.items() for leaf in _flatten(value, path + tuple(_split(name)))]


def _split(name: str) -> list[str]:
    return re.split(r"[./]", str(name))


def _listed(values: Mapping[str, Any]) -> str:
    names = ["/".join(path) for path, _ in _flatten(values)]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} others" if len(names) > 20 else "") or "nothing"


def _array(value: Any) -> Any:
    if hasattr(value, "detach"):  # a tensor of PyTorch, whose bfloat16 NumPy cannot read
        value = value.detach().cpu()
        half = "bfloat16" in str(value.dtype)
        return value.float().numpy().astype(jnp.bfloat16) if half else value.numpy().copy()
    value = getattr(value, "value", value)
    return np.asarray(value) if not hasattr(value, "dtype") else value


def _settings(
    given: dict[str, Any], source: str, target: str, kind: str, notes: list[str]
) -> tuple[float | None, dict[str, Any]]:
    """The weight of the new value, None for a cumulative average, and all settings as ``target`` has them."""
    old, new = CONVENTIONS[source], CONVENTIONS[target]
    given = dict(given)
    epsilon = given.pop(old.epsilon, None)
    epsilon = old.default_epsilon[KINDS.index(kind)] if epsilon is None else epsilon
    if kind != "batch":
        return None, {new.epsilon: epsilon, **given}
    if old.momentum not in given and old.default_momentum is None:
        raise ValueError(f"convert: batch norm of {source} has no default of {old.momentum}; it must be given.")
    momentum = given.pop(old.momentum, old.default_momentum)
    unbiased = given.pop("unbiased", old.unbiased)
    alpha = _turned(momentum, old.weighs)
    settings = {new.momentum: _turned(alpha, new.weighs)}
    if alpha is None and target not in ("torch", "jaxnorm.linen", "jaxnorm.nnx"):
        raise ValueError(f"convert: {target} has no cumulative average; give {old.momentum} to go on with.")
    settings[new.epsilon] = epsilon
    if target.startswith("jaxnorm"):
        settings["unbiased"] = unbiased
    elif unbiased != new.unbiased:
        words = {True: "unbiased", False: "biased"}
        notes.append(f"updates to come average the {words[new.unbiased]} variance, not the {words[unbiased]} one.")
    return alpha, {**settings, **given}


def _turned(weight: float | None, weighs: str) -> float | None:
    """The weight of the new value from that of the one it ``weighs``, or back, as people write it: 0.9 for 0.1."""
    return weight if weight is None or weighs == "new" else round(1 - weight, 12)


def _averages(
    arrays: dict[str, Any], source: str, target: str, alpha: float | None, updates: int | None, batch_values: int | None
) -> dict[str, Any]:
    """Averages as ``target`` has them: of full weight or not, with the number of values or of updates."""
    arrays = {name: a.reshape(-1) if source == "haiku" else a for name, a in arrays.items()}
    present = _present(alpha, updates)
    for name in ("mean", "var"):
        if source == "equinox":
            arrays[name] = arrays[name] / np.asarray(present, arrays[name].dtype)
        if target == "equinox":
            arrays[name] = arrays[name] * np.asarray(present, arrays[name].dtype)
    count = arrays.pop("count", None)
    if target == "torch":
        arrays["updates"] = np.asarray(updates or 0, np.int64)
    elif CONVENTIONS[target].updates is not None:
        # Without a number of updates the weight is one: as after more of them than change it.
        arrays["updates"] = np.asarray(2**30 if updates is None else updates, np.int32)
    elif target.startswith("jaxnorm") and alpha is None:
        if count is None:
            if batch_values is None or updates is None:
                rule = "a cumulative average weighs batches by their values: give batch_values, and updates if unknown"
                raise ValueError(f"convert: {rule}.")
            count = np.full(np.shape(arrays["mean"]), updates * batch_values, np.float32)
        arrays["count"] = count
    return arrays


def _present(alpha: float | None, updates: int | None) -> float:
    """The weight of all batches together in an average that started from zero."""
    return 1.0 if alpha is None or not updates else 1 - (1 - alpha) ** updates


def _as_haiku(variables: dict[str, Any], alpha: float | None, ndim: int | None) -> dict[str, Any]:
    """With parameters of the rank of the input, and all that its moving averages hold."""
    if ndim is None:
        raise ValueError("convert: batch norm of haiku has parameters of the rank of its input; give ndim.")
    shape, state = (1,) * (ndim - 1) + (-1,), variables["state"]
    counter = state["mean_ema"]["counter"]
    for ema in ("mean_ema", "var_ema"):
        average = state[ema]["average"].reshape(shape)
        hidden = average * np.asarray(_present(alpha, int(counter)), average.dtype)
        state[ema] = {"average": average, "hidden": hidden, "counter": counter}
    params = {name: a.reshape(shape) for name, a in variables.get("params", {}).items()}
    return {"params": params, "state": state}


def _write(arrays: dict[str, Any], target: str, kind: str) -> dict[str, Any]:
    """Arrays by the names of ``target``."""
    places = {array: name for name, array in _names(target).items()}
    if target == "keras" and kind != "rms":
        places["scale"] = (CONVENTIONS[target].scale,)
    written: dict[str, Any] = {}
    for array, value in arrays.items():
        if array not in places:
            raise ValueError(f"convert: a {kind} norm of {target} has no {array}.")
        *outer, last = places[array]
        inner = written
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return written
