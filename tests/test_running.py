"""Running averages: the seed's formula, cumulative, unbiased, and never poisoned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

import jaxnorm
from jaxnorm import Moments

pytestmark = pytest.mark.any_version


def batches(rng, counts, features=4):
    return [(rng.standard_normal((n, features)) * 3 + 20).astype(np.float32) for n in counts]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.75, 1.0])
def test_formula_of_the_seed(rng, alpha, unbiased):
    running = jaxnorm.init_running(4)
    mean, var = np.zeros(4), np.ones(4)
    for x in batches(rng, [8, 3, 50]):
        running = jaxnorm.update_running(running, jaxnorm.batch_norm(x)[1], alpha=alpha, unbiased=unbiased)
        exact = x.astype(np.float64)
        mean = (1 - alpha) * mean + alpha * exact.mean(0)
        var = (1 - alpha) * var + alpha * exact.var(0, ddof=int(unbiased))
    assert_close(running.mean, mean, 50)
    assert_close(running.var, var, 50)
    np.testing.assert_array_equal(running.count, 61)


def test_cumulative_average_of_equal_batches(rng):
    data = batches(rng, [16] * 5)
    running = jaxnorm.init_running(4)
    for x in data:
        running = jaxnorm.update_running(running, jaxnorm.moments(x, 0), alpha=None)
    assert_close(running.mean, np.mean([x.astype(np.float64).mean(0) for x in data], 0), 80)
    assert_close(running.var, np.mean([x.astype(np.float64).var(0) for x in data], 0), 80)


def test_cumulative_average_weighs_by_count(rng):
    """The mean is that of all values together, whatever the sizes of the batches."""
    data = batches(rng, [2, 31, 7])
    running = jaxnorm.init_running(4)
    for x in data:
        running = jaxnorm.update_running(running, jaxnorm.moments(x, 0), alpha=None)
    assert_close(running.mean, np.concatenate(data).astype(np.float64).mean(0), 40)


@pytest.mark.parametrize("alpha", [0.1, 1.0, None])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_never_poisoned(rng, poison, alpha):
    (x,) = batches(rng, [16])
    running = jaxnorm.update_running(jaxnorm.init_running(4), jaxnorm.moments(x, 0))
    x[3, 1] = poison
    _, batch = jaxnorm.batch_norm(x)
    assert not np.isfinite(batch.var).all()
    for new, old in zip(jaxnorm.update_running(running, batch, alpha=alpha), running, strict=True):
        np.testing.assert_array_equal(new, old)


def test_never_poisoned_by_what_the_averages_cannot_hold():
    """The unbiased variance, or what float16 averages would store, may be infinite where the moments are finite."""
    large = Moments(jnp.array([1e6]), jnp.array([3e38]), jnp.array([2.0]))
    for running, kwargs in (
        (jaxnorm.init_running(1), {"alpha": 0.9, "unbiased": True}),
        (jaxnorm.init_running(1, dtype=jnp.float16), {"alpha": 0.1}),
    ):
        for new, old in zip(jaxnorm.update_running(running, large, **kwargs), running, strict=True):
            np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("field", Moments._fields)
def test_never_poisoned_by_one_field(field, poison):
    """An infinite count would stay in the averages, as mean and variance would."""
    running = jaxnorm.init_running(1)
    batch = Moments(*jnp.ones((3, 1)))._replace(**{field: jnp.array([poison])})
    for new, old in zip(jaxnorm.update_running(running, batch, alpha=0.1), running, strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("alpha", [0.1, 1.0, None])
@pytest.mark.parametrize("kind", ["empty", "masked", "zero weights"])
def test_batch_of_nothing(rng, kind, alpha, unbiased):
    (x,) = batches(rng, [16])
    running = jaxnorm.update_running(jaxnorm.init_running(4), jaxnorm.moments(x, 0))
    x, mask = {
        "empty": (x[:0], None),
        "masked": (x, np.zeros((16, 1), bool)),
        "zero weights": (x, np.zeros((16, 4), np.float32)),
    }[kind]

    def loss(x):
        y, batch = jaxnorm.batch_norm(x, mask=mask)
        return jnp.sum(y), (y, batch)

    gradient, (y, batch) = jax.grad(loss, has_aux=True)(x)
    assert y.shape == x.shape
    for a in (y, gradient, *batch):
        assert np.isfinite(a).all()
    np.testing.assert_array_equal(batch.count, 0)
    for new, old in zip(jaxnorm.update_running(running, batch, alpha=alpha, unbiased=unbiased), running, strict=True):
        np.testing.assert_array_equal(new, old)


def test_feature_without_values_stays(rng):
    (x,) = batches(rng, [16])
    mask = np.array([[True, False, True, True]])
    running = jaxnorm.init_running(4)
    new = jaxnorm.update_running(running, jaxnorm.moments(x, 0, mask=mask), alpha=0.5)
    assert new.mean[1] == 0
    assert new.var[1] == 1
    assert new.count.tolist() == [16, 0, 16, 16]
    assert_close(new.mean[::2], 0.5 * x.astype(np.float64).mean(0)[::2], 16)


def test_unbiased_of_one_value_leaves_the_averages(rng):
    mask = np.arange(16)[:, None] == 5
    batch = jaxnorm.moments(batches(rng, [16])[0], 0, mask=mask)
    running = jaxnorm.init_running(4)
    for new, old in zip(jaxnorm.update_running(running, batch, unbiased=True), running, strict=True):
        np.testing.assert_array_equal(new, old)
    assert jaxnorm.update_running(running, batch, unbiased=False).count.tolist() == [1] * 4


@pytest.mark.parametrize("mask_dtype", [bool, np.float32])
def test_masked_out_may_hold_anything(rng, mask_dtype):
    """NaN and inf where the mask is zero reach neither statistics, nor output elsewhere, nor any gradient."""
    (x,) = batches(rng, [16])
    mask = (np.arange(16)[:, None] < 9).astype(mask_dtype)
    scale = np.float32([1, 2, 3, 4])

    def loss(x, scale):
        y, batch = jaxnorm.batch_norm(x, scale, mask=mask)
        return jnp.sum(jnp.where(mask > 0, jnp.sin(y), 0)), batch

    expected = jax.grad(loss, (0, 1), has_aux=True)(x, scale)
    x[9:12], x[12:] = np.nan, -np.inf
    actual = jax.grad(loss, (0, 1), has_aux=True)(x, scale)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, e)


def test_masked_out_replica_contributes_nothing(rng):
    x = np.stack(batches(rng, [8] * 4))
    mask = np.ones((4, 8, 1), bool)
    mask[2] = False
    x[2] = np.nan
    y, batch = jax.vmap(lambda x, m: jaxnorm.batch_norm(x, mask=m, axis_name="r"), axis_name="r", out_axes=(0, None))(
        x, mask
    )
    exact = x[[0, 1, 3]].astype(np.float64).reshape(-1, 4)
    assert_close(batch.mean, exact.mean(0), 24)
    assert_close(batch.var, exact.var(0), 24)
    assert np.isfinite(y).all()


def test_alpha_may_be_traced(rng):
    batch = jaxnorm.moments(batches(rng, [16])[0], 0)
    running = jaxnorm.init_running(4)
    scheduled = jax.jit(lambda alpha: jaxnorm.update_running(running, batch, alpha=alpha))(0.25)
    for a, b in zip(scheduled, jaxnorm.update_running(running, batch, alpha=0.25), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-7)


def test_update_keeps_its_types_under_scan(rng):
    data = np.stack(batches(rng, [8] * 6))

    def step(running, x):
        y, batch = jaxnorm.batch_norm(x)
        return jaxnorm.update_running(running, batch, alpha=0.1), y

    scanned, _ = jax.lax.scan(step, jaxnorm.init_running(4), data)
    running = jaxnorm.init_running(4)
    for x in data:
        running, _ = step(running, x)
    for a, b in zip(scanned, running, strict=True):
        assert_close(a, b, 8)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_dtypes_and_shapes(dtype):
    running = jaxnorm.init_running((2, 3), dtype=dtype)
    assert running.mean.dtype == dtype
    assert running.var.dtype == running.count.dtype == jnp.float32
    x = jnp.ones((5, 2, 3), dtype) * jnp.arange(5, dtype=dtype).reshape(5, 1, 1)
    new = jaxnorm.update_running(running, jaxnorm.batch_norm(x, axis=(1, 2))[1])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), running)
    assert isinstance(jaxnorm.moments(x, 0), Moments)


def test_traced_alpha_is_one_number(rng):
    batch, running = jaxnorm.moments(batches(rng, [16])[0], 0), jaxnorm.init_running(4)
    with pytest.raises(TypeError, match=r"^update_running: alpha must be one real number; got .*\(4,\)"):
        jax.jit(lambda alpha: jaxnorm.update_running(running, batch, alpha=alpha))(jnp.full(4, 0.1))


def test_types_stay_whatever_the_batch(rng, x64):
    """A batch in float64 changes no dtype of averages in float32: a scan carries them."""
    x = rng.standard_normal((5, 16, 4))
    old = jaxnorm.init_running(4)
    new, _ = jax.lax.scan(lambda r, x: (jaxnorm.update_running(r, jaxnorm.moments(x, 0)), None), old, x)
    assert [n.dtype for n in new] == [o.dtype for o in old] == [jnp.float32] * 3


@pytest.mark.parametrize("alpha", [0.25, None])
def test_complex_batch(rng, alpha):
    """The mean becomes complex, the variance stays real."""
    x = (rng.standard_normal((16, 4)) + 1j * rng.standard_normal((16, 4))).astype(np.complex64)
    new = jaxnorm.update_running(jaxnorm.init_running(4), jaxnorm.moments(x, 0), alpha=alpha)
    assert_close(new.mean.real, x.mean(0).real * (alpha or 1), 16)
    assert_close(new.mean.imag, x.mean(0).imag * (alpha or 1), 16)
    assert new.var.dtype == jnp.float32


@pytest.mark.parametrize("alpha", [0.1, 1.0, None])
def test_an_average_that_is_not_finite_is_begun_anew(rng, alpha):
    batch = jaxnorm.moments(batches(rng, [16])[0], 0)
    old = jaxnorm.init_running(4)
    poisoned = old._replace(mean=old.mean.at[1].set(jnp.nan), var=old.var.at[2].set(jnp.inf))
    new, expected = (jaxnorm.update_running(r, batch, alpha=alpha) for r in (poisoned, old))
    np.testing.assert_array_equal(new.mean[1], batch.mean[1])
    np.testing.assert_array_equal(new.var[2], batch.var[2])
    for n, e in zip(new, expected, strict=True):
        np.testing.assert_array_equal(n[3], e[3])
