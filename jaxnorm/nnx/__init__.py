"""Normalization layers for Flax NNX.

Those with a counterpart in ``flax.nnx`` take its arguments, by position and by keyword, and hold the same variables,
so that ``from jaxnorm.nnx import BatchNorm`` in place of ``from flax.nnx import BatchNorm`` is all that changes.
What Flax lacks:

- ``num_features`` may be the shape of several feature axes;
- ``mask`` may have any shape that broadcasts, and be boolean or real weights;
- ``axis_name`` may be several mapped axes, and ``axis_index_groups`` work under ``shard_map`` and ``vmap``;
- ``trainable=False`` keeps gradients from the parameters, at construction, by ``nnx.view`` or per call;
  `trainable_mask` keeps weight decay from them;
- ``activation`` and ``residual`` are applied without being stored, ``invertible=True`` stores the output only;
- ``zero_centered_scale=True`` stores the scale as its distance from one;
- `BatchNorm` has ``momentum=None``, ``unbiased`` and ``update_running_average``; `GroupNorm` has ``axis``.

All layers with running averages are a `BatchNorm` and have what it has. ``use_fast_variance`` chooses between
algorithms in Flax. Here there is one: either choice gives the stable statistics, in float32 at least. What
``promote_dtype`` makes of input, scale and bias is used; running averages stay float32 whatever it makes of them.
"""

from jaxnorm.nnx._conditional import (
    AdaIN,
    AdaLN,
    ConditionalBatchNorm,
    ConditionalInstanceNorm,
    ConditionalLayerNorm,
    FiLM,
)
from jaxnorm.nnx._norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, trainable_mask
from jaxnorm.nnx._recurrent import BatchNormLSTMCell, StepBatchNorm
from jaxnorm.nnx._remedies import (
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
from jaxnorm.nnx._weights import SpectralNorm, StandardizedConv, StandardizedLinear, WeightNorm

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
    "StandardizedLinear",
    "StepBatchNorm",
    "SwitchableNorm",
    "TrackedInstanceNorm",
    "WeightNorm",
    "trainable_mask",
]
