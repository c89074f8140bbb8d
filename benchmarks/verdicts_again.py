"""Do the verdicts survive other seeds? Every notebook in full, with ``FIRST_SEED=1000`` and ``SEEDS=20``.

``python benchmarks/verdicts_again.py [FILES]`` prints claim, stored verdict and verdict with other seeds, and exits
with 1 if any two differ. ``FIRST_SEED`` and ``SEEDS`` can be set to others. Notebooks are not changed.
"""

import importlib
import os
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "notebooks"), str(ROOT / "docs")]
execute = importlib.import_module("execute").execute
decided = importlib.import_module("tables").decided


def main(paths: list[Path]) -> bool:
    """Print the table; whether all verdicts agree."""
    same = True
    print("| notebook | claim | stored | other seeds | effects with other seeds |\n|---|---|---|---|---|", flush=True)
    for path in paths:
        stored = {v.claim: v.verdict for v in decided(nbformat.read(path, as_version=4))}
        for new in decided(execute(path)):
            same &= stored[new.claim] == new.verdict
            row = (path.stem, new.claim, stored[new.claim], new.verdict, new.effects)
            print(f"| {' | '.join(row)} |", flush=True)
    return same


if __name__ == "__main__":
    os.environ |= {"FULL": "1"}
    os.environ.setdefault("FIRST_SEED", "1000")
    os.environ.setdefault("SEEDS", "20")
    sys.exit(not main([Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))))
