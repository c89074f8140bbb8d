"""How the layers of the remedies are called: each way once, for Linen and for NNX.

What ``_output`` and ``_modulation`` do is the layer's: it has the variables, and keeps the averages.
"""

from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm
from jaxnorm import _axes

Array = jax.typing.ArrayLike


class Plain:
    """Of ``x`` alone."""

    def __call__(self: Any, x: Array) -> jax.Array:
        """Apply the layer to ``x``.

        Args:
          x: real array of any shape, with the features on ``axis``.

        Returns:
          An array of the shape of ``x``.

        Raises:
          TypeError: ``x`` is complex.
          flax.errors.ScopeParamShapeError: in Linen, of other features than at initialization; in NNX a ValueError.
        """
        return self._output(x)


class Masked:
    """Of examples, each by itself."""

    def __call__(self: Any, x: Array, *, mask: Array | None = None) -> jax.Array:
        """Normalize every example of ``x`` by itself.

        Args:
          x: real array of shape ``(batch, ...)`` with the features on ``axis``.
          mask: as in `jaxnorm.standardize`.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: an argument does not fit.
          flax.errors.ScopeParamShapeError: in Linen, of other features than at initialization; in NNX a ValueError.
        """
        return self._output(x, mask=mask)


class Averaged:
    """With running averages."""

    def __call__(
        self: Any, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> jax.Array:
        """Normalize ``x`` by its own statistics, which move the running averages, or by those.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          use_running_average: None for the attribute; must be given here or there, in Linen not in both.
          mask: as in `jaxnorm.standardize`.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``use_running_average`` is not given, or an argument does not fit.
          flax.errors.ScopeParamShapeError: in Linen, of other features than at initialization; in NNX a ValueError.
        """
        return self._output(x, use_running_average=use_running_average, mask=mask)


class Finished:
    """With running averages, a residual and an activation."""

    def __call__(
        self: Any,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize ``x`` by its own statistics, which move the running averages, or by those.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          use_running_average: None for the attribute; must be given here or there, in Linen not in both.
          mask: as in `jaxnorm.standardize`.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``use_running_average`` is not given, or an argument does not fit.
          flax.errors.ScopeParamShapeError: in Linen, of other features than at initialization; in NNX a ValueError.
        """
        settings = {"mask": mask, "residual": residual, "activation": self.activation}
        return self._output(x, use_running_average=use_running_average, **settings)


class OfDomains:
    """With running averages of every domain."""

    def __call__(
        self: Any,
        x: Array,
        domain: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> jax.Array:
        """Normalize every example of ``x`` with those of its domain, or by the running averages of that.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          domain: integers of shape ``(batch,)``, from zero to ``num_domains - 1``.
          use_running_average: None for the attribute; must be given here or there, in Linen not in both.
          mask: as in `jaxnorm.standardize`.
          residual: array of the shape of ``x``, added before the activation.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``use_running_average`` is not given, or an argument does not fit.
          flax.errors.ScopeParamShapeError: in Linen, of other features than at initialization; in NNX a ValueError.
        """
        settings = {"mask": mask, "residual": residual, "activation": self.activation}
        return self._output(x, domain, use_running_average=use_running_average, **settings)


class OfSteps:
    """With running averages of every time step."""

    def __call__(
        self: Any, x: Array, lengths: Array | None = None, use_running_average: bool | None = None
    ) -> jax.Array:
        """Normalize every time step of ``x`` by its own statistics, which move its running averages, or by those.

        Args:
          x: array of shape ``(batch, time, *features)``.
          lengths: integers of shape ``(batch,)``: how many steps of each sequence count; None for all.
          use_running_average: None for the attribute; must be given here or there, in Linen not in both.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``use_running_average`` is not given, or the sequences are longer than ``max_length`` and
            normalized by their own statistics.
          flax.errors.ScopeParamShapeError: in Linen, of other features than at initialization; in NNX a ValueError.
        """
        mask = None
        if lengths is not None:
            mask = jnp.expand_dims(jaxnorm.length_mask(lengths, jnp.shape(x)[1]), range(2, jnp.ndim(x)))
        return self._output(x, use_running_average=use_running_average, mask=mask, activation=self.activation)


class Conditioned:
    """Of examples, each by itself and with scale and bias of its own."""

    def __call__(self: Any, x: Array, condition: Array, *, mask: Array | None = None) -> jax.Array:
        """Normalize every example of ``x`` by itself, with scale and bias from ``condition``.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``.
          mask: as in `jaxnorm.standardize`.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: an argument does not fit.
          flax.errors.ScopeParamShapeError: in Linen, of other features than at initialization; in NNX a ValueError.
        """
        scale, bias = self._modulation(x, condition)
        return self._output(x, parameters={"scale": scale, "bias": bias}, mask=mask)


class ConditionedAveraged:
    """With running averages, and scale and bias of each example."""

    def __call__(
        self: Any, x: Array, condition: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> jax.Array:
        """Normalize ``x`` by its own statistics, which move the running averages, or by those.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``, from which scale and bias are computed.
          use_running_average: None for the attribute; must be given here or there, in Linen not in both.
          mask: as in `jaxnorm.standardize`.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: ``use_running_average`` is not given, or an argument does not fit.
          flax.errors.ScopeParamShapeError: in Linen, of other features than at initialization; in NNX a ValueError.
        """
        scale, bias = self._modulation(x, condition)
        settings = {"mask": mask, "activation": self.activation, "parameters": {"scale": scale, "bias": bias}}
        return self._output(x, use_running_average=use_running_average, **settings)


class Gated:
    """Of examples, with a gate."""

    def __call__(self: Any, x: Array, condition: Array) -> tuple[jax.Array, jax.Array]:
        """Normalize every example of ``x`` by itself, with scale, bias and gate from ``condition``.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``.

        Returns:
          An array of the shape of ``x``; and the gate, zero at first, in a shape that broadcasts against it.

        Raises:
          ValueError: an argument does not fit.
        """
        scale, bias, gate = self._modulation(x, jax.nn.silu(condition), parts=3)
        x = jnp.asarray(x)
        x = x.astype(jnp.result_type(x, scale))
        y = jaxnorm.layer_norm(x, scale, bias, axis=self.axis, epsilon=self.epsilon)
        return y, _axes.expand(gate, (0, self.axis % x.ndim), x.ndim)


class Modulated:
    """Of examples that are not normalized."""

    def __call__(self: Any, x: Array, condition: Array) -> jax.Array:
        """Scale and shift every example of ``x`` by what is computed from ``condition``.

        Args:
          x: array of shape ``(batch, ...)`` with the features on ``axis``.
          condition: array of shape ``(batch, conditions)``.

        Returns:
          An array of the shape of ``x``.
        """
        x = jnp.asarray(x)
        scale, bias = (_axes.expand(v, (0, self.axis % x.ndim), x.ndim) for v in self._modulation(x, condition))
        return x * scale + bias


class Styled:
    """Of examples, by the statistics of others."""

    def __call__(self: Any, x: Array, style: Array) -> jax.Array:
        """Give the content ``x`` the mean and the deviation of every example and channel of ``style``.

        Args:
          x: array of shape ``(batch, ...)`` with the channels on ``axis``.
          style: array of shape ``(batch, ...)`` with as many channels on ``axis``; the other axes may have other sizes.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: examples or channels are not as many in both.
        """
        feature = self.axis % jnp.ndim(style)
        of_style = jaxnorm.moments(style, tuple(a for a in range(1, jnp.ndim(style)) if a != feature))
        deviation = jnp.sqrt(of_style.var + self.epsilon)
        return jaxnorm.instance_norm(x, deviation, of_style.mean, axis=self.axis, epsilon=self.epsilon)
