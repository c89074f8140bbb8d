import math
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from networks import Generator, LinenResNet, MobileNet, NNXResNet, float64, images, randomized

import jaxnorm
from jaxnorm import linen, surgery
from jaxnorm import nnx as jaxnorm_nnx

NORMS = {"flax": (nn.BatchNorm, nnx.BatchNorm), "jaxnorm": (linen.BatchNorm, jaxnorm_nnx.BatchNorm)}


def linen_network(network, rng, **inputs):
    x = inputs.get("x", images(rng))
    variables = randomized(jax.jit(network.init)(jax.random.key(0), x), rng)
    return network.apply, variables, x


def nnx_network(network, rng):
    network.eval()
    graphdef, state = nnx.split(network)
    return lambda state, x: nnx.merge(graphdef, state)(x), randomized(state, rng), images(rng)


def assert_same(apply, variables, x, folded, dtype=jnp.float32, magnitude=1.0):
    """Within random roundings of each layer: its sums in float32; else of weights, product, sum and output."""
    kernels = [a.size // a.shape[-1] for a in jax.tree.leaves(variables) if a.ndim > 1]
    roundings = sum(n + 3 for n in kernels) if dtype == jnp.float32 else 4 * len(kernels)
    with jax.enable_x64(True):
        exact = np.asarray(jax.jit(apply)(float64(variables), np.asarray(x, np.float64)), np.float64)
    actual = np.asarray(jax.jit(folded.apply)(folded.variables, x), np.float64)
    error = math.sqrt(np.mean((actual - exact) ** 2) / np.mean(exact**2))
    assert error <= float(jnp.finfo(dtype).eps) * math.sqrt(roundings) * magnitude, error


def assert_gone(folded, x, norms, kept=()):
    assert (len(folded.report.folded), folded.report.stayed) == (norms, ()), str(folded.report)
    program = jax.make_jaxpr(folded.apply)(folded.variables, x)
    assert not {"sub", "mul", "rsqrt", "sqrt"} - {*kept} & {eqn.primitive.name for eqn in program.eqns}, program


@pytest.mark.parametrize("library", NORMS)
@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_resnets_lose_all_their_norms(framework, bottleneck, library, rng):
    norm = NORMS[library][framework == "nnx"]
    if framework == "linen":
        apply, variables, x = linen_network(LinenResNet(norm, bottleneck=bottleneck), rng)
    else:
        apply, variables, x = nnx_network(NNXResNet(norm, bottleneck=bottleneck, rngs=nnx.Rngs(0)), rng)
    folded = surgery.fold(apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert_gone(folded, x, 9 if bottleneck else 6)
    assert_same(apply, variables, x, folded)


@pytest.mark.parametrize("library", NORMS)
@pytest.mark.parametrize("network", [MobileNet, Generator])
def test_depthwise_and_transposed_convolutions_take_norms(network, library, rng):
    x = images(rng) if network is MobileNet else jnp.asarray(rng.normal(size=(2, 7)), jnp.float32)
    apply, variables, x = linen_network(network(NORMS[library][0]), rng, x=x)
    folded = surgery.fold(apply, variables, x)
    assert_gone(folded, x, 7 if network is MobileNet else 3, kept=["mul"])  # of leaky ReLU
    assert_same(apply, variables, x, folded)
