"""Every transformation with every interface: outputs and averages by value. docs/transformations.md has the table."""

import re
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import nnx
from flax.nnx import bridge
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

LAYERS, FEATURES = 3, 5
MOMENTUM = 0.25
SHAPE = (4, 8, FEATURES)


def exact_step(x):
    """Normalized values and running averages after one step, in float64, over all but the last axis."""
    x = x.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / np.sqrt(var + 1e-5), (1 - MOMENTUM) * mean, MOMENTUM + (1 - MOMENTUM) * var


def exact_layers(x):
    """The same for a stack of layers, each followed by a doubling: outputs and averages of each."""
    means, variances = [], []
    for _ in range(LAYERS):
        x, mean, var = exact_step(x)
        x = 2 * x
        means.append(mean)
        variances.append(var)
    return x, np.stack(means), np.stack(variances)


def exact_gradient(x):
    """The gradient of sum(sin(y)) for x, by differences in float64."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[index] = 1e-5
        after, before = (np.sin(exact_step(x.astype(np.float64) + s)[0]).sum() for s in (step, -step))
        gradient[index] = (after - before) / 2e-5
    return gradient


# The three interfaces, each as (state, step(state, x) -> (y, new state), averages(state)) ----------------------------


def pure(axis_name=None):
    def step(running, x):
        y, batch = jaxnorm.batch_norm(x, axis_name=axis_name)
        return y, jaxnorm.update_running(running, batch, alpha=1 - MOMENTUM)

    return jaxnorm.init_running(FEATURES), step, lambda running: (running.mean, running.var)


def linen(axis_name=None):
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=MOMENTUM, axis_name=axis_name)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, FEATURES)))

    def step(stats, x):
        y, updates = layer.apply({**variables, "batch_stats": stats}, x, mutable="batch_stats")
        return y, updates["batch_stats"]

    return variables["batch_stats"], step, lambda stats: (stats["mean"], stats["var"])


def make_nnx(axis_name=None):
    return jaxnorm.nnx.BatchNorm(FEATURES, momentum=MOMENTUM, axis_name=axis_name, rngs=nnx.Rngs(0))


def nnx_averages(layer):
    return layer.mean[...], layer.var[...]


def functional_nnx(axis_name=None):
    """An NNX layer split into a graph and a state, under jax's own transformations."""
    graph, state = nnx.split(make_nnx(axis_name))

    def step(state, x):
        layer = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
        y = layer(x)
        return y, nnx.state(layer)

    return state, step, lambda state: (state["mean"][...], state["var"][...])


INTERFACES = {"pure functions": pure, "Linen": linen, "NNX": functional_nnx}


def mesh():
    return jax.make_mesh((4,), ("r",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


# jax's transformations, for all interfaces ---------------------------------------------------------------------------


def run_jit(interface, x):
    state, step, averages = interface()
    y, state = jax.jit(step)(state, x)
    return y, *averages(state)


def run_vmap(interface, x):
    state, step, averages = interface("r")
    mapped = jax.vmap(step, axis_name="r", in_axes=(None, 0), out_axes=(0, None))
    y, state = jax.jit(mapped)(state, x)
    return y, *averages(state)


def run_nested_vmap(interface, x):
    state, step, averages = interface(("a", "b"))
    options = {"in_axes": (None, 0), "out_axes": (0, None)}
    step = jax.vmap(jax.vmap(step, axis_name="b", **options), axis_name="a", **options)
    y, state = jax.jit(step)(state, x.reshape(2, 2, *x.shape[1:]))
    return y.reshape(x.shape), *averages(state)


def run_shard_map(interface, x, check_vma=True):
    state, step, averages = interface("r")
    specs = (P(), P("r"))
    mapped = jax.shard_map(step, mesh=mesh(), in_specs=specs, out_specs=specs[::-1], check_vma=check_vma)
    y, state = jax.jit(mapped)(state, x)
    return y, *averages(state)


def run_pmap(interface, x):
    state, step, averages = interface("r")
    mapped = jax.pmap(step, axis_name="r", in_axes=(None, 0), out_axes=(0, None), devices=jax.devices()[:4])
    y, state = mapped(state, x)
    return y, *averages(state)


def run_eval_shape(interface, x):
    state, step, averages = interface()
    shapes = jax.eval_shape(step, state, x)
    y, state = step(state, x)
    assert jax.tree.map(jnp.shape, (y, state)) == jax.tree.map(lambda s: s.shape, shapes)
    return y, *averages(state)


def run_remat(interface, x):
    """Differentiated and computed twice, averaged once."""
    state, step, averages = interface()

    def loss(x, state):
        y, state = jax.checkpoint(step)(state, x)
        return jnp.sum(jnp.sin(y)), (y, state)

    (_, (y, state)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, state)
    assert_close(gradient, exact_gradient(x), x.size)
    return y, *averages(state)


def run_grad(interface, x):
    state, step, averages = interface()

    def loss(x, state):
        y, state = step(state, x)
        return jnp.sum(jnp.sin(y)), (y, state)

    gradient, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(x, state)
    assert_close(gradient, exact_gradient(x), x.size)
    return y, *averages(state)


def run_scan(interface, x):
    """A stack of layers, each with averages of its own."""
    state, step, averages = interface()
    stacked = jax.tree.map(lambda a: jnp.stack([a] * LAYERS), state)

    def layer(x, state):
        y, state = step(state, x)
        return 2 * y, state

    y, state = jax.lax.scan(layer, jnp.asarray(x), stacked)
    return y, *averages(state)


TRANSFORMATIONS = {
    "jit": run_jit,
    "grad": run_grad,
    "vmap": run_vmap,
    "nested vmap": run_nested_vmap,
    "scan over layers": run_scan,
    "remat": run_remat,
    "eval_shape": run_eval_shape,
    "shard_map": run_shard_map,
    "shard_map, check_vma=False": partial(run_shard_map, check_vma=False),
    "pmap": run_pmap,
}


# Lifted transformations of Linen -------------------------------------------------------------------------------------


class Doubling(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        norm = jaxnorm.linen.BatchNorm(use_running_average=not self.train, momentum=MOMENTUM, name="norm")
        return 2 * norm(x), None


def linen_scan(x):
    stack = nn.scan(Doubling, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=LAYERS)
    variables = jax.jit(stack().init)(jax.random.key(0), x)
    (y, _), updates = jax.jit(partial(stack().apply, mutable="batch_stats"))(variables, x)
    stats = updates["batch_stats"]["norm"]
    # Flax issue 3602: immutable collections.
    inference, _ = jax.eval_shape(stack(train=False).apply, {**variables, **updates}, x)
    assert inference.shape == x.shape
    return y, stats["mean"], stats["var"]


def linen_remat(x):
    layer = nn.remat(jaxnorm.linen.BatchNorm)(use_running_average=False, momentum=MOMENTUM)
    variables = jax.jit(layer.init)(jax.random.key(0), x)

    def loss(x):
        y, updates = layer.apply(variables, x, mutable="batch_stats")
        return jnp.sum(jnp.sin(y)), (y, updates["batch_stats"])

    gradient, (y, stats) = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert_close(gradient, exact_gradient(x), x.size)
    return y, stats["mean"], stats["var"]


def linen_vmap(x, names=("a",)):
    """Shared variables under lifted vmaps, nested as often as there are names (flax issue 3319)."""
    layer = jaxnorm.linen.BatchNorm
    for name in names:
        layer = nn.vmap(
            layer, variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False}, axis_name=name
        )
    layer = layer(use_running_average=False, momentum=MOMENTUM, axis_name=names)
    folded = x if len(names) == 1 else x.reshape(2, 2, *x.shape[1:])
    variables = jax.jit(layer.init)(jax.random.key(0), folded)
    apply = jax.jit(partial(layer.apply, mutable="batch_stats"))
    y, updates = apply(variables, folded)
    again, _ = apply({**variables, **updates}, folded)
    assert_close(again, np.asarray(y), x.size)
    return y.reshape(x.shape), updates["batch_stats"]["mean"], updates["batch_stats"]["var"]


# NNX's own transformations -------------------------------------------------------------------------------------------


def nnx_jit(x):
    layer = make_nnx()
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    return y, *nnx_averages(layer)


def nnx_grad(x, transform=lambda f: f):
    layer = make_nnx()

    def loss(layer, x):
        y = transform(lambda layer, x: layer(x))(layer, x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), (_, gradient) = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, jnp.asarray(x))
    assert_close(gradient, exact_gradient(x), x.size)
    return y, *nnx_averages(layer)


def nnx_vmap(x, names=("a",)):
    """The layer shared by all (flax issue 4760): twice, since Flax's fails the second time."""
    layer = make_nnx(names)
    call = lambda layer, x: layer(x)  # noqa: E731
    for name in reversed(names):
        call = nnx.vmap(call, in_axes=(None, 0), axis_name=name)
    folded = x if len(names) == 1 else x.reshape(2, 2, *x.shape[1:])
    y = call(layer, folded)
    averages = nnx_averages(layer)
    assert_close(call(layer, folded), np.asarray(y), x.size)
    return y.reshape(x.shape), *averages


def nnx_scan(x):
    stack = nnx.vmap(lambda rngs: jaxnorm.nnx.BatchNorm(FEATURES, momentum=MOMENTUM, rngs=rngs), in_axes=0, out_axes=0)(
        nnx.Rngs(0).fork(split=LAYERS)
    )
    y = nnx.scan(lambda x, layer: 2 * layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(jnp.asarray(x), stack)
    return y, *nnx_averages(stack)


def nnx_eval_shape(x):
    """Flax issue 4734: the layer as an argument, or one that averages nothing as a closure."""
    layer = make_nnx()
    shape = nnx.eval_shape(lambda layer, x: layer(x), layer, x)
    still = nnx.view(layer, update_running_average=False)
    assert jax.eval_shape(lambda x: still(x), x).shape == shape.shape == x.shape
    np.testing.assert_array_equal(layer.mean[...], 0)
    return layer(x), *nnx_averages(layer)


def nnx_shard_map(x):
    layer = make_nnx("r")
    step = nnx.shard_map(lambda layer, x: layer(x), mesh=mesh(), in_specs=(P(), P("r")), out_specs=P("r"))
    y = step(layer, x)
    return y, *nnx_averages(layer)


def nnx_pmap(x):
    layer = make_nnx("r")
    step = nnx.pmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="r", devices=jax.devices()[:4])
    y = step(layer, x)
    return y, *nnx_averages(layer)


def bridge_to_nnx(x):
    layer = bridge.ToNNX(jaxnorm.linen.BatchNorm(momentum=MOMENTUM), rngs=nnx.Rngs(0))
    layer.lazy_init(x, use_running_average=False)
    y = layer(x, use_running_average=False, mutable=["batch_stats"])
    y = y[0] if isinstance(y, tuple) else y
    return y, layer.mean[...], layer.var[...]


def bridge_to_linen(x):
    layer = bridge.ToLinen(jaxnorm.nnx.BatchNorm, args=(FEATURES,), kwargs={"momentum": MOMENTUM})
    variables = layer.init(jax.random.key(0), x)
    stats = jax.tree.map(lambda a: a, variables)
    fresh = {"mean": jnp.zeros(FEATURES), "var": jnp.ones(FEATURES)}
    stats["BatchStat" if "BatchStat" in variables else "batch_stats"] = fresh
    y, updates = layer.apply(stats, x, mutable=True)
    (averages,) = (c for c in nn.meta.unbox(updates).values() if "mean" in c)
    return y, averages["mean"], averages["var"]


# NNX's transformations of functions that keep their state outside -----------------------------------------------------


def nnx_of_function(transform, interface, x):
    """The step of the pure functions or of Linen under one of NNX's transformations."""
    axis_name = "r" if transform == "nnx.vmap" else None
    state, step, averages = interface(axis_name)
    if transform == "nnx.jit":
        y, state = nnx.jit(step)(state, x)
    elif transform == "nnx.vmap":
        y, state = nnx.vmap(step, in_axes=(None, 0), out_axes=(0, None), axis_name="r")(state, x)
    elif transform == "nnx.scan":
        layers = jax.tree.map(lambda a: jnp.stack([a] * LAYERS), state)

        def layer(x, state):
            y, state = step(state, x)
            return 2 * y, state

        y, state = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(jnp.asarray(x), layers)
    else:
        inner = nnx.remat(step) if transform == "nnx.remat" else step

        def loss(x, state):
            y, state = inner(state, x)
            return jnp.sum(jnp.sin(y)), (y, state)

        gradient, (y, state) = nnx.grad(loss, has_aux=True)(jnp.asarray(x), state)
        assert_close(gradient, exact_gradient(x), x.size)
    return y, *averages(state)


LIFTED = {
    ("nn.scan", "Linen"): linen_scan,
    ("nn.remat", "Linen"): linen_remat,
    ("nn.vmap", "Linen"): linen_vmap,
    ("nested nn.vmap", "Linen"): partial(linen_vmap, names=("b", "a")),
    ("nnx.jit", "NNX"): nnx_jit,
    ("nnx.grad", "NNX"): nnx_grad,
    ("nnx.vmap", "NNX"): nnx_vmap,
    ("nested nnx.vmap", "NNX"): partial(nnx_vmap, names=("a", "b")),
    ("nnx.scan", "NNX"): nnx_scan,
    ("nnx.remat", "NNX"): partial(nnx_grad, transform=nnx.remat),
    ("nnx.eval_shape", "NNX"): nnx_eval_shape,
    ("nnx.shard_map", "NNX"): nnx_shard_map,
    ("nnx.pmap", "NNX"): nnx_pmap,
    ("nnx.bridge", "Linen"): bridge_to_nnx,
    ("nnx.bridge", "NNX"): bridge_to_linen,
}
NNX_OF_FUNCTIONS = {
    (transform, interface): partial(nnx_of_function, transform, INTERFACES[interface])
    for transform in ("nnx.jit", "nnx.grad", "nnx.vmap", "nnx.scan", "nnx.remat")
    for interface in ("pure functions", "Linen")
}
CELLS = (
    NNX_OF_FUNCTIONS
    | LIFTED
    | {(t, i): partial(run, make) for t, run in TRANSFORMATIONS.items() for i, make in INTERFACES.items()}
)


@pytest.mark.parametrize("cell", CELLS, ids=" of ".join)
def test_cell(rng, cell):
    x = (rng.standard_normal(SHAPE) * 2 + 3).astype(np.float32)
    expected = exact_layers(x) if "scan" in cell[0] else exact_step(x)
    for what, a, e in zip(("y", "mean", "var"), CELLS[cell](x), expected, strict=True):
        assert_close(a, e, x.size, what=what)


def test_documented_table():
    """docs/transformations.md marks exactly the cells that are tested here."""
    text = (Path(__file__).parent.parent / "docs" / "transformations.md").read_text()
    header, _, *rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    marked = {
        (re.sub("`", "", row[0]), column)
        for row in rows
        for column, mark in zip(header[1:], row[1:], strict=True)
        if mark == "✓"
    }
    assert marked == set(CELLS)


# Issues of Flax's that are open --------------------------------------------------------------------------------------


def test_flax_issue_2606(rng):
    """An axis name that is bound nowhere: no error where no statistics are shared, a clear one where they are."""
    x = rng.standard_normal(SHAPE).astype(np.float32)
    layer = jaxnorm.linen.BatchNorm(axis_name="r")
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    variables["batch_stats"]["mean"] += 1
    layer.apply(variables, x, use_running_average=True)
    with pytest.raises(ValueError, match=r"BatchNorm: axis_name must name axes bound by .*; got axis_name='r'"):
        layer.apply(variables, x, use_running_average=False, mutable="batch_stats")


class Carrying(nn.Module):
    """One layer applied again and again, its averages carried from step to step; as in docs/transformations.md."""

    once: bool = True

    @nn.compact
    def __call__(self, x):
        body = Doubling(name="body")
        if self.once and self.is_initializing():
            return body(x)[0]
        scan = nn.scan(
            lambda body, x, _: body(x),
            variable_carry="batch_stats",
            variable_broadcast="params",
            split_rngs={"params": False},
            length=LAYERS,
        )
        return scan(body, x, None)[0]


def test_flax_issue_2052(rng):
    """Averages that a scan carries: it cannot create them, so the body is initialized once, outside of it."""
    x = rng.standard_normal(SHAPE).astype(np.float32)
    with pytest.raises(TypeError, match="carry input and carry output must have the same pytree structure"):
        Carrying(once=False).init(jax.random.key(0), x)  # if this is no error any more, the page need not say so
    variables = Carrying().init(jax.random.key(0), x)
    y, updates = Carrying().apply(variables, x, mutable="batch_stats")
    expected, mean, var = x, np.zeros(FEATURES), np.ones(FEATURES)
    for _ in range(LAYERS):
        exact = expected.astype(np.float64)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * exact.mean((0, 1))
        var = MOMENTUM * var + (1 - MOMENTUM) * exact.var((0, 1))
        expected = 2 * exact_step(expected)[0]
    averages = updates["batch_stats"]["body"]["norm"]
    for actual, exact in ((y, expected), (averages["mean"], mean), (averages["var"], var)):
        assert_close(actual, exact, x.size)


@pytest.mark.parametrize("mapped", ["vmap", "shard_map", "shard_map, check_vma=False"])
@pytest.mark.parametrize("interface", ["Linen", "NNX"])
def test_groups_of_replicas(rng, interface, mapped):
    """axis_index_groups, which jax refuses under shard_map and vmap: averages of each group."""
    x = rng.standard_normal(SHAPE).astype(np.float32)
    groups = [[0, 3], [1, 2]]
    if interface == "Linen":
        layer = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=MOMENTUM, axis_name="r",
                                        axis_index_groups=groups)  # fmt: skip
        variables = layer.init(jax.random.key(0), x[0])

        def step(x):
            y, updates = layer.apply(variables, x, mutable="batch_stats")
            return y, updates["batch_stats"]["mean"]
    else:
        graph, state = nnx.split(
            jaxnorm.nnx.BatchNorm(
                FEATURES, momentum=MOMENTUM, axis_name="r", axis_index_groups=groups, rngs=nnx.Rngs(0)
            )
        )

        def step(x):
            layer = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
            return layer(x), layer.mean[...]

    if mapped == "vmap":
        y, mean = jax.vmap(step, axis_name="r")(x)
    else:
        lifted = jax.shard_map(
            lambda x: jax.tree.map(lambda a: a[None], step(x[0])),
            mesh=mesh(), in_specs=P("r"), out_specs=P("r"), check_vma=mapped == "shard_map",
        )  # fmt: skip
        y, mean = jax.jit(lifted)(x)
    for group in groups:
        expected_y, expected_mean, _ = exact_step(x[group])
        assert_close(np.asarray(y)[group], expected_y, 16)
        for r in group:
            assert_close(mean[r], expected_mean, 16)
