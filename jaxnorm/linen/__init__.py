"""Normalization layers for Flax Linen.

Those with a counterpart in ``flax.linen`` take its arguments, by position and by keyword, and hold the same variables,
so that ``from jaxnorm.linen import BatchNorm`` in place of ``from flax.linen import BatchNorm`` is all that changes.
What Flax lacks comes after what it has:

- ``mask`` may have any shape that broadcasts, and be boolean or real weights, on every layer;
- ``axis_name`` may be several mapped axes, ``axis_index_groups`` work under ``shard_map`` and ``vmap``, and neither is
  needed at initialization;
- ``trainable=False`` keeps gradients from the parameters, at construction or per call; `trainable_mask` keeps weight
  decay from them;
- ``activation`` and ``residual`` are applied without being stored, ``invertible=True`` stores the output only;
- ``zero_centered_scale=True`` stores the scale as its distance from one;
- `BatchNorm` has ``momentum=None``, ``unbiased`` and ``update_running_average``; `GroupNorm` has ``axis``.

All layers with running averages are a `BatchNorm` and have what it has. ``use_fast_variance`` and
``force_float32_reductions`` choose between algorithms in Flax. Here there is one: either choice gives the stable
statistics, in float32 at least.
"""

from jaxnorm.linen._conditional import (
    AdaIN,
    AdaLN,
    ConditionalBatchNorm,
    ConditionalInstanceNorm,
    ConditionalLayerNorm,
    FiLM,
)
from jaxnorm.linen._norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, trainable_mask
from jaxnorm.linen._recurrent import BatchNormLSTMCell, StepBatchNorm
from jaxnorm.linen._remedies import (
    BatchRenorm,
    DynamicTanh,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    GhostBatchNorm,
    GraphNorm,
    SequenceBatchNorm,
    SplitBatchNorm,
    SwitchableNorm,
    TrackedInstanceNorm,
)
from jaxnorm.linen._weights import SpectralNorm, StandardizedConv, StandardizedDense, WeightNorm
from jaxnorm.variants.sequences import extend_steps

__all__ = [
    "AdaIN",
    "AdaLN",
    "BatchNorm",
    "BatchNormLSTMCell",
    "BatchRenorm",
    "ConditionalBatchNorm",
    "ConditionalInstanceNorm",
    "ConditionalLayerNorm",
    "DynamicTanh",
    "EvoNormB0",
    "EvoNormS0",
    "FiLM",
    "FilterResponseNorm",
    "GhostBatchNorm",
    "GraphNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "SequenceBatchNorm",
    "SpectralNorm",
    "SplitBatchNorm",
    "StandardizedConv",
    "StandardizedDense",
    "StepBatchNorm",
    "SwitchableNorm",
    "TrackedInstanceNorm",
    "WeightNorm",
    "extend_steps",
    "trainable_mask",
]
