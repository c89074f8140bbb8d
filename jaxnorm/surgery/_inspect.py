"""What is in the norms of a model, and what is wrong with it."""

import html
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxnorm import Moments
from jaxnorm.surgery import _causes
from jaxnorm.surgery._causes import Finding, Seen
from jaxnorm.surgery._channels import channel_axes
from jaxnorm.surgery._measure import Measuring, measure
from jaxnorm.surgery._norms import BATCH_NORMS, linen_norms, nnx_norms

MANY = 20
"""How many norms a table shows at most."""
DEAD, EXPLODING = 1e-10, 1e10
"""Running variances below and above which a channel is constant, or on its way out of float32."""


class NormState(NamedTuple):
    """One norm, in an `Inspection`: see the example of `inspect`.

    Attributes:
      path: in the model.
      kind: of norm.
      axis: of the features, where known.
      features: their shape.
      momentum: of the running averages, where known.
      epsilon: where known.
      updates: "never", "some", or about how often the averages were updated, where that is known.
      var: smallest and largest running variance; None without running averages.
      dead: channels whose running variance is below 1e-10.
      exploding: channels whose running variance is above 1e10.
      not_finite: channels whose averages are not finite.
      drift: root mean square over the channels of the distance between the means of the batch and of the averages, in
        deviations.
      spread: geometric mean over the channels of the deviation of the batch divided by that of the averages.
    """

    path: str
    kind: str
    axis: Any
    features: tuple[int, ...]
    momentum: Any
    epsilon: Any
    updates: str
    var: tuple[float, float] | None
    dead: int
    exploding: int
    not_finite: int
    drift: float | None
    spread: float | None


class Inspection(NamedTuple):
    """All norms of a model in the order of the calls, where there was a batch, and what is wrong.

    Made by `inspect`: see its example.

    Attributes:
      norms: a `NormState` each.
      findings: a `Finding` each: path, cause, what was seen, and the remedy.
      notes: what could not be decided, and why.
    """

    norms: tuple[NormState, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def _rows(self) -> tuple[list[list[str]], int]:
        """The table, of many norms only the worst; and how many it leaves out."""
        names = ["path", "kind", "axis", "features", "momentum", "epsilon", "updates"]
        names += ["variance", "dead", "exploding", "not finite", "drift", "spread"]
        shown = list(self.norms)
        if len(shown) > MANY:
            found = {finding.path for finding in self.findings}

            def badness(norm):
                far = abs(np.log(max(norm.spread or 1.0, 1e-30))) + (norm.drift or 0.0)
                return norm.path in found, norm.not_finite > 0, norm.dead + norm.exploding > 0, far

            shown = sorted(shown, key=badness, reverse=True)[:MANY]
        return [names] + [[_text(value) for value in norm] for norm in shown], len(self.norms) - len(shown)

    def _below(self, left_out: int) -> list[str]:
        counted = [f"and {left_out} norms more, which are better than these"] if left_out else []
        return [*counted, *map(str, self.findings), *self.notes]

    def __str__(self) -> str:
        rows, left_out = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + self._below(left_out))

    def _repr_html_(self) -> str:
        table, left_out = self._rows()
        head, *rows = [[html.escape(cell) for cell in row] for row in table]
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        found = "".join(f"<li>{html.escape(line)}</li>" for line in self._below(left_out))
        return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table><ul>{found}</ul>"

    def plot(self, path: Any) -> None:
        """Draw running variances, and the distance of the batch from the averages, by layer; needs matplotlib."""
        from matplotlib.figure import Figure

        norms = [norm for norm in self.norms if norm.var is not None]
        places = np.arange(len(norms))
        figure = Figure(figsize=(max(7.5, 4 + 0.3 * len(norms)), 7), layout="constrained")  # as wide as its titles
        variances, distances = figure.subplots(2, sharex=True)
        low, high = np.array([norm.var for norm in norms], np.float64).reshape(-1, 2).T
        variances.vlines(places, low, high, lw=4)
        variances.plot(places, low, "_", places, high, "_")
        variances.set(yscale="log", title="running variance, smallest to largest")
        for name in ("drift", "spread"):
            values = [getattr(norm, name) for norm in norms]
            distances.plot(places, [np.nan if v is None else v for v in values], "o-", label=name)
        distances.set(title="batch against averages: means apart, in deviations; ratio of deviations")
        distances.set_xticks(places, [norm.path for norm in norms], rotation=90)
        distances.legend()
        figure.savefig(path, dpi=110)


def inspect(model: Any, variables: Any = None, *batch: Any, **kwargs: Any) -> Inspection:
    """Tabulate the norms of a model; given a batch, compare it with their running averages, and name what is wrong.

    Findings, each with its remedy: never updated; momentum too slow; not finite; wrong axis, where the layer before
    says which one is right; scaled differently; batch of one; not synchronized; averaged weights, where all norms see a
    little less than their averages say; or, where the averages do not fit the batch for another reason, stale.
    Averages are compared with batches of 32 examples and more.

    Args:
      model: a Linen or an NNX module; or only the variables of a Linen module, of which less is known.
      variables: of the Linen module; None for an NNX module.
      *batch: the inputs of the model in evaluation; batch norms normalize it by its own statistics, as in training.
      **kwargs: for the call of the model, as ``train=False``.

    Returns:
      `Inspection`, to be printed, shown in a notebook, or plotted.

    Raises:
      TypeError: something else than a model or variables.
      ValueError: there are no norms.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm import surgery
      >>> model, x = nn.BatchNorm(use_running_average=True, name="norm"), jnp.array([[1.0], [3.0]])
      >>> report = surgery.inspect(model, model.init(jax.random.key(0), x), x)
      >>> report.findings[0].cause
      'never updated'
    """
    views = _gather(model, variables, batch, kwargs)
    if not views:
        raise ValueError(f"inspect: no norms found in {type(model).__name__}.")
    findings = [finding for view in views for finding in _causes.diagnose(view)]
    everywhere = _causes.of_all(views, findings)
    notes = []
    if any(view.batch is not None and view.examples < _causes.ENOUGH for view in views):
        rule = f"too few to compare with the averages; pass {_causes.ENOUGH} or more, better hundreds"
        notes.append(f"{views[0].examples} example{'s' * (views[0].examples != 1)}: {rule}.")
    return Inspection(tuple(map(_state, views)), tuple([everywhere] if everywhere else findings), tuple(notes))


def _gather(model: Any, variables: Any, batch: Any, kwargs: Any) -> list[Seen]:
    """Settings and averages of each norm, in the order of the calls, and what it saw of the batch."""
    if isinstance(model, nnx.Module):
        known = {path: (_nnx_settings(norm), _nnx_averages(norm)) for path, norm in nnx_norms("inspect", model, None)}
        graph, state = nnx.split(model)
    elif isinstance(model, nn.Module):
        graph, state, known = model, variables, _from_variables(variables)
        if batch:
            listed = linen_norms(model, variables, *batch, **kwargs)
            called = {path: (settings, known.pop(path, ({}, {}))[1]) for path, settings in listed.items()}
            known = called | known  # then averages of modules that are not known, or not called
    elif isinstance(model, Mapping):
        graph, state, known, batch = None, None, _from_variables(model), ()
    else:
        raise TypeError(f"inspect: model must be a Linen or an NNX module, or variables; got {type(model).__name__}.")
    if not batch or not any(averages for _, averages in known.values()):
        return [
            Seen(path, settings, averages, None, i == 0) for i, (path, (settings, averages)) in enumerate(known.items())
        ]
    how = Measuring("inspect", _causes.NAMES, _causes.of_input, where=lambda path: True)
    traced = jax.jit(lambda state, batch: measure(how, graph, state, batch, kwargs, {})).trace(state, batch)
    held = len(jax.tree.leaves(state))
    arrays, channels = traced.lower().compile()(state, batch), channel_axes(traced.jaxpr.jaxpr, held)
    seen = {path: {name: np.asarray(a, np.float64) for name, a in stats.items()} for path, stats in arrays.items()}
    order = [*how.ranks, *(path for path in known if path not in how.ranks)]
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    examples = max((shape[0] for shape in shapes if shape), default=0)
    views = []
    for path in order:
        settings, averages = known[path]
        place = examples, how.features.get(path, ()), channels.get(path)
        views.append(Seen(path, settings, averages, seen.get(path), not views, *place))
    return views


def _from_variables(variables: Any) -> dict[str, Any]:
    """Batch norms, as the pairs of averages in the variables of a Linen module."""
    found: dict[str, Any] = {}

    def walk(tree, path):
        if {"mean", "var"} <= set(tree):
            found["/".join(path)] = ({"kind": "BatchNorm"}, dict(tree))
        for name, inner in tree.items():
            if isinstance(inner, Mapping):
                walk(inner, (*path, name))

    walk(variables.get("batch_stats", {}), ())
    return found


def _nnx_settings(norm: Any) -> dict[str, Any]:
    features = () if norm.scale is None else norm.scale[...].shape
    return {"kind": type(norm).__name__, "features": features, **vars(norm)}


def _nnx_averages(norm: Any) -> dict[str, Any]:
    names = Moments._fields if isinstance(norm, BATCH_NORMS) else ()
    return {name: vars(norm)[name][...] for name in names if name in vars(norm)}


def _state(view: Seen) -> NormState:
    settings = view.settings
    given = {name: settings.get(name) for name in ("axis", "momentum", "epsilon")}
    if given["axis"] is None:
        given["axis"] = settings.get("feature_axes")
    state = NormState(
        view.path,
        settings["kind"],
        features=tuple(settings.get("features", ())),
        **given,
        updates="",
        var=None,
        dead=0,
        exploding=0,
        not_finite=0,
        drift=None,
        spread=None,
    )
    if not view.averages:
        return state
    mean, var = view.mean, view.var
    finite = np.isfinite(mean) & np.isfinite(var)
    drift, spread = view.distance() if view.batch and finite.all() else (None, None)
    return state._replace(
        features=mean.shape,
        updates=view.updates(),
        var=(float(np.min(var)), float(np.max(var))),
        dead=int(np.sum(var < DEAD)),
        exploding=int(np.sum(var > EXPLODING)),
        not_finite=int(np.sum(~finite)),
        drift=drift,
        spread=spread,
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return " to ".join(f"{v:.3g}" for v in value)
    return "" if value is None else str(value)
