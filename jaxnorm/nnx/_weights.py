"""Layers whose weights are normalized before they are used."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

import jaxnorm
from jaxnorm import _layers
from jaxnorm._axes import Axes, statistics_dtype
from jaxnorm.nnx._norms import ONES, Initializer, signed
from jaxnorm.variants.weights import iterate

P = ParamSpec("P")


def _with_gain(init: Callable[P, None]) -> Callable[P, None]:
    """The ``__init__`` of a layer whose kernel is standardized before it is used, where its arguments are promoted."""

    @wraps(init)
    def make(*args: P.args, **kwargs: P.kwargs) -> None:
        init(*args, **kwargs)
        layer: Any = args[0]
        layer.promoted = layer.promote_dtype
        del layer.promote_dtype  # of the instance: that of the class follows
        layer.gain = nnx.Param(jnp.ones(layer.kernel.shape[-1:], layer.kernel.dtype))

    return make


class _Standardized:
    gain: Any
    promoted: Any

    def promote_dtype(self, arguments: Any, *, dtype: Any) -> Any:
        """Standardize the kernel, then promote the dtypes of input, kernel and bias."""
        x, kernel, bias = arguments
        gain = self.gain[...] * (math.prod(kernel.shape[:-1]) ** -0.5)
        return self.promoted((x, jaxnorm.standardize_weights(kernel, gain), bias), dtype=dtype)


@signed
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

    __init__ = _with_gain(nnx.Conv.__init__)


@signed
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

    __init__ = _with_gain(nnx.Linear.__init__)


@contextmanager
def _changed(layer: nnx.Module, change: Callable[[tuple[Any, ...], jax.Array], jax.Array]):
    """Within, the parameters of ``layer`` are what ``change`` makes of them; afterwards, what they were."""
    parameters = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    before = [(variable, variable[...]) for _, variable in parameters]
    try:
        for path, variable in parameters:
            variable.set_value(change(path, variable[...]))
        yield
    finally:
        for variable, value in before:
            variable.set_value(value)


@signed
class WeightNorm(nnx.Module):
    """A layer whose weights have a length that is learned (Salimans and Kingma, 2016): `jaxnorm.weight_norm`.

    In place of ``flax.nnx.WeightNorm``, but for two things: the parameters of the layer stay what an optimizer made of
    them, and ``scales`` are parameters too (``nnx.Param``), by the path of what they scale.

    Args:
      layer_instance: the layer.
      feature_axes: axis or axes of which every index has a length of its own; None for one length of the whole array.
      use_scale: whether there is a scale.
      scale_init: initializer of the scales.
      epsilon: added to the squared length.
      dtype: of the weights that the layer sees; None for the promotion of weights and scale.
      param_dtype: of the scales.
      variable_filter: what is normalized, as a filter of nnx.
      promote_dtype: taken as Flax takes it, and not used.
      rngs: keys for the initializer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import WeightNorm
      >>> layer = WeightNorm(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
      >>> w = layer(jnp.eye(2))  # the weights that are used
      >>> jnp.sum(w**2, axis=0).round(3).tolist()
      [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = ONES,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        variable_filter: nnx.filterlib.Filter = nnx.PathContains("kernel"),  # noqa: B008
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.layer_instance, self.epsilon, self.dtype = layer_instance, epsilon, dtype
        self.feature_axes = () if feature_axes is None else feature_axes
        self.use_scale, self.param_dtype, self.promote_dtype = use_scale, param_dtype, promote_dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        scales = {}
        for path, variable in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if use_scale and self.variable_filter(path, variable):
                shape = tuple(variable.shape[a] for a in self._axis(variable.ndim))
                scales[path] = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
        self.scales = nnx.data(scales if use_scale else None)

    def _axis(self, ndim: int) -> tuple[int, ...]:
        return _layers.sorted_axes("WeightNorm", "feature_axes", self.feature_axes, ndim)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, with its weights normalized.

        Args:
          *args: those of the layer.
          **kwargs: those of the layer.

        Returns:
          What the layer returns.

        Raises:
          ValueError: the layer has parameters that it had not when it was wrapped.
        """
        variables = dict(nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param)))

        def normalized(path, w):
            if not self.variable_filter(path, variables[path]):
                return w
            if self.scales is not None and path not in self.scales:
                rule = "the layer must keep the parameters that it was wrapped with"
                _layers.fail("WeightNorm", rule, {"new": "/".join(map(str, path))})
            scale = self.scales[path][...] if self.scales is not None else None
            dtype = dtypes.canonicalize_dtype(w, scale, dtype=self.dtype)
            settings = {"axis": self._axis(w.ndim), "epsilon": self.epsilon, "dtype": dtype}
            return _layers.in_dtype(jaxnorm.weight_norm, None, w, scale, **settings)

        with _changed(self.layer_instance, normalized):
            return self.layer_instance(*args, **kwargs)  # pyright: ignore[reportCallIssue]


@signed
class SpectralNorm(nnx.Module):
    """A layer whose weights have a largest singular value of one (Miyato et al., 2018): `jaxnorm.spectral_norm`.

    In place of ``flax.nnx.SpectralNorm``, but that the parameters of the layer stay what an optimizer made of them.
    ``batch_stats`` holds, by path, ``u``, the state of the power iteration, and ``sigma``, the singular value. Vectors
    are unchanged. ``train()`` and ``eval()`` choose whether the state moves on.

    Args:
      layer_instance: the layer.
      n_steps: how many steps of the power iteration a call takes; zero leaves the weights unchanged.
      epsilon: added to squared lengths.
      dtype: of the weights that the layer sees; None for the promotion of weights and state.
      param_dtype: of the state.
      error_on_non_matrix: refuse arrays of more than two axes, all of which but the last are one axis else.
      update_stats: whether the state moves on: in training.
      rngs: keys for the state.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxnorm.nnx import SpectralNorm
      >>> layer = SpectralNorm(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)), n_steps=50, rngs=nnx.Rngs(0))
      >>> w = layer(jnp.eye(2))  # the weights that are used
      >>> jnp.linalg.svd(w)[1].max().round(3).item()
      1.0
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.layer_instance, self.n_steps, self.epsilon, self.dtype = layer_instance, n_steps, epsilon, dtype
        self.param_dtype, self.error_on_non_matrix = param_dtype, error_on_non_matrix
        self.use_running_average = not update_stats  # what train() and eval() set
        stats = {}
        for path, variable in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if variable.ndim < 2 or n_steps < 1:
                continue
            if variable.ndim > 2 and error_on_non_matrix:
                name = "/".join(map(str, path))
                raise ValueError(
                    f"SpectralNorm: Layer instance parameter is {variable.ndim}D but error_on_non_matrix is True; "
                    f"got {name}."
                )
            key = rngs.params()
            u = jax.random.normal(key, (1, variable.shape[-1]), param_dtype)
            stats[(*path, "u")] = nnx.BatchStat(u)
            stats[(*path, "sigma")] = nnx.BatchStat(jnp.ones((), statistics_dtype(param_dtype)))
        self.batch_stats = nnx.data(stats)

    def __call__(self, *args: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """What the layer gives, with its weights normalized.

        Args:
          *args: those of the layer.
          update_stats: whether the state of the power iteration moves on; None for the attribute.
          **kwargs: those of the layer.

        Returns:
          What the layer returns.

        Raises:
          ValueError: the layer has parameters that it had not when it was wrapped.
        """
        update = _layers.first_given(update_stats, not self.use_running_average)

        def normalized(path, w):
            if w.ndim < 2 or self.n_steps < 1:
                return w
            if (*path, "u") not in self.batch_stats:
                rule = "the layer must keep the parameters that it was wrapped with"
                _layers.fail("SpectralNorm", rule, {"new": "/".join(map(str, path))})
            u, sigma = (self.batch_stats[(*path, name)] for name in ("u", "sigma"))
            dtype = dtypes.canonicalize_dtype(w, u[...], dtype=self.dtype)
            wide = w.astype(jnp.promote_types(w.dtype, dtype))
            normal, new, value = iterate(wide, u[...], (w.ndim - 1,), self.n_steps, self.epsilon)
            if update:
                u.set_value(new)
                sigma.set_value(value.astype(sigma[...].dtype))
            return normal.astype(dtype)

        with _changed(self.layer_instance, normalized):
            return self.layer_instance(*args, **kwargs)  # pyright: ignore[reportCallIssue]
