"""Run notebooks from top to bottom in full, and store what they show: `FULL=1 python notebooks/execute.py [FILES]`.

With other seeds (`FIRST_SEED=1000 SEEDS=20`) nothing is stored: the verdicts are printed.
"""

import importlib
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from rich.progress import track

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "docs"))
decided = importlib.import_module("tables").decided


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of this run."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=3600, resources=resources).execute()
    for cell in notebook.cells:
        kept = {name: v for name, v in cell.metadata.items() if name != "execution"}
        cell.metadata = nbformat.from_dict(kept)
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in track(paths, "notebooks"):
        notebook = execute(path)
        if "FIRST_SEED" not in os.environ:
            nbformat.write(notebook, path)
        for found in decided(notebook):
            print(
                f"{path.stem}: {found.claim}: {found.verdict}: {found.effects}",
                flush=True,
            )
