"""The Linen and NNX layers: every argument of Flax's, the same variables, and what Flax lacks."""

import inspect
import linecache
import warnings
from functools import partial
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checks import assert_close
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import _layers

NAMES = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
SHAPE = (4, 6, 5, 8)
GROUPS = {"num_groups": 4}


def draw(rng, shape=SHAPE):
    return (rng.standard_normal(shape) + 1).astype(np.float32)


def randomize(tree, seed=0):
    """Parameters and averages of a tree of arrays moved off their initial values; variances stay positive."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.random(a.shape) + 0.5, a.dtype), tree)


# One interface to four kinds of layers -------------------------------------------------------------------------------


def linen_layer(module, name, x, settings):
    """A layer as ``call(x, **kwargs) -> (y, running averages)`` with ``variables`` to read and to set."""
    layer = getattr(module, name)(**settings)
    train = {"use_running_average": False} if name == "BatchNorm" and "use_running_average" not in settings else {}
    state = SimpleNamespace(variables=flax.core.unfreeze(layer.init(jax.random.key(0), x, **train)))

    def call(x, **kwargs):
        if name == "BatchNorm" and "use_running_average" not in {**settings, **kwargs}:
            kwargs = {"use_running_average": False, **kwargs}
        y, updates = layer.apply(state.variables, x, mutable=["batch_stats"], **kwargs)
        state.variables = {**state.variables, **updates}
        return y

    state.call = call
    state.leaves = lambda: {
        name: value
        for collection in flax.core.meta.unbox(state.variables).values()
        for name, value in collection.items()
    }
    state.randomize = lambda: setattr(state, "variables", randomize(state.variables))
    return state


def nnx_layer(module, name, x, settings):
    settings = dict(settings)
    features = settings.pop("num_features", x.shape[settings.get("axis", -1)])
    layer = getattr(module, name)(features, rngs=nnx.Rngs(0), **settings)
    state = SimpleNamespace(call=layer, layer=layer)
    state.leaves = lambda: {path[0]: v[...] for path, v in nnx.to_flat_state(nnx.state(layer))}

    def randomized():
        nnx.update(layer, randomize(nnx.state(layer)))

    state.randomize = randomized
    return state


KINDS = {"linen": (linen_layer, flax.linen, jaxnorm.linen), "nnx": (nnx_layer, nnx, jaxnorm.nnx)}


def pair(kind, name, x, settings):
    """Our layer and Flax's, with the same variables."""
    make, theirs, ours = KINDS[kind]
    layers = [make(module, name, x, settings) for module in (ours, theirs)]
    for layer in layers:
        layer.randomize()
    return layers


# Signatures ----------------------------------------------------------------------------------------------------------


def arguments(function):
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: (p.default, p.kind) for p in parameters if p.name not in ("parent", "name")}


def positional(arguments):
    return [name for name, (_, kind) in arguments.items() if kind != inspect.Parameter.KEYWORD_ONLY]


def described(default):
    """A default by its content; initializers and mappings by what they do."""
    if isinstance(default, np.dtype | type) and default is not inspect.Parameter.empty:
        return str(np.dtype(default))
    if callable(default) and default is not inspect.Parameter.empty:
        return getattr(default, "__name__", repr(default))
    return dict(default) if hasattr(default, "keys") else default


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
class TestSignatures:
    def test_construction(self, kind, name):
        """Flax's arguments come first, in Flax's order, with Flax's defaults; a new one in Flax fails here."""
        _, theirs, ours = KINDS[kind]
        expected, actual = (arguments(getattr(module, name).__init__) for module in (theirs, ours))
        assert positional(actual)[: len(positional(expected))] == positional(expected)
        for argument, (default, how) in expected.items():
            assert described(actual[argument][0]) == described(default), argument
            assert actual[argument][1] == how, argument

    def test_call(self, kind, name):
        _, theirs, ours = KINDS[kind]
        expected = arguments(getattr(theirs, name).__call__)
        actual = arguments(getattr(ours, name).__call__)
        assert list(actual)[: len(expected)] == list(expected)
        for argument, description in expected.items():
            assert actual[argument] == description, argument

    def test_every_argument_is_tried_below(self, kind, name):
        _, theirs, _ = KINDS[kind]
        tried = {a for settings in settings_of(kind, name).values() for a in settings}
        elsewhere = {"rngs", "axis_name", "axis_index_groups"}  # test_contexts, test_transformations
        assert set(arguments(getattr(theirs, name).__init__)) <= tried | elsewhere


def shifted(key, shape, dtype=jnp.float32):
    return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape) / 7 + 1


def settings_of(kind, name):
    """A construction for every argument that Flax's class has, by what is tried."""
    channels = SHAPE[-1]
    base = GROUPS if name == "GroupNorm" else {}
    cases = {
        "defaults": {},
        "epsilon": {"epsilon": 0.5},
        "bfloat16": {"dtype": jnp.bfloat16},
        "parameters in bfloat16": {"param_dtype": jnp.bfloat16},
        "without scale": {"use_scale": False},
        "scale_init": {"scale_init": shifted},
        "use_fast_variance": {"use_fast_variance": False},
    }
    if name != "RMSNorm":
        cases |= {"without bias": {"use_bias": False}, "bias_init": {"bias_init": shifted}}
        cases |= {"neither": {"use_bias": False, "use_scale": False}}
    if kind == "linen":
        cases["force_float32_reductions"] = {"force_float32_reductions": False}
    else:
        cases["num_features"] = {"num_features": channels}
        cases["scale_metadata"] = {"scale_metadata": {"note": "kept"}}
        cases["promote_dtype"] = {"promote_dtype": lambda args, *, dtype: flax.nnx.nn.dtypes.promote_dtype(args)}
        if name != "RMSNorm":
            cases["bias_metadata"] = {"bias_metadata": {"note": "kept"}}
    several = {"num_features": 40} if kind == "nnx" else {}
    if name == "BatchNorm":
        cases |= {
            "momentum": {"momentum": 0.3},
            "running averages": {"use_running_average": True},
            "channels first": {"axis": 1},
        }
        if kind == "linen":
            cases["several axes"] = {"axis": (1, -1)}
    if name in ("LayerNorm", "RMSNorm"):
        cases["reduction_axes"] = {"reduction_axes": (1, 2)}
        cases["reduction and features"] = {"reduction_axes": (1, 2, 3), "feature_axes": -1}
        cases["feature_axes"] = {"feature_axes": (-1, 2), "reduction_axes": (2, 3), **several}
    if name == "InstanceNorm":
        cases["feature_axes"] = {"feature_axes": (3, 2), **several}
    if name == "GroupNorm":
        cases["group_size"] = {"num_groups": None, "group_size": 2}
        cases["reduction_axes"] = {"reduction_axes": (1, -1)} if kind == "linen" else {"reduction_axes": (1, 2, 3)}
    return {what: {**base, **settings} for what, settings in cases.items()}


CASES = [(k, n, w) for k in KINDS for n in NAMES for w in settings_of(k, n)]


@pytest.mark.parametrize(("kind", "name", "what"), CASES, ids=lambda c: c)
def test_every_argument_does_what_it_does_in_flax(rng, kind, name, what):
    """Output, its dtype and the variables afterwards, where Flax's arithmetic is good enough to compare with."""
    settings = settings_of(kind, name)[what]
    x = draw(rng)
    ours, theirs = pair(kind, name, x, settings)
    kwargs = {} if kind == "nnx" and name == "RMSNorm" else {"mask": np.ones(SHAPE, bool)}
    for arguments in ({}, kwargs):
        y, expected = ours.call(x, **arguments), theirs.call(x, **arguments)
        assert y.dtype == expected.dtype
        assert_close(y, np.asarray(expected, np.float32), x.size)
    a, b = ours.leaves(), theirs.leaves()
    assert a.keys() == b.keys()
    for variable in a:
        if what != "force_float32_reductions":
            assert a[variable].dtype == b[variable].dtype, variable
        assert_close(a[variable], np.asarray(b[variable], np.float32).reshape(a[variable].shape), x.size)


# Variables -----------------------------------------------------------------------------------------------------------

VECTOR = ((8,), "float32")
GOLDEN = {
    "BatchNorm": {"params": {"scale": VECTOR, "bias": VECTOR}, "batch_stats": {"mean": VECTOR, "var": VECTOR}},
    "LayerNorm": {"params": {"scale": VECTOR, "bias": VECTOR}},
    "RMSNorm": {"params": {"scale": VECTOR}},
    "GroupNorm": {"params": {"scale": VECTOR, "bias": VECTOR}},
    "InstanceNorm": {"params": {"scale": VECTOR, "bias": VECTOR}},
}


def described_tree(tree):
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


@pytest.mark.parametrize("name", NAMES)
def test_golden_variables(rng, name):
    x, settings = draw(rng), GROUPS if name == "GroupNorm" else {}
    linen = linen_layer(jaxnorm.linen, name, x, settings)
    assert described_tree(linen.variables) == GOLDEN[name]
    kinds = {"params": "Param", "batch_stats": "BatchStat"}
    expected = {v: (kinds[c], *described) for c, vs in GOLDEN[name].items() for v, described in vs.items()}
    state = nnx.to_flat_state(nnx.state(nnx_layer(jaxnorm.nnx, name, x, settings).layer))
    assert {p[0]: (type(v).__name__, v.shape, str(v.dtype)) for p, v in state} == expected


def test_count_is_kept_only_for_cumulative_averages(rng):
    x = draw(rng)
    linen = linen_layer(jaxnorm.linen, "BatchNorm", x, {"momentum": None})
    assert set(linen.variables["batch_stats"]) == {"mean", "var", "count"}
    assert hasattr(nnx_layer(jaxnorm.nnx, "BatchNorm", x, {"momentum": None}).layer, "count")


@pytest.mark.parametrize("through", ["memory", "flax.serialization", "orbax"])
@pytest.mark.parametrize("name", NAMES)
def test_linen_state_goes_to_flax_and_back(rng, name, through, tmp_path):
    x, settings = draw(rng), GROUPS if name == "GroupNorm" else {}
    ours, theirs = pair("linen", name, x, settings)
    original = randomize(ours.variables, seed=3)

    def carry(variables, target, where):
        if through == "flax.serialization":
            return flax.serialization.from_bytes(target, flax.serialization.to_bytes(variables))
        if through == "orbax":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / where, variables)
                checkpointer.wait_until_finished()
                return checkpointer.restore(tmp_path / where, target)
        return variables

    theirs.variables = carry(original, theirs.variables, "there")
    ours.variables = carry(theirs.variables, ours.variables, "back")
    assert jax.tree.structure(ours.variables) == jax.tree.structure(original)
    for a, b in zip(jax.tree.leaves(ours.variables), jax.tree.leaves(original), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_close(ours.call(x), np.asarray(theirs.call(x)), x.size)


@pytest.mark.parametrize("through", ["memory", "orbax"])
@pytest.mark.parametrize("name", NAMES)
def test_nnx_state_goes_to_flax_and_back(rng, name, through, tmp_path):
    x, settings = draw(rng), GROUPS if name == "GroupNorm" else {}
    ours, theirs = pair("nnx", name, x, settings)
    original = nnx.to_pure_dict(randomize(nnx.state(ours.layer), seed=3))

    def carry(pure, where):
        if through == "memory":
            return pure
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / where, pure)
            checkpointer.wait_until_finished()
            return checkpointer.restore(tmp_path / where, pure)

    for layer, where in ((theirs.layer, "there"), (ours.layer, "back")):
        state = nnx.state(layer)
        nnx.replace_by_pure_dict(state, carry(original, where))
        nnx.update(layer, state)
    for a, b in zip(*(jax.tree.leaves(nnx.to_pure_dict(nnx.state(s.layer))) for s in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_close(ours.call(x), np.asarray(theirs.call(x)), x.size)


def test_partitioning_metadata(rng):
    x = draw(rng)
    partitioned = flax.linen.with_partitioning(flax.linen.initializers.ones, ("model",))
    for module in (jaxnorm.linen, flax.linen):
        variables = module.LayerNorm(scale_init=partitioned).init(jax.random.key(0), x)
        assert variables["params"]["scale"].names == ("model",)
        module.LayerNorm(scale_init=partitioned).apply(variables, x)


# What Flax lacks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
class TestSwitches:
    """Which statistics normalize, whether the averages move, whether scale and bias train: each by itself."""

    @pytest.mark.parametrize("trainable", [True, False])
    @pytest.mark.parametrize("update", [True, False])
    @pytest.mark.parametrize("use_running", [True, False])
    @pytest.mark.parametrize("where", ["construction", "call"])
    def test_all_combinations(self, rng, kind, where, use_running, update, trainable):
        x = draw(rng)
        switches = {"use_running_average": use_running, "update_running_average": update, "trainable": trainable}
        make, _, ours = KINDS[kind]
        layer = make(ours, "BatchNorm", x, {"momentum": 0.5, **(switches if where == "construction" else {})})
        layer.randomize()
        before = jax.tree.map(np.asarray, layer.leaves())
        y = layer.call(x, **(switches if where == "call" else {}))
        exact = x.astype(np.float64)
        mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
        if update:
            assert_close(layer.leaves()["mean"], (before["mean"] + mean) / 2, 120)
            assert_close(layer.leaves()["var"], (before["var"] + var) / 2, 120)
        else:
            np.testing.assert_array_equal(layer.leaves()["mean"], before["mean"])
        if use_running:
            mean, var = (np.asarray(before[n], np.float64) for n in ("mean", "var"))
        expected = (exact - mean) / np.sqrt(var + 1e-5) * before["scale"] + before["bias"]
        assert_close(y, expected, 120)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("trainable", [True, False])
    def test_trainable(self, rng, kind, name, trainable):
        x = draw(rng)
        settings = {**(GROUPS if name == "GroupNorm" else {}), "trainable": trainable}
        make, _, ours = KINDS[kind]
        layer = make(ours, name, x, settings)
        if kind == "linen":

            def loss(params, x):
                layer.variables = {**layer.variables, "params": params}
                return jnp.sum(jnp.sin(layer.call(x)))

            d_params, d_x = jax.grad(loss, (0, 1))(layer.variables["params"], x)
        else:
            d_params, d_x = nnx.grad(lambda m, x: jnp.sum(jnp.sin(m(x))), argnums=(0, 1))(layer.layer, x)
        moved = [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(d_params)]
        assert all(moved) if trainable else not any(moved)
        assert jnp.any(d_x != 0)


def test_linen_needs_no_mutable_collection_where_nothing_is_updated(rng):
    x = draw(rng)
    layer = jaxnorm.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x, update_running_average=False)
    assert_close(y, layer.apply(variables, x, mutable="batch_stats")[0], 120)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(variables, x)


def test_nnx_views(rng):
    x = draw(rng)
    layer = jaxnorm.nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    layer.eval()
    assert layer.use_running_average
    layer.train()
    assert not layer.use_running_average
    view = nnx.view(layer, update_running_average=False, trainable=False)
    view(x)
    np.testing.assert_array_equal(layer.mean[...], 0)
    assert (layer.trainable, view.trainable) == (True, False)
    assert not nnx.view(jaxnorm.nnx.LayerNorm(8, rngs=nnx.Rngs(0)), trainable=False).trainable


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_cumulative_averages(rng, kind, unbiased):
    make, _, ours = KINDS[kind]
    data = [draw(rng, (n, 8)) for n in (16, 16, 16)]
    layer = make(ours, "BatchNorm", data[0], {"momentum": None, "unbiased": unbiased})
    for x in data:
        layer.call(x)
    exact = np.stack(data).astype(np.float64)
    assert_close(layer.leaves()["mean"], exact.mean((0, 1)), 48)
    assert_close(layer.leaves()["var"], exact.var(1, ddof=int(unbiased)).mean(0), 48)
    np.testing.assert_array_equal(layer.leaves()["count"], 48)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_shape(rng, kind, name):
    """A mask with a last dimension of one, which Flax's group normalization refuses, and one of lower rank."""
    make, _, ours = KINDS[kind]
    x = draw(rng)
    layer = make(ours, name, x, GROUPS if name == "GroupNorm" else {})
    for shape in ((4, 6, 5, 1), (5, 1), (4, 1, 1, 1), SHAPE):
        mask = rng.random(shape) < 0.6
        filled = np.broadcast_to(mask, SHAPE)
        y = layer.call(x, mask=mask)
        assert_close(y, np.asarray(layer.call(x, mask=filled)), 120)
        garbage = np.where(filled, x, np.nan).astype(np.float32)
        assert_close(np.where(filled, layer.call(garbage, mask=mask), 0), np.where(filled, y, 0), 120)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_first(rng, kind):
    make, _, ours = KINDS[kind]
    x = draw(rng)
    first = np.moveaxis(x, -1, 1)
    for name, last_settings, first_settings in (
        ("BatchNorm", {}, {"axis": 1}),
        ("GroupNorm", GROUPS, {**GROUPS, "axis": 1}),
        ("InstanceNorm", {}, {"feature_axes": 1}),
        ("LayerNorm", {}, {"feature_axes": 1, "reduction_axes": 1}),
        ("RMSNorm", {}, {"feature_axes": 1, "reduction_axes": 1}),
    ):
        if kind == "nnx":
            first_settings = {**first_settings, "num_features": 8}
        last = make(ours, name, x, last_settings).call(x)
        y = make(ours, name, first, first_settings).call(first)
        assert_close(np.moveaxis(np.asarray(y), 1, -1), np.asarray(last), 120)


@pytest.mark.parametrize("features", [(6, 8), 48])
def test_several_feature_axes_in_nnx(rng, features):
    """As a shape, or as one number, which Flax's layers of several axes take."""
    x = draw(rng)
    layer = jaxnorm.nnx.BatchNorm(features, axis=(1, 3), momentum=0.0, rngs=nnx.Rngs(0))
    y = layer(x)
    assert_close(y, jaxnorm.batch_norm(x, axis=(1, 3))[0], 20)
    assert_close(layer.mean[...].reshape(6, 8), x.astype(np.float64).mean((0, 2)), 20)
    assert_close(layer(x, use_running_average=True), np.asarray(y), 20)
    shape = (5, 8) if features != 48 else 40
    assert_close(
        jaxnorm.nnx.LayerNorm(shape, reduction_axes=(2, 3), feature_axes=(2, 3), rngs=nnx.Rngs(0))(x),
        jaxnorm.layer_norm(x, axis=(2, 3)),
        40,
    )


def test_nnx_half_precision_keeps_the_running_variance(rng):
    """Flax's casts it to float16 first, where 1e5 is infinite."""
    layer = jaxnorm.nnx.BatchNorm(8, use_running_average=True, dtype=jnp.float16, rngs=nnx.Rngs(0))
    layer.var[...] = jnp.full(8, 1e5)
    y = layer(jnp.full((2, 8), 1000, jnp.float16))
    np.testing.assert_allclose(np.asarray(y, np.float32), 1000 / 1e5**0.5, rtol=1e-3)


def test_nnx_group_norm_of_every_layout(rng):
    """Reduction axes that leave out a spatial one, where Flax's repeats the statistics along the wrong axis."""
    x = draw(rng, (2, 3, 4, 5, 8))
    layer = jaxnorm.nnx.GroupNorm(8, num_groups=4, reduction_axes=(2, 3, 4), rngs=nnx.Rngs(0))
    grouped = x.reshape(2, 3, 4, 5, 4, 2).astype(np.float64)
    mean, var = (f((2, 3, 5), keepdims=True) for f in (grouped.mean, grouped.var))
    assert_close(layer(x), ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape), 40)


def test_nnx_metadata():
    layer = jaxnorm.nnx.LayerNorm(8, scale_metadata={"note": "s"}, bias_metadata={"note": "b"}, rngs=nnx.Rngs(0))
    assert (layer.scale.note, layer.bias.note) == ("s", "b")


def test_right_where_flax_is_not(rng):
    x = draw(rng, (4096, 8)) + np.float32(1e4)
    for kind, (make, _, ours) in KINDS.items():
        layer = make(ours, "BatchNorm", x, {})
        exact = x.astype(np.float64)
        expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
        np.testing.assert_allclose(layer.call(x), expected, rtol=0, atol=2e-6, err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_poison_and_emptiness(rng, kind):
    make, _, ours = KINDS[kind]
    x = draw(rng)
    layer = make(ours, "BatchNorm", x, {})
    layer.randomize()
    before = layer.leaves()
    layer.call(np.where(np.arange(8) == 2, np.nan, x).astype(np.float32))
    layer.call(x, mask=np.zeros((4, 1, 1, 1), bool))
    layer.call(x[:0])
    for name, value in layer.leaves().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_promoted_as_in_flax(rng, kind):
    make, theirs, ours = KINDS[kind]
    x = rng.integers(0, 9, SHAPE)
    for name in NAMES:
        settings = GROUPS if name == "GroupNorm" else {}
        y, expected = (make(module, name, x, settings).call(x) for module in (ours, theirs))
        assert y.dtype == expected.dtype
        assert_close(y, np.asarray(expected), x.size)


def nested(kind, x):
    """A layer inside of a module inside of a model: its state, and ``call(state, **kwargs)``, the state afterwards."""
    if kind == "linen":

        class Block(flax.linen.Module):
            @flax.linen.compact
            def __call__(self, x, use_running_average):
                return jaxnorm.linen.BatchNorm(name="norm")(x, use_running_average)

        class Model(flax.linen.Module):
            @flax.linen.compact
            def __call__(self, x, use_running_average=False):
                return Block(name="block")(x, use_running_average)

        def call(variables, **kwargs):
            return {**variables, **Model().apply(variables, x, mutable=["batch_stats"], **kwargs)[1]}

        return Model().init(jax.random.key(0), x), call

    def call_nnx(model, **kwargs):
        use_running_average = kwargs.get("use_running_average", False)
        model.norm(x, use_running_average=use_running_average)
        return model

    return nnx.Dict(norm=jaxnorm.nnx.BatchNorm(x.shape[-1], rngs=nnx.Rngs(0))), call_nnx


# Guards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
class TestGuards:
    def test_averages_that_were_never_updated(self, rng, kind):
        """Once, at the line of the user, by the place of the layer in the model where Flax knows one."""
        x = draw(rng)
        state, call = nested(kind, x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                call(state, use_running_average=True)
        (warning,) = caught
        where = "BatchNorm (block/norm)" if kind == "linen" else "BatchNorm"
        assert str(warning.message).startswith(f"{where}: the running averages in use were never updated")
        assert warning.filename == __file__
        assert "use_running_average" in linecache.getline(__file__, warning.lineno)
        state = call(state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(state, use_running_average=True)
        assert not caught

    def test_warnings_that_are_errors_stop_nothing(self, rng, kind, caplog):
        """Flax's layers do without a word what these warn of: under ``python -W error`` it is logged, once."""
        _layers._log_once.cache_clear()
        make, _, ours = KINDS[kind]
        layer = make(ours, "BatchNorm", draw(rng), {})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                layer.call(draw(rng), use_running_average=True)
                layer.call(draw(rng)[:1, :1, :1], update_running_average=False)
        told = [record.getMessage() for record in caplog.records if record.name == "jaxnorm"]
        assert [what in line for what, line in zip(("never updated", "of one value"), told, strict=True)] == [True] * 2

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("affine", [True, False])
    def test_another_channel_count(self, rng, kind, name, affine):
        make, _, ours = KINDS[kind]
        x = draw(rng)
        settings = {**(GROUPS if name == "GroupNorm" else {}), "use_scale": affine}
        if kind == "linen" and not affine and name != "BatchNorm":
            pytest.skip("a layer without variables fits any input")
        if name != "RMSNorm":
            settings["use_bias"] = affine
        layer = make(ours, name, x, settings)
        with pytest.raises(ValueError, match=rf"^{name}: .*\b4\b.*\b8\b"):
            layer.call(x[..., :4])

    def test_one_value_per_feature(self, rng, kind):
        """A warning, once, that names the layer; none at initialization; and the output is what Flax gives."""
        x = draw(rng)[:1, :1, :1]
        make, theirs, ours = KINDS[kind]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layers = [make(module, "BatchNorm", x, {}) for module in (ours, theirs)]
        assert not caught
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            y, expected = ([layer.call(x) for _ in range(3)][-1] for layer in layers)
        (warning,) = caught
        assert str(warning.message).startswith("BatchNorm: every statistic is of one value")
        assert warning.filename == __file__
        np.testing.assert_array_equal(y, expected)
        assert_close(layers[0].leaves()["var"], np.asarray(layers[1].leaves()["var"]))
        layers[0].randomize()
        layers[0].call(x, use_running_average=True)

    def test_messages_name_the_layer(self, rng, kind):
        make, _, ours = KINDS[kind]
        x = draw(rng)
        with pytest.raises(ValueError, match="BatchNorm: momentum must lie in"):
            make(ours, "BatchNorm", x, {"momentum": 1.5}).call(x)
        with pytest.raises(ValueError, match=r"GroupNorm: num_groups must divide .*num_groups=3, channels=8"):
            make(ours, "GroupNorm", x, {"num_groups": 3})
        with pytest.raises(ValueError, match="GroupNorm: group_size must divide"):
            make(ours, "GroupNorm", x, {"num_groups": None, "group_size": 3})
        with pytest.raises(ValueError, match="GroupNorm: one of num_groups and group_size"):
            make(ours, "GroupNorm", x, {"num_groups": 4, "group_size": 2})
        with pytest.raises(ValueError, match="GroupNorm: reduction_axes must include"):
            make(ours, "GroupNorm", x, {**GROUPS, "reduction_axes": (1, 2)}).call(x)
        with pytest.raises(ValueError, match="InstanceNorm: feature_axes must not include the first"):
            make(ours, "InstanceNorm", x, {"feature_axes": (0, -1)}).call(x)
        with pytest.raises(ValueError, match="LayerNorm: epsilon"):
            make(ours, "LayerNorm", x, {"epsilon": -1.0}).call(x)
        with pytest.raises(ValueError, match="BatchNorm: axis_name must name axes bound"):
            make(ours, "BatchNorm", x, {"axis_name": "nowhere"}).call(x)

    def test_no_replicas_needed_at_inference(self, rng, kind):
        make, _, ours = KINDS[kind]
        x = draw(rng)
        layer = make(ours, "BatchNorm", x, {"axis_name": "nowhere", "use_running_average": True})
        layer.randomize()
        assert layer.call(x).shape == x.shape


def test_use_running_average_must_be_given(rng):
    x = draw(rng)
    with pytest.raises(ValueError, match="use_running_average must be given"):
        jaxnorm.nnx.BatchNorm(8, use_running_average=None, rngs=nnx.Rngs(0))(x)


def test_initialization_in_linen_averages_nothing_and_needs_no_replicas(rng):
    x = draw(rng)
    for name in NAMES:
        settings = {"axis_name": "nowhere", **(GROUPS if name == "GroupNorm" else {})}
        layer = linen_layer(jaxnorm.linen, name, x, settings)
        for collection, variable, value in (("batch_stats", "mean", 0), ("batch_stats", "var", 1)):
            if name == "BatchNorm":
                np.testing.assert_array_equal(layer.variables[collection][variable], value)


# In place of Flax's, without exceptions ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_complex_input_trains(rng, kind):
    """Averages become complex, also those of NNX, of which Flax throws the imaginary part away."""
    x = (draw(rng) + 1j * draw(rng)).astype(np.complex64)
    make, _, ours = KINDS[kind]
    layer = make(ours, "BatchNorm", x, {"momentum": 0.5})
    layer.call(x)
    y, expected = layer.call(x), jaxnorm.batch_norm(x)[0]
    assert_close(np.abs(np.asarray(y) - np.asarray(expected)), np.zeros(SHAPE), x.size, magnitude=3)
    mean, var = (layer.leaves()[name] for name in ("mean", "var"))
    assert (mean.dtype, var.dtype) == (jnp.complex64, jnp.float32)
    exact = x.astype(np.complex128)
    np.testing.assert_allclose(mean, 0.75 * exact.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(var, 0.25 + 0.75 * exact.var((0, 1, 2)), rtol=1e-5)
    assert layer.call(x, use_running_average=True).dtype == jnp.complex64


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")  # in Flax's own layer
def test_averages_in_64_bits_are_of_the_types_of_flax(rng, kind, dtype):
    x = draw(rng).astype(dtype)
    make, theirs, ours = KINDS[kind]
    layers = [make(module, "BatchNorm", x, {}) for module in (ours, theirs)]
    dtypes = [(layer.call(x).dtype, {n: v.dtype for n, v in layer.leaves().items()}) for layer in layers]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("mutable", [True, flax.core.DenyList("params"), ["batch_stats", "intermediates"]])
def test_nothing_is_left_that_flax_does_not_leave(rng, mutable):
    """Whatever is mutable: the collections of Flax's layer, which do not grow, so that nothing compiles twice."""
    x, structures = draw(rng), []
    for library in (jaxnorm.linen, flax.linen):
        layer = library.BatchNorm(use_running_average=False)
        variables = layer.init(jax.random.key(0), x)
        for _ in range(2):
            _, updates = layer.apply(variables, x, mutable=mutable)
            variables = {**variables, **updates}
            structures.append(jax.tree.structure(variables))
    assert len(set(structures)) == 1


def test_calls_of_modules_are_those_of_flax(rng):
    """What `intercept_methods`, `capture_intermediates` and `tabulate` see: no helper of ours."""
    x = draw(rng)

    def seen(module, name):
        calls = []

        def note(next_function, args, kwargs, context):
            calls.append((type(context.module).__name__, context.method_name))
            return next_function(*args, **kwargs)

        settings = {"use_running_average": False} if name == "BatchNorm" else {}
        layer = getattr(module, name)(**(GROUPS if name == "GroupNorm" else settings))
        with flax.linen.intercept_methods(note):
            variables = layer.init(jax.random.key(0), x)
        _, state = layer.apply(variables, x, capture_intermediates=True, mutable=["batch_stats", "intermediates"])
        captured = {name for name in state["intermediates"] if not name.startswith("batch_")}
        return calls, captured, layer.tabulate(jax.random.key(0), x, compute_flops=True).count("__call__")

    for name in NAMES:
        assert seen(jaxnorm.linen, name) == seen(flax.linen, name), name


def test_smoke_calls_with_one_example_leave_flax_whole():
    x = jnp.ones((1, 8))
    model = nnx.Sequential(jaxnorm.nnx.BatchNorm(8, rngs=nnx.Rngs(0)), jaxnorm.nnx.LayerNorm(8, rngs=nnx.Rngs(0)))
    call = jaxnorm.nnx.BatchNorm.__call__
    with pytest.warns(UserWarning, match="every statistic is of one value"):
        assert "BatchNorm" in nnx.tabulate(model, x)
    assert jaxnorm.nnx.BatchNorm.__call__ is call


@pytest.mark.parametrize("spec", [P(None, "c"), P("b"), P("b", "c")])
@pytest.mark.parametrize("kind", KINDS)
def test_explicit_sharding(rng, kind, spec):
    """Channels, examples or both are sharded, and shardings are part of the types: averages as on one device."""
    x = draw(rng, (8, 8))
    mesh = jax.make_mesh((2, 4), ("b", "c"), axis_types=(AxisType.Explicit,) * 2)
    make, _, ours = KINDS[kind]
    expected = make(ours, "BatchNorm", x, {})
    for _ in range(2):
        expected.call(x)
    with jax.set_mesh(mesh):
        layer = make(ours, "BatchNorm", x, {})
        for _ in range(2):
            layer.call(jax.device_put(x, NamedSharding(mesh, spec)))
    assert layer.leaves()["mean"].sharding.spec == P(*spec[1:] or [None])
    for name, value in layer.leaves().items():
        assert_close(value, np.asarray(expected.leaves()[name]), 8)


def test_cumulative_averages_of_a_checkpoint_of_flax(rng):
    """It has no count: none is needed where nothing is averaged, and averages begin anew where something is."""
    x = draw(rng)
    variables = flax.linen.BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    variables["batch_stats"]["mean"] += 1
    layer = jaxnorm.linen.BatchNorm(momentum=None)
    y = layer.apply(variables, x, use_running_average=True)
    assert_close(y, (x - 1) / np.sqrt(1 + 1e-5), 1)
    layer.apply(variables, x, use_running_average=False, update_running_average=False)
    _, updates = layer.apply(variables, x, use_running_average=False, mutable="batch_stats")
    assert_close(updates["batch_stats"]["mean"], x.astype(np.float64).mean((0, 1, 2)), 120)
    np.testing.assert_array_equal(updates["batch_stats"]["count"], 120)

    ours, theirs = jaxnorm.nnx.BatchNorm(8, momentum=None, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    theirs.mean[...] = jnp.ones(8)
    nnx.update(ours, nnx.state(theirs))
    assert_close(ours(x, use_running_average=True), (x - 1) / np.sqrt(1 + 1e-5), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_kept_from_what_does_not_train(rng, kind):
    """With the mask of one call, scale and bias stay; without it they move, though their gradients are zero."""
    x = draw(rng)
    if kind == "linen":
        norm, free = jaxnorm.linen.LayerNorm(trainable=False), jaxnorm.linen.RMSNorm()
        model = flax.linen.Sequential([flax.linen.Dense(8), norm, free])
        variables = model.init(jax.random.key(0), x)
        params, mask = variables["params"], jaxnorm.linen.trainable_mask(model, variables, x)
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x)))))(params)
    else:
        rngs = nnx.Rngs(0)
        norm, free = jaxnorm.nnx.LayerNorm(8, trainable=False, rngs=rngs), jaxnorm.nnx.RMSNorm(8, rngs=rngs)
        model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), norm, free)
        params, mask = nnx.state(model, nnx.Param), jaxnorm.nnx.trainable_mask(model)
        gradient = nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))))(model)
    assert jax.tree.structure(mask) == jax.tree.structure(params if kind == "linen" else nnx.as_pure(params))
    for masked in (mask, None):
        optimizer = optax.adamw(0.1, weight_decay=0.1, mask=masked)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        moved = [bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates)]
        assert moved == (jax.tree.leaves(mask) if masked is not None else [True, True, False, True, True])


@pytest.mark.parametrize("kind", KINDS)
def test_trainable_mask_sees_the_call(kind):
    """A layer that is told in the call; and, in NNX, by a view."""
    x = jnp.ones((2, 8))
    if kind == "linen":

        class Model(flax.linen.Module):
            @flax.linen.compact
            def __call__(self, x):
                x = jaxnorm.linen.RMSNorm(name="still")(x, trainable=False)
                return jaxnorm.linen.RMSNorm(trainable=False, name="trained")(x, trainable=True)

        variables = Model().init(jax.random.key(0), x)
        mask = jaxnorm.linen.trainable_mask(Model(), variables, x)
        assert mask == {"still": {"scale": False}, "trained": {"scale": True}}
    else:
        view = nnx.view(jaxnorm.nnx.RMSNorm(8, rngs=nnx.Rngs(0)), trainable=False)
        assert jax.tree.leaves(jaxnorm.nnx.trainable_mask(view)) == [False]
        with pytest.raises(TypeError, match=r"^trainable_mask: model must be an nnx.Module; got dict"):
            jaxnorm.nnx.trainable_mask({})


ACTIVATIONS = {name: name for name in ("swish", "tanh", "sigmoid", "elu", "relu6")}
ACTIVATIONS |= {
    "partial of elu": partial(jax.nn.elu, alpha=0.5),
    "partial of gelu": partial(jax.nn.gelu, approximate=False),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_by_name_and_as_partials(rng, kind, activation):
    x = draw(rng)
    make, _, ours = KINDS[kind]
    layer = make(ours, "LayerNorm", x, {"activation": activation})
    function = getattr(jax.nn, activation) if isinstance(activation, str) else activation
    assert_close(layer.call(x), np.asarray(function(make(ours, "LayerNorm", x, {}).call(x))), 8)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_as_activation(rng, kind, name):
    """It keeps its own parameters, in the model, and learns; the residual is added before it."""
    x, residual = draw(rng), draw(rng)
    make, _, ours = KINDS[kind]
    prelu = flax.linen.PReLU() if kind == "linen" else nnx.PReLU()
    plain, layer = make(ours, name, x, {}), make(ours, name, x, {"activation": prelu})
    z = np.asarray(plain.call(x, residual=residual), np.float64)
    assert_close(layer.call(x, residual=residual), np.where(z >= 0, z, 0.01 * z), 8)

    def loss(state):
        if kind == "nnx":
            return jnp.sum(state(x))
        layer.variables = {**layer.variables, "params": state}
        return jnp.sum(layer.call(x))

    if kind == "linen":
        slope = jax.jit(jax.grad(loss))(layer.variables["params"])["activation"]["negative_slope"]
    else:
        slope = nnx.grad(loss)(layer.layer)["activation"]["negative_slope"][...]
    np.testing.assert_allclose(slope, np.minimum(np.asarray(plain.call(x), np.float64), 0).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=f"{name}: invertible needs an activation that forgets nothing"):
        make(ours, name, x, {"activation": prelu, "invertible": True}).call(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_epsilon(rng, kind):
    x = draw(rng)

    def of(epsilon):
        if kind == "linen":
            layer = jaxnorm.linen.LayerNorm(epsilon=epsilon, use_bias=False, use_scale=False)
            return layer.apply({}, x)
        return jaxnorm.nnx.LayerNorm(8, epsilon=epsilon, rngs=nnx.Rngs(0))(x)

    assert_close(jax.jit(of)(0.5), jaxnorm.layer_norm(x, epsilon=0.5), 8)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_invertible_layer_that_starts_at_zero_is_refused(rng, kind, name, compiled):
    """Before the first step, where a residual block begins with a scale of zero, also if initialization is compiled."""
    x = draw(rng)
    settings = {"invertible": True, **(GROUPS if name == "GroupNorm" else {})}
    train = {"use_running_average": False} if name == "BatchNorm" else {}

    def start(scale_init):
        if kind == "linen":
            layer = getattr(jaxnorm.linen, name)(scale_init=scale_init, **settings)
            return layer.init(jax.random.key(0), x, **train)
        return nnx.state(getattr(jaxnorm.nnx, name)(8, scale_init=scale_init, rngs=nnx.Rngs(0), **settings))

    run = (lambda init: jax.jit(partial(start, init))()) if compiled else start
    for init in (jax.nn.initializers.zeros, jax.nn.initializers.constant(1e-9)):
        with pytest.raises(ValueError, match=rf"^{name}: .*let scale_init start it at one, or .*invertible=False"):
            run(init)
    run(jax.nn.initializers.normal(0.5))
    if kind == "linen":
        run(flax.linen.with_partitioning(flax.linen.initializers.ones, ("model",)))
