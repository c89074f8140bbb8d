"""Running averages for other weights, or for other data, without the training program."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import tee
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import Moments, merge_moments
from jaxnorm.surgery._measure import Measuring, Stats, at, measure
from jaxnorm.surgery._norms import Where

Inputs = Callable[[Any], Any] | None


def recalibrate(
    model: Any,
    variables: Any,
    data: Iterable[Any],
    *,
    layer_by_layer: bool = False,
    inputs: Inputs = None,
    where: Where = None,
    mesh: Mesh | None = None,
    **kwargs: Any,
) -> Any:
    """Replace the running averages of batch norms by the statistics of a data set: exact, merged by counts.

    In one pass, batch norms normalize by their batch as in training, and the moments of all that each sees are merged,
    over its calls and over the batches. Layer by layer, those before already have their final averages, so that what
    each measures is what it will see at inference; that takes a pass for every norm. The remedy for averages that are
    stale, poisoned, or of other weights.

    A batch by which the statistics of any norm are not finite is left out, with a warning that counts (under ``jit``
    without it).

    Args:
      model: a Linen or an NNX module, of Flax's norms or jaxnorm's. Nothing is changed in place.
      variables: of the Linen module; None for an NNX module, whose own are used.
      data: batches of any sizes: arrays, or tuples of arrays for a model with several inputs. What can be read only
        once is kept, where there is more than one pass.
      layer_by_layer: normalize what comes before each norm by final averages.
      inputs: a function of a batch, which says what the model is called with: an array, a tuple of arguments, or a pair
        of such a tuple and a dictionary of keyword arguments. ``lambda batch: batch[0]`` for images with labels.
      where: which norms: a regular expression that matches the whole path, as in "Block_[01]/.*"; a kind of norm, or
        several; a function of the path; None for all but those that `freeze` froze. Others use their averages.
      mesh: to shard batches over, along all of its axes; one whose size does not divide is computed on every device.
        Arrays that are sharded already need none.
      **kwargs: for each call of the model, as ``train=False``; batch norms do the above whatever their calls say.

    Returns:
      ``variables`` with other ``batch_stats``; for an NNX module, its state with other averages, for ``nnx.update``.

    Raises:
      ValueError: no batches, none that is finite, no batch norms; or the model cannot be called with a batch.

    Warns:
      UserWarning: batches were left out, or modules with averages that are not known.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm import surgery
      >>> model, x = nn.BatchNorm(use_running_average=True), jnp.array([[1.0], [3.0], [5.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> labelled = [(x[:2], jnp.array([0, 1])), (x[2:], jnp.array([0]))]
      >>> variables = surgery.recalibrate(model, variables, labelled, inputs=lambda batch: batch[0])
      >>> variables["batch_stats"]["mean"].tolist()
      [3.0]

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    passes = _Passes("recalibrate", model, variables, data, inputs, where, mesh, kwargs)
    merged, _ = passes.merged(passes.variables, {})
    if not layer_by_layer:
        return passes.replaced(passes.variables, merged)
    variables, settled = passes.variables, dict[str, np.ndarray]()
    for path, rank in passes.how.ranks.items():
        shape = merged[path]["mean"].shape
        stack = shape[: len(shape) - rank]  # layers of ``nn.scan``: one after another
        settled[path] = np.zeros(shape, bool)
        for layer in np.ndindex(*stack):
            measured, _ = passes.merged(variables, settled)
            settled[path][layer] = True
            old = passes.averages(variables, path)
            chosen = {n: jnp.where(settled[path], measured[path][n], old.get(n, measured[path][n])) for n in _FIELDS}
            variables = passes.replaced(variables, {path: chosen})
    return variables


def adapt(
    model: Any,
    variables: Any,
    data: Iterable[Any],
    *,
    source_weight: float = 16.0,
    inputs: Inputs = None,
    where: Where = None,
    mesh: Mesh | None = None,
    **kwargs: Any,
) -> Any:
    r"""Move the running averages of batch norms towards the statistics of data from elsewhere, without labels.

    With :math:`n` examples and the weight :math:`N` of the averages from training,

    .. math:: \mu = \frac{N \mu_s + n \mu_t}{N + n} \qquad \sigma^2 = \frac{N \sigma^2_s + n \sigma^2_t}{N + n}

    Args:
      model: a Linen or an NNX module, of Flax's norms or jaxnorm's. Nothing is changed in place.
      variables: of the Linen module; None for an NNX module, whose own are used.
      data: batches of inputs from where the model is to work.
      source_weight: N, in examples: zero to forget the training data.
      inputs: a function of a batch, which says what the model is called with: an array, a tuple of arguments, or a pair
        of such a tuple and a dictionary of keyword arguments.
      where: which norms: a regular expression that matches the whole path, as in "Block_[01]/.*"; a kind of norm, or
        several; a function of the path; None for all but those that `freeze` froze. Others use their averages.
      mesh: to shard batches over, along all of its axes; one whose size does not divide is computed on every device.
      **kwargs: for each call of the model, as ``train=False``.

    Returns:
      As `recalibrate`.

    Raises:
      ValueError: as `recalibrate`; or a negative weight.

    Warns:
      UserWarning: as `recalibrate`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm import surgery
      >>> model, x = nn.BatchNorm(use_running_average=True), jnp.array([[1.0], [3.0]])
      >>> variables = surgery.adapt(model, model.init(jax.random.key(0), x), [x], source_weight=2.0)
      >>> variables["batch_stats"]["mean"].tolist()
      [1.0]

    References:
      Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020.
      Li et al., "Revisiting Batch Normalization for Practical Domain Adaptation", 2016, for N of zero.
    """
    if source_weight < 0:
        raise ValueError(f"adapt: source_weight must not be negative; got {source_weight}.")
    passes = _Passes("adapt", model, variables, data, inputs, where, mesh, kwargs)
    target, examples = passes.merged(passes.variables, {})
    weight = examples / (examples + source_weight)
    moved: Stats = {}
    for path, stats in target.items():
        old = passes.averages(passes.variables, path)
        mean, var = ((1 - weight) * old[name] + weight * stats[name] for name in ("mean", "var"))
        moved[path] = {"mean": mean, "var": var, "count": old.get("count", stats["count"])}
    return passes.replaced(passes.variables, moved)


_FIELDS = Moments._fields


class _Passes:
    """Passes of a model over a data set."""

    def __init__(
        self,
        function: str,
        model: Any,
        variables: Any,
        data: Iterable[Any],
        inputs: Inputs,
        where: Where,
        mesh: Mesh | None,
        kwargs: dict[str, Any],
    ) -> None:
        if not isinstance(model, nn.Module | nnx.Module):
            raise TypeError(f"{function}: model must be a Linen or an NNX module; got {type(model).__name__}.")
        self.is_linen = isinstance(model, nn.Module)
        if not self.is_linen and variables is not None:
            raise TypeError(f"{function}: variables must be None for an NNX module, which has its own.")
        self.graph, self.variables = (model, variables) if self.is_linen else nnx.split(model)
        self.how = Measuring(function, where=where)
        self.data, self.inputs, self.mesh, self.kwargs = data, inputs, mesh, kwargs

        @partial(jax.jit, static_argnums=0)
        def step(static, variables, settled, total, arrays):
            args, more = _joined(static, arrays)
            stats = measure(self.how, self.graph, variables, args, kwargs | more, settled)
            finite = jnp.array([jnp.isfinite(value).all() for s in stats.values() for value in s.values()]).all()
            merged = {p: merge_moments(_moments(total[p]), _moments(s))._asdict() for p, s in stats.items() if total}
            examples = next((a.shape[0] for a in arrays if a.ndim), 0)
            keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
            total = jax.tree.map(keep, merged, total) if total else jax.tree.map(lambda new: keep(new, 0), stats)
            return total, jnp.where(finite, examples, 0), finite

        self.step = step

    def merged(self, variables: Any, settled: dict[str, Any]) -> tuple[Stats, Any]:
        """Merged moments of all finite batches, by path in the order of the network; and how many examples."""
        if iter(self.data) is self.data:  # it can be read only once
            self.data, data = tee(self.data)
        else:
            data = self.data
        total, counts = {}, []
        for i, batch in enumerate(_shown(data, self.how.function)):
            static, arrays = _split(self._arguments(batch))
            try:
                total, *count = self.step(static, variables, settled, total, self._placed(arrays))
            except Exception as error:
                self._explain(error, i, batch)
                raise
            counts.append(count)
        if not counts:
            raise ValueError(f"{self.how.function}: data must hold at least one batch; got none.")
        if not total:
            raise ValueError(f"{self.how.function}: the model must have at least one batch norm; found none.")
        total = {path: total[path] for path in self.how.ranks}
        if isinstance(counts[0][0], Tracer):  # within ``jit``, which cannot warn
            return total, sum(examples for examples, _ in counts)
        examples, finite = np.array(counts, int).T
        left_out = f"{sum(finite == 0)} of {len(finite)} batches give statistics that are not finite"
        if not finite.any():
            raise ValueError(f"{self.how.function}: {left_out}; there is nothing to measure.")
        if not finite.all():
            warnings.warn(f"{self.how.function}: {left_out}; they were left out.", stacklevel=3)
        return total, int(examples.sum())

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with."""
        given = batch if self.inputs is None else self.inputs(batch)
        args, more = (given if isinstance(given, tuple) else (given,)), {}
        if self.inputs is not None and len(args) == 2 and isinstance(args[0], tuple) and isinstance(args[1], dict):
            args, more = args
        return args, more

    def _placed(self, arrays: list[Any]) -> list[Any]:
        """Arrays on the mesh; where they do not divide, on every device."""
        if self.mesh is None:
            return arrays
        even = all(a.ndim and a.shape[0] % self.mesh.size == 0 for a in arrays)
        return jax.device_put(arrays, NamedSharding(self.mesh, P(self.mesh.axis_names) if even else P()))

    def _explain(self, error: Exception, i: int, batch: Any) -> None:
        """Say which batch it was; and what ``inputs`` is for, where the batch may hold more than inputs."""
        what = f"{self.how.function}: the model was called with batch {i}"
        if self.inputs is None and isinstance(batch, tuple | list | dict):
            rule = "say by inputs= what of it the model takes, as inputs=lambda batch: batch[0]"
            raise ValueError(f"{what}, a {type(batch).__name__} of {len(batch)}; {rule}. {error}") from error
        error.add_note(f"{what}.")

    def averages(self, variables: Any, path: str) -> dict[str, Any]:
        """Mean, var and perhaps count of one norm."""
        if self.is_linen:
            return dict(at(variables["batch_stats"], path))
        part: Any = nnx.to_pure_dict(nnx.filter_state(variables, nnx.BatchStat))
        for name in path.split("/") if path else ():
            part = part[int(name) if name.isdigit() and int(name) in part else name]
        return part

    def replaced(self, variables: Any, new: Stats) -> Any:
        """``variables`` with other averages, in their dtypes."""

        def value(keys, old):
            names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
            if isinstance(keys[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
                names = names[:-1]
            stats = new.get("/".join(names[:-1]), {})
            return jnp.asarray(stats[names[-1]], old.dtype).reshape(np.shape(old)) if names[-1] in stats else old

        if not self.is_linen:
            return jax.tree_util.tree_map_with_path(value, variables)
        return {**variables, "batch_stats": jax.tree_util.tree_map_with_path(value, variables["batch_stats"])}


def _split(arguments: Any) -> tuple[Any, list[Any]]:
    """What is static of the arguments of a call, as ``train=True``, and the arrays."""
    leaves, tree = jax.tree.flatten(arguments)
    arrays = [leaf for leaf in leaves if hasattr(leaf, "ndim")]
    return (tree, tuple(None if hasattr(leaf, "ndim") else leaf for leaf in leaves)), arrays


def _joined(static: Any, arrays: list[Any]) -> Any:
    (tree, leaves), rest = static, iter(arrays)
    return jax.tree.unflatten(tree, [next(rest) if leaf is None else leaf for leaf in leaves])


def _moments(stats: dict[str, Any]) -> Moments:
    return Moments(*(stats[name] for name in _FIELDS))


def _shown(data: Iterable[Any], function: str) -> Iterator[Any]:
    """The batches, with a line that says how many were measured where somebody watches, for rich shows it."""
    if sys.stderr.isatty():
        with suppress(ImportError):
            from rich.console import Console
            from rich.progress import track

            data = track(data, description=function, console=Console(stderr=True), transient=True)
    yield from data
