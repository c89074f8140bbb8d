"""The chips that programs are compiled for, whether they are there or not.

XLA's compilers for TPU (``pip install "jax[tpu]"``) and NVIDIA GPUs (``pip install "jax[cuda12]"``) run on any machine.
Import this module before jax starts its backends.
"""

import functools
import os
from pathlib import Path

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so several processes may compile
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-256")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

jax.config.update("jax_platforms", "cpu")  # the machine's own devices, if any, are not wanted

TARGETS = ("cpu", "tpu-v5e-1", "tpu-v5e-4", "tpu-v5e-256", "h200-1", "h200-4", "h200-8")
"""Platform, chip and number of chips."""

_TPU = {1: ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}), 4: ("v5e:2x2", {}), 256: ("v5e:16x16", {})}


class NotInstalledError(RuntimeError):
    """The compiler for a chip is not installed."""


@functools.cache
def mesh_of(target: str) -> Mesh:
    """A mesh with one axis, "data", of the chips of ``target``.

    Raises:
      NotInstalledError: the compiler for them is not installed.
    """
    platform, _, count = target.rpartition("-")
    if not platform:
        devices = jax.devices("cpu")[:1]
    elif platform == "tpu-v5e":
        name, settings = _TPU[int(count)]
        devices = _compiler("tpu", topology_name=name, **settings)
    else:
        config = (Path(__file__).parent / "targets" / f"{platform}.txtpb").read_text()
        jax.devices()  # the plugin registers itself with the first backend
        devices = _compiler("cuda", topology_name=platform, target_config=config, topology=f"1x1x{count}")
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def _compiler(platform: str, **settings) -> list[jax.Device]:
    try:
        return topologies.get_topology_desc(platform=platform, **settings).devices
    except Exception as error:  # each plugin has an exception of its own for not being there
        extra = {"tpu": "tpu", "cuda": "cuda12"}[platform]
        raise NotInstalledError(f'the compiler for {platform} is not installed: pip install "jax[{extra}]"') from error


def available(target: str) -> bool:
    """Whether programs can be compiled for ``target`` here."""
    try:
        mesh_of(target)
    except NotInstalledError:
        return False
    return True
