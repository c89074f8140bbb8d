"""Split batch normalization: every example with the examples of its domain."""

from dataclasses import dataclass

import jax

from jaxnorm import _axes
from jaxnorm._axes import Axes, AxisNames
from jaxnorm._epilogue import Activation, Formula
from jaxnorm._moments import Moments, Statistics
from jaxnorm._replicas import Replicas
from jaxnorm.functional import Array, Groups, normalize_array
from jaxnorm.variants._examples import check_examples, check_labels, merge_labelled, of_label


def split_batch_norm(
    x: Array,
    domain: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    num_domains: int,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Groups | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> tuple[jax.Array, Moments]:
    r"""Normalize every example by the statistics of the examples of its domain.

    .. math:: y = \gamma_k \, \frac{x - \mu_k}{\sqrt{\sigma_k^2 + \epsilon}} + \beta_k

    for an example of domain k. One batch may hold several domains in any order: clean and adversarial examples, source
    and target of an adaptation.

    Args:
      x: real or complex floating point array of shape ``(batch, ...)``.
      domain: integers of shape ``(batch,)`` in ``[0, num_domains)``; an example of another number has no statistics.
      scale: gamma, in the shape of the feature axes in the order given, or ``(num_domains, *features)``; None for one.
      bias: beta, in the same shape; None for zero.
      num_domains: how many domains there are.
      axis: the feature axis, or several, not the first. Default: the last.
      epsilon: added to the variance, in the squared unit of ``x``. Default: 1e-5.
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
      ``(y, batch)``: ``y`` in the shape and dtype of ``x``; and the `Moments` of each domain, ``(num_domains,
      *features)``, for `update_running`, which leaves the averages of a domain without examples as they were. At
      inference, ``normalize(x, (running.mean[domain], running.var[domain]), ...)``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> x, domain = jnp.array([[1.0], [10.0], [3.0], [30.0]]), jnp.array([0, 1, 0, 1])
      >>> y, batch = jaxnorm.split_batch_norm(x, domain, num_domains=2, epsilon=0.0)
      >>> y.tolist(), batch.mean.tolist()
      ([[-1.0], [-1.0], [1.0], [1.0]], [[2.0], [20.0]])

    References:
      Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020. Chang et al., "Domain-Specific Batch
      Normalization for Unsupervised Domain Adaptation", CVPR 2019.
    """
    function = "split_batch_norm"
    x, features, axes = check_examples(function, x, axis)
    replicas = Replicas(*_axes.check_replicas(function, axis_name, axis_index_groups))
    domain = check_labels(function, "domain", "num_domains", domain, num_domains, x)
    shape = tuple(x.shape[a] for a in features)

    def of_examples(name: str, value: Array | None) -> jax.Array | None:
        if value is None:
            return None
        value = _axes.as_input(function, name, value)
        if value.shape not in (shape, (num_domains, *shape)):
            rule = f"{name} must have the shape of the feature axes of x, {shape}, or (num_domains, *features)"
            _axes.fail(function, rule, {"shape": value.shape, "num_domains": num_domains})
        return value if value.shape == shape else of_label(value, domain)

    return normalize_array(
        function,
        x,
        of_examples("scale", scale),
        of_examples("bias", bias),
        features=features,
        axes=axes,
        kept=(0, *features),
        epsilon=epsilon,
        adjust=Domains(num_domains, replicas),
        of_adjust=(domain,),
        mask=mask,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )


@dataclass(frozen=True)
class Domains(Formula):
    """Examples of a domain share their statistics: the ``adjust`` of split batch normalization.

    Attributes:
      num_domains: how many domains there are.
      replicas: whose examples they are.
    """

    num_domains: int
    replicas: Replicas

    def __call__(self, examples: Statistics, domain: jax.Array) -> tuple[Statistics, Statistics]:
        """The statistics of each domain, given to its examples; and those of the domains."""
        reported, used = merge_labelled(examples, domain, self.num_domains, self.replicas)
        return used, reported
