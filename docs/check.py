"""Check a built site: links, what pages load, what does not fit a small screen; and that no page hides code.

python docs/check.py docs/_build/html

Every link inside the site leads somewhere, and nothing is loaded from elsewhere. No table shows as raw text, and
nothing makes a page scroll sideways: tables are in boxes that scroll by themselves, and words that cannot be broken are
short.
"""

import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

BREAKABLE = {"code", "pre", "script", "style", "svg", "math", "textarea"}
BOXES = {"pst-scrollable-table-container", "cell_output"}
"""Classes of what scrolls by itself."""
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
LONGEST_WORD = 40
"""Letters that fit a screen 400 pixels wide. Code may be longer: the style sheet breaks or scrolls it."""
HIDDEN = re.compile(r"<!-{2,3}\s*(?:invisible-code-block|skip)")
LOADS = {"audio", "embed", "iframe", "img", "input", "object", "script", "source", "track", "video"}
LOADED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "manifest", "preconnect"}
IN_CSS = re.compile(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"](?:https?:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """The anchors of a page, where its links lead, what it loads, and its visible text."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.loaded, self.loose_tables = set(), [], [], 0
        self.text: list[str] = []
        self.open: list[tuple[str, set[str]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Sort what a tag refers to."""
        attributes = {name: value or "" for name, value in attrs}
        classes = set(attributes.get("class", "").split())
        if tag == "table" and not any(BOXES & inside for _, inside in self.open):
            self.loose_tables += 1
        if tag not in VOID:
            self.open.append((tag, classes))
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        loads = tag in LOADS or (tag == "link" and LOADED_LINKS & set(attributes.get("rel", "").split()))
        for name in ("src", "href", "data", "srcset", "poster"):
            if name in attributes:
                (self.loaded if loads else self.links).append(attributes[name])
        if IN_CSS.search(attributes.get("style", "")):
            self.loaded.append("https:" + attributes["style"])

    def handle_endtag(self, tag):
        """Leave an element, and those within it that were never closed."""
        names = [name for name, _ in self.open]
        if tag in names:
            del self.open[len(names) - 1 - names[::-1].index(tag) :]

    def handle_data(self, data):
        """Keep what is read as prose; find what a style sheet within the page loads."""
        if not any(tag in BREAKABLE or "math" in classes for tag, classes in self.open):
            self.text.append(data)
        if self.get_starttag_text() and self.lasttag == "style" and IN_CSS.search(data):
            self.loaded.append(f"https: in style {data.strip()[:80]}")


def hidden(sources: Path) -> Iterator[str]:
    """Pages with code that readers do not see, so that the code they do see need not run."""
    for path in sorted(sources.rglob("*.md")):
        where = str(path.relative_to(sources))
        if not where.startswith(("_build", "notebooks")) and HIDDEN.search(path.read_text()):
            yield f"{where}: code that readers do not see"


def unreadable(page: Page) -> Iterator[str]:
    """What shows as raw text, or makes a page scroll sideways."""
    if page.loose_tables:
        yield f"{page.loose_tables} tables outside a box that scrolls"
    for text in page.text:
        for line in map(str.strip, text.splitlines()):
            if line.startswith("|") and line.endswith("|") and line.count("|") > 2:
                yield f"a table as raw text: {line[:60]}"
            yield from (
                f"a word too long: {word[:60]}" for word in re.split(r"[\s/-]", line) if len(word) > LONGEST_WORD
            )


def faults(site: Path) -> Iterator[str]:
    """What is wrong with ``site``, a line each."""
    site = site.resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.relative_to(site).parts}
    if not pages:
        yield f"{site}: no pages"
    for path, page in pages.items():
        where = path.relative_to(site)
        if where.parts[0] != "_modules":
            yield from (f"{where}: {found}" for found in unreadable(page))
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    yield f"{where}: loads {target}"
                continue
            file = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if file not in pages and not file.exists():
                yield f"{where}: dead link {target}"
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                yield f"{where}: dead anchor {target}"
    for path in sorted(site.rglob("*.css")):
        if IN_CSS.search(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: loads from elsewhere"


if __name__ == "__main__":
    found = [*hidden(Path(__file__).parent), *faults(Path(sys.argv[1]))]
    print(*found, f"{len(found)} faults in {sys.argv[1]}", sep="\n")
    sys.exit(bool(found))
