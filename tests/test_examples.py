"""The scripts that users copy, in short: the same curve on any mesh, resumed or not, and of both interfaces."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from flax import nnx

from jaxnorm import training

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))

import train_linen  # noqa: E402  # pyright: ignore[reportMissingImports]
import train_nnx  # noqa: E402  # pyright: ignore[reportMissingImports]

SHORT = {"epochs": 2, "batch_size": 256, "learning_rate": 0.02}
STEPS, IMAGES = 12, 256 * 64


def small(script):
    if script is train_linen:
        return train_linen.CNN(widths=(8,), dtype=jnp.float32)
    return train_nnx.CNN(widths=(1, 8), dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=[train_linen, train_nnx], ids=["linen", "nnx"])
def trained(request, tmp_path_factory):
    """A script, its folder, and its state, history and model, after two epochs on one device."""
    folder, model = tmp_path_factory.mktemp(request.param.__name__), small(request.param)
    state, history = request.param.train(folder, model=model, devices=jax.devices()[:1], **SHORT)
    return request.param, folder, jax.device_get(state), history, model


def curve(history):
    return np.float32([[epoch["train_loss"], epoch["loss"]] for epoch in history])


@pytest.mark.slow
def test_same_curve_on_eight_devices(trained, tmp_path):
    script, _, _, expected, _ = trained
    _, history = script.train(tmp_path, model=small(script), **SHORT)
    # each of the steps adds the rounding of its sums to what it was given
    assert_close(curve(history), curve(expected), STEPS**2 * IMAGES)


@pytest.mark.slow
def test_resumed_is_the_same_in_every_bit(trained):
    """From the checkpoint of the first epoch."""
    script, folder, state, history, _ = trained
    (folder / "12").rename(folder / "aside")
    again, history_again = script.train(folder, model=small(script), devices=jax.devices()[:1], **SHORT)
    assert history_again == history
    chex.assert_trees_all_equal(jax.device_get(again), state)


def test_the_module_of_nnx_has_what_was_trained(trained):
    script, _, _, history, model = trained
    if script is train_linen:
        pytest.skip("modules of Linen hold nothing")
    _, test = training.load_digits()
    model.eval()
    accuracy = (model(jnp.asarray(test.images)).argmax(-1) == test.labels).mean()
    assert float(accuracy) == pytest.approx(history[-1]["accuracy"])


@pytest.mark.slow
def test_both_scripts_train_the_same_network():
    """Given the same parameters, a step of four microbatches, one of them partial, gives the same of everything."""
    data = training.load_digits()[0]
    (batch,) = training.batches(training.Split(data.images[:58], data.labels[:58]), 64)
    mesh, optimizer = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), optax.sgd(0.1)
    linen, module = small(train_linen), small(train_nnx)
    state = training.init_state(linen, optimizer, (8, 8, 1), mesh=mesh)
    module.convs[0].kernel[...] = state.params["Conv_0"]["kernel"]
    module.dense.kernel[...] = state.params["Dense_0"]["kernel"]
    results = []
    for model, kinds in ((linen, ["jit"]), (module, ["jit", "shard_map"])):
        for parallelism in kinds:
            state = training.init_state(model, optimizer, (8, 8, 1), mesh=mesh)
            step = training.make_train_step(model, optimizer, mesh, parallelism=parallelism, accumulate=4)
            state, metrics = step(state, training.shard_batch(batch, mesh))
            results.append(({k: float(v) for k, v in metrics.items()}, jax.device_get(state)))
    (expected, linen_state), *others = results
    for metrics, state in others:
        assert metrics == pytest.approx(expected, rel=1e-5)
        pairs = [(state.params["convs"][0]["kernel"], linen_state.params["Conv_0"]["kernel"])]
        for name in ("mean", "var"):
            pairs.append((state.batch_stats["norms"][0][name], linen_state.batch_stats["BatchNorm_0"][name]))
        for name in ("scale", "bias"):
            pairs.append((state.params["norms"][0][name], linen_state.params["BatchNorm_0"][name]))
        for actual, wanted in pairs:
            assert_close(actual, wanted, 58 * 64)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("script", [train_linen, train_nnx], ids=["linen", "nnx"])
def test_the_whole_script_reaches_its_accuracy(script, tmp_path):
    state, history = script.train(tmp_path)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state.params, state.batch_stats)))
    assert history[-1]["accuracy"] >= 0.98


def test_each_is_one_file_to_copy():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 120
