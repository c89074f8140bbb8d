"""Command line: train an image classifier, its batch sharded over a mesh of devices, on one host or several.

Without arguments: a small convolutional network with batch normalization on handwritten digits, on 4 devices (simulated
where there is only a CPU). The accuracy printed is that of the running averages. Metrics, plots and checkpoints go to
the output folder.
"""

import sys

from jaxnorm.training._failure import Failure
from jaxnorm.training._interruption import Interrupted, Signals
from jaxnorm.training._run import Run
from jaxnorm.training._settings import parse


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train by the command line's settings; return loss and accuracy on the test images."""
    settings = parse(arguments, description=__doc__)
    try:
        with Signals(settings.num_processes) as signals:
            return Run(settings, signals)()
    except Failure as failure:
        sys.exit(str(failure))
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + interrupted.number)


if __name__ == "__main__":
    main()
