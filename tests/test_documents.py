"""The documents: their code runs, what they name is there, and what is public has its place in them."""

import contextlib
import importlib
import importlib.util
import inspect
import json
import re
import statistics
from pathlib import Path
from unittest import SkipTest

import jax
import pytest
from checks import quick_first
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

import jaxnorm.linen
import jaxnorm.nnx

pytestmark = pytest.mark.any_version

ROOT = Path(__file__).parent.parent
DOCS, RESULTS, NOTEBOOKS = ROOT / "docs", ROOT / "benchmarks" / "results", ROOT / "notebooks"
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if p.relative_to(DOCS).parts[0] not in ("_build", "notebooks")]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
PARSERS = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT), pattern="*.md")
MODULES = ("jaxnorm", "jaxnorm.linen", "jaxnorm.nnx", "jaxnorm.surgery", "jaxnorm.training")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def load(name):
    """A module of ``docs/``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, docstrings, tables = load("check"), load("docstrings"), load("tables")


# Of the pages `make test` runs none: one takes up to three seconds.
@pytest.mark.parametrize("path", quick_first(2, DOCUMENTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_code_runs(path):
    """One block after the other, in one namespace; what a document needs and does not show is in its comments."""
    document = PARSERS.parse(path)
    for example in document.examples():
        with contextlib.suppress(SkipTest), jax.numpy_rank_promotion("allow"):
            example.evaluate()


@each_document
def test_commands_are_there(path):
    """Every target of make and every script that a document names."""
    text, makefile = path.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / script).exists(), script


def public(module):
    """What `module` exports, and what it has besides that is defined in the package."""
    defined = {n for n, o in vars(module).items() if str(getattr(o, "__module__", "")).startswith("jaxnorm")}
    return set(module.__all__) | {
        n for n in defined if not n.startswith("_") and not inspect.ismodule(getattr(module, n))
    }


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_an_entry_and_nothing_else(name):
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    entries = re.findall(
        rf"^ *\.\. (?:auto(?:function|class)|py:data):: {re.escape(name)}\.(\w+)$", pages, re.MULTILINE
    )
    assert sorted(entries) == sorted(public(importlib.import_module(name)))


def test_arguments_are_shown_before_the_example():
    shown = docstrings.with_arguments(jaxnorm.nnx.GhostBatchNorm, "It is.\n\nExample:\n  None\n")
    assert shown.startswith("It is.\n\nArgs:\n  num_features: How many features")
    assert shown.endswith(
        "  virtual_batch_size: How many consecutive examples are normalized together.\n\nExample:\n  None\n"
    )
    assert docstrings.with_arguments(jaxnorm.nnx.AdaLN, "It is.") == "It is."


def test_signatures_have_no_addresses():
    signature = (
        f"(*, dtype={jax.numpy.float32!r}, init={jax.nn.initializers.zeros!r}, parent=<a object at 0x1>, name=None)"
    )
    assert docstrings.shortened(signature) == "(*, dtype=float32, init=zeros, name=None)"


# Verdicts ------------------------------------------------------------------------------------------------------------


def contents(notebook):
    return json.loads(notebook.read_text())


def test_every_claim_is_decided():
    claims = tables.claims(ROOT)
    found = [v for notebook in NOTEBOOKS.glob("*.ipynb") for v in tables.decided(contents(notebook))]
    assert {verdict.claim for verdict in found} == claims.keys()
    assert {verdict.verdict for verdict in found} <= tables.COLORS.keys()


def test_every_notebook_ends_in_verdicts():
    """Whatever shows a table of verdicts shows it last, where it is looked for."""
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        cells = [cell for cell in contents(notebook)["cells"] if cell["cell_type"] == "code"]
        calls = [i for i, cell in enumerate(cells) if "verdicts(" in "".join(cell["source"])]
        assert calls == [len(cells) - 1], notebook.name
        assert list(tables.decided(contents(notebook))), notebook.name


def test_verdicts_are_read_from_what_notebooks_show(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "tools.py").write_text('CLAIMS = {"b": "it helps", "a": "it hurts", "c": "it costs"}\n')
    header = (
        "| claim |  | effect [interval] | comparisons | looked for | verdict |\n| --- | --- | --- | --- | --- | --- |"
    )
    rows = "| a | it hurts | x: -2 [-3, -1]; y: -1 [-2, +0] | 2 | 1 points | not shown |\n"
    rows += "| b | it helps | x: +0.9 [+0.8, +1.0] | 1 | 0.5 | holds |"
    shown = {"data": {"text/markdown": f"{header}\n{rows}"}}
    cells = [{"source": "# What helps"}, {"source": "x", "outputs": [{"text": "| claim"}, shown]}]
    notebook = tmp_path / "notebooks" / "02_what.ipynb"
    notebook.write_text(json.dumps({"cells": cells}))
    text, sources = tables.verdicts(tmp_path)
    assert notebook in sources
    overview, helps, hurts, costs = text.split("(claim-")
    assert "| [it helps](#claim-b) | {bdg-success}`holds` | [02](notebooks/02_what.ipynb) |" in overview
    assert "## It helps" in helps
    assert "{bdg-success}`holds` in notebook [02](notebooks/02_what.ipynb): 1 comparison, looked for 0.5" in helps
    assert "- x: +0.9 [+0.8, +1.0]\n" in helps
    assert (
        "{bdg-secondary}`not shown` in notebook [02](notebooks/02_what.ipynb): 2 comparisons, looked for 1 po" in hurts
    )
    assert "- x: -2 [-3, -1]\n- y: -1 [-2, +0]\n" in hurts
    assert "No verdict" in costs


# Benchmarks ----------------------------------------------------------------------------------------------------------


def rows_of(page, first):
    """The cells of the table of a page whose header begins with the cells ``first``."""
    lines = iter((DOCS / page).read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {first}"):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    return
                yield [cell.strip() for cell in row.strip("|").split("|")]


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_every_result_has_a_command():
    files = {file for row in rows_of("benchmarks.md", "file in") for file in re.findall(r"results/([\w.-]+)\)", row[0])}
    assert files == {path.name for path in RESULTS.iterdir()}


@pytest.mark.parametrize(
    ("first", "chip"), [("| bytes, of Flax's", "h200"), ("| v5e: bytes, of Flax's", "tpu-v5e")], ids=["h200", "tpu-v5e"]
)
def test_the_tables_of_networks_are_the_results(first, chip):
    found = {(row["case"], row["contender"]): row for row in results(f"compiled-{chip}")["rows"] if "case" in row}
    table = list(rows_of("benchmarks.md", first))
    assert table
    for name, ratio, *counted, temporaries, of_flax in table:
        case, _, contender = name.rpartition(": ")
        row = found[case, contender]
        if len(counted) == 1:  # one memory
            (kernels,) = counted
        else:
            accessed, kernels, computing = counted
            more = f"{row['kernels more a norm'] - row['copies more a norm']:+.2f}" if "copies" in row else ""
            assert accessed == str(row.get("accessed / Flax", "")), name
            assert computing == more or float(computing) == float(more), name
        assert float(ratio) == row["bytes / Flax"], name
        assert float(kernels) == row["kernels more a norm"], name
        unit = 0.5 if "MB" in temporaries else 0.005
        assert abs(float(temporaries.split()[0]) - row["temporaries"]) <= unit, name
        assert abs(float(of_flax.split()[0]) - (row["temporaries"] - row["temporaries more"])) <= unit + 1e-3, name


def test_the_table_of_norms_alone_is_the_results():
    chips = [
        {(row["norm"], row["kind"]): row for row in results(name)["rows"] if row.get("dtype") == "bfloat16"}
        for name in ("compiled-h200", "compiled-cpu")
    ]
    table = list(rows_of("benchmarks.md", "| H200"))
    assert len(table) == 10
    for name, *figures in table:
        norm, kind = name.split(" norm, ")
        assert figures == [f"{chip[norm, kind][who]['bytes']:.2f}" for chip in chips for who in ("jaxnorm", "flax")], (
            name
        )


def test_the_table_of_times_is_the_results():
    summary, table = results("speed-cpu")["summary"], list(rows_of("benchmarks.md", "| flax.linen"))
    assert len(table) == 11
    for name, *figures in table:
        case = summary["step" if name == "all" else f"step, {name.replace('RMS', 'rms').replace(' norm', '')}"]
        libraries = ("flax.linen", "flax.nnx", "haiku", "equinox", "torch", "torch, channels first")
        assert figures == [f"{case[n]['geometric mean']:.2f}" if n in case else "" for n in libraries], name


def test_what_is_said_of_times_is_the_results():
    rows, page = results("speed-cpu")["quartiles of milliseconds"], (DOCS / "benchmarks.md").read_text()

    def without_rms(kind):
        times = [row["ms"] for row in rows if row["kind"] == kind and row["norm"] != "rms" and "torch" in row["ms"]]
        return statistics.geometric_mean(ms["torch"][1] / ms["jaxnorm"][1] for ms in times)

    of_forward = {n: f"{v['geometric mean']:.2f}" for n, v in results("speed-cpu")["summary"]["forward"].items()}
    text = " ".join(page.split())
    assert f"without it {without_rms('step'):.2f}." in text
    assert f"A forward pass alone is {of_forward['flax.linen']} times as fast as flax.linen's" in text
    assert f"{of_forward['torch']} times as fast as PyTorch's with channels last ({without_rms('forward'):.2f}" in text
    assert f"and {of_forward['torch, channels first']} with channels first" in text


# The site ------------------------------------------------------------------------------------------------------------


def test_check_finds_what_is_wrong_with_a_site(tmp_path):
    """Links that lead nowhere and whatever a browser would load from elsewhere; not links for the reader to follow."""
    (tmp_path / "b.html").write_text('<p id="here">b</p><img src="data:image/png;base64,AA==">')
    (tmp_path / "s.css").write_text("a { color: red }")
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="s.css"><a href="b.html#here">b</a><a href="#top" id="top">a</a>'
        '<a href="https://example.org/">elsewhere</a>'
    )
    assert list(check.faults(tmp_path)) == []
    wrong = {
        '<a href="c.html">': "dead link c.html",
        '<a href="b.html#there">': "dead anchor b.html#there",
        '<a href="#id1">': "dead anchor #id1",
        '<img src="missing.png">': "dead link missing.png",
        '<script src="https://example.org/a.js"></script>': "loads https://example.org/a.js",
        '<link rel="preload" href="//example.org/a.woff2">': "loads //example.org/a.woff2",
        "<style>p { background: url(https://example.org/a.png) }</style>": "loads https: in style",
        """<p style="background: url('//example.org/a.png')">""": "loads https:",
    }
    for line, expected in wrong.items():
        (tmp_path / "a.html").write_text(line)
        (found,) = check.faults(tmp_path)
        assert found.startswith(f"a.html: {expected}"), line
    (tmp_path / "a.html").write_text("")
    (tmp_path / "s.css").write_text("@import 'https://example.org/a.css'")
    assert list(check.faults(tmp_path)) == ["s.css: loads from elsewhere"]


def test_the_table_of_accuracy_is_the_results():
    found, (header, *rows) = (
        results("accuracy"),
        [["κ", *results("accuracy")["largest error"]], *rows_of("benchmarks.md", "κ")],
    )
    for i, row in enumerate(rows):
        assert row == [f"{found['kappa'][i]:g}", *(f"{found['largest error'][name][i]:.1e}" for name in header[1:])]
    assert len(rows) == len(found["kappa"])
