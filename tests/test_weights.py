"""Weight norm and spectral norm: against NumPy and PyTorch, as layers, and what an optimizer sees of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from flax import linen as nn
from flax import nnx

import jaxnorm
import jaxnorm.linen as jl
import jaxnorm.nnx as jn

pytestmark = pytest.mark.any_version


def converged(w, u, outputs):
    """The largest singular value and its vectors, by NumPy, signed as u is."""
    matrix = np.asarray(w, np.float64).reshape(-1, outputs)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    sign = np.sign(right[0] @ np.asarray(u, np.float64).ravel())
    return values[0], sign * left[:, 0], sign * right[0]


@pytest.mark.parametrize("shape", [(6, 4), (3, 3, 2, 5)], ids=["dense", "convolution"])
def test_spectral_norm_is_that_of_svd_with_its_gradient(shape, rng):
    w, u, t = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, shape[-1:], shape))
    y, new = jaxnorm.spectral_norm(w, u, steps=200)
    sigma, left, right = converged(w, u, shape[-1])
    assert_close(y, np.asarray(w, float) / sigma, 200)
    assert_close(new, right, 200)
    assert_close(jaxnorm.spectral_norm(w, new)[0], y, 200)  # the state goes on from where it was
    # u and v are constants: d(W / sigma) = dW / sigma - W (v^T dW u) / sigma^2
    gradient = jax.grad(lambda w: jnp.vdot(jaxnorm.spectral_norm(w, u, steps=200)[0], t))(w)
    outer, T, W = np.outer(left, right).reshape(shape), np.asarray(t, float), np.asarray(w, float)
    assert_close(gradient, T / sigma - np.sum(T * W) * outer / sigma**2, 200)


def test_weights_of_torch(rng):
    """The same kernel and gain; the same state after a step; the same weights once both have converged."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    from torch.nn.utils import parametrizations as of_torch

    layer = of_torch.weight_norm(torch.nn.Linear(4, 3))
    g, v = (p.detach().numpy() for p in layer.parametrizations.weight.parameters())
    assert_close(jaxnorm.weight_norm(v.T, g[:, 0], epsilon=0.0), layer.weight.detach().numpy().T, 4)

    layer = of_torch.spectral_norm(torch.nn.Linear(4, 3), eps=1e-12)
    kernel = layer.parametrizations.weight.original.detach().numpy().T
    inner = layer.parametrizations.weight[0]
    before = inner._u.numpy().copy()  # torch begins with fifteen steps
    layer.weight  # noqa: B018 - and takes one here
    assert_close(jaxnorm.spectral_norm(kernel, before)[1], inner._u.numpy(), 12)
    for _ in range(200):
        weights = layer.weight
    assert_close(jaxnorm.spectral_norm(kernel, before, steps=200)[0], weights.detach().numpy().T, 200)


def linen_of(kind, **settings):
    model = getattr(jl, kind)(nn.Dense(3), **settings)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    more = {"update_stats": True} if kind == "SpectralNorm" else {}
    variables = model.init(jax.random.key(0), x, **more)
    return model, variables, x, more


@pytest.mark.parametrize("kind", ["WeightNorm", "SpectralNorm"])
def test_layers_use_the_functions_and_write_nothing_back(kind):
    """google/flax: NNX's WeightNorm leaves normalized weights in the layer that it wraps."""
    model, variables, x, more = linen_of(kind)
    kernel = variables["params"]["layer_instance"]["kernel"]
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel
    wrapped = getattr(jn, kind)(layer, rngs=nnx.Rngs(0))
    if kind == "SpectralNorm":
        u = variables["batch_stats"]["layer_instance/kernel/u"]
        wrapped.batch_stats[("kernel", "u")].set_value(u)
        expected, new = jaxnorm.spectral_norm(kernel, u)
    else:
        expected, new = jaxnorm.weight_norm(kernel), None
    y, updates = model.apply(variables, x, **more, mutable=True)
    assert_close(y, np.asarray(x, float) @ np.asarray(expected, float), 8)
    assert_close(wrapped(x), y, 8)
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    jax.tree.map(np.testing.assert_array_equal, updates["params"], variables["params"])
    if new is not None:
        np.testing.assert_array_equal(updates["batch_stats"]["layer_instance/kernel/u"], new)
        np.testing.assert_array_equal(wrapped.batch_stats[("kernel", "u")][...], new)
        wrapped.eval()
        wrapped(x)
        np.testing.assert_array_equal(wrapped.batch_stats[("kernel", "u")][...], new)


def test_nnx_trains_weights_and_scales(rng):
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    model = jn.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = jax.tree.leaves(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.sum(jnp.square(model(x) - 1)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0] / 2
    assert len(before) == 3
    assert all((a != b).any() for a, b in zip(before, jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True))


def test_errors():
    with pytest.raises(ValueError, match=r"^spectral_norm: u must hold one number per output, 3; got shape=\(2,\)"):
        jaxnorm.spectral_norm(jnp.ones((4, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match="steps must be a positive integer; got steps=0"):
        jaxnorm.spectral_norm(jnp.ones((4, 3)), jnp.ones(3), steps=0)
    with pytest.raises(TypeError, match="w and u must be real"):
        jaxnorm.spectral_norm(jnp.ones((4, 3), jnp.complex64), jnp.ones(3))
    with pytest.raises(ValueError, match=r"weight_norm: gain must have the shape of the output axes of w, \(3,\)"):
        jaxnorm.weight_norm(jnp.ones((4, 3)), jnp.ones(4))
    layer = jl.SpectralNorm(nn.Conv(2, (3,)), error_on_non_matrix=True)
    with pytest.raises(ValueError, match="Input is 3D but error_on_non_matrix is True"):
        layer.init(jax.random.key(0), jnp.ones((1, 5, 2)), update_stats=True)
    layer = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    wrapped = jn.WeightNorm(layer, rngs=nnx.Rngs(0))
    layer.kernel_too = nnx.Param(jnp.ones((2, 2)))
    wrapped.variable_filter = lambda path, value: True
    with pytest.raises(ValueError, match="must keep the parameters that it was wrapped with; got new='kernel_too'"):
        wrapped(jnp.ones((1, 2)))
