"""Every normalization on sharded arrays and inside shard_map: values and gradients as on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

NORMS = {
    "batch": lambda x, mask: jaxnorm.batch_norm(x, mask=mask)[0],
    "layer": lambda x, mask: jaxnorm.layer_norm(x, mask=mask),
    "rms": lambda x, mask: jaxnorm.rms_norm(x, mask=mask),
    "group": lambda x, mask: jaxnorm.group_norm(x, num_groups=2, mask=mask),
    "instance": lambda x, mask: jaxnorm.instance_norm(x, mask=mask),
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
        y = NORMS[norm](x, mask)
        return jnp.sum(jnp.sin(y) * cotangent), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(x)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@pytest.mark.parametrize("over", SPECS)
@pytest.mark.parametrize("norm", NORMS)
def test_sharded_arrays(rng, norm, over, axis_type, masked):
    if (norm, over, axis_type) == ("group", "channels", AxisType.Explicit):
        pytest.skip("explicit sharding leaves the split of sharded channels into groups to the user")
    args = problem(rng, masked)
    (_, y), gradient = value_and_gradient(norm, *args)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        placed = [None if a is None else jax.device_put(a, NamedSharding(mesh, SPECS[over])) for a in args]
        (_, sharded_y), sharded_gradient = value_and_gradient(norm, *placed)
    assert_close(sharded_y, np.asarray(y), 320)
    assert_close(sharded_gradient, np.asarray(gradient), 320)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("norm", [n for n in NORMS if n != "batch"])
def test_inside_shard_map(rng, norm, check_vma):
    x, cotangent, mask = problem(rng, True)
    _, gradient = value_and_gradient(norm, x, cotangent, mask)

    def local(x, cotangent, mask):
        return jax.grad(lambda x: jnp.sum(jnp.sin(NORMS[norm](x, mask)) * cotangent))(x)

    mapped = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=P("i"), out_specs=P("i"), check_vma=check_vma)
    assert_close(jax.jit(mapped)(x, cotangent, mask), np.asarray(gradient), 320)


@pytest.mark.parametrize("replicas", [(2, 2), (2, 20)], ids=str)
def test_an_axis_over_which_nothing_varies(rng, replicas):
    """Statistics over two mesh axes where the input is split over one: replicas count twice, and nothing changes."""
    x, cotangent, _ = problem(rng, False)
    size = replicas[0] * replicas[1]
    mesh = jax.make_mesh(replicas, ("i", "j"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:size])
    mapped = jax.shard_map(
        lambda x: jaxnorm.batch_norm(x, axis_name=("i", "j"))[0], mesh=mesh, in_specs=P("i"), out_specs=P("i")
    )
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(mapped(x)) * cotangent))(x)
    _, expected = value_and_gradient("batch", x, cotangent, None)
    assert_close(gradient, np.asarray(expected), 320)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_partially_manual(rng, kind):
    """Replicas by hand over one mesh axis, channels sharded by jax over the other."""
    x = problem(rng, False)[0]
    mesh = jax.make_mesh((2, 2), ("i", "j"), axis_types=(AxisType.Auto, kind), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("i", None, None, "j")))
        local = lambda x: jaxnorm.batch_norm(x, axis_name="i")[0]  # noqa: E731
        y = jax.jit(lambda x: jax.shard_map(local, in_specs=P("i"), out_specs=P("i"), axis_names={"i"})(x))(placed)
    assert_close(y, np.asarray(jaxnorm.batch_norm(x)[0]), 320)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("norm", NORMS)
def test_strict_promotion(rng, norm, dtype):
    x, _, mask = problem(rng, True)
    with jax.numpy_dtype_promotion("strict"):
        x = jnp.asarray(x, dtype)
        NORMS[norm](x, mask)
        NORMS[norm](x, None)
        for invertible in (False, True):
            options = {"activation": "leaky_relu", "residual": x, "invertible": invertible}
            jax.vjp(partial(jaxnorm.batch_norm, **options), x, jnp.ones(8))[1]((x, jaxnorm.moments(x, (0, 1, 2))))
        jaxnorm.update_running(jaxnorm.init_running(8), jaxnorm.moments(x, (0, 1, 2)), unbiased=True)
