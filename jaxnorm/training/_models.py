"""Networks in Flax Linen with batch normalization before every activation."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from jaxnorm.linen import BatchNorm


class CNN(nn.Module):
    """Convolution, batch normalization and ReLU, a few times; then the mean over positions and a linear layer.

    Attributes:
      num_classes: how many classes.
      widths: channels of each convolution; the second and later ones halve the image.
      momentum: weight of the old running averages.
    """

    num_classes: int = 10
    widths: Sequence[int] = (32, 64, 64)
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Logits of shape ``(batch, num_classes)``; ``mask``, of shape ``(batch,)``, says which examples count."""
        mask = None if mask is None else mask[:, None, None, None]
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=1 if i == 0 else 2, use_bias=False)(x)
            x = BatchNorm(use_running_average=not train, momentum=self.momentum)(x, mask=mask)
            x = nn.relu(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))
