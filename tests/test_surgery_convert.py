import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import linen as nn
from flax import nnx

from jaxnorm import linen, surgery
from jaxnorm import nnx as jaxnorm_nnx

pytestmark = pytest.mark.any_version

os.environ.setdefault("KERAS_BACKEND", "jax")
DOCS = Path(__file__).parent.parent / "docs" / "conventions.md"


def tables():
    """The three tables that begin with "library": rows by its name."""
    found: list[dict[str, list[str]]] = []
    inside = False
    for line in DOCS.open():
        cells = [c.strip().replace("/ ", "/") for c in line.strip("|\n").split("|")]  # a space, where lines may break
        if cells[0] == "library":
            found.append({})
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|--"):
            found[-1][cells[0]] = cells[1:]
    return found


def test_the_tables_in_the_documentation_are_the_conventions():
    variables, settings, others = tables()
    assert variables.keys() == settings.keys() == others.keys() == surgery.CONVENTIONS.keys()
    for library, c in surgery.CONVENTIONS.items():
        default = f"{'none' if c.default_momentum is None else c.default_momentum}, {c.default_epsilon[0]}"
        words = ["unbiased" if c.unbiased else "biased", "yes" if c.debiased else "no", default]
        assert variables[library] == [c.scale, c.bias, c.mean, c.var, c.updates or ""]
        assert settings[library] == [c.momentum, c.weighs, c.epsilon, *words]
        assert others[library] == ["none" if e is None else str(e) for e in c.default_epsilon[1:]]


def trained(rng, updates=7, features=4):
    torch = pytest.importorskip("torch")
    bn = torch.nn.BatchNorm2d(features, momentum=0.3, eps=1e-4)
    with torch.no_grad():
        for p in bn.parameters():
            p.copy_(torch.tensor(rng.normal(size=features)))
    for _ in range(updates):
        bn(torch.tensor(rng.normal(1.0, 2.0, (5, features, 3, 3)), dtype=torch.float32))
    return torch, bn


@pytest.mark.parametrize("library", surgery.CONVENTIONS)
def test_from_torch_to_any_library_and_back(library, rng):
    _, bn = trained(rng)
    state = {f"layer1.0.bn.{name}": a for name, a in bn.state_dict().items()}
    there = surgery.convert(state, "torch", library, prefix="layer1.0.bn", momentum=0.3, eps=1e-4, ndim=4)
    settings = {name: value for name, value in there.settings.items() if name != "mode"}
    back = surgery.convert(there.variables, library, "torch", updates=there.updates, **settings)
    assert {"momentum": 0.3, "eps": 1e-4}.items() <= back.settings.items()
    assert back.updates == 7
    assert back.variables.keys() == bn.state_dict().keys()
    for name, a in bn.state_dict().items():
        if library == "equinox" and name.startswith("running"):  # divided out and back
            np.testing.assert_allclose(back.variables[name], a.numpy(), rtol=3e-7)
        else:
            np.testing.assert_array_equal(back.variables[name], a.numpy(), strict=True)
    assert bool(there.notes) == (library not in ("torch", "jaxnorm.linen", "jaxnorm.nnx"))


def test_a_torch_block_and_its_counterpart_train_alike(rng):
    """Output, gradients and averages after ten steps of a residual block; then its evaluation."""
    torch, _ = trained(rng)
    conv = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
    norms = [torch.nn.BatchNorm2d(4) for _ in range(2)]
    for bn in norms:
        for a in bn.state_dict().values():
            if a.ndim:
                a.copy_(torch.tensor(rng.uniform(0.5, 1.5, 4)))
    converted = [surgery.convert(bn.state_dict(), "torch", "jaxnorm.linen") for bn in norms]
    layers = [linen.BatchNorm(axis=1, **c.settings) for c in converted]
    stats = [c.variables["batch_stats"] for c in converted]
    params = [c.variables["params"] for c in converted] + [jnp.asarray(conv.weight.detach().numpy())]

    def block(params, stats, x, train):
        y, new = x, []
        for layer, p, s in zip(layers, params, stats, strict=False):
            y = jax.lax.conv_general_dilated(y, params[2], (1, 1), "SAME")
            variables = {"params": p, "batch_stats": s}
            y, updated = layer.apply(variables, y, use_running_average=not train, mutable="batch_stats")
            new.append(updated["batch_stats"])
            y = nn.relu(y)
        return x + y, new

    def loss(params, stats, x, cotangent):
        y, new = block(params, stats, x, True)
        return jnp.sum(y * cotangent), (y, new)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for _ in range(10):
        x, cotangent = (rng.normal(size=(6, 4, 5, 5)).astype(np.float32) for _ in range(2))
        (_, (y, stats)), grads = step(params, stats, x, cotangent)
        y_torch = torch.tensor(x)
        conv.zero_grad(), [bn.zero_grad() for bn in norms]
        for bn in norms:
            y_torch = torch.relu(bn(conv(y_torch)))
        y_torch = y_torch + torch.tensor(x)
        (y_torch * torch.tensor(cotangent)).sum().backward()
        assert_close(y, y_torch.detach().numpy(), 36)
    for bn, s, g in zip(norms, stats, grads, strict=False):
        # the gradient is a sum over the batch, of terms that are each rounded as the output is
        assert_close(s["mean"], bn.running_mean.numpy(), 36, magnitude=1.0)
        assert_close(s["var"], bn.running_var.numpy(), 36)
        assert_close(g["scale"], bn.weight.grad.numpy(), 150, magnitude=float(np.sqrt(150)))
        assert_close(g["bias"], bn.bias.grad.numpy(), 150, magnitude=float(np.sqrt(150)))
    assert_close(grads[2], conv.weight.grad.numpy(), 150, magnitude=float(np.sqrt(150)))
    y, _ = block(params, stats, x, False)
    for bn in norms:
        bn.eval()
    y_torch = torch.tensor(x)
    for bn in norms:
        y_torch = torch.relu(bn(conv(y_torch)))
    assert_close(y, (y_torch + torch.tensor(x)).detach().numpy(), 36 * 10)


def haiku_norm(converted):
    hk = pytest.importorskip("haiku")
    run = hk.without_apply_rng(
        hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.8, eps=1e-3, name="norm")(x, train))
    )

    def norm(params, state, x, train):
        params = {new: params[old].reshape(1, 1, 1, -1) for old, new in (("scale", "scale"), ("bias", "offset"))}
        return run.apply({"norm": params}, state, x, train)

    state = {f"norm/~/{ema}": values for ema, values in converted.variables["state"].items()}
    return norm, state, lambda state: [state[f"norm/~/{ema}"]["average"].reshape(-1) for ema in ("mean_ema", "var_ema")]


def equinox_norm(converted):
    eqx = pytest.importorskip("equinox")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch", momentum=0.8, eps=1e-3)
    arrays = converted.variables
    state = state.set(layer.batch_state_index, (arrays["hidden_mean"], arrays["hidden_var"]))
    state = state.set(layer.batch_counter, state.get(layer.batch_counter) + int(arrays["counter"]))

    def norm(params, state, x, train):
        own = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (params["scale"], params["bias"]))
        own = own if train else eqx.nn.inference_mode(own)
        run = jax.vmap(own, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = run(x.transpose(0, 3, 1, 2), state)
        return y.transpose(0, 2, 3, 1), state

    return norm, state, lambda state: state.get(layer.batch_state_index)


def keras_norm(converted):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another library")
    layer, arrays = keras.layers.BatchNormalization(**converted.settings), converted.variables
    layer.build((None, 5, 5, 4))

    def norm(params, state, x, train):
        return layer.stateless_call([params["scale"], params["bias"]], state, x, training=train)

    return norm, [arrays["moving_mean"], arrays["moving_variance"]], lambda state: state


NORMS = {"haiku": haiku_norm, "equinox": equinox_norm, "keras": keras_norm}
"""Batch norm of other libraries as ``norm(params, state, x, train)``, its state, and the averages in it."""


@pytest.mark.parametrize("library", NORMS)
def test_a_block_and_its_counterpart_in_jax_train_alike(library, rng):
    """Output, gradients and averages over ten steps of a residual block; then its evaluation."""
    x, cotangent = (rng.normal(size=(10, 6, 5, 5, 4)).astype(np.float32) for _ in range(2))
    params = {name: jnp.asarray(rng.uniform(0.5, 1.5, 4), jnp.float32) for name in ("scale", "bias")}
    stats = {name: jnp.asarray(rng.uniform(0.5, 1.5, 4), jnp.float32) for name in ("mean", "var")}
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 4)) / 6, jnp.float32)
    layer, variables = linen.BatchNorm(momentum=0.8, epsilon=1e-3), {"params": params, "batch_stats": stats}
    settings = {"momentum": 0.8, "epsilon": 1e-3}
    norm, state, averages = NORMS[library](
        surgery.convert(variables, "jaxnorm.linen", library, ndim=4, **settings)  # as after many updates
    )

    def ours(params, stats, x, train):
        variables = {"params": params, "batch_stats": stats}
        y, new = layer.apply(variables, x, use_running_average=not train, mutable="batch_stats")
        return y, new["batch_stats"]

    def block(norm, params, kernel, state, x, train):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y, state = norm(params, state, y, train)
        return x + nn.relu(y), state

    def loss(norm, params, kernel, state, x, cotangent):
        y, state = block(norm, params, kernel, state, x, True)
        return jnp.sum(y * cotangent), (y, state)

    theirs, own = (jax.jit(jax.grad(partial(loss, n), (0, 1), has_aux=True)) for n in (norm, ours))
    for i in range(10):
        expected, (y, state) = theirs(params, kernel, state, x[i], cotangent[i])
        grads, (own_y, stats) = own(params, kernel, stats, x[i], cotangent[i])
        assert_close(own_y, y, 36)
        jax.tree.map(lambda a, b: assert_close(a, b, 150, magnitude=float(np.sqrt(150))), grads, expected)
    mean, var = averages(state)
    assert_close(stats["mean"], mean, 36, magnitude=1.0)
    assert_close(stats["var"], var, 36)
    tested, _ = jax.jit(partial(block, ours, train=False))(params, kernel, stats, x[0])
    expected, _ = jax.jit(partial(block, norm, train=False))(params, kernel, state, x[0])
    assert_close(tested, expected, 36 * 10)


def batches(rng, shape=(6, 3, 3, 4)):
    return [rng.normal(1.0, 2.0, shape).astype(np.float32) for _ in range(10)]


def continued(converted, data):
    """Averages of our layer after more batches, and what it makes of the last in evaluation."""
    layer, variables = linen.BatchNorm(**converted.settings), converted.variables
    step = jax.jit(lambda v, x: layer.apply(v, x, use_running_average=False, mutable="batch_stats")[1])
    for x in data:
        variables = variables | step(variables, x)
    y = layer.apply(variables, data[-1], use_running_average=True)
    return y, variables


def test_haiku_averages_are_debiased_and_back(rng):
    hk = pytest.importorskip("haiku")
    bn = hk.without_apply_rng(
        hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.8, eps=1e-3, name="norm")(x, train))
    )
    data = batches(rng)
    params, state = bn.init(jax.random.key(0), data[0], True)
    for x in data[:3]:
        _, state = bn.apply(params, state, x, True)
    tree = {"params": params, "state": state}
    ours = surgery.convert(tree, "haiku", "jaxnorm.linen", prefix="norm", decay_rate=0.8, eps=1e-3)
    y = linen.BatchNorm(**ours.settings).apply(ours.variables, data[0], use_running_average=True)
    assert_close(y, bn.apply(params, state, data[0], False)[0])

    back = surgery.convert(ours.variables, "jaxnorm.linen", "haiku", updates=ours.updates, ndim=4, **ours.settings)
    assert ours.updates == 3
    for ema in ("mean_ema", "var_ema"):
        for name, a in state[f"norm/~/{ema}"].items():
            np.testing.assert_allclose(back.variables["state"][ema][name], a, rtol=3e-7)
    state = {f"norm/~/{ema}": values for ema, values in back.variables["state"].items()}
    for x in data[3:]:
        _, state = bn.apply({"norm": back.variables["params"]}, state, x, True)
    again = surgery.convert({"params": params, "state": state}, "haiku", "jaxnorm.linen", prefix="norm", decay_rate=0.8)
    assert again.updates == 10


def test_equinox_agrees_in_evaluation_and_in_what_follows(rng):
    eqx = pytest.importorskip("equinox")
    bn, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch", momentum=0.8, eps=1e-3)
    run = jax.vmap(bn, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    data = batches(rng)
    for x in data[:3]:
        _, state = run(x.transpose(0, 3, 1, 2), state)
    mean, var = state.get(bn.batch_state_index)
    arrays = {"weight": bn.weight, "bias": bn.bias, "hidden_mean": mean, "hidden_var": var}
    arrays["counter"] = state.get(bn.batch_counter)
    ours = surgery.convert(arrays, "equinox", "jaxnorm.linen", momentum=0.8, eps=1e-3)
    y = linen.BatchNorm(**ours.settings).apply(ours.variables, data[0], use_running_average=True)
    test = jax.vmap(eqx.nn.inference_mode(bn), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    assert_close(y, test(data[0].transpose(0, 3, 1, 2), state)[0].transpose(0, 2, 3, 1))
    back = surgery.convert(ours.variables, "jaxnorm.linen", "equinox", updates=ours.updates, **ours.settings)
    assert back.settings == {"momentum": 0.8, "eps": 1e-3, "mode": "batch"}
    for name, a in arrays.items():
        np.testing.assert_allclose(back.variables[name], a, rtol=3e-7)


def test_keras_agrees_in_evaluation_and_in_what_follows(rng):
    keras = pytest.importorskip("keras")
    bn, data = keras.layers.BatchNormalization(momentum=0.8), batches(rng)
    for x in data[:3]:
        bn(x, training=True)
    arrays = {w.name: np.asarray(w.value) for w in bn.weights}
    ours = surgery.convert(arrays, "keras", "jaxnorm.linen", momentum=0.8)
    assert ours.settings == {"momentum": 0.8, "epsilon": 1e-3, "unbiased": False}
    y, variables = continued(ours, data[3:])
    for x in data[3:]:
        bn(x, training=True)
    assert_close(y, np.asarray(bn(data[-1], training=False)), 54)
    back = surgery.convert(variables, "jaxnorm.linen", "keras", **ours.settings)
    for w in bn.weights:
        assert_close(back.variables[w.name], np.asarray(w.value), 54)


def test_nnx_takes_what_was_converted(rng):
    torch, bn = trained(rng)
    converted = surgery.convert(bn.state_dict(), "torch", "jaxnorm.nnx", momentum=0.3, eps=1e-4)
    layer = jaxnorm_nnx.BatchNorm(4, rngs=nnx.Rngs(0), **converted.settings)
    nnx.update(layer, converted.variables)
    layer.eval()
    x = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
    expected = bn.eval()(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    assert_close(layer(x), expected)


def test_cumulative_averages_go_on(rng):
    torch = pytest.importorskip("torch")
    bn, data = torch.nn.BatchNorm2d(4, momentum=None), batches(rng)
    for x in data[:4]:
        bn(torch.tensor(x.transpose(0, 3, 1, 2)))
    with pytest.raises(ValueError, match="give batch_values"):
        surgery.convert(bn.state_dict(), "torch", "jaxnorm.linen", momentum=None)
    ours = surgery.convert(bn.state_dict(), "torch", "jaxnorm.linen", momentum=None, batch_values=54)
    _, variables = continued(ours, data[4:])
    for x in data[4:]:
        bn(torch.tensor(x.transpose(0, 3, 1, 2)))
    assert_close(variables["batch_stats"]["var"], bn.running_var.numpy(), 54)
    assert_close(variables["batch_stats"]["mean"], bn.running_mean.numpy(), 54)
    back = surgery.convert(variables, "jaxnorm.linen", "torch", updates=10, **ours.settings)
    assert back.settings["momentum"] is None
    with pytest.raises(ValueError, match=r"flax\.linen has no cumulative average"):
        surgery.convert(bn.state_dict(), "torch", "flax.linen", momentum=None)


KINDS = {"layer": "LayerNorm", "group": "GroupNorm", "instance": "InstanceNorm", "rms": "RMSNorm"}


@pytest.mark.parametrize("kind", KINDS)
def test_other_norms_agree_with_torch(kind, rng):
    torch = pytest.importorskip("torch")
    make = {
        "layer": lambda: torch.nn.LayerNorm(4),
        "group": lambda: torch.nn.GroupNorm(2, 4),
        "instance": lambda: torch.nn.InstanceNorm2d(4, affine=True),
        "rms": lambda: torch.nn.RMSNorm(4),
    }
    norm = make[kind]()
    for a in norm.state_dict().values():
        a.copy_(torch.tensor(rng.normal(size=4)))
    ours = surgery.convert(norm.state_dict(), "torch", "jaxnorm.linen", kind=kind)
    settings = {"num_groups": 2} if kind == "group" else {}
    x = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
    first = kind in ("group", "instance")
    expected = norm(torch.tensor(x.transpose(0, 3, 1, 2) if first else x)).detach().numpy()
    y = getattr(linen, KINDS[kind])(**settings, **ours.settings).apply(ours.variables, x)
    assert_close(y, expected.transpose(0, 2, 3, 1) if first else expected, 18, magnitude=1.0)
    back = surgery.convert(ours.variables, "jaxnorm.linen", "torch", kind=kind, **ours.settings)
    assert back.variables.keys() == norm.state_dict().keys()
    assert all((back.variables[n] == a.numpy()).all() for n, a in norm.state_dict().items())


def test_bfloat16_keeps_its_bits():
    torch = pytest.importorskip("torch")
    a = torch.tensor([1.0, 1 / 3], dtype=torch.bfloat16)
    converted = surgery.convert({"weight": a}, "torch", "flax.nnx", kind="rms")
    assert converted.variables["scale"].dtype == jnp.bfloat16
    assert converted.variables["scale"].astype(np.float32).tolist() == a.float().tolist()


def test_names_of_norms_in_keras(rng):
    keras = pytest.importorskip("keras")
    makers = {"layer": "LayerNormalization", "rms": "RMSNormalization", "group": "GroupNormalization"}
    for kind, maker in makers.items():
        layer = getattr(keras.layers, maker)(**({"groups": 2} if kind == "group" else {}))
        layer.build((2, 4))
        arrays = {w.name: np.asarray(w.value) for w in layer.weights}
        ours = surgery.convert(arrays, "keras", "flax.linen", kind=kind)
        assert ours.settings == {"epsilon": layer.epsilon}
        assert surgery.convert(ours.variables, "flax.linen", "keras", kind=kind).variables.keys() == arrays.keys()


def test_unknown_names_are_listed():
    ones = np.ones(2)
    with pytest.raises(ValueError, match=r"a norm of keras has gamma, beta, .*; got weight, slope"):
        surgery.convert({"weight": ones, "slope": ones}, "keras", "torch", kind="layer")
    with pytest.raises(ValueError, match=r"a batch norm of torch has running_mean and running_var; got weight\."):
        surgery.convert({"weight": ones}, "torch", "keras")
    with pytest.raises(ValueError, match=r"source must be one of torch, .*; got 'mxnet'"):
        surgery.convert({}, "mxnet", "torch")
    with pytest.raises(ValueError, match=r"got conv/weight\."):
        surgery.convert({"conv.weight": ones}, "torch", "keras", prefix="bn")
    with pytest.raises(ValueError, match="haiku has no default of decay_rate"):
        surgery.convert({"mean_ema": {"average": ones}, "var_ema": {"average": ones}}, "haiku", "torch")
