from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh
from networks import NNXResNet, images, linen_network, nnx_module
from test_surgery_freeze import LIFTED, equal, network

from jaxnorm import linen, surgery
from jaxnorm import nnx as jaxnorm_nnx


class Two(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        x = self.norm(use_running_average=not train, name="a")(nn.Dense(4, name="one")(x))
        return self.norm(use_running_average=not train, name="b")(nn.Dense(3, name="two")(nn.relu(x)))


def float64_stats(variables, data, settle):
    """By NumPy in float64: the moments of the data set at each norm, those before settled or of each batch."""
    p = jax.tree.map(partial(np.asarray, dtype=np.float64), variables["params"])
    first = [np.asarray(x, np.float64) @ p["one"]["kernel"] + p["one"]["bias"] for x in data]
    every = np.concatenate(first)

    def below(x):
        own = every if settle else x
        y = (x - own.mean(0)) / np.sqrt(own.var(0) + 1e-5) * p["a"]["scale"] + p["a"]["bias"]
        return np.maximum(y, 0) @ p["two"]["kernel"] + p["two"]["bias"]

    second = np.concatenate([below(x) for x in first])
    return {name: {"mean": x.mean(0), "var": x.var(0)} for name, x in (("a", every), ("b", second))}


class NNXTwo(nnx.Module):
    """The same, with names in another order than that of the calls."""

    def __init__(self, rngs):
        self.d, self.c = nnx.Linear(5, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.b, self.a = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.a(self.b(nnx.relu(self.c(self.d(x)))))


@pytest.mark.parametrize("norm", [nn.BatchNorm, linen.BatchNorm], ids=["flax", "jaxnorm"])
@pytest.mark.parametrize("layer_by_layer", [False, True], ids=["one_pass", "layer_by_layer"])
def test_averages_are_those_of_the_data_set(layer_by_layer, norm, rng):
    data = [jnp.asarray(rng.normal(1, 2, (n, 5)), jnp.float32) for n in (8, 8, 4)]  # the last weighs half
    model = Two(norm)
    _, variables = linen_network(model, rng, data[0])
    new = surgery.recalibrate(model, variables, data, layer_by_layer=layer_by_layer)
    for name, stats in float64_stats(variables, data, layer_by_layer).items():
        assert_close(new["batch_stats"][name]["mean"], stats["mean"], 20, magnitude=2.0, what=name)
        assert_close(new["batch_stats"][name]["var"], stats["var"], 20, what=name)
    equal(new["params"], variables["params"])


def test_layer_by_layer_in_nnx(rng):
    data = [jnp.asarray(rng.normal(1, 2, (n, 5)), jnp.float32) for n in (8, 4)]
    model = nnx_module(NNXTwo, rng)
    state = nnx.to_pure_dict(nnx.state(model))
    params = {"one": state["d"], "a": state["c"], "two": state["b"], "b": state["a"]}
    new = surgery.recalibrate(model, None, data, layer_by_layer=True)
    expected = float64_stats({"params": params}, data, True)
    assert_close(new["c"]["var"][...], expected["a"]["var"], 12)
    assert_close(new["a"]["var"][...], expected["b"]["var"], 12)
    assert_close(new["a"]["mean"][...], expected["b"]["mean"], 12, magnitude=2.0)


def test_networks_on_a_mesh_and_nnx(rng):
    """The same averages from one device, from eight, and from the same network in NNX."""
    data = [images(rng, batch=8) for _ in range(2)]
    model = nnx_module(partial(NNXResNet, jaxnorm_nnx.BatchNorm, depths=(1,)), rng)
    state = surgery.recalibrate(model, None, data)
    mesh = Mesh(np.array(jax.devices()[:8]), "data")
    sharded = surgery.recalibrate(model, None, data, mesh=mesh)
    jax.tree.map(lambda a, b: assert_close(a, b, 512, magnitude=1.0), sharded, state)

    stem = jax.lax.conv(
        *(
            a.transpose(p)
            for a, p in ((jnp.concatenate(data), (0, 3, 1, 2)), (model.stem.conv.kernel[...], (3, 2, 0, 1)))
        ),
        (1, 1),
        "SAME",
    )
    assert_close(state["stem"]["norm"]["mean"][...], stem.mean((0, 2, 3)), 512, magnitude=1.0)
    before = model.stem.norm.mean[...]
    nnx.update(model, state)
    assert (before != model.stem.norm.mean[...]).all()


@pytest.mark.parametrize("lifted", LIFTED)
def test_lifted_bodies(lifted, rng):
    """After recalibration on one batch, evaluation is what training was."""
    model, variables, x = network(lifted, rng)
    new = surgery.recalibrate(model, variables, [x])
    trained = model.apply(variables, x, mutable="batch_stats")[0][0]
    tested = LIFTED[lifted](train=False).apply(new, x)[0]
    assert_close(tested, trained, 5 * 3, magnitude=float(abs(trained).max()) * 4)


def test_adaptation_weighs_examples(rng):
    x = jnp.asarray(rng.normal(1, 2, (6, 5)), jnp.float32)
    model = Two()
    _, variables = linen_network(model, rng, x)
    stats = float64_stats(variables, [x], False)["a"]
    old = variables["batch_stats"]["a"]
    for weight in (0.0, 2.0):
        new = surgery.adapt(model, variables, [x], source_weight=weight)["batch_stats"]["a"]
        for name in ("mean", "var"):
            expected = (weight * np.asarray(old[name], np.float64) + 6 * stats[name]) / (weight + 6)
            assert_close(new[name], expected, 6, magnitude=2.0)
    network = nnx_module(partial(NNXResNet, depths=(1,)), rng)
    batch = images(rng)
    adapted, exact = surgery.adapt(network, None, [batch], source_weight=2), surgery.recalibrate(network, None, [batch])
    jax.tree.map(lambda a, e, o: assert_close(a, (e + o) / 2, magnitude=1.0), adapted, exact, nnx.state(network))


def test_under_jit(rng):
    data = [jnp.asarray(rng.normal(1, 2, (n, 5)), jnp.float32) for n in (8, 4)]
    model = Two()
    _, variables = linen_network(model, rng, data[0])
    for call in (surgery.recalibrate, surgery.adapt, partial(surgery.recalibrate, layer_by_layer=True)):
        expected, found = (run(variables, data) for run in (partial(call, model), jax.jit(partial(call, model))))
        jax.tree.map(lambda a, b: assert_close(a, b, 20, magnitude=2.0), found, expected)


def test_cumulative_averages_get_their_count(rng):
    x = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    model = linen.BatchNorm(use_running_average=True, momentum=None)
    variables = model.init(jax.random.key(0), x)
    variables = surgery.recalibrate(model, variables, [x, x])
    assert variables["batch_stats"]["count"].tolist() == [12.0] * 5
    assert surgery.adapt(model, variables, [x])["batch_stats"]["count"].tolist() == [12.0] * 5  # of the training data


@pytest.mark.parametrize("norm", [nn.BatchNorm, linen.BatchNorm, nnx.BatchNorm, jaxnorm_nnx.BatchNorm])
def test_what_is_masked_does_not_count(norm, rng):
    x, mask = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), np.arange(6).reshape(6, 1) < 4
    if issubclass(norm, nn.Module):
        model = norm(use_running_average=True)
        variables = model.init(jax.random.key(0), x)
        stats = surgery.recalibrate(model, variables, [x], mask=mask)["batch_stats"]
    else:
        stats = nnx.to_pure_dict(surgery.recalibrate(norm(5, rngs=nnx.Rngs(0)), None, [x], mask=mask))
    kept = np.asarray(x, float)[:4]
    assert_close(stats["mean"], kept.mean(0), 4, magnitude=1.0)
    assert_close(stats["var"], kept.var(0), 4)


def test_errors(rng):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="recalibrate: data must hold at least one batch; got none"):
        surgery.recalibrate(Two(), Two().init(jax.random.key(0), x), [])
    with pytest.raises(ValueError, match="adapt: the model must have at least one batch norm; found none"):
        surgery.adapt(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), x), [x])
    with pytest.raises(TypeError, match="must be a Linen or an NNX module; got dict"):
        surgery.recalibrate({}, {}, [x])
    with pytest.raises(ValueError, match=r"source_weight must not be negative; got -1\."):
        surgery.adapt(Two(), {}, [x], source_weight=-1)
