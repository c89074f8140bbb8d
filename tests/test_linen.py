"""`jaxnorm.linen` against the pure functions, and against Flax's own layer where that is right."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

import jaxnorm
from jaxnorm.linen import BatchNorm


def draw(rng, shape=(8, 5, 6)):
    return (rng.standard_normal(shape) + 1).astype(np.float32)


def test_variables_are_those_of_flax(rng):
    x = draw(rng)
    ours = BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    theirs = flax.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("axis", [-1, 1, (1, 2)])
def test_training_and_inference(rng, axis, dtype):
    x = draw(rng)
    ours, theirs = (cls(axis=axis, momentum=0.8, dtype=dtype) for cls in (BatchNorm, flax.linen.BatchNorm))
    variables = ours.init(jax.random.key(0), x, use_running_average=False)
    variables["params"]["scale"] += 0.5
    (y, updates), (y_flax, updates_flax) = (
        layer.apply(variables, x, use_running_average=False, mutable="batch_stats") for layer in (ours, theirs)
    )
    assert y.dtype == y_flax.dtype
    assert_close(y, np.asarray(y_flax, np.float32), x.size)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(updates_flax), strict=True):
        assert_close(a, b, x.size)
    variables = {**variables, **updates}
    y, y_flax = (layer.apply(variables, x, use_running_average=True) for layer in (ours, theirs))
    assert_close(y, np.asarray(y_flax, np.float32), 1)


def test_right_where_flax_is_not(rng):
    x = draw(rng, (4096, 8)) + np.float32(1e4)
    layer = BatchNorm(use_running_average=False)
    y, updates = layer.apply(layer.init(jax.random.key(0), x), x, mutable="batch_stats")
    exact = x.astype(np.float64)
    np.testing.assert_allclose(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), rtol=0, atol=2e-6)
    running = jaxnorm.update_running(jaxnorm.init_running(8), jaxnorm.moments(x, 0), alpha=0.01)
    np.testing.assert_allclose(updates["batch_stats"]["var"], running.var, rtol=1e-6)


def test_initialization_averages_nothing(rng):
    variables = BatchNorm(use_running_average=False, axis_name="nowhere").init(jax.random.key(0), draw(rng)[:1, :1])
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_no_replicas_needed_at_inference(rng):
    layer = BatchNorm(use_running_average=True, axis_name="nowhere")
    x = draw(rng)
    np.testing.assert_allclose(layer.apply(layer.init(jax.random.key(0), x), x), x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_axis_may_be_given_as_a_list(rng):
    x = draw(rng)
    for axis in ([1, 2], (2, 1)):
        variables = BatchNorm(use_running_average=False, axis=axis).init(jax.random.key(0), x)
        assert variables["params"]["scale"].shape == (5, 6)


def test_mask(rng):
    x, mask = draw(rng), np.arange(8).reshape(8, 1, 1) < 5
    layer = BatchNorm(use_running_average=False, momentum=0.0)
    _, updates = layer.apply(layer.init(jax.random.key(0), x), x, mask=mask, mutable="batch_stats")
    assert_close(updates["batch_stats"]["mean"], x[:5].astype(np.float64).mean((0, 1)), 25)
