"""Activation, residual and the invertible mode: values, gradients, what is kept, in every mapped context."""

from contextlib import contextmanager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import test_contexts
from checks import assert_close, compile_as_written, tolerance
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import _moments, _rule, _xla

SHAPE = (6, 4, 5, 4)
NORMS = {
    "batch": lambda x, scale, bias, **kw: jaxnorm.batch_norm(x, scale, bias, **kw)[0],
    "layer": jaxnorm.layer_norm,
    "rms": lambda x, scale, bias, **kw: jaxnorm.rms_norm(x, scale, **kw),
    "group": partial(jaxnorm.group_norm, num_groups=2),
    "instance": jaxnorm.instance_norm,
    "given": lambda x, scale, bias, **kw: jaxnorm.normalize(x, (30 + scale, 1 + bias**2), scale, bias, **kw),
}
NUMPY = {
    None: lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z >= 0, z, 0.01 * z),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "softplus": lambda z: np.log1p(np.exp(z)),
    "tanh": np.tanh,
}
UNDONE = (None, "leaky_relu", "softplus", jaxnorm.InvertibleActivation(jnp.arcsinh, jnp.sinh))


def draw(rng, dtype=np.float32):
    """x, scale, bias, residual and cotangent. No scale is near zero: recovering x divides by it."""
    x, residual, cotangent = (rng.standard_normal(SHAPE) for _ in range(3))
    scale, bias = (rng.uniform(0.5, 1.5, SHAPE[-1]) * rng.choice([-1, 1], SHAPE[-1]) for _ in range(2))
    return tuple(np.asarray(a, dtype) for a in (2 * x + 30, scale, bias, residual, cotangent))


@contextmanager
def as_for(platform):
    """What is said to XLA is what it is told for another platform."""

    with pytest.MonkeyPatch.context() as patch:
        for module in (_xla, _moments, _rule):
            patch.setattr(module, "platform", lambda *arrays: platform)
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()


@pytest.fixture(params=["in turn", "by parts"])
def differentiated(request):
    """An activation after the norm, as on a CPU; or with each part of the norm's derivative, as on a GPU."""
    with as_for("gpu") if request.param == "by parts" else nullcontext():
        yield


@pytest.mark.parametrize("invertible", [False, True], ids=["", "invertible"])
@pytest.mark.parametrize("activation", NUMPY)
@pytest.mark.parametrize("norm", ["batch", "layer", "rms"])
def test_values(rng, norm, activation, invertible):
    """Against NumPy in float64."""
    if invertible and activation not in UNDONE:
        pytest.skip("cannot be undone")
    x, scale, bias, residual, _ = draw(rng)
    args = (oracles.labels_of(norm, SHAPE), oracles.features_of(SHAPE), scale, 0 * bias if norm == "rms" else bias)
    z = oracles.normalize(x, *args, 1e-5, None, centered=norm != "rms") + residual
    y = NORMS[norm](x, scale, bias, epsilon=1e-5, activation=activation, residual=residual, invertible=invertible)
    assert_close(y, NUMPY[activation](z), 120)


def derivatives(norm, args, invertible, activation, direction):
    """Forward, reverse, and forward over reverse."""
    cotangent = args[4]

    def loss(x, scale, bias, residual):
        y = NORMS[norm](x, scale, bias, activation=activation, residual=residual, invertible=invertible)
        return jnp.sum(jnp.sin(y) * cotangent)

    def run(primals, direction):
        tangent = jax.jvp(loss, primals, direction)[1]
        gradients, product = jax.jvp(jax.grad(loss, (0, 1, 2, 3)), primals, direction)
        return {"forward": (tangent,), "reverse": gradients, "forward over reverse": product}

    return jax.jit(run)(args[:4], direction)


@pytest.mark.parametrize(
    ("norm", "activation"),
    [("batch", a) for a in UNDONE] + [(n, "leaky_relu") for n in NORMS if n != "batch"],
    ids=lambda p: p.forward.__name__ if isinstance(p, jaxnorm.InvertibleActivation) else str(p),
)
def test_invertible_derivatives(rng, x64, norm, activation):
    """In float64, the same as without: the rule itself was compared with the definitions in test_derivatives."""
    args = draw(rng, np.float64)
    direction = tuple(rng.standard_normal(a.shape) for a in args[:4])
    actual, expected = (derivatives(norm, args, i, activation, direction) for i in (True, False))
    for mode in expected:
        for a, e in zip(actual[mode], expected[mode], strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-11 * max(1, np.abs(e).max()), err_msg=mode)


@pytest.mark.parametrize(("norm", "activation"), [("batch", "leaky_relu"), ("batch", "silu"), ("instance", None)])
def test_every_way_of_the_derivative(rng, x64, norm, activation):
    """Forward, reverse and forward over reverse in float64: as for chips and as for a CPU, invertible or not."""
    args = draw(rng, np.float64)
    direction = tuple(rng.standard_normal(a.shape) for a in args[:4])
    expected = derivatives(norm, args, activation == "leaky_relu", activation, direction)
    for platform in ("gpu", "tpu"):
        with as_for(platform):
            actual = derivatives(norm, args, activation == "leaky_relu", activation, direction)
        for mode in expected:
            for a, e in zip(actual[mode], expected[mode], strict=True):
                np.testing.assert_allclose(a, e, rtol=0, atol=1e-11 * max(1, np.abs(e).max()), err_msg=mode)


def test_two_sums_over_the_data_are_one_on_a_gpu(rng):
    """Of complex numbers: XLA for GPUs computes what one sum reads as it reads it, and stores what two of them read."""
    x, scale, bias, _, cotangent = draw(rng)

    def text(platform):
        def loss(x, scale, bias):
            return jnp.sum(jaxnorm.batch_norm(x, scale, bias)[0] * cotangent)

        with as_for(platform):
            return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, scale, bias).as_text()

    assert "complex" in text("gpu")
    assert "complex" not in text("tpu")
    assert "complex" not in text("cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
def test_invertible_gradients_are_exact_to_the_dtype(rng, norm, dtype):
    """What the output loses by rounding is all that the gradients lose."""
    x, scale, bias, residual, cotangent = draw(rng)
    x, residual, cotangent = (jnp.asarray(a, dtype) for a in (x, residual, cotangent))

    def gradients(invertible):
        def loss(x, scale, bias, residual):
            y = NORMS[norm](x, scale, bias, activation="leaky_relu", residual=residual, invertible=invertible)
            return jnp.sum(y.astype(jnp.float32) * cotangent.astype(jnp.float32))

        return compile_as_written(jax.grad(loss, (0, 1, 2, 3)))(x, scale, bias, residual)

    for a, e in zip(gradients(True), gradients(False), strict=True):
        # |y| is up to 6 here, |scale| at least a half: an error of y is 12 times as large in what is recovered
        allowed = 12 * (tolerance(dtype, 120)) * np.abs(np.asarray(e, np.float32)).max()
        assert np.abs(np.asarray(a, np.float32) - np.asarray(e, np.float32)).max() <= allowed


@pytest.mark.parametrize("context", test_contexts.CONTEXTS)
def test_invertible_in_context(rng, monkeypatch, context):
    """The contexts of test_contexts, with the input recovered from the output, groups and masks included."""
    groups, masked = (None if context in test_contexts.WITHOUT_REPLICAS else test_contexts.GROUPS), True
    monkeypatch.setattr(jaxnorm, "batch_norm", partial(jaxnorm.batch_norm, invertible=True))
    x, scale, bias, cotangent, mask = test_contexts.problem(rng, masked)
    args = x, np.sign(scale) * (np.abs(scale) + np.float32(0.5)), bias, cotangent, mask
    actual = test_contexts.CONTEXTS[context](args, groups)
    for a, e in zip(actual, test_contexts.expected(*args, groups), strict=True):
        assert_close(a, e, size=4 * np.prod(test_contexts.SHAPE[:-1]))


@pytest.mark.parametrize("invertible", [False, True], ids=["", "invertible"])
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_collectives(differentiated, rng, check_vma, invertible):
    """Activation, residual and recovery add none: one forward, one backward."""
    args = test_contexts.sharded_arguments(4, test_contexts.problem(rng, False))

    def loss(x, scale, bias, cotangent, mask):
        options = {"activation": "leaky_relu", "residual": cotangent, "invertible": invertible}
        y, _ = jaxnorm.batch_norm(x, scale, bias, axis_name="data", **options)
        return jnp.sum(jnp.tanh(y) * cotangent)

    data, specs = P("data"), (P("data"), P(), P(), P("data"), P("data"))
    mesh = test_contexts.mesh_of(4)
    step = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=data, check_vma=check_vma)
    assert test_contexts.collectives(step, *args) == 2


def kept(function, *args):
    """Shapes and dtypes of what is kept of the size of the data."""
    residuals = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))
    return sorted(str(a.dtype) for a in residuals if a.size == np.prod(SHAPE))


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_kept(rng, norm):
    """The input, or in the invertible mode the output, in its own dtype; and the residual, if any, in its own."""
    x, scale, bias, residual, _ = draw(rng)
    x, residual = jnp.asarray(x, jnp.bfloat16), jnp.asarray(residual, jnp.float16)

    def run(x, scale, bias, residual, **options):
        return NORMS[norm](x, scale, bias, activation="leaky_relu", residual=residual, **options)

    assert kept(run, x, scale, bias, residual) == ["bfloat16", "float16"]
    assert kept(partial(run, invertible=True), x, scale, bias, residual) == ["bfloat16", "float16"]
    assert kept(partial(run, invertible=True), x, scale, bias, None) == ["bfloat16"]
    text = str(jax.make_jaxpr(lambda *a: jax.vjp(partial(run, residual=None, invertible=True), *a)[1])(x, scale, bias))
    assert "jaxnorm_output" in text


@pytest.mark.parametrize("invertible", [False, True], ids=["", "invertible"])
@pytest.mark.parametrize("keeps", [True, False], ids=["keeping statistics", "keeping nothing"])
def test_names_for_remat(rng, keeps, invertible):
    """A user's own policy that keeps "jaxnorm_stats" repeats no reduction and no collective."""
    args = test_contexts.sharded_arguments(4, test_contexts.problem(rng, False))
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names("jaxnorm_stats") if keeps else policies.nothing_saveable

    def loss(x, scale, bias, cotangent, mask):
        @partial(jax.checkpoint, policy=policy)
        def block(x):
            return jaxnorm.batch_norm(jnp.sin(x), scale, bias, axis_name="data", invertible=invertible)[0]

        return jnp.sum(jnp.tanh(block(x)) * cotangent)

    data, specs = P("data"), (P("data"), P(), P(), P("data"), P("data"))
    step = jax.shard_map(jax.grad(loss), mesh=test_contexts.mesh_of(4), in_specs=specs, out_specs=data)
    lowered = jax.jit(step).lower(*args).as_text().count("stablehlo.all_reduce")
    assert lowered == (2 if keeps else 3) + invertible  # the repeated one is recognized as such when compiled
    if keeps:
        assert test_contexts.collectives(step, *args) == 2


@pytest.mark.parametrize("invertible", [False, True], ids=["", "invertible"])
@pytest.mark.parametrize("norm", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_layers(rng, norm, invertible):
    x, _, _, residual, _ = draw(rng)
    plain, options = ({"num_groups": 2} if norm == "GroupNorm" else {}), {"activation": "leaky_relu"}
    batch = {"use_running_average": False} if norm == "BatchNorm" else {}

    linen = [getattr(jaxnorm.linen, norm)(**plain, **batch, **o) for o in ({}, options | {"invertible": invertible})]
    variables = linen[0].init(jax.random.key(0), x)
    expected = jax.nn.leaky_relu(linen[0].apply(variables, x, mutable=["batch_stats"])[0] + residual)
    actual = linen[1].apply(variables, x, residual=residual, mutable=["batch_stats"])[0]
    assert_close(actual, np.asarray(expected), 4)

    layers = [
        getattr(jaxnorm.nnx, norm)(SHAPE[-1], **plain, **batch, **o, rngs=nnx.Rngs(0))
        for o in ({}, options | {"invertible": invertible})
    ]
    assert_close(layers[1](x, residual=residual), np.asarray(expected), 4)
    grads = [
        nnx.grad(lambda m, f=f: jnp.sum(jnp.sin(f(m))))(m)
        for m, f in zip(
            layers,
            (lambda m: jax.nn.leaky_relu(m(x) + residual), lambda m: m(x, residual=residual)),
            strict=True,
        )
    ]
    for a, e in zip(*map(jax.tree.leaves, reversed(grads)), strict=True):
        assert_close(a, np.asarray(e), 480, magnitude=10)  # sums of 120 terms of about one, which cancel


def test_layer_on_running_averages(rng):
    x, _, _, residual, _ = draw(rng)
    layer = jaxnorm.linen.BatchNorm(use_running_average=True, activation="relu")
    variables = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "batch_stats": {}}
    variables["batch_stats"] = {"mean": jnp.full(4, 30.0), "var": jnp.full(4, 4.0)}
    expected = np.maximum((x.astype(np.float64) - 30) / np.sqrt(4 + 1e-5) + residual, 0)
    assert_close(layer.apply(variables, x, residual=residual), expected, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "swoosh"}, ValueError, r"batch_norm: activation must be .* relu.*; got activation='swoosh'"),
        ({"activation": 3}, TypeError, "activation must be None, callable"),
        ({"activation": jnp.sum}, ValueError, r"activation must keep shape and dtype, \(6, 4, 5, 4\) and float32"),
        ({"activation": lambda z: z > 0}, ValueError, "activation must keep shape and dtype"),
        ({"residual": np.ones(4, np.float32)}, ValueError, r"residual must have the shape of x, \(6, 4, 5, 4\)"),
        ({"residual": np.ones(SHAPE, np.int32)}, TypeError, "residual must have a floating point"),
        ({"residual": np.ones(SHAPE, np.complex64)}, TypeError, "residual must be real where x is"),
        ({"invertible": True, "activation": "relu"}, ValueError, "take leaky_relu for relu; got activation='relu'"),
        ({"invertible": True, "activation": jnp.tanh}, ValueError, "invertible needs an activation that forgets"),
        ({"invertible": True, "scale": np.zeros(4)}, ValueError, "scale above 1.2e-07.*; got smallest=0.0"),
    ],
    ids=[f"error {i}" for i in range(10)],
)
def test_errors(rng, options, error, message):
    x, scale, *_ = draw(rng)
    with pytest.raises(error, match=message):
        jaxnorm.batch_norm(x, **{"scale": scale} | options)


def test_slopes(rng):
    """A leaky rectifier of any positive slope can be undone; one without slope cannot."""
    x, scale, bias, _, cotangent = draw(rng)

    def gradient(slope, invertible):
        activation = partial(jax.nn.leaky_relu, negative_slope=slope)
        run = partial(jaxnorm.batch_norm, activation=activation, invertible=invertible)
        return jax.jit(jax.grad(lambda x: jnp.sum(run(x, scale, bias)[0] * cotangent)))(x)

    for slope in (0.2, 3.0):
        assert_close(gradient(slope, True), np.asarray(gradient(slope, False)), 120)
    for slope in (0, -1.0):
        with pytest.raises(ValueError, match="positive negative_slope"):
            gradient(slope, True)


def test_scale_zero_under_jit(rng):
    """Known only when running, a zero cannot raise: its gradients are NaN, never wrong."""
    x, scale, *_, cotangent = draw(rng)
    scale = scale * [1, 0, 1, 1]
    grad = jax.jit(jax.grad(lambda x, s: jnp.sum(jaxnorm.batch_norm(x, s, invertible=True)[0] * cotangent), (0, 1)))
    d_x, d_scale = grad(x, jnp.asarray(scale, jnp.float32))
    np.testing.assert_array_equal(np.isnan(d_scale), [False, True, False, False])
    assert np.isfinite(np.asarray(d_x)[..., [0, 2, 3]]).all()


# What an activation closes over --------------------------------------------------------------------------------------


def learned(slope):
    return lambda z: jnp.where(z >= 0, z, slope * z)


@pytest.mark.parametrize("norm", NORMS)
def test_an_activation_may_close_over_arrays(differentiated, rng, norm):
    """Which are differentiated, traced or not, and seen anew at each call."""
    x, scale, bias, residual, cotangent = draw(rng)

    def inside(x, slope, residual):
        return jnp.sum(NORMS[norm](x, scale, bias, activation=learned(slope), residual=residual) * cotangent)

    def outside(x, slope, residual):
        return jnp.sum(learned(slope)(NORMS[norm](x, scale, bias) + residual) * cotangent)

    args = (x, np.float32(0.3), residual)
    actual, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*args) for f in (inside, outside))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, np.asarray(e), 480, magnitude=1.0)
    changed = {"slope": np.float32(2.0)}
    y = [NORMS[norm](x, activation=lambda z: changed["slope"] * z, scale=scale, bias=bias)]
    changed["slope"] = np.float32(4.0)
    y.append(NORMS[norm](x, activation=lambda z: changed["slope"] * z, scale=scale, bias=bias))
    np.testing.assert_array_equal(y[1], 2 * y[0])


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_replicas_share_what_an_activation_closes_over(differentiated, rng, check_vma):
    """Under shard_map: a slope that all replicas have, and its derivative."""
    x = rng.standard_normal(SHAPE).astype(np.float32)

    def gradients(x, slope, total=lambda v: v, **replicas):
        def loss(x, slope):
            y, _ = jaxnorm.batch_norm(x, activation=learned(slope), **replicas)
            return total(jnp.sum(jnp.sin(y) * x))

        of_x, of_slope = jax.grad(loss, (0, 1))(x, slope)
        return of_x, of_slope[None]

    # Checked, jax sums the gradient of what all replicas have; unchecked, each gives its own share.
    total = partial(jax.lax.psum, axis_name="data") if check_vma else lambda v: v
    step = partial(gradients, total=total, axis_name="data")
    outputs, mesh = (P("data"), P() if check_vma else P("data")), test_contexts.mesh_of(2)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("data"), P()), out_specs=outputs, check_vma=check_vma)
    args = x, np.float32(0.3)
    for a, e in zip(jax.jit(mapped)(*args), jax.jit(gradients)(*args), strict=True):
        assert_close(a if a.ndim > 1 else a.sum(keepdims=True), np.asarray(e), 480, magnitude=1.0)


def test_a_learned_inverse(rng):
    """An `InvertibleActivation` may close over arrays as well: of forward and of inverse."""
    x, scale, bias, residual, cotangent = draw(rng)

    def loss(slope, x, invertible):
        undone = jaxnorm.InvertibleActivation(learned(slope), lambda y: jnp.where(y >= 0, y, y / slope))
        y, _ = jaxnorm.batch_norm(x, scale, bias, activation=undone, residual=residual, invertible=invertible)
        return jnp.sum(y * cotangent)

    actual, expected = (jax.grad(partial(loss, invertible=i), (0, 1))(np.float32(0.3), x) for i in (True, False))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, np.asarray(e), 480, magnitude=12.0)


def test_a_new_function_compiles_nothing(rng):
    x = draw(rng)[0]
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if event.endswith("backend_compile_duration") else None
    )
    for n in range(3):
        jaxnorm.batch_norm(x, activation=lambda z: jnp.maximum(z, 0))
        if n == 0:
            assert compilations  # the listener hears them
            compilations.clear()
    assert not compilations


def test_every_name(rng):
    x = draw(rng)[0]
    for name in ("swish", "tanh", "sigmoid", "elu", "relu6", "mish", "celu", "hard_tanh", "squareplus"):
        expected = getattr(jax.nn, name)(jaxnorm.layer_norm(x))
        assert_close(jaxnorm.layer_norm(x, activation=name), np.asarray(expected))
        assert_close(jaxnorm.layer_norm(x, activation=partial(getattr(jax.nn, name))), np.asarray(expected))


# What cannot be recovered --------------------------------------------------------------------------------------------


def test_a_saturated_softplus(rng):
    """Of what has vanished, gradients stay finite; all others are as without."""
    x, scale, bias, _, cotangent = draw(rng)
    x[0, 0, 0, 1] = -3e5 * np.sign(scale[1])  # about 11 deviations from the mean

    def grad(invertible):
        def loss(x, scale, bias):
            y, _ = jaxnorm.batch_norm(
                x, scale * np.float32([1, 16, 1, 1]), bias, activation="softplus", invertible=invertible
            )
            return jnp.sum(y * cotangent)

        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    for a, e in zip(grad(True), grad(False), strict=True):
        assert np.isfinite(a).all()
        assert_close(a[..., [0, 2, 3]], np.asarray(e)[..., [0, 2, 3]], 480, magnitude=12.0)


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_a_scale_that_loses_everything_is_refused(scale):
    with pytest.raises(ValueError, match=r"^batch_norm: invertible needs a scale"):
        jaxnorm.batch_norm(np.eye(4, dtype=np.float32), np.full(4, scale, np.float32), invertible=True)
