"""Networks in which a normalization is used, to be compiled: the same one for each library, a training step each.

A network is a function ``contender -> Program``. A contender is how each normalization of the network is written:

- ``flax``: Flax's layer, then the residual is added, then the activation applied.
- ``drop-in``: the same line for line, with our layer in the place of Flax's.
- ``inside``: our layer, which is told the activation and the residual.
- ``invertible``: the same, and the output is kept in place of the input; with leaky ReLU only.
- ``add and norm``: of a transformer, our layer, but where the residual is added before it, both in one call.

Of stacks, a contender may be followed by what is around a block: a ``checkpoint``, or one whose ``policy`` saves the
statistics.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxnorm
import jaxnorm.nnx
from jaxnorm import training
from jaxnorm.training import _models

PLAIN = ("flax", "drop-in", "inside")
CHECKPOINTED = ("flax, checkpoint", "inside, checkpoint", "inside, policy")
POLICY = jaxnorm.save_statistics
AROUND = {"": lambda f: f, "checkpoint": jax.checkpoint, "policy": partial(jax.checkpoint, policy=POLICY)}

ACTIVATIONS = {"relu": nn.relu, "leaky_relu": nn.leaky_relu, "silu": nn.silu, "gelu": nn.gelu}
IMAGES, TOKENS = (128, 56, 56, 64), (8, 512, 1024)


class Program(NamedTuple):
    """Something to compile.

    Attributes:
      function: what is compiled.
      arguments: their shapes.
      unit: bytes, of the activations say, of which its traffic and temporaries are counted.
      norms: how many normalizations it has.
      donated: the arguments that its results may overwrite.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    unit: float
    norms: int
    donated: tuple[int, ...] = ()


class Norm(nn.Module):
    """A normalization, residual and activation, as a contender writes them."""

    contender: str
    kind: str
    activation: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Normalized with the statistics of ``x``."""
        inside = {"activation": self.activation} if self.contender in ("inside", "invertible") else {}
        library = nn if self.contender == "flax" else jaxnorm.linen
        layer = {
            "batch": lambda: library.BatchNorm(use_running_average=False, dtype=self.dtype, **inside),
            "layer": lambda: library.LayerNorm(dtype=self.dtype, **inside),
            "rms": lambda: library.RMSNorm(dtype=self.dtype, **inside),
        }[self.kind]()
        if self.contender == "invertible":
            layer = layer.copy(invertible=True)
        if inside:
            return layer(x, residual=residual)
        x = layer(x)
        x = x if residual is None else x + residual
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


def size(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> float:
    """Bytes of an array."""
    return float(math.prod(shape) * jnp.dtype(dtype).itemsize)


def images(examples: int = IMAGES[0]) -> jax.ShapeDtypeStruct:
    """Activations of the first stage of a ResNet."""
    return jax.ShapeDtypeStruct((examples, *IMAGES[1:]), jnp.bfloat16)


def one_norm(activation: str | None, residual: bool, contender: str) -> Program:
    """A batch normalization, whose cotangent waits for its output; of images that do not fit a chip's own memory."""
    x, norm = images(512), Norm(contender, "batch", activation, jnp.bfloat16)
    extra = (x,) if residual else ()

    def step(variables, x, dy, *extra):
        stats = variables["batch_stats"]

        def apply(params, x, *extra):
            return norm.apply({"params": params, "batch_stats": stats}, x, *extra, mutable=["batch_stats"])

        y, pullback, new = jax.vjp(apply, variables["params"], x, *extra, has_aux=True)
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, pullback(dy), new

    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    return Program(step, (variables, x, x, *extra), size(x.shape), 1)


def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=numbers)


def _loss_of(block: Callable[[jax.Array, Any], jax.Array], scan: bool) -> Callable[..., jax.Array]:
    """The loss of blocks one after the other, whose parameters are stacked."""

    def loss(parameters, x):
        if scan:
            x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), x, parameters)
        else:
            for i in range(len(jax.tree.leaves(parameters)[0])):
                x = block(x, jax.tree.map(lambda a, i=i: a[i], parameters))
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    return loss


def _stack(block: Any, one: Any, x: jax.ShapeDtypeStruct, layers: int, scan: bool, norms: int) -> Program:
    parameters = jax.tree.map(lambda a: jax.ShapeDtypeStruct((layers, *a.shape), a.dtype), one)
    return Program(jax.grad(_loss_of(block, scan)), (parameters, x), layers * size(x.shape), layers * norms)


def conv_stack(
    layers: int, scan: bool, norm_first: bool, activation: str, contender: str, examples: int = IMAGES[0]
) -> Program:
    """Blocks of convolution, norm and activation, or of norm, activation and convolution."""
    contender, _, around = contender.partition(", ")
    x, norm = images(examples), Norm(contender, "batch", activation, jnp.bfloat16)

    def block(x, parameters):
        kernel, variables = parameters
        x = x if norm_first else _conv(x, kernel)
        x, _ = norm.apply(variables, x, mutable=["batch_stats"])
        return _conv(x, kernel) if norm_first else x

    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], x.shape[-1]), jnp.float32)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    return _stack(AROUND[around](block), (kernel, variables), x, layers, scan, 1)


def residual_stack(layers: int, activation: str, contender: str) -> Program:
    """Basic blocks of a ResNet: twice convolution and norm, added to their input before the second activation."""
    x, norm = images(), Norm(contender, "batch", activation, jnp.bfloat16)

    def block(x, parameters):
        y, shortcut = x, x
        for i, residual in enumerate((None, shortcut)):
            kernel, variables = parameters[i]
            y, _ = norm.apply(variables, _conv(y, kernel), residual, mutable=["batch_stats"])
        return y

    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], x.shape[-1]), jnp.float32)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    return _stack(block, [(kernel, variables)] * 2, x, layers, False, 2)


class AddNorm(nn.Module):
    """`jaxnorm.add_layer_norm` or `jaxnorm.add_rms_norm`."""

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum, and the sum normalized."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        if self.kind == "rms":
            return jaxnorm.add_rms_norm(x, residual, scale)
        return jaxnorm.add_layer_norm(x, residual, scale, self.param("bias", nn.initializers.zeros, x.shape[-1:]))


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each normalized before and added after."""

    contender: str
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Of the shape of ``x``."""
        dtype, width = x.dtype, x.shape[-1]

        def norm():
            return Norm(self.contender, self.kind, None, dtype)

        attended = nn.MultiHeadDotProductAttention(16, dtype=dtype, use_bias=False)(norm()(x))
        if self.contender == "add and norm":
            x, y = AddNorm(self.kind)(attended, x)
        else:
            x = x + attended
            y = norm()(x)
        y = nn.Dense(4 * width, dtype=dtype, use_bias=False)(y)
        return x + nn.Dense(width, dtype=dtype, use_bias=False)(nn.gelu(y))


def transformer(layers: int, kind: str, contender: str) -> Program:
    """Blocks of a transformer."""
    x, block = jax.ShapeDtypeStruct(TOKENS, jnp.bfloat16), TransformerBlock(contender, kind)
    one = jax.eval_shape(block.init, jax.random.key(0), x)
    return _stack(lambda x, variables: block.apply(variables, x), one, x, layers, False, 2)


class ResNetNorm(_models.Norm):
    """The normalization of the networks of `jaxnorm.training`, as Flax or as a drop-in."""

    contender = "flax"

    @nn.compact
    def __call__(self, x, train, mask, residual=None):
        """Batch norm, residual and activation, one after the other."""
        return Norm(self.contender, "batch", self.activation, self.dtype)(x, residual)


class ResNetDropIn(ResNetNorm):
    """The same with our layer."""

    contender = "drop-in"


RESNET_NORMS = {"flax": ResNetNorm, "drop-in": ResNetDropIn, "inside": _models.Norm, "invertible": _models.Norm}


def resnet(name: str, activation: str, examples: int, pixels: int, contender: str) -> Program:
    """A training step with momentum; bytes and temporaries in MB."""
    settings = {"activation": activation, "invertible": contender == "invertible"}
    model = training.make_model(name, num_classes=1000, dtype=jnp.bfloat16, **settings)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def patched(function):
        with mock.patch.object(_models, "Norm", RESNET_NORMS[contender]):
            return function()

    def step(variables, momentum, x, labels):
        params, stats = variables["params"], variables["batch_stats"]

        def loss(params):
            given = {"params": params, "batch_stats": stats}
            logits, new = patched(lambda: model.apply(given, x, train=True, mutable=["batch_stats"]))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(grads, momentum, params)
        return {"params": optax.apply_updates(params, updates), **new}, momentum, value

    x = jax.ShapeDtypeStruct((examples, pixels, pixels, 3), jnp.bfloat16)
    variables = patched(lambda: jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=True), x))
    momentum = jax.eval_shape(optimizer.init, variables["params"])
    norms = len(jax.tree.leaves(variables["batch_stats"])) // 2
    labels = jax.ShapeDtypeStruct((examples,), jnp.int32)
    return Program(step, (variables, momentum, x, labels), 1e6, norms, (0, 1))


# Of NNX -------------------------------------------------------------------------------------------------------------


class NNXNorm(nnx.Module):
    """`Norm` of NNX."""

    def __init__(self, contender: str, kind: str, features: int, activation: str | None, rngs: nnx.Rngs) -> None:
        library = nnx if contender == "flax" else jaxnorm.nnx
        inside = {"activation": activation} if contender == "inside" else {}
        name = {"batch": "BatchNorm", "layer": "LayerNorm"}[kind]
        self.norm = getattr(library, name)(features, dtype=jnp.bfloat16, rngs=rngs, **inside)
        self.inside, self.activation = bool(inside), activation

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Normalized with the statistics of ``x``."""
        if self.inside:
            return self.norm(x, residual=residual)
        x = self.norm(x)
        x = x if residual is None else x + residual
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


def _nnx_conv(features: int, width: int, size: int, strides: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(features, width, (size, size), strides, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)


class NNXBottleneck(nnx.Module):
    """A block of a ResNet-50."""

    def __init__(self, contender: str, features: int, width: int, strides: int, rngs: nnx.Rngs) -> None:
        sizes = [(features, width, 1, 1), (width, width, 3, strides), (width, 4 * width, 1, 1)]
        self.convs = nnx.List([_nnx_conv(*size, rngs) for size in sizes])
        self.norms = nnx.List([NNXNorm(contender, "batch", w, "relu", rngs) for w in (width, width, 4 * width)])
        self.shortcut = nnx.data(None)
        if features != 4 * width:
            conv = _nnx_conv(features, 4 * width, 1, strides, rngs)
            self.shortcut = nnx.Sequential(conv, NNXNorm(contender, "batch", 4 * width, None, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of the shape of ``x``, or of half its size."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for conv, norm, residual in zip(self.convs, self.norms, (None, None, shortcut), strict=True):
            x = norm(conv(x), residual)
        return x


class NNXResNet(nnx.Module):
    """ResNet-50."""

    def __init__(self, contender: str, rngs: nnx.Rngs) -> None:
        self.stem, self.norm = _nnx_conv(3, 64, 7, 2, rngs), NNXNorm(contender, "batch", 64, "relu", rngs)
        self.blocks, features = nnx.List(), 64
        for stage, depth in enumerate((3, 4, 6, 3)):
            for block in range(depth):
                width, strides = 64 * 2**stage, 2 if stage and not block else 1
                self.blocks.append(NNXBottleneck(contender, features, width, strides, rngs))
                features = 4 * width
        self.dense = nnx.Linear(features, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nnx.max_pool(self.norm(self.stem(x)), (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean((1, 2)).astype(jnp.float32))


class NNXTransformer(nnx.Module):
    """Blocks of attention and a perceptron, each normalized before and added after."""

    def __init__(self, contender: str, layers: int, width: int, rngs: nnx.Rngs) -> None:
        dtype = jnp.bfloat16
        for name in ("norms", "attentions", "wide", "narrow"):
            setattr(self, name, nnx.List())
        for _ in range(layers):
            self.norms.extend(NNXNorm(contender, "layer", width, None, rngs) for _ in range(2))
            self.attentions.append(nnx.MultiHeadAttention(16, width, dtype=dtype, decode=False, rngs=rngs))
            self.wide.append(nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs))
            self.narrow.append(nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of the shape of ``x``."""
        for n, (attention, wide, narrow) in enumerate(zip(self.attentions, self.wide, self.narrow, strict=True)):
            x = x + attention(self.norms[2 * n](x))
            x = x + narrow(nnx.gelu(wide(self.norms[2 * n + 1](x))))
        return x


def first_step(name: str, library: str, contender: str) -> Program:
    """A training step of ResNet-50, on 8 images of 64 x 64, or of a transformer of 12 blocks."""
    if library == "linen" and name == "ResNet-50":
        return resnet("resnet50", "relu", 8, 64, contender)
    tokens = jax.ShapeDtypeStruct((2, 64, 256), jnp.bfloat16)
    if library == "linen":
        blocks = nn.Sequential([TransformerBlock(contender, "layer") for _ in range(12)])
        variables = jax.eval_shape(blocks.init, jax.random.key(0), tokens)
        gradient = jax.grad(lambda v, x: jnp.mean(jnp.square(blocks.apply(v, x).astype(jnp.float32))))
        return Program(gradient, (variables, tokens), 1e6, 24)
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.bfloat16)
    make, x = {
        "ResNet-50": (lambda: NNXResNet(contender, nnx.Rngs(0)), images),
        "transformer": (lambda: NNXTransformer(contender, 12, 256, nnx.Rngs(0)), tokens),
    }[name]
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def gradient(params, rest, x):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            return jnp.mean(jnp.square(model(x).astype(jnp.float32))), nnx.state(model, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    return Program(gradient, (params, rest, x), 1e6, 53 if name == "ResNet-50" else 24)


Case = tuple[str, Callable[[str], Program], tuple[str, ...]]
"""Its name, the network, and who is compared."""


def epilogues() -> Iterator[Case]:
    """One norm, and what may follow it."""
    for residual in (False, True):
        for activation in (None, "relu", "leaky_relu", "silu", "gelu"):
            contenders = PLAIN if activation or residual else PLAIN[:2]
            named = ", ".join(filter(None, ("norm", "residual" if residual else "", activation)))
            yield named, partial(one_norm, activation, residual), contenders


def conv_stacks(lengths: tuple[int, ...] = (4, 8)) -> Iterator[Case]:
    """Convolutions and norms, unrolled and in a loop, in either order."""
    for layers in lengths:
        for scan in (False, True):
            for norm_first in (False, True):
                how, order = "scan" if scan else "unrolled", "norm, act, conv" if norm_first else "conv, norm, act"
                name = f"{layers} x ({order}), {how}"
                contenders = PLAIN + CHECKPOINTED * norm_first  # in the other order, a convolution is computed again
                yield f"{name}, relu", partial(conv_stack, layers, scan, norm_first, "relu"), contenders
                invertible = ("flax", "inside", "invertible")
                yield f"{name}, leaky_relu", partial(conv_stack, layers, scan, norm_first, "leaky_relu"), invertible


def other_stacks() -> Iterator[Case]:
    """Residual blocks, and blocks of a transformer."""
    for activation in ("relu", "silu"):
        yield f"4 x residual block, {activation}", partial(residual_stack, 4, activation), PLAIN
    yield "ResNet-18, relu", partial(resnet, "resnet18", "relu", 256, 32), PLAIN
    for kind in ("layer", "rms"):
        yield f"2 x transformer block, {kind}", partial(transformer, 2, kind), (*PLAIN[:2], "add and norm")


def resnets(target: str) -> Iterator[Case]:
    """Training steps of ResNet-50 on images of 224 x 224; the activations of batch 64 fit on a TPU by luck."""
    for examples in (64, 256) if target.startswith("tpu") else (128,):
        for activation in ("relu", "silu"):
            name = f"ResNet-50, {activation}, batch {examples}"
            yield name, partial(resnet, "resnet50", activation, examples, 224), PLAIN
    name = f"ResNet-50, leaky_relu, batch {examples}"
    yield name, partial(resnet, "resnet50", "leaky_relu", examples, 224), ("flax", "inside", "invertible")


def small() -> Iterator[Case]:
    """What is compiled in a minute, for the tests; on a TPU, small enough for the activations to stay on the chip."""
    yield (
        "2 x (conv, norm, act), unrolled",
        partial(conv_stack, 2, False, False, "relu", examples=128),
        ("flax", "inside"),
    )


def rival(contender: str) -> str:
    """Whom a contender is compared with: Flax, under a checkpoint where it is under one itself."""
    return "flax, checkpoint" if "," in contender else "flax"
