"""Command line: try all tools on a model, as ``python -m jaxnorm.surgery check PACKAGE.MODULE:FACTORY``.

FACTORY is a function that returns ``(model, inputs)``, ``(model, inputs, kwargs)`` or ``(model, inputs, kwargs,
train_kwargs)``: a Linen or NNX module, a tuple of inputs, keyword arguments in evaluation, and those in training.
One line says what each tool did; the exit status is 1 if any of them failed.
"""

import argparse
import sys

from jaxnorm.surgery._check import check, load


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each tool and model."""
    parser = argparse.ArgumentParser(prog="python -m jaxnorm.surgery", description=__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("factory", nargs="+", help="PACKAGE.MODULE:FACTORY, or FILE.py:FACTORY")
    failed = False
    for place in parser.parse_args(arguments).factory:
        print(place)
        for checked in check(*load(place)):
            failed |= checked.ok is False
            print(f"  {checked}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
