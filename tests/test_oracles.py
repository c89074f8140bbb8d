"""All five normalizations against NumPy float64 and PyTorch: outputs, gradients, running averages; and identities."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from absl.testing import parameterized
from checks import assert_close, compile_as_written, pairwise, tolerance

import jaxnorm

pytestmark = pytest.mark.any_version

NORMS = ["batch", "layer", "rms", "group", "instance"]
DTYPES = ["float16", "bfloat16", "float32"]

# shape, feature axes, groups
LAYOUTS = [
    ((6, 5, 7, 4), -1, 2),
    ((6, 4, 5, 7), 1, 4),
    ((3, 1, 2, 5, 6), -1, 3),
    ((2, 3, 4, 3, 2, 6), -1, 3),  # video, one rank too high for a reduction in one go
    ((2, 3, 2, 3, 2, 2, 4), 2, 1),
    ((5, 9, 6), (2, 1), None),
    ((5, 9, 3, 4), (-1, 1), None),
    ((64, 6), -1, 3),
    ((1, 33, 8), -1, 4),
]


def apply(norm, x, scale, bias, axis, num_groups, **kwargs):
    if norm == "batch":
        return jaxnorm.batch_norm(x, scale, bias, axis=axis, **kwargs)[0]
    if norm == "rms":
        return jaxnorm.rms_norm(x, scale, axis=axis, **kwargs)
    if norm == "group":
        return jaxnorm.group_norm(x, scale, bias, axis=axis, num_groups=num_groups, **kwargs)
    return {"layer": jaxnorm.layer_norm, "instance": jaxnorm.instance_norm}[norm](x, scale, bias, axis=axis, **kwargs)


MASKS = ["none", "elements", "positions", "trailing", "weights"]


def masks(rng, shape):
    """Masks of every shape that broadcasts: an element, a position, a row, a channel."""
    return {
        "none": None,
        "elements": rng.random(shape) < 0.7,
        "positions": rng.random((*shape[:-1], 1)) < 0.7,
        "trailing": rng.random(shape[-1:]) < 0.7,
        "weights": rng.random((shape[0], *(1,) * (len(shape) - 1))).astype(np.float32) + 0.1,
    }


def groups_of_several_axes(norm, layout, mask):
    return norm == "group" and layout[2] is None


def of_two_norms(norm, layout, mask):
    """All combinations: the others are these over other axes, without a mean, or merged afterwards."""
    return norm in ("batch", "layer")


@pytest.mark.parametrize(
    ("norm", "layout", "mask"),
    pairwise(
        {norm: norm for norm in NORMS},
        {f"{layout[0]} at {layout[1]}": layout for layout in LAYOUTS},
        {mask: mask for mask in MASKS},
        without=groups_of_several_axes,
        beyond=of_two_norms,
    ),
)
def test_against_numpy(rng, norm, layout, mask):
    shape, axis, num_groups = layout
    axes = (axis,) if isinstance(axis, int) else axis
    centered, has_bias = norm != "rms", norm != "rms"
    mask = masks(rng, shape)[mask]
    weights = None if mask is None else np.broadcast_to(mask, shape)
    labels = oracles.labels_of(norm, shape, axes, num_groups)
    features = oracles.features_of(shape, axes)
    parameters = tuple(shape[a] for a in axes)
    scale, bias = (rng.standard_normal(parameters).astype(np.float32) for _ in range(2))
    bias = bias if has_bias else None
    x = (rng.standard_normal(shape) + 3).astype(np.float32)
    cotangent = rng.standard_normal(shape).astype(np.float32)
    epsilon = 0.1  # some sets here hold one value only: their variance is zero and nothing but epsilon is left
    size = np.bincount(labels).max()

    def loss(x, scale, bias):
        y = apply(norm, x, scale, bias, axis, num_groups, epsilon=epsilon, mask=mask)
        return jnp.sum(y * cotangent), y

    grads, y = jax.jit(jax.grad(loss, (0, 1, 2) if has_bias else (0, 1), has_aux=True))(x, scale, bias)
    expected = oracles.normalize(x, labels, features, scale, bias, epsilon, weights, centered)
    assert_close(y, expected, size)
    expected = oracles.gradients(x, cotangent, labels, features, scale, epsilon, weights, centered)
    for name, a, e in zip(("x", "scale", "bias"), grads, expected, strict=False):
        assert_close(a, e, max(size, x.size // scale.size), np.abs(cotangent).max() * np.abs(scale).max(), what=name)


class TestCalls(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters(*NORMS)
    def test_called(self, norm):
        """Compiled or not, on arrays of jax's or of NumPy's."""
        rng, shape = np.random.default_rng(0), (6, 5, 4)
        x, scale, bias = (rng.standard_normal(s).astype(np.float32) for s in (shape, (4,), (4,)))
        y = self.variant(lambda x, scale, bias: apply(norm, x, scale, bias, -1, 2, epsilon=0.1))(x, scale, bias)
        labels, features = oracles.labels_of(norm, shape, num_groups=2), oracles.features_of(shape)
        bias, centered = (None, False) if norm == "rms" else (bias, True)
        expected = oracles.normalize(x, labels, features, scale, bias, 0.1, None, centered)
        assert_close(y, expected, np.bincount(labels).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_dtypes(rng, norm, dtype):
    """Output and gradients have the dtype of the input and are off by its rounding, not by that of sums in it."""
    shape, axes = (16, 9, 11, 8), (-1,)
    x = jnp.asarray(rng.standard_normal(shape) * 2 + 5, dtype)
    cotangent = jnp.asarray(rng.standard_normal(shape), dtype)
    scale, bias = (jnp.asarray(rng.standard_normal(8), jnp.float32) for _ in range(2))
    labels, features = oracles.labels_of(norm, shape, axes, 2), oracles.features_of(shape)
    centered = norm != "rms"

    @compile_as_written
    def run(x, scale, bias, cotangent):
        y, pullback = jax.vjp(lambda x, s: apply(norm, x, s, bias, -1, 2, epsilon=1e-3), x, scale)
        return y, *pullback(cotangent)

    y, d_x, d_scale = run(x, scale, bias, cotangent)
    assert y.dtype == d_x.dtype == dtype
    assert d_scale.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    size = np.bincount(labels).max()
    expected = oracles.normalize(exact, labels, features, scale, bias if centered else None, 1e-3, None, centered)
    assert_close(y, expected, size)
    e_x, e_scale, _ = oracles.gradients(
        exact, np.asarray(cotangent, np.float64), labels, features, scale, 1e-3, None, centered
    )
    assert_close(d_x, e_x, size)
    assert_close(d_scale, e_scale, x.size // 8)


@pytest.mark.parametrize("norm", NORMS)
def test_float64(rng, norm, x64):
    shape = (8, 5, 6, 4)
    x, scale, bias = rng.standard_normal(shape) + 1e8, rng.standard_normal(4), rng.standard_normal(4)
    labels, features = oracles.labels_of(norm, shape, (-1,), 2), oracles.features_of(shape)
    y = apply(norm, jnp.asarray(x), scale, bias, -1, 2, epsilon=1e-5)
    assert y.dtype == jnp.float64
    longer = (x - 1e8) if norm != "rms" else x  # exact, and leaves the oracle digits to spare
    expected = oracles.normalize(
        longer, labels, features, scale, None if norm == "rms" else bias, 1e-5, None, norm != "rms"
    )
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm", NORMS)
def test_complex(rng, norm):
    shape = (8, 5, 6, 4)
    x = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape) + 100 - 50j).astype(np.complex64)
    scale, bias = (rng.standard_normal(4).astype(np.float32) for _ in range(2))
    labels, features = oracles.labels_of(norm, shape, (-1,), 2), oracles.features_of(shape)
    weights = rng.random(shape) < 0.8
    y = apply(norm, x, scale, bias, -1, 2, epsilon=1e-5, mask=weights)
    assert y.dtype == jnp.complex64
    centered = norm != "rms"
    expected = oracles.normalize(x, labels, features, scale, bias if centered else None, 1e-5, weights, centered)
    assert np.abs(y - expected).max() <= tolerance(jnp.float32, np.bincount(labels).max()) * np.abs(expected).max()


def test_given_statistics(rng):
    """`normalize` and its gradients for everything given."""
    x, cotangent = (rng.standard_normal((7, 5, 3)).astype(np.float32) for _ in range(2))
    mean, scale, bias = (rng.standard_normal(3).astype(np.float32) for _ in range(3))
    var = rng.random(3).astype(np.float32) + 0.5

    def run(cotangent, *args):
        y, pullback = jax.vjp(lambda x, m, v, *p: jaxnorm.normalize(x, (m, v), *p, epsilon=0.1), *args)
        return y, pullback(cotangent)

    y, gradients = jax.jit(run)(cotangent, x, mean, var, scale, bias)
    rstd = 1 / np.sqrt(var.astype(np.float64) + 0.1)
    centered = x.astype(np.float64) - mean
    assert_close(y, centered * rstd * scale + bias)
    expected = (
        cotangent * rstd * scale,
        (-cotangent * rstd * scale).sum((0, 1)),
        (-cotangent * centered * scale * rstd**3 / 2).sum((0, 1)),
        (cotangent * centered * rstd).sum((0, 1)),
        cotangent.sum((0, 1)),
    )
    for a, e in zip(gradients, expected, strict=True):
        assert_close(a, e, 35)


# PyTorch, the second opinion -----------------------------------------------------------------------------------------


def torch_of(norm, torch, x, scale, bias, num_groups):
    functional = torch.nn.functional
    if norm == "batch":
        return functional.batch_norm(x, None, None, scale, bias, training=True, eps=1e-5)
    if norm == "instance":
        return functional.instance_norm(x, None, None, scale, bias, eps=1e-5)
    if norm == "group":
        return functional.group_norm(x, num_groups, scale, bias, eps=1e-5)
    if norm == "layer":
        return functional.layer_norm(x, x.shape[1:], scale, bias, eps=1e-5)
    return functional.rms_norm(x, x.shape[1:], scale, eps=1e-5)


@pytest.mark.parametrize("shape", [(8, 6, 7, 5), (5, 6, 31), (3, 6, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_against_torch(rng, norm, shape):
    torch = pytest.importorskip("torch")
    whole = norm in ("layer", "rms")
    axis = tuple(range(1, len(shape))) if whole else 1
    parameters = shape[1:] if whole else shape[1]
    x = (rng.standard_normal(shape) + 2).astype(np.float32)
    scale, bias = (rng.standard_normal(parameters).astype(np.float32) for _ in range(2))
    cotangent = rng.standard_normal(shape).astype(np.float32)

    inputs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, scale, bias)]
    expected = torch_of(norm, torch, *inputs, 3)
    expected.backward(torch.tensor(cotangent, dtype=torch.float64))

    def run(cotangent, *args):
        y, pullback = jax.vjp(lambda *a: apply(norm, *a, axis, 3, epsilon=1e-5), *args)
        return y, pullback(cotangent)

    y, gradients = jax.jit(run)(cotangent, x, scale, bias)
    assert_close(y, expected.detach().numpy(), x.size)
    for a, t in zip(gradients, inputs, strict=True):
        if t.grad is not None:
            assert_close(a, t.grad.numpy(), x.size)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_averages_against_torch(rng, momentum):
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
    running = jaxnorm.init_running(5)
    for _ in range(4):
        x = (rng.standard_normal((6, 5, 4, 3)) * 2 + 7).astype(np.float32)
        module(torch.tensor(x, dtype=torch.float64))
        _, batch = jaxnorm.batch_norm(x, axis=1)
        running = jaxnorm.update_running(running, batch, alpha=momentum, unbiased=True)
    assert_close(running.mean, module.running_mean.numpy(), 72)
    assert_close(running.var, module.running_var.numpy(), 72)
    module.eval()
    y = jaxnorm.normalize(x, running, axis=1)
    assert_close(y, module(torch.tensor(x, dtype=torch.float64)).detach().numpy(), 72)


# Identities ----------------------------------------------------------------------------------------------------------


def test_layer_is_group_with_one_group(rng):
    x = rng.standard_normal((4, 5, 6, 8)).astype(np.float32)
    assert_close(jaxnorm.group_norm(x, num_groups=1), jaxnorm.layer_norm(x, axis=(1, 2, 3)), 240)


def test_instance_is_group_with_as_many_groups_as_channels(rng):
    x = rng.standard_normal((4, 5, 6, 8)).astype(np.float32)
    assert_close(jaxnorm.group_norm(x, num_groups=8), jaxnorm.instance_norm(x), 30)


def test_instance_is_batch_of_one_example(rng):
    x = rng.standard_normal((1, 5, 6, 8)).astype(np.float32)
    assert_close(jaxnorm.instance_norm(x, epsilon=1e-5), jaxnorm.batch_norm(x)[0], 30)


@pytest.mark.parametrize("norm", NORMS)
def test_scale_and_shift_invariance(rng, norm):
    x = rng.standard_normal((8, 5, 6, 4)).astype(np.float32)
    y = apply(norm, x, None, None, -1, 2, epsilon=0.0)
    shift = 0 if norm == "rms" else 16  # rms normalization does not subtract the mean
    moved = apply(norm, 4 * x + shift, None, None, -1, 2, epsilon=0.0)
    # 4 * x is exact, and the addition of 16 rounds x itself by up to 2^-20: that, not the arithmetic, is the tolerance
    np.testing.assert_allclose(moved, y, rtol=0, atol=1e-6 if norm == "rms" else 2.0**-19)


def test_output_is_standardized(rng):
    x = (rng.standard_normal((64, 9, 5)) * 7 - 3).astype(np.float32)
    y = np.asarray(jaxnorm.batch_norm(x, epsilon=0.0)[0], np.float64)
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((0, 1)), 1, atol=1e-6)


def test_channels_first_is_channels_last(rng):
    x = rng.standard_normal((4, 5, 6, 8)).astype(np.float32)
    first = np.moveaxis(x, -1, 1)
    for norm in ("batch", "group", "instance"):
        a = apply(norm, first, None, None, 1, 2)
        assert_close(np.moveaxis(np.asarray(a), 1, -1), np.asarray(apply(norm, x, None, None, -1, 2)), 120)


def test_moments_in_the_order_of_the_features(rng):
    x = rng.standard_normal((5, 3, 4, 2)).astype(np.float32)
    _, batch = jaxnorm.batch_norm(x, axis=(-1, 1))
    np.testing.assert_allclose(batch.mean, x.mean((0, 2)).T, atol=1e-6)
    np.testing.assert_allclose(jaxnorm.moments(x, (2, 0)).mean, x.mean((0, 2)), atol=1e-6)
    assert jaxnorm.moments(x, (0, 1, 2, 3)).var.shape == ()
