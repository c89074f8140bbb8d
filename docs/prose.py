"""Find the words that the documentation does without, and sentences that nobody can read aloud.

python docs/prose.py            # README, pages, notebooks and docstrings
python docs/prose.py FILES      # these

`prose.txt` has the words, each with what to write instead.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PUBLIC = re.compile(r"jaxnorm/(\w+/)?[a-z]\w*\.py|jaxnorm/(linen|nnx|surgery|training)/_\w+\.py")
LONGEST = 45
"""Words of a sentence."""
MARKDOWN = MarkdownIt("commonmark").enable("table")
MATH = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$", re.DOTALL)
CODE = re.compile(r"``[^`]*``|`[^`]*`|:\w+:`[^`]*`")


def rules() -> list[tuple[re.Pattern[str], str]]:
    """The patterns of `prose.txt` with their advice."""
    lines = [line for line in (DOCS / "prose.txt").read_text().splitlines() if line and not line.startswith("#")]
    return [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in (li.split(" -> ", 1) for li in lines)]


def paragraphs(markdown: str, start: int = 1) -> Iterator[tuple[int, str]]:
    """Paragraphs, headings and cells without their code: where each begins, and what it says."""
    for token in MARKDOWN.parse(markdown):
        if token.type == "inline" and token.children:
            words = ("x" if t.type == "code_inline" else t.content or " " for t in token.children)
            yield start + (token.map or [0])[0], "".join(words)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Paragraphs and arguments in the docstrings of a module, without examples and references."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            for part in re.split(r"\n\s*\n|\n(?= *[*\w, ]+: )", text.partition("References:")[0]):
                if ">>>" not in part and not part.lstrip().startswith(".. math"):
                    yield node.body[0].lineno, CODE.sub("x", part)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The prose of a file: where each part begins, and what it says."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from docstrings(source)
    elif path.suffix == ".ipynb":
        for cell in json.loads(source)["cells"]:
            if cell["cell_type"] == "markdown":
                yield from paragraphs("".join(cell["source"]))
    else:
        yield from paragraphs(source)


def found(path: Path) -> Iterator[str]:
    """What is wrong with the prose of a file, a line each."""
    for line, text in texts(path):
        prose, where = " ".join(MATH.sub("x", text).split()), f"{path.relative_to(ROOT)}:{line}"
        for pattern, advice in RULES:
            yield from (f"{where}: {hit[0]!r}: {advice}" for hit in pattern.finditer(prose))
        for sentence in re.split(r"(?<=[.:;?!])\s", prose):
            words = re.findall(r"[\w'-]+", sentence)
            if len(words) > LONGEST:
                yield f"{where}: {len(words)} words in a sentence: {' '.join(words[:8])} ..."


def chosen() -> Iterator[Path]:
    """README, pages, notebooks and the modules with public docstrings."""
    pages = [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    for path in sorted([*pages, *(ROOT / "jaxnorm").rglob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        made = name.startswith(("docs/_build/", "docs/notebooks/")) or name == "docs/changelog.md"
        if path.suffix == ".py" and not PUBLIC.fullmatch(name):
            continue
        if not made:
            yield path


RULES = rules()

if __name__ == "__main__":
    paths = [Path(name).resolve() for name in sys.argv[1:]] or list(chosen())
    faults = [fault for path in paths for fault in found(path)]
    print(*faults, f"{len(faults)} faults in the prose of {len(paths)} files", sep="\n")
    sys.exit(bool(faults))
