"""Layers whose weights are normalized before they are used."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype

import jaxnorm
from jaxnorm import _layers
from jaxnorm._axes import Axes, statistics_dtype
from jaxnorm.linen._norms import Initializer
from jaxnorm.variants.weights import iterate


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


class _Wrapper(nn.Module):
    """A layer whose parameters are changed before it sees them."""

    layer_instance: nn.Module
    """The layer."""

    @nn.nowrap
    def _call(self, change: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer_instance

        kept: list[Any] = []

        def changed(path, value):
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            return change(f"{layer.name}/{name}", jnp.asarray(value))

        def seen(variables):
            kept[:] = [variables]
            return jax.tree_util.tree_map_with_path(changed, variables)

        forward = nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            trans_in_fn=seen,
            trans_out_fn=lambda variables: kept.pop() if kept else variables,  # never what the layer sees
            init=self.is_initializing(),
            mutable=True,
        )
        return forward(layer)


class WeightNorm(_Wrapper):
    """A layer whose weights have a length that is learned (Salimans and Kingma, 2016): `jaxnorm.weight_norm`.

    In place of ``flax.linen.WeightNorm``. Variables: those of the layer, and ``params/<layer>/kernel/scale``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm.linen import WeightNorm
      >>> variables = WeightNorm(nn.Dense(3)).init(jax.random.key(0), jnp.ones((1, 2)))
      >>> jax.tree.map(jnp.shape, variables["params"])["layer_instance/kernel/scale"]
      (3,)
    """

    epsilon: float = 1e-12
    """Added to the squared length."""
    dtype: Any = None
    """Of the weights that the layer sees; None for the promotion of weights and scale."""
    param_dtype: Any = jnp.float32
    """Of the scale."""
    use_scale: bool = True
    """Whether there is a scale."""
    scale_init: Initializer = nn.initializers.ones
    """Initializer of the scale."""
    feature_axes: Axes | None = -1
    """Axis or axes of which every index has a length of its own; None for one length of the whole array."""
    variable_filter: Iterable[str] | None = frozenset({"kernel"})
    """What is normalized: arrays whose path contains one of these; None for all."""

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, with its weights normalized.

        Args:
          *args: those of the layer.
          **kwargs: those of the layer.

        Returns:
          What the layer returns.
        """
        return self._call(self._normalized, *args, **kwargs)

    @nn.nowrap
    def _normalized(self, name: str, w: jax.Array) -> jax.Array:
        if self.variable_filter and not any(part in name for part in self.variable_filter):
            return w
        given = () if self.feature_axes is None else self.feature_axes
        axis = _layers.sorted_axes("WeightNorm", "feature_axes", given, w.ndim)
        shape = tuple(w.shape[a] for a in axis)
        scale = self.param(f"{name}/scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        dtype = canonicalize_dtype(w, scale, dtype=self.dtype)
        settings = {"axis": axis, "epsilon": self.epsilon, "dtype": dtype}
        return _layers.in_dtype(jaxnorm.weight_norm, None, w, scale, **settings)


class SpectralNorm(_Wrapper):
    """A layer whose weights have a largest singular value of one (Miyato et al., 2018): `jaxnorm.spectral_norm`.

    In place of ``flax.linen.SpectralNorm``. Variables: those of the layer, and ``batch_stats/<layer>/kernel/u``, the
    state of the power iteration, with ``sigma``, the singular value. Vectors are unchanged.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxnorm.linen import SpectralNorm
      >>> layer, x = SpectralNorm(nn.Dense(3, use_bias=False), n_steps=50), jnp.eye(2)
      >>> variables = layer.init(jax.random.key(0), x, update_stats=False)
      >>> w, _ = layer.apply(variables, x, update_stats=True, mutable="batch_stats")  # the weights, as x is one
      >>> jnp.linalg.svd(w)[1].max().round(3).item()
      1.0
    """

    n_steps: int = 1
    """How many steps of the power iteration a call takes; zero leaves the weights unchanged."""
    epsilon: float = 1e-12
    """Added to squared lengths."""
    dtype: Any = None
    """Of the weights that the layer sees; None for the promotion of weights and state."""
    param_dtype: Any = jnp.float32
    """Of the state."""
    error_on_non_matrix: bool = False
    """Refuse arrays of more than two axes, all of which but the last are one axis else."""
    collection_name: str = "batch_stats"
    """The collection of the state."""

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """What the layer gives, with its weights normalized.

        Args:
          *args: those of the layer.
          update_stats: whether the state of the power iteration moves on: in training.
          **kwargs: those of the layer.

        Returns:
          What the layer returns.

        Raises:
          ValueError: an array of more than two axes, with ``error_on_non_matrix``.
        """

        def normalized(name, w):
            if w.ndim < 2 or self.n_steps < 1:
                return w
            if w.ndim > 2 and self.error_on_non_matrix:
                raise ValueError(f"SpectralNorm: Input is {w.ndim}D but error_on_non_matrix is True; got {name}.")
            return self._iterated(name, w, update_stats)

        return self._call(normalized, *args, **kwargs)

    @nn.nowrap
    def _iterated(self, name: str, w: jax.Array, update_stats: bool) -> jax.Array:
        collection, shape = self.collection_name, (1, w.shape[-1])
        key = None if self.has_variable(collection, f"{name}/u") else self.make_rng("params")
        u = self.variable(collection, f"{name}/u", jax.random.normal, key, shape, self.param_dtype)
        sigma = self.variable(collection, f"{name}/sigma", jnp.ones, (), statistics_dtype(self.param_dtype))
        dtype = canonicalize_dtype(w, u.value, dtype=self.dtype)
        wide = w.astype(jnp.promote_types(w.dtype, dtype))
        normal, new, value = iterate(wide, u.value, (w.ndim - 1,), self.n_steps, self.epsilon)
        if update_stats:
            u.value, sigma.value = new, value.astype(sigma.value.dtype)
        return normal.astype(dtype)
