"""Residual networks written with Flax: with our layers, the same variables and the same step, up to rounding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

WIDTHS = (8, 16)


class LinenResNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: self.norm(use_running_average=not train, momentum=0.9)  # noqa: E731
        x = nn.relu(norm()(nn.Conv(WIDTHS[0], (3, 3), use_bias=False)(x)))
        for i, width in enumerate(WIDTHS):
            shortcut, strides = x, 1 if i == 0 else 2
            y = nn.relu(norm()(nn.Conv(width, (3, 3), strides, use_bias=False)(x)))
            y = self.norm(use_running_average=not train, scale_init=nn.initializers.constant(0.2))(
                nn.Conv(width, (3, 3), use_bias=False)(y)
            )
            if shortcut.shape != y.shape:
                shortcut = norm()(nn.Conv(width, (1, 1), strides, use_bias=False)(shortcut))
            x = nn.relu(shortcut + y)
        return nn.Dense(10)(x.mean((1, 2)))


class NNXBlock(nnx.Module):
    def __init__(self, norm, before, width, strides, rngs):
        conv = lambda a, k, s=1: nnx.Conv(a, width, (k, k), strides=s, use_bias=False, rngs=rngs)  # noqa: E731
        self.conv1, self.conv2 = conv(before, 3, strides), conv(width, 3)
        self.norm1, self.norm2 = (norm(width, momentum=0.9, rngs=rngs) for _ in range(2))
        self.project = nnx.data((conv(before, 1, strides), norm(width, rngs=rngs)) if strides > 1 else None)

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        shortcut = x if self.project is None else self.project[1](self.project[0](x))
        return nnx.relu(shortcut + y)


class NNXResNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.stem = nnx.Conv(3, WIDTHS[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(WIDTHS[0], rngs=rngs)
        pairs = zip((WIDTHS[0], *WIDTHS), WIDTHS, (1, 2), strict=False)
        self.blocks = nnx.List([NNXBlock(norm, a, b, s, rngs) for a, b, s in pairs])
        self.head = nnx.Linear(WIDTHS[-1], 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def data(rng):
    return rng.standard_normal((8, 12, 12, 3)).astype(np.float32), rng.integers(0, 10, 8)


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def assert_same(ours, theirs):
    """The same tree, with values that differ by a few hundred roundings of the largest, after eight layers."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        scale = max(np.abs(b).max(), 1e-2)
        np.testing.assert_allclose(a, b, rtol=0, atol=300 * 2.0**-24 * scale)


@pytest.mark.slow
def test_linen(rng):
    images, labels = data(rng)

    def step(norm):
        model = LinenResNet(norm)
        variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=True)

        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return loss_of(logits, labels), updates

        (value, updates), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        trained = {"params": params, **updates}
        return value, grads, trained, jax.jit(model.apply, static_argnames="train")(trained, images, train=False)

    # the names of the layers carry that of the class, which is the same
    assert_same(step(jaxnorm.linen.BatchNorm), step(nn.BatchNorm))


@pytest.mark.slow
def test_nnx(rng):
    images, labels = data(rng)

    def step(norm):
        model = NNXResNet(norm, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def train(model, optimizer):
            value, grads = nnx.value_and_grad(lambda m: loss_of(m(images), labels))(model)
            optimizer.update(model, grads)
            return value, grads

        value, grads = train(model, optimizer)
        state = nnx.to_pure_dict(nnx.state(model))
        model.eval()
        return value, nnx.to_pure_dict(grads), state, model(jnp.asarray(images))

    assert_same(step(jaxnorm.nnx.BatchNorm), step(nnx.BatchNorm))
