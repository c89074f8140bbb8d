"""Run notebooks from top to bottom in full, and store what they show: `FULL=1 python notebooks/execute.py [FILES]`."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from rich.progress import track

HERE = Path(__file__).parent

for path in track([Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")), "notebooks"):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name != "execution"}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)
