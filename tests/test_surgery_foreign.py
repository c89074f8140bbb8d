"""Surgery on models that others wrote: norms called twice, carried by loops, subclassed, frozen, of several kinds."""

import itertools
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import linen as nn
from flax import nnx
from test_surgery_recalibrate import Two

import jaxnorm.linen as jl
import jaxnorm.nnx as jn
from jaxnorm import surgery
from jaxnorm.surgery.__main__ import main

pytestmark = pytest.mark.any_version


def draw(rng, *shape):
    return jnp.asarray(rng.normal(1, 2, shape), jnp.float32)


def moments(x):
    x = np.asarray(x, float).reshape(-1, np.shape(x)[-1])
    return x.mean(0), x.var(0)


def close(stats, x, size=40):
    mean, var = moments(x)
    assert_close(stats["mean"], mean, size, magnitude=float(var.max()) ** 0.5)
    assert_close(stats["var"], var, size)


# All calls are measured ----------------------------------------------------------------------------------------------


class Steps(nn.Module):
    """One norm for all steps, whose averages ``nn.scan`` carries."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        norm = self.norm(use_running_average=not train, momentum=0.9, name="norm")

        def step(norm, carry, x):
            return carry, norm(3 * x)

        scan = nn.scan(step, variable_broadcast="params", variable_carry="batch_stats", in_axes=1, out_axes=1)
        if self.is_initializing():
            norm(x[:, 0])
        return scan(norm, (), x)[1]


@pytest.mark.parametrize("norm", [nn.BatchNorm, jl.BatchNorm, partial(jl.GhostBatchNorm, virtual_batch_size=8)])
def test_averages_that_a_loop_carries(norm, rng):
    x = draw(rng, 8, 5, 3)
    model = Steps(norm)
    variables = model.init(jax.random.key(0), x)
    for call in (surgery.recalibrate, partial(surgery.adapt, source_weight=0.0)):
        close(call(model, variables, [x], train=False)["batch_stats"]["norm"], 3 * x)
    assert surgery.inspect(model, variables, x).findings[0].cause == "never updated"


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.sin(nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))), None


@pytest.mark.slow  # a pass for every layer
def test_stacked_layers_one_by_one(rng):
    """As the same layers written one after another."""
    x = draw(rng, 64, 3)
    stack = nn.scan(Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)()
    variables = stack.init(jax.random.key(0), x, None)
    params = variables["params"]
    params = jax.tree.map(lambda a: a + draw(rng, *a.shape) / 4, params)
    stats = surgery.recalibrate(stack, {**variables, "params": params}, [(x, None)], layer_by_layer=True)["batch_stats"]
    y = np.asarray(x, float)
    for i in range(3):
        p = jax.tree.map(lambda a, i=i: np.asarray(a[i], float), params)
        y = y @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        close({n: a[i] for n, a in stats["BatchNorm_0"].items()}, y)
        y = np.sin((y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) * p["BatchNorm_0"]["scale"] + p["BatchNorm_0"]["bias"])


def test_nnx_norm_called_twice_in_a_stack(rng):
    x = draw(rng, 16, 3)

    @nnx.vmap
    def make(key):
        return jn.BatchNorm(3, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            self.norms = make(jax.random.split(jax.random.key(0), 2))

        def __call__(self, x):
            def step(x, norm):
                norm(x)
                norm(10 + x)
                return x + 1

            return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.norms)

    state = surgery.recalibrate(Stack(), None, [x])
    for i in range(2):
        seen = np.concatenate([x + i, x + i + 10])
        close({n: state["norms"][n][...][i] for n in ("mean", "var")}, seen)


# Data ----------------------------------------------------------------------------------------------------------------


def test_data_that_can_be_read_once_and_dictionaries(rng):
    batches = [{"image": draw(rng, 4, 5), "label": jnp.arange(4)} for _ in range(3)]
    model = Two()
    variables = model.init(jax.random.key(0), batches[0]["image"])
    takes = {"inputs": lambda batch: batch["image"]}
    expected = surgery.recalibrate(model, variables, [b["image"] for b in batches], layer_by_layer=True)
    once = surgery.recalibrate(model, variables, itertools.islice(batches, 3), layer_by_layer=True, **takes)
    jax.tree.map(np.testing.assert_array_equal, once, expected)
    by_name = surgery.recalibrate(model, variables, batches, inputs=lambda b: ((b["image"],), {"train": True}))
    one_pass = surgery.recalibrate(model, variables, batches, **takes)
    jax.tree.map(np.testing.assert_array_equal, by_name, one_pass)
    with pytest.raises(ValueError, match=r"^adapt: the model was called with batch 0, a dict of 2; say by inputs="):
        surgery.adapt(model, variables, batches)


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_batches_that_are_not_finite_are_counted(layer_by_layer, rng):
    batches = [draw(rng, 4, 5) for _ in range(4)]
    model = Two()
    variables = model.init(jax.random.key(0), batches[0])
    bad = [batches[0], batches[1].at[0, 0].set(jnp.nan), *batches[2:]]
    with pytest.warns(UserWarning, match="recalibrate: 1 of 4 batches give statistics that are not finite"):
        found = surgery.recalibrate(model, variables, bad, layer_by_layer=layer_by_layer)
    expected = surgery.recalibrate(model, variables, batches[:1] + batches[2:], layer_by_layer=layer_by_layer)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match="1 of 1 batches give statistics that are not finite; there is nothing"):
        surgery.recalibrate(model, variables, bad[1:2])


# Which norms ---------------------------------------------------------------------------------------------------------


class Mixed(nnx.Module):
    def __init__(self, kind=nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.a, self.b, self.c = kind(3, rngs=rngs), kind(3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs)

    def __call__(self, x, train=True):
        return self.c(self.b(self.a(x, use_running_average=not train)))


@pytest.mark.parametrize("kind", [nnx.BatchNorm, jn.BatchNorm, jn.BatchRenorm])
def test_frozen_norms_stay_whatever_they_are_told(kind, rng):
    """In their call, by ``train()``, and by recalibration that does not name them."""
    x, model = draw(rng, 8, 3), Mixed(kind)
    model.a.mean[...] = jnp.ones(3)
    assert surgery.freeze(model, "a") == ["a"]
    model.train()
    model(x)
    assert (model.a.mean[...] == 1).all()
    assert (model.b.mean[...] != 0).all()
    state = surgery.recalibrate(model, None, [x])
    assert (state["a"]["mean"][...] == 1).all()
    named = surgery.recalibrate(model, None, [x], where="a")
    assert_close(named["a"]["mean"][...], moments(x)[0], 8, magnitude=2.0)
    assert (named["b"]["mean"][...] == model.b.mean[...]).all()
    graph, state = nnx.split(model)
    assert nnx.graphdef(nnx.merge(graph, state)) == graph
    assert surgery.unfreeze(model, kind) == ["a", "b"]
    assert type(model.a) is kind
    model(x)
    assert (model.a.mean[...] != 1).all()
    with pytest.raises(ValueError, match="where must choose a norm with running averages; got 'c'"):
        surgery.freeze(model, "c")


def test_settings_go_to_norms_with_averages(rng):
    """``axis_name`` would share the statistics of layer norms over replicas too: wrong outputs."""
    model, x = Mixed(), draw(rng, 4, 3)
    assert surgery.swap(model, axis_name="data", epsilon=0.5) == ["a", "b", "c"]
    assert (model.a.epsilon, model.c.epsilon, model.c.axis_name) == (0.5, 1e-6, None)
    assert surgery.swap(model, jn.GhostBatchNorm, virtual_batch_size=2) == ["a", "b"]
    assert surgery.swap(model, jn.RMSNorm, where=jn.LayerNorm) == ["c"]
    linen = nn.Sequential([nn.BatchNorm(use_running_average=False), nn.LayerNorm()])
    variables = linen.init(jax.random.key(0), x)

    def run(model):
        return jax.vmap(lambda x: model.apply(variables, x, mutable="batch_stats")[0], axis_name="data")(x[:, None])

    with surgery.swapped(axis_name="data"):
        y = run(linen)
    expected = run(nn.Sequential([jl.BatchNorm(use_running_average=False, axis_name="data"), jl.LayerNorm()]))
    np.testing.assert_array_equal(y, expected)


def test_nothing_is_passed_over_without_a_word(rng):
    x = draw(rng, 4, 3)
    model = nn.Sequential([nn.LayerNorm()])
    variables = model.init(jax.random.key(0), x)
    for context in (surgery.frozen(), surgery.swapped(jl.GhostBatchNorm, virtual_batch_size=2), surgery.frozen("x")):
        with pytest.warns(UserWarning, match="no norm that was called in Sequential was chosen"), context:
            model.apply(variables, x)
    match = "without where, settings are for norms with running averages"
    with pytest.warns(UserWarning, match=match), surgery.swapped(epsilon=0.1):
        model.apply(variables, x)
    with pytest.warns(UserWarning, match="the new norm has no activation='relu', which BatchNorm has"):
        surgery.swap(jn.BatchNorm(3, activation="relu", rngs=nnx.Rngs(0)), nnx.BatchNorm)

    class Own(nnx.Module):
        def __init__(self):
            self.norm, self.mean, self.var = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchStat(0.0), nnx.BatchStat(1.0)

        def __call__(self, x):
            return self.norm(x)

    with pytest.warns(
        UserWarning, match=r"neither Flax's norms nor jaxnorm's are passed over: the module itself \(Own"
    ):
        surgery.recalibrate(Own(), None, [x])


class Renamed(nn.BatchNorm):
    """A subclass with a call of its own."""

    momentum: float = 0.5

    def __call__(self, inputs, train):
        return super().__call__(inputs, use_running_average=not train)


def test_subclasses(rng):
    x = draw(rng, 8, 3)
    model = Renamed()
    variables = model.init(jax.random.key(0), x, True)
    with surgery.frozen() as seen:
        model.apply(variables, x, True)  # no collection is mutable
    assert seen == [""]
    close(surgery.recalibrate(model, variables, [(x, True)], inputs=lambda b: ((b[0], True), {}))["batch_stats"], x)
    with surgery.swapped(epsilon=0.5) as seen:
        y, new = model.apply(variables, x, True, mutable="batch_stats")
    assert seen == [""]
    expected, other = jl.BatchNorm(False, momentum=0.5, epsilon=0.5).apply(variables, x, mutable="batch_stats")
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, new, other)


# There and back ------------------------------------------------------------------------------------------------------

BACK = {
    "GhostBatchNorm": {"virtual_batch_size": 2},
    "SplitBatchNorm": {"num_domains": 2},
    "SequenceBatchNorm": {"max_length": 4},
    "BatchRenorm": {},
    "SwitchableNorm": {},
    "GroupNorm": {"num_groups": 1},
    "LayerNorm": {},
}


@pytest.mark.parametrize("name", BACK)
@pytest.mark.parametrize("first", [nnx.BatchNorm, jn.BatchNorm], ids=["flax", "jaxnorm"])
def test_every_swap_has_a_way_back(name, first, rng):
    model = nnx.Sequential(first(3, momentum=0.7, rngs=nnx.Rngs(0)))
    for variable in ("mean", "var", "scale", "bias"):
        getattr(model.layers[0], variable)[...] = jnp.asarray(rng.uniform(0.5, 1.5, 3), jnp.float32)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    graph = nnx.graphdef(model)
    assert surgery.swap(model, getattr(jn, name), **BACK[name]) == ["layers/0"]
    assert surgery.swap(model, first, where=getattr(jn, name)) == ["layers/0"]
    close_enough = partial(np.testing.assert_allclose, rtol=3e-7)
    jax.tree.map(close_enough, nnx.to_pure_dict(nnx.state(model)), before)
    if name not in ("GroupNorm", "LayerNorm"):  # which have no momentum
        assert nnx.graphdef(model) == graph


def test_one_domain_is_a_domain(rng):
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    surgery.swap(model, jn.SplitBatchNorm, num_domains=1)
    assert model.layers[0].mean.shape == (1, 3)
    surgery.swap(model, nnx.BatchNorm)
    assert model.layers[0].mean.shape == (3,)


def test_averages_of_domains_are_merged_by_their_counts(rng):
    model = nnx.Sequential(jn.SplitBatchNorm(3, num_domains=2, momentum=None, rngs=nnx.Rngs(0)))
    x, domain = draw(rng, 8, 3), np.array([0, 1, 1, 1, 0, 1, 1, 1])
    nnx.view(model, domain=domain)(x)
    surgery.swap(model, jn.BatchNorm)
    close({n: getattr(model.layers[0], n)[...] for n in ("mean", "var")}, x)
    split = nnx.Sequential(jn.SplitBatchNorm(3, num_domains=2, split_affine=True, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"scale of layers/0 must fit the new norm; got shape \(2, 3\) for \(3,\)"):
        surgery.swap(split, jn.BatchNorm)
    assert type(split.layers[0]) is jn.SplitBatchNorm


# Inspection ----------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    depth: int
    axis: int = -1

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.relu(nn.BatchNorm(use_running_average=True, axis=self.axis)(nn.Conv(3, (1, 1))(x)))
        return x


def test_few_examples_and_many_norms(rng):
    model, x = Deep(30), draw(rng, 64, 2, 2, 3)
    variables = surgery.recalibrate(model, model.init(jax.random.key(0), x), [x])
    variables["batch_stats"]["BatchNorm_7"]["mean"] += 5
    report = surgery.inspect(model, variables, x)
    assert [(f.path, f.cause) for f in report.findings] == [("BatchNorm_7", "stale")]
    lines = str(report).splitlines()
    assert lines[1].startswith("BatchNorm_7")
    assert lines[21] == "and 10 norms more, which are better than these"
    one = surgery.inspect(model, variables, x[:1])
    assert one.findings == ()
    assert one.notes[0].startswith("1 example: too few to compare with the averages")
    assert one.notes[0] in str(one)


@pytest.mark.parametrize("axis", [1, (1, 2), -1, (2, 3)])
def test_the_wrong_axis_is_told_by_the_layer_before(axis, rng):
    model, x = Deep(2, axis), draw(rng, 64, 2, 2, 3)
    variables = surgery.recalibrate(model, model.init(jax.random.key(0), x), [x])
    found = {f.path for f in surgery.inspect(model, variables, x).findings if f.cause == "wrong axis"}
    right = axis in (-1, (2, 3))
    assert found == (set() if right else {"BatchNorm_0", "BatchNorm_1"})


def test_features_may_come_first(rng):
    """A kernel on the left puts its outputs along the first axis."""

    class First(nn.Module):
        axis: int

        @nn.compact
        def __call__(self, x):
            x = self.param("kernel", nn.initializers.lecun_normal(), (5, 64)) @ x
            return nn.BatchNorm(use_running_average=True, axis=self.axis)(nn.relu(x))

    x = draw(rng, 64, 40)
    for axis, wrong in ((0, False), (1, True)):
        model = First(axis)
        variables = surgery.recalibrate(model, model.init(jax.random.key(0), x), [x])
        causes = {finding.cause for finding in surgery.inspect(model, variables, x).findings}
        assert ("wrong axis" in causes) == wrong


def test_averaged_weights_show_in_all_norms(rng):
    """Less variance everywhere, by little in each: what averaging weights does."""
    model, x = Deep(6), draw(rng, 512, 2, 2, 3)
    variables = surgery.recalibrate(model, model.init(jax.random.key(0), x), [x])
    for i, stats in enumerate(variables["batch_stats"].values()):
        stats["var"] *= 1.1 + 0.02 * i
    report = surgery.inspect(model, variables, x)
    assert [(f.path, f.cause) for f in report.findings] == [("all norms", "averaged weights")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert surgery.inspect(model, surgery.recalibrate(model, variables, [x]), x).findings == ()


# Which function takes which model ------------------------------------------------------------------------------------

NORMS = {
    "Flax's norms": (nn.BatchNorm, nnx.BatchNorm),
    "jaxnorm's norms": (jl.BatchNorm, jn.BatchNorm),
    "its variants": (jl.BatchRenorm, jn.BatchRenorm),
}


class OfLinen(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        return nn.relu(self.norm(use_running_average=True, name="norm")(nn.Dense(3)(x)))


def of_nnx(norm):
    return nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), norm(3, rngs=nnx.Rngs(0)), nnx.relu)


def linen_swap(model, v, x):
    with surgery.swapped(jl.GhostBatchNorm, virtual_batch_size=2) as paths:
        model.apply(v, x)
    return paths


def linen_freeze(model, v, x):
    with surgery.frozen() as paths:
        model.apply(v, x)
    return paths


def of_torch(place):
    arrays = {"weight": np.ones(3), "bias": np.ones(3), "running_mean": np.ones(3), "running_var": np.ones(3)}
    return {f"{place}.{name}": a for name, a in arrays.items()}


def pure(model):
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state)(x), state


FUNCTIONS = {  # Linen, NNX, and the variables of a Linen model alone; what each returns is true if it did something
    "`fold`": (
        lambda m, v, x: surgery.fold(m.apply, v, x).report.folded,
        lambda m, x: surgery.fold(*pure(nnx.view(m, use_running_average=True)), x).report.folded,
        None,
    ),
    "`frozen`, `freeze`": (linen_freeze, lambda m, x: surgery.freeze(m), None),
    "`frozen_mask`": (
        lambda m, v, x: any(jax.tree.leaves(surgery.frozen_mask(m, v, x))),
        lambda m, x: any(jax.tree.leaves(surgery.frozen_mask(m))),
        None,
    ),
    "`swapped`, `swap`": (linen_swap, lambda m, x: surgery.swap(m, jn.GhostBatchNorm, virtual_batch_size=2), None),
    "`inspect`": (
        lambda m, v, x: surgery.inspect(m, v, x).norms[0].drift is not None,
        lambda m, x: surgery.inspect(m, None, x).norms[0].drift is not None,
        lambda v: surgery.inspect(v).findings,
    ),
    "`recalibrate`": (
        lambda m, v, x: (surgery.recalibrate(m, v, [x])["batch_stats"]["norm"]["mean"] != 0).all(),
        lambda m, x: (surgery.recalibrate(m, None, [x])["layers"][1]["mean"][...] != 0).all(),
        None,
    ),
    "`adapt`": (
        lambda m, v, x: (surgery.adapt(m, v, [x])["batch_stats"]["norm"]["mean"] != 0).all(),
        lambda m, x: (surgery.adapt(m, None, [x])["layers"][1]["mean"][...] != 0).all(),
        None,
    ),
    "`convert_norms`": (
        lambda m, v, x: surgery.convert_norms(of_torch("norm"), v).moved,
        lambda m, x: surgery.convert_norms(of_torch("layers.1"), m).moved,
        lambda v: surgery.convert_norms(of_torch("norm"), v).moved,
    ),
    "`check`": (
        lambda m, v, x: all(tried.ok for tried in surgery.check(m, (x,)) if tried.tool != "swap"),
        lambda m, x: all(tried.ok for tried in surgery.check(m, (x,)) if tried.tool != "swap"),
        None,
    ),
}


@pytest.fixture(scope="module")
def matrix():
    """Rows of the table in docs/surgery.md, each cell tried."""
    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, (8, 4)), jnp.float32)
    rows = []
    for name, (of_linen, of_module, of_variables) in FUNCTIONS.items():
        works = {"Linen": True, "NNX": True, "variables alone": of_variables is not None}
        for kind, (linen, module) in NORMS.items():
            model = OfLinen(linen)
            variables = model.init(jax.random.key(0), x)
            done = [of_linen(model, variables, x), of_module(of_nnx(module), x)]
            done += [of_variables(variables)] if of_variables else []
            works[kind] = all(map(bool, done))
        rows.append(f"| {name} | " + " | ".join("yes" if w else "" for w in works.values()) + " |")
    head = ["| | Linen | NNX | variables alone | " + " | ".join(NORMS) + " |", "|---|" + ":-:|" * (3 + len(NORMS))]
    return "\n".join(head + rows)


def test_the_table_of_functions_and_models(matrix):
    page = (Path(__file__).parents[1] / "docs" / "surgery.md").read_text()
    assert matrix in page, matrix


def test_check_tells_what_each_tool_does(tmp_path, capsys):
    factory = tmp_path / "models.py"
    factory.write_text(
        "import jax.numpy as jnp\nfrom flax import linen as nn\n"
        "class Net(nn.Module):\n    @nn.compact\n    def __call__(self, x, train):\n"
        "        return nn.relu(nn.BatchNorm(not train)(nn.Dense(3)(x)))\n"
        "def net():\n    return Net(), jnp.eye(4), {'train': False}, {'train': True}\n"
        "def plain():\n    return nn.Dense(3), jnp.eye(4)\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["check", f"{factory}:net", f"{factory}:plain"])
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  fold         ok  1 norm folded, 0 stayed; outputs differ by ")
    assert lines[3] == "  freeze       ok  1 norm frozen in training; averages stay"
    assert [line.split()[1] for line in lines[7:]] == ["--"] * 5
    with pytest.raises(TypeError, match="check: model must be a Linen or an NNX module; got int"):
        surgery.check(3, ())
