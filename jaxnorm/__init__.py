"""Normalization for JAX: one statistics engine, one differentiation rule, five normalizations."""

from jaxnorm._activations import InvertibleActivation
from jaxnorm._batch_norm import (
    RunningStats,
    batch_norm,
    init_running,
    merge_moments,
    moments,
    normalize,
    update_running,
)
from jaxnorm._functional import group_norm, instance_norm, layer_norm, rms_norm
from jaxnorm._moments import Moments

__version__ = "0.1.0"
__all__ = [
    "InvertibleActivation",
    "Moments",
    "RunningStats",
    "batch_norm",
    "group_norm",
    "init_running",
    "instance_norm",
    "layer_norm",
    "merge_moments",
    "moments",
    "normalize",
    "rms_norm",
    "update_running",
]
