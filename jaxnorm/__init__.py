"""Normalization for JAX: one statistics engine, one differentiation rule, and what is made of them."""

from jaxnorm._epilogue import InvertibleActivation
from jaxnorm._moments import Moments, Statistics
from jaxnorm.functional import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    moments,
    normalize,
    rms_norm,
    save_statistics,
    standardize,
)
from jaxnorm.running import RunningStats, init_running, merge_moments, update_running
from jaxnorm.variants.add_norm import add_layer_norm, add_rms_norm
from jaxnorm.variants.dynamic_tanh import dynamic_tanh
from jaxnorm.variants.evonorm import evonorm_b0, evonorm_s0
from jaxnorm.variants.filter_response import filter_response_norm
from jaxnorm.variants.ghost import ghost_batch_norm
from jaxnorm.variants.graph import graph_norm
from jaxnorm.variants.renorm import batch_renorm
from jaxnorm.variants.sequences import length_mask, running_at
from jaxnorm.variants.split import split_batch_norm
from jaxnorm.variants.switchable import switchable_norm
from jaxnorm.variants.weights import spectral_norm, standardize_weights, weight_norm

__version__ = "0.1.0"
__all__ = [
    "InvertibleActivation",
    "Moments",
    "RunningStats",
    "Statistics",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_renorm",
    "dynamic_tanh",
    "evonorm_b0",
    "evonorm_s0",
    "filter_response_norm",
    "ghost_batch_norm",
    "graph_norm",
    "group_norm",
    "init_running",
    "instance_norm",
    "layer_norm",
    "length_mask",
    "merge_moments",
    "moments",
    "normalize",
    "rms_norm",
    "running_at",
    "save_statistics",
    "spectral_norm",
    "split_batch_norm",
    "standardize",
    "standardize_weights",
    "switchable_norm",
    "update_running",
    "weight_norm",
]
