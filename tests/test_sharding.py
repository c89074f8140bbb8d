"""Every normalization on sharded arrays and inside shard_map: values and gradients as on one device."""

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

EPSILON = 0.1  # with a mask, some layers hold one value only: their variance is zero and nothing but epsilon is left
NORMS = {
    "batch": lambda x, mask=None: jaxnorm.batch_norm(x, epsilon=EPSILON, mask=mask)[0],
    "layer": partial(jaxnorm.layer_norm, epsilon=EPSILON),
    "rms": partial(jaxnorm.rms_norm, epsilon=EPSILON),
    "group": partial(jaxnorm.group_norm, num_groups=2, epsilon=EPSILON),
    "instance": partial(jaxnorm.instance_norm, epsilon=EPSILON),
}
SPECS = {"batch": P("i"), "positions": P(None, "i"), "channels": P(None, None, None, "i")}
SHAPE = (4, 8, 5, 8)


def mesh_of(axis_type):
    return jax.make_mesh((4,), ("i",), axis_types=(axis_type,), devices=jax.devices()[:4])


def problem(rng, masked):
    x, cotangent = ((rng.standard_normal(SHAPE) + 1).astype(np.float32) for _ in range(2))
    return x, cotangent, rng.random(SHAPE) < 0.7 if masked else None


def value_and_gradient(norm, x, cotangent, mask):
    def loss(x):
        y = NORMS[norm](x, mask=mask)
        return jnp.sum(jnp.sin(y) * cotangent), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return y, gradient


def expected(norm, x, cotangent, mask):
    """The same in float64."""
    labels, features, scale = oracles.labels_of(norm, SHAPE, num_groups=2), oracles.features_of(SHAPE), np.ones(8)
    options = {"epsilon": EPSILON, "weights": mask, "centered": norm != "rms"}
    y = oracles.normalize(x, labels, features, **options)
    return y, oracles.gradients(x, cotangent * np.cos(y), labels, features, scale, **options)[0]


TYPES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def left_to_the_user(norm, placement, masked):
    """Explicit sharding leaves the split of sharded channels into groups to the user."""
    return norm == "group" and placement == ("channels", AxisType.Explicit)


@pytest.mark.parametrize(
    ("norm", "placement", "masked"),
    pairwise(
        {norm: norm for norm in NORMS},
        {f"{over}-{name}": (over, axis_type) for over in SPECS for name, axis_type in TYPES.items()},
        {"plain": False, "masked": True},
        without=left_to_the_user,
    ),
)
def test_sharded_arrays(rng, norm, placement, masked):
    over, axis_type = placement
    args = problem(rng, masked)
    y, gradient = expected(norm, *args)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        placed = [None if a is None else jax.device_put(a, NamedSharding(mesh, SPECS[over])) for a in args]
        sharded_y, sharded_gradient = value_and_gradient(norm, *placed)
    assert_close(sharded_y, y, 320)
    assert_close(sharded_gradient, gradient, 320)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("norm", [n for n in NORMS if n != "batch"])
def test_inside_shard_map(rng, norm, check_vma):
    x, cotangent, mask = problem(rng, True)
    _, gradient = expected(norm, x, cotangent, mask)

    def local(x, cotangent, mask):
        return jax.grad(lambda x: jnp.sum(jnp.sin(NORMS[norm](x, mask=mask)) * cotangent))(x)

    mapped = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=P("i"), out_specs=P("i"), check_vma=check_vma)
    assert_close(jax.jit(mapped)(x, cotangent, mask), gradient, 320)


@pytest.mark.parametrize("replicas", [(2, 2), (2, 4)], ids=str)
def test_an_axis_over_which_nothing_varies(rng, replicas):
    """Statistics over two mesh axes where the input is split over one: replicas count twice, and nothing changes."""
    x, cotangent, _ = problem(rng, False)
    size = replicas[0] * replicas[1]
    mesh = jax.make_mesh(replicas, ("i", "j"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:size])
    mapped = jax.shard_map(
        lambda x: jaxnorm.batch_norm(x, epsilon=EPSILON, axis_name=("i", "j"))[0],
        mesh=mesh,
        in_specs=P("i"),
        out_specs=P("i"),
    )
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(mapped(x)) * cotangent)))(x)
    assert_close(gradient, expected("batch", x, cotangent, None)[1], 320)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_partially_manual(rng, kind):
    """Replicas by hand over one mesh axis, channels sharded by jax over the other."""
    x, cotangent, _ = problem(rng, False)
    mesh = jax.make_mesh((2, 2), ("i", "j"), axis_types=(AxisType.Auto, kind), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("i", None, None, "j")))
        local = lambda x: jaxnorm.batch_norm(x, epsilon=EPSILON, axis_name="i")[0]  # noqa: E731
        y = jax.jit(lambda x: jax.shard_map(local, in_specs=P("i"), out_specs=P("i"), axis_names={"i"})(x))(placed)
    assert_close(y, expected("batch", x, cotangent, None)[0], 320)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("norm", NORMS)
def test_strict_promotion(norm, dtype):
    """Which types are promoted is known when the program is traced."""

    def all_of_it(x, mask, scale):
        NORMS[norm](x, mask=mask)
        NORMS[norm](x)
        for invertible in (False, True):
            options = {"activation": "leaky_relu", "residual": x, "invertible": invertible}
            jax.vjp(partial(jaxnorm.batch_norm, **options), x, scale)[1]((x, jaxnorm.moments(x, (0, 1, 2))))
        jaxnorm.update_running(jaxnorm.init_running(8), jaxnorm.moments(x, (0, 1, 2)), unbiased=True)

    with jax.numpy_dtype_promotion("strict"):
        args = ((SHAPE, dtype), (SHAPE, bool), ((8,), jnp.float32))
        jax.eval_shape(all_of_it, *(jax.ShapeDtypeStruct(*a) for a in args))
