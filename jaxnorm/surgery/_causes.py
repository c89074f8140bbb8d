"""Why evaluation collapses: what the running averages and a batch say together.

Each cause predicts the averages from the batch. How far a prediction is from the averages is the mean over the channels
of the squared distance of the means, in deviations, plus the squared log ratio between the variances. A cause
is found where it explains at least four fifths of the distance between averages and batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import Moments

EXPLAINED, STALE, AVERAGED = 0.2, "stale", "averaged weights"
ENOUGH = 32
"""How many examples a batch must have to be compared with the averages."""
NAMES = ("single",)

REMEDIES = {
    "never updated": "train with the collection mutable and its updates kept, or recalibrate",
    "momentum too slow": "train longer, lower the momentum, average cumulatively (momentum=None), or recalibrate",
    "not finite": "recalibrate; jaxnorm's norms never average what is not finite",
    "wrong axis": "let axis be that of the channels",
    "scaled differently": "prepare the inputs of evaluation as those of training",
    "batch of one": "larger batches, statistics over several devices (axis_name), or group norm",
    "not synchronized": "name the axis of the devices (axis_name), or average batch_stats over them",
    AVERAGED: "recalibrate after averaging the weights (EMA, SWA): the statistics are of those before",
    STALE: "recalibrate on data such as this, or freeze the norms earlier in training",
}


class Finding(NamedTuple):
    """What is wrong with a norm, as `inspect` finds it: see its example.

    Attributes:
      path: of the norm; "all norms" where it is all of them.
      cause: "never updated", "momentum too slow", "not finite", "wrong axis", "scaled differently", "batch of one",
        "not synchronized", "averaged weights" or "stale".
      seen: what says so.
      remedy: what to do.
    """

    path: str
    cause: str
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.cause} ({self.seen}). Remedy: {self.remedy}."


def of_input(x: jax.Array, features: tuple[int, ...], batch: Moments) -> dict[str, jax.Array]:
    """What distinguishes causes, in the shape of the averages: the mean variance within single examples."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inner = tuple(a for a in range(1, x.ndim) if a not in features)
    single = jnp.mean(jnp.var(x, inner), 0) if inner and 0 not in features else batch.var
    return {"single": jnp.broadcast_to(single, batch.var.shape)}


@dataclass
class Seen:
    """A norm: its settings, its averages, and what it saw of a batch, or None.

    Attributes:
      path: of the norm.
      settings: of the norm.
      averages: mean and var, if it has them.
      batch: mean, var, count and `of_input` of the batch.
      first: whether no norm is before it.
      examples: how many the batch has.
      features: axes of the features.
      channels: axis of the channels of the layer before, where it is known.
    """

    path: str
    settings: dict[str, Any]
    averages: dict[str, Any]
    batch: dict[str, np.ndarray] | None
    first: bool
    examples: int = 0
    features: tuple[int, ...] = ()
    channels: int | None = None

    @property
    def mean(self) -> np.ndarray:
        """The running mean."""
        return np.asarray(self.averages["mean"], np.float64)

    @property
    def var(self) -> np.ndarray:
        """The running variance."""
        return np.asarray(self.averages["var"], np.float64)

    @property
    def epsilon(self) -> float:
        """Added to variances."""
        return float(self.settings.get("epsilon", 1e-5))

    def never(self) -> bool:
        """Whether the averages are those of initialization."""
        return bool((self.mean == 0).all() and (self.var == 1).all())

    def updates(self) -> str:
        """How often they were updated."""
        if self.never():
            return "never"
        momentum, left = self.settings.get("momentum"), self.initial_weight()
        if left is None or not momentum or not 0 < left < 1:
            return "some"
        return f"about {max(1, round(np.log(left) / np.log(momentum)))}"

    def distance(self) -> tuple[float, float]:
        """`NormState.drift` and `NormState.spread`."""
        assert self.batch is not None
        shift = (self.batch["mean"] - self.mean) / np.sqrt(self.var + self.epsilon)
        ratio = np.log((self.batch["var"] + self.epsilon) / (self.var + self.epsilon))
        return float(np.sqrt(np.mean(shift**2))), float(np.exp(np.mean(ratio) / 2))

    def misfit(self, mean: np.ndarray, var: np.ndarray) -> float:
        """How far a prediction of the averages is from them."""
        shift = (mean - self.mean) / np.sqrt(self.var + self.epsilon)
        ratio = np.log((np.maximum(var, 0) + self.epsilon) / (self.var + self.epsilon))
        return float(np.mean(shift**2) + np.mean(ratio**2))

    def initial_weight(self) -> float | None:
        """The weight that mean zero and variance one still have in the averages, if they are the batch but for that."""
        if self.batch is None or not np.isfinite(self.mean).all():
            return None
        mean, var = self.batch["mean"], self.batch["var"]
        new = np.concatenate(
            [mean.ravel() / np.sqrt(var.ravel() + self.epsilon), (var.ravel() - 1) / (var.ravel() + 1)]
        )
        old = np.concatenate(
            [self.mean.ravel() / np.sqrt(var.ravel() + self.epsilon), (self.var.ravel() - 1) / (var.ravel() + 1)]
        )
        weight = 1 - float(np.dot(new, old) / max(np.dot(new, new), 1e-30))
        fits = self.misfit((1 - weight) * mean, weight + (1 - weight) * var) < EXPLAINED * self.misfit(mean, var)
        return weight if 0 < weight < 1 and fits else None


def diagnose(seen: Seen) -> list[Finding]:
    """What is wrong with one norm."""
    if not seen.averages:
        return []
    causes: list[tuple[str, str]] = []
    apart = _unsynchronized(seen.averages)
    if apart:
        causes.append(("not synchronized", f"{apart} devices hold averages of their own"))
    bad = int(np.sum(~(np.isfinite(seen.mean) & np.isfinite(seen.var))))
    if bad:
        causes.append(("not finite", f"in {bad} of {seen.mean.size} channels"))
    elif seen.never():
        causes.append(("never updated", "means are zero and variances one, as at initialization"))
    if seen.channels is not None and seen.channels not in seen.features:
        along = ", ".join(map(str, seen.features))
        causes.append(("wrong axis", f"along {along}, and the layer before puts its channels along {seen.channels}"))
    elif seen.batch is not None and seen.examples >= ENOUGH and not bad and not seen.never():
        causes += _by_distance(seen)
    return [Finding(seen.path, cause, what, REMEDIES[cause]) for cause, what in causes]


def _unsynchronized(averages: dict[str, Any]) -> int:
    """On how many devices replicas of the averages differ."""
    values = averages["mean"]
    shards = getattr(values, "addressable_shards", [])
    whole = [np.asarray(shard.data) for shard in shards if shard.data.shape == values.shape]
    return len(whole) if any(not np.array_equal(whole[0], w, equal_nan=True) for w in whole[1:]) else 0


def _by_distance(seen: Seen) -> list[tuple[str, str]]:
    """The cause that explains the distance between averages and batch best."""
    assert seen.batch is not None
    mean, var, count = (seen.batch[name] for name in Moments._fields)
    if count.max() <= 1:
        return [("batch of one", "a batch holds one value of each feature")]
    drift, spread = seen.distance()
    ratios = np.log((var + seen.epsilon) / (seen.var + seen.epsilon)) / 2
    if drift < max(0.25, 3 / np.sqrt(seen.examples)) and np.sqrt(np.mean(ratios**2)) < 0.2:
        return []
    weight, far = seen.initial_weight(), seen.misfit(mean, var)
    scale = np.exp(np.mean(ratios))
    fits = {"batch of one": seen.misfit(mean, seen.batch["single"])}
    if weight is not None:
        fits["momentum too slow"] = seen.misfit((1 - weight) * mean, weight + (1 - weight) * var)
    if seen.first:
        fits["scaled differently"] = seen.misfit(mean / scale, var / scale**2)
    words = {
        "batch of one": "the averages are those of single examples",
        "momentum too slow": f"initial values still weigh {weight or 0:.2f}",
        "scaled differently": f"the inputs are {scale:.3g} times those of training",
        STALE: f"means {drift:.3g} deviations apart, deviations {spread:.3g} times the averages'",
    }
    best = min(fits, key=lambda cause: fits[cause])
    best = best if fits[best] < EXPLAINED * far else STALE
    return [(best, words[best])]


def of_all(norms: Sequence[Seen], findings: Sequence[Finding]) -> Finding | None:
    """What shows in all norms together: less variance than the averages say everywhere, by little in each."""
    seen = [norm for norm in norms if norm.batch is not None and norm.averages and norm.examples >= ENOUGH]
    if len(seen) < 2 or any(finding.cause != STALE or finding.path == seen[0].path for finding in findings):
        return None
    logs = np.log([norm.distance()[1] for norm in seen])
    if not (logs < 0).all() or logs.mean() > -max(0.03, 0.7 / np.sqrt(seen[0].examples)):
        return None
    what = f"each sees less deviation than its averages say, {1 - np.exp(logs.mean()):.0%} in the mean"
    return Finding("all norms", AVERAGED, what, REMEDIES[AVERAGED])
