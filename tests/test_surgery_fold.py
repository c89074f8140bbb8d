import math
import re
import subprocess
import sys
import textwrap
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from networks import (
    Generator,
    LinenResNet,
    MobileNet,
    NNXResNet,
    float64,
    images,
    linen_network,
    nnx_network,
    randomized,
)

import jaxnorm
from jaxnorm import linen, surgery
from jaxnorm import nnx as jaxnorm_nnx
from jaxnorm.surgery import _chains, _fold, _report

NORMS = {"flax": (nn.BatchNorm, nnx.BatchNorm), "jaxnorm": (linen.BatchNorm, jaxnorm_nnx.BatchNorm)}

HERE = r"test_surgery_fold\.py"


@pytest.fixture(autouse=True)
def broadcasting():
    """What users write."""
    with jax.numpy_rank_promotion("allow"):
        yield


def assert_same(apply, variables, x, folded, dtype=jnp.float32):
    """Within random roundings of each layer: in float32 those of its sums, else of weights, product, sum and output."""
    kernels = [a.size // a.shape[-1] for a in jax.tree.leaves(variables) if a.ndim > 1]
    roundings = sum(n + 3 for n in kernels) if dtype == jnp.float32 else 4 * len(kernels)
    with jax.enable_x64(True):
        exact = np.asarray(jax.jit(apply)(float64(variables), np.asarray(x, np.float64)), np.float64)
    actual = np.asarray(jax.jit(folded.apply)(folded.variables, x), np.float64)
    error = math.sqrt(np.mean((actual - exact) ** 2) / np.mean(exact**2))
    assert error <= float(jnp.finfo(dtype).eps) * math.sqrt(roundings), error


def assert_gone(folded, x, norms, kept=()):
    assert (len(folded.report.folded), folded.report.stayed) == (norms, ()), str(folded.report)
    program = jax.make_jaxpr(folded.apply)(folded.variables, x)
    assert not {"sub", "mul", "rsqrt", "sqrt"} - {*kept} & {eqn.primitive.name for eqn in program.eqns}, program


def assert_folds(apply, variables, x, norms, kept=(), dtype=jnp.float32):
    folded = surgery.fold(apply, variables, x)
    assert_gone(folded, x, norms, kept)
    assert_same(apply, variables, x, folded, dtype)
    return folded


def resnet(framework, library, rng, x, **settings):
    norm = NORMS[library][framework == "nnx"]
    if framework == "linen":
        return linen_network(LinenResNet(norm, **settings), rng, x)
    return nnx_network(lambda rngs: NNXResNet(norm, rngs=rngs, **settings), rng)


@pytest.mark.parametrize("library", NORMS)
@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_resnets_lose_all_their_norms(framework, bottleneck, library, rng):
    x = images(rng)
    assert_folds(*resnet(framework, library, rng, x, bottleneck=bottleneck), x, 9 if bottleneck else 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "bottleneck", "library"),
    [  # all combinations are tried in the small ones above
        pytest.param("linen", True, "jaxnorm", id="linen-resnet50-jaxnorm"),
        pytest.param("nnx", False, "flax", id="nnx-resnet18-flax"),
    ],
)
def test_whole_resnets_lose_all_their_norms(framework, bottleneck, library, rng):
    x, depths = images(rng, size=32), (3, 4, 6, 3) if bottleneck else (2, 2, 2, 2)
    network = resnet(framework, library, rng, x, bottleneck=bottleneck, depths=depths, width=64)
    assert_folds(*network, x, 53 if bottleneck else 20)


@pytest.mark.parametrize("library", NORMS)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_resnets_in_bfloat16(framework, library, rng):
    x = images(rng)
    folded = assert_folds(*resnet(framework, library, rng, x, dtype=jnp.bfloat16), x, 6, dtype=jnp.bfloat16)
    assert {a.dtype for a in folded.variables.values() if a.ndim == 4 and a.shape[0] > 1} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("library", NORMS)
@pytest.mark.parametrize("network", [MobileNet, Generator])
def test_depthwise_and_transposed_convolutions_take_norms(network, library, rng):
    x = images(rng) if network is MobileNet else jnp.asarray(rng.normal(size=(2, 7)), jnp.float32)
    apply, variables = linen_network(network(NORMS[library][0]), rng, x)
    assert_folds(apply, variables, x, 7 if network is MobileNet else 3, kept=["mul"])  # of leaky ReLU


@pytest.mark.parametrize("library", NORMS)
def test_preactivation_norms_stay_unless_a_convolution_is_before_them(library, rng):
    x = images(rng)
    apply, variables = linen_network(LinenResNet(NORMS[library][0], preactivation=True), rng, x)
    folded = surgery.fold(apply, variables, x)
    assert_same(apply, variables, x, folded)
    assert [n.into for n in folded.report.folded] == [("Conv_1",), ("Conv_3",)]
    places = re.findall(r"at (\S+):\d+", str(folded.report))
    assert set(places) == {"networks.py"}  # in this network's code, not within the layers
    assert {n.path: re.sub(r" at \S+", " at PLACE", n.reason) for n in folded.report.stayed} == {
        "BatchNorm_0": "the output of Conv_0 is used by add at PLACE too, and an activation (max) comes after it",
        "BatchNorm_2": "its input is used by BatchNorm_4 at PLACE too, and an activation (max) comes after it",
        "BatchNorm_4": "its input is used by BatchNorm_2 at PLACE too, and an activation (max) comes after it",
        "BatchNorm_5": "add at PLACE comes before it, and an activation (max) comes after it",
    }


def test_haiku(rng):
    hk = pytest.importorskip("haiku")

    def network(x, train):
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(4, 3)(x), train))
        x = hk.Conv2DTranspose(6, 3, 2, with_bias=False)(x)
        x = hk.BatchNorm(True, False, 0.9)(x, train).mean((1, 2))
        return hk.Linear(3)(x)

    x, f = images(rng), hk.without_apply_rng(hk.transform_with_state(network))
    variables = randomized(jax.eval_shape(partial(f.init, train=True), jax.random.key(0), x), rng)
    folded = assert_folds(lambda v, x: f.apply(*v, x, False)[0], variables, x, 2)
    assert [n.path for n in folded.report.norms] == ["batch_norm", "batch_norm_1"]


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_equinox(mode, rng):
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        linear: eqx.nn.Linear
        last: eqx.nn.BatchNorm

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 4, 3, key=key)
            self.norm = eqx.nn.BatchNorm(4, "batch", mode=mode)
            self.linear = eqx.nn.Linear(4, 5, key=key)
            self.last = eqx.nn.BatchNorm(5, "batch", mode=mode)

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            x, state = self.last(self.linear(jax.nn.relu(x).mean((1, 2))), state)
            return x

    network, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    network = eqx.nn.inference_mode(network)
    arrays, static = eqx.partition((network, state), eqx.is_array)

    def apply(arrays, x):
        network, state = eqx.combine(arrays, static)
        return jax.vmap(network, in_axes=(0, None), axis_name="batch")(x, state)

    x = images(rng).transpose(0, 3, 1, 2)
    assert_folds(apply, randomized(arrays, rng), x, 2, kept=["mul"])


def affine(v, name, x):
    return (x - v[name]["mean"]) * lax.rsqrt(v[name]["var"] + 1e-5) * v[name]["scale"] + v[name]["bias"]


def statistics(rng, features, shape=()):
    shape = (*shape, features)
    signed, positive = lambda: rng.normal(size=shape), lambda: rng.uniform(0.5, 1.5, shape)
    values = {"mean": signed(), "var": positive(), "scale": positive(), "bias": signed()}
    return {name: jnp.asarray(a, jnp.float32) for name, a in values.items()}


def array(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5, jnp.float32)


def conv(x, kernel, **settings):
    settings = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | settings
    return lax.conv_general_dilated(x, kernel, **settings)


def test_norms_in_a_row_and_layouts(rng):
    """Channels first, a transposition and a reshape on the way, and a norm that follows another."""
    v = {"w": array(rng, 3, 3, 3, 4), "a": statistics(rng, 4), "b": statistics(rng, 4)}

    def apply(v, x):
        y = conv(x, v["w"], dimension_numbers=("NHWC", "HWIO", "NCHW"))
        y = affine({"a": jax.tree.map(lambda s: s[:, None, None], v["a"])}, "a", y).transpose(0, 2, 3, 1)
        return -affine(v, "b", y.reshape(len(y), -1, 4)) / 2

    folded = assert_folds(apply, v, images(rng), 2)
    assert str(folded.report) == "a  folded into w\nb  folded into w"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_norms_go_into_a_convolution_after_them_that_does_not_pad(groups, rng):
    v = {"a": statistics(rng, 4), "w": array(rng, 3, 3, 4 // groups, 8)}

    def apply(v, x, padding="VALID"):
        return conv(affine(v, "a", jnp.sin(x)), v["w"], feature_group_count=groups, padding=padding)

    x = images(rng, channels=4)
    assert_folds(apply, v, x, 1)
    folded = surgery.fold(lambda v, x: apply(v, x, "SAME"), v, x)
    (norm,) = folded.report.stayed
    assert re.fullmatch(
        r"sin at test_surgery_fold\.py:\d+ comes before it, and w after it pads with zeros", norm.reason
    )
    assert str(folded.report).endswith(f"\nTo fold more: {norm.remedy}.")
    assert norm.remedy.startswith("pad before the norm")
    scaled = surgery.fold(lambda v, x: conv(jnp.sin(x) * v["a"]["scale"], v["w"], feature_group_count=groups), v, x)
    assert_gone(scaled, x, 1)


def test_a_norm_goes_into_all_matrix_products_after_it(rng):
    """Layer normalization measures its input, but its scale and bias are constants; each product casts."""
    v = {"norm": {"scale": array(rng, 6), "bias": array(rng, 6)}, "q": array(rng, 6, 2, 4), "k": array(rng, 3, 6)}

    def apply(v, x):
        y = jaxnorm.layer_norm(x, v["norm"]["scale"], v["norm"]["bias"])
        q, k = (lambda y: y.astype(x.dtype) for _ in range(2))
        q = jnp.einsum("bti,iho->bhto", q(y), v["q"]).sum(1)
        return q + jnp.einsum("oi,bti->bto", v["k"], k(y)).sum(-1)[..., None]

    x = array(rng, 2, 5, 6)
    folded = surgery.fold(apply, v, x)
    assert [n.into for n in folded.report.norms] == [("q", "k")]
    assert_same(apply, v, x, folded)


def test_experts_with_a_kernel_and_a_norm_each(rng):
    v = {"w": array(rng, 3, 6, 4), "a": statistics(rng, 4, (3,)), "b": statistics(rng, 6, (3,))}
    x = array(rng, 5, 3, 6)

    def apply(v, x):
        y = jax.vmap(lambda v, x: affine(v, "a", affine(v, "b", jnp.sin(x)) @ v["w"]), (0, 1), 1)(v, x)
        return y

    assert_folds(apply, v, x, 2)


CALLS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "platforms": lambda f: lambda *args: lax.platform_dependent(*args, cpu=f, default=f),
    "barrier": lambda f: lambda *args: lax.optimization_barrier(f(*args)),
    "custom_vjp": lambda f: _custom_vjp(f),
}


def _custom_vjp(f):
    called = jax.custom_vjp(f)
    called.defvjp(lambda *args: (f(*args), args), lambda args, ct: args)
    return called


@pytest.mark.parametrize("call", CALLS)
def test_norms_in_calls(call, rng):
    v = {"w": array(rng, 3, 4), "a": statistics(rng, 4)}
    norm = CALLS[call](lambda a, y: affine({"a": a}, "a", y))
    assert_folds(lambda v, x: norm(v["a"], x @ v["w"]), v, array(rng, 2, 3), 1)


REASONS = {
    "shared": (lambda v, x: jnp.sin(affine(v, "a", x @ v["w"])) @ v["w"], "others use the weights of w too"),
    "branch": (lambda v, x: (jnp.sin(affine(v, "a", x @ v["w"])), x @ v["w"])[0], None),
    "branches": (
        lambda v, x: (lambda y: y + jnp.sin(affine(v, "a", y)))(x @ v["w"]),
        "the output of w is used by add at",
    ),
    "branch before": (
        lambda v, x: (lambda y: jnp.cos(y) + jnp.sin(affine(v, "a", y)))(x @ v["w"]),
        "the output of w is used by cos at",
    ),
    "activation": (lambda v, x: jnp.sin(affine(v, "a", nn.relu(x @ v["w"]))), "an activation (max) comes before it"),
    "inputs": (lambda v, x: jnp.sin(affine(v, "a", x @ x.T)), "dot_general with weights that depend on the inputs"),
    "positions": (lambda v, x: jnp.sin(affine(v, "b", x @ v["w"])), "it differs within a channel of w"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_stays_is_said_with_the_reason(case, rng):
    v = {"w": array(rng, 4, 4), "a": statistics(rng, 4), "b": statistics(rng, 1, (4,))}
    apply, reason = REASONS[case]
    x = array(rng, 4, 4)
    folded = surgery.fold(apply, v, x)
    assert_same(apply, v, x, folded)
    assert [n.reason.startswith(reason or "") for n in folded.report.norms] == [True], str(folded.report)
    assert bool(folded.report.stayed) == (reason is not None)


def test_norms_in_loops_stay_and_are_reported(rng):
    v = {"w": array(rng, 2, 4, 4), "a": statistics(rng, 4, (2,))}

    def apply(v, x):
        return lax.scan(lambda x, v: (jnp.sin(affine(v, "a", x @ v["w"])), None), x, v)[0]

    folded = surgery.fold(apply, v, array(rng, 2, 4))
    assert re.match(rf"a  stayed: it is in a scan at {HERE}:\d+\nTo fold more: ", str(folded.report))
    assert folded.variables.keys() == {"w", "a/mean", "a/var", "a/scale", "a/bias"}


def test_other_batch_sizes_and_export_without_jaxnorm(rng, tmp_path):
    pytest.importorskip("flatbuffers")  # what jax.export serializes with
    x = images(rng)
    apply, variables = resnet("linen", "jaxnorm", rng, x, depths=(1,))
    folded = surgery.fold(apply, variables, x)
    batch = jnp.concatenate([x, x + 1, x - 1])
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 8, 8, 3"), jnp.float32)
    exported = jax.export.export(jax.jit(folded.apply), platforms=["cpu", "cuda", "tpu"])(folded.variables, symbolic)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "arrays", x=batch, **{n.replace("/", "|"): a for n, a in folded.variables.items()})
    script = f"""
        import sys
        sys.modules["jaxnorm"] = sys.modules["flax"] = None
        import jax, numpy as np
        arrays = {{n.replace("|", "/"): a for n, a in np.load("{tmp_path}/arrays.npz").items()}}
        x = arrays.pop("x")
        program = jax.export.deserialize(bytearray(open("{tmp_path}/program", "rb").read()))
        np.save("{tmp_path}/y", program.call(arrays, x))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    expected = np.asarray(jax.jit(folded.apply)(folded.variables, batch))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
    assert_same(apply, variables, batch, folded)


def test_folding_within_jit(rng):
    v, x = {"w": array(rng, 3, 4), "a": statistics(rng, 4)}, array(rng, 2, 3)

    def apply(v, x):
        return affine(v, "a", x @ v["w"])

    folded = surgery.fold(apply, v, x)
    within = jax.jit(lambda v: surgery.fold(apply, v, x).variables)(v)
    chex.assert_trees_all_equal(folded.variables, within)
    assert sorted(within) == ["shift", "w"]


def test_what_is_no_array_is_refused(rng):
    with pytest.raises(TypeError, match="fold: inputs must hold arrays only; got str 'train'"):
        surgery.fold(lambda v, x, mode: x, {}, jnp.ones(3), "train")
    folded = surgery.fold(lambda v, x: x @ v["w"], {"w": jnp.ones((2, 2))}, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="fold: variables must be those of the folded program, w"):
        folded.apply({"v": 1}, jnp.ones((2, 2)))


def test_random_affine_programs(rng):
    """Whatever the order of scales, shifts, negations and divisions, the result is the same."""
    operations = {
        "add": lambda x, c: x + c,
        "sub": lambda x, c: x - c,
        "rsub": lambda x, c: c - x,
        "mul": lambda x, c: c * x,
        "div": lambda x, c: x / c,
        "neg": lambda x, c: -x,
    }
    for _ in range(8):
        chain = [*rng.choice([*operations], 5), "mul"]
        v = {"w": array(rng, 3, 4), "c": [jnp.asarray(rng.uniform(0.5, 1.5, 4), jnp.float32) for _ in chain]}

        def apply(v, x, chain=chain):
            y = x @ v["w"]
            for name, c in zip(chain, v["c"], strict=True):
                y = operations[name](y, c)
            return y

        x = array(rng, 2, 3)
        folded = surgery.fold(apply, v, x)
        assert not folded.report.stayed
        eqns = jax.make_jaxpr(folded.apply)(folded.variables, x).eqns
        assert [e.primitive.name for e in eqns] in (["dot_general", "add"], ["dot_general"]), chain
        expected = jax.jit(apply)(v, x)
        assert jnp.allclose(folded.apply(folded.variables, x), expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


OF_THE_BATCH = {
    "broadcast": lambda y, b: y + jnp.broadcast_to(b, y.shape),
    "zeros": lambda y, b: y + (jnp.zeros_like(y) + b),
    "tile": lambda y, b: y + jnp.tile(b, (y.shape[0], 1)),
    "repeat": lambda y, b: y + jnp.repeat(b[None], y.shape[0], 0),
    "state": lambda y, b: y + jnp.tanh(jnp.ones((y.shape[0], 1)) * b) @ jnp.diag(b),
}


@pytest.mark.parametrize("how", OF_THE_BATCH)
@pytest.mark.parametrize("first", [1, 3])
def test_what_is_made_in_the_size_of_the_batch_does_not_fix_it(how, first, rng):
    """Haiku adds ``broadcast_to(b, out.shape)`` in every linear layer; a dummy input has one example."""
    v = {"w": array(rng, 3, 4), "a": statistics(rng, 4), "b": array(rng, 4)}
    x = array(rng, 5, 3)

    def apply(v, x):
        return OF_THE_BATCH[how](jnp.sin(affine(v, "a", x @ v["w"])), v["b"])

    folded = surgery.fold(apply, v, x[:first])
    assert len(folded.report.folded) == 1
    for n in (1, 3, 5):
        assert_same(apply, v, x[:n], folded)


def test_folding_takes_time_in_proportion_to_depth(rng, monkeypatch):
    """Counted, not timed: how often steps are looked at, for residual blocks of separable convolutions."""
    looked = []
    for module in (_fold, _report, _chains):
        for name in ("as_linear", "arithmetic"):
            if hasattr(module, name):
                original = getattr(module, name)
                monkeypatch.setattr(module, name, lambda step, f=original: looked.append(step) or f(step))

    def count(depth):
        v = [{"d": array(rng, 3, 3, 1, 4), "w": array(rng, 1, 1, 4, 4), "a": statistics(rng, 4)} for _ in range(depth)]

        def apply(v, x):
            for p in v:
                y = conv(conv(x, p["d"], feature_group_count=4), p["w"])
                x = x + nn.relu(affine(p, "a", y))
            return x

        looked.clear()
        folded = surgery.fold(apply, v, array(rng, 1, 4, 4, 4))
        assert len(folded.report.folded) == depth
        return len(looked)

    assert count(20) < 2.2 * count(10)
