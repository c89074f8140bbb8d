"""Interrupt training at random moments, fill its disk, resume it, and compare with a run that nothing happened to.

    python benchmarks/kill_and_resume.py --attempts 20

Each attempt starts a run that writes a checkpoint every five steps, and resumes it until it has had each of SIGKILL,
SIGTERM and SIGINT, in random order, each in a random step, at a random moment of it; then the run may finish. Another
run writes to a disk with room for one checkpoint (where one can be mounted), ends in one line, is given room, and
finishes. Parameters, running averages and optimizer state must be equal bit by bit, and so must all metrics.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxnorm.training._report import read_metrics

SETTINGS = ["--model", "mlp", "--epochs", "3", "--devices", "2", "--save-every", "5"]
SECONDS = 0.1
"""After a step, a signal comes within this time: more than a step takes, so that what is between steps is hit too."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(out: Path) -> subprocess.Popen[str]:
    """A run that goes on from what is in ``out``, if anything is."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "jaxnorm.training", *SETTINGS, "--out", str(out), "--resume"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(out: Path) -> list[str]:
    """The whole lines of a run's metrics."""
    metrics = out / "metrics.jsonl"
    return metrics.read_text().split("\n")[:-1] if metrics.exists() else []


def finish(out: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Let a run end; its final state, and its metrics but for the speeds."""
    process = start(out)
    _, printed = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"the resumed run failed:\n{printed}")
    last = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    with ocp.StandardCheckpointer() as checkpointer:
        state = jax.device_get(checkpointer.restore((out / "checkpoints" / str(last) / "state").absolute()))
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    records, _ = read_metrics(out / "metrics.jsonl")
    return state, [{k: v for k, v in record.items() if k != "examples_per_second"} for record in records]


def check_same(actual: tuple[Any, list], expected: tuple[Any, list]) -> None:
    """Raise unless two runs ended with the same state and metrics."""
    assert jax.tree.structure(actual[0]) == jax.tree.structure(expected[0])
    for a, b in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert actual[1] == expected[1], "metrics differ"


def interrupt(number: signal.Signals, out: Path, step: int, seconds: float) -> str:
    """Start a run, send it a signal so many seconds after a step, or its first if that is later; say how it ended."""
    before, process = len(lines(out)), start(out)

    def reached(line: str) -> bool:
        record = json.loads(line)
        return record["kind"] == "train" and record["step"] >= step

    while process.poll() is None and not any(map(reached, lines(out)[before:])):
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    _, printed = process.communicate(timeout=600)
    records, _ = read_metrics(out / "metrics.jsonl")
    if any(record["kind"] == "result" for record in records):
        return "was done"
    if number == signal.SIGKILL:
        return f"killed after step {records[-1]['step']} or the next"
    stopped = re.search(rf"{number.name}: stopped after step (\d+), which is saved", printed)
    assert process.returncode == 128 + number, (process.returncode, printed)
    assert stopped, printed
    assert len(printed.splitlines()) == 1, printed
    return f"stopped after step {stopped[1]}"


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """Mount one; yields whether that is allowed."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=True)


def fill_the_disk(folder: Path, expected: tuple[Any, list]) -> str:
    """A run on a disk that has room for one checkpoint, then more room; say how it ended."""
    with small_disk(folder, "2500k") as mounted:
        if not mounted:
            return "no disk can be mounted here: not tried"
        process = start(folder / "run")
        _, printed = process.communicate(timeout=600)
        assert process.returncode == 1, (process.returncode, printed)
        (line,) = printed.splitlines()
        assert str(folder / "run") in line, line
        assert "Make room" in line, line
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        check_same(finish(folder / "run"), expected)
    return line.removeprefix(str(folder))


def main() -> None:
    """Read the arguments and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=20, help="each with all of the signals")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)  # the states read back are laid out over as many
    chance = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        expected = finish(folder / "undisturbed")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"  # what is killed must not leave half a program
        steps = [record["step"] for record in expected[1] if record["kind"] == "train"]
        for attempt in range(settings.attempts):
            out, order = folder / f"{attempt}", chance.sample(SIGNALS, len(SIGNALS))
            part = len(steps) // (len(order) + 1)  # a signal may come a few steps late, and all are to find it running
            for i, number in enumerate(order):
                step = chance.choice(steps[i * part : (i + 1) * part])
                how = interrupt(number, out, step, chance.uniform(0, SECONDS))
                print(f"{attempt + 1}, {number.name}: {how}", flush=True)
            check_same(finish(out), expected)
            print(f"{attempt + 1}: resumed, the same", flush=True)
        print(f"a full disk: {fill_the_disk(folder / 'disk', expected)}", flush=True)
    print(f"{settings.attempts} times each signal: every final state and metric equal to the undisturbed run's")


if __name__ == "__main__":
    main()
