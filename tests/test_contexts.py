"""The same gradients and statistics in every mapped context, with the collectives counted in the compiled program."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from checks import assert_close, pairwise
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

REPLICAS = 4
SHAPE = (16, 6, 5, 3)
EPSILON = 1e-5
GROUPS = [[0, 2], [1, 3]]
AXES = (0, 1, 2)


def mesh_of(replicas, axis_type=AxisType.Auto):
    return jax.make_mesh((replicas,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:replicas])


def problem(rng, masked, shape=SHAPE, replicas=REPLICAS):
    x = (rng.standard_normal(shape) * 2 + 30).astype(np.float32)
    scale, bias = (rng.standard_normal(shape[-1]).astype(np.float32) for _ in range(2))
    cotangent = rng.standard_normal(shape).astype(np.float32)
    rows = shape[0] // replicas
    valid = (np.arange(rows) < np.array([4, 3, 2, 1] * (replicas // 4))[:, None]).reshape(-1)
    mask = np.broadcast_to(valid.reshape(-1, *(1,) * (len(shape) - 1)), (*shape[:-1], 1)).copy()
    return x, scale, bias, cotangent, mask if masked else np.ones_like(mask)


def expected(x, scale, bias, cotangent, mask, groups, replicas=REPLICAS):
    """Output, batch statistics of each replica and gradients, in float64, group by group."""
    rows = x.shape[0] // replicas
    y, d_x = np.empty(x.shape), np.empty(x.shape)
    d_scale, d_bias = np.zeros(scale.shape), np.zeros(bias.shape)
    mean, var = (np.empty((replicas, x.shape[-1])) for _ in range(2))
    for group in groups or [range(replicas)]:
        members = np.concatenate([np.arange(rows) + r * rows for r in group])
        part, ct, w = x[members], cotangent[members], np.broadcast_to(mask, x.shape)[members]
        labels, features = oracles.labels_of("batch", part.shape), oracles.features_of(part.shape)
        y[members] = oracles.normalize(part, labels, features, scale, bias, EPSILON, w)
        d_x[members], s, b = oracles.gradients(part, ct, labels, features, scale, EPSILON, w)
        d_scale, d_bias = d_scale + s, d_bias + b
        for r in group:
            mean[r], var[r], _ = oracles.statistics(part, labels, w)
    return y, mean, var, d_x, d_scale, d_bias


def loss_of(groups, axis_name):
    def loss(x, scale, bias, cotangent, mask):
        y, batch = jaxnorm.batch_norm(
            x, scale, bias, epsilon=EPSILON, mask=mask, axis_name=axis_name, axis_index_groups=groups
        )
        return jnp.sum(y * cotangent), (y, batch)

    return loss


def split(a):
    return a.reshape(REPLICAS, -1, *a.shape[1:])


def shard_map_grad_inside(args, groups, check_vma):
    def step(x, scale, bias, cotangent, mask):
        (_, (y, batch)), (d_x, d_scale, d_bias) = jax.value_and_grad(loss_of(groups, "data"), (0, 1, 2), has_aux=True)(
            x, scale, bias, cotangent, mask
        )
        if not check_vma:  # with it, the gradient of what all replicas share is summed already
            d_scale, d_bias = jax.lax.psum((d_scale, d_bias), "data")
        return y, jax.tree.map(lambda m: m[None], (batch.mean, batch.var)), d_x, d_scale, d_bias

    data = P("data")
    mapped = jax.shard_map(
        step,
        mesh=mesh_of(REPLICAS),
        in_specs=(data, P(), P(), data, data),
        out_specs=(data, data, data, P(), P()),
        check_vma=check_vma,
    )
    y, (mean, var), *grads = jax.jit(mapped)(*args)
    return y, mean, var, *grads


def shard_map_grad_outside(args, groups, check_vma):
    data = P("data")

    def per_replica(x, scale, bias, cotangent, mask):
        loss, (y, batch) = loss_of(groups, "data")(x, scale, bias, cotangent, mask)
        return jax.lax.psum(loss, "data"), y, jax.tree.map(lambda m: m[None], (batch.mean, batch.var))

    mapped = jax.shard_map(
        per_replica,
        mesh=mesh_of(REPLICAS),
        in_specs=(data, P(), P(), data, data),
        out_specs=(P(), data, data),
        check_vma=check_vma,
    )

    def loss(x, scale, bias, cotangent, mask):
        total, y, statistics = mapped(x, scale, bias, cotangent, mask)
        return total, (y, statistics)

    (_, (y, (mean, var))), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args)
    return y, mean, var, *grads


def jit_sharded(args, groups, axis_type=AxisType.Auto):
    assert groups is None
    mesh = mesh_of(REPLICAS, axis_type)
    data, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    args = jax.device_put(args, (data, replicated, replicated, data, data))
    return jit_alone(args, groups)


def jit_alone(args, groups):
    assert groups is None
    grad = jax.jit(jax.value_and_grad(loss_of(None, None), (0, 1, 2), has_aux=True))
    (_, (y, batch)), grads = grad(*args)
    mean, var = (np.broadcast_to(m, (REPLICAS, *m.shape)) for m in (batch.mean, batch.var))
    return y, mean, var, *grads


def eager(args, groups):
    with jax.disable_jit():
        return jit_alone(args, groups)


def mapped_grad_inside(args, groups, transform):
    x, scale, bias, cotangent, mask = args
    grad = jax.value_and_grad(loss_of(groups, "data"), (0, 1, 2), has_aux=True)
    (_, (y, batch)), (d_x, d_scale, d_bias) = transform(grad, axis_name="data", in_axes=(0, None, None, 0, 0))(
        split(x), scale, bias, split(cotangent), split(mask)
    )
    return y.reshape(x.shape), batch.mean, batch.var, d_x.reshape(x.shape), d_scale.sum(0), d_bias.sum(0)


def vmap_grad_outside(args, groups):
    x, scale, bias, cotangent, mask = args

    def loss(x, scale, bias):
        total, aux = jax.vmap(loss_of(groups, "data"), axis_name="data", in_axes=(0, None, None, 0, 0))(
            split(x), scale, bias, split(cotangent), split(mask)
        )
        return total.sum(), aux

    (_, (y, batch)), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)
    return y.reshape(x.shape), batch.mean, batch.var, *grads


CONTEXTS = {
    "eager": eager,
    "jit": jit_alone,
    "jit, sharded batch": jit_sharded,
    "jit, explicit sharding": partial(jit_sharded, axis_type=AxisType.Explicit),
    "grad of shard_map": partial(shard_map_grad_outside, check_vma=True),
    "grad of shard_map, unchecked": partial(shard_map_grad_outside, check_vma=False),
    "grad inside shard_map": partial(shard_map_grad_inside, check_vma=True),
    "grad inside shard_map, unchecked": partial(shard_map_grad_inside, check_vma=False),
    "pmap": partial(mapped_grad_inside, transform=partial(jax.pmap, devices=jax.devices()[:REPLICAS])),
    "vmap, grad inside": partial(mapped_grad_inside, transform=lambda *args, **kw: jax.jit(jax.vmap(*args, **kw))),
    "vmap, grad outside": vmap_grad_outside,
}
WITHOUT_REPLICAS = {"eager", "jit", "jit, sharded batch", "jit, explicit sharding"}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["all", "groups"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_context(rng, context, groups, masked):
    if groups and context in WITHOUT_REPLICAS:
        pytest.skip("there are no replicas to group")
    args = problem(rng, masked)
    actual = CONTEXTS[context](args, groups)
    names = ("y", "mean", "var", "d_x", "d_scale", "d_bias")
    for name, a, e in zip(names, actual, expected(*args, groups), strict=True):
        assert_close(a, e, size=np.prod(SHAPE[:-1]), what=f"{context}: {name}")


@pytest.mark.parametrize("names", [("data", "model"), ("model", "data"), ("model",)], ids=str)
def test_several_mesh_axes(rng, names):
    """Statistics over two mesh axes, in either order, and over one of two."""
    args = problem(rng, True)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    data = P(("data", "model"))
    mapped = jax.shard_map(
        lambda *a: jax.lax.psum(loss_of(None, names)(*a)[0], ("data", "model")),
        mesh=mesh,
        in_specs=(data, P(), P(), data, data),
        out_specs=P(),
    )
    grads = jax.jit(jax.grad(mapped, (0, 1, 2)))(*args)
    groups = [[0, 1], [2, 3]] if names == ("model",) else None
    for a, e in zip(grads, expected(*args, groups)[3:], strict=True):
        assert_close(a, e, size=np.prod(SHAPE[:-1]))


def test_many_replicas(rng):
    """More replicas than are gathered in one collective, with groups of unequal size."""
    replicas, shape = 8, (32, 3, 2)
    args = problem(rng, True, shape, replicas)
    groups = [[0, 5, 1], [2, 3, 4, 6, 7]]
    data = P("data")
    for g in (None, groups):
        mapped = jax.shard_map(
            lambda *a, g=g: jax.lax.psum(loss_of(g, "data")(*a)[0], "data"),
            mesh=mesh_of(replicas),
            in_specs=(data, P(), P(), data, data),
            out_specs=P(),
        )
        grads = jax.jit(jax.grad(mapped, (0, 1, 2)))(*args)
        for a, e in zip(grads, expected(*args, g, replicas)[3:], strict=True):
            assert_close(a, e, size=96)


def test_hessian_product_over_replicas(rng):
    """Forward over reverse through `shard_map` gives what one device gives."""
    args = problem(rng, True)
    tangents = tuple(rng.standard_normal(a.shape).astype(np.float32) for a in args[:3])
    data = P("data")
    mapped = jax.shard_map(
        lambda *a: jax.lax.psum(curved(None, "data", True)(*a), "data"),
        mesh=mesh_of(REPLICAS),
        in_specs=(data, P(), P(), data, data),
        out_specs=P(),
    )

    def product(loss):
        grad = jax.grad(lambda x, s, b: loss(x, s, b, *args[3:]), (0, 1, 2))
        return jax.jit(lambda p, t: jax.jvp(grad, p, t)[1])(args[:3], tangents)

    for a, e in zip(product(mapped), product(curved(None, None, True)), strict=True):
        assert_close(a, e, size=np.prod(SHAPE[:-1]))


# Collectives ---------------------------------------------------------------------------------------------------------


def collectives(function, *args):
    """How many collectives of any kind the compiled program holds."""
    text = jax.jit(function).lower(*args).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    return len(re.findall(rf"= .*? (?:{kinds})(?:-start)?\(", text))


def curved(groups, axis_name, masked):
    """A loss whose cotangent depends on the output, as in training: the backward pass has to wait for the forward."""

    def loss(x, scale, bias, cotangent, mask):
        mask = mask if masked else None
        _, (y, _) = loss_of(groups, axis_name)(x, scale, bias, cotangent, mask)
        return jnp.sum(jnp.tanh(y) * cotangent)

    return loss


def sharded_arguments(replicas, args):
    mesh = mesh_of(replicas)
    data, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    return jax.device_put(args, (data, replicated, replicated, data, data))


@pytest.mark.parametrize(
    ("shape", "check_vma", "groups", "masked"),
    pairwise(
        {str(shape): shape for shape in (SHAPE, (16, 3))},
        {"checked": True, "unchecked": False},
        {"all": None, "groups": GROUPS},
        {"plain": False, "masked": True},
    ),
)
def test_collectives_of_a_step_with_axis_name(rng, shape, check_vma, groups, masked):
    """One forward, one backward: for the gradient of x, and for scale and bias too where jax knows they are shared."""
    args = sharded_arguments(REPLICAS, problem(rng, masked, shape))
    data = P("data")

    def mapped(function, out_specs):
        specs = (data, P(), P(), data, data)
        return jax.shard_map(function, mesh=mesh_of(REPLICAS), in_specs=specs, out_specs=out_specs, check_vma=check_vma)

    loss = curved(groups, "data", masked)
    assert collectives(mapped(lambda *a: loss(*a)[None], data), *args) == 1
    assert collectives(mapped(jax.grad(loss), data), *args) == 2
    if check_vma and groups is None:
        step = mapped(jax.grad(loss, (0, 1, 2)), (data, P(), P()))
        assert collectives(step, *args) == 2


def test_collectives_on_many_replicas(rng):
    """Two forward, one backward."""
    args = sharded_arguments(8, problem(rng, True, (32, 3, 2), 8))
    data = P("data")

    def mapped(function, out_specs):
        return jax.shard_map(function, mesh=mesh_of(8), in_specs=(data, P(), P(), data, data), out_specs=out_specs)

    loss = curved(None, "data", True)
    assert collectives(mapped(lambda *a: loss(*a)[None], data), *args) == 2
    assert collectives(mapped(jax.grad(loss, (0, 1, 2)), (data, P(), P())), *args) == 3


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [SHAPE, (16, 3)], ids=str)
def test_collectives_of_a_step_sharded_automatically(rng, shape, masked):
    """Two forward, one backward; the gradients of scale and bias come with the latter."""
    args = sharded_arguments(REPLICAS, problem(rng, masked, shape))
    loss = curved(None, None, masked)

    def forward(*a):
        return loss_of(None, None)(*a[:4], a[4] if masked else None)[1][0]

    assert collectives(forward, *args) == 2
    assert collectives(jax.grad(loss, (0, 1, 2)), *args) == 3


def test_no_collective_at_inference(rng):
    x, scale, bias, *_ = sharded_arguments(REPLICAS, problem(rng, False))
    assert collectives(lambda x, m, v, *p: jaxnorm.normalize(x, (m, v), *p), x, scale, bias**2, scale, bias) == 0


@pytest.mark.parametrize("replicas", [2, 8], ids=["gathered", "too many to gather"])
def test_data_that_all_replicas_have(rng, replicas):
    """What does not vary over the replicas is measured as often as there are replicas."""
    x = jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)
    function = lambda x: jaxnorm.batch_norm(x, axis_name="data")  # noqa: E731
    y, batch = jax.jit(jax.shard_map(function, mesh=mesh_of(replicas), in_specs=P(), out_specs=P()))(x)
    expected, alone = jaxnorm.batch_norm(x)
    assert_close(y, np.asarray(expected), 6)
    assert_close(batch.var, np.asarray(alone.var), 6)
    np.testing.assert_allclose(batch.count, replicas * 6)
