"""The same norm in other libraries: what its arrays are called, and what its settings mean."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxnorm.surgery import _report

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


_TORCH_SWITCHES = {"batch": "affine", "group": "affine", "instance": "affine", "layer": "elementwise_affine"}
_EQUINOX_SWITCHES = ("use_weight", "use_bias")


def _switches(library: str, kind: str) -> tuple[str | None, str | None]:
    """The settings that say whether there is a scale, and a bias: one name for both, or None where there is none."""
    if library == "torch":
        both = _TORCH_SWITCHES.get(kind, "elementwise_affine")
        return both, {"layer": "bias", "rms": None}.get(kind, both)
    if library == "haiku":
        return "create_scale", None if kind == "rms" else "create_offset"
    if library == "equinox":
        return _EQUINOX_SWITCHES if kind in ("layer", "rms") else ("channelwise_affine", "channelwise_affine")
    if library == "keras":
        return (None, None) if kind == "rms" else ("scale", "center")
    return "use_scale", None if kind == "rms" else "use_bias"


class Converted(NamedTuple):
    """A norm, as another library has it, made by `convert`: see its example.

    Attributes:
      variables: its arrays, under the names of that library.
      settings: its settings, under the names of that library: all that differ from its defaults, momentum and epsilon.
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
      target: the library to convert to, one of the same.
      kind: "batch", "layer", "group", "instance" or "rms". An instance norm with running averages, as PyTorch's with
        ``track_running_stats=True``, is `TrackedInstanceNorm` in jaxnorm.
      prefix: the path of the layer, where ``values`` are those of a whole network; all of them are moved by
        `convert_norms`.
      updates: how often the running averages were updated, where ``values`` do not say.
      batch_values: how many values of each feature a batch had: what a cumulative average weighs batches by.
      ndim: rank of the input, for Haiku, whose batch norms have parameters of that rank.
      **settings: of the layer, under the names of ``source``: momentum and epsilon; others become those of ``target``
        unchanged. Those not given are the defaults of ``source``.

    Returns:
      `Converted`.

    Raises:
      ValueError: names that ``source`` does not have, of which the message says which there are; a prefix that fits no
        layer or several; or a setting that is missing.

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
    tracked = kind == "instance" and {"mean", "var"} <= set(arrays)
    if tracked and target not in ("torch", "jaxnorm.linen", "jaxnorm.nnx"):
        notes.append(f"{target} has no instance norm with running averages: they are left out, evaluation differs.")
        arrays = {name: a for name, a in arrays.items() if name in ("scale", "bias")}
        tracked = False
    averaged = "batch" if kind == "batch" or tracked else kind
    arrays, switches = _affine(arrays, settings, source, target, kind, notes)
    settings = {name: value for name, value in settings.items() if name not in _switches(source, kind)}
    if kind == "instance":
        settings.pop("track_running_stats", None)
    alpha, translated = _settings(settings, source, target, averaged, notes)
    translated |= switches
    if tracked and target == "torch":
        translated["track_running_stats"] = True
    elif tracked:
        notes.append(f"the layer is {target}.TrackedInstanceNorm, which evaluates by its running averages.")
    if "updates" in arrays:
        updates = int(arrays.pop("updates"))
    if averaged == "batch":
        arrays = _averages(arrays, source, target, alpha, updates, batch_values)
    variables = _write(arrays, target, kind)
    if (kind, target) == ("batch", "haiku"):
        variables = _as_haiku(variables, alpha, ndim)
    if (kind, target) == ("batch", "equinox"):
        translated["mode"] = "batch"
    return Converted(variables, translated, updates, tuple(notes))


_COLLECTIONS = ("params", "batch_stats", "state")


def _read(values: Mapping[str, Any], source: str, prefix: str) -> dict[str, Any]:
    """Arrays by the names that they have here."""
    known, found, unknown = _names(source), dict[str, Any](), list[str]()
    layer, modules = tuple(p for p in _split(prefix) if p != "~") if prefix else (), set[str]()
    for path, value in _flatten(values):
        path = tuple(p for p in path if p != "~")
        outer = path[:1] if path[0] in _COLLECTIONS else ()
        if path[len(outer) :][: len(layer)] != layer:
            continue
        own = path[len(outer) + len(layer) :]
        fits = ((name, i) for i in range(len(own)) for name in known if _fits((*outer, *own[i:]), own[i:], name))
        name, inner = next(fits, (None, 0))
        if name is not None:
            modules.add("/".join(own[:inner]))
            found[known[name]] = _array(value)
        elif source != "haiku" or own[-1] not in ("hidden", "counter"):  # those follow from what else there is
            unknown.append("/".join(own))
    if len(modules) > 1:
        rule = "prefix must be the path of one norm; convert_norms converts all"
        raise ValueError(f"convert: {rule}; got {prefix!r}, under which there are {', '.join(sorted(modules))}.")
    if unknown or not found:
        names = ", ".join("/".join(name) for name in known)
        raise ValueError(f"convert: a norm of {source} has {names}; got {', '.join(unknown) or _listed(values)}.")
    return found


def _fits(whole: tuple[str, ...], own: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Whether an array has this name, its collection included, or left out."""
    return whole == name or own == name or (name[0] in _COLLECTIONS and own == name[1:])


def _affine(
    arrays: dict[str, Any], given: dict[str, Any], source: str, target: str, kind: str, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scale and bias as ``target`` has them, and the settings that say so where they are not its defaults."""
    switches = _switches(target, kind)
    has = {"scale": "scale" in arrays, "bias": "bias" in arrays}
    for name, setting in zip(has, _switches(source, kind), strict=True):
        if setting in given and bool(given[setting]) != has[name] and not (source == "torch" and name == "bias"):
            raise ValueError(f"convert: {setting}={given[setting]} does not fit: the arrays are {', '.join(arrays)}.")
    if switches[0] == switches[1] is not None and has["scale"] != has["bias"]:  # both or neither
        made, there = ("bias", "scale") if has["scale"] else ("scale", "bias")
        fill = np.zeros if made == "bias" else np.ones
        arrays = arrays | {made: fill(np.shape(arrays[there]), arrays[there].dtype)}
        filled = "zeros" if made == "bias" else "ones"
        notes.append(f"{target} has scale and bias, or neither: the {made} is made of {filled}.")
        has = {"scale": True, "bias": True}
    default = {"scale": True, "bias": True}
    if target == "torch" and kind == "instance":
        default = {"scale": False, "bias": False}
    if target == "haiku":
        default = {"scale": None, "bias": None}  # always to be said
    return arrays, {s: has[n] for n, s in zip(has, switches, strict=True) if s is not None and has[n] != default[n]}


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


class ConvertedNorms(NamedTuple):
    """All norms of a network, moved by `convert_norms`: see its example.

    Attributes:
      variables: those of the Linen model, or the state of the NNX model, with the arrays of the other network.
      moved: by the path of the norm here, its path there.
      settings: by the path of the norm here, the settings that it should have.
      notes: what could not be expressed, with the path.
    """

    variables: Any
    moved: dict[str, str]
    settings: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        width = max(map(len, self.moved.values()), default=0)
        return "\n".join([f"{there:{width}}  {here}" for here, there in self.moved.items()] + list(self.notes))


def convert_norms(
    state_dict: Mapping[str, Any],
    model: Any,
    *,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    kinds: Mapping[str, str] | None = None,
    **settings: Any,
) -> ConvertedNorms:
    """Move all norms of a PyTorch network into a Linen or NNX model.

    A batch norm there is what has a running mean. Another norm is what has a ``weight`` of one axis where the model
    here has a scale of that shape.

    Args:
      state_dict: of the PyTorch network: arrays or tensors by name.
      model: the variables of a Linen model, or an NNX module, which is not changed.
      rename: the path here for a path there, as {"bn1": "BatchNorm_0"}; or a function of the path; None where both have
        the same paths but for "." and "/".
      kinds: by path there, "layer", "group", "instance" or "rms" for norms that are not batch norms. Only needed where
        settings matter: it decides the default epsilon.
      **settings: of the norms there, under PyTorch's names: ``momentum`` and ``eps``; others become those of the
        norms here unchanged. Those not given are PyTorch's defaults.

    Returns:
      `ConvertedNorms`; ``print`` shows which norm went where.

    Raises:
      ValueError: a norm there has no place here, or one here gets none: the message lists both. Or shapes differ.
        Nothing is converted then.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from flax import linen as nn
      >>> from jaxnorm import surgery
      >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> state = {"bn1.weight": np.ones(2), "bn1.bias": np.zeros(2), "fc.weight": np.ones((2, 2))}
      >>> state |= {"bn1.running_mean": np.full(2, 3.0), "bn1.running_var": np.ones(2)}
      >>> moved = surgery.convert_norms(state, variables, rename={"bn1": "layers_1"})
      >>> print(moved)
      bn1  layers_1
      >>> moved.variables["batch_stats"]["layers_1"]["mean"].tolist()
      [3.0, 3.0]
    """
    is_nnx = isinstance(model, nnx.Module)
    library = "jaxnorm.nnx" if is_nnx else "jaxnorm.linen"
    variables = nnx.state(model) if is_nnx else model
    flat = {path: leaf for path, leaf in _flatten(nnx.to_pure_dict(variables) if is_nnx else variables)}
    here = _norms_of(flat)
    there = _norms_of_torch(state_dict, set(np.shape(a["scale"]) for a in here.values() if "scale" in a))
    names = rename if isinstance(rename, Mapping) else {}
    place = rename if callable(rename) else lambda path: names.get(path, path.replace(".", "/"))
    wanted = {path: str(place(path)) for path in there}
    lost = [path for path, to in wanted.items() if to not in here]
    left = sorted(set(here) - set(wanted.values()))
    twice = len(set(wanted.values())) < len(wanted)
    if lost or left or twice:
        rule = "rename must give every norm a place of its own"
        raise ValueError(
            f"convert_norms: {rule}; without one are {', '.join(lost) or 'none'} there,"
            f" and {', '.join(left) or 'none'} here, where there are {', '.join(sorted(here))}."
        )
    new, found, notes = dict[tuple[str, ...], Any](), dict[str, dict[str, Any]](), list[str]()
    for path, to in wanted.items():
        kind = (kinds or {}).get(path) or ("batch" if "running_mean" in there[path] else "layer")
        converted = convert(there[path], "torch", library, kind=kind, **settings)
        found[to] = converted.settings
        notes += [f"{to}: {note}" for note in converted.notes]
        for (*collection, name), value in _flatten(converted.variables):
            key = (*collection, *(_split(to) if to else ()), name)
            have = np.shape(flat[key]) if key in flat else "there is none"
            if have != np.shape(value):
                rule = f"{name} of {path} must have the shape of that of {to}"
                raise ValueError(f"convert_norms: {rule}; got {np.shape(value)} for {have}.")
            new[key] = value

    def replaced(keys, old):
        value = new.get(tuple(_split("/".join(_report.path_of(keys)))))
        return old if value is None else jnp.asarray(value, old.dtype)

    moved = {to: path for path, to in wanted.items()}
    return ConvertedNorms(jax.tree_util.tree_map_with_path(replaced, variables), moved, found, tuple(notes))


def _norms_of(flat: Mapping[tuple[str, ...], Any]) -> dict[str, dict[str, Any]]:
    """The arrays of the norms in a model, by path and name."""
    found: dict[str, dict[str, Any]] = {}
    for path, value in flat.items():
        inner = path[1:] if path[0] in _COLLECTIONS else path
        if inner[-1] in ("scale", "bias", "mean", "var", "count"):
            found.setdefault("/".join(inner[:-1]), {})[inner[-1]] = value
    return {path: arrays for path, arrays in found.items() if "scale" in arrays or {"mean", "var"} <= set(arrays)}


def _norms_of_torch(state_dict: Mapping[str, Any], scales: set[tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """The arrays of the norms in a ``state_dict``, by path and name."""
    modules: dict[str, dict[str, Any]] = {}
    for name, value in state_dict.items():
        module, _, own = name.rpartition(".")
        modules.setdefault(module, {})[own] = value
    names = {name[0] for name in _names("torch")}
    of_norms = {path: arrays for path, arrays in modules.items() if set(arrays) <= names}
    return {
        path: arrays
        for path, arrays in of_norms.items()
        if "running_mean" in arrays
        or ("weight" in arrays and len(shape := tuple(arrays["weight"].shape)) == 1 and shape in scales)
    }
