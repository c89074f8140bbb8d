# pyright: strict, reportUnknownMemberType=false
"""Every layer as an editor and a type checker see it; checked by `make lint`, and run by `test_package.py`."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jaxnorm.linen as jl
import jaxnorm.nnx as jn

X, DOMAIN, CONDITION = jnp.ones((4, 3, 2)), jnp.zeros(4, int), jnp.ones((4, 5))
LINEN: list[nn.Module] = [
    jl.BatchNorm(use_running_average=False, momentum=None, activation="relu"),
    jl.LayerNorm(zero_centered_scale=True),
    jl.RMSNorm(),
    jl.GroupNorm(num_groups=2, batched=True),
    jl.InstanceNorm(),
    jl.TrackedInstanceNorm(use_running_average=False, unbiased=True),
    jl.GhostBatchNorm(virtual_batch_size=2, use_running_average=False, trainable=False),
    jl.BatchRenorm(r_max=2.0, d_max=1.0, use_running_average=False),
    jl.SwitchableNorm(use_running_average=False),
    jl.EvoNormB0(use_running_average=False),
    jl.EvoNormS0(num_groups=2),
    jl.FilterResponseNorm(),
    jl.DynamicTanh(),
    jl.SequenceBatchNorm(max_length=3, use_running_average=False),
    jl.StepBatchNorm(use_running_average=False),
    jl.StandardizedConv(features=2, kernel_size=(1,)),
    jl.StandardizedDense(features=2),
    jl.WeightNorm(nn.Dense(2)),
]
RNGS = nnx.Rngs(0)
NNX: list[nnx.Module] = [
    jn.BatchNorm(2, momentum=None, activation="relu", rngs=RNGS),
    jn.LayerNorm(2, zero_centered_scale=True, rngs=RNGS),
    jn.RMSNorm(2, rngs=RNGS),
    jn.GroupNorm(2, num_groups=2, batched=True, rngs=RNGS),
    jn.InstanceNorm(2, rngs=RNGS),
    jn.TrackedInstanceNorm(2, unbiased=True, rngs=RNGS),
    jn.GhostBatchNorm(2, virtual_batch_size=2, trainable=False, rngs=RNGS),
    jn.BatchRenorm(2, r_max=2.0, d_max=1.0, rngs=RNGS),
    jn.SwitchableNorm(2, rngs=RNGS),
    jn.EvoNormB0(2, rngs=RNGS),
    jn.EvoNormS0(2, num_groups=2, rngs=RNGS),
    jn.FilterResponseNorm(2, rngs=RNGS),
    jn.DynamicTanh(2, rngs=RNGS),
    jn.SequenceBatchNorm(2, max_length=3, rngs=RNGS),
    jn.StepBatchNorm(2, rngs=RNGS),
    jn.StandardizedConv(2, 2, (1,), rngs=RNGS),
    jn.StandardizedLinear(2, 2, rngs=RNGS),
    jn.WeightNorm(nnx.Linear(2, 2, rngs=RNGS), rngs=RNGS),
    jn.SpectralNorm(nnx.Linear(2, 2, rngs=RNGS), rngs=RNGS),
]


def outputs() -> list[jax.Array]:
    """Of layers that take more than their input."""
    key = jax.random.key(0)
    split = jl.SplitBatchNorm(num_domains=2, use_running_average=False)
    y, _ = split.init_with_output(key, X, DOMAIN)
    z: jax.Array = jn.SplitBatchNorm(2, num_domains=2, rngs=RNGS)(X, DOMAIN, mask=jnp.ones((4, 1, 1)))
    of_condition = [
        jn.ConditionalBatchNorm(2, 5, rngs=RNGS)(X, CONDITION, residual=X),
        jn.ConditionalInstanceNorm(2, 5, rngs=RNGS)(X, CONDITION),
        jn.ConditionalLayerNorm(2, 5, rngs=RNGS)(X, CONDITION),
        jn.AdaLN(2, 5, rngs=RNGS)(X, CONDITION)[0],
        jn.FiLM(2, 5, rngs=RNGS)(X, CONDITION),
        jn.AdaIN()(X, X),
        jn.GraphNorm(2, num_graphs=2, rngs=RNGS)(X, DOMAIN),
    ]
    linen: list[nn.Module] = [
        jl.ConditionalBatchNorm(use_running_average=False),
        jl.ConditionalInstanceNorm(),
        jl.ConditionalLayerNorm(),
        jl.AdaLN(),
        jl.FiLM(),
    ]
    linen += [jl.AdaIN(), jl.GraphNorm(num_graphs=2), jl.SpectralNorm(nn.Dense(2)), jl.BatchNormLSTMCell(4)]
    nnx_modules: list[nnx.Module] = [jn.BatchNormLSTMCell(2, 4, steps=3, momentum=0.9, rngs=RNGS)]
    assert all((*linen, *nnx_modules))
    return [y, z, *of_condition]
