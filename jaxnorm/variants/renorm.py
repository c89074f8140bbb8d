"""Batch renormalization: what is used in training is what is used at inference, but for a bounded correction."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import _axes
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Formula
from jaxnorm._moments import Moments, Statistics
from jaxnorm.functional import Array, Groups, normalize_array
from jaxnorm.running import RunningStats
from jaxnorm.variants._examples import check_running


def batch_renorm(
    x: Array,
    running: RunningStats,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    r_max: float | jax.Array,
    d_max: float | jax.Array,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> tuple[jax.Array, Moments]:
    r"""Normalize by the statistics of the batch, then correct towards the running averages, within bounds.

    With :math:`s = \sqrt{\sigma^2 + \epsilon}` of the averages and :math:`s_B` of the batch,

    .. math:: y = \gamma \left(\frac{x - \mu_B}{s_B} r + d\right) + \beta \qquad
       r = \mathrm{clip}\left(\frac{s_B}{s}, \frac{1}{r_{max}}, r_{max}\right) \qquad
       d = \mathrm{clip}\left(\frac{\mu_B - \mu}{s}, -d_{max}, d_{max}\right)

    where r and d are constants to differentiation. With bounds of 1 and 0 that is `batch_norm`; with bounds that do
    not bind, `normalize` by the averages, yet with gradients through the statistics of the batch. For batches that
    are small, or whose examples are similar.

    Args:
      x: real floating point array, of any rank.
      running: `RunningStats` before this batch, in the shape of the feature axes.
      scale: gamma, in the shape of the feature axes in the order given, or ``(batch, *features)``; None for one.
      bias: beta, in the same shape; None for zero.
      r_max: bound of r, at least 1; may be traced.
      d_max: bound of d, at least 0; may be traced.
      axis: the feature axis, or several. Default: the last.
      epsilon: added to the variances, in the squared unit of ``x``. Default: 1e-5.
      mask: broadcasts against ``x``. True, or a non-negative weight, where a value enters the statistics; every value
        is normalized. What is masked out may be NaN. If nothing is left, the normalized value is zero. Default: None,
        every value is measured.
      axis_name: mapped axis or axes (``shard_map``, ``vmap``, ``pmap``) whose replicas are normalized together. Leave
        it out under ``jit``.
      axis_index_groups: lists of replicas that together hold each once; each list is normalized separately.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``(y, batch)``: ``y`` in the shape and dtype of ``x``, and the `Moments` of the batch for `update_running`, of
      which the paper takes ``alpha=0.01``.

    Raises:
      TypeError: an integer or complex array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x, running = jnp.array([[1.0], [3.0]]), jaxnorm.init_running(1)
      >>> jaxnorm.batch_renorm(x, running, r_max=1.0, d_max=0.0, epsilon=0.0)[0].tolist()
      [[-1.0], [1.0]]
      >>> jaxnorm.batch_renorm(x, running, r_max=3.0, d_max=5.0, epsilon=0.0)[0].tolist()
      [[1.0], [3.0]]

      The bounds of the paper: batch normalization for 5,000 steps, then wider up to step 40,000 and 25,000.

      >>> import optax
      >>> r_max = optax.linear_schedule(1.0, 3.0, transition_steps=35_000, transition_begin=5_000)
      >>> d_max = optax.linear_schedule(0.0, 5.0, transition_steps=20_000, transition_begin=5_000)
      >>> [round(float(bound(step)), 3) for step in (0, 15_000, 40_000) for bound in (r_max, d_max)]
      [1.0, 0.0, 1.571, 2.5, 3.0, 5.0]

    References:
      Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", NeurIPS 2017,
      algorithm 1.
    """
    function = "batch_renorm"
    x, features = _axes.check_input(function, x, axis)
    if jnp.iscomplexobj(x):
        _axes.fail(function, "x must be real", {"dtype": str(x.dtype)}, TypeError)
    mean, var = check_running(function, running, features, x)
    _axes.check_number(function, "r_max", r_max, 1.0, float("inf"))
    _axes.check_number(function, "d_max", d_max, 0.0, float("inf"))
    return normalize_array(
        function,
        x,
        scale,
        bias,
        features=features,
        axes=_axes.others(features, x),
        kept=features,
        near=mean,
        epsilon=epsilon,
        adjust=Correction(features),
        of_adjust=(mean, var, r_max, d_max, epsilon),
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )


@dataclass(frozen=True)
class Correction(Formula):
    """Towards the averages, within bounds: the ``adjust`` of batch renormalization.

    Attributes:
      features: the axes of the averages.
    """

    features: tuple[int, ...]

    def __call__(self, batch: Statistics, mean, var, r_max, d_max, epsilon) -> Statistics:
        """Those of which ``(x - mean) / sqrt(var + epsilon)`` is ``(x - mean_B) / s_B * r + d``."""
        mean, var = (_axes.laid_out(v, self.features, batch.var) for v in (mean, var))
        s, s_b = jnp.sqrt(var + epsilon), jnp.sqrt(batch.var + epsilon)
        difference = (batch.center - mean) + batch.offset
        r = lax.stop_gradient(jnp.clip(s_b / s, 1 / r_max, r_max))
        d = lax.stop_gradient(jnp.clip(difference / s, -d_max, d_max))
        return batch._replace(offset=batch.offset - d * s_b / r, var=(batch.var + epsilon) / r**2 - epsilon)
