"""Graph normalization: the nodes of each graph of a batch, with a learned part of the mean."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxnorm import _axes
from jaxnorm._axes import Axes
from jaxnorm._epilogue import Activation, Formula
from jaxnorm._moments import Statistics, merge
from jaxnorm.functional import Array, normalize_array
from jaxnorm.variants._examples import check_examples, check_labels, shared_by_label


def graph_norm(
    x: Array,
    graph: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    mean_scale: Array | None = None,
    *,
    num_graphs: int,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    invertible: bool = False,
) -> jax.Array:
    r"""Normalize every node by the statistics of its graph, less a learned part of the mean.

    .. math:: c = x - \alpha \mu_g \qquad y = \gamma \, \frac{c}{\sqrt{\overline{c^2}_g + \epsilon}} + \beta

    with the means of each feature over the nodes of graph g. With alpha of one that is instance normalization of a
    graph; a network learns to keep part of the mean, which tells regular graphs apart.

    Args:
      x: real or complex floating point array of shape ``(nodes, *features)``: all graphs of a batch, one after the
        other or in any order.
      graph: integers of shape ``(nodes,)`` in ``[0, num_graphs)``: the graph of each node. A graph may have no nodes.
      scale: gamma, in the shape of the feature axes in the order given; None for one.
      bias: beta, in the same shape; None for zero.
      mean_scale: alpha, in the same shape; None for one.
      num_graphs: how many graphs there are, those of the padding included.
      axis: the feature axis, or several, not the first. Default: the last.
      epsilon: added to the mean square, in the squared unit of ``x``. Default: 1e-5.
      mask: broadcasts against ``x``, of shape ``(nodes, 1)``, say; false for the nodes of the padding, which are
        normalized, but not measured.
      activation: applied last: None, a function, or its name in ``jax.nn``. A function may close over arrays.
      residual: array of the shape of ``x``, added before the activation.
      invertible: keep the output for the backward pass, and recover the input from it. Needs a scale that is not zero,
        and an activation that can be undone: None, softplus, leaky_relu or an `InvertibleActivation`. Default: False.

    Returns:
      ``y`` in the shape and dtype of ``x``.

    Raises:
      TypeError: an integer array, or an argument of the wrong type.
      ValueError: an argument that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxnorm
      >>> nodes, graph = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
      >>> jaxnorm.graph_norm(nodes, graph, num_graphs=2, epsilon=0.0).tolist()
      [[-1.0], [1.0], [-1.0], [1.0]]

      Of a batch that jraph has padded, in which ``n_node`` counts the nodes of each graph:

      >>> n_node, total = jnp.array([2, 1, 1]), 4
      >>> jnp.repeat(jnp.arange(3), n_node, total_repeat_length=total).tolist()
      [0, 0, 1, 2]

    References:
      Cai, Luo, Xu, He, Liu and Wang, "GraphNorm: A Principled Approach to Accelerating Graph Neural Network Training",
      ICML 2021, equation 8.
    """
    function = "graph_norm"
    x, features, axes = check_examples(function, x, axis)
    graph = check_labels(function, "graph", "num_graphs", graph, num_graphs, x)
    alpha = _axes.check_parameter(function, "mean_scale", mean_scale, features, x)
    return normalize_array(
        function,
        x,
        scale,
        bias,
        features=features,
        axes=axes,
        epsilon=epsilon,
        adjust=Graphs(num_graphs, features),
        of_adjust=(graph, alpha),
        mask=mask,
        activation=activation,
        residual=residual,
        invertible=invertible,
    )[0]


@dataclass(frozen=True)
class Graphs(Formula):
    """The nodes of a graph share their statistics: the ``adjust`` of graph normalization.

    Attributes:
      num_graphs: how many graphs there are.
      features: the axes of the part of the mean.
    """

    num_graphs: int
    features: tuple[int, ...]

    def __call__(self, nodes: Statistics, graph: jax.Array, mean_scale: jax.Array | None) -> Statistics:
        """The mean that is subtracted, and the mean square of what is left, of the graph of each node."""
        own = merge(nodes, lambda *values: tuple(shared_by_label(v, graph, self.num_graphs) for v in values))
        if mean_scale is None:
            return own
        kept = (1 - _axes.laid_out(mean_scale, self.features, own.var)) * (own.center + own.offset)
        square = kept.real**2 + kept.imag**2 if jnp.iscomplexobj(kept) else kept**2
        return own._replace(offset=own.offset - kept, var=own.var + square)
