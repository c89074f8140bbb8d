"""The remedies against those of timm: outputs and gradients, by random cotangents.

timm writes the formulas of the papers, and departs from them in constants only, which are given here: epsilon (1e-5 for
filter response norm, where the paper has 1e-6, and 1e-3 for EvoNorm-B0, where it has 1e-5); and the running variance of
EvoNorm-B0 is the unbiased one. Standardized convolutions have epsilon below the root, where Qiao et al. add it to the
deviation, and Brock et al. bound the variance by it. The five basic norms are compared with PyTorch in `test_oracles`.
"""

import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

import jaxnorm

pytestmark = pytest.mark.any_version

torch = pytest.importorskip("torch")
if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

SHAPE, EPSILON = (4, 8, 5, 5), 1e-4  # channels first, as there


@pytest.fixture(scope="module")
def timm():
    """A function that loads a module of ``timm.layers`` alone: all of timm wants torchvision, which is not needed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("timm", "timm.layers"):
            package = types.ModuleType(name)
            package.__path__ = importlib.util.find_spec(name).submodule_search_locations
            patch.setitem(sys.modules, name, package)
        yield lambda name: importlib.import_module(f"timm.layers.{name}")
        for name in [n for n in sys.modules if n.startswith("timm.")]:
            patch.delitem(sys.modules, name)


def convolution(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME")


def scaled(x, w, gain):
    gain = gain.reshape(-1) * w[0].size ** -0.5
    return convolution(x, jaxnorm.standardize_weights(w, gain, axis=0, epsilon=EPSILON))


# name: module, class, its arguments, its parameters in the order of ours, ours
CASES = {
    "filter response": (
        ("filter_response_norm", "FilterResponseNormTlu2d", (8,), {}),
        ("weight", "bias", "tau"),
        lambda x, *p: jaxnorm.filter_response_norm(x, *p, axis=1, epsilon=EPSILON),
    ),
    "EvoNorm-B0": (
        ("evo_norm", "EvoNorm2dB0", (8,), {}),
        ("weight", "bias", "v"),
        lambda x, *p: jaxnorm.evonorm_b0(x, *p, axis=1, epsilon=EPSILON)[0],
    ),
    "EvoNorm-S0": (
        ("evo_norm", "EvoNorm2dS0", (8,), {"groups": 2}),
        ("weight", "bias", "v"),
        lambda x, *p: jaxnorm.evonorm_s0(x, *p, num_groups=2, axis=1, epsilon=EPSILON),
    ),
    "standardized convolution": (
        ("std_conv", "StdConv2d", (8, 6, 3), {}),
        ("weight",),
        lambda x, w: convolution(x, jaxnorm.standardize_weights(w, axis=0, epsilon=EPSILON)),
    ),
    "scaled standardized convolution": (
        ("std_conv", "ScaledStdConv2d", (8, 6, 3), {"bias": False}),
        ("weight", "gain"),
        scaled,
    ),
}


def made(timm, name, rng):
    (module, kind, args, settings), names, ours = CASES[name]
    theirs = getattr(timm(module), kind)(*args, eps=EPSILON, **settings)
    parameters = [getattr(theirs, n) for n in names]
    for p in parameters:
        p.data.copy_(torch.tensor(rng.normal(size=tuple(p.shape))))
    return theirs, parameters, ours


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name, timm, rng):
    theirs, parameters, ours = made(timm, name, rng)
    x = rng.normal(1.0, 2.0, SHAPE).astype(np.float32)
    inputs = [torch.tensor(x, requires_grad=True), *parameters]
    expected = theirs(inputs[0])
    cotangent = rng.normal(size=tuple(expected.shape)).astype(np.float32)
    expected.backward(torch.tensor(cotangent))

    def loss(*arguments):
        y = ours(*arguments)
        return jnp.sum(y * cotangent), y

    arguments = [jnp.asarray(i.detach().numpy()) for i in inputs]
    gradients, y = jax.jit(jax.grad(loss, tuple(range(len(arguments))), has_aux=True))(*arguments)
    assert_close(y, expected.detach().numpy(), x.size)
    for argument, gradient, i in zip(("x", *CASES[name][1]), gradients, inputs, strict=True):
        assert_close(gradient, i.grad.numpy(), x.size, what=argument)


def test_averages_of_evonorm(timm, rng):
    """After three batches, with the unbiased variance; and the output by them."""
    theirs, parameters, _ = made(timm, "EvoNorm-B0", rng)
    arguments = [jnp.asarray(p.detach().numpy()) for p in parameters]
    running = jaxnorm.init_running(8)
    for x in rng.normal(1.0, 2.0, (3, *SHAPE)).astype(np.float32):
        theirs(torch.tensor(x))
        _, batch = jaxnorm.evonorm_b0(x, *arguments, axis=1, epsilon=EPSILON)
        running = jaxnorm.update_running(running, batch, alpha=0.1, unbiased=True)
    assert_close(running.var, theirs.running_var.numpy(), 100)
    y, _ = jaxnorm.evonorm_b0(x, *arguments, running=running, axis=1, epsilon=EPSILON)
    assert_close(y, theirs.eval()(torch.tensor(x)).detach().numpy(), 100)
