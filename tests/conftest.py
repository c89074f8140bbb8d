"""What all tests share: simulated devices, strict promotion, one cache of compiled programs, tolerances."""

import atexit
import os
import shutil
import tempfile

DEVICES = 8
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers, and the processes that tests start, have it from here
    CACHE = tempfile.mkdtemp(prefix="jaxnorm-tests-")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from jaxnorm import _xla  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def gather_at_most(replicas):
    """Let up to so many replicas exchange their moments in one collective, for the whole run."""
    pytest.MonkeyPatch().setattr("jaxnorm._moments.GATHER_LIMIT", replicas)


gather_at_most(DEVICES // 2)  # four devices are gathered, eight are not


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


@pytest.fixture(scope="module")
def compiled_quickly():
    """For modules in which programs are many and large, and right or wrong however well they are compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=["together", "alone"])
def compiled(request):
    """Sums compiled with all else, as for several devices, and each by itself, as for one CPU.

    Of a module, so that what was traced in between is thrown away once, not once a test.
    """
    if request.param == "together":
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_xla, "one_cpu", lambda: True)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()
