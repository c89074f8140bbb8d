"""Networks in Flax Linen, each with a normalization chosen by name, before or after the activation."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxnorm import linen
from jaxnorm._axes import AxisNames

NORMS = ("batch", "layer", "instance", "group", "rms", "none")
"""The names that ``make_model(norm=...)`` and ``--norm`` take."""
PLACES = ("before", "after")
ACTIVATIONS = {"relu": nn.relu, "leaky_relu": nn.leaky_relu, "silu": nn.silu, "gelu": nn.gelu}


class Norm(nn.Module):
    """The normalization called ``kind``, over what it is defined over, then ``activation``; one scale per channel.

    Layer and RMS normalization share the statistics of a whole example, as in Wu and He, 2018.
    """

    kind: str
    momentum: float | None
    dtype: Any
    axis_name: AxisNames | None
    activation: str | None
    invertible: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, mask: jax.Array | None, residual: jax.Array | None = None
    ) -> jax.Array:
        example = tuple(range(1, x.ndim))
        after: dict[str, Any] = {"dtype": self.dtype, "activation": self.activation, "invertible": self.invertible}
        if self.kind == "batch":
            mask = None if mask is None else mask.reshape(-1, *(1,) * (x.ndim - 1))
            norm = linen.BatchNorm(not train, momentum=self.momentum, axis_name=self.axis_name, **after)
            return norm(x, mask=mask, residual=residual)
        if self.kind == "layer":
            return linen.LayerNorm(reduction_axes=example, **after)(x, residual=residual)
        if self.kind == "rms":
            return linen.RMSNorm(reduction_axes=example, **after)(x, residual=residual)
        if self.kind == "group":
            return linen.GroupNorm(math.gcd(32, x.shape[-1] // 2), **after)(x, residual=residual)
        if self.kind == "instance":
            if x.ndim == 2:
                raise ValueError("instance normalization needs positions to normalize over; got features alone.")
            return linen.InstanceNorm(**after)(x, residual=residual)
        x = x if residual is None else x + residual
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


class _Network(nn.Module):
    """What all networks are made with.

    Attributes:
      num_classes: how many classes.
      norm: one of `NORMS`.
      place: where the normalization is, "before" or "after" the activation.
      momentum: weight of the old running averages; None for cumulative ones.
      dtype: of the computation; parameters and statistics stay float32.
      axis_name: mapped axis over which replicas share batch statistics.
      activation: one of `ACTIVATIONS`.
      invertible: keep the outputs of normalizations for the backward pass, not their inputs; not with "relu".
    """

    num_classes: int = 10
    norm: str = "batch"
    place: str = "before"
    momentum: float | None = 0.9
    dtype: Any = jnp.float32
    axis_name: AxisNames | None = None
    activation: str = "relu"
    invertible: bool = False

    def normalized(
        self,
        x: jax.Array,
        train: bool,
        mask: jax.Array | None,
        activation: str | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """``x`` normalized, ``residual`` added, and activated if so wanted."""
        norm = Norm(self.norm, self.momentum, self.dtype, self.axis_name, activation, self.invertible)
        return norm(x, train, mask, residual)

    def activated(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """``x`` normalized and activated, in the order of ``place``."""
        if self.place == "before":
            return self.normalized(x, train, mask, self.activation)
        return self.normalized(ACTIVATIONS[self.activation](x), train, mask)

    def conv(self, x: jax.Array, width: int, size: int, strides: int = 1) -> jax.Array:
        """A convolution, with a bias only where no normalization follows that would remove it."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape, bias = (size, size), self.norm == "none"
        return nn.Conv(width, shape, strides, use_bias=bias, kernel_init=init, dtype=self.dtype)(x)

    def logits(self, x: jax.Array) -> jax.Array:
        """Float32 scores of each class."""
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


class MLP(_Network):
    """Fully connected layers of the given ``widths``, each with a norm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm import training
      >>> model, images = training.MLP(widths=(16,), norm="layer"), jnp.zeros((2, 8, 8, 1))
      >>> model.init_with_output(jax.random.key(0), images, train=False)[0].shape
      (2, 10)
    """

    widths: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Logits of shape ``(batch, num_classes)``; ``mask``, of shape ``(batch,)``, says which examples count."""
        x = x.reshape(len(x), -1).astype(self.dtype)
        for width in self.widths:
            x = self.activated(nn.Dense(width, use_bias=self.norm == "none", dtype=self.dtype)(x), train, mask)
        return self.logits(x)


class CNN(_Network):
    """Three by three convolutions of the given ``widths``, each with a norm; all but the first halve the image.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm import training
      >>> model, images = training.CNN(widths=(4, 8)), jnp.zeros((2, 8, 8, 1))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> variables["batch_stats"]["Norm_1"]["BatchNorm_0"]["mean"].shape
      (8,)
    """

    widths: Sequence[int] = (32, 64, 64)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Logits of shape ``(batch, num_classes)``; ``mask``, of shape ``(batch,)``, says which examples count."""
        x = x.astype(self.dtype)
        for i, width in enumerate(self.widths):
            x = self.activated(self.conv(x, width, 3, 1 if i == 0 else 2), train, mask)
        return self.logits(x.mean((1, 2)))


class ResNet(_Network):
    """Residual network (He et al., 2016) with ``depths`` blocks per stage, with or without a bottleneck.

    Images of fewer than 64 pixels per side get the small stem of the CIFAR networks: one 3x3 convolution, no pooling.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm import training
      >>> model, images = training.ResNet(depths=(1, 1)), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
      >>> shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0], images)
      >>> shapes.shape
      (2, 10)
    """

    depths: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Logits of shape ``(batch, num_classes)``; ``mask``, of shape ``(batch,)``, says which examples count."""
        small = x.shape[1] < 64
        x = self.conv(x.astype(self.dtype), 64, 3 if small else 7, 1 if small else 2)
        x = self.activated(x, train, mask)
        if not small:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                x = self.block(x, 64 * 2**stage, 2 if stage > 0 and block == 0 else 1, train, mask)
        return self.logits(x.mean((1, 2)))

    def block(self, x: jax.Array, width: int, strides: int, train: bool, mask: jax.Array | None) -> jax.Array:
        """Two 3x3 convolutions, or 1x1, 3x3 and 1x1; added to their input."""
        shortcut, out = x, 4 * width if self.bottleneck else width
        if x.shape[-1] != out or strides > 1:
            shortcut = self.normalized(self.conv(x, out, 1, strides), train, mask)
        if self.bottleneck:
            y = self.activated(self.conv(x, width, 1), train, mask)
            y = self.conv(self.activated(self.conv(y, width, 3, strides), train, mask), out, 1)
        else:
            y = self.conv(self.activated(self.conv(x, width, 3, strides), train, mask), out, 3)
        return self.normalized(y, train, mask, self.activation, shortcut)


MODELS = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet18": ResNet,
    "resnet50": lambda **settings: ResNet(depths=(3, 4, 6, 3), bottleneck=True, **settings),
}
"""What builds each network, by the name that `make_model` and ``--model`` take: called with its attributes."""


def make_model(name: str, **settings: Any) -> nn.Module:
    """Make the network called ``name``.

    Args:
      name: one of `MODELS`.
      **settings: attributes of the network: ``num_classes``, ``norm``, ``place``, ``momentum``, ``dtype``,
        ``axis_name``, ``activation``, ``invertible``.

    Returns:
      A Linen module, called with images of shape ``(batch, height, width, channels)``.

    Raises:
      ValueError: an unknown network, norm, place or activation; the message lists the known ones. Or invertible with an
        activation that cannot be undone.

    Example:
      >>> from jaxnorm import training
      >>> training.make_model("cnn", norm="group", num_classes=2).norm
      'group'
    """
    for what, value, known in (
        ("model", name, MODELS),
        ("norm", settings.get("norm", "batch"), NORMS),
        ("place", settings.get("place", "before"), PLACES),
        ("activation", settings.get("activation", "relu"), ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"make_model: {what} must be one of {', '.join(known)}; got {value!r}.")
    if settings.get("invertible"):
        chosen = {"norm": settings.get("norm", "batch"), "activation": settings.get("activation", "relu")}
        if chosen["norm"] == "none" or chosen["activation"] != "leaky_relu":
            raise ValueError(f"make_model: invertible needs a norm and activation='leaky_relu'; got {chosen}.")
    return MODELS[name](**settings)
