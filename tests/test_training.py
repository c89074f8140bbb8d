"""What the training program is made of: optimizers, steps with both kinds of parallelism, networks, recalibration."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

from jaxnorm import Moments, training
from jaxnorm.linen import BatchNorm
from jaxnorm.training import _models
from jaxnorm.training._functions import averaged

STEPS, PARALLELISM = 12, ("jit", "shard_map")


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def part_of_digits(count=230):
    """Of which a last batch of 64 holds 38."""
    train, _ = training.load_digits()
    return training.Split(train.images[:count], train.labels[:count])


def run(model, devices, parallelism="jit", accumulate=1, optimizer=None, steps=STEPS):
    """Losses, and the state after some steps."""
    mesh = mesh_of(devices)
    optimizer = optimizer or training.make_optimizer("sgd", 0.02, weight_decay=1e-3)
    data = part_of_digits()
    state = training.init_state(model, optimizer, data.images.shape[1:], seed=0, mesh=mesh)
    step = training.make_train_step(model, optimizer, mesh, parallelism=parallelism, accumulate=accumulate)
    losses = []
    while len(losses) < steps:
        for batch in training.batches(data, 64, seed=len(losses)):
            state, metrics = step(state, training.shard_batch(batch, mesh))
            losses.append(metrics["loss"] / metrics["count"])
    return jax.device_get((np.array(losses), state))


@pytest.fixture(scope="module")
def one_device():
    return run(training.CNN(widths=(8, 8)), 1)


@pytest.mark.parametrize("parallelism", ["jit", "shard_map"])
def test_one_device_and_four_agree(one_device, parallelism):
    """Losses and running averages after twelve steps, every fourth of them on a partial batch."""
    losses, state = one_device
    losses_4, state_4 = run(training.CNN(widths=(8, 8)), 4, parallelism)
    # each step adds the rounding of its sums, over 64 images of 64 pixels at the most, to what it was given
    size = STEPS**2 * 64 * 64
    assert_close(losses_4, losses, size)
    for a, b in zip(jax.tree.leaves(state_4), jax.tree.leaves(state), strict=True):
        assert_close(np.asarray(a, np.float32), np.asarray(b, np.float32), size)
    assert state_4.step == STEPS


class EveryNorm(_models.CNN):
    """A convolution before every normalization, one after the other."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        for kind in training.NORMS:
            axis = {"axis_name": self.axis_name, "momentum": self.momentum, "dtype": self.dtype}
            norm = _models.Norm(kind=kind, activation="relu", invertible=False, **axis)
            x = norm(self.conv(x, 8, 3), train, mask)
        return self.logits(x.mean((1, 2)))


@pytest.mark.slow
def test_both_kinds_of_parallelism_agree_for_every_norm():
    (losses, state), (losses_by_hand, state_by_hand) = (
        run(EveryNorm(), 4, parallelism, steps=4) for parallelism in PARALLELISM
    )
    assert_close(losses_by_hand, losses, 16 * 64 * 64)
    jax.tree.map(lambda a, b: assert_close(a, b, 16 * 64 * 64), state_by_hand.batch_stats, state.batch_stats)


@pytest.mark.slow
def test_invertible_training_is_the_same_training():
    model = training.CNN(widths=(8, 8), activation="leaky_relu")
    losses, state = run(model.clone(invertible=True), 4, "shard_map", steps=5)
    expected, expected_state = run(model, 4, steps=5)
    assert_close(losses, expected, 5**2 * 64 * 64)
    for a, b in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(expected_state.batch_stats), strict=True):
        assert_close(a, b, 5**2 * 64 * 64)


@pytest.mark.slow
def test_accumulation_without_batch_statistics_is_one_large_batch():
    (losses, state), (losses_4, state_4) = (
        run(training.CNN(widths=(8, 8), norm="group"), 2, accumulate=a, steps=4) for a in (1, 4)
    )
    assert_close(losses_4, losses, 16 * 64 * 64)
    for a, b in zip(jax.tree.leaves(state_4.params), jax.tree.leaves(state.params), strict=True):
        assert_close(a, b, 16 * 64 * 64)


@pytest.mark.parametrize("parallelism", ["jit", "shard_map"])
def test_averages_see_every_microbatch_by_its_count(parallelism):
    """The averages of the first layer are those of the whole, partial batch, whatever the microbatches."""
    data = part_of_digits(38)
    (batch,) = training.batches(data, 64)
    stats = []
    for accumulate in (1, 8):
        mesh, model, optimizer = mesh_of(4), training.CNN(widths=(8,)), optax.sgd(0.1)
        state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
        step = training.make_train_step(model, optimizer, mesh, parallelism=parallelism, accumulate=accumulate)
        stats.append(jax.device_get(step(state, training.shard_batch(batch, mesh))[0].batch_stats))
    for other in stats[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(stats[0]), strict=True):
            assert_close(a, b, 38 * 64)


def test_averages_are_those_of_momentum():
    old = {"a": {"mean": jnp.array([1.0]), "var": jnp.array([2.0])}}
    measured = {"a": Moments(jnp.array([3.0]), jnp.array([4.0]), jnp.array([8.0]))}
    new = averaged(old, measured, lambda path: 0.75)
    assert jax.tree.map(float, jax.tree.map(jnp.squeeze, new)) == {"a": {"mean": 1.5, "var": 2.5}}


def test_sgd_is_that_of_nesterov():
    """Two steps by hand: v <- g + 0.9 v, and the step is g + 0.9 v (Sutskever et al., 2013)."""
    optimizer = training.make_optimizer("sgd", 0.5)
    state = optimizer.init(jnp.zeros(()))
    first, state = optimizer.update(jnp.float32(1), state, jnp.zeros(()))
    second, _ = optimizer.update(jnp.float32(2), state, jnp.zeros(()))
    np.testing.assert_allclose([first, second], [-0.5 * 1.9, -0.5 * (2 + 0.9 * 2.9)], rtol=1e-6)


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
    chex.assert_tree_all_finite((state, metrics))


@pytest.mark.parametrize("parallelism", PARALLELISM)
def test_a_step_is_traced_once(parallelism):
    """Whatever the batches hold: eight of them, of which the fourth and the eighth are partial."""
    chex.clear_trace_counter()
    optimizer = optax.sgd(0.02)
    optimizer = optimizer._replace(update=chex.assert_max_traces(optimizer.update, n=1))
    run(training.CNN(widths=(8,)), 4, parallelism, optimizer=optimizer, steps=8)


def test_logits_have_one_axis_more_than_labels():
    mesh, optimizer = mesh_of(1), optax.sgd(0.1)

    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x, train, mask=None):
            return training.MLP(widths=(8,))(x, train=train, mask=mask)[:, None]

    state = training.init_state(Stacked(), optimizer, (8, 8, 1), seed=0, mesh=mesh)
    (batch,) = training.batches(part_of_digits(64), 64)
    with pytest.raises(AssertionError, match=r"has rank 3 \(shape \(64, 1, 10\)\) but expected 2"):
        training.make_train_step(Stacked(), optimizer, mesh)(state, training.shard_batch(batch, mesh))


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


def norm_of(kind, x):
    norm = _models.Norm(kind, 0.9, jnp.float32, None, None, False)
    variables = norm.init(jax.random.key(0), x, False, None)
    return norm.apply(variables, x, True, None, mutable=["batch_stats"])[0]


@pytest.mark.parametrize("kind", training.NORMS[:-1])
def test_what_each_norm_shares_its_statistics_over(kind, rng):
    """On 12 channels: groups are of 2 (the greatest common divisor of 32 and 6), layer and RMS over the example."""
    x = rng.normal(1, 2, (3, 4, 5, 12)).astype(np.float32)
    grouped = x.astype(np.float64).reshape(3, 4, 5, 2, 6) if kind == "group" else x.astype(np.float64)
    axes = {"batch": (0, 1, 2), "layer": (1, 2, 3), "rms": (1, 2, 3), "group": (1, 2, 4), "instance": (1, 2)}[kind]
    mean = 0 if kind == "rms" else grouped.mean(axes, keepdims=True)
    var = np.square(grouped - mean).mean(axes, keepdims=True)
    expected = (grouped - mean) / np.sqrt(var + (1e-5 if kind == "batch" else 1e-6))
    assert_close(norm_of(kind, jnp.asarray(x)), expected.reshape(x.shape), 240)


def inputs_of(model, x, kind):
    """What the layers of a kind are called with."""
    seen = []

    def note(call, arguments, settings, context):
        if isinstance(context.module, kind) and context.method_name == "__call__":
            seen.append(arguments[0])
        return call(*arguments, **settings)

    with nn.intercept_methods(note):
        model.init(jax.random.key(0), x, train=False)
    return seen


def test_place_is_before_or_after_the_activation(rng):
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)
    for place, positive in (("before", False), ("after", True)):
        model = training.make_model("mlp", place=place, widths=(8,))
        assert [bool((a >= 0).all()) for a in inputs_of(model, x, _models.Norm)] == [positive]


@pytest.mark.parametrize("bottleneck", [False, True])
def test_residual_blocks_end_with_the_activation(rng, bottleneck):
    """The last layer is given means of ReLU's outputs, some of them zero in every place."""
    x = jnp.asarray(rng.normal(size=(1, 8, 8, 3)), jnp.float32)
    model = training.ResNet(depths=(1,), bottleneck=bottleneck)
    blocks = inputs_of(model, x, nn.Dense) + inputs_of(model, x, nn.Conv)[2:]
    assert all((a >= 0).all() for a in blocks)
    assert len(blocks) >= 2


# Recalibration -------------------------------------------------------------------------------------------------------


def test_recalibrated_statistics_are_those_of_the_data_set():
    """Of the first layer, against float64 statistics of its inputs over all images; nothing else changes."""
    mesh, model, optimizer = mesh_of(4), training.CNN(widths=(8, 8)), optax.sgd(0.1)
    data = part_of_digits()
    state = training.init_state(model, optimizer, (8, 8, 1), seed=0, mesh=mesh)
    sharded = [training.shard_batch(b, mesh) for b in training.batches(data, 64)]
    new = training.recalibrate(training.make_measure_step(model, mesh), state, sharded)

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
        training.recalibrate(training.make_measure_step(model, mesh), state, [])


@pytest.mark.slow
def test_recalibration_rescues_stale_averages():
    """Averages that hardly moved leave a trained network at chance; recalibration alone gives its proper accuracy."""
    mesh, model = mesh_of(4), training.CNN(widths=(16, 16), momentum=0.9999)
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
    proper = accuracy(training.recalibrate(training.make_measure_step(model, mesh), state, data))
    assert stale < 0.3
    assert proper > 0.95


@pytest.fixture(scope="module")
def small():
    """A network of two layers, its state and its measuring step, on one device."""
    mesh, model = mesh_of(1), training.MLP(widths=(4, 4))
    state = training.init_state(model, optax.sgd(0.1), (8, 8, 1), seed=0, mesh=mesh)
    return mesh, state, training.make_measure_step(model, mesh)


def recalibrated(small, data, state=None):
    mesh, state_, step = small
    return training.recalibrate(step, state or state_, [training.shard_batch(b, mesh) for b in data])


def test_recalibration_leaves_out_what_is_not_finite_and_says_so(small):
    """One image with a NaN and one with an infinity among 64: the statistics of the other 62."""
    data = part_of_digits(128)
    broken = training.Split(data.images.copy(), data.labels)
    broken.images[5, 2, 3], broken.images[100, 0, 0] = np.nan, np.inf
    with pytest.warns(UserWarning, match="2 of 128 examples hold values that are not finite; they were left out"):
        actual = recalibrated(small, training.batches(broken, 64))
    kept = np.delete(np.arange(128), [5, 100])
    expected = recalibrated(small, training.batches(training.Split(data.images[kept], data.labels[kept]), 126))
    # the second layer sees batches of the first: only the first is the same whatever the batches
    first = (state.batch_stats["Norm_0"]["BatchNorm_0"] for state in (actual, expected))
    jax.tree.map(lambda a, b: assert_close(a, b, 126 * 64), *first)


def test_recalibration_repairs_averages_that_are_not_finite(small):
    _, state, _ = small
    batches = list(training.batches(part_of_digits(64), 64))
    poisoned = state._replace(batch_stats=jax.tree.map(lambda a: a * np.nan, state.batch_stats))
    actual, expected = (recalibrated(small, batches, s) for s in (poisoned, state))
    chex.assert_trees_all_equal(actual.batch_stats, expected.batch_stats)


def test_recalibration_refuses_what_it_cannot_measure(small):
    _, state, _ = small
    data = part_of_digits(64)
    nothing = training.Split(data.images * np.nan, data.labels)
    with pytest.raises(ValueError, match=r"64 of 64 examples .*nothing to measure"):
        recalibrated(small, training.batches(nothing, 64))
    huge = state._replace(params=jax.tree.map(lambda a: a * 1e38, state.params))
    with pytest.raises(ValueError, match="check the parameters; those of 2 batches are not"):
        recalibrated(small, training.batches(data, 32), huge)
    with pytest.raises(ValueError, match="at least one batch"):
        training.evaluate(lambda state, batch: {}, state, [])


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: training.make_model("vgg"), "model must be one of mlp, cnn, .*'vgg'"),
        (lambda: training.make_model("cnn", norm="power"), "norm must be one of batch, .*'power'"),
        (lambda: training.make_model("cnn", place="around"), "place must be one of before, after; got 'around'"),
        (lambda: training.make_model("cnn", activation="swoosh"), "activation must be one of relu, .*'swoosh'"),
        (lambda: training.make_model("cnn", invertible=True), "invertible needs a norm and activation='leaky_relu'"),
        (lambda: training.make_optimizer("lion", 0.1), "name must be one of sgd, adam; got 'lion'"),
        (lambda: run(training.CNN(), 1, "highway"), "parallelism must be one of jit, shard_map; got 'highway'"),
        (lambda: run(training.CNN(), 4, accumulate=5), "multiple of devices times microbatches, 4 x 5; got 64"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Foreign(nn.Module):
    """Whose batch normalization knows no ``momentum`` of the network."""

    layer: type[nn.Module]

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        return nn.Dense(10)(self.layer(use_running_average=not train)(x.mean((1, 2))))


class ForeignNNX(nnx.Module):
    def __init__(self):
        self.norm, self.dense = nnx.BatchNorm(1, rngs=nnx.Rngs(0)), nnx.Linear(1, 10, rngs=nnx.Rngs(0))

    def __call__(self, x, *, mask=None):
        return self.dense(self.norm(x.mean((1, 2))))


@pytest.mark.parametrize("make", [lambda: Foreign(nn.BatchNorm), lambda: Foreign(BatchNorm), ForeignNNX])
def test_networks_whose_averages_cannot_be_kept_are_refused(make):
    with pytest.raises(ValueError, match="batch normalizations of the network must be those of jaxnorm"):
        run(make(), 1, steps=1, accumulate=2)


def test_layers_of_flax_train_where_no_moments_are_needed():
    losses, _ = run(ForeignNNX(), 2, steps=2)
    assert np.isfinite(losses).all()


def test_networks_without_batch_normalization_need_no_momentum():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            return nn.Dense(10)(x.mean((1, 2)))

    losses, state = run(Plain(), 2, steps=2)
    assert np.isfinite(losses).all()
    assert state.batch_stats == {}
