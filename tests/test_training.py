"""The training loop: batches, steps on meshes, and the command line from end to end."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from checks import assert_close
from jax.sharding import AxisType

from jaxnorm import training
from jaxnorm.training.__main__ import parse


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def test_batches_hold_every_example_once():
    train, test = training.load_digits()
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    seen = [b["image"][b["mask"]] for b in training.batches(train, 128, seed=3)]
    assert {len(b["image"]) for b in training.batches(train, 128, seed=3)} == {128}
    assert sorted(map(bytes, np.concatenate(seen))) == sorted(map(bytes, train.images))
    again = [b["image"][b["mask"]] for b in training.batches(train, 128, seed=3)]
    np.testing.assert_array_equal(np.concatenate(seen), np.concatenate(again))
    assert (np.concatenate(seen) != train.images).any()


def run(devices, steps=4):
    train, _ = training.load_digits()
    train = training.Split(train.images[:230], train.labels[:230])  # the last batch holds 38 of 64
    mesh, model, optimizer = mesh_of(devices), training.CNN(widths=(8, 8)), optax.sgd(0.1, momentum=0.9)
    state = training.init_state(model, optimizer, train.images.shape[1:], seed=0, mesh=mesh)
    step = training.make_train_step(model, optimizer, mesh)
    losses = []
    for batch in list(training.batches(train, 64, seed=1))[:steps]:
        state, metrics = step(state, batch)
        losses.append(metrics["loss"] / metrics["count"])
    return jax.device_get((losses, state))


def test_one_device_and_four_agree():
    """Losses and running averages after steps on batches of which the last is partial."""
    (losses, state), (losses_4, state_4) = run(1), run(4)
    assert_close(np.array(losses_4), np.array(losses), 64 * 64)
    leaves, leaves_4 = jax.tree.leaves(state.batch_stats), jax.tree.leaves(state_4.batch_stats)
    for a, b in zip(leaves_4, leaves, strict=True):
        assert_close(a, b, 64 * 64)
    assert state_4.step == 4


def test_padding_of_the_last_batch_changes_nothing():
    """What the padded examples hold reaches neither the loss nor the running averages."""
    train, _ = training.load_digits()
    (batch,) = training.batches(training.Split(train.images[:40], train.labels[:40]), 64)
    mesh, model, optimizer = mesh_of(4), training.CNN(widths=(8,)), optax.sgd(0.1)
    step = training.make_train_step(model, optimizer, mesh)
    results = []
    for filler in (0.0, 1e3):
        image = np.where(batch["mask"][:, None, None, None], batch["image"], np.float32(filler))
        state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
        results.append(jax.device_get(step(state, {**batch, "image": image})))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_command_line_from_end_to_end():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "jaxnorm.training", "--epochs", "8", "--seed", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    printed = " ".join(run.stdout.split())
    accuracy, devices = re.search(
        r"Test accuracy ([\d.]+) from the running averages, .* on (\d+) cpu", printed
    ).groups()
    assert float(accuracy) >= 0.97
    assert devices == "4"


@pytest.mark.parametrize(
    "arguments", [["--devices", "0"], ["--epochs", "-1"], ["--batch-size", "130"], ["--seed", "x"], ["--optimizer"]]
)
def test_command_line_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err
