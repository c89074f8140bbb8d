"""What the newer layers and arguments promise; and the table of which layer takes which argument."""

import inspect
import warnings
from pathlib import Path

import catalog
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen as jl
import jaxnorm.nnx as jn

pytestmark = pytest.mark.any_version
X = catalog.X


# Instance norm with running averages ---------------------------------------------------------------------------------


def test_tracked_instance_norm_is_that_of_torch(rng):
    """Two steps of training, then evaluation by the averages."""
    torch = pytest.importorskip("torch")
    theirs = torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    ours = jn.TrackedInstanceNorm(3, unbiased=True, momentum=0.9, rngs=nnx.Rngs(0))
    linen = jl.TrackedInstanceNorm(unbiased=True, momentum=0.9)
    x = rng.normal(2, 3, (4, 5, 6, 3)).astype(np.float32)
    variables = linen.init(jax.random.key(0), x, use_running_average=False)

    def of_torch(x):
        return theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)

    for batch in (x, 2 * x + 1):
        expected = of_torch(batch)
        assert_close(ours(batch), expected, 30, magnitude=4)
        y, new = linen.apply(variables, batch, use_running_average=False, mutable="batch_stats")
        assert_close(y, expected, 30, magnitude=4)
        variables |= new
    for name in ("mean", "var"):
        expected = getattr(theirs, f"running_{name}").numpy()
        assert_close(getattr(ours, name)[...], expected, 30)
        assert_close(variables["batch_stats"][name], expected, 30)
    theirs.eval()
    assert_close(ours(x, use_running_average=True), of_torch(x), 30, magnitude=4)


@pytest.mark.parametrize("size", [2, 4])
def test_unbiased_averages_of_virtual_batches(size, rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    layer = jn.GhostBatchNorm(3, virtual_batch_size=size, unbiased=True, momentum=0.0, rngs=nnx.Rngs(0))
    layer(x)
    parts = np.asarray(x, float).reshape(-1, size, 3)
    assert_close(layer.var[...], parts.var(1, ddof=1).mean(0), 8)


# A scale that is stored as its distance from one ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm"])
def test_zero_centered_scale(kind, rng):
    """Begun with zeros; the same output and gradients as the scale itself; half precision keeps what is small."""
    settings, _, averaged = catalog.LAYERS[kind]
    train = {"use_running_average": False} if averaged else {}
    plain, centered = (getattr(jl, kind)(**settings, **train, zero_centered_scale=z) for z in (False, True))
    start, variables = (jax.jit(layer.init)(jax.random.key(0), X) for layer in (plain, centered))
    assert not variables["params"]["scale"].any()
    scale, t = rng.uniform(0.5, 1.5, 4).astype(np.float32), rng.normal(size=X.shape).astype(np.float32)

    def result(layer, variables, scale):
        def loss(params):
            y = layer.apply({**variables, "params": params}, X, mutable="batch_stats")[0]
            return jnp.vdot(y, t), y

        (_, y), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"] | {"scale": scale})
        return y, grads["scale"]

    for a, b in zip(result(centered, variables, scale - 1), result(plain, start, scale), strict=True):
        assert_close(a, b, 24)
    in_nnx = catalog.of_nnx(kind, zero_centered_scale=True)
    in_nnx.scale[...] = scale - 1
    assert_close(in_nnx(X), result(plain, start, scale)[0], 24)
    small = getattr(jl, kind)(**settings, **train, zero_centered_scale=True, param_dtype=jnp.bfloat16)
    variables = small.init(jax.random.key(0), X)
    variables["params"]["scale"] += 2.0**-12  # one and that is one in bfloat16
    y = small.apply(variables, X, mutable="batch_stats")[0]
    assert_close(y / (1 + 2.0**-12), plain.apply(start, X, mutable="batch_stats")[0], 24)


# Graphs --------------------------------------------------------------------------------------------------------------


def test_graphs_of_a_padded_batch_over_replicas(rng):
    """What the padding holds does not count, NaN included; nodes of a graph may lie on several devices."""
    nodes, graph = rng.normal(2, 3, (8, 3)).astype(np.float32), np.array([0, 0, 0, 1, 1, 3, 3, 3])
    alpha = rng.uniform(size=3).astype(np.float32)
    real = (graph < 3)[:, None]
    settings = {"num_graphs": 4, "epsilon": 1e-5}
    padded = np.where(real, nodes, np.nan)
    y = jaxnorm.graph_norm(padded, graph, mean_scale=alpha, mask=real, **settings)
    for g in (0, 1):
        own = np.asarray(nodes[graph == g], float)
        c = own - alpha * own.mean(0)
        assert_close(y[graph == g], c / np.sqrt((c**2).mean(0) + 1e-5), 8)
    y = jaxnorm.graph_norm(nodes, graph, mean_scale=alpha, **settings)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    place = jax.NamedSharding(mesh, P("data"))
    norm = jax.jit(lambda x, g: jaxnorm.graph_norm(x, g, mean_scale=alpha, **settings))
    assert_close(norm(*jax.device_put((nodes, graph), place)), y, 8, magnitude=float(abs(y).max()))
    with pytest.raises(TypeError, match="num_graphs must be an integer; got num_graphs=None"):
        jl.GraphNorm().init(jax.random.key(0), nodes, graph)


# No batch axis -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GroupNorm", "InstanceNorm"])
def test_one_example_without_a_batch_axis(kind, rng):
    image = rng.normal(size=(5, 6, 4)).astype(np.float32)
    settings = {"num_groups": 2} if kind == "GroupNorm" else {}
    function = jaxnorm.group_norm if kind == "GroupNorm" else jaxnorm.instance_norm
    expected = function(image[None], **settings)[0]
    assert_close(function(image, batched=False, **settings), expected, 60, magnitude=8)
    assert_close(jax.vmap(lambda x: function(x, batched=False, **settings))(image[None])[0], expected, 60)
    layer = getattr(jl, kind)(**settings, epsilon=1e-5, batched=False)
    assert_close(layer.init_with_output(jax.random.key(0), image)[0], expected, 60, magnitude=8)
    in_nnx = getattr(jn, kind)(4, **settings, epsilon=1e-5, batched=False, rngs=nnx.Rngs(0))
    assert_close(in_nnx(image), expected, 60, magnitude=8)


# Which layer takes which argument ------------------------------------------------------------------------------------

ARGUMENTS = {
    "mask": ("call", np.ones((8, 3, 1), bool)),
    "residual": ("call", X),
    "activation": ("field", "relu"),
    "invertible": ("field", True),
    "trainable": ("field", False),
    "zero_centered_scale": ("field", True),
    "axis_name": ("field", "data"),
    "unbiased": ("field", True),
    "momentum": ("field", None),
    "update_running_average": ("field", False),
}


def takes(name, argument, library):
    """ "yes", "no" (there is no such argument) or "refused", by name, of a layer in training."""
    where, value = ARGUMENTS[argument]
    layer = getattr(jl if library == "linen" else jn, name)
    if argument not in inspect.signature(layer.__call__ if where == "call" else layer).parameters:
        return "no"
    given, fields = ({argument: value}, {}) if where == "call" else ({}, {argument: value})
    inputs = catalog.LAYERS[name][1]

    def run(x):
        if library == "linen":
            variables = catalog.linen(name).init(jax.random.key(0), x, *inputs)
            return catalog.linen(name, **fields).apply(variables, x, *inputs, **given, mutable=True)[0]
        return catalog.of_nnx(name, **fields)(x, *inputs, **given)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jax.eval_shape(jax.vmap(run, axis_name="data"), X[None])
    except ValueError as error:
        if argument in str(error) and name in str(error):
            return "refused"
        raise
    return "yes"


def table():
    """In Markdown: a row for each layer."""
    marks = {"yes": "yes", "no": "", "refused": "refused"}
    lines = ["| layer | " + " | ".join(f"`{a}`" for a in ARGUMENTS) + " |", "|---" + "|:-:" * len(ARGUMENTS) + "|"]
    for name in catalog.LAYERS:
        lines.append(f"| `{name}` | " + " | ".join(marks[takes(name, a, "linen")] for a in ARGUMENTS) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("name", catalog.LAYERS)
def test_linen_and_nnx_take_the_same_arguments(name):
    for argument in ARGUMENTS:
        assert takes(name, argument, "linen") == takes(name, argument, "nnx"), argument


def test_the_page_of_arguments():
    """`python tests/test_catalogue.py` prints the table that belongs there."""
    assert table() in (Path(__file__).parents[1] / "docs" / "arguments.md").read_text()


if __name__ == "__main__":
    print(table())
