"""Comparisons whose tolerance follows from the dtype and the number of values summed; and how to compile for them."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

compile_as_written = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
"""``jit``, with every rounding to bfloat16 or float16 that was written down."""


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


def quick_first(quick, values):
    """Parameters of which `make test` tries the first so many; the others are slow."""
    return [v if n < quick else pytest.param(v, marks=pytest.mark.slow) for n, v in enumerate(values)]


def pairwise(*factors, without=lambda *values: False, beyond=lambda *values: True):
    """Parameters of combinations, but those ``without``: enough that any two values meet, and slow ones ``beyond``.

    Each factor maps the name of a value to the value. Combinations are chosen greedily, by how many pairs of values
    that did not meet before they bring together.
    """
    combinations = [c for c in itertools.product(*(f.items() for f in factors)) if not without(*(v for _, v in c))]

    def pairs(combination):
        return set(itertools.combinations([(i, name) for i, (name, _) in enumerate(combination)], 2))

    waiting = [(pairs(c), index) for index, c in enumerate(combinations)]
    met, quick = set(), set()
    while True:
        gain, index = max(((len(p - met), -index) for p, index in waiting), default=(0, 0))
        if not gain:
            break
        quick.add(-index)
        met |= waiting[-index][0]
    return [
        pytest.param(
            *(v for _, v in c), id="-".join(str(n) for n, _ in c), marks=[] if i in quick else pytest.mark.slow
        )
        for i, c in enumerate(combinations)
        if i in quick or beyond(*(v for _, v in c))
    ]
