"""Normalization for JAX: one statistics engine, one differentiation rule, and what is made of them."""

from jaxnorm._epilogue import InvertibleActivation
from jaxnorm._moments import Moments, Statistics
from jaxnorm._rule import save_statistics
from jaxnorm.functional import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    moments,
    normalize,
    rms_norm,
    standardize,
)
from jaxnorm.running import RunningStats, init_running, merge_moments, update_running

__version__ = "0.1.0"
__all__ = [
    "InvertibleActivation",
    "Moments",
    "RunningStats",
    "Statistics",
    "batch_norm",
    "group_norm",
    "init_running",
    "instance_norm",
    "layer_norm",
    "merge_moments",
    "moments",
    "normalize",
    "rms_norm",
    "save_statistics",
    "standardize",
    "update_running",
]
