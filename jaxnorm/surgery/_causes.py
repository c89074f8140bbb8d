"""Why evaluation collapses: what the running averages and a batch say together.

Each cause predicts the averages from the batch. How far a prediction is from the averages is the mean over the channels
of the squared distance of the means, in deviations, and of the squared logarithm of the ratio of the variances. A cause
is found where it explains at least four fifths of the distance between averages and batch.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import Moments

EXPLAINED, STALE = 0.2, "stale"
NAMES = ("own", "other", "single")

REMEDIES = {
    "never updated": "train with the collection mutable and its updates kept, or recalibrate",
    "momentum too slow": "train longer, lower the momentum, average cumulatively (momentum=None), or recalibrate",
    "not finite": "recalibrate; jaxnorm's norms never average what is not finite",
    "wrong axis": "let axis be that of the channels",
    "scaled differently": "prepare the inputs of evaluation as those of training",
    "batch of one": "larger batches, statistics over several devices (axis_name), or group norm",
    "not synchronized": "name the axis of the devices (axis_name), or average batch_stats over them",
    STALE: "recalibrate on data such as this, or freeze the norms earlier in training",
}


class Finding(NamedTuple):
    """What is wrong with a norm, as `inspect` finds it: see its example.

    Attributes:
      path: of the norm.
      cause: "never updated", "momentum too slow", "not finite", "wrong axis", "scaled differently", "batch of one",
        "not synchronized" or "stale".
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
    """What else tells causes apart, each in the shape of the features.

    How unlike each other the features are, and how unlike each other what lies along any other axis but the first; and
    the variance within single examples.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inner = tuple(a for a in range(1, x.ndim) if a not in features)
    own = _unlikeness(x, features)
    other = jnp.stack([jnp.zeros_like(own), *(_unlikeness(x, (a,)) for a in inner if x.shape[a] > 1)]).max()
    single = jnp.mean(jnp.var(x, inner), 0) if inner and 0 not in features else batch.var
    values = zip(NAMES, (own, other, single), strict=True)
    return {name: jnp.broadcast_to(value, batch.var.shape) for name, value in values}


def _unlikeness(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The variance of the means along ``axes`` over the mean variance, and that of the logarithm of the variance."""
    rest = tuple(a for a in range(x.ndim) if a not in axes)
    mean, var = jnp.mean(x, rest), jnp.var(x, rest)
    tiny = jnp.finfo(var.dtype).tiny
    return jnp.var(mean) / (jnp.mean(var) + tiny) + jnp.var(jnp.log(var + 1e-6 * jnp.mean(var) + tiny))


@dataclass
class Seen:
    """A norm: its settings, its averages, and what it saw of a batch, or None."""

    path: str
    settings: dict[str, Any]
    averages: dict[str, Any]
    batch: dict[str, np.ndarray] | None
    first: bool

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
    if seen.batch is not None:
        causes += _by_axis(seen.batch) or ([] if bad or seen.never() else _by_distance(seen))
    return [Finding(seen.path, cause, what, REMEDIES[cause]) for cause, what in causes]


def _unsynchronized(averages: dict[str, Any]) -> int:
    """On how many devices replicas of the averages differ."""
    values = averages["mean"]
    shards = getattr(values, "addressable_shards", [])
    whole = [np.asarray(shard.data) for shard in shards if shard.data.shape == values.shape]
    return len(whole) if any(not np.array_equal(whole[0], w, equal_nan=True) for w in whole[1:]) else 0


def _by_axis(batch: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    own, other = float(batch["own"].flat[0]), float(batch["other"].flat[0])
    if other < max(4 * own, 0.05):
        return []
    return [
        (
            "wrong axis",
            f"what lies along another axis differs {other / max(own, 1e-30):.3g} times as much as the features",
        )
    ]


def _by_distance(seen: Seen) -> list[tuple[str, str]]:
    """The cause that explains the distance between averages and batch best."""
    assert seen.batch is not None
    mean, var, count = (seen.batch[name] for name in Moments._fields)
    if count.max() <= 1:
        return [("batch of one", "a batch holds one value of each feature")]
    drift, spread = seen.distance()
    ratios = np.log((var + seen.epsilon) / (seen.var + seen.epsilon)) / 2
    if drift < max(0.25, 3 / np.sqrt(count.max())) and np.sqrt(np.mean(ratios**2)) < 0.2:
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
