from dataclasses import field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import linen as nn
from flax import nnx
from networks import LinenResNet, NNXResNet, images, linen_network, nnx_module, randomized
from test_surgery_freeze import LIFTED, equal, network, train

from jaxnorm import linen, surgery
from jaxnorm import nnx as jaxnorm_nnx

DOMAIN = np.array([0, 1, 1, 0, 1, 0])
INTO = {
    "GhostBatchNorm": ({"virtual_batch_size": 2}, {}),
    "BatchRenorm": ({"r_max": 1.1, "d_max": 0.1}, {}),
    "SplitBatchNorm": ({"num_domains": 2}, {"domain": DOMAIN}),
}
"""Remedies for batch norm: settings, and what their calls take besides the data."""
KEPT = {"momentum": 0.8, "epsilon": 1e-3, "axis": 1, "use_bias": False}
"""Settings that a remedy has in common with batch norm."""


@pytest.mark.parametrize("lifted", LIFTED)
def test_swapped_linen_is_what_is_written_by_hand(lifted, rng):
    """`init` too: the same keys give the same variables."""
    model, _, x = network(lifted, rng)
    ours = LIFTED[lifted](norm=linen.BatchNorm)
    with surgery.swapped(where=".*BatchNorm.*") as seen:
        variables = jax.jit(model.init)(jax.random.key(0), x)
        equal(variables, jax.jit(ours.init)(jax.random.key(0), x))
        equal(train(model, variables, x), train(ours, variables, x))
    assert [path.rsplit("/")[-1] for path in seen] == ["BatchNorm_0"]
    equal(variables, jax.jit(model.init)(jax.random.key(0), x))  # a tree of Flax's, unchanged


def test_swapped_norms_are_stable(rng):
    """The reason to swap: Flax's layer norm has lost all digits here."""
    x = jnp.asarray(1e5 + rng.normal(size=(4, 64)), jnp.float32)
    layer = nn.LayerNorm()
    variables = layer.init(jax.random.key(0), x)
    with surgery.swapped():
        y = layer.apply(variables, x)
    assert abs(y.std() - 1) < 1e-3 < abs(layer.apply(variables, x).std() - 1)


def test_swapped_and_frozen_together(rng):
    model, variables, x = network("plain", rng)
    by_hand = train(LIFTED["plain"](norm=linen.BatchNorm, by_hand=True), variables, x)
    with surgery.frozen(), surgery.swapped(where="BatchNorm_0"):
        one = train(model, variables, x)
    with surgery.swapped(where="BatchNorm_0"), surgery.frozen():
        other = train(model, variables, x)
    equal(one, by_hand)
    equal(other[0][1], one[0][1])  # frozen calls a copy, which is swapped in turn


def test_a_norm_called_twice_updates_twice(rng):
    class Twice(nn.Module):
        norm: type = nn.BatchNorm

        @nn.compact
        def __call__(self, x, _=None):
            norm = self.norm(use_running_average=False)
            return norm(norm(x) + 1), None

    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    variables = Twice().init(jax.random.key(0), x)
    expected = train(Twice(linen.BatchNorm), variables, x)
    with surgery.swapped():
        equal(train(Twice(), variables, x), expected)


def test_batch_norm_into_group_norm_with_its_parameters(rng):
    x = images(rng)
    apply, variables = linen_network(LinenResNet(depths=(1,)), rng, x)
    with surgery.swapped(linen.GroupNorm, num_groups=2, epsilon=1e-3) as seen:
        y = apply(variables, x)
    assert seen == ["BatchNorm_0", "BatchNorm_1", "BatchNorm_2"]

    class Group(nn.Module):
        use_running_average: bool
        momentum: float
        dtype: jnp.dtype

        @nn.compact
        def __call__(self, x):
            layer = linen.GroupNorm(2, dtype=self.dtype, epsilon=1e-3, parent=self.scope.rewound())
            return layer(x)

    params = {name.replace("BatchNorm", "Group"): p for name, p in variables["params"].items()}
    equal(y, LinenResNet(Group, depths=(1,)).apply({"params": params}, x))


def test_swapped_nnx_is_what_is_written_by_hand(rng):
    x = images(rng)
    model = nnx_module(partial(NNXResNet, depths=(1,)), rng)
    ours = nnx_module(partial(NNXResNet, jaxnorm_nnx.BatchNorm, depths=(1,)), rng)
    nnx.update(ours, nnx.state(model))
    scale = model.stem.norm.scale
    paths = surgery.swap(model)
    assert paths == ["blocks/0/convs/0/norm", "blocks/0/convs/1/norm", "stem/norm"]
    assert model.stem.norm.scale is scale
    assert nnx.graphdef(model) == nnx.graphdef(ours)

    @nnx.jit
    def step(model, x):
        y, grads = nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
        return y, nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(model))

    equal(step(model, x), step(ours, x))
    with pytest.warns(UserWarning, match="nothing was swapped, for all norms are jaxnorm's already"):
        surgery.swap(model, unbiased=True)
    assert not model.stem.norm.unbiased


def test_nnx_stacks_and_other_norms(rng):
    """Layers made by ``vmap`` and run by ``scan``; rematerialized; batch norm into group norm."""

    def run(model, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def layers(x, layer):
            return nnx.relu(layer(x))

        return layers(x, model)

    def make(norm, **settings):
        return nnx.vmap(lambda key: norm(4, rngs=nnx.Rngs(key), **settings))(jax.random.split(jax.random.key(0), 3))

    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    model, ours = make(nnx.BatchNorm), make(jaxnorm_nnx.BatchNorm)
    surgery.swap(model)
    equal(run(model, x), run(ours, x))
    equal(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(ours)))

    model = make(nnx.BatchNorm)
    surgery.swap(model, jaxnorm_nnx.GroupNorm, num_groups=2, epsilon=1e-3)
    equal(run(model, x), run(make(jaxnorm_nnx.GroupNorm, num_groups=2, epsilon=1e-3), x))
    group = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
    expected = jaxnorm_nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(x)
    surgery.swap(group)
    np.testing.assert_array_equal(group(x), expected)
    with pytest.raises(ValueError, match="and there are none in Linear"):
        surgery.swap(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


class Normed(nn.Module):
    """A norm after what is learned, so that gradients go through it."""

    norm: type = nn.BatchNorm
    settings: dict = field(default_factory=dict)

    @nn.compact
    def __call__(self, x, train, **inputs):
        norm = self.norm(use_running_average=not train, **KEPT, **self.settings, name="norm")
        return norm(nn.Dense(3)(x), **inputs)


@pytest.mark.parametrize("name", INTO)
def test_batch_norm_into_remedies_with_parameters_and_averages(name, rng):
    settings, inputs = INTO[name]
    x = jnp.asarray(rng.normal(size=(6, 4, 5)), jnp.float32)
    model, by_hand = Normed(), Normed(getattr(linen, name), settings)
    variables = randomized(jax.eval_shape(partial(model.init, train=True), jax.random.key(0), x), rng)

    def run(model, **inputs):
        """Training with its gradients and new averages, and evaluation before it."""

        def loss(params):
            y, new = model.apply({**variables, "params": params}, x, True, **inputs, mutable="batch_stats")
            return jnp.sum(jnp.sin(y)), (y, new)

        trained = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return trained, model.apply(variables, x, False, **inputs)

    with surgery.swapped(getattr(linen, name), **settings, **inputs) as seen:
        trained, tested = jax.jit(lambda: run(model))()
    assert seen == ["norm"]
    equal((trained, tested), jax.jit(lambda: run(by_hand, **inputs))())
    (before, _), as_it_was = jax.jit(lambda: run(model))()
    assert_close(tested, as_it_was, 5)  # batch norm's averages, for all domains
    assert abs(trained[0][1][0] - before[1][0]).max() > 0.01


class NNXNormed(nnx.Module):
    """The same in NNX."""

    def __init__(self, norm=nnx.BatchNorm, settings=None, *, rngs):
        self.dense, self.norm = nnx.Linear(5, 3, rngs=rngs), norm(4, **KEPT, **(settings or {}), rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in INTO), ("SplitBatchNorm", {"split_affine": True})])
def test_nnx_batch_norm_into_remedies(name, more, rng):
    settings, inputs = INTO[name]
    settings = settings | more
    model = nnx_module(NNXNormed, rng)
    by_hand = NNXNormed(getattr(jaxnorm_nnx, name), settings, rngs=nnx.Rngs(0))
    by_hand.dense.kernel[...], by_hand.dense.bias[...] = model.dense.kernel[...], model.dense.bias[...]
    for variable in ("scale", "mean", "var"):
        getattr(by_hand.norm, variable)[...] = getattr(model.norm, variable)[...]  # the same for all domains
    x = jnp.asarray(rng.normal(size=(6, 4, 5)), jnp.float32)
    as_it_was = nnx.view(model, use_running_average=True)(x)
    scale = model.norm.scale
    assert surgery.swap(model, getattr(jaxnorm_nnx, name), **settings) == ["norm"]
    assert model.norm.scale is scale
    model, by_hand = (nnx.view(m, **inputs) for m in (model, by_hand))
    assert_close(nnx.view(model, use_running_average=True)(x), as_it_was, 5)

    @nnx.jit
    def step(model, x):
        y, grads = nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
        return y, nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(model))

    equal(step(model, x), step(by_hand, x))
    assert nnx.graphdef(model) == nnx.graphdef(by_hand)


def test_a_stack_of_nnx_norms_into_split_ones(rng):
    """Each layer of the stack has what each domain begins with."""
    stack = nnx.vmap(lambda key: nnx.BatchNorm(4, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    stack.mean[...] = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    means, x = stack.mean[...], jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    surgery.swap(stack, jaxnorm_nnx.SplitBatchNorm, num_domains=2, split_affine=True)
    np.testing.assert_array_equal(stack.mean[...], jnp.stack([means, means], 1))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def layers(x, layer):
        return nnx.view(layer, domain=DOMAIN, use_running_average=True)(x)

    expected = np.asarray(x, float)
    for mean in np.asarray(means, float):
        expected = (expected - mean) / np.sqrt(1 + 1e-5)
    assert_close(layers(x, stack), expected, 3)
    with pytest.raises(ValueError, match=r"^SplitBatchNorm: domain must be given in the call or by nnx\.view"):
        jaxnorm_nnx.SplitBatchNorm(4, num_domains=2, rngs=nnx.Rngs(0))(x)
