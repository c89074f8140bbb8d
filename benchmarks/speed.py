"""Time all five normalizations against the peers, on whatever device is there.

    python benchmarks/speed.py            # a table and results/speed-<device>.json, which docs/figures.py draws

Forward and training step (forward, and gradients of input, scale and bias) of each library that is installed, in turn
within one process; medians and quartiles of many runs. Beside them, the time in which the device copies the input: a
forward pass cannot take less, a step not less than 2.5 of it.

It runs itself again with glibc's allocator told to keep what it has, which would otherwise give large arrays back to
the system after every run: that can take longer than the run.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or PyTorch's threads would spin while others are timed

KEEPING = {"MALLOC_MMAP_THRESHOLD_": 2**32, "MALLOC_TRIM_THRESHOLD_": 2**34, "MALLOC_TOP_PAD_": 2**28}  # mallopt(3)


def jax_runner(norm: str, kind: str, shape: tuple[int, ...], dtype: str, name: str):
    """A function without arguments that runs one library's layer and waits for it."""
    parameters, apply = cases.JAX_CONTENDERS[name](norm, jax.ShapeDtypeStruct(shape, dtype))
    run = jax.jit(cases.KINDS[kind](apply))
    x, dy = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(1)))
    return lambda: jax.block_until_ready(run(parameters, x, dy))


def copy_runner(shape: tuple[int, ...], dtype: str):
    """Read an array and write another."""
    x, run = jnp.ones(shape, dtype), jax.jit(lambda x: -x)
    return lambda: jax.block_until_ready(run(x))


def torch_runner(norm: str, kind: str, shape: tuple[int, ...], dtype: str, channels_last: bool):
    """PyTorch's layer, on the GPU if PyTorch has one."""
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    channels, f = shape[-1], torch.nn.functional
    rows = norm in ("layer", "rms")
    size = shape if rows or len(shape) == 2 else (shape[0], channels, *shape[1:-1])
    x, dy = (torch.randn(size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    if len(size) == 4 and not rows and channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    parameters_dtype = x.dtype if rows or norm == "group" else torch.float32
    scale, bias = (torch.ones(channels, dtype=parameters_dtype, device=device) for _ in range(2))
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def apply(x, scale, bias):
        if norm == "batch":
            return f.batch_norm(x, mean, var, scale, bias, training=True)
        if norm == "layer":
            return f.layer_norm(x, (channels,), scale, bias)
        if norm == "rms":
            return f.rms_norm(x, (channels,), scale)
        if norm == "group":
            return f.group_norm(x, cases.GROUPS, scale, bias)
        return f.instance_norm(x, weight=scale, bias=bias)

    def run():
        if kind == "forward":
            with torch.no_grad():
                apply(x, scale, bias)
        else:
            wanted = [t.detach().requires_grad_() for t in ((x, scale) if norm == "rms" else (x, scale, bias))]
            torch.autograd.grad(apply(*wanted, *([None] if norm == "rms" else [])), wanted, dy)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def runners(norm: str, kind: str, shape: tuple[int, ...], dtype: str) -> dict[str, object]:
    """Everybody who can run this case, by name."""
    found = {"copy": copy_runner(shape, dtype)}
    for name in cases.JAX_CONTENDERS:
        try:
            found[name] = jax_runner(norm, kind, shape, dtype, name)
            found[name]()
        except ImportError:
            found.pop(name, None)
    try:
        for layout in (True, False) if len(shape) == 4 and norm not in ("layer", "rms") else (True,):
            name = "torch" if layout else "torch, channels first"
            found[name] = torch_runner(norm, kind, shape, dtype, layout)
            found[name]()
    except ImportError:
        found.pop(name, None)
    return found


def measure(found: dict, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run of each, in a new order every turn, for about so many seconds."""
    times, order = {name: [] for name in found}, np.random.default_rng(0)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times["copy"]) < 7:
        for name in order.permutation(list(found)):
            run = found[name]
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def geometric_mean(ratios: list[float]) -> float:
    """Of positive numbers."""
    return float(np.exp(np.mean(np.log(ratios))))


def summary(rows: list[dict]) -> dict:
    """How many times as fast as each of the others: geometric mean and least, of all cases and by norm and dtype."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        for name in (row["kind"], f"{row['kind']}, {row['norm']}, {row['dtype']}"):
            groups.setdefault(name, []).append(row["ms"])
    result = {}
    for name, times in groups.items():
        for other in dict.fromkeys(n for ms in times for n in ms if n not in ("jaxnorm", "copy")):
            ratios = [ms[other][1] / ms["jaxnorm"][1] for ms in times if other in ms]
            figures = round(geometric_mean(ratios), 3), round(min(ratios), 3)
            result.setdefault(name, {})[other] = dict(zip(("geometric mean", "least"), figures, strict=True))
    return result


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", default=list(cases.NORMS), choices=cases.NORMS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", default=list(cases.KINDS), choices=cases.KINDS)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case, over all libraries")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    settings = parser.parse_args()
    wanted = [
        (norm, case, shape, dtype, kind)
        for norm in settings.norms
        for case, shape in cases.SHAPES[norm].items()
        for dtype in settings.dtypes
        for kind in settings.kinds
    ]
    rows = []
    for norm, case, shape, dtype, kind in track(wanted, "timing", console=Console(file=sys.stderr)):
        times = measure(runners(norm, kind, shape, dtype), settings.seconds)
        quartiles = {n: [round(q, 4) for q in statistics.quantiles(t, n=4)] for n, t in times.items()}
        rows.append({"norm": norm, "case": case, "shape": shape, "dtype": dtype, "kind": kind, "ms": quartiles})

    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    table = Table("norm", "case", "dtype", "kind", *names, title="milliseconds, median")
    for row in rows:
        medians = [f"{row['ms'][n][1]:.2f}" if n in row["ms"] else "" for n in names]
        table.add_row(row["norm"], row["case"], row["dtype"], row["kind"], *medians)
    console = Console(width=200)
    console.print(table)
    console.print_json(data=summary(rows))
    device = jax.devices()[0].device_kind.replace(" ", "-").lower()
    versions = {"jax": jax.__version__, "flax": cases.flax.__version__, "python": platform.python_version()}
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    settings.out.mkdir(exist_ok=True)
    result = {"device": device, "versions": versions, "summary": summary(rows), "quartiles of milliseconds": rows}
    (settings.out / f"speed-{device}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if not KEEPING.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {k: str(v) for k, v in KEEPING.items()})
    main()
