"""Layers whose weights are normalized before they are used."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

import jaxnorm


class _Standardized:
    """A layer whose kernel is standardized before it is used, where its arguments are promoted."""

    kernel: Any
    gain: Any

    def __init__(self, *args: Any, promote_dtype: Callable[..., Any] = dtypes.promote_dtype, **settings: Any) -> None:
        super().__init__(*args, **settings)
        del self.promote_dtype  # of the instance: that of the class follows
        self.promoted = promote_dtype
        self.gain = nnx.Param(jnp.ones(self.kernel.shape[-1:], self.kernel.dtype))

    def promote_dtype(self, arguments: Any, *, dtype: Any) -> Any:
        """Standardize the kernel, then promote the dtypes of input, kernel and bias."""
        x, kernel, bias = arguments
        gain = self.gain[...] * (math.prod(kernel.shape[:-1]) ** -0.5)
        return self.promoted((x, jaxnorm.standardize_weights(kernel, gain), bias), dtype=dtype)


class StandardizedConv(_Standardized, nnx.Conv):
    """``nnx.Conv`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``gain``.

    Args: those of ``nnx.Conv``; gain and bias have the shape ``(out_features,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import StandardizedConv
      >>> layer = StandardizedConv(5, 3, (2,), padding="VALID", rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(layer(jnp.ones((1, 4, 5))), 0, atol=1e-6))  # the weights of an output sum to zero
      True
    """


class StandardizedLinear(_Standardized, nnx.Linear):
    """``nnx.Linear`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``gain``.

    Args: those of ``nnx.Linear``; gain and bias have the shape ``(out_features,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import StandardizedLinear
      >>> layer = StandardizedLinear(5, 3, rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(layer(jnp.ones((1, 5))), 0, atol=1e-6))  # the weights of an output sum to zero
      True
    """
