"""Layers whose weights are normalized before they are used."""

from typing import Any

from flax import linen as nn

import jaxnorm


class _Standardized(nn.Module):
    def param(self, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        """The parameter; of the kernel, what `jaxnorm.standardize_weights` makes of it."""
        value: Any = super().param(name, init_fn, *args, **kwargs)
        if name != "kernel":
            return value
        gain = super().param("gain", nn.initializers.ones, value.shape[-1:], value.dtype)
        return jaxnorm.standardize_weights(value, gain * (value[..., 0].size ** -0.5))


class StandardizedConv(_Standardized, nn.Conv):
    """``nn.Conv`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``params/gain``.

    Attributes:
      features, kernel_size, strides, ...: all those of ``nn.Conv``; gain and bias have the shape ``(features,)``.

    Example:
      The weights of every output sum to zero, so that what is constant is not seen:

      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import StandardizedConv
      >>> layer, x = StandardizedConv(features=3, kernel_size=(2,), padding="VALID"), jnp.ones((1, 4, 5))
      >>> bool(jnp.allclose(layer.init_with_output(jax.random.key(0), x)[0], 0, atol=1e-6))
      True
    """


class StandardizedDense(_Standardized, nn.Dense):
    """``nn.Dense`` with scaled weight standardization (Qiao et al., 2019; Brock et al., 2021) and ``params/gain``.

    Attributes:
      features, use_bias, dtype, ...: all those of ``nn.Dense``; gain and bias have the shape ``(features,)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnorm.linen import StandardizedDense
      >>> y, _ = StandardizedDense(features=3).init_with_output(jax.random.key(0), jnp.ones((1, 5)))
      >>> bool(jnp.allclose(y, 0, atol=1e-6))  # as in `StandardizedConv`
      True
    """
