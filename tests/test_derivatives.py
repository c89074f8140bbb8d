"""Forward mode, second derivatives, weights; and what is kept for the backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import compile_as_written, quick_first

import jaxnorm

pytestmark = pytest.mark.any_version

SHAPE = (6, 4, 5, 4)


def naive(norm, x, scale, bias, weights):
    """The definitions, for jax to differentiate in float64: two passes, no rule, no shift."""
    x, w = (x.reshape(*SHAPE[:-1], 2, 2), weights.reshape(*SHAPE[:-1], 2, 2)) if norm == "group" else (x, weights)
    axes = {"batch": (0, 1, 2), "layer": (3,), "rms": (3,), "group": (1, 2, 4), "instance": (1, 2)}[norm]
    n = jnp.sum(w, axes, keepdims=True)
    mean = 0.0 if norm == "rms" else jnp.sum(w * x, axes, keepdims=True) / n
    centered = x - mean
    var = jnp.sum(w * (centered * centered.conj()).real, axes, keepdims=True) / n
    y = (centered / jnp.sqrt(var + 1e-3)).reshape(SHAPE)
    return y * scale.reshape(1, 1, 1, -1) + (0 if norm == "rms" else bias.reshape(1, 1, 1, -1))


def ours(norm, x, scale, bias, weights):
    kwargs = {"epsilon": 1e-3, "mask": weights}
    if norm == "batch":
        return jaxnorm.batch_norm(x, scale, bias, **kwargs)[0]
    if norm == "rms":
        return jaxnorm.rms_norm(x, scale, **kwargs)
    if norm == "group":
        return jaxnorm.group_norm(x, scale, bias, num_groups=2, **kwargs)
    return {"layer": jaxnorm.layer_norm, "instance": jaxnorm.instance_norm}[norm](x, scale, bias, **kwargs)


def draw(rng, dtype=np.float64):
    def one(shape):
        value = rng.standard_normal(shape)
        return (value + 1j * rng.standard_normal(shape)).astype(dtype) if dtype == np.complex128 else value

    return one(SHAPE), rng.standard_normal(4), rng.standard_normal(4), rng.random(SHAPE) + 0.1


NORMS = ["batch", "layer", "rms", "group", "instance"]
close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)


def hessian_products(function, cotangent, primals, tangents, modes):
    """The Hessian of ``sum(sin(function) * cotangent)`` times the tangents: one value, however it is come by."""

    def loss(*args):
        return jnp.sum(jnp.sin(function(*args).astype(cotangent.dtype)) * cotangent)

    grad = jax.grad(loss, tuple(range(len(primals))))
    products = {
        "forward over reverse": lambda: jax.jvp(grad, primals, tangents)[1],
        "reverse over reverse": lambda: jax.vjp(grad, *primals)[1](tangents),
        "reverse over forward": lambda: jax.grad(lambda *p: jax.jvp(loss, p, tangents)[1], range(len(primals)))(
            *primals
        ),
    }
    return {mode: products[mode]() for mode in modes}


MODES = ["forward over reverse", "reverse over reverse", "reverse over forward"]


@pytest.mark.parametrize("norm", NORMS)
class TestAgainstNaive:
    """In float64 the two must agree to rounding: a wrong rule cannot."""

    def test_derivatives(self, rng, x64, norm, compiled):
        """First and second, in all modes, for all four arguments, the weights included."""

        def derivatives(function, modes):
            @jax.jit
            def run(primals, tangents, cotangent):
                y, tangent = jax.jvp(function, primals, tangents)
                gradients = jax.vjp(function, *primals)[1](cotangent)
                return y, tangent, gradients, hessian_products(function, cotangent, primals, tangents, modes)

            return run(*arguments)

        arguments = draw(rng), draw(rng), rng.standard_normal(SHAPE)
        modes = MODES if compiled == "together" else MODES[:1]
        *mine, second = derivatives(partial(ours, norm), modes)
        *theirs, expected = derivatives(partial(naive, norm), MODES[:1])
        jax.tree.map(close, mine, theirs)
        for mode in modes:
            jax.tree.map(partial(close, err_msg=mode), second[mode], expected[MODES[0]])

    def test_complex(self, rng, x64, norm):
        (x, *others), (t, *_) = draw(rng, np.complex128), draw(rng, np.complex128)

        def derivatives(function):
            def of_x(x):
                return function(norm, x, *others)

            return jax.jit(lambda x, t: (jax.jvp(of_x, (x,), (t,))[1], jax.vjp(of_x, x)[1](t)[0]))(x, t)

        jax.tree.map(close, derivatives(ours), derivatives(naive))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("norm", quick_first(1, NORMS))
def test_bfloat16(rng, x64, norm):
    """Arithmetic and sums are float32: what is in bfloat16 is rounded once, and what is not, not at all."""

    def draw_with(x):
        return jnp.asarray(x, jnp.bfloat16), *(jnp.asarray(rng.standard_normal(4), jnp.float32) for _ in range(2))

    # of this data every norm has a variance of about 1.25
    primals = draw_with(rng.permuted(np.broadcast_to([-1.5, -0.5, 0.5, 1.5], SHAPE), axis=-1))
    far = draw_with(64 + rng.standard_normal(SHAPE))
    near, cotangent = draw_with(rng.standard_normal(SHAPE)), jnp.asarray(rng.standard_normal(SHAPE), jnp.bfloat16)
    weights = rng.standard_normal(SHAPE)

    def derivatives(function, dtype, modes):
        @compile_as_written
        def run(primals, far, near, cotangent, weights):
            tangent = jax.jvp(function, primals, far)[1]
            gradients = jax.vjp(function, *primals)[1](cotangent.astype(dtype))
            return tangent, gradients, hessian_products(function, weights, primals, near, modes)

        arguments = (primals, far, near, cotangent)
        if dtype == jnp.float64:  # so that not even the reference is rounded
            arguments = jax.tree.map(lambda a: a.astype(dtype), arguments)
        return run(*arguments, weights)

    def exactly(*primals):
        return naive(norm, *primals, jnp.ones(SHAPE))

    tangent, gradients, second = derivatives(lambda *p: ours(norm, *p, None), jnp.bfloat16, MODES[:2])
    exact = jax.tree.map(partial(np.asarray, dtype=np.float64), derivatives(exactly, jnp.float64, MODES[:1]))

    # where the tangents of data and mean nearly cancel, a rounding of each of them would show
    assert tangent.dtype == jnp.bfloat16
    largest = 64 * np.abs(primals[1]).max()  # of what is added up
    bound = 2.0**-8 * np.abs(exact[0]) + 4 * 2.0**-17 * largest
    np.testing.assert_array_less(np.abs(np.asarray(tangent, np.float64) - exact[0]), bound)

    for g, e in zip(gradients, exact[1], strict=True):
        rounding = 2.0**-8 if g.dtype == jnp.bfloat16 else 0
        bound = rounding * np.abs(e) + 2.0**-24 * 120 * (1 + np.abs(e).max())  # sums of up to 120 in float32
        np.testing.assert_array_less(np.abs(np.asarray(g, np.float64) - e), bound)

    # the first derivatives, which are in bfloat16 in between, leave some roundings
    for mode in MODES[:2]:
        for got, e in zip(second[mode], exact[2][MODES[0]], strict=True):
            got = np.asarray(got, np.float64)
            np.testing.assert_allclose(got, e, rtol=0, atol=8 * 2.0**-8 * np.abs(e).max(), err_msg=mode)


@pytest.mark.usefixtures("compiled")
def test_third_derivative(rng, x64):
    x, cotangent = rng.standard_normal(7), rng.standard_normal(7)

    def third(function):
        def loss(s):
            return jnp.sum(function(jnp.sin(s * x)) * cotangent)

        return jax.jit(jax.grad(jax.grad(jax.grad(loss))))(1.1)

    mine = third(partial(jaxnorm.layer_norm, epsilon=1e-3))
    close(mine, third(lambda x: (x - x.mean()) / jnp.sqrt(x.var() + 1e-3)))


@pytest.mark.usefixtures("compiled")
def test_gradients_of_the_statistics(rng, x64):
    """`moments`, and the moments that `batch_norm` returns, are differentiated as well."""
    x, w = rng.standard_normal((9, 3)), rng.random((9, 1)) + 0.1
    a, b, c = rng.standard_normal((3, 3))

    def naive_loss(x, w):
        n = jnp.sum(w * jnp.ones_like(x), 0)
        mean = jnp.sum(w * x, 0) / n
        return jnp.sum(a * mean + b * jnp.sum(w * (x - mean[None]) ** 2, 0) / n + c * n)

    def loss(function, x, w):
        m = function(x, w)
        return jnp.sum(a * m.mean + b * m.var + c * m.count)

    expected = jax.jit(jax.grad(naive_loss, (0, 1)))(x, w)
    for function in (lambda x, w: jaxnorm.moments(x, 0, mask=w), lambda x, w: jaxnorm.batch_norm(x, mask=w)[1]):
        for mine, e in zip(jax.jit(jax.grad(partial(loss, function), (0, 1)))(x, w), expected, strict=True):
            close(mine, e)


def test_a_mean_fixed_at_zero_has_no_derivative(rng):
    x = jnp.asarray(rng.standard_normal((9, 3)), jnp.float32)

    def means(x):
        return jaxnorm.standardize(x, axes=0, centered=False)[1].mean

    np.testing.assert_array_equal(jax.jvp(means, (x,), (jnp.ones_like(x),))[1], 0)


def test_gradient_of_merged_moments_at_zero_variance():
    constant = lambda var: jaxnorm.Moments(jnp.zeros(1), var, jnp.full(1, 4.0))  # noqa: E731
    gradient = jax.jit(jax.grad(lambda v: jaxnorm.merge_moments(constant(v), constant(jnp.zeros(1))).var[0]))
    np.testing.assert_array_equal(gradient(jnp.zeros(1)), 0.5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("norm", NORMS)
def test_residuals(norm, dtype, masked):
    """Kept for the backward pass: the input in its own dtype, the mask as given, vectors; nothing else."""
    x, vector = jax.ShapeDtypeStruct((16, 8, 8, 4), dtype), jax.ShapeDtypeStruct((4,), jnp.float32)
    mask = jax.ShapeDtypeStruct((16, 8, 8, 1), bool) if masked else None

    def pullback(x, scale, bias, mask):
        return jax.vjp(lambda x, s, b: ours_unweighted(norm, x, s, b, mask), x, scale, bias)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, x, vector, vector, mask))
    per_set = {"layer": 16 * 8 * 8, "rms": 16 * 8 * 8, "instance": 16 * 4, "group": 16 * 4, "batch": 4}[norm]
    large = [k for k in kept if k.size > per_set]
    assert [(k.shape, k.dtype) for k in large if k.dtype != bool] == [(x.shape, x.dtype)]
    masks = [k.shape for k in kept if k.dtype == bool and k.shape[1] > 1]
    assert masks == ([mask.shape] if masked else [])
    assert all(k.dtype == jnp.float32 for k in kept if k.size <= per_set and k.dtype != bool)


def ours_unweighted(norm, x, scale, bias, mask):
    function = {
        "batch": lambda: jaxnorm.batch_norm(x, scale, bias, mask=mask)[0],
        "layer": lambda: jaxnorm.layer_norm(x, scale, bias, mask=mask),
        "rms": lambda: jaxnorm.rms_norm(x, scale, mask=mask),
        "group": lambda: jaxnorm.group_norm(x, scale, bias, num_groups=2, mask=mask),
        "instance": lambda: jaxnorm.instance_norm(x, scale, bias, mask=mask),
    }[norm]
    return function()


def test_residuals_at_inference():
    x = jax.ShapeDtypeStruct((16, 8, 8, 4), jnp.bfloat16)
    vectors = [jax.ShapeDtypeStruct((4,), jnp.float32)] * 4
    pullback = jax.eval_shape(
        lambda *args: jax.vjp(lambda x, m, v, *p: jaxnorm.normalize(x, (m, v), *p), *args)[1], x, *vectors
    )
    assert [(k.shape, k.dtype) for k in jax.tree.leaves(pullback) if k.size > 4] == [(x.shape, x.dtype)]


def primitives(jaxpr, name):
    """How often a primitive is called, by jaxprs within as well."""
    total = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    for value in jax.tree.leaves([eqn.params for eqn in jaxpr.eqns], is_leaf=lambda v: hasattr(v, "eqns")):
        total += primitives(value, name) if hasattr(value, "eqns") else 0
    return total


def test_second_backward_pass_repeats_no_statistics(rng):
    """Under a user's own `jax.checkpoint`, keeping "jaxnorm_stats" spares the reductions."""
    x = jnp.asarray(rng.standard_normal((64, 16, 16, 8)), jnp.float32)

    def sums(policy):
        block = jax.checkpoint(lambda x: jnp.sin(jaxnorm.batch_norm(jnp.cos(x))[0]), policy=policy, prevent_cse=True)
        return primitives(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(block(x) ** 2)))(x), "reduce_sum")

    keep = jax.checkpoint_policies.save_only_these_names("jaxnorm_stats")
    assert sums(keep) < sums(None)
