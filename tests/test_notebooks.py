"""The notebooks run from top to bottom, show what they say they show, and decide by a rule that is rarely wrong."""

import importlib
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import FASTER_TO_COMPILE
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MORE_COMPILED_THAN_RUN = {"08_cost"}
"""These are not optimized, which takes a third less of the processor."""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: the sort of its outputs, of which streams may come in several pieces."""
    return {(output.output_type, output.get("name")) for output in cell.outputs}


@pytest.fixture
def this_python(monkeypatch, tmp_path):
    """The kernel python3 is the interpreter of the tests, with the devices that a notebook asks for itself."""
    write_kernel_spec(tmp_path / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("XLA_FLAGS", FASTER_TO_COMPILE)
    return "python3"


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, this_python, monkeypatch):
    """Without an exception or a warning; and the outputs in the file are of the same kinds, cell by cell."""
    stored, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    resources = {"metadata": {"path": str(path.parent)}}
    if path.stem in MORE_COMPILED_THAN_RUN:
        monkeypatch.setenv("XLA_FLAGS", f"{FASTER_TO_COMPILE} --xla_backend_optimization_level=0")
    NotebookClient(notebook, timeout=600, kernel_name=this_python, resources=resources).execute()
    for old, new in zip(code_cells(stored), code_cells(notebook), strict=True):
        assert kinds(old) == kinds(new), new.source
        assert ("stream", "stderr") not in kinds(new), new.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_is_complete(path):
    """Made by one run from top to bottom, without errors, warnings, times or places of the machine that ran it."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    for cell in cells:
        shows = re.search(r"^ *(print\(|plt\.show\()", cell.source, re.MULTILINE)
        assert cell.outputs or not shows, cell.source
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
        assert not re.search(r"/(home|root|tmp|work|usr|Users)/", str([o for o in cell.outputs if "text" in o]))
        assert "execution" not in cell.metadata, "times of execution"
    assert path.stat().st_size < 1_000_000  # figures have 150 dots an inch


@pytest.fixture(scope="module")
def tools():
    """The module that the notebooks import."""
    sys.path.append(str(NOTEBOOKS[0].parent))
    return importlib.import_module("tools")


def simulated(tools, means, seeds=20, smallest=0.0, runs=400):
    """The verdicts of ``runs`` experiments whose differences have these means and a deviation of one."""
    rng = np.random.default_rng(0)
    draws = rng.normal(np.array(means)[:, None], 1.0, (runs, len(means), seeds))
    return [tools.decide([tools.Effect("", d, smallest, "") for d in draw]).verdict for draw in draws]


@pytest.mark.any_version
@pytest.mark.parametrize("comparisons", [1, 6])
def test_without_effects_nothing_is_shown(tools, comparisons):
    """Five percent may be wrong; the bound is three standard errors of 400 runs above."""
    verdicts = simulated(tools, [0.0] * comparisons)
    wrong = np.mean([verdict != "not shown" for verdict in verdicts])
    assert wrong < 0.05 + 3 * (0.05 * 0.95 / len(verdicts)) ** 0.5
    assert wrong > 0  # a rule that never decides would pass as well


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((2.0, 2.0, 2.0), "holds"),
        ((2.0, 0.0, -2.0), "holds under conditions"),
        ((-2.0, -2.0), "contradicted"),
        ((-2.0,), "contradicted"),
        ((0.0, -2.0), "not shown"),
    ],
)
def test_large_effects_are_found(tools, means, expected):
    verdicts = simulated(tools, means)
    assert np.mean([verdict == expected for verdict in verdicts]) > 0.9


@pytest.mark.any_version
def test_small_effects_do_not_count(tools):
    """However certain they are; in either direction."""
    for mean in (2.0, -2.0):
        assert set(simulated(tools, [mean], smallest=4.0)) == {"not shown"}


@pytest.mark.any_version
def test_intervals_agree_with_the_verdict(tools):
    """Corrected after Holm: by hand, and each excludes zero if and only if its test was passed."""
    effects = [tools.Effect(str(m), m + np.array([-1.0, 0.0, 1.0, 2.0, -2.0]), 0.0, "") for m in (3.0, 1.7, 1.0)]
    found = tools.decide(effects)
    p = [0.0132, 0.0740, 0.2302]  # two-sided, four degrees of freedom
    errors = np.sqrt(2.5 / 5)
    # The largest passes 0.05 / 3; the second fails 0.05 / 2, which is the level of all that follow.
    expected = errors * np.array([3.9608, 3.4954, 3.4954])
    np.testing.assert_allclose(found.high - found.means, expected, rtol=1e-3)
    assert list(found.low > 0) == [p[0] < 0.05 / 3, p[1] < 0.05 / 2, False]
    assert found.verdict == "holds under conditions"


@pytest.mark.any_version
def test_differences_without_spread(tools):
    """All seeds alike: an effect if it is not zero."""
    assert tools.decide([tools.Effect("", np.zeros(5), 0.0)]).verdict == "not shown"
    assert tools.decide([tools.Effect("", np.ones(5), 0.1)]).verdict == "holds"


@pytest.mark.any_version
def test_figures_of_a_claim(tools):
    differences = np.array([0.010, 0.012, 0.014, 0.011, 0.013])
    text = tools.verdicts(small_batches=[tools.Effect("two", differences, 0.01)]).data
    assert text.splitlines()[2].startswith("| small-batches | it fails on very small batches")
    assert text.endswith("| two: +1.20 [+1.00, +1.40] points | 1 | 1 points | holds |")


def test_other_seeds(tools, monkeypatch):
    assert list(tools.seeds(full=20, short=2)) == [0, 1]
    monkeypatch.setenv("FIRST_SEED", "1000")
    monkeypatch.setenv("SEEDS", "3")
    assert list(tools.seeds()) == [1000, 1001, 1002]
