"""Forward mode, second derivatives, weights; and what is kept for the backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

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


@pytest.mark.parametrize("norm", NORMS)
class TestAgainstNaive:
    """In float64 the two must agree to rounding: a wrong rule cannot."""

    @pytest.mark.usefixtures("compiled")
    def test_jvp(self, rng, x64, norm):
        """For all four arguments, the weights included."""
        primals, tangents = draw(rng), draw(rng)
        for mine, theirs in zip(
            jax.jvp(partial(ours, norm), primals, tangents),
            jax.jvp(partial(naive, norm), primals, tangents),
            strict=True,
        ):
            close(mine, theirs)

    @pytest.mark.usefixtures("compiled")
    def test_vjp(self, rng, x64, norm):
        primals, cotangent = draw(rng), rng.standard_normal(SHAPE)
        mine = jax.vjp(partial(ours, norm), *primals)[1](cotangent)
        theirs = jax.vjp(partial(naive, norm), *primals)[1](cotangent)
        for a, b in zip(mine, theirs, strict=True):
            close(a, b)

    @pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse", "reverse over forward"])
    def test_second_derivatives(self, rng, x64, norm, mode):
        primals, tangents = draw(rng), draw(rng)
        cotangent = rng.standard_normal(SHAPE)

        def hessian_product(function):
            def loss(*args):
                return jnp.sum(jnp.sin(function(norm, *args)) * cotangent)

            grad = jax.grad(loss, (0, 1, 2, 3))
            if mode == "forward over reverse":
                return jax.jvp(grad, primals, tangents)[1]
            if mode == "reverse over forward":
                return jax.grad(lambda *p: jax.jvp(loss, p, tangents)[1], (0, 1, 2, 3))(*primals)
            return jax.vjp(grad, *primals)[1](tangents)

        for a, b in zip(hessian_product(ours), hessian_product(naive), strict=True):
            close(a, b)

    def test_complex(self, rng, x64, norm):
        (x, scale, bias, weights), (t, *_) = draw(rng, np.complex128), draw(rng, np.complex128)
        for function in (
            lambda f: jax.jvp(lambda x: f(norm, x, scale, bias, weights), (x,), (t,))[1],
            lambda f: jax.vjp(lambda x: f(norm, x, scale, bias, weights), x)[1](t)[0],
        ):
            close(function(ours), function(naive))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("norm", NORMS)
class TestBfloat16:
    """Arithmetic and sums are float32: what is in bfloat16 is rounded once, and what is not, not at all."""

    def functions(self, norm):
        return (
            lambda x, scale, bias: ours(norm, x, scale, bias, None),
            lambda *p: naive(norm, *(jnp.asarray(a, jnp.float64) for a in p), jnp.ones(SHAPE)),
        )

    def draw(self, rng, x):
        return jnp.asarray(x, jnp.bfloat16), *(jnp.asarray(rng.standard_normal(4), jnp.float32) for _ in range(2))

    def primals(self, rng):
        """Of which every norm has a variance of about 1.25."""
        return self.draw(rng, rng.permuted(np.broadcast_to([-1.5, -0.5, 0.5, 1.5], SHAPE), axis=-1))

    def test_jvp(self, rng, x64, norm):
        """Where the tangents of data and mean nearly cancel, so that a rounding of each of them would show."""
        primals, tangents = self.primals(rng), self.draw(rng, 64 + rng.standard_normal(SHAPE))
        got, expected = (jax.jvp(f, primals, tangents)[1] for f in self.functions(norm))
        assert got.dtype == jnp.bfloat16
        largest = 64 * np.abs(primals[1]).max()  # of what is added up
        bound = 2.0**-8 * np.abs(expected) + 4 * 2.0**-17 * largest
        np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - expected), bound)

    def test_vjp(self, rng, x64, norm):
        primals, cotangent = self.primals(rng), jnp.asarray(rng.standard_normal(SHAPE), jnp.bfloat16)
        got, expected = (jax.vjp(f, *primals) for f in self.functions(norm))
        for g, e in zip(got[1](cotangent), expected[1](cotangent.astype(jnp.float64)), strict=True):
            rounding = 2.0**-8 if g.dtype == jnp.bfloat16 else 0
            e = np.asarray(e, np.float64)
            bound = rounding * np.abs(e) + 2.0**-24 * 120 * (1 + np.abs(e).max())  # sums of up to 120 in float32
            np.testing.assert_array_less(np.abs(np.asarray(g, np.float64) - e), bound)

    @pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
    def test_second_derivatives(self, rng, x64, norm, mode):
        """The first derivatives, which are in bfloat16 in between, leave some roundings."""
        primals, tangents, c = self.primals(rng), self.draw(rng, rng.standard_normal(SHAPE)), rng.standard_normal(SHAPE)

        def hessian_product(function):
            grad = jax.grad(lambda *p: jnp.sum(jnp.sin(function(*p).astype(jnp.float32)) * c), (0, 1, 2))
            if mode == "forward over reverse":
                return jax.jvp(grad, primals, tangents)[1]
            return jax.vjp(grad, *primals)[1](tangents)

        for got, expected in zip(*map(hessian_product, self.functions(norm)), strict=True):
            got, expected = (np.asarray(v, np.float64) for v in (got, expected))
            np.testing.assert_allclose(got, expected, rtol=0, atol=8 * 2.0**-8 * np.abs(expected).max())


@pytest.mark.usefixtures("compiled")
def test_third_derivative(rng, x64):
    x, cotangent = rng.standard_normal(7), rng.standard_normal(7)

    def third(function):
        def loss(s):
            return jnp.sum(function(jnp.sin(s * x)) * cotangent)

        return jax.grad(jax.grad(jax.grad(loss)))(1.1)

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

    expected = jax.grad(naive_loss, (0, 1))(x, w)
    for function in (lambda x, w: jaxnorm.moments(x, 0, mask=w), lambda x, w: jaxnorm.batch_norm(x, mask=w)[1]):
        for mine, e in zip(jax.grad(partial(loss, function), (0, 1))(x, w), expected, strict=True):
            close(mine, e)


def test_gradient_of_merged_moments_at_zero_variance():
    constant = lambda var: jaxnorm.Moments(jnp.zeros(1), var, jnp.full(1, 4.0))  # noqa: E731
    gradient = jax.grad(lambda v: jaxnorm.merge_moments(constant(v), constant(jnp.zeros(1))).var[0])(jnp.zeros(1))
    np.testing.assert_array_equal(gradient, 0.5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("norm", NORMS)
def test_residuals(rng, norm, dtype, masked):
    """Kept for the backward pass: the input in its own dtype, the mask as given, vectors; nothing else."""
    x = jnp.asarray(rng.standard_normal((16, 8, 8, 4)), dtype)
    mask = jnp.asarray(rng.random((16, 8, 8, 1)) < 0.5) if masked else None
    scale, bias = jnp.ones(4), jnp.zeros(4)
    _, pullback = jax.vjp(lambda x, s, b: ours_unweighted(norm, x, s, b, mask), x, scale, bias)
    kept = jax.tree.leaves(pullback)
    per_set = {"layer": 16 * 8 * 8, "rms": 16 * 8 * 8, "instance": 16 * 4, "group": 16 * 4, "batch": 4}[norm]
    large = [k for k in kept if k.size > per_set]
    assert [(k.shape, k.dtype) for k in large if k.dtype != bool] == [(x.shape, x.dtype)]
    masks = [k.shape for k in kept if k.dtype == bool]
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


def test_residuals_at_inference(rng):
    x = jnp.asarray(rng.standard_normal((16, 8, 8, 4)), jnp.bfloat16)
    vectors = [jnp.ones(4)] * 4
    _, pullback = jax.vjp(lambda x, m, v, *p: jaxnorm.normalize(x, (m, v), *p), x, *vectors)
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
