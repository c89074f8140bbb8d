"""The remedies as layers: Linen and NNX give what the functions give, hold what they say, and keep their averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from flax import linen as nn
from flax import nnx as fnnx

import jaxnorm
import jaxnorm.linen as jl
import jaxnorm.nnx as jn

X = np.random.default_rng(0).standard_normal((8, 3, 4)).astype(np.float32) + 2
DOMAIN = np.array([0, 1] * 4)
CONDITION = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
STYLE = np.flip(X) * 3
LENGTHS = np.array([3, 1, 2, 3, 1, 1, 2, 3])

# name: settings, further inputs, the function of the layer's initial parameters, whether there are averages
LAYERS = {
    "GhostBatchNorm": (
        {"virtual_batch_size": 4},
        (),
        lambda: jaxnorm.ghost_batch_norm(X, virtual_batch_size=4),
        True,
    ),
    "BatchRenorm": (
        {"r_max": 2.0, "d_max": 0.5},
        (),
        lambda: jaxnorm.batch_renorm(X, jaxnorm.init_running(4), r_max=2.0, d_max=0.5),
        True,
    ),
    "SplitBatchNorm": (
        {"num_domains": 2, "split_affine": True},
        (DOMAIN,),
        lambda: jaxnorm.split_batch_norm(X, DOMAIN, num_domains=2),
        True,
    ),
    "SwitchableNorm": ({}, (), lambda: jaxnorm.switchable_norm(X, jnp.zeros(3), jnp.zeros(3)), True),
    "EvoNormB0": ({}, (), lambda: jaxnorm.evonorm_b0(X, None, None, jnp.ones(4)), True),
    "EvoNormS0": ({"num_groups": 2}, (), lambda: jaxnorm.evonorm_s0(X, None, None, jnp.ones(4), num_groups=2), False),
    "FilterResponseNorm": ({}, (), lambda: jaxnorm.filter_response_norm(X, threshold=jnp.zeros(4)), False),
    "DynamicTanh": ({}, (), lambda: jaxnorm.dynamic_tanh(X, 0.5), False),
    "SequenceBatchNorm": (
        {"max_length": 3},
        (LENGTHS,),
        lambda: jaxnorm.batch_norm(X, axis=(1, 2), mask=jaxnorm.length_mask(LENGTHS, 3)[..., None]),
        True,
    ),
    "ConditionalBatchNorm": ({}, (CONDITION,), lambda: jaxnorm.batch_norm(X), True),
    "ConditionalInstanceNorm": ({}, (CONDITION,), lambda: jaxnorm.instance_norm(X, epsilon=1e-5), False),
    "ConditionalLayerNorm": ({}, (CONDITION,), lambda: jaxnorm.layer_norm(X), False),
}
CONDITIONAL = [name for name in LAYERS if name.startswith("Conditional")]


def linen(name):
    settings, inputs, _, averaged = LAYERS[name]
    layer = getattr(jl, name)(**settings)
    use = {"use_running_average": False} if averaged else {}
    variables = layer.init(jax.random.key(0), X, *inputs, **use)
    y, updates = layer.apply(variables, X, *inputs, **use, mutable="batch_stats")
    return layer, {**variables, **updates}, y


def nnx(name):
    settings, inputs, *_ = LAYERS[name]
    layer = getattr(jn, name)(4, *([5] if name in CONDITIONAL else []), **settings, rngs=fnnx.Rngs(0))
    return layer, layer(X, *inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_functions(name):
    _, inputs, function, averaged = LAYERS[name]
    want = function()
    want, batch = want if averaged else (want, None)
    module, variables, y = linen(name)
    layer, z = nnx(name)
    for result in (y, z):
        assert_close(result, np.asarray(want), size=24)
    if not averaged:
        assert "batch_stats" not in variables
        return
    running = jaxnorm.init_running(np.shape(batch.mean))
    running = jaxnorm.update_running(running, batch, alpha=1 - 0.99)
    fields = {"mean", "var"} | ({"count"} if name == "SequenceBatchNorm" else set())
    assert set(variables["batch_stats"]) - {"steps"} == fields  # of the others, what a batch norm has
    for field in fields:
        for value in (variables["batch_stats"][field], getattr(layer, field)[...]):
            assert_close(value, np.asarray(getattr(running, field)), size=24, what=field)
    layer.eval()
    seen = module.apply(variables, X, *inputs, use_running_average=True), layer(X, *inputs)
    assert_close(seen[0], np.asarray(seen[1]), size=24)
    assert np.abs(np.asarray(seen[0]) - np.asarray(want)).max() > 0.01
    again = layer(X, *inputs)
    np.testing.assert_array_equal(again, seen[1])  # at inference nothing moves


def test_parameters_train():
    """What a remedy learns besides scale and bias is a parameter, with a gradient that is not zero."""
    for name, extra in (("SwitchableNorm", "mean_logits"), ("EvoNormB0", "v"), ("EvoNormS0", "v"),
                        ("FilterResponseNorm", "threshold"), ("DynamicTanh", "alpha")):  # fmt: skip
        settings, *_ = LAYERS[name]
        layer = getattr(jn, name)(4, **settings, rngs=fnnx.Rngs(0))
        gradient = fnnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X - 2)) * STYLE))(layer)
        assert np.abs(np.asarray(gradient[extra][...])).max() > 0, name


def test_renorm_follows_its_schedule():
    bound = optax.linear_schedule(1.0, 100.0, transition_steps=1, transition_begin=1)
    wide = optax.linear_schedule(0.0, 100.0, transition_steps=1, transition_begin=1)
    layer = jn.BatchRenorm(4, r_max=bound, d_max=wide, rngs=fnnx.Rngs(0))
    module = jl.BatchRenorm(r_max=bound, d_max=wide, use_running_average=False)
    variables = module.init(jax.random.key(0), X)
    for want in (jaxnorm.batch_norm(X)[0], jaxnorm.batch_norm(X)[0], None):
        running = jaxnorm.RunningStats(layer.mean[...], layer.var[...], jnp.zeros(4))
        want = jaxnorm.normalize(X, running) if want is None else want
        y, variables["batch_stats"] = (
            (out := module.apply(variables, X, mutable="batch_stats"))[0],
            out[1]["batch_stats"],
        )
        assert_close(layer(X), np.asarray(want), size=24, magnitude=10)
        assert_close(y, np.asarray(want), size=24, magnitude=10)
    assert int(layer.steps[...]) == int(variables["batch_stats"]["steps"]) == 3


def test_conditions_modulate():
    """Scale less one and bias are linear in the condition; FiLM does it to x itself."""
    rng = np.random.default_rng(2)
    kernel = rng.standard_normal((5, 8)).astype(np.float32)
    scale, bias = np.split(CONDITION.astype(float) @ kernel, 2, axis=-1)
    plain = {
        "ConditionalInstanceNorm": jaxnorm.instance_norm(X, epsilon=1e-5),
        "ConditionalLayerNorm": jaxnorm.layer_norm(X),
        "ConditionalBatchNorm": jaxnorm.batch_norm(X)[0],
        "FiLM": X,
    }
    for name, normalized in plain.items():
        want = np.asarray(normalized, float) * (1 + scale[:, None]) + bias[:, None]
        module = getattr(jl, name)()
        use = {"use_running_average": False} if "Batch" in name else {}
        variables = module.init(jax.random.key(0), X, CONDITION, **use)
        variables["params"]["modulation"]["kernel"] = kernel
        assert_close(module.apply(variables, X, CONDITION, **use, mutable="batch_stats")[0], want, size=24, what=name)
        layer = getattr(jn, name)(4, 5, rngs=fnnx.Rngs(0))
        layer.modulation.dense.kernel[...] = kernel
        assert_close(layer(X, CONDITION), want, size=24, what=name)


def test_adaptive_norms():
    for y in (jl.AdaIN().apply({}, X, STYLE), jn.AdaIN()(X, STYLE)):
        x, style = X.astype(float), STYLE.astype(float)
        z = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        want = z * np.sqrt(style.var(1, keepdims=True) + 1e-5) + style.mean(1, keepdims=True)
        assert_close(y, want, size=3)
    (y, gate), _ = jl.AdaLN().init_with_output(jax.random.key(0), X, CONDITION)
    z, other = jn.AdaLN(4, 5, rngs=fnnx.Rngs(0))(X, CONDITION)
    for normalized, g in ((y, gate), (z, other)):
        assert_close(normalized, np.asarray(jaxnorm.layer_norm(X)), size=4)
        assert g.shape == (8, 1, 4)
        np.testing.assert_array_equal(g, 0)


def test_standardized_kernels():
    """The kernel that is used has mean zero and variance gain^2 / fan-in for every output."""
    x = np.random.default_rng(3).standard_normal((2, 5, 5, 3)).astype(np.float32)
    conv = jn.StandardizedConv(3, 4, (3, 3), rngs=fnnx.Rngs(0))
    plain = fnnx.Conv(3, 4, (3, 3), rngs=fnnx.Rngs(0))
    kernel = jaxnorm.standardize_weights(conv.kernel[...], jnp.full(4, 27**-0.5))
    np.testing.assert_allclose(kernel.var((0, 1, 2)), 1 / 27, rtol=1e-2)
    plain.kernel[...] = kernel
    assert_close(conv(x), np.asarray(plain(x)), size=27)
    module = jl.StandardizedConv(4, (3, 3))
    variables = module.init(jax.random.key(0), x)
    assert {k: v.shape for k, v in variables["params"].items()} == {"kernel": (3, 3, 3, 4), "gain": (4,), "bias": (4,)}
    variables["params"]["kernel"] = conv.kernel[...]
    assert_close(module.apply(variables, x), np.asarray(plain(x)), size=27)
    dense, linear = jl.StandardizedDense(6), jn.StandardizedLinear(3, 6, rngs=fnnx.Rngs(0))
    variables = dense.init(jax.random.key(0), x)
    variables["params"]["kernel"] = linear.kernel[...]
    assert_close(dense.apply(variables, x), np.asarray(linear(x)), size=3)


def test_longer_sequences_have_the_averages_of_the_last_step():
    longer = np.concatenate([X, X], 1)
    module, variables, _ = linen("SequenceBatchNorm")
    layer, _ = nnx("SequenceBatchNorm")
    layer.eval()
    y = module.apply(variables, longer, use_running_average=True)
    assert_close(y, np.asarray(layer(longer)), size=24)
    last = jaxnorm.RunningStats(*(variables["batch_stats"][n][2] for n in ("mean", "var", "count")))
    assert_close(y[:, 2:], np.asarray(jaxnorm.normalize(longer[:, 2:], last)), size=24)
    with pytest.raises(ValueError, match=r"^SequenceBatchNorm: .*length=6, max_length=3"):
        layer(longer, use_running_average=False)


SCANNED = {"variable_axes": {"batch_stats": 0}, "variable_broadcast": "params", "split_rngs": {"params": False}}
AXES = fnnx.StateAxes({fnnx.BatchStat: 0, ...: None})


def scanned(cell, carry, *xs):
    axes = (AXES, fnnx.Carry, *(1 for _ in xs))
    return fnnx.scan(lambda cell, c, *x: cell(c, *x), in_axes=axes, out_axes=(fnnx.Carry, 1))(cell, carry, *xs)


@pytest.mark.slow
def test_recurrent_cell():
    """Every step is normalized by its own statistics; averages are kept of each, and continued for longer sequences."""
    x, carry = (
        np.random.default_rng(4).standard_normal((8, 5, 2)).astype(np.float32),
        (np.zeros((8, 3), np.float32),) * 2,
    )
    mask = np.asarray(jaxnorm.length_mask(np.array([3, 1, 2, 3, 3, 2, 1, 3]), 5))[..., None]
    rnn = nn.scan(jl.BatchNormLSTMCell, in_axes=1, out_axes=1, **SCANNED)
    module = rnn(3, use_running_average=False, momentum=0.0)
    variables = module.init(jax.random.key(0), carry, x, mask)
    (_, y), updates = module.apply(variables, carry, x, mask, mutable="batch_stats")
    p = jax.tree.map(np.asarray, variables["params"])

    def norm(v, name, m):
        mean = v[m].mean(0)
        bias = p[name].get("bias", 0)
        return (v - mean) / np.sqrt(v[m].var(0) + 1e-5) * p[name]["scale"] + bias

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    c, h = np.zeros((2, 8, 3))
    for t in range(3):
        m = mask[:, t, 0]
        gates = norm(h @ p["dense_h"]["kernel"], "norm_h", m) + norm(x[:, t] @ p["dense_x"]["kernel"], "norm_x", m)
        i, f, g, o = np.split(gates + p["bias"], 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        assert_close(updates["batch_stats"]["norm_c"]["mean"][t], c[m].mean(0), size=8, magnitude=1)
        h = sigmoid(o) * np.tanh(norm(c, "norm_c", m))
        assert_close(y[:, t], h, size=24, magnitude=1, what=f"step {t}")

    cell = jn.BatchNormLSTMCell(2, 3, steps=5, momentum=0.0, rngs=fnnx.Rngs(0))
    for name in ("dense_h", "dense_x"):
        getattr(cell, name).kernel[...] = p[name]["kernel"]
    _, z = scanned(cell, carry, x, mask)
    assert_close(z, np.asarray(y), size=24)
    cell.extend(7)
    cell.eval()
    longer = np.concatenate([x, x[:, :2]], 1)
    _, z = scanned(cell, carry, longer)
    stats = jl.extend_steps(updates["batch_stats"], 7)
    for t in range(3, 7):  # steps that were never seen
        np.testing.assert_array_equal(stats["norm_c"]["var"][t], updates["batch_stats"]["norm_c"]["var"][2])
    (_, y), _ = rnn(3, use_running_average=True).apply({**variables, "batch_stats": stats}, carry, longer, mutable=[])
    assert_close(z, np.asarray(y), size=24)


def test_bad_layers():
    with pytest.raises(ValueError, match=r"^split_batch_norm: domain must have one number per example"):
        jn.SplitBatchNorm(4, num_domains=2, rngs=fnnx.Rngs(0))(X, DOMAIN[:3])
    with pytest.raises(ValueError, match=r"^GhostBatchNorm: x must have the features.*built_for=\(3,\)"):
        jn.GhostBatchNorm(3, virtual_batch_size=2, rngs=fnnx.Rngs(0))(X)
    with pytest.raises(ValueError, match=r"^EvoNormB0: use_running_average must be given"):
        jn.EvoNormB0(4, use_running_average=None, rngs=fnnx.Rngs(0))(X)
