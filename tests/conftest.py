"""What all tests share: simulated devices, strict promotion, tolerances derived from dtype and size."""

import os

DEVICES = 40  # more than jaxnorm._moments.GATHER_LIMIT
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from jaxnorm import _xla  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng(request):
    """A generator seeded by the test's name: the same numbers whichever tests run."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def x64():
    """Sixty-four bit types for the length of a test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=["together", "alone"])
def compiled(request, monkeypatch):
    """Sums compiled with all else, as for several devices, and each by itself, as for one CPU."""
    if request.param == "together":
        yield
        return
    monkeypatch.setattr(_xla, "one_cpu", lambda: True)
    jax.clear_caches()
    yield
    jax.clear_caches()
