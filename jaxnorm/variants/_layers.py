"""What the Linen and the NNX layers of the remedies share: what a layer holds, and what it computes from it."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

import jaxnorm
from jaxnorm import _axes
from jaxnorm._moments import Moments
from jaxnorm.running import RunningStats, update_running
from jaxnorm.variants.sequences import running_at

Settings = dict[str, Any]
Class = TypeVar("Class", bound=type)


def documented(cls: Class, without: Sequence[str] = ()) -> Class:
    """Write what a class takes as ``settings`` into its docstring: the arguments of its base, ``without`` some.

    So each is described once, on a line of its own, and ``help`` shows them all.
    """
    if not cls.__doc__:  # python -OO
        return cls
    before, example, after = inspect.cleandoc(cls.__doc__).partition("Example:\n")
    first, _, own = before.partition("Args:\n")
    own = [line for line in own.splitlines() if line and not line.startswith("  settings:")]
    docs = [inspect.cleandoc(base.__doc__ or "").partition("\n\nArgs:\n")[2] for base in cls.__mro__[1:]]
    passed = next(filter(None, docs), "").partition("\n\n")[0].splitlines()
    left = [line for line in passed if not line.startswith(tuple(f"  {name}:" for name in without))]
    arguments = left[:1] + own + left[1:]
    named = {line.split(":")[0]: line for line in reversed(arguments)}
    lines = ["Args:", *(line for line in arguments if named[line.split(":")[0]] is line)]
    cls.__doc__ = f"{first.rstrip()}\n\n" + "\n".join(lines) + "\n\n" + example + after
    return cls


class Remedy(NamedTuple):
    """A layer.

    Attributes:
      train: the output of ``(layer, x, parameters, running, *inputs, **settings)``; with averages, ``(y, batch)``.
      infer: the output likewise, by the running averages; None where there are none.
      parameters: shape and start of each parameter besides scale and bias; None for the shape of the features.
      leading: of a layer, the size of an axis of the averages before those of the features; None for no such axis.
      averages: which of the running averages it holds; the count only where it matters which steps were seen.
      affine: of a layer, the axes of scale and bias before those of the features.
    """

    train: Callable[..., Any]
    infer: Callable[..., jax.Array] | None = None
    parameters: dict[str, tuple[tuple[int, ...] | None, float]] = {}  # noqa: RUF012
    leading: Callable[[Any], int] | None = None
    averages: tuple[str, ...] = ("mean", "var")
    affine: Callable[[Any], tuple[int, ...]] = lambda layer: ()


def _affine(p: Settings) -> tuple[Any, Any]:
    return p["scale"], p["bias"]


def _normalized(layer, x, p, running, *, mask=None, **settings):
    return jaxnorm.normalize(x, running, *_affine(p), **settings)


def _ghost(layer, x, p, running, **settings):
    return jaxnorm.ghost_batch_norm(x, *_affine(p), virtual_batch_size=layer.virtual_batch_size, **settings)


def _renorm(layer, x, p, running, steps, **settings):
    bounds = {n: b(steps) if callable(b) else b for n, b in (("r_max", layer.r_max), ("d_max", layer.d_max))}
    return jaxnorm.batch_renorm(x, running, *_affine(p), **bounds, **settings)


def _renorm_infer(layer, x, p, running, steps, **settings):
    return _normalized(layer, x, p, running, **settings)


def _split(layer, x, p, running, domain, **settings):
    return jaxnorm.split_batch_norm(x, domain, *_affine(p), num_domains=layer.num_domains, **settings)


def _split_infer(layer, x, p, running, domain, **settings):
    if layer.split_affine:
        p = {name: None if value is None else value[domain] for name, value in p.items()}
    return _normalized(layer, x, p, RunningStats(*(v[domain] for v in running)), **settings)


def _switchable(layer, x, p, _, **settings):
    return jaxnorm.switchable_norm(x, p["mean_logits"], p["var_logits"], *_affine(p), **settings)


def _switchable_infer(layer, x, p, running, **settings):
    return _switchable(layer, x, p, None, running=running, **settings)[0]


def _evonorm_b0(layer, x, p, _, **settings):
    return jaxnorm.evonorm_b0(x, *_affine(p), p["v"], **settings)


def _evonorm_b0_infer(layer, x, p, running, **settings):
    return _evonorm_b0(layer, x, p, None, running=running, **settings)[0]


def _evonorm_s0(layer, x, p, running, **settings):
    return jaxnorm.evonorm_s0(x, *_affine(p), p["v"], num_groups=layer.num_groups, **settings)


def _filter_response(layer, x, p, running, **settings):
    return jaxnorm.filter_response_norm(x, *_affine(p), p["threshold"], **settings)


def _dynamic_tanh(layer, x, p, running, *, axis, **settings):
    return jaxnorm.dynamic_tanh(x, p["alpha"], *_affine(p), axis=axis)


def _conditional_batch(layer, x, p, running, **settings):
    return jaxnorm.batch_norm(x, *_affine(p), **settings)


def _of_steps(layer, x: jax.Array, p: Settings) -> list[Any]:
    """Scale and bias, the same for every step, in the shape ``(time, *features)``."""
    return [None if v is None else jnp.broadcast_to(v, (x.shape[1], *v.shape)) for v in _affine(p)]


def _sequence(layer, x, p, running, *, axis, **settings):
    y, batch = jaxnorm.batch_norm(x, *_of_steps(layer, x, p), axis=(1, *_features(axis)), **settings)
    missing = layer.max_length - x.shape[1]
    if missing < 0:
        rule = "sequences must not be longer than max_length in training"
        _axes.fail("SequenceBatchNorm", rule, {"length": x.shape[1], "max_length": layer.max_length})
    return y, Moments(*(jnp.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1)) for v in batch))


def _sequence_infer(layer, x, p, running, *, axis, mask=None, **settings):
    steps = running_at(running, jnp.arange(x.shape[1]))
    return jaxnorm.normalize(x, steps, *_of_steps(layer, x, p), axis=(1, *_features(axis)), **settings)


def _features(axis: Any) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


REMEDIES = {
    "GhostBatchNorm": Remedy(_ghost, _normalized),
    "BatchRenorm": Remedy(_renorm, _renorm_infer),
    "SplitBatchNorm": Remedy(
        _split,
        _split_infer,
        leading=lambda layer: layer.num_domains,
        affine=lambda layer: (layer.num_domains,) if layer.split_affine else (),
    ),
    "SwitchableNorm": Remedy(_switchable, _switchable_infer, {"mean_logits": ((3,), 0.0), "var_logits": ((3,), 0.0)}),
    "EvoNormB0": Remedy(_evonorm_b0, _evonorm_b0_infer, {"v": (None, 1.0)}),
    "EvoNormS0": Remedy(_evonorm_s0, None, {"v": (None, 1.0)}),
    "FilterResponseNorm": Remedy(_filter_response, None, {"threshold": (None, 0.0)}),
    "DynamicTanh": Remedy(_dynamic_tanh, None, {"alpha": ((), 0.5)}),
    "SequenceBatchNorm": Remedy(
        _sequence, _sequence_infer, leading=lambda layer: layer.max_length, averages=RunningStats._fields
    ),
    "ConditionalBatchNorm": Remedy(_conditional_batch, _normalized),
    "ConditionalInstanceNorm": Remedy(lambda layer, x, p, running, **s: jaxnorm.instance_norm(x, *_affine(p), **s)),
    "ConditionalLayerNorm": Remedy(lambda layer, x, p, running, **s: jaxnorm.layer_norm(x, *_affine(p), **s)),
    "StepBatchNorm": Remedy(_conditional_batch, _normalized, averages=RunningStats._fields),
}


START = {"mean": jnp.zeros, "var": jnp.ones, "count": jnp.zeros}
"""Averages before there are any."""


def running_stats(stored: dict[str, jax.Array], shape: tuple[int, ...]) -> RunningStats:
    """The averages that a layer holds; those of one batch norm, carried over, serve all domains."""
    return RunningStats(*(jnp.broadcast_to(stored.get(n, 0.0), shape) for n in RunningStats._fields))


def name_of(layer: Any) -> str:
    """The remedy that a layer is, whatever its class was derived to."""
    return next(c.__name__ for c in type(layer).__mro__ if c.__name__ in REMEDIES)


def call(
    layer: Any,
    x: jax.Array,
    parameters: Settings,
    running: Any,
    inputs: tuple[Any, ...],
    settings: Settings,
    *,
    use_running_average: bool | None,
    initializing: bool,
) -> tuple[jax.Array, RunningStats | None]:
    """The output of a layer in the dtype that Flax gives it; and its running averages, where they change."""
    name = name_of(layer)
    remedy = REMEDIES[name]
    settings = {"axis": layer.axis, "epsilon": layer.epsilon} | {k: v for k, v in settings.items() if v is not None}
    if remedy.infer is None:
        return remedy.train(layer, x, parameters, None, *inputs, **settings), None
    if use_running_average is None:
        rule = "use_running_average must be given at construction or in the call"
        _axes.fail(name, rule, {"use_running_average": None})
    if use_running_average:
        return remedy.infer(layer, x, parameters, running, *inputs, **settings), None
    if not initializing:
        replicas = {"axis_name": layer.axis_name, "axis_index_groups": layer.axis_index_groups}
        settings |= {k: v for k, v in replicas.items() if v is not None}
    y, batch = remedy.train(layer, x, parameters, running, *inputs, **settings)
    if initializing:
        return y, None
    batch = Moments(*map(jax.lax.stop_gradient, batch))
    return y, update_running(running, batch, alpha=1 - layer.momentum)


def recurrent_step(denses: Any, norms: Any, bias: Any, carry: Any, x: Any) -> tuple[Any, jax.Array]:
    """One step of an LSTM whose terms are normalized by the statistics of the step (Cooijmans et al., 2017)."""
    (dense_h, dense_x), (norm_h, norm_x, norm_c), (c, h) = denses, norms, carry
    gates = norm_h(dense_h(h)) + norm_x(dense_x(x))
    i, f, g, o = jnp.split(gates + jnp.broadcast_to(bias, gates.shape), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(norm_c(c))
    return (c, h), h


def extend_steps(batch_stats: Any, length: int) -> Any:
    """The averages of every step for ``length`` of them, those of the last step seen for the steps beyond it.

    Args:
      batch_stats: the collection of a cell under ``nn.scan``: of each norm ``mean``, ``var`` and ``count`` in the shape
        ``(time, *features)``, or dictionaries of them by name.
      length: how many steps there are to be.

    Returns:
      The collection, in which they have the shape ``(length, *features)``.

    Raises:
      KeyError: a norm without ``var`` or ``count``.
      ValueError: averages that have no axis of time.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm.linen import extend_steps
      >>> seen = {"mean": jnp.array([1.0, 2.0]), "var": jnp.ones(2), "count": jnp.array([8.0, 8.0])}
      >>> extend_steps({"norm_h": seen}, 4)["norm_h"]["mean"].tolist()
      [1.0, 2.0, 2.0, 2.0]

    References:
      Cooijmans, Ballas, Laurent, Gulcehre and Courville, "Recurrent Batch Normalization", ICLR 2017, section 3.
    """
    if "mean" in batch_stats:
        running = RunningStats(batch_stats["mean"], batch_stats["var"], batch_stats["count"])
        return dict(running_at(running, jnp.arange(length))._asdict())
    return {name: extend_steps(value, length) for name, value in batch_stats.items()}
