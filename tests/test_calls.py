"""What a call costs and leaves behind, for every public function and every layer: programs, tracers, arrays."""

import gc
import inspect

import catalog
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def programs(call):
    """How many programs one call compiles."""
    COMPILED.clear()
    jax.block_until_ready(jax.tree.leaves(call()))
    return len(COMPILED)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def linen(name):
    """A function of variables, input and further inputs; and the variables."""
    _, inputs, averaged = catalog.LAYERS[name]
    layer = catalog.linen(name)
    variables = layer.init(jax.random.key(0), catalog.X, *inputs)
    return lambda v, *args: layer.apply(v, *args, mutable="batch_stats" if averaged else False), variables


def test_the_catalog_is_whole():
    """So that what is new is tried here too."""
    functions = {n for n in jaxnorm.__all__ if inspect.isfunction(getattr(jaxnorm, n))}
    assert functions - set(catalog.FUNCTIONS) == {"init_running", "save_statistics"}


@pytest.mark.parametrize("name", catalog.FUNCTIONS)
def test_functions_compile_once(name):
    """Three programs at most, and none in a second call, with whatever arrays."""
    function, arguments = catalog.FUNCTIONS[name]
    arguments = on_device(arguments)
    jax.clear_caches()
    first = programs(lambda: function(*arguments))
    assert 1 <= first <= (12 if name == "standardize" else 3)  # there with a function of the caller's between, as it is
    again = [programs(lambda: function(*jax.tree.map(lambda a: a.copy(), arguments))) for _ in range(2)]
    assert again == [0, 0] or again[1] == 0  # the copies are a program of their own


@pytest.mark.parametrize("name", catalog.LAYERS)
def test_layers_compile_once(name):
    _, inputs, _ = catalog.LAYERS[name]
    x, inputs = on_device((catalog.X, inputs))
    apply, variables = linen(name)
    layer = catalog.of_nnx(name)
    for call in (lambda: apply(variables, x, *inputs), lambda: layer(x, *inputs)):
        call()
        assert programs(call) == 0


@pytest.mark.parametrize("activation", ["relu", None, lambda z: jnp.maximum(z, 0)], ids=["named", "none", "function"])
def test_a_new_function_compiles_nothing(activation):
    """Where nobody differentiates: for an activation, and for what ``standardize`` adjusts."""
    x = on_device(catalog.X)

    def new():
        return activation if activation is None or isinstance(activation, str) else lambda z: jnp.maximum(z, 0)

    def call():
        return jaxnorm.standardize(x, axes=(0, 1), adjust=lambda s: s._replace(var=s.var * 4), activation=new())

    call()
    assert programs(call) == 0
    expected = jaxnorm.batch_norm(x)[0] / 2
    np.testing.assert_allclose(call()[0], expected if activation is None else np.maximum(expected, 0), atol=1e-5)


# Leaks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", catalog.FUNCTIONS)
def test_functions_leak_nothing(name, compiled):
    function, arguments = catalog.FUNCTIONS[name]
    with jax.checking_leaks():
        (jax.jit(lambda *a: function(*a)) if compiled else function)(*arguments)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", catalog.LAYERS)
def test_layers_leak_nothing(name, compiled):
    _, inputs, _ = catalog.LAYERS[name]
    apply, variables = linen(name)
    layer = catalog.of_nnx(name)
    with jax.checking_leaks():
        (jax.jit(lambda *a: apply(*a)) if compiled else apply)(variables, catalog.X, *inputs)
        (nnx.jit(lambda m, *a: m(*a)) if compiled else lambda m, *a: m(*a))(layer, catalog.X, *inputs)


def gated(gate):
    return lambda z: z * gate


@pytest.mark.parametrize("differentiated", [False, True])
def test_what_a_function_closes_over_leaks_nothing(differentiated):
    def norm(x, gate, half):
        adjust = lambda s: s._replace(var=s.var * half)  # noqa: E731
        y, _ = jaxnorm.standardize(x, axes=0, adjust=adjust, activation=gated(gate))
        return jnp.sum(jnp.sin(y))

    function = jax.grad(norm, (0, 1, 2)) if differentiated else norm
    with jax.checking_leaks():
        for wrapped in (function, jax.jit(lambda *a: function(*a))):
            wrapped(catalog.X, np.float32(2.0), np.float32(0.5))


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "standardize"])
def test_what_a_function_closed_over_is_freed(norm):
    """google/flax#5548: eagerly and under ``grad`` no array is kept, of an activation or of an ``adjust``."""
    x = jnp.ones((256, 64))

    def call(i):
        gate = jnp.full(x.shape, 1.0 + i)
        if norm == "standardize":
            shift = gate[:1]
            return jaxnorm.standardize(x, axes=0, adjust=lambda s: s._replace(offset=s.offset + shift))[0]
        y = getattr(jaxnorm, norm)(x, activation=gated(gate))
        return y[0] if norm == "batch_norm" else y

    def kept(function):
        function(0.0)
        gc.collect()
        before = len(jax.live_arrays())
        for i in range(4):
            function(float(i))
        gc.collect()
        return len(jax.live_arrays()) - before

    assert kept(call) == 0
    assert kept(lambda i: jax.grad(lambda v: jnp.sum(call(v)))(i)) == 0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_the_same_function_that_closes_over_something_else(compiled):
    """Gives the new result: what was traced is not found again by identity."""
    x, settings = on_device(catalog.X), {"slope": 2.0}
    scaled = lambda z: z * settings["slope"]  # noqa: E731
    adjusted = lambda s: s._replace(var=s.var * settings["slope"] ** 2)  # noqa: E731

    def both(x):
        activated = jaxnorm.layer_norm(x, activation=scaled, epsilon=0.0)
        return activated, jaxnorm.standardize(x, axes=-1, adjust=adjusted, epsilon=0.0)[0]

    plain = jaxnorm.layer_norm(x, epsilon=0.0)
    for slope in (2.0, 4.0):
        settings["slope"] = slope
        y, z = (jax.jit(lambda x: both(x)) if compiled else both)(x)
        np.testing.assert_allclose(y, slope * plain, rtol=1e-5)
        np.testing.assert_allclose(z, plain / slope, rtol=1e-5)


# Explicit meshes -----------------------------------------------------------------------------------------------------


def explicit():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))


def placed(tree, mesh, spec):
    """Arrays of as many examples, or of as many channels, split over the mesh; all others whole."""
    examples, channels = 8, 4

    def place(a):
        a = jnp.asarray(a)
        by_example = spec == "batch" and a.ndim and a.shape[0] == examples
        by_channel = spec == "channels" and a.ndim and a.shape[-1] == channels
        names = [None] * a.ndim
        if by_example or by_channel:
            names[0 if by_example else -1] = "data"
        return jax.device_put(a, NamedSharding(mesh, P(*names)))

    return jax.tree.map(place, tree)


# What takes a condition computes its scale and bias by a matrix, whose product the user has to place.
SHARDED = [n for n in catalog.LAYERS if n not in catalog.CONDITIONED]


@pytest.mark.parametrize("spec", ["batch", "channels"])
@pytest.mark.parametrize("name", catalog.FUNCTIONS)
def test_functions_under_an_explicit_mesh(name, spec):
    function, arguments = catalog.FUNCTIONS[name]
    expected, mesh = function(*arguments), explicit()
    with jax.set_mesh(mesh):
        actual = jax.jit(lambda *a: function(*a))(*placed(arguments, mesh, spec))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


@pytest.mark.parametrize("spec", ["batch", "channels"])
@pytest.mark.parametrize("name", SHARDED)
def test_layers_under_an_explicit_mesh(name, spec):
    _, inputs, _ = catalog.LAYERS[name]
    apply, variables = linen(name)
    layer, mesh = catalog.of_nnx(name), explicit()
    expected = apply(variables, catalog.X, *inputs)
    with jax.set_mesh(mesh):
        x, inputs = placed((catalog.X, inputs), mesh, spec)
        actual = jax.jit(lambda *a: apply(*a))(placed(variables, mesh, spec), x, *inputs)
        y = nnx.jit(lambda m, *a: m(*a))(layer, x, *inputs)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)
    np.testing.assert_allclose(y, expected[0] if isinstance(expected, tuple) else expected, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_virtual_batches_smaller_and_larger_than_what_a_device_holds(size):
    x, mesh = np.concatenate([catalog.X, catalog.X + 1]), explicit()
    expected, _ = jaxnorm.ghost_batch_norm(x, virtual_batch_size=size)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        y = jax.jit(lambda x: jaxnorm.ghost_batch_norm(x, virtual_batch_size=size)[0])(sharded)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert jax.typeof(y).sharding.spec == P("data", None, None)
