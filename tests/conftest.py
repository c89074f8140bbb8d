"""What all tests share: simulated devices, strict promotion, one cache of compiled programs, tolerances."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version

DEVICES = 8
# A notebook takes a fifth to a third less of the processor; a tenth since no module is divided for the code generator.
# Later versions have the emitters only.
FASTER_TO_COMPILE = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    FASTER_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}"]
if "JAXNORM_OPTIMIZE" not in os.environ:  # a fourth of the compiler's time, for what is right however it is compiled
    flags += [FASTER_TO_COMPILE, "--xla_backend_optimization_level=0"]
os.environ["XLA_FLAGS"] = " ".join(flags)
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
gc.freeze()  # what is imported stays, and tracing makes much that goes at once: a tenth of the time
gc.set_threshold(50_000, 20, 50)


def gather_at_most(replicas):
    """Let up to so many replicas exchange their moments in one collective, for the whole run."""
    pytest.MonkeyPatch().setattr("jaxnorm._replicas.GATHER_LIMIT", replicas)


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
        patch.setattr(_xla, "is_large", lambda shape: True)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()
