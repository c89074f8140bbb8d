"""The remedies: against float64 written from the papers, in every mapped context, on any number of devices."""

import inspect
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles as basic
import oracles_variants as oracles
import pytest
from checks import assert_close, quick_first
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_contexts import collectives, mesh_of

import jaxnorm

pytestmark = pytest.mark.any_version

EPSILON = 1e-3
SHAPE = (8, 3, 4)
DOMAIN = np.array([0, 2, 1, 0, 2, 1, 1, 0])
POSITIVE = np.array([0.5, 1.0, 2.0, 0.25], np.float32)


def case(ours, oracle, *shapes):
    """Ours and the oracle as functions of x, parameters of ``shapes`` and weights; the former gives y and moments."""
    return ours, oracle, shapes


def alone(function, **settings):
    return lambda x, *p, mask=None: (function(x, *p, epsilon=EPSILON, mask=mask, **settings), ())


def together(function, **settings):
    return lambda x, *p, mask=None, **context: function(x, *p, epsilon=EPSILON, mask=mask, **settings, **context)


def renorm(x, mean, scale, bias, mask=None, **context):
    running = jaxnorm.RunningStats(mean, POSITIVE, jnp.ones(4))
    settings = {"r_max": 1.3, "d_max": 0.3, "epsilon": EPSILON, "mask": mask}
    return jaxnorm.batch_renorm(x, running, scale, bias, **settings, **context)


def renorm_oracle(x, mean, *rest):
    return oracles.renorm(x, oracles.constant(mean), POSITIVE.astype(float), *rest, 1.3, 0.3, EPSILON)


def switchable_at_inference(x, mean, *parameters, mask=None):
    running = jaxnorm.RunningStats(mean, POSITIVE, jnp.ones(4))
    return jaxnorm.switchable_norm(x, *parameters, running=running, epsilon=EPSILON, mask=mask)


def switchable_at_inference_oracle(x, mean, *rest):
    return oracles.switchable(x, *rest, EPSILON, (mean, POSITIVE.astype(float), 1))


def evonorm_at_inference(x, scale, bias, v, mask=None):
    running = jaxnorm.RunningStats(jnp.zeros(4), POSITIVE, jnp.ones(4))
    return jaxnorm.evonorm_b0(x, scale, bias, v, running=running, epsilon=EPSILON, mask=mask)


def split(x, scale, bias, mask=None):
    return jaxnorm.split_batch_norm(x, jnp.asarray(DOMAIN), scale, bias, num_domains=3, epsilon=EPSILON, mask=mask)


def added(function, oracle):
    def ours(x, *p, mask=None):
        return function(x, jnp.full_like(x, 8.0), *p, epsilon=EPSILON, mask=mask)[::-1]

    return ours, lambda x, *p: oracle(x + 8.0, *p, EPSILON)


F, NEAR, NEAR_ONE = (4,), "near the mean of x", "near one"
CASES = {
    "ghost": case(
        together(jaxnorm.ghost_batch_norm, virtual_batch_size=2),
        lambda x, s, b, w: oracles.ghost(x, s, b, w, 2, EPSILON),
        F,
        F,
    ),
    "renorm": case(renorm, renorm_oracle, NEAR, F, F),
    "split": case(split, lambda x, s, b, w: oracles.split(x, DOMAIN, s, b, w, EPSILON), (3, 4), (3, 4)),
    "switchable": case(together(jaxnorm.switchable_norm), lambda *a: oracles.switchable(*a, EPSILON), (3,), (3,), F, F),
    "switchable at inference": case(switchable_at_inference, switchable_at_inference_oracle, NEAR, (3,), (3,), F, F),
    "evonorm_b0": case(together(jaxnorm.evonorm_b0), lambda *a: oracles.evonorm_b0(*a, EPSILON), F, F, F),
    "evonorm_b0 at inference": case(
        evonorm_at_inference, lambda *a: oracles.evonorm_b0(*a, EPSILON, POSITIVE.astype(float)), F, F, F
    ),
    "evonorm_s0": case(alone(jaxnorm.evonorm_s0, num_groups=2), lambda *a: oracles.evonorm_s0(*a, 2, EPSILON), F, F, F),
    "filter response": case(
        alone(jaxnorm.filter_response_norm), lambda *a: oracles.filter_response(*a, EPSILON), F, F, F
    ),
    "dynamic tanh": case(
        lambda x, a, *p, mask=None: (jaxnorm.dynamic_tanh(x, a / 2**13, *p), ()),
        lambda x, a, s, b, w: oracles.dynamic_tanh(x, a / 2**13, s, b),
        (),
        F,
        F,
    ),
    "weights": case(
        lambda x, *p, mask=None: (jaxnorm.standardize_weights(x, *p, epsilon=EPSILON), ()),
        lambda *a: oracles.weights(*a[:-1], EPSILON),
        F,
    ),
    "graph": case(
        lambda x, s, b, a, mask=None: (
            jaxnorm.graph_norm(x, jnp.asarray(DOMAIN), s, b, a, num_graphs=4, epsilon=EPSILON, mask=mask),
            (),
        ),
        lambda x, s, b, a, w: oracles.graph(x, DOMAIN, s, b, a, w, EPSILON),
        F,
        F,
        NEAR_ONE,
    ),
    "weight norm": case(
        lambda x, *p, mask=None: (jaxnorm.weight_norm(x, *p, epsilon=EPSILON), ()),
        lambda *a: oracles.weight_norm(*a[:-1], EPSILON),
        F,
    ),
    "add_layer_norm": case(*added(jaxnorm.add_layer_norm, oracles.layer), F, F),
    "add_rms_norm": case(*added(jaxnorm.add_rms_norm, oracles.root_mean_square), F),
}


def problem(name, kappa, masked):
    rng = np.random.default_rng([*name.encode(), int(kappa), masked])
    x = (rng.standard_normal(SHAPE) + kappa).astype(np.float32)
    near = {NEAR: lambda: kappa + rng.standard_normal(F), NEAR_ONE: lambda: 1 + rng.standard_normal(F) / max(kappa, 1)}
    drawn = [near[s]() if s in near else rng.standard_normal(s) for s in CASES[name][2]]
    parameters = [np.asarray(p, np.float32) for p in drawn]
    weights = rng.integers(0, 3, (*SHAPE[:-1], 1)).astype(np.float32)
    weights[2] = 0  # an example of which nothing is measured
    return x, parameters, weights if masked else np.ones_like(weights), rng.standard_normal(SHAPE).astype(np.float32)


@cache
def compiled(masked):
    """All cases in one program."""

    def one(name, x, parameters, weights, cotangent):
        def loss(x, *parameters):
            y, _ = CASES[name][0](x, *parameters, mask=weights if masked else None)
            return jnp.sum(y * cotangent), y

        return jax.value_and_grad(loss, tuple(range(1 + len(parameters))), has_aux=True)(x, *parameters)

    return jax.jit(lambda problems: {name: one(name, *p) for name, p in problems.items()})


@pytest.mark.parametrize("masked", quick_first(1, [True, False]), ids=["masked", "plain"])
@pytest.mark.parametrize("kappa", quick_first(1, [1e4, 0.0, 1e2]))
def test_output_and_gradients(kappa, masked):
    problems = {name: problem(name, kappa, masked) for name in CASES}
    actual = compiled(masked)(problems)
    for name, (x, parameters, weights, cotangent) in problems.items():
        oracle = CASES[name][1]
        arguments = [np.asarray(a, float) for a in (x, *parameters)]
        (_, y), gradients = actual[name]
        assert_close(y, oracle(*arguments, weights), size=x.size, what=name)
        expected = oracles.gradients(lambda *a, w=weights, f=oracle: f(*a, w), arguments, cotangent)
        for n, (a, (e, largest)) in enumerate(zip(gradients, expected, strict=True)):
            assert_close(a, e, size=x.size, magnitude=largest, what=f"{name}, gradient {n}")


# Replicas ------------------------------------------------------------------------------------------------------------

REPLICAS = 4
BATCH = (24, 2, 4)
GROUPS = [[0, 2], [1, 3]]
DOMAINS = np.tile(DOMAIN, 3)
SIZES = {"local": 3, "straddling unevenly": 4, "on two replicas": 12}
LOGITS = np.array([[0.3, -0.2, 0.5], [-0.4, 0.1, 0.2]], np.float32)
V, NEAR_MEAN = np.array([0.5, -1.0, 0.2, 1.5], np.float32), np.array([30.5, 29.0, 30.1, 31.0], np.float32)


def remedies(x, scale, bias, mask, domain, context):
    """Output and moments of every remedy that measures more than one example, by name."""
    settings = {"epsilon": EPSILON, "mask": mask, **context}
    running = jaxnorm.RunningStats(jnp.asarray(NEAR_MEAN), jnp.asarray(POSITIVE), jnp.ones(4))
    return {
        **{
            f"ghost {name}": jaxnorm.ghost_batch_norm(x, scale, bias, virtual_batch_size=size, **settings)
            for name, size in SIZES.items()
        },
        "renorm": jaxnorm.batch_renorm(x, running, scale, bias, r_max=1.3, d_max=0.3, **settings),
        "split": jaxnorm.split_batch_norm(x, domain, scale, bias, num_domains=3, **settings),
        "switchable": jaxnorm.switchable_norm(x, *LOGITS, scale, bias, **settings),
        "evonorm_b0": jaxnorm.evonorm_b0(x, scale, bias, V, **settings),
    }


def remedies_in_float64(x, scale, bias, mask, domain):
    running = NEAR_MEAN.astype(float), POSITIVE.astype(float)
    logits = LOGITS.astype(float)
    by_domain = [np.broadcast_to(p, (3, 4)) for p in (scale, bias)]
    return {
        **{f"ghost {n}": oracles.ghost(x, scale, bias, mask, size, EPSILON) for n, size in SIZES.items()},
        "renorm": oracles.renorm(x, *running, scale, bias, mask, 1.3, 0.3, EPSILON),
        "split": oracles.split(x, domain, *by_domain, mask, EPSILON),
        "switchable": oracles.switchable(x, *logits, scale, bias, mask, EPSILON),
        "evonorm_b0": oracles.evonorm_b0(x, scale, bias, V.astype(float), mask, EPSILON),
    }


def moments_in_float64(x, mask, domain):
    channel = np.arange(4)
    whole = [m[0, 0] for m in oracles.measured(x, mask, channel)]
    keys = domain.reshape(-1, 1, 1) * 10_000 + channel
    split = [[np.where(domain == d)[0][0] for d in range(3)], oracles.measured(x, mask, keys)]
    return {
        **{f"ghost {n}": oracles.ghost_moments(x, mask, size) for n, size in SIZES.items()},
        "split": [m[split[0], 0] for m in split[1]],
        **dict.fromkeys(("renorm", "switchable", "evonorm_b0"), whole),
    }


NAMES = [*(f"ghost {name}" for name in SIZES), "renorm", "split", "switchable", "evonorm_b0"]


def replicated_problem(masked):
    rng = np.random.default_rng(masked)
    x = (2 * rng.standard_normal(BATCH) + 30).astype(np.float32)
    scale, bias = rng.standard_normal((2, 4)).astype(np.float32)
    mask = rng.integers(0, 3, (*BATCH[:-1], 1)).astype(np.float32) if masked else np.ones((*BATCH[:-1], 1), np.float32)
    mask[-6:] *= not masked  # a replica that contributes nothing, and virtual batches of which nothing is measured
    cotangents = rng.standard_normal((*BATCH, len(NAMES))).astype(np.float32)
    return x, scale, bias, mask, DOMAINS, cotangents


@cache
def expected(masked, groups):
    """Outputs, moments of every replica, and gradients, in float64, group by group."""
    x, scale, bias, mask, domain, cotangents = replicated_problem(masked)
    y, d_x = {name: np.empty(BATCH) for name in NAMES}, np.zeros(BATCH)
    d_parameters, largest, moments = [np.zeros(4), np.zeros(4)], 0.0, [None] * REPLICAS
    for group in GROUPS if groups else [range(REPLICAS)]:
        members = np.concatenate([np.arange(6) + 6 * r for r in group])
        rest = mask[members], domain[members]
        arguments = [a.astype(float) for a in (x[members], scale, bias)]

        def weighted(*arguments, members=members, rest=rest):
            outputs = remedies_in_float64(*arguments, *rest)
            return np.stack([outputs[name] for name in NAMES], -1) * cotangents[members]

        for name, value in remedies_in_float64(*arguments, *rest).items():
            y[name][members] = value
        (d_x[members], _), *parameters = oracles.gradients(weighted, arguments, 1.0)
        for n, (gradient, terms) in enumerate(parameters):
            d_parameters[n] += gradient
            largest = max(largest, terms)
        for r in group:
            moments[r] = moments_in_float64(arguments[0], *rest)
    return y, moments, [d_x, *d_parameters], largest


def loss_of(context):
    def loss(x, scale, bias, mask, domain, cotangents):
        results = remedies(x, scale, bias, mask, domain, context)
        outputs = {name: y for name, (y, _) in results.items()}
        total = sum(jnp.sum(outputs[name] * cotangents[..., n]) for n, name in enumerate(NAMES))
        return total, (outputs, {name: tuple(batch) for name, (_, batch) in results.items()})

    return loss


def each_replica(moments):
    return jax.tree.map(lambda m: jnp.broadcast_to(m, (REPLICAS, *m.shape)), moments)


SPECS = (P("data"), P(), P(), *(P("data"),) * 3)


def jit_sharded(groups, axis_type=AxisType.Auto):
    grad = jax.jit(jax.value_and_grad(loss_of({}), (0, 1, 2), has_aux=True))

    def run(*args):
        args = jax.device_put(args, tuple(NamedSharding(mesh_of(REPLICAS, axis_type), s) for s in SPECS))
        (_, (outputs, moments)), gradients = grad(*args)
        return outputs, each_replica(moments), gradients

    return run


def shard_map_grad_inside(groups, check_vma):
    def step(*args):
        grad = jax.value_and_grad(loss_of({"axis_name": "data", "axis_index_groups": groups}), (0, 1, 2), has_aux=True)
        (_, (outputs, moments)), (d_x, *d_parameters) = grad(*args)
        if not check_vma:
            d_parameters = jax.lax.psum(d_parameters, "data")
        return outputs, jax.tree.map(lambda m: m[None], moments), (d_x, *d_parameters)

    mapped = jax.shard_map(
        step,
        mesh=mesh_of(REPLICAS),
        in_specs=SPECS,
        out_specs=(P("data"), P("data"), (P("data"), P(), P())),
        check_vma=check_vma,
    )
    return jax.jit(mapped)


def shard_map_grad_outside(groups, check_vma):
    def per_replica(*args):
        loss, (outputs, moments) = loss_of({"axis_name": "data", "axis_index_groups": groups})(*args)
        return jax.lax.psum(loss, "data"), outputs, jax.tree.map(lambda m: m[None], moments)

    mapped = jax.shard_map(
        per_replica,
        mesh=mesh_of(REPLICAS),
        in_specs=SPECS,
        out_specs=(P(), P("data"), P("data")),
        check_vma=check_vma,
    )

    def loss(*args):
        total, *aux = mapped(*args)
        return total, aux

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    def run(*args):
        (_, (outputs, moments)), gradients = grad(*args)
        return outputs, moments, gradients

    return run


def mapped(groups, transform):
    grad = jax.value_and_grad(loss_of({"axis_name": "data", "axis_index_groups": groups}), (0, 1, 2), has_aux=True)
    grad = transform(grad, axis_name="data", in_axes=tuple(0 if s == P("data") else None for s in SPECS))

    def run(*args):
        split = [
            a.reshape(REPLICAS, -1, *a.shape[1:]) if s == P("data") else a for a, s in zip(args, SPECS, strict=True)
        ]
        (_, (outputs, moments)), (d_x, *d_parameters) = grad(*split)
        outputs, d_x = jax.tree.map(lambda v: v.reshape(BATCH), (outputs, d_x))
        return outputs, moments, (d_x, *(d.sum(0) for d in d_parameters))

    return run


CONTEXTS = {
    "jit, sharded batch": jit_sharded,
    "jit, explicit sharding": partial(jit_sharded, axis_type=AxisType.Explicit),
    "grad of shard_map": partial(shard_map_grad_outside, check_vma=True),
    "grad of shard_map, unchecked": partial(shard_map_grad_outside, check_vma=False),
    "grad inside shard_map": partial(shard_map_grad_inside, check_vma=True),
    "grad inside shard_map, unchecked": partial(shard_map_grad_inside, check_vma=False),
    "pmap": partial(mapped, transform=partial(jax.pmap, devices=jax.devices()[:REPLICAS])),
    "vmap": partial(mapped, transform=lambda *args, **kw: jax.jit(jax.vmap(*args, **kw))),
}
QUICK = ("grad of shard_map", "groups")


@pytest.mark.parametrize(
    ("context", "groups"),
    [
        pytest.param(c, g, id=f"{c}-{g or 'all'}", marks=[] if (c, g) == QUICK else pytest.mark.slow)
        for c in CONTEXTS
        for g in (None, "groups")
        if not (g and c.startswith("jit"))
    ],
)
def test_context(context, groups):
    run = CONTEXTS[context](GROUPS if groups else None)
    for masked in (False, True):
        outputs, moments, gradients = run(*replicated_problem(masked))
        y, of_replicas, expected_gradients, largest = expected(masked, groups)
        for name in NAMES:
            assert_close(outputs[name], y[name], size=24 * 2, what=f"{context}, {name}")
            for replica in range(REPLICAS):
                for field, a, e in zip(
                    ("mean", "var", "count"), moments[name], of_replicas[replica][name], strict=True
                ):
                    assert_close(a[replica], e, size=24 * 2, what=f"{context}, {name}, {field} of {replica}")
        for a, e in zip(gradients, expected_gradients, strict=True):
            assert_close(a, e, size=24 * 2, magnitude=largest, what=context)


# Devices -------------------------------------------------------------------------------------------------------------


def ghost_of(devices, sharding, x, cotangent):
    """Output and gradient of x with virtual batches of 32 on so many devices; and the collectives of both."""
    data, mesh = P("data"), mesh_of(devices)

    def loss(x, cotangent, axis_name=None):
        y, _ = jaxnorm.ghost_batch_norm(x, virtual_batch_size=32, axis_name=axis_name)
        return jnp.sum(jnp.tanh(y) * cotangent), y

    grad = jax.grad(partial(loss, axis_name="data") if sharding == "shard_map" else loss, has_aux=True)
    if sharding == "shard_map":
        grad = jax.shard_map(grad, mesh=mesh, in_specs=(data, data), out_specs=(data, data))
    args = jax.device_put((x, cotangent), NamedSharding(mesh, data))
    return jax.jit(grad)(*args), collectives(grad, *args)


@pytest.mark.parametrize("sharding", ["jit", "shard_map"])
def test_ghost_batch_norm_does_not_depend_on_the_number_of_devices(rng, sharding):
    x, cotangent = rng.standard_normal((2, 64, 3, 2)).astype(np.float32)
    (d_x, y), _ = ghost_of(1, sharding, x, cotangent)
    for devices, exchanged in ((2, 0), (8, 3)):
        (d_other, other), count = ghost_of(devices, sharding, x, cotangent)
        assert_close(other, np.asarray(y), size=32 * 3)
        assert_close(d_other, np.asarray(d_x), size=32 * 3)
        assert count <= exchanged, (devices, count)


# Their own claims ----------------------------------------------------------------------------------------------------


def test_renorm_lies_between_the_batch_and_the_averages(rng):
    """With bounds of one and zero, batch normalization; where they do not bind, inference. Bounds may be traced."""
    x = rng.standard_normal((6, 4)).astype(np.float32)
    running = jaxnorm.RunningStats(*rng.uniform(0.5, 2, (3, 4)).astype(np.float32))
    renormalized = jax.jit(lambda r, d: jaxnorm.batch_renorm(x, running, r_max=r, d_max=d)[0])
    assert_close(renormalized(1.0, 0.0), np.asarray(jaxnorm.batch_norm(x)[0]), size=6)
    assert_close(renormalized(100.0, 100.0), np.asarray(jaxnorm.normalize(x, running)), size=6)


def test_split_batch_norm_leaves_alone_what_is_not_there(rng):
    x = rng.standard_normal((6, 4)).astype(np.float32)
    _, batch = jax.jit(partial(jaxnorm.split_batch_norm, num_domains=3))(x, np.array([0, 0, 2, 2, 2, 0]))
    running = jaxnorm.update_running(jaxnorm.init_running((3, 4)), batch, alpha=1.0)
    np.testing.assert_array_equal(running.mean[1], 0)
    np.testing.assert_array_equal(running.var[1], 1)
    assert_close(running.mean[2], x[2:5].mean(0, dtype=float), size=3)


def test_an_unknown_domain_has_no_statistics(rng):
    x = rng.standard_normal((4, 2)).astype(np.float32)
    y, batch = jax.jit(partial(jaxnorm.split_batch_norm, num_domains=2))(x, np.array([0, 0, 5, -1]))
    assert_close(y[:2], np.asarray(jaxnorm.batch_norm(x[:2])[0]))
    np.testing.assert_array_equal(y[2:], 0)
    assert_close(batch.count, np.array([[2.0, 2.0], [0.0, 0.0]]))


def test_normalized_weights_pass_on_the_variance(rng):
    """Scaled weight standardization (Brock et al. 2021): inputs of variance one give outputs of variance one."""
    w, x = rng.standard_normal((500, 8)) + 3, rng.standard_normal((20_000, 500))
    gain = np.full(8, 500**-0.5, np.float32)
    y = x @ np.asarray(jaxnorm.standardize_weights(w.astype(np.float32), gain))
    np.testing.assert_allclose(y.var(0), 1, rtol=0.05)


def test_statistics_of_each_time_step(rng):
    """Padding does not count; a step beyond those that were seen has the averages of the last one."""
    x, lengths = rng.standard_normal((5, 6, 2)).astype(np.float32), np.array([4, 2, 1, 4, 3])
    mask = jaxnorm.length_mask(lengths, 6)
    np.testing.assert_array_equal(mask.sum(1), lengths)
    _, batch = jaxnorm.batch_norm(x, axis=(1, 2), mask=mask[..., None])
    for t in range(4):
        there = x[lengths > t, t].astype(float)
        assert_close(batch.mean[t], there.mean(0), size=5, magnitude=1)
        assert_close(batch.var[t], there.var(0), size=5)
    running = jaxnorm.update_running(jaxnorm.init_running((6, 2)), batch, alpha=1.0)
    later = jaxnorm.running_at(running, jnp.arange(9))
    for old, new in zip(running, later, strict=True):
        np.testing.assert_array_equal(new[:4], old[:4])
        np.testing.assert_array_equal(new[4:], np.broadcast_to(old[3], (5, 2)))
    np.testing.assert_array_equal(jaxnorm.running_at(running, 7).mean, running.mean[3])


def test_the_stream_keeps_its_precision(rng):
    x = jnp.asarray(rng.standard_normal((3, 8)), jnp.bfloat16)
    stream = jnp.asarray(rng.standard_normal((3, 8)) + 100, jnp.float32)
    h, y = jaxnorm.add_layer_norm(x, stream)
    assert (h.dtype, y.dtype) == (jnp.float32, jnp.bfloat16)
    assert_close(y, np.asarray(jaxnorm.layer_norm(h)))


# What all of them take -----------------------------------------------------------------------------------------------

PARAMETERS = {
    "ghost_batch_norm": lambda x: {"virtual_batch_size": 2},
    "batch_renorm": lambda x: {"running": jaxnorm.init_running(4), "r_max": 2.0, "d_max": 1.0},
    "split_batch_norm": lambda x: {"domain": np.arange(x.shape[0]) % 2, "num_domains": 2},
    "switchable_norm": lambda x: {"mean_logits": LOGITS[0], "var_logits": LOGITS[1]},
    "evonorm_b0": lambda x: {"v": V},
    "evonorm_s0": lambda x: {"v": V, "num_groups": 2},
    "filter_response_norm": lambda x: {"threshold": V / 4},
    "dynamic_tanh": lambda x: {"alpha": 0.5},
    "standardize_weights": lambda x: {},
    "add_layer_norm": lambda x: {"residual": jnp.ones_like(x)},
    "add_rms_norm": lambda x: {"residual": jnp.ones_like(x)},
}
BIASED = [name for name in PARAMETERS if name not in ("standardize_weights", "add_rms_norm")]
ON_THE_ENGINE = ["ghost_batch_norm", "batch_renorm", "split_batch_norm", "switchable_norm"]


def output(name, x, **settings):
    """The normalized output alone."""
    settings = {**PARAMETERS[name](x), **({"scale": None, "bias": None} if "evonorm" in name else {}), **settings}
    result = getattr(jaxnorm, name)(x, **settings)
    return result[name.startswith("add")] if isinstance(result, tuple) else result


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).standard_normal((8, 3, 4)).astype(np.float32)


def test_scale_and_bias_of_each_example(data):
    """One for each example, as conditional normalization has them: it is what is done to the normalized values."""
    rng = np.random.default_rng(1)
    scale, bias = rng.standard_normal((2, 8, 4)).astype(np.float32)
    names = [n for n in BIASED if n != "split_batch_norm"]
    plain, conditioned = jax.jit(
        lambda x: tuple({n: output(n, x, **s) for n in names} for s in ({}, {"scale": scale, "bias": bias}))
    )(np.delete(data, 0, 1))
    plain["filter_response_norm"] = output("filter_response_norm", np.delete(data, 0, 1), threshold=None)
    for name in names:
        want = np.asarray(plain[name], float) * scale[:, None] + bias[:, None]
        if name == "filter_response_norm":
            want = np.maximum(want, V / 4)
        assert_close(conditioned[name], want, size=16, what=name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(data, dtype):
    """Statistics and arithmetic in float32: one rounding, of the output."""
    low = jnp.asarray(data, dtype)
    names = [n for n in PARAMETERS if not n.startswith("add")]
    rounded, whole = jax.jit(lambda *xs: [{n: output(n, x) for n in names} for x in xs])(low, low.astype(jnp.float32))
    for name in names:
        assert rounded[name].dtype == dtype, name
        assert_close(rounded[name], np.asarray(whole[name]), size=24, what=name)


def test_features_on_another_axis(data):
    moved = np.moveaxis(data, -1, 1)
    names = [n for n in PARAMETERS if n != "standardize_weights"]
    last, second = jax.jit(lambda a, b: ({n: output(n, a) for n in names}, {n: output(n, b, axis=1) for n in names}))(
        data, moved
    )
    for name in names:
        assert_close(jnp.moveaxis(second[name], 1, -1), np.asarray(last[name]), size=24, what=name)


def test_activation_and_residual(data):
    """Inside as outside; and the gradient is the same where only the output is kept."""
    residual = np.flip(data).copy()
    cotangent = np.random.default_rng(2).standard_normal(data.shape).astype(np.float32)
    leaky = partial(jax.nn.leaky_relu, negative_slope=0.3)

    def gradient(name, **settings):
        def loss(x, r):
            y = output(name, x, **({"residual": r, "activation": leaky, **settings} if settings else {}))
            return jnp.sum((y if settings else leaky(y + r)) * cotangent)

        return jax.value_and_grad(loss, (0, 1))

    def all_of(x, r):
        ways = ({}, {"invertible": False}, {"invertible": True})
        return {name: [gradient(name, **way)(x, r) for way in ways] for name in ON_THE_ENGINE}

    for name, (outside, *inside) in jax.jit(all_of)(data, residual).items():
        for way in inside:
            for a, e in zip(jax.tree.leaves(way), jax.tree.leaves(outside), strict=True):
                assert_close(a, np.asarray(e), size=8 * 24, what=name)


def test_what_is_masked_out_may_be_nan(data):
    """It is no part of any statistic, and what its cotangent of zero says is zero."""
    mask = np.ones((8, 3, 1), bool)
    mask[1, 1], mask[4] = False, False
    hidden, zero = np.where(mask, data, np.nan), np.where(mask, data, 0)
    names = [n for n in PARAMETERS if "mask" in inspect.signature(getattr(jaxnorm, n)).parameters and "add" not in n]

    def all_of(x):
        def loss(x):
            outputs = {n: jnp.where(mask, output(n, x, mask=mask), 0) for n in names}
            return sum(jnp.sum(jnp.sin(y)) for y in outputs.values()), outputs

        return jax.grad(loss, has_aux=True)(x)

    (d_hidden, hidden), (d_zero, zero) = (jax.jit(all_of)(x) for x in (hidden, zero))
    for name in names:
        np.testing.assert_array_equal(hidden[name], zero[name], err_msg=name)
    np.testing.assert_array_equal(np.where(mask, d_hidden, 0), np.where(mask, d_zero, 0))
    assert np.isfinite(d_hidden).all()


# A new one -----------------------------------------------------------------------------------------------------------


def batch_group_norm(x, scale, bias, *, num_groups, **settings):
    """Groups of channels, measured over the batch: Zhou et al., "Batch Group Normalization", 2020."""

    def adjust(s):
        def groups(v):
            return v.reshape(*v.shape[:-1], num_groups, -1)

        def spread(v):
            return jnp.broadcast_to(v, groups(s.var).shape).reshape(s.var.shape)

        n, center, mean, var = map(groups, (s.count, s.center, s.center + s.offset, s.var))
        center, total = center[..., :1], n.sum(-1, keepdims=True)
        offset = (n * (mean - center)).sum(-1, keepdims=True) / total
        var = (n * (var + (mean - center - offset) ** 2)).sum(-1, keepdims=True) / total
        return jaxnorm.Statistics(s.count, *map(spread, (center, offset, var)))

    return jaxnorm.standardize(x, scale, bias, axes=(0, 1), adjust=adjust, **settings)


def batch_group_norm_oracle(x, scale, bias, weights, epsilon):
    keys = np.arange(x.shape[-1]) // 2
    return oracles.standardized(x, *oracles.measured(x, weights, keys), epsilon) * scale + bias


def test_a_normalization_that_is_not_in_the_package():
    """Under fifteen lines of statements; gradient, mask and replicas come with the engine."""
    body = inspect.getsource(batch_group_norm).split('"""')[2].strip().splitlines()
    assert len([line for line in body if line.strip()]) < 15
    x, scale, bias, mask, _, cotangents = replicated_problem(masked=True)
    cotangent = cotangents[..., 0]
    data = P("data")

    def loss(x, scale, bias, mask, cotangent):
        y, _ = batch_group_norm(x, scale, bias, num_groups=2, epsilon=EPSILON, mask=mask, axis_name="data")
        return jax.lax.psum(jnp.sum(y * cotangent), "data"), y

    replicated = jax.shard_map(
        loss, mesh=mesh_of(REPLICAS), in_specs=(data, P(), P(), data, data), out_specs=(P(), data)
    )
    step = jax.jit(jax.value_and_grad(replicated, (0, 1, 2), has_aux=True))
    (_, y), gradients = step(x, scale, bias, mask, cotangent)
    arguments = [a.astype(float) for a in (x, scale, bias)]
    oracle = lambda *a: batch_group_norm_oracle(*a, mask, EPSILON)  # noqa: E731
    assert_close(y, oracle(*arguments), size=24 * 4)
    for a, (e, largest) in zip(gradients, oracles.gradients(oracle, arguments, cotangent), strict=True):
        assert_close(a, e, size=24 * 4, magnitude=largest)


# Errors --------------------------------------------------------------------------------------------------------------

X = np.ones((4, 5, 4), np.float32)
SPLIT = {"domain": np.zeros(4, int), "num_domains": 2}
WRONG = [
    ("ghost_batch_norm", {"virtual_batch_size": 3}, ValueError, "virtual_batch_size=3, batch=4"),
    ("ghost_batch_norm", {"virtual_batch_size": 0}, ValueError, "virtual_batch_size=0"),
    ("ghost_batch_norm", {"virtual_batch_size": 2.0}, TypeError, "virtual_batch_size=2.0"),
    ("ghost_batch_norm", {"virtual_batch_size": True}, TypeError, "virtual_batch_size=True"),
    ("ghost_batch_norm", {"axis": 0}, ValueError, "axis=0"),
    ("ghost_batch_norm", {"axis_name": "nowhere"}, ValueError, "axis_name='nowhere'"),
    ("batch_renorm", {"r_max": 0.5}, ValueError, "r_max=0.5"),
    ("batch_renorm", {"d_max": -1.0}, ValueError, "d_max=-1.0"),
    ("batch_renorm", {"r_max": np.ones(4, np.float32)}, TypeError, r"r_max .*shape=\(4,\)"),
    ("batch_renorm", {"running": None}, TypeError, "running .*NoneType"),
    ("batch_renorm", {"running": jaxnorm.init_running(3)}, ValueError, r"running.mean .*shape=\(3,\)"),
    ("batch_renorm", {"x": X.astype(np.complex64)}, TypeError, "x must be real.*complex64"),
    ("split_batch_norm", {"domain": np.array([0, 1, 2, 0])}, ValueError, "domain .*largest=2, num_domains=2"),
    ("split_batch_norm", {"domain": np.array([0, -1, 1, 0])}, ValueError, "domain .*smallest=-1"),
    ("split_batch_norm", {"domain": np.zeros(3, int)}, ValueError, r"domain .*shape=\(3,\)"),
    ("split_batch_norm", {"domain": np.zeros(4)}, TypeError, "domain .*float"),
    ("split_batch_norm", {"num_domains": 0}, ValueError, "num_domains=0"),
    ("split_batch_norm", {"num_domains": 1.5}, TypeError, "num_domains=1.5"),
    ("split_batch_norm", {"scale": np.ones((3, 4), np.float32)}, ValueError, r"scale .*shape=\(3, 4\), num_domains=2"),
    ("switchable_norm", {"mean_logits": np.zeros(2, np.float32)}, ValueError, r"mean_logits .*shape=\(2,\)"),
    ("switchable_norm", {"var_logits": np.zeros(3, int)}, TypeError, "var_logits .*int"),
    ("switchable_norm", {"running": (0, 1)}, TypeError, "running .*tuple"),
    ("evonorm_b0", {"v": None}, TypeError, "v must be given.*v=None"),
    ("evonorm_b0", {"v": np.ones(3, np.float32)}, ValueError, r"v must .*shape=\(3,\)"),
    ("evonorm_b0", {"epsilon": -1.0}, ValueError, "epsilon=-1.0"),
    ("evonorm_b0", {"mask": -np.ones((1, 1, 4), np.float32)}, ValueError, "mask .*smallest=-1.0"),
    ("evonorm_s0", {"num_groups": 3}, ValueError, "num_groups=3, channels=4"),
    ("evonorm_s0", {"axis": (1, 2)}, ValueError, r"axis=\(1, 2\)"),
    ("evonorm_s0", {"x": X.astype(np.complex64)}, TypeError, "x must be real.*complex64"),
    ("filter_response_norm", {"threshold": np.ones(3, np.float32)}, ValueError, r"threshold .*shape=\(3,\)"),
    ("filter_response_norm", {"axis": 0}, ValueError, "axis=0"),
    ("dynamic_tanh", {"alpha": np.ones(4, np.float32)}, TypeError, r"alpha .*shape=\(4,\)"),
    ("dynamic_tanh", {"alpha": "much"}, TypeError, "alpha='much'"),
    ("dynamic_tanh", {"x": X.astype(np.complex64)}, TypeError, "x must be real.*complex64"),
    ("standardize_weights", {"gain": np.ones(3, np.float32)}, ValueError, r"gain .*shape=\(3,\)"),
    ("standardize_weights", {"axis": 3}, ValueError, "axis=3"),
    ("add_layer_norm", {"residual": None}, TypeError, "residual=None"),
    ("add_rms_norm", {"residual": np.ones((4, 5, 3), np.float32)}, ValueError, r"residual .*shape=\(4, 5, 3\)"),
]


@pytest.mark.parametrize(("name", "bad", "error", "message"), WRONG)
def test_bad_argument(name, bad, error, message):
    with pytest.raises(error, match=rf"^{name}: .*{message}"):
        output(name, bad.pop("x", X) if "x" in bad else X, **bad)


@pytest.mark.parametrize("name", PARAMETERS)
def test_integers_are_refused(name):
    with pytest.raises(TypeError, match=rf"^{name}: [wx] must have a floating point.*int32"):
        output(name, X.astype(np.int32))


def test_bad_sequences():
    with pytest.raises(TypeError, match=r"^length_mask: lengths must be integers; got dtype='float32'"):
        jaxnorm.length_mask(np.ones(3, np.float32), 4)
    with pytest.raises(ValueError, match=r"^length_mask: length must not be negative; got length=-1"):
        jaxnorm.length_mask(np.ones(3, int), -1)
    with pytest.raises(TypeError, match=r"^running_at: steps must be integers"):
        jaxnorm.running_at(jaxnorm.init_running((3, 2)), 0.5)
    with pytest.raises(ValueError, match=r"^running_at: running must have time as its first axis; got shape=\(\)"):
        jaxnorm.running_at(jaxnorm.init_running(()), 0)


# Statistics of several batches together ------------------------------------------------------------------------------


def test_batches_given_together_share_their_statistics(rng):
    """The recipe of docs/choosing.md: output and gradients are those of the union, which others are not."""
    text = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text()
    recipe: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], recipe)
    x, shifted = rng.normal(size=(2, 6, 4)).astype(np.float32)
    shifted = 2 * shifted + 3
    scale, bias, cotangent = rng.normal(size=4), rng.normal(size=4), rng.normal(size=(6, 4))

    def of_first(x, shifted):
        y, next_y = recipe["together"](lambda x: jaxnorm.batch_norm(x, scale, bias)[0], x, shifted)
        return jnp.sum(y * cotangent.astype(np.float32)), (y, next_y)

    gradients, outputs = jax.jit(jax.grad(of_first, (0, 1), has_aux=True))(x, shifted)
    union = np.concatenate([x, shifted]).astype(float)
    labels, features = basic.labels_of("batch", union.shape), basic.features_of(union.shape)
    expected = basic.normalize(union, labels, features, scale, bias, 1e-5)
    of_union, *_ = basic.gradients(union, np.pad(cotangent, [(0, 6), (0, 0)]), labels, features, scale, 1e-5)
    assert_close(np.concatenate(outputs), expected, 12)
    assert_close(np.concatenate(gradients), of_union, 12)
    assert abs(gradients[1]).max() > 0.01  # the second batch moves the first through the statistics
    apart = [jaxnorm.batch_norm(b, scale, bias)[0] for b in (x, shifted)]
    assert_close(apart[1].mean(0) - apart[0].mean(0), np.zeros(4), 12, magnitude=float(abs(scale).max()))
    assert abs((outputs[1].mean(0) - outputs[0].mean(0)) / scale).min() > 0.5

    weights = {"in": rng.normal(size=(4, 4)), "scale": scale, "bias": bias, "out": rng.normal(size=(4, 1))}
    weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), weights)
    rewards = jnp.zeros((6, 1))
    gradient, running = jax.jit(jax.grad(recipe["loss"], has_aux=True))(
        weights, jaxnorm.init_running(4), x, shifted, rewards
    )
    assert abs(gradient["in"]).max() > 0
    assert_close(running.mean, 0.01 * (union @ weights["in"]).mean(0), 24, magnitude=0.05)
