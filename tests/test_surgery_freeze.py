from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from networks import LinenResNet, NNXConv, NNXResNet, images, linen_network, nnx_module, randomized

from jaxnorm import linen, surgery
from jaxnorm import nnx as jaxnorm_nnx

equal = partial(chex.assert_trees_all_equal, strict=True)


class Block(nn.Module):
    """What lifted transformations run over; ``by_hand`` is what freezing and swapping stand for."""

    norm: type = nn.BatchNorm
    by_hand: bool = False
    train: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        settings = {"use_running_average": not self.train or self.by_hand, "momentum": 0.9}
        x = nn.Dense(4)(nn.relu(self.norm(**settings)(x)))
        return nn.LayerNorm()(x), None


COLLECTIONS = {"params": 0, "batch_stats": 0}
LIFTED = {
    "plain": lambda **settings: Block(**settings),
    "scan": lambda **s: nn.scan(Block, variable_axes=COLLECTIONS, split_rngs={"params": True}, length=3)(**s),
    "remat": lambda **s: nn.remat(Block)(**s),
    "vmap": lambda **s: nn.vmap(
        Block, variable_axes=COLLECTIONS, split_rngs={"params": True}, in_axes=None, axis_size=3
    )(**s),
}


def train(model, variables, x):
    """Output, gradients and new averages."""

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            y, new = model.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
            return jnp.sum(jnp.sin(y[0])), (y[0], new)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return step(variables["params"], variables["batch_stats"], x)


def network(lifted, rng, **settings):
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    model = LIFTED[lifted](**settings)
    return model, randomized(jax.eval_shape(model.init, jax.random.key(0), x), rng), x


@pytest.mark.parametrize("norm", [nn.BatchNorm, linen.BatchNorm], ids=["flax", "jaxnorm"])
@pytest.mark.parametrize("lifted", LIFTED)
def test_frozen_linen_is_what_is_written_by_hand(lifted, norm, rng):
    model, variables, x = network(lifted, rng, norm=norm)
    by_hand = train(LIFTED[lifted](norm=norm, by_hand=True), variables, x)
    with surgery.frozen() as seen:
        equal(train(model, variables, x), by_hand)
    assert [path.rsplit("/")[-1] for path in seen] == ["BatchNorm_0"]
    equal(by_hand[0][1][1], {"batch_stats": variables["batch_stats"]})
    (loss, _), _ = train(model, variables, x)
    assert loss != by_hand[0][0]  # and after the context, nothing is frozen


@pytest.mark.parametrize("lifted", LIFTED)
def test_frozen_affine_has_no_gradient_and_nothing_else_changes(lifted, rng):
    model, variables, x = network(lifted, rng)
    _, by_hand = train(LIFTED[lifted](by_hand=True), variables, x)
    with surgery.frozen(affine=True):
        _, grads = train(model, variables, x)

    def zero(path, g):
        return jnp.zeros_like(g) if "Norm" in jax.tree_util.keystr(path) else g

    equal(grads, jax.tree_util.tree_map_with_path(zero, by_hand))


def test_a_filter_chooses_and_a_decorator_freezes(rng):
    model, x = LinenResNet(), images(rng)
    apply, variables = linen_network(model, rng, x)

    def step(variables, x):
        return apply(variables, x, train=True, mutable="batch_stats")[1]["batch_stats"]

    new = jax.jit(surgery.frozen(lambda path: path in ("BatchNorm_0", "BatchNorm_1"))(step))(variables, x)
    again = jax.jit(surgery.frozen("BatchNorm_[01]")(step))(variables, x)
    equal(new, again)
    for name, stats in variables["batch_stats"].items():
        same = bool((new[name]["mean"] == stats["mean"]).all())
        assert same == (name in ("BatchNorm_0", "BatchNorm_1")), name


def test_the_mask_keeps_weight_decay_away(rng):
    model, variables, x = network("plain", rng)
    mask = surgery.frozen_mask(model, variables, x, where="BatchNorm_0")
    assert mask["BatchNorm_0"] == {"bias": True, "scale": True}
    assert sum(jax.tree.leaves(mask)) == 2
    optimizer = optax.chain(optax.adamw(0.1), optax.masked(optax.set_to_zero(), mask))
    params = variables["params"]
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert all((u == 0).all() == frozen for u, frozen in zip(*map(jax.tree.leaves, (updates, mask)), strict=True))
    with pytest.raises(ValueError, match="where must choose at least one norm; got 'norm'"):
        surgery.frozen_mask(model, variables, x, where="norm")


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxnorm_nnx.BatchNorm], ids=["flax", "jaxnorm"])
def test_frozen_nnx_is_what_is_written_by_hand(norm, rng):
    x = images(rng)
    model = nnx_module(partial(NNXResNet, norm, depths=(1,)), rng)
    by_hand, free = nnx.clone(model), nnx.clone(model)
    surgery.freeze(model)
    for block in (by_hand.stem, *by_hand.blocks[0].convs):
        block.norm.use_running_average = True

    @nnx.jit
    def step(model, x):
        y, grads = nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
        return y, nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    result = step(model, x)
    equal(result, step(by_hand, x))
    equal(result[2], before)
    surgery.unfreeze(model)
    equal(step(model, x), step(free, x))


def test_freezing_some_norms_of_nnx_with_their_parameters(rng):
    model = nnx_module(partial(NNXResNet, jaxnorm_nnx.BatchNorm, depths=(1,)), rng)
    surgery.freeze(model, "blocks/0/.*", affine=True)
    assert not model.stem.norm.use_running_average
    x = images(rng)
    gradient = nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.sin(model(x)))))
    grads = nnx.to_pure_dict(gradient(model))
    assert not grads["blocks"][0]["convs"][0]["norm"]["scale"].any()
    assert grads["stem"]["norm"]["scale"].any()
    mask = nnx.to_pure_dict(surgery.frozen_mask(model, where="blocks/0/.*"))
    assert mask["blocks"][0]["convs"][0] == {"conv": {"kernel": False}, "norm": {"bias": True, "scale": True}}
    assert sum(jax.tree.leaves(mask)) == 4
    with pytest.raises(ValueError, match="and there are blocks/0/convs/0/norm, blocks/0/convs/1/norm, stem/norm"):
        surgery.freeze(model, "layer1")
    with pytest.raises(ValueError, match="affine=True for norm"):
        surgery.freeze(nnx_module(partial(NNXConv, nnx.BatchNorm, 1, 2, 1, 1, None), rng), affine=True)
    with pytest.raises(TypeError, match=r"must be an nnx\.Module; got BatchNorm"):
        surgery.freeze(nn.BatchNorm())
