"""The training loop: steps on meshes, both roads, recalibration, checkpoints, several processes, the command line."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checks import assert_close
from jax.sharding import AxisType

from jaxnorm import training
from jaxnorm.training.__main__ import main, parse
from jaxnorm.training._checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("compiled_quickly")

STEPS = 20


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def part_of_digits(count=230):
    """Of which a last batch of 64 holds 38."""
    train, _ = training.load_digits()
    return training.Split(train.images[:count], train.labels[:count])


def run(devices, road="jit", accumulate=1, norm="batch", optimizer=None, steps=STEPS, **settings):
    """Losses, and the state after some steps."""
    mesh, model = mesh_of(devices), training.CNN(widths=(8, 8), norm=norm, **settings)
    optimizer = optimizer or training.make_optimizer("sgd", 0.02, weight_decay=1e-3)
    data = part_of_digits()
    state = training.init_state(model, optimizer, data.images.shape[1:], seed=0, mesh=mesh)
    step = training.make_train_step(model, optimizer, mesh, road=road, accumulate=accumulate)
    losses = []
    while len(losses) < steps:
        for batch in training.batches(data, 64, seed=len(losses)):
            state, metrics = step(state, training.shard_batch(batch, mesh))
            losses.append(metrics["loss"] / metrics["count"])
    return jax.device_get((np.array(losses), state))


@pytest.fixture(scope="module")
def one_device():
    return run(1)


@pytest.mark.parametrize("road", ["jit", "shard_map"])
def test_one_device_and_four_agree(one_device, road):
    """Losses and running averages after twenty steps, every fourth of them on a partial batch."""
    losses, state = one_device
    losses_4, state_4 = run(4, road)
    # each step adds the rounding of its sums, over 64 images of 64 pixels at the most, to what it was given
    size = STEPS**2 * 64 * 64
    assert_close(losses_4, losses, size)
    for a, b in zip(jax.tree.leaves(state_4), jax.tree.leaves(state), strict=True):
        assert_close(np.asarray(a, np.float32), np.asarray(b, np.float32), size)
    assert state_4.step == STEPS


@pytest.mark.parametrize("norm", training.NORMS)
def test_both_roads_agree_for_every_norm(norm):
    (losses, _), (losses_by_hand, _) = (run(4, road, norm=norm, steps=4) for road in ("jit", "shard_map"))
    assert_close(losses_by_hand, losses, 16 * 64 * 64)


def test_invertible_training_is_the_same_training():
    losses, state = run(4, "shard_map", steps=5, activation="leaky_relu", invertible=True)
    expected, expected_state = run(4, steps=5, activation="leaky_relu")
    assert_close(losses, expected, 5**2 * 64 * 64)
    for a, b in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(expected_state.batch_stats), strict=True):
        assert_close(a, b, 5**2 * 64 * 64)


def test_accumulation_without_batch_statistics_is_one_large_batch():
    (losses, state), (losses_4, state_4) = (run(2, accumulate=a, norm="group", steps=4) for a in (1, 4))
    assert_close(losses_4, losses, 16 * 64 * 64)
    for a, b in zip(jax.tree.leaves(state_4.params), jax.tree.leaves(state.params), strict=True):
        assert_close(a, b, 16 * 64 * 64)


@pytest.mark.parametrize("road", ["jit", "shard_map"])
def test_averages_see_every_microbatch_by_its_count(road):
    """The averages of the first layer are those of the whole, partial batch, whatever the microbatches."""
    data = part_of_digits(38)
    (batch,) = training.batches(data, 64)
    stats = []
    for accumulate in (1, 2, 8):
        mesh, model, optimizer = mesh_of(4), training.CNN(widths=(8,)), optax.sgd(0.1)
        state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
        step = training.make_train_step(model, optimizer, mesh, road=road, accumulate=accumulate)
        stats.append(jax.device_get(step(state, training.shard_batch(batch, mesh))[0].batch_stats))
    for other in stats[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(stats[0]), strict=True):
            assert_close(a, b, 38 * 64)


def test_weight_decay_leaves_scale_and_bias_alone():
    mesh, model = mesh_of(1), training.CNN(widths=(8,))
    optimizer = training.make_optimizer("sgd", 1.0, weight_decay=0.5)
    state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
    zeros = jax.tree.map(np.zeros_like, state.params)
    updates, _ = optimizer.update(zeros, state.opt_state, state.params)
    for (path, update), parameter in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(state.params), strict=True
    ):
        expected = -0.5 * parameter if path[-1].key == "kernel" else 0 * parameter
        np.testing.assert_allclose(update, expected, atol=1e-7)


def test_bfloat16_keeps_parameters_and_averages_in_float32():
    mesh, optimizer = mesh_of(4), training.make_optimizer("sgd", 0.1)
    model = training.make_model("cnn", widths=(8,), dtype=jax.numpy.bfloat16)
    state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
    (batch,) = training.batches(part_of_digits(64), 64)
    step = training.make_train_step(model, optimizer, mesh)
    state, metrics = step(state, training.shard_batch(batch, mesh))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state.params, state.batch_stats)))
    assert np.isfinite(metrics["loss"])


def test_padding_of_the_last_batch_changes_nothing():
    """What the padded examples hold reaches neither the loss nor the running averages."""
    (batch,) = training.batches(part_of_digits(40), 64)
    mesh, model, optimizer = mesh_of(4), training.CNN(widths=(8,)), optax.sgd(0.1)
    step = training.make_train_step(model, optimizer, mesh)
    results = []
    for filler in (0.0, 1e3):
        image = np.where(batch["mask"][:, None, None, None], batch["image"], np.float32(filler))
        state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
        results.append(jax.device_get(step(state, training.shard_batch({**batch, "image": image}, mesh))))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", training.NORMS)
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "resnet50"])
def test_models(name, place, norm):
    """Every network with every normalization in either place, by shape."""
    if (name, norm) == ("mlp", "instance"):
        pytest.skip("there are no positions")
    model = training.make_model(name, norm=norm, place=place, num_classes=7)
    image = jax.ShapeDtypeStruct((2, 224 if name == "resnet50" else 32, 32, 3), np.float32)
    shape = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False), image)
    assert shape[0].shape == (2, 7)
    assert ("batch_stats" in shape[1]) == (norm == "batch")


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_resnets_have_the_known_number_of_parameters(name, parameters):
    """At 1000 classes, as counted for the networks of He et al."""
    model = training.make_model(name, num_classes=1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


# Recalibration -------------------------------------------------------------------------------------------------------


def test_recalibrated_statistics_are_those_of_the_data_set():
    """Of the first layer, against float64 statistics of its inputs over all images; nothing else changes."""
    mesh, model, optimizer = mesh_of(4), training.CNN(widths=(8, 8)), optax.sgd(0.1)
    data = part_of_digits()
    state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
    sharded = [training.shard_batch(b, mesh) for b in training.batches(data, 64)]
    new = training.recalibrate(training.make_moments_step(model, mesh), state, sharded)

    kernel = np.asarray(state.params["Conv_0"]["kernel"], np.float64)
    padded = np.pad(data.images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # n, h, w, channel, 3, 3
    inputs = np.einsum("nhwcij,ijcf->nhwf", windows, kernel)
    stats = new.batch_stats["Norm_0"]["BatchNorm_0"]
    assert_close(stats["mean"], inputs.mean((0, 1, 2)), inputs[..., 0].size, np.abs(inputs).max())
    assert_close(stats["var"], inputs.var((0, 1, 2)), inputs[..., 0].size)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, new.params, state.params)))
    assert new.step == state.step
    with pytest.raises(ValueError, match="at least one batch"):
        training.recalibrate(training.make_moments_step(model, mesh), state, [])


def test_recalibration_rescues_stale_averages():
    """Averages that hardly moved leave a trained network at chance; recalibration alone gives its proper accuracy."""
    mesh, model = mesh_of(4), training.CNN(widths=(32, 32), momentum=0.9999)
    optimizer = training.make_optimizer("adam", 0.01)
    train, test = training.load_digits()
    state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
    step, eval_step = training.make_train_step(model, optimizer, mesh), training.make_eval_step(model, mesh)
    for epoch in range(12):
        for batch in training.batches(train, 128, seed=epoch):
            state, _ = step(state, training.shard_batch(batch, mesh))

    def accuracy(state):
        data = (training.shard_batch(b, mesh) for b in training.batches(test, 128))
        return training.evaluate(eval_step, state, data)["accuracy"]

    stale = accuracy(state)
    data = (training.shard_batch(b, mesh) for b in training.batches(train, 128))
    proper = accuracy(training.recalibrate(training.make_moments_step(model, mesh), state, data))
    assert stale < 0.3
    assert proper > 0.95


# The command line ----------------------------------------------------------------------------------------------------


def command(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return {"args": [sys.executable, "-m", "jaxnorm.training", *map(str, arguments)], "env": environment}


def run_here(*arguments):
    return main([str(a) for a in arguments])


def test_command_line_from_end_to_end(tmp_path, capsys):
    arguments = ("--epochs", 8, "--seed", 1, "--out", tmp_path / "run")
    run_here(*arguments)
    printed = " ".join(capsys.readouterr().out.split())
    accuracy, devices = re.search(
        r"Test accuracy ([\d.]+) from the running averages, .* on (\d+) cpu", printed
    ).groups()
    assert float(accuracy) >= 0.97
    assert devices == "4"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 97))
    assert records[-1]["accuracy"] == pytest.approx(float(accuracy), abs=1e-4)
    assert (tmp_path / "run" / "training.png").read_bytes()[:4] == b"\x89PNG"
    # a run is not overwritten, nor continued with other settings
    for more, message in (
        ((), "holds a run already"),
        (("--resume", "--norm", "group"), r"--norm batch \(now group\)"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_here(*arguments, *more)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--devices", "0"],
        ["--epochs", "-1"],
        ["--batch-size", "130"],
        ["--seed", "x"],
        ["--norm", "power"],
        ["--model", "vgg"],
        ["--momentum", "1.5"],
        ["--data", "mnist"],
        ["--num-processes", "2"],
        ["--resume"],
        ["--norm", "instance", "--model", "mlp"],
        ["--invertible"],
    ],
)
def test_command_line_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: training.make_model("vgg"), "model must be one of mlp, cnn, .*'vgg'"),
        (lambda: training.make_model("cnn", norm="power"), "norm must be one of batch, .*'power'"),
        (lambda: training.make_model("cnn", place="around"), "place must be one of before, after; got 'around'"),
        (lambda: training.make_model("cnn", activation="swoosh"), "activation must be one of relu, .*'swoosh'"),
        (lambda: training.make_model("cnn", invertible=True), "invertible needs a norm and activation='leaky_relu'"),
        (lambda: training.make_optimizer("lion", 0.1), "name must be one of sgd, adam; got 'lion'"),
        (lambda: run(1, "highway"), "road must be one of jit, shard_map; got 'highway'"),
        (lambda: run(4, accumulate=5), "multiple of devices times microbatches, 4 x 5; got 64"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_divergence_says_what_to_do(tmp_path):
    settings = ("--epochs", 2, "--norm", "none", "--learning-rate", 1e20, "--devices", 1, "--out", tmp_path)
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf) at step \d+, .* lower --learning-rate"):
        run_here(*settings)


def test_checkpoints_keep_the_best_and_the_last(tmp_path):
    mesh, model, optimizer = mesh_of(2), training.CNN(widths=(8,)), training.make_optimizer("sgd", 0.1)
    state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last_step is None
    for step, accuracy in enumerate((0.5, 0.9, 0.7, 0.6), 1):
        checkpoints.save(state._replace(step=np.int32(step)), {"norm": "batch"}, {"accuracy": accuracy})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last_step == 4
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 4]
    assert checkpoints.settings() == {"norm": "batch"}
    restored = checkpoints.restore(state)
    assert restored.step == 4
    for a, b in zip(jax.tree.leaves(restored)[1:], jax.tree.leaves(state)[1:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, monkeypatch):
    """One attempt of benchmarks/kill_and_resume.py."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from kill_and_resume import kill_and_resume

    assert len(kill_and_resume(1, 5, tmp_path)) == 1


# Several processes ---------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(out, *arguments, count=2):
    address = f"127.0.0.1:{free_port()}"
    hosts = ("--coordinator", address, "--num-processes", count, "--devices", 2, "--out", out)
    return [
        subprocess.Popen(
            **command(*arguments, *hosts, "--process-id", i),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def losses_in(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.array([r["loss"] for r in records if r["kind"] == "train"], np.float32)


def averages_in(out):
    last = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    path = (out / "checkpoints" / str(last) / "state").absolute()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        written = checkpointer.metadata(path).item_metadata.tree
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), written)
        return jax.device_get(checkpointer.restore(path, like)["batch_stats"])


@pytest.mark.parametrize("road", ["jit", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_two_processes_of_two_devices(tmp_path, road):
    """Losses and averages of one process with one device, over 24 steps, two of them on partial batches."""
    arguments = ("--epochs", 2, "--learning-rate", 0.02, "--road", road)
    running = processes(tmp_path / "two", *arguments)
    printed = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    run_here(*arguments, "--devices", 1, "--out", tmp_path / "one")
    assert_close(losses_in(tmp_path / "two"), losses_in(tmp_path / "one"), 24**2 * 64 * 64)
    two, one = (averages_in(tmp_path / name) for name in ("two", "one"))
    assert len(jax.tree.leaves(one)) == 6
    jax.tree.map(lambda a, b: assert_close(a, b, 24**2 * 64 * 64), two, one)


@pytest.mark.slow
def test_a_peer_that_dies_is_an_error_not_a_hang(tmp_path):
    survivor, victim = processes(tmp_path / "two", "--epochs", 100000)
    metrics = tmp_path / "two" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        if survivor.poll() is not None:
            pytest.fail(survivor.communicate()[0])
    victim.kill()
    victim.communicate()
    printed, _ = survivor.communicate(timeout=60)
    assert survivor.returncode != 0
    assert printed
