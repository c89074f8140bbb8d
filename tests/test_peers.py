"""What other libraries do with the same input: the rows of docs/comparison.md.

A test that fails here after an upgrade of one of them says that the page is out of date, not that the package is wrong.
"""

import inspect
import os
import re
from types import SimpleNamespace

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_contexts
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

pytestmark = pytest.mark.any_version

os.environ.setdefault("KERAS_BACKEND", "jax")


# One training step of batch normalization: x -> (y, running mean and variance) ----------------------------------------


def ours(x):
    y, batch = jaxnorm.batch_norm(x)
    return y, jaxnorm.update_running(jaxnorm.init_running(x.shape[-1]), batch, alpha=0.01)[:2]


def linen(x, **settings):
    layer = flax.linen.BatchNorm(use_running_average=False, epsilon=1e-5, **settings)
    variables = layer.init(jax.random.key(0), jnp.ones((2, x.shape[-1])))
    y, updates = layer.apply(variables, x, mutable="batch_stats")
    return y, (updates["batch_stats"]["mean"], updates["batch_stats"]["var"])


def flax_nnx(x):
    layer = nnx.BatchNorm(x.shape[-1], epsilon=1e-5, rngs=nnx.Rngs(0))
    y = layer(x)
    return y, (layer.mean[...], layer.var[...])


def haiku(x):
    hk = pytest.importorskip("haiku")
    function = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.99, eps=1e-5)(x, True))
    parameters, state = function.init(None, jnp.ones((2, x.shape[-1])))
    y, state = function.apply(parameters, state, None, x)
    return y, [state[f"batch_norm/~/{name}_ema"]["average"] for name in ("mean", "var")]


def equinox(x):
    eqx = pytest.importorskip("equinox")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(x.shape[-1], axis_name="batch", mode="ema")
    mapped = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    with jax.numpy_rank_promotion("allow"):
        y, state = mapped(x, state)
    return y, state.get(layer.ema_state_index)


def keras(x):
    layer = pytest.importorskip("keras").layers.BatchNormalization(epsilon=1e-5)
    with jax.numpy_rank_promotion("allow"):
        y = layer(x, training=True)
    return y, (layer.moving_mean.value, layer.moving_variance.value)


def torch(x):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(x.shape[-1])
    y = layer(torch.tensor(x)).detach().numpy()
    return y, (layer.running_mean.numpy(), layer.running_var.numpy())


BATCH_NORMS = {
    "jaxnorm": ours,
    "flax.linen": linen,
    "flax.linen, use_fast_variance=False": lambda x: linen(x, use_fast_variance=False),
    "flax.nnx": flax_nnx,
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
    "torch": torch,
}


# Statistics ----------------------------------------------------------------------------------------------------------

LOST, ROUNDED_MEAN, EXACT = "lost", "rounded mean", "exact"
FAR = {
    "jaxnorm": EXACT,
    "flax.linen": LOST,
    "flax.linen, use_fast_variance=False": ROUNDED_MEAN,
    "flax.nnx": LOST,
    "haiku": LOST,
    "equinox": ROUNDED_MEAN,
    "keras": ROUNDED_MEAN,
    "torch": ROUNDED_MEAN,
}


def check_far(y, expected, kind):
    """Whether all digits are lost, those that a mean stored in float32 has not, or a few roundings."""
    error = np.abs(np.asarray(y) - expected).max()
    if kind == LOST:
        assert not error < 1
    elif kind == ROUNDED_MEAN:
        assert 2.0**-24 * 1e4 / 4 < error < 0.03
    else:
        assert error < 2e-6


def draw(rng, mean, axis):
    """float32 N(mean, 1), and what is right."""
    x = (rng.standard_normal((4096, 8) if axis == 0 else (64, 512)) + mean).astype(np.float32)
    exact = x.astype(np.float64)
    mean, var = exact.mean(axis, keepdims=True), exact.var(axis, keepdims=True)
    return x, (exact - mean) / np.sqrt(var + 1e-5)


@pytest.mark.parametrize("name", FAR)
def test_batch_norm_at_a_mean_of_1e4(rng, name):
    x, expected = draw(rng, 1e4, 0)
    check_far(BATCH_NORMS[name](x)[0], expected, FAR[name])


@pytest.mark.parametrize("name", FAR)
def test_batch_norm_at_a_mean_of_zero(rng, name):
    x, expected = draw(rng, 0, 0)
    assert np.abs(np.asarray(BATCH_NORMS[name](x)[0]) - expected).max() < 5e-6


def import_tokamax(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tests"])  # which it parses
    return pytest.importorskip("tokamax")


def tokamax_layer_norm(x, monkeypatch):
    with jax.numpy_rank_promotion("allow"):
        return import_tokamax(monkeypatch).layer_norm(x, None, None, epsilon=1e-5)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x, _: jaxnorm.layer_norm(x, epsilon=1e-5), EXACT),
        (lambda x, _: flax.linen.LayerNorm(epsilon=1e-5).init_with_output(jax.random.key(0), x)[0], LOST),
        (tokamax_layer_norm, ROUNDED_MEAN),
    ],
    ids=["jaxnorm", "flax.linen", "tokamax"],
)
def test_layer_norm_at_a_mean_of_1e4(rng, monkeypatch, function, kind):
    x, expected = draw(rng, 1e4, -1)
    check_far(function(x, monkeypatch), expected, kind)


# Running averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BATCH_NORMS if "=" not in name])
def test_a_nan_in_a_batch(rng, name):
    """It stays in the running averages, for ever: whatever is averaged with NaN is NaN. In ours it never arrives."""
    x = rng.standard_normal((16, 3)).astype(np.float32)
    x[0, 0] = np.nan
    averages = np.stack([np.ravel(a) for a in BATCH_NORMS[name](x)[1]])
    assert np.isfinite(averages).all() == (name == "jaxnorm")


@pytest.mark.parametrize("name", [name for name in BATCH_NORMS if "=" not in name])
def test_an_empty_batch(name):
    averages = np.stack([np.ravel(a) for a in BATCH_NORMS[name](np.zeros((0, 3), np.float32))[1]])
    assert np.isfinite(averages).all() == (name in ("jaxnorm", "torch"))


def test_flax_casts_the_running_variance_to_half_precision():
    """Ours does not: tests/test_layers.py::test_nnx_half_precision_keeps_the_running_variance."""
    layer = nnx.BatchNorm(8, use_running_average=True, dtype=jnp.float16, rngs=nnx.Rngs(0))
    layer.var[...] = jnp.full(8, 1e5)
    np.testing.assert_array_equal(layer(jnp.full((2, 8), 1000, jnp.float16)), 0)


# Masks and replicas --------------------------------------------------------------------------------------------------


def test_masks_that_leave_replicas_unequal_counts(rng):
    """Flax averages the means of the replicas; ours is the mean of the values."""
    x = (rng.standard_normal((4, 8, 1)) + np.arange(4).reshape(4, 1, 1)).astype(np.float32)
    mask = (np.arange(8) < np.array([8, 4, 2, 1]).reshape(4, 1))[..., None]

    def mean_of(module):
        layer = module.BatchNorm(use_running_average=False, momentum=0.0, axis_name="r")
        variables = module.BatchNorm(use_running_average=False).init(jax.random.key(0), x[0])

        def step(x, mask):
            return layer.apply(variables, x, mask=mask, mutable="batch_stats")[1]["batch_stats"]["mean"]

        return float(jax.vmap(step, axis_name="r")(x, mask)[0, 0])

    of_means = np.mean([part[valid].mean() for part, valid in zip(x, mask, strict=True)])
    np.testing.assert_allclose(mean_of(jaxnorm.linen), x[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(mean_of(flax.linen), of_means, rtol=1e-6)
    assert of_means > 1.5 * x[mask].mean()


def parameters_of(function):
    return inspect.signature(function).parameters


def test_who_takes_masks():
    for module in (flax.linen, nnx, jaxnorm.linen, jaxnorm.nnx):
        for name in ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm"):
            assert "mask" in parameters_of(getattr(module, name).__call__)
    hk, eqx = pytest.importorskip("haiku"), pytest.importorskip("equinox")
    for layer in (hk.BatchNorm, hk.LayerNorm, hk.GroupNorm, eqx.nn.BatchNorm, eqx.nn.LayerNorm, eqx.nn.GroupNorm):
        assert "mask" not in parameters_of(layer.__call__)


def test_keras_masks_batch_norm_only():
    layers = pytest.importorskip("keras").layers
    assert "mask" in parameters_of(layers.BatchNormalization.call)
    assert "mask" not in parameters_of(layers.LayerNormalization.call)
    assert "mask" not in parameters_of(layers.GroupNormalization.call)


def test_torch_takes_no_masks():
    torch = pytest.importorskip("torch")
    for layer in (torch.nn.BatchNorm1d, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.SyncBatchNorm):
        assert list(parameters_of(layer.forward)) == ["self", "input"]


GROUPS = [[0, 3], [1, 2]]


def test_groups_of_replicas(rng):
    """Flax's need a shard_map that is not checked; ours: tests/test_transformations.py::test_groups_of_replicas."""
    x = rng.standard_normal((4, 6, 3)).astype(np.float32)
    variables = flax.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), x[0])

    def step(x):
        layer = flax.linen.BatchNorm(use_running_average=False, axis_name="data", axis_index_groups=GROUPS)
        return layer.apply(variables, x, mutable="batch_stats")[0]

    def mapped(check_vma):
        specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": check_vma}
        return jax.shard_map(step, mesh=test_contexts.mesh_of(4), **specs)

    with pytest.raises(NotImplementedError):
        jax.vmap(step, axis_name="data")(x)
    with pytest.raises(NotImplementedError):
        mapped(True)(x)
    for group in GROUPS:
        exact = x[group].astype(np.float64)
        expected = (exact - exact.mean((0, 1))) / np.sqrt(exact.var((0, 1)) + 1e-5)
        np.testing.assert_allclose(np.asarray(mapped(False)(x))[group], expected, atol=1e-5)


def apply_flax(x, scale, bias, axis_name=None):
    layer = flax.linen.BatchNorm(use_running_average=False, axis_name=axis_name)
    averages = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": averages}
    return layer.apply(variables, x, mutable="batch_stats")[0]


def apply_ours(x, scale, bias, axis_name=None):
    return jaxnorm.batch_norm(x, scale, bias, axis_name=axis_name)[0]


@pytest.mark.parametrize(
    ("apply", "automatic"), [(apply_flax, (1, 2)), (apply_ours, (2, 3))], ids=["flax.linen", "jaxnorm"]
)
def test_collectives(rng, apply, automatic):
    """Of a forward pass and of a step: as many with `axis_name`; one more of ours where the batch is sharded."""
    x, cotangent = (rng.standard_normal((16, 6, 5, 3)).astype(np.float32) for _ in range(2))
    arguments, data, shared = (x, np.ones(3, np.float32), np.ones(3, np.float32), cotangent), P("data"), P()
    mesh = test_contexts.mesh_of(4)

    def step(axis_name):
        def loss(x, scale, bias, cotangent):
            return jnp.sum(jnp.tanh(apply(x, scale, bias, axis_name)) * cotangent)

        return jax.grad(loss, (0, 1, 2))

    def mapped(function, out_specs):
        return jax.shard_map(function, mesh=mesh, in_specs=(data, shared, shared, data), out_specs=out_specs)

    forward = mapped(lambda x, scale, bias, _: apply(x, scale, bias, "data"), data)
    assert test_contexts.collectives(forward, *arguments) == 1
    assert test_contexts.collectives(mapped(step("data"), (data, shared, shared)), *arguments) == 2
    shardings = tuple(NamedSharding(mesh, spec) for spec in (data, shared, shared, data))
    sharded = jax.device_put(arguments, shardings)
    forward = test_contexts.collectives(lambda x, scale, bias, _: apply(x, scale, bias), *sharded)
    assert (forward, test_contexts.collectives(step(None), *sharded)) == automatic


# Derivatives and memory ----------------------------------------------------------------------------------------------


def test_collectives_of_large_arrays_on_cpus(rng):
    """One where the mean is near enough, two more within the branch that measures again; one of the derivative."""
    mesh = test_contexts.mesh_of(4)
    x = jax.device_put(rng.standard_normal((64, 32, 32, 2)).astype(np.float32), NamedSharding(mesh, P("data")))
    assert x.size >= 2**17

    def loss(x):
        return jnp.sum(jnp.tanh(jaxnorm.batch_norm(x)[0]))

    for function, always in ((lambda x: jaxnorm.batch_norm(x)[0], 1), (jax.grad(loss), 2)):
        text = jax.jit(function).lower(x).compile().as_text()
        found = {
            block.split("(", 1)[0].strip(): len(re.findall(r"= .*? all-\w+(?:-start)?\(", block))
            for block in re.split(r"\n\n", text)
        }
        assert sum(n for name, n in found.items() if name.startswith("ENTRY")) == always, found
        assert sum(found.values()) == always + 2, found


def test_what_autodiff_keeps_of_bfloat16_data():
    """Arrays of the size of the data that the backward pass holds, as jax has them before XLA changes anything."""
    x, vector = jax.ShapeDtypeStruct((16, 8, 8, 4), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.float32)

    def kept(apply):
        pullback = jax.eval_shape(lambda *args: jax.vjp(apply, *args)[1], x, vector, vector)
        return [str(leaf.dtype) for leaf in jax.tree.leaves(pullback) if leaf.size >= x.size]

    assert kept(apply_ours) == ["bfloat16"]
    assert kept(apply_flax) == ["float32", "float32"]


def test_flax_repeats_statistics_along_the_wrong_axis(rng):
    """Ours: tests/test_layers.py::test_nnx_group_norm_of_every_layout."""
    x = rng.standard_normal((2, 3, 4, 5, 8)).astype(np.float32)
    y = nnx.GroupNorm(8, num_groups=4, reduction_axes=(2, 3, 4), rngs=nnx.Rngs(0))(x)
    grouped = x.reshape(2, 3, 4, 5, 4, 2).astype(np.float64)
    mean, var = (f((2, 3, 5), keepdims=True) for f in (grouped.mean, grouped.var))
    assert np.abs(np.asarray(y) - ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)).max() > 0.1


def test_tokamax(rng, monkeypatch):
    """Layer and RMS norm in one function, with a kernel for GPUs, which ours has not; no masks, no forward mode."""
    tokamax = import_tokamax(monkeypatch)
    assert [name for name in dir(tokamax) if "norm" in name] == ["layer_norm"]
    taken = parameters_of(tokamax.layer_norm)
    assert {"implementation", "subtract_mean"} <= set(taken)
    assert "triton" in tokamax.layer_norm.__doc__
    assert not {"mask", "activation", "residual"} & set(taken)
    x = rng.standard_normal((4, 8)).astype(np.float32)
    with pytest.raises(TypeError, match="forward-mode"), jax.numpy_rank_promotion("allow"):
        jax.jvp(lambda x: tokamax.layer_norm(x, None, None), (x,), (x,))
    assert jax.jvp(jaxnorm.layer_norm, (x,), (x,))[1].shape == x.shape


# What is not here ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "mine"), [(flax.linen, jaxnorm.linen), (nnx, jaxnorm.nnx)], ids=["linen", "nnx"])
def test_every_norm_of_flax_has_a_counterpart(theirs, mine):
    names = [name for name in dir(theirs) if name.endswith("Norm")]
    assert len(names) > 5
    assert [name for name in names if not hasattr(mine, name)] == []


def test_epilogues_and_the_invertible_mode_are_ours_alone():
    assert {"activation", "residual", "invertible"} <= set(parameters_of(jaxnorm.batch_norm))
    hk, eqx = pytest.importorskip("haiku"), pytest.importorskip("equinox")
    peers = SimpleNamespace(linen=flax.linen.BatchNorm, nnx=nnx.BatchNorm, haiku=hk.BatchNorm, eqx=eqx.nn.BatchNorm)
    for name, layer in vars(peers).items():
        taken = {*parameters_of(layer), *parameters_of(layer.__call__)}
        assert not {"activation", "residual", "invertible"} & taken, name
