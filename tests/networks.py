"""Small networks for tests of surgery, with a norm of any library in the place of batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx


class LinenResNet(nn.Module):
    """Residual blocks, with a bottleneck or without, normalized after or before each convolution."""

    norm: type = nn.BatchNorm
    depths: tuple = (1, 1)
    width: int = 4
    bottleneck: bool = False
    preactivation: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        def normalized(x):
            return self.norm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)

        def conv(x, width, size, strides=1):
            x = nn.relu(normalized(x)) if self.preactivation else x
            x = nn.Conv(width, (size, size), strides, use_bias=False, dtype=self.dtype)(x)
            return x if self.preactivation else normalized(x)

        x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = x if self.preactivation else nn.relu(normalized(x))
        for stage, depth in enumerate(self.depths):
            width = self.width * 2**stage
            for block in range(depth):
                strides = 2 if stage and not block else 1
                sizes = ((width, 1, 1), (width, 3, strides), (4 * width, 1, 1))
                sizes = sizes if self.bottleneck else ((width, 3, strides), (width, 3, 1))
                y = x
                for i, size in enumerate(sizes):
                    y = conv(nn.relu(y) if i and not self.preactivation else y, *size)
                x = x if x.shape == y.shape else conv(x, y.shape[-1], 1, strides)
                x = x + y if self.preactivation else nn.relu(x + y)
        x = nn.relu(normalized(x)) if self.preactivation else x
        return nn.Dense(5, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


class NNXBlock(nnx.Module):
    def __init__(self, norm, into, width, strides, bottleneck, dtype, rngs):
        sizes = ((into, width, 1, 1), (width, width, 3, strides), (width, 4 * width, 1, 1))
        sizes = sizes if bottleneck else ((into, width, 3, strides), (width, width, 3, 1))
        self.shortcut = nnx.data(None)
        if into != sizes[-1][1] or strides > 1:
            self.shortcut = NNXConv(norm, into, sizes[-1][1], 1, strides, dtype, rngs)
        self.convs = nnx.List([NNXConv(norm, *size, dtype, rngs) for size in sizes])

    def __call__(self, x):
        y = x
        for i, conv in enumerate(self.convs):
            y = conv(nnx.relu(y) if i else y)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NNXConv(nnx.Module):
    def __init__(self, norm, into, width, size, strides, dtype, rngs):
        self.conv = nnx.Conv(into, width, (size, size), strides, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = norm(width, momentum=0.9, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class NNXResNet(nnx.Module):
    """The same network in NNX, normalized after each convolution."""

    def __init__(self, norm=nnx.BatchNorm, depths=(1, 1), width=4, bottleneck=False, dtype=jnp.float32, *, rngs):
        self.stem, into, blocks = NNXConv(norm, 3, width, 3, 1, dtype, rngs), width, []
        for stage, depth in enumerate(depths):
            for block in range(depth):
                strides = 2 if stage and not block else 1
                blocks.append(NNXBlock(norm, into, width * 2**stage, strides, bottleneck, dtype, rngs))
                into = width * 2**stage * (4 if bottleneck else 1)
        self.blocks = nnx.List(blocks)
        self.dense = nnx.Linear(into, 5, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean((1, 2))).astype(jnp.float32)


class MobileNet(nn.Module):
    """Inverted residuals (Sandler et al., 2018): depthwise convolutions, and linear bottlenecks."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        def conv(x, width, size, groups=1):
            x = nn.Conv(width, (size, size), use_bias=False, feature_group_count=groups)(x)
            return self.norm(use_running_average=True)(x)

        x = nn.relu6(conv(x, 8, 3))
        for _ in range(2):
            y = nn.relu6(conv(x, 16, 1))
            y = nn.relu6(conv(y, 32, 3, groups=16))
            x = x + conv(y, 8, 1)
        return nn.Dense(5)(x.mean((1, 2)))


class Generator(nn.Module):
    """Transposed convolutions (Radford et al., 2016)."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, z):
        x = self.norm(use_running_average=True)(nn.Dense(4 * 4 * 8)(z))
        x = nn.relu(x).reshape(-1, 4, 4, 8)
        for width, transpose_kernel in ((6, False), (4, True)):
            x = nn.ConvTranspose(width, (4, 4), (2, 2), use_bias=False, transpose_kernel=transpose_kernel)(x)
            x = nn.leaky_relu(self.norm(use_running_average=True)(x))
        return nn.tanh(nn.ConvTranspose(3, (3, 3), (2, 2))(x))


def randomized(abstract, rng):
    """Variables of those shapes as after some training: means and biases about zero, scales and variances about one."""

    def value(path, a):
        name = jax.tree_util.keystr(path)
        if len(a.shape) > 1 and {1} != set(a.shape[:-1]):
            signed = rng.normal(size=a.shape) * (2 / np.prod(a.shape[:-1])) ** 0.5
        elif any(word in name for word in ("mean", "bias", "offset")):
            signed = rng.normal(size=a.shape)
        else:
            signed = rng.uniform(0.5, 1.5, a.shape)
        return jnp.asarray(signed, a.dtype)

    return jax.tree_util.tree_map_with_path(value, abstract)


def linen_network(network, rng, x):
    """The inference call and variables."""
    return network.apply, randomized(jax.eval_shape(network.init, jax.random.key(0), x), rng)


def nnx_module(make, rng):
    """What ``make`` makes, given ``rngs``, with other variables."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, randomized(state, rng))


def nnx_network(make, rng):
    """The inference call and state of what ``make`` makes."""
    network = nnx_module(make, rng)
    network.eval()
    graphdef, state = nnx.split(network)
    return lambda state, x: nnx.merge(graphdef, state)(x), state


def images(rng, batch=2, size=8, channels=3):
    return jnp.asarray(rng.normal(size=(batch, size, size, channels)), jnp.float32)


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
