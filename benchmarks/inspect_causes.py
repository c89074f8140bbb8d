"""How often `surgery.inspect` is right: healthy trainings, and trainings broken on purpose in each way that it knows.

``python benchmarks/inspect_causes.py --seeds 10`` prints, for each way, in how many trainings which causes were found,
and what the fault costs in accuracy. Two tasks: handwritten digits of scikit-learn, and textures in three channels.
"""

import argparse
import collections
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from jaxnorm import surgery

RESULT = Path(__file__).parent / "results" / "inspect-causes.json"


class Net(nn.Module):
    """Convolutions and batch norms of Flax; the input is normalized too, where ``of_input`` says so."""

    classes: int
    axis: int = -1
    momentum: float = 0.9
    axis_name: str | None = None
    of_input: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        """Logits."""
        norm = functools.partial(nn.BatchNorm, not train, momentum=self.momentum, axis_name=self.axis_name)
        x = norm()(x) if self.of_input else x
        for width in (8, 16, 16):
            x = nn.relu(norm(axis=self.axis)(nn.Conv(width, (3, 3))(x)))
        return nn.Dense(self.classes)(x.mean((1, 2)))


def digits():
    """Images of 8 x 8 and their labels, for training and evaluation."""
    data = load_digits()
    x = jnp.asarray(data.images, jnp.float32)[..., None] / 16
    return (x[:1200], jnp.asarray(data.target[:1200])), (x[1200:], jnp.asarray(data.target[1200:])), 10


def textures(n=3000):
    """Two textures, each image brighter or darker as a whole, in three channels that differ."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 8, 8, 3)) * [0.5, 1.0, 2.0]
    x += 0.5 * label[:, None, None, None] * np.sin(np.arange(8))[:, None, None] + rng.normal(1.5, 2.0, (n, 1, 1, 1))
    x, label = jnp.asarray(x, jnp.float32), jnp.asarray(label)
    return (x[:2400], label[:2400]), (x[2400:], label[2400:]), 2


TASKS = {"digits": digits, "textures": textures}
WAYS = {
    "healthy": {},
    "healthy, input normalized": {"of_input": True},
    "healthy, momentum 0.99": {"momentum": 0.99, "steps": 600},
    "never updated": {"keep": False},
    "momentum too slow": {"momentum": 0.999},
    "not finite": {"poison": True},
    "wrong axis": {"axis": 1},
    "scaled differently": {"scale": 255.0},
    "batch of one": {"batch": 1, "steps": 400, "momentum": 0.98},
    "not synchronized": {"devices": 4},
    "averaged weights": {"average": True, "rate": 0.01},
}
"""What is done, by the cause that should be found; none in the healthy ones."""


def train(task, seed, *, steps=200, batch=32, rate=0.005, keep=True, poison=False, devices=1, average=False, **model):
    """The network, its variables as they are evaluated, and those with exact averages for the same weights."""
    (x, labels), _, classes = TASKS[task]()
    net = Net(classes, **model)
    variables = jax.jit(functools.partial(net.init, train=True))(jax.random.key(seed), x[:2])
    decays = not average  # weights are averaged where the rate stays high
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps) if decays else rate)

    @jax.jit
    def step(carry, x, labels):
        params, stats, state, mean = carry

        def loss(params):
            out, new = net.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
            return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean(), new["batch_stats"]

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        mean = optax.incremental_update(params, mean, 0.02)
        return params, new if keep else stats, state, mean

    order = jax.random.randint(jax.random.key(seed + 1), (steps, batch), 0, len(x))
    params, stats = variables["params"], variables["batch_stats"]
    carry = (params, stats, optimizer.init(params), params)
    for index in order:  # not by scan, in which convolutions are slow on a CPU
        carry = step(carry, x[index], labels[index])
    params, stats, _, mean = carry
    if devices > 1:  # each device has averaged its own last batches
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec

        def apart(x):
            return net.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")[1]["batch_stats"]

        split = jax.shard_map(apart, mesh=mesh, in_specs=spec("data"), out_specs=spec(), check_vma=False)
        stats = jax.jit(split)(x[order[-1]])
    if poison:
        bad = x[order[-1]].at[0, 0, 0, 0].set(jnp.nan)
        stats = net.apply({"params": params, "batch_stats": stats}, bad, mutable="batch_stats")[1]["batch_stats"]
    return net, {"params": mean if average else params, "batch_stats": stats}


def accuracy(net, variables, x, labels):
    """Of evaluation, by the running averages."""
    return float((net.apply(variables, x, train=False).argmax(-1) == labels).mean())


def main():
    """Print the table; store it with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--examples", type=int, default=512, help="in the batch that is inspected")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows = []
    for task in TASKS:
        train_set, (x, labels), _ = TASKS[task]()
        for way, how in WAYS.items():
            found, lost = collections.Counter(), []
            how = dict(how)
            scale = how.pop("scale", 1.0)
            for seed in range(given.seeds):
                net, variables = train(task, 100 * seed, **how)
                exact = surgery.recalibrate(net, variables, [train_set[0]], train=False)
                lost.append(accuracy(net, exact, x, labels) - accuracy(net, variables, x * scale, labels))
                report = surgery.inspect(net, variables, scale * x[: given.examples], train=False)
                causes = {f.cause for f in report.findings}
                found.update(causes or {"nothing"})
            row = {"task": task, "way": way, "found": dict(found), "accuracy lost": round(float(np.mean(lost)), 3)}
            rows.append(row)
            print(f"{task:9} {way:26} lost {row['accuracy lost']:.3f}  {row['found']}", flush=True)
    if given.write:
        RESULT.write_text(json.dumps({"seeds": given.seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    with tempfile.TemporaryDirectory() as cache:  # seeds share their programs
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        main()
