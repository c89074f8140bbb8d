"""Comparisons whose tolerance follows from the dtype and the number of values summed."""

import jax.numpy as jnp
import numpy as np


def tolerance(dtype, size=1):
    """Rounding of ``size`` values summed in the arithmetic of ``dtype`` (never below float32), then rounded to it."""
    stored = float(jnp.finfo(dtype).eps)
    arithmetic = min(stored, float(jnp.finfo(jnp.float32).eps))
    return (stored / 2 if stored > arithmetic else 0) + 4 * arithmetic * max(1, size) ** 0.5


def assert_close(actual, expected, size=1, magnitude=0.0, what=""):
    """The largest error is within `tolerance` of the largest value expected, or of the terms of ``magnitude`` in it."""
    dtype = jnp.asarray(actual).dtype
    actual = np.asarray(jnp.asarray(actual).astype(jnp.promote_types(dtype, jnp.float32)))
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    if expected.size == 0:
        return
    assert np.isfinite(actual).all(), what
    error = np.abs(actual - expected).max()
    allowed = tolerance(dtype, size) * max(np.abs(expected).max(), magnitude)
    assert error <= allowed, f"{what}: error {error:.3g} exceeds {allowed:.3g}"
