"""Do the remedies remedy? Each ill of batch normalization on the digits of scikit-learn, with its cures.

``python benchmarks/remedies.py`` prints every table and writes ``results/remedies.json`` and ``results/remedies.md``;
with names of tables, those alone. Accuracy on the test set in percent, mean and deviation over five seeds.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.datasets import load_digits

import jaxnorm

SEEDS, BATCH, STEPS, TEST = 5, 16, 600, 360
WIDTHS, ALPHA = (16, 16, 16), 0.02
RESULTS = Path(__file__).parent / "results"


class Norm(NamedTuple):
    """Norm and activation: ``train(x, p, running, progress) -> (y, batch)``, ``infer(x, p, running) -> y``."""

    train: Callable[..., Any]
    infer: Callable[..., Any]
    extra: Callable[[int], dict[str, Any]] = lambda c: {}
    standardized: bool = False


def averaged(train, **settings):
    """What `jaxnorm.batch_norm` and its kin train, normalized by running averages at inference."""

    def infer(x, p, running):
        return jaxnorm.normalize(x, running, p["scale"], p["bias"], activation="relu")

    return Norm(lambda x, p, running, progress: train(x, p["scale"], p["bias"], activation="relu", **settings), infer)


def by_example(function, standardized=False):
    """What is the same in training and at inference."""
    return Norm(lambda x, p, running, progress: (function(x, p), None), lambda x, p, running: function(x, p),
                standardized=standardized)  # fmt: skip


def affine(function, **settings):
    """``function`` of x and the parameters, with ReLU."""
    return lambda x, p: function(x, p["scale"], p["bias"], activation="relu", **settings)


def renorm(x, p, running, progress):
    """The schedule of the paper: batch normalization for an eighth of the steps, then wider bounds."""
    r_max = jnp.interp(progress, jnp.array([0.125, 0.6]), jnp.array([1.0, 3.0]))
    d_max = jnp.interp(progress, jnp.array([0.125, 0.6]), jnp.array([0.0, 5.0]))
    return jaxnorm.batch_renorm(x, running, p["scale"], p["bias"], r_max=r_max, d_max=d_max, activation="relu")


def switchable(x, p, **settings):
    """`jaxnorm.switchable_norm` with ReLU."""
    return jaxnorm.switchable_norm(
        x, p["mean_logits"], p["var_logits"], p["scale"], p["bias"], activation="relu", **settings
    )


def ghost(size):
    """Virtual batches of so many examples."""
    return averaged(jaxnorm.ghost_batch_norm, virtual_batch_size=size)


NORMS = {
    "none": by_example(lambda x, p: jax.nn.relu(x * p["scale"] + p["bias"])),
    "batch": averaged(jaxnorm.batch_norm),
    "renorm": Norm(renorm, averaged(jaxnorm.batch_norm).infer),
    "group": by_example(affine(jaxnorm.group_norm, num_groups=4)),
    "group, standardized weights": by_example(affine(jaxnorm.group_norm, num_groups=4), standardized=True),
    "layer": by_example(affine(jaxnorm.group_norm, num_groups=1)),
    "filter response": Norm(
        lambda x, p, r, _: (jaxnorm.filter_response_norm(x, p["scale"], p["bias"], p["threshold"]), None),
        lambda x, p, r: jaxnorm.filter_response_norm(x, p["scale"], p["bias"], p["threshold"]),
        lambda c: {"threshold": jnp.zeros(c)},
    ),
    "EvoNorm-B0": Norm(
        lambda x, p, r, _: jaxnorm.evonorm_b0(x, p["scale"], p["bias"], p["v"]),
        lambda x, p, r: jaxnorm.evonorm_b0(x, p["scale"], p["bias"], p["v"], running=r)[0],
        lambda c: {"v": jnp.ones(c)},
    ),
    "EvoNorm-S0": Norm(
        lambda x, p, r, _: (jaxnorm.evonorm_s0(x, p["scale"], p["bias"], p["v"], num_groups=4), None),
        lambda x, p, r: jaxnorm.evonorm_s0(x, p["scale"], p["bias"], p["v"], num_groups=4),
        lambda c: {"v": jnp.ones(c)},
    ),
    "switchable": Norm(
        lambda x, p, r, _: switchable(x, p),
        lambda x, p, r: switchable(x, p, running=r)[0],
        lambda c: {"mean_logits": jnp.zeros(3), "var_logits": jnp.zeros(3)},
    ),
    "dynamic tanh": Norm(
        lambda x, p, r, _: (jaxnorm.dynamic_tanh(x, p["alpha"], p["scale"], p["bias"]), None),
        lambda x, p, r: jaxnorm.dynamic_tanh(x, p["alpha"], p["scale"], p["bias"]),
        lambda c: {"alpha": jnp.array(0.5)},
    ),
}


def split_digits():
    """Training and test set: images in [0, 1], and labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].reshape(-1, 8, 8, 1).astype(np.float32) / 16, labels[order]
    return (images[TEST:], labels[TEST:]), (images[:TEST], labels[:TEST])


def init(key, norm):
    """Parameters of three convolutions and a dense layer."""
    layers, c = [], 1
    for width in WIDTHS:
        key, own = jax.random.split(key)
        w = jax.random.normal(own, (3, 3, c, width)) * (2 / (9 * c)) ** 0.5
        layers.append({"w": w, "scale": jnp.ones(width), "bias": jnp.zeros(width), **norm.extra(width)})
        c = width
    return {"layers": layers, "head": jax.random.normal(key, (c, 10)) * c**-0.5}


def apply(norm, parameters, x, apply_norm):
    """Logits, and what ``apply_norm`` gives besides the output of each layer."""
    given = []
    for n, p in enumerate(parameters["layers"]):
        w = p["w"]
        if norm.standardized:
            gain = jnp.full(w.shape[-1], (2 / w[..., 0].size) ** 0.5)
            w = jaxnorm.standardize_weights(w, gain)
        x = lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x, batch = apply_norm(n, x, p)
        given.append(batch)
    return x[:, 0, 0] @ parameters["head"], given


def descend(key, parameters, running, draw, forward, rate, momentum=0.9):
    """Parameters and running averages after ``STEPS`` batches of ``draw(key)``.

    ``forward(parameters, running, progress, *inputs)`` gives logits, and the moments to average or None.
    """
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, STEPS), momentum)

    def step(state, n):
        parameters, running, memory = state
        *inputs, labels = draw(jax.random.fold_in(key, n))

        def loss(parameters):
            logits, batches = forward(parameters, running, n / STEPS, *inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), batches

        gradient, batches = jax.grad(loss, has_aux=True)(parameters)
        updates, memory = optimizer.update(gradient, memory)
        pairs = zip(running, batches, strict=True)
        running = [r if b is None else jaxnorm.update_running(r, b, alpha=ALPHA) for r, b in pairs]
        return (optax.apply_updates(parameters, updates), running, memory), None

    (parameters, running, _), _ = lax.scan(step, (parameters, running, optimizer.init(parameters)), jnp.arange(STEPS))
    return parameters, running


def train(norm, key, draw, rate=0.05, momentum=0.9, shape=()):
    """Three convolutions down to one position, each with ``norm``; ``shape`` leads that of the running averages."""

    def forward(parameters, running, progress, x):
        return apply(norm, parameters, x, lambda i, x, p: norm.train(x, p, running[i], progress))

    running = [jaxnorm.init_running((*shape, w)) for w in WIDTHS]
    return descend(key, init(key, norm), running, draw, forward, rate, momentum)


def accuracy(norm, parameters, running, x, labels):
    """The part of the images that is classified right, by the running averages."""
    logits, _ = apply(norm, parameters, x, lambda i, x, p: (norm.infer(x, p, running[i]), None))
    return jnp.mean(logits.argmax(-1) == labels)


def seeds(function):
    """``function`` of each seed's key, one after the other in one program."""
    keys = jax.random.split(jax.random.key(0), SEEDS)
    return jax.tree.map(np.asarray, jax.jit(lambda keys: lax.map(function, keys))(keys))


def trained_accuracy(norm, draw, rate=0.05, momentum=0.9):
    """That of each seed, after training on batches of ``draw(key)``."""
    (_, (images, labels)) = split_digits()
    return seeds(lambda key: accuracy(norm, *train(norm, key, draw, rate, momentum), images, labels))


def drawn(key, size=BATCH):
    """A batch of the training set."""
    (images, labels), _ = split_digits()
    chosen = jax.random.randint(key, (size,), 0, len(labels))
    return jnp.asarray(images)[chosen], jnp.asarray(labels)[chosen]


def of_one_class(key):
    """A batch of examples of one class."""
    (images, labels), _ = split_digits()
    of_class, of_example = jax.random.split(key)
    members = np.stack([np.resize(np.flatnonzero(labels == c), 160) for c in range(10)])
    chosen = jax.random.choice(of_example, jnp.asarray(members)[jax.random.randint(of_class, (), 0, 10)], (BATCH,))
    return jnp.asarray(images)[chosen], jnp.asarray(labels)[chosen]


def small_batches():
    """Eight devices with two examples each, by what is normalized together."""
    names = ("group", "group, standardized weights", "layer", "filter response", "EvoNorm-S0", "dynamic tanh", "none")
    ways = {
        "batch, each device alone": ghost(2),
        "renorm, each device alone": Norm(partial(renorm_by_parts, size=2), NORMS["batch"].infer),
        "batch, groups of two devices": ghost(4),
        "ghost of 8, four microbatches": ghost(8),
        "batch, synchronized": NORMS["batch"],
    } | {name: NORMS[name] for name in names}
    return {name: trained_accuracy(norm, drawn) for name, norm in ways.items()}


def renorm_by_parts(x, p, running, progress, size):
    """Batch renormalization of every ``size`` examples by themselves, as on devices that do not communicate."""
    parts = x.reshape(-1, size, *x.shape[1:])
    y, batch = jax.vmap(lambda part: renorm(part, p, running, progress))(parts)
    mean, var, count = (m.mean(0) for m in batch)
    return y.reshape(x.shape), jaxnorm.Moments(mean, var, count * len(parts))


def one_class():
    """Batches of one class each."""
    return {name: trained_accuracy(norm, of_one_class, 0.01, 0.0) for name, norm in NORMS.items()}


SHIFTS = {
    "none": lambda x: x,
    "contrast x0.3": lambda x: 0.3 * x,
    "brightness +0.5": lambda x: x + 0.5,
    "contrast x0.3, brightness +0.5": lambda x: 0.3 * x + 0.5,
}


def shifted():
    """Test data that is shifted: running averages, adapted ones, and the statistics of the test batch alone."""
    _, (images, labels) = split_digits()
    norm, prior, size = NORMS["batch"], 16, 60

    def adapted(parameters, running, x, prior):
        def apply_norm(i, x, p):
            batch = jaxnorm.moments(x, (0, 1, 2))
            new = jaxnorm.update_running(running[i], batch, alpha=len(x) / (len(x) + prior))
            return norm.infer(x, p, new), None

        return apply(norm, parameters, x, apply_norm)[0].argmax(-1)

    def one(key):
        parameters, running = train(norm, key, drawn)
        found = {}
        for shift, change in SHIFTS.items():
            x = change(jnp.asarray(images))
            found[f"{shift}: running averages"] = accuracy(norm, parameters, running, x, labels)
            for name, worth in (("adapted", prior), ("batch alone", 0)):
                guesses = jnp.concatenate(
                    [adapted(parameters, running, part, worth) for part in jnp.split(x, TEST // size)]
                )
                found[f"{shift}: {name}"] = jnp.mean(guesses == labels)
        return found

    return seeds(one)


def domains():
    """Two kinds of images in every batch, one of them low and noisy: shared statistics against split ones."""
    _, (images, labels) = split_digits()

    def kinds(key, x):
        noisy = 0.1 * x + 1 + 0.02 * jax.random.normal(key, x.shape)
        return jnp.concatenate([x, noisy])

    def draw(key):
        x, labels = drawn(key, BATCH // 2)
        return kinds(key, x), jnp.concatenate([labels, labels])

    domain = jnp.repeat(jnp.arange(2), BATCH // 2)
    x, both = kinds(jax.random.key(1), jnp.asarray(images)), jnp.concatenate([labels, labels])
    of_test = jnp.repeat(jnp.arange(2), TEST)
    split = Norm(
        lambda x, p, r, _: jaxnorm.split_batch_norm(x, domain, p["scale"], p["bias"], num_domains=2, activation="relu"),
        lambda x, p, r: jaxnorm.normalize(
            x, (r.mean[of_test], r.var[of_test]), p["scale"], p["bias"], activation="relu"
        ),
    )

    def one(key, norm, shape):
        parameters, running = train(norm, key, draw, shape=shape)
        logits, _ = apply(norm, parameters, x, lambda i, x, p: (norm.infer(x, p, running[i]), None))
        right = logits.argmax(-1) == both
        return {"clean": right[:TEST].mean(), "low and noisy": right[TEST:].mean()}

    found = {}
    for name, norm, shape in (("shared", NORMS["batch"], ()), ("split", split, (2,))):
        for kind, value in seeds(partial(one, norm=norm, shape=shape)).items():
            found[f"{kind}: {name}"] = value
    return found


# Sequences: the rows of the digits, read one after the other, each for one to three steps ---------------------------

LONGEST, HIDDEN = 24, 32


def read_slowly(key, images, often):
    """Sequences of rows padded to ``LONGEST``, and their lengths; rows last for two steps more, ``often`` of them."""
    repeats = 1 + 2 * jax.random.bernoulli(key, often, (len(images), 8))
    ends = jnp.cumsum(repeats, 1)
    steps = jnp.arange(LONGEST)
    row = jnp.sum(steps[None, :, None] >= ends[:, None], -1)
    rows = jnp.take_along_axis(images[..., 0], jnp.minimum(row, 7)[..., None], 1)
    return jnp.where((row < 8)[..., None], rows, 0), ends[:, -1]


def recurrent(p, z, lengths):
    """Logits from the last state of each sequence."""

    def step(h, z):
        h = jnp.tanh(z + h @ p["u"])
        return h, h

    _, states = lax.scan(step, jnp.zeros((len(z), HIDDEN)), z.swapaxes(0, 1))
    return states[lengths - 1, jnp.arange(len(z))] @ p["head"]


def sequence_norms():
    """Of ``x W``: in training, with what is averaged; and at inference."""

    def shared(masked):
        def train(p, z, mask):
            return jaxnorm.batch_norm(z, p["scale"], p["bias"], mask=mask if masked else None)

        return train, lambda p, z, running: jaxnorm.normalize(z, running, p["scale"], p["bias"]), (HIDDEN,)

    def each_step(masked):
        def spread(p):
            return [jnp.broadcast_to(p[n], (LONGEST, HIDDEN)) for n in ("scale", "bias")]

        def train(p, z, mask):
            return jaxnorm.batch_norm(z, *spread(p), axis=(1, 2), mask=mask if masked else None)

        def infer(p, z, running):
            return jaxnorm.normalize(z, jaxnorm.running_at(running, jnp.arange(LONGEST)), *spread(p), axis=(1, 2))

        return train, infer, (LONGEST, HIDDEN)

    def layer(p, z, _):
        return jaxnorm.layer_norm(z, p["scale"], p["bias"])

    def none(p, z, _):
        return z * p["scale"] + p["bias"]

    alone = {
        name: (lambda p, z, m, f=f: (f(p, z, m), None), f, (HIDDEN,)) for name, f in (("none", none), ("layer", layer))
    }
    return alone | {
        "batch, shared, padding measured": shared(False),
        "batch, shared, masked": shared(True),
        "batch, each step, padding measured": each_step(False),
        "batch, each step, masked": each_step(True),
    }


def sequences():
    """Sequences of 8 to 24 steps; tested on as long ones, and on longer ones."""
    _, (images, labels) = split_digits()

    def draw(key):
        x, labels = drawn(key)
        return *read_slowly(jax.random.fold_in(key, 1), x, 0.2), labels

    def one(key, norm):
        training, infer, shape = norm
        keys = jax.random.split(key, 3)
        p = {
            "w": jax.random.normal(keys[0], (8, HIDDEN)) * 8**-0.5,
            "u": jax.random.normal(keys[1], (HIDDEN, HIDDEN)) * HIDDEN**-0.5,
            "head": jax.random.normal(keys[2], (HIDDEN, 10)) * HIDDEN**-0.5,
            "scale": jnp.ones(HIDDEN),
            "bias": jnp.zeros(HIDDEN),
        }

        def forward(p, running, progress, x, lengths):
            z, batch = training(p, x @ p["w"], jaxnorm.length_mask(lengths, LONGEST)[..., None])
            return recurrent(p, z, lengths), [batch]

        p, running = descend(key, p, [jaxnorm.init_running(shape)], draw, forward, 0.05)
        found = {}
        for name, often in (("as long", 0.2), ("longer", 0.7)):
            x, lengths = read_slowly(jax.random.key(1), jnp.asarray(images), often)
            logits = recurrent(p, infer(p, x @ p["w"], running[0]), lengths)
            found[name] = jnp.mean(logits.argmax(-1) == labels)
        return found

    found = {}
    for name, norm in sequence_norms().items():
        for kind, value in seeds(partial(one, norm=norm)).items():
            found[f"{kind}: {name}"] = value
    return found


# Tables -------------------------------------------------------------------------------------------------------------

TABLES = {
    "small_batches": (small_batches, "16 examples a step on eight devices of two"),
    "one_class": (one_class, "Every batch of one class"),
    "shifted": (shifted, "Shifted test data, 60 at a time; a prior worth 16 examples"),
    "domains": (domains, "Clean images, and low and noisy ones, in one batch"),
    "sequences": (sequences, "Sequences of 8 to 24 steps, one or three a row, padded to 24"),
}


def markdown(title, rows):
    """A table with mean and standard deviation of each row."""
    lines = [f"## {title}", "", "| | accuracy, % |", "|---|---|"]
    lines += [f"| {name} | {100 * np.mean(v):.1f} ± {100 * np.std(v, ddof=1):.1f} |" for name, v in rows.items()]
    return "\n".join([*lines, ""])


def main(names):
    """Measure, print and keep the tables of these names, or all."""
    stored = RESULTS / "remedies.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    for name in names or TABLES:
        function, title = TABLES[name]
        results[name] = {row: [round(float(a), 4) for a in np.ravel(v)] for row, v in function().items()}
        print(markdown(title, results[name]), flush=True)
        stored.write_text(json.dumps(results, indent=1) + "\n")
    text = [markdown(title, results[name]) for name, (_, title) in TABLES.items() if name in results]
    heading = "# The remedies, measured\n\nBy `benchmarks/remedies.py`: mean and standard deviation of five seeds.\n"
    (RESULTS / "remedies.md").write_text("\n".join([heading, *text]))


if __name__ == "__main__":
    main(sys.argv[1:])
