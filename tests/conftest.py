"""What all tests share: simulated devices, strict promotion, one cache of compiled programs, tolerances."""

import atexit
import gc
import os
import re
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

FURTHER = [
    r"test_contexts.*collectives_of_a_step_with_axis_name.*unchecked",
    r"test_contexts.*test_context\[.*(groups-plain|unchecked-all)",
    r"test_converters.*(export_with_symbolic_shapes|jet)\[(?!batch)",
    r"test_derivatives.*test_bfloat16\[(?!together-batch)",
    r"test_derivatives.*test_complex\[(group|instance)\]",
    r"test_derivatives.*test_derivatives\[(together-(?!batch)|alone-(?!batch|layer))",
    r"test_derivatives.*test_residuals\[(alone-(group|instance|rms)|.*-float16-)",
    r"test_derivatives.*test_third_derivative\[together\]",
    r"test_documents.*code_runs\[docs/",
    r"test_examples.*(both_scripts|resumed|module_of_nnx)",
    r"test_fused.*an_activation_may_close_over_arrays\[(in turn|by parts)-(?!batch)",
    r"test_fused.*invertible_derivatives\[(?!batch-(softplus|leaky))",
    r"test_fused.*invertible_gradients_are_exact_to_the_dtype\[(layer|group)",
    r"test_fused.*invertible_in_context\[.*(eager|unchecked|inside|pmap)",
    r"test_fused.*test_collectives\[.*unchecked",
    r"test_fused.*test_layers\[(RMS|Group|Instance)",
    r"test_layers.*does_what_it_does_in_flax\[.*-(Instance|Group)Norm-(?!defaults|group_size|feature|reduction)",
    r"test_layers.*explicit_sharding\[linen-spec[01]",
    r"test_layers.*orbax",
    r"test_layers.*test_trainable\[True-(Group|Instance|RMS)",
    r"test_numerics.*fully_masked_is_the_bias\[(layer|rms|instance)\]",
    r"test_numerics.*test_batch_norm\[(together.*(boolean|weights)|alone.*(plain|weights))",
    r"test_numerics.*test_batch_norm_over_replicas\[(\(32.*all|\(4096.*groups)",
    r"test_numerics.*test_other_norms\[(together.*(plain|boolean)|alone.*(plain|weights))",
    r"test_numerics.*test_range\[(together|alone-(rms|instance|layer-plain|group-weights|batch-plain))",
    r"test_oracles.*against_numpy\[instance-\((?!64|5, 9, 3)",
    r"test_oracles.*against_numpy\[rms-\((?!64|6, 5, 7)",
    r"test_oracles.*test_dtypes\[(rms|instance)",
    r"test_peers.*(at_a_mean_of|a_nan_in_a_batch).*\[(equinox|haiku|keras)",
    r"test_peers.*(groups_of_replicas|unequal_counts)",
    r"test_resnet.*test_linen",
    r"test_running.*batch_of_nothing\[zero",
    r"test_sharding.*sharded_arrays\[(rms|instance|layer).*(masked|explicit)",
    r"test_surgery_convert.*train_alike\[(haiku|equinox)",
    r"test_surgery_fold.*(depthwise_and_transposed|preactivation).*flax",
    r"test_surgery_fold.*other_batch_sizes_and_export",
    r"test_surgery_fold.*resnets_in_bfloat16\[(?!linen-jaxnorm)",
    r"test_surgery_fold.*resnets_lose_all_their_norms\[(?!nnx-basic-jaxnorm|linen-bottleneck-flax)",
    r"test_surgery_fold.*test_equinox\[ema",
    r"test_surgery_freeze.*nothing_else_changes\[scan",
    r"test_surgery_freeze.*written_by_hand\[((remat|vmap|scan)-flax|(remat|vmap)-jaxnorm|flax)",
    r"test_surgery_inspect.*(test_the_table|nnx_and_norms_without)",
    r"test_surgery_recalibrate.*data_set\[.*flax",
    r"test_surgery_recalibrate.*lifted_bodies\[(vmap|remat)\]",
    r"test_surgery_swap.*into_remedies_with_parameters_and_averages\[(Ghost|Split)",
    r"test_surgery_swap.*nnx_batch_norm_into_remedies\[(Ghost|SplitBatchNorm-more2)",
    r"test_surgery_swap.*written_by_hand\[(vmap|remat)\]",
    r"test_training\.py.*(one_device_and_four_agree\[jit|both_roads_agree_for_every_norm)",
    r"test_training\.py.*averages_see_every_microbatch_by_its_count\[jit",
    r"test_training\.py.*residual_blocks_end.*True",
    r"test_training\.py.*test_models\[resnet(50-(?!before-batch)|18-after)",
    r"test_training\.py.*traced_once\[jit",
    r"test_training_program.*(divergence|ends_with_a_nan|cannot_be_used|best_and_the_last_two)",
    r"test_training_program.*(end_to_end|only_with_the_settings|signals_lose_nothing|checkpoint_is_damaged|full_disk)",
    r"test_training_program.*metrics_are_never_erased",
    r"test_transformations.*test_cell\[(nested n|nnx.(grad|remat|vmap|scan) of (pure|Linen))",
    r"test_transformations.*test_cell\[nnx.(shard_map|remat) of NNX",
    r"test_variant_layers.*(parameters_train|recurrent_cell|functions\[(Split|Switchable|EvoNorm|Sequence|Ghost))",
    r"test_variants.*(on_the_number_of_devices\[jit|half_precision\[float16|features_on_another_axis)",
    r"test_variants.*output_and_gradients\[(?!10000.0-masked)",
]
"""The tests that take longest, alone or in sum: slow, as those marked so. Of most `make test` runs a neighbour, which
tries the same code in another combination, or another page in the same way; not of whole trainings."""


def pytest_collection_modifyitems(config, items):
    matched = set()
    for item in items:
        patterns = [pattern for pattern in FURTHER if re.search(pattern, item.nodeid)]
        matched.update(patterns)
        if patterns:
            item.add_marker(pytest.mark.slow)
    stale = set(FURTHER) - matched
    all_are_here = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("ignore")
    if stale and all_are_here:
        raise pytest.UsageError(f"FURTHER: no test matches {sorted(stale)}")


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
