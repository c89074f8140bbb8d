"""What the pages say is tested, is: every test that they name exists; and so does every file that they link to."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_version

ROOT = Path(__file__).parent.parent
WRITTEN = [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(WRITTEN)]
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def members_of(path):
    """Functions of a module, and classes with their methods, as pytest names them."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return found


def missing_tests(text):
    pairs = re.findall(r"tests/(\w+\.py)::(\w+(?:::\w+)?)", text)
    return [f"{file}::{name}" for file, name in pairs if name not in members_of(ROOT / "tests" / file)]


def missing_files(page):
    """Targets of links that are not there; those of other sites are not looked at."""
    prose = re.sub(r"(?ms)^ *```.*?^ *```|`[^`\n]*`", "", page.read_text())
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


@named
def test_tests_that_pages_name_exist(page):
    assert missing_tests(page.read_text()) == []


@named
def test_files_that_pages_link_to_exist(page):
    assert missing_files(page) == []


def test_what_is_missing_is_found(tmp_path):
    tests = "`tests/test_docs_links.py::test_nothing` and `tests/test_docs_links.py::members_of`"
    text = f"{tests}, [a](b.md), [c](d.md#e), `f[0](g)`"
    assert missing_tests(text) == ["test_docs_links.py::test_nothing"]
    (tmp_path / "page.md").write_text(text)
    (tmp_path / "b.md").touch()
    assert missing_files(tmp_path / "page.md") == ["d.md"]


def test_the_comparison_names_every_test_of_peers():
    comparison, peers = (ROOT / "docs" / "comparison.md").read_text(), members_of(ROOT / "tests" / "test_peers.py")
    assert [name for name in sorted(peers) if name.startswith("test_") and f"::{name}`" not in comparison] == []
