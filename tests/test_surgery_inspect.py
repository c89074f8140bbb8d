from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from networks import NNXResNet, images, nnx_module

from jaxnorm import linen, surgery

pytestmark = pytest.mark.any_version


class Net(nn.Module):
    axis: int = -1
    momentum: float = 0.9
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=True):
        for width in (6, 8):
            x = nn.Conv(width, (3, 3), padding="VALID")(x)
            norm = nn.BatchNorm(not train, axis=self.axis, momentum=self.momentum, axis_name=self.axis_name)
            x = nn.relu(norm(x))
        return nn.Dense(2)(x.mean((1, 2)))


def data(rng, n):
    """Two textures, each image brighter or darker as a whole, in three channels that differ."""
    label = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 8, 8, 3)) * [0.5, 1.0, 2.0]
    x += label[:, None, None, None] * np.sin(np.arange(8))[:, None, None] + rng.normal(1.5, 2.0, (n, 1, 1, 1))
    return jnp.asarray(x, jnp.float32), jnp.asarray(label)


def trained(model, rng, *, steps=60, batch=16, keep=True, poison=False, wrap=lambda step: step):
    """Variables after so many steps of SGD."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    params, stats = variables["params"], variables["batch_stats"]

    def step(params, stats, x, label):
        def loss(params):
            out, new = model.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
            return optax.softmax_cross_entropy_with_integer_labels(out, label).mean(), new["batch_stats"]

        grads, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), new

    run = jax.jit(wrap(step))
    for _ in range(steps):
        params, new = run(params, stats, *data(rng, batch))
        stats = new if keep else stats
    if poison:
        x, label = data(rng, batch)
        _, stats = run(params, stats, x.at[0, 0, 0, 0].set(jnp.nan), label)
    return {"params": params, "batch_stats": stats}


def unsynchronized(step):
    mesh = Mesh(np.array(jax.devices()[:4]), "data")
    specs = (P(), P(), P("data"), P("data"))
    return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)


CAUSES = {
    "never updated": ({}, {"keep": False}, 1.0),
    "momentum too slow": ({"momentum": 0.99}, {}, 1.0),
    "not finite": ({}, {"poison": True}, 1.0),
    "wrong axis": ({"axis": 1}, {}, 1.0),
    "scaled differently": ({}, {}, 20.0),
    "batch of one": ({"momentum": 0.98}, {"batch": 1, "steps": 300}, 1.0),
    "not synchronized": ({}, {"wrap": unsynchronized}, 1.0),
    None: ({}, {}, 1.0),
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.slow
def test_causes_of_collapsed_evaluation_are_named(cause, rng):
    """Each made on purpose, in a small training."""
    settings, how, scale = CAUSES[cause]
    model = Net(**settings)
    variables = trained(model, rng, **how)
    report = surgery.inspect(model, variables, scale * data(rng, 256)[0], train=False)
    assert {f.cause for f in report.findings} == ({cause} if cause else set()), str(report)
    if cause:
        assert report.findings[0].path == "BatchNorm_0"
        assert report.findings[0].remedy in str(report)


def test_the_table(rng, tmp_path):
    model = Net(momentum=0.99)
    variables = trained(model, rng, steps=30)
    variables["batch_stats"]["BatchNorm_1"]["var"] = jnp.array([0.0, 1e12, jnp.nan, 1, 1, 1, 1, 1])
    report = surgery.inspect(model, variables, data(rng, 256)[0])
    first, second = report.norms
    assert (first.path, first.kind, first.axis, first.features) == ("BatchNorm_0", "BatchNorm", -1, (6,))
    assert (first.momentum, first.epsilon) == (0.99, 1e-5)
    assert abs(int(first.updates.removeprefix("about ")) - 30) <= 6
    assert (second.dead, second.exploding, second.not_finite) == (1, 1, 1)
    assert str(report).splitlines()[0].split()[:3] == ["path", "kind", "axis"]
    assert "<td>BatchNorm_0</td>" in report._repr_html_()
    report.plot(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 1000

    less = surgery.inspect(variables)
    assert [norm.path for norm in less.norms] == ["BatchNorm_0", "BatchNorm_1"]
    assert [f.cause for f in less.findings] == ["not finite"]


def test_nnx_and_norms_without_averages(rng):
    model = nnx_module(partial(NNXResNet, depths=(1,)), rng)
    report = surgery.inspect(model, None, images(rng, batch=64))
    assert [norm.path for norm in report.norms] == ["stem/norm", "blocks/0/convs/0/norm", "blocks/0/convs/1/norm"]
    assert all(norm.drift is not None for norm in report.norms)
    nnx.update(model, surgery.recalibrate(model, None, [images(rng, batch=64)]))
    assert surgery.inspect(model, None, images(rng, batch=64)).findings == ()

    layer = linen.LayerNorm()
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    (norm,) = surgery.inspect(layer, variables, jnp.ones((2, 3))).norms
    assert (norm.kind, norm.epsilon, norm.var) == ("LayerNorm", 1e-6, None)


def test_errors():
    with pytest.raises(ValueError, match="inspect: no norms found in Dense"):
        surgery.inspect(nn.Dense(1), {"params": {}})
    with pytest.raises(TypeError, match="must be a Linen or an NNX module, or variables; got int"):
        surgery.inspect(3)
