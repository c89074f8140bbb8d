"""Kill training at random moments, resume it, and compare what comes out with a run that nobody killed.

    python benchmarks/kill_and_resume.py --attempts 20

Each attempt starts a run that writes a checkpoint every three steps, ends it by SIGKILL after a random time, once or
twice, and lets the last one finish. Parameters, running averages and optimizer state must be equal, bit by bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

SETTINGS = ["--epochs", "3", "--devices", "2", "--save-every", "3", "--batch-size", "128"]


def start(out: Path) -> subprocess.Popen:
    """A run that goes on from what is in ``out``, if anything is."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "jaxnorm.training", *SETTINGS, "--out", str(out), "--resume"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(out: Path) -> dict:
    """Let a run end; its final state."""
    process = start(out)
    printed, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"the resumed run failed:\n{printed}")
    last = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((out / "checkpoints" / str(last) / "state").absolute())


def kill_and_resume(attempts: int, seed: int, folder: Path) -> list[list[float]]:
    """Try ``attempts`` times; return the seconds after which each run was killed.

    Raises:
      AssertionError: a run came out different from the uninterrupted one.
    """
    chance = random.Random(seed)
    began = time.perf_counter()
    expected = jax.device_get(finish(folder / "uninterrupted"))
    longest = time.perf_counter() - began
    kills = []
    for attempt in range(attempts):
        out, times = folder / f"attempt-{attempt}", []
        for _ in range(chance.randint(1, 2)):
            process = start(out)
            delay = chance.uniform(0.4, 0.95) * longest  # before that, Python and the compiler are starting
            try:
                process.communicate(timeout=delay)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                times.append(delay)
        actual = jax.device_get(finish(out))
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
        kills.append(times)
        print(f"attempt {attempt + 1}: killed after {', '.join(f'{t:.1f} s' for t in times)}; the same", flush=True)
    return kills


def main() -> None:
    """Read the arguments and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)  # the states read back are laid out over as many
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_and_resume(settings.attempts, settings.seed, Path(folder))
    print(f"{sum(map(len, kills))} kills in {len(kills)} runs: every final state equal to the uninterrupted one")


if __name__ == "__main__":
    main()
