"""What the host adds to a training step: by default ResNet-18 on images of the size of CIFAR's.

    python benchmarks/host_time.py

An epoch of the loop of ``python -m jaxnorm.training``, made to wait for each step. The device's time is the wait; the
host's is everything else: reading, shuffling and placing batches, dispatch, metrics, progress. In the program itself
the two run side by side, so that the share printed is an upper bound on what the host costs.
"""

import argparse
import time

import jax

from jaxnorm.training import Run, Settings


def host_and_device(run: Run) -> tuple[float, float]:
    """Seconds a step of the next epoch on the host, and waiting for the device."""
    waits, step = [], run.train_step

    def waiting(state, batch):
        result = step(state, batch)
        began = time.perf_counter()
        jax.block_until_ready(result)
        waits.append(time.perf_counter() - began)
        return result

    run.train_step = waiting
    began = time.perf_counter()
    run.train_epoch(int(run.state.step) // run.steps)
    wall = time.perf_counter() - began
    run.train_step = step
    return (wall - sum(waits)) / len(waits), sum(waits) / len(waits)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    run = Run(Settings(arguments.model, data="synthetic", batch_size=arguments.batch_size, epochs=2, devices=1))
    run.train = type(run.train)(*(part[: arguments.steps * arguments.batch_size] for part in run.train))
    run.steps = arguments.steps
    host_and_device(run)  # compiles
    host, device = host_and_device(run)
    print(
        f"{arguments.model}, 32x32 images, batch {arguments.batch_size}, {jax.devices()[0].platform}: "
        f"host {1e3 * host:.1f} ms, device {1e3 * device:.0f} ms a step; host {100 * host / (host + device):.1f} %"
    )


if __name__ == "__main__":
    main()
