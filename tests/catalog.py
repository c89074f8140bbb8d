"""Every public function and every layer once, on a batch that four devices can share, by examples or by channels."""

import numpy as np
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 3, 4)).astype(np.float32) + 2
SCALE, BIAS, V = (RNG.uniform(0.5, 1.5, 4).astype(np.float32) for _ in range(3))
WEIGHTS = RNG.random((8, 1, 1)).astype(np.float32)
DOMAIN, LENGTHS = np.array([0, 1] * 4, np.int32), np.array([3, 1, 2, 3, 1, 1, 2, 3], np.int32)
CONDITION = RNG.standard_normal((8, 5)).astype(np.float32)
THREE = np.zeros(3, np.float32)
RUNNING = jaxnorm.RunningStats(BIAS, SCALE, np.full(4, 8, np.float32))

FUNCTIONS = {
    "add_layer_norm": (jaxnorm.add_layer_norm, (X, X, SCALE, BIAS)),
    "add_rms_norm": (jaxnorm.add_rms_norm, (X, X, SCALE)),
    "batch_norm": (lambda x, s, b, m: jaxnorm.batch_norm(x, s, b, mask=m), (X, SCALE, BIAS, WEIGHTS)),
    "batch_renorm": (lambda x, r, s: jaxnorm.batch_renorm(x, r, s, r_max=3.0, d_max=5.0), (X, RUNNING, SCALE)),
    "dynamic_tanh": (jaxnorm.dynamic_tanh, (X, np.float32(0.5), SCALE, BIAS)),
    "evonorm_b0": (jaxnorm.evonorm_b0, (X, SCALE, BIAS, V)),
    "evonorm_s0": (lambda *args: jaxnorm.evonorm_s0(*args, num_groups=2), (X, SCALE, BIAS, V)),
    "filter_response_norm": (jaxnorm.filter_response_norm, (X, SCALE, BIAS, V)),
    "ghost_batch_norm": (lambda *args: jaxnorm.ghost_batch_norm(*args, virtual_batch_size=2), (X, SCALE, BIAS)),
    "graph_norm": (
        lambda x, g, s, b, a: jaxnorm.graph_norm(x, g, s, b, a, num_graphs=3),
        (X, DOMAIN, SCALE, BIAS, V),
    ),
    "group_norm": (lambda *args: jaxnorm.group_norm(*args, num_groups=2), (X, SCALE, BIAS)),
    "instance_norm": (jaxnorm.instance_norm, (X, SCALE, BIAS)),
    "layer_norm": (jaxnorm.layer_norm, (X, SCALE, BIAS)),
    "length_mask": (lambda lengths: jaxnorm.length_mask(lengths, 3), (LENGTHS,)),
    "merge_moments": (jaxnorm.merge_moments, (RUNNING, RUNNING)),
    "moments": (lambda x: jaxnorm.moments(x, (0, 1)), (X,)),
    "normalize": (jaxnorm.normalize, (X, RUNNING, SCALE, BIAS)),
    "rms_norm": (jaxnorm.rms_norm, (X, SCALE)),
    "running_at": (jaxnorm.running_at, (RUNNING, np.arange(6))),
    "spectral_norm": (jaxnorm.spectral_norm, (X, V)),
    "split_batch_norm": (lambda x, d, s: jaxnorm.split_batch_norm(x, d, s, num_domains=2), (X, DOMAIN, SCALE)),
    "standardize": (lambda x: jaxnorm.standardize(x, axes=1, adjust=lambda s: s._replace(var=s.var / 4)), (X,)),
    "standardize_weights": (jaxnorm.standardize_weights, (X, SCALE)),
    "switchable_norm": (jaxnorm.switchable_norm, (X, THREE, THREE, SCALE, BIAS)),
    "update_running": (jaxnorm.update_running, (RUNNING, RUNNING)),
    "weight_norm": (jaxnorm.weight_norm, (X, SCALE)),
}
# name: settings, further inputs, whether a batch is normalized by its own statistics or by averages
LAYERS = {
    "BatchNorm": ({}, (), True),
    "LayerNorm": ({}, (), False),
    "RMSNorm": ({}, (), False),
    "GroupNorm": ({"num_groups": 2}, (), False),
    "InstanceNorm": ({}, (), False),
    "TrackedInstanceNorm": ({}, (), True),
    "GhostBatchNorm": ({"virtual_batch_size": 2}, (), True),
    "BatchRenorm": ({}, (), True),
    "SplitBatchNorm": ({"num_domains": 2, "split_affine": True}, (DOMAIN,), True),
    "SwitchableNorm": ({}, (), True),
    "EvoNormB0": ({}, (), True),
    "EvoNormS0": ({"num_groups": 2}, (), False),
    "FilterResponseNorm": ({}, (), False),
    "DynamicTanh": ({}, (), False),
    "GraphNorm": ({"num_graphs": 3}, (DOMAIN,), False),
    "SequenceBatchNorm": ({"max_length": 3}, (LENGTHS,), True),
    "StepBatchNorm": ({}, (), True),
    "ConditionalBatchNorm": ({}, (CONDITION,), True),
    "ConditionalInstanceNorm": ({}, (CONDITION,), False),
    "ConditionalLayerNorm": ({}, (CONDITION,), False),
    "AdaLN": ({}, (CONDITION,), False),
    "FiLM": ({}, (CONDITION,), False),
    "AdaIN": ({}, (2 * X,), False),
}
CONDITIONED = [name for name, (_, inputs, _) in LAYERS.items() if any(i is CONDITION for i in inputs)]


def linen(name, **more):
    """A Linen layer."""
    settings, _, averaged = LAYERS[name]
    return getattr(jaxnorm.linen, name)(**settings, **({"use_running_average": False} if averaged else {}), **more)


def of_nnx(name, **more):
    """An NNX layer, in training."""
    settings, *_ = LAYERS[name]
    sizes = (4, *([5] if name in CONDITIONED else []))
    if name == "AdaIN":
        return jaxnorm.nnx.AdaIN()
    return getattr(jaxnorm.nnx, name)(*sizes, **settings, **more, rngs=nnx.Rngs(0))
