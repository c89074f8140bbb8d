"""Statistics are exact for any mean: plain, masked, and over replicas with unequal counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from checks import assert_close
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm._moments import NEAR, STRIDE, sample
from jaxnorm._xla import is_large

pytestmark = [pytest.mark.optimized, pytest.mark.any_version]

KAPPAS = [0, 1e2, 1e3, 1e4, 1e5, 1e6]
SHAPES = [(4096, 8), (32, 56, 56, 8)]
VALID_ROWS = np.array([8, 4, 2, 1])  # of every eight, on each of four replicas


def draw(rng, shape, kappa):
    """float32 N(kappa, 1); what the oracle sees is what was rounded to float32."""
    return (rng.standard_normal(shape) + kappa).astype(np.float32)


def exact(x, axes, weights=None):
    """Two passes in float64."""
    x = x.astype(np.float64)
    w = np.ones(x.shape) if weights is None else np.broadcast_to(weights, x.shape).astype(np.float64)
    n = w.sum(axes, keepdims=True)
    mean = (w * x).sum(axes, keepdims=True) / n
    return mean, (w * (x - mean) ** 2).sum(axes, keepdims=True) / n


def check(x, y, axes, weights=None, epsilon=1e-5, what=""):
    mean, var = exact(x, axes, weights)
    error = np.abs(y - (x - mean) / np.sqrt(var + epsilon)).max()
    assert error <= 2e-6, (what, error)  # nor is it NaN
    return mean.squeeze(axes), var.squeeze(axes)


def masks(rng, shape):
    column = (*shape[:-1], 1)
    return {"plain": None, "boolean": rng.random(column) < 0.3, "weights": rng.random(column).astype(np.float32)}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("mask", ["plain", "boolean", "weights"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(rng, shape, mask):
    mask = masks(rng, shape)[mask]
    axes = tuple(range(len(shape) - 1))
    for kappa in KAPPAS:
        x = draw(rng, shape, kappa)
        y, batch = jax.jit(jaxnorm.batch_norm)(x, mask=mask)
        mean, var = check(x, y, axes, mask, what=kappa)
        np.testing.assert_allclose(batch.var, var, rtol=1e-6, err_msg=f"{kappa=}")
        np.testing.assert_allclose(batch.mean, mean, rtol=1e-7, atol=1e-7, err_msg=f"{kappa=}")

        running = jaxnorm.init_running(8)
        for _ in range(3):
            running = jaxnorm.update_running(running, batch, alpha=0.5)
        np.testing.assert_allclose(running.mean, 0.875 * mean, rtol=5e-7, atol=1e-7, err_msg=f"{kappa=}")
        np.testing.assert_allclose(running.var, 0.125 + 0.875 * var, rtol=1e-6, err_msg=f"{kappa=}")


@pytest.mark.parametrize("groups", [None, [[0, 3], [1, 2]]], ids=["all", "groups"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_over_replicas(rng, shape, groups):
    rows = shape[0] // 4
    valid = (np.arange(rows) % 8 < VALID_ROWS[:, None]).reshape(shape[0], *(1,) * (len(shape) - 1))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def step(x, mask):
        y, batch = jaxnorm.batch_norm(x, mask=mask, axis_name="data", axis_index_groups=groups)
        return y, jax.tree.map(lambda m: m[None], batch)

    data = P("data")
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(data, data), out_specs=data))
    for kappa in KAPPAS:
        x = draw(rng, shape, kappa)
        y, batch = jax.device_get(mapped(x, valid))
        for group in groups or [range(4)]:
            members = np.concatenate([np.arange(rows) + r * rows for r in group])
            mean, var = check(x[members], y[members], tuple(range(len(shape) - 1)), valid[members], what=kappa)
            for r in group:
                np.testing.assert_allclose(batch.var[r], var, rtol=1e-6, err_msg=f"{kappa=}")
                np.testing.assert_allclose(batch.mean[r], mean, rtol=1e-7, atol=1e-7, err_msg=f"{kappa=}")


@pytest.mark.parametrize("replicas", [4, 8], ids=["gathered", "two-stage"])
def test_replicas_with_means_far_apart(rng, replicas):
    mapped = jax.jit(jax.vmap(lambda x: jaxnorm.batch_norm(x, axis_name="r"), axis_name="r", out_axes=(0, None)))
    for kappa in KAPPAS:
        x = draw(rng, (replicas, 64, 3), 0) + kappa * np.arange(replicas, dtype=np.float32).reshape(-1, 1, 1)
        y, batch = mapped(x)
        _, var = check(x, y, (0, 1), what=kappa)
        np.testing.assert_allclose(batch.var, var, rtol=1e-6, err_msg=f"{kappa=}")


OTHERS = {
    "layer": (jaxnorm.layer_norm, (-1,)),
    "group": (partial(jaxnorm.group_norm, num_groups=4), (1, 2, 4)),
    "instance": (jaxnorm.instance_norm, (1, 2)),
}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("mask", ["plain", "boolean", "weights"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_norms(rng, name, mask):
    shape = (2, 28, 28, 64) if name == "layer" else (4, 56, 56, 8)
    mask = {"plain": None, "boolean": rng.random(shape) < 0.5, "weights": rng.random(shape).astype(np.float32)}[mask]
    function, axes = OTHERS[name]
    grouped = (*shape[:-1], 4, 2) if name == "group" else shape
    for kappa in KAPPAS:
        x = draw(rng, shape, kappa)
        y = np.asarray(jax.jit(function)(x, mask=mask))
        weights = None if mask is None else mask.reshape(grouped)
        check(x.reshape(grouped), y.reshape(grouped), axes, weights, 1e-6, what=kappa)


@pytest.mark.parametrize(("dtype", "mean", "std"), [("float16", 0, 300), ("bfloat16", 50, 1)])
def test_half_precision_is_one_rounding(rng, dtype, mean, std):
    x = jnp.asarray(mean + std * rng.standard_normal((4096, 8)), dtype)
    y, batch = jaxnorm.batch_norm(x)
    exact_x = np.asarray(x, np.float64)
    center, var = exact(exact_x, (0,))
    expected = (exact_x - center) / np.sqrt(var + 1e-5)
    ulp = float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(np.abs(expected) + 1e-30))
    assert (np.abs(np.asarray(y, np.float64) - expected) <= 0.5 * ulp + 2e-6).all()
    assert y.dtype == dtype
    assert batch.var.dtype == jnp.float32
    np.testing.assert_allclose(batch.var, var[0], rtol=1e-6)


@pytest.mark.parametrize("length", [5, 1000, 40_000])
def test_rows_in_bfloat16(rng, length):
    """Any mean: of values, of constants, of all but one constant, of two that are large."""
    rows = [mean + std * rng.standard_normal(length) for mean, std in ((0, 1), (3, 1), (-300, 1), (7e4, 200), (0.1, 3))]
    rows += [np.full(length, value) for value in (0.1, 1234.5, -3e5)]
    rows += [np.where(np.arange(length) == length // 3, 1.01, 1) * value for value in (7.0, 1e5)]
    rows += [np.where(np.arange(length) < 2, 1e6, rng.standard_normal(length))]
    x = jnp.asarray(np.stack(rows), jnp.bfloat16)
    y = np.asarray(jax.jit(jaxnorm.layer_norm)(x), np.float64)
    mean, var = exact(np.asarray(x, np.float64), (1,))
    expected = (np.asarray(x, np.float64) - mean) / np.sqrt(var + 1e-6)
    largest = np.maximum(np.abs(expected), 1e-2).max(1, keepdims=True)
    error = np.abs(y - expected)
    bound = (2.0**-8 + 2.0**-12) * np.abs(expected) + 2.0**-13 * largest  # a rounding to eight bits, and of the rest
    assert (error <= bound).all(), (error / bound).max(1)


@pytest.mark.parametrize("axes", range(1, 7))
@pytest.mark.parametrize("size", [2, 4, 9, 40])
def test_a_sample_is_as_large_as_it_says(axes, size):
    """One position in `STRIDE`, and four of them at least, where there are so many."""
    x = jax.ShapeDtypeStruct((2, *(size,) * axes, 3), jnp.float32)
    positions = jax.eval_shape(lambda x: sample(x, tuple(range(1 + axes))), x).size // 6
    assert positions >= max(size**axes / STRIDE, min(4, size**axes))


@pytest.mark.parametrize("outlier", [1e3, 1e6])
def test_slice_unlike_the_rest(rng, outlier):
    """The bound holds for any data: here the slice that gives the center is far from everything else."""
    x, stride = draw(rng, (8, 64, 64, 4), 0), int(STRIDE**0.5)
    x[:, stride // 2 :: stride, stride // 2 :: stride] += np.float32(outlier)
    center = sample(jnp.asarray(x), (0, 1, 2)).mean((0, 1, 2))
    assert (np.abs(center) > 0.9 * outlier).all()
    y, batch = jaxnorm.batch_norm(x)
    mean, var = exact(x, (0, 1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5)
    # The slice is one position in STRIDE: its mean is at most the root of that off, in deviations, and the square of
    # the offset at most STRIDE variances. So the variance loses so many times, and once, what the sums lose, which are
    # pairwise: of n terms the root of log2(n) roundings, since errors add up at random. rstd loses half of that;
    # shifting there and back by as many deviations takes four more.
    lost = (1 + STRIDE) * np.log2(8 * 64 * 64) ** 0.5
    peak = np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=(lost / 2 * peak + 4 * (stride + peak)) * 2.0**-24)
    np.testing.assert_allclose(batch.var, var[0, 0, 0], rtol=lost * 2.0**-24)


def test_bright_band_on_black(rng):
    """Images of which the middle is unlike the rest: positions of the center are spread, not the middle rows."""
    x = np.zeros((32, 64, 1), np.float32)
    x[:, 30:34] = 123456.7
    _, var = exact(x, (0, 1))
    np.testing.assert_allclose(jaxnorm.moments(x, (0, 1)).var, var[0, 0], rtol=2e-5)  # sums of 2048, one by one


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6, -3.3e5, 1e-30, 1e18])
def test_constant_features(value):
    y, batch = jaxnorm.batch_norm(jnp.full((64, 9, 3), value))
    np.testing.assert_allclose(batch.var, 0, atol=(1e-6 * value) ** 2)
    assert np.abs(np.asarray(y)).max() <= 1e-3
    assert np.isfinite(np.asarray(y)).all()


@pytest.mark.parametrize("weight", [None, 0.3], ids=["plain", "weights"])
def test_variances_of_constants_are_not_negative(rng, weight):
    """The mean of the squares, less the square of the mean, rounds to either side of zero."""
    constants = (rng.standard_normal(2000) * 10.0 ** rng.uniform(-3, 5, 2000)).astype(np.float32)
    x = np.tile(constants, (5000, 1))
    batch = jaxnorm.moments(x, 0, mask=None if weight is None else np.full((5000, 1), weight, np.float32))
    assert (np.asarray(batch.var) >= 0).all()


def test_merge_moments_of_any_counts(rng):
    parts = [draw(rng, (n, 5), 1e5) for n in (1, 7, 0, 300, 2)]
    merge = jax.jit(jaxnorm.merge_moments)
    merged = jaxnorm.moments(parts[0], 0)
    for part in parts[1:]:
        merged = merge(merged, jaxnorm.moments(part, 0))
    mean, var = exact(np.concatenate(parts), (0,))
    np.testing.assert_allclose(merged.mean, mean[0], rtol=2e-7)
    np.testing.assert_allclose(merged.var, var[0], rtol=1e-3)  # a mean stored in float32 is 2^-24 * 1e5 off
    np.testing.assert_array_equal(merged.count, 310)


def test_merge_moments_neutral_element(rng):
    some = jaxnorm.moments(draw(rng, (100, 5), 1e4), 0)
    nothing = jaxnorm.Moments(jnp.full(5, jnp.nan), jnp.full(5, jnp.inf), jnp.zeros(5))
    merge = jax.jit(jaxnorm.merge_moments)
    for merged in (merge(some, nothing), merge(nothing, some)):
        for a, b in zip(merged, some, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-7)
    for m in merge(nothing, nothing):
        np.testing.assert_array_equal(m, 0)


def test_oracles_agree(rng):
    """The oracle used above and the labels of `oracles` agree with each other."""
    x = draw(rng, (6, 5, 4), 10)
    labels = oracles.labels_of("batch", x.shape)
    mean, var, count = oracles.statistics(x, labels)
    reference = exact(x, (0, 1))
    np.testing.assert_allclose(mean, reference[0].ravel())
    np.testing.assert_allclose(var, reference[1].ravel())
    np.testing.assert_array_equal(count, 30)


# The range that `standardize` states ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group", "instance"])
def test_range(rng, name, masked):
    """Output and gradients are right for data of any size from 1e-15 to 1e15, with weights from 1e-12 to 1e12."""
    shape = (6, 20, 4)
    x, cotangent = rng.standard_normal(shape), rng.standard_normal(shape).astype(np.float32)
    scale, weights = rng.standard_normal(4).astype(np.float32), rng.random(shape) + 0.1
    labels, features = oracles.labels_of(name, shape, num_groups=2), oracles.features_of(shape)
    functions = {
        "batch": lambda x, s, **kw: jaxnorm.batch_norm(x, s, **kw)[0],
        "layer": jaxnorm.layer_norm,
        "rms": jaxnorm.rms_norm,
        "group": partial(jaxnorm.group_norm, num_groups=2),
        "instance": jaxnorm.instance_norm,
    }

    @jax.jit
    def run(x, scale, weights, cotangent):
        settings = {"epsilon": 0.0, "mask": weights if masked else None}
        y, pullback = jax.vjp(lambda x, s: functions[name](x, s, **settings), x, scale)
        return y, *pullback(cotangent)

    w = weights if masked else None
    exact = oracles.normalize(x, labels, features, scale, None, 0.0, w, name != "rms")
    d_x, d_scale, _ = oracles.gradients(x, cotangent, labels, features, scale, 0.0, w, name != "rms")
    extremes = ((1e-12, 1e-7), (1e-12, 1e5), (1e12, 1e-7), (1e12, 1e5)) if masked else ((1e-15, 1), (1, 1), (1e15, 1))
    for size, weight in extremes:
        args = ((size * x).astype(np.float32), scale, (weight * weights).astype(np.float32), cotangent)
        y, g_x, g_scale = run(*args)
        assert_close(y, exact, 120, what=f"y at {size}")
        assert_close(np.float32(np.asarray(g_x, np.float64) * size), d_x, 480, np.abs(d_x).max(), what=f"d_x at {size}")
        assert_close(g_scale, d_scale, 120, 3.0, what=f"d_scale at {size}")


@pytest.mark.usefixtures("compiled")
def test_means_near_deviations(rng):
    """Where a CPU takes sums about zero, and where it measures again: on both sides of its bound."""
    x = draw(rng, (64, 32, 32, 4), 0)
    assert is_large(x.shape)
    for kappa in (0.5, 1.9, 2.1, 7, 30):
        moved = x * np.float32([1, 0.1, 3, 1]) + np.float32([kappa, 0.1 * kappa, -3 * kappa, 0])
        y, batch = jax.jit(jaxnorm.batch_norm)(moved)
        mean, var = exact(moved, (0, 1, 2))
        lost = (1 + NEAR) * 2.0**-24 * 16  # the bound, and of the sums of 2^16 the sixteen levels that add up in pairs
        np.testing.assert_allclose(batch.var, var.squeeze(), rtol=lost)
        np.testing.assert_allclose(y, (moved - mean) / np.sqrt(var + 1e-5), rtol=0, atol=5 * lost)


# What has nothing to be measured by ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group", "instance"])
def test_fully_masked_is_the_bias(rng, name):
    """A set of which nothing is left is normalized to zero, in every norm: not ``x / sqrt(epsilon)``, without bound."""
    x, scale, bias = (1e6 * draw(rng, s, 0) for s in ((4, 5, 6), (6,), (6,)))
    mask = np.ones((4, 5, 6), bool)
    mask[1] = False
    if name == "batch":
        mask = np.broadcast_to(np.arange(6) != 3, x.shape).copy()
    functions = {
        "batch": lambda x, s, b: jaxnorm.batch_norm(x, s, b, mask=mask)[0],
        "layer": lambda x, s, b: jaxnorm.layer_norm(x, s, b, mask=mask),
        "rms": lambda x, s, b: jaxnorm.rms_norm(x, s, mask=mask) + jnp.broadcast_to(b, x.shape),
        "group": lambda x, s, b: jaxnorm.group_norm(x, s, b, num_groups=2, mask=mask),
        "instance": lambda x, s, b: jaxnorm.instance_norm(x, s, b, mask=mask),
    }

    @jax.jit
    def run(cotangent, *args):
        y, pullback = jax.vjp(functions[name], *args)
        return y, pullback(cotangent)[0]

    y, d_x = run(draw(rng, x.shape, 0), x, scale, bias)
    expected = np.broadcast_to(bias, x.shape)
    np.testing.assert_array_equal(np.asarray(y)[~mask], expected[~mask])
    np.testing.assert_array_equal(np.asarray(d_x)[~mask], 0)
