"""What takes a program apart: jax.export, Taylor mode, and converters of jaxprs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import jet

import jaxnorm

NORMS = {
    "batch_norm": lambda x, s, b, **kw: jaxnorm.batch_norm(x, s, b, **kw)[0],
    "normalize": lambda x, s, b, **kw: jaxnorm.normalize(x, (s, b**2 + 1), s, b, **kw),
    "layer_norm": jaxnorm.layer_norm,
    "rms_norm": lambda x, s, b, **kw: jaxnorm.rms_norm(x, s, **kw),
    "group_norm": partial(jaxnorm.group_norm, num_groups=2),
    "instance_norm": jaxnorm.instance_norm,
}


def draw(rng, shape):
    return tuple(rng.standard_normal(s).astype(np.float32) for s in (shape, (4,), (4,)))


def primitives(jaxpr):
    """The names of all primitives, of jaxprs within as well."""
    found = {eqn.primitive.name for eqn in jaxpr.eqns}
    for value in jax.tree.leaves([eqn.params for eqn in jaxpr.eqns], is_leaf=lambda v: hasattr(v, "eqns")):
        value = getattr(value, "jaxpr", value)
        found |= primitives(value) if hasattr(value, "eqns") else set()
    return found


@pytest.mark.parametrize("norm", NORMS)
def test_export_with_symbolic_shapes(rng, norm):
    """Forward and gradients, of any batch and any size of image, by one program."""
    batch, height = export.symbolic_shape("n, h")
    x = jax.ShapeDtypeStruct((batch, height, 6, 4), jnp.float32)
    vector = jax.ShapeDtypeStruct((4,), jnp.float32)

    def step(x, scale, bias):
        y, pullback = jax.vjp(NORMS[norm], x, scale, bias)
        return y, *pullback(jnp.sin(y))

    exported = export.export(jax.jit(step))(x, vector, vector)
    for shape in ((3, 5, 6, 4), (2, 17, 6, 4)):
        args = draw(rng, shape)
        for a, e in zip(exported.call(*args), jax.jit(step)(*args), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_jet(rng, norm):
    """Taylor mode gives what nested forward mode gives, large arrays included, for which a CPU has a conditional."""
    x, scale, bias = draw(rng, (2, 128, 128, 4))
    direction = draw(rng, x.shape)[0]

    def along(t):
        return NORMS[norm](x + t * direction, scale, bias, epsilon=0.1)

    def derivative(function):
        return lambda t: jax.jvp(function, (t,), (1.0,))[1]

    first, second = jax.jit(lambda t: (derivative(along)(t), derivative(derivative(along))(t)))(0.0)
    _, (one, two) = jax.jit(lambda t: jet.jet(along, (t,), ((1.0, 0.0),)))(0.0)  # of functions not yet compiled
    np.testing.assert_allclose(one, first, rtol=0, atol=1e-5 * np.abs(first).max())
    np.testing.assert_allclose(two, second, rtol=0, atol=1e-4 * np.abs(second).max())


@pytest.mark.parametrize("norm", NORMS)
def test_what_nobody_differentiates_is_plain(compiled, rng, norm):
    """No choice of a platform, no checkpoint, no barrier, which converters to other formats do not know."""
    used = primitives(jax.make_jaxpr(NORMS[norm])(*draw(rng, (8, 6, 6, 4))).jaxpr)
    assert "rsqrt" in used or "sqrt" in used
    assert not used & {"platform_index", "checkpoint", "remat2", "optimization_barrier", "cond", "while"}
