"""Check a built site: every link inside of it leads somewhere, and no page loads anything from elsewhere.

python docs/check.py docs/_build/html
"""

import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"audio", "embed", "iframe", "img", "input", "object", "script", "source", "track", "video"}
LOADED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "manifest", "preconnect"}
IN_CSS = re.compile(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"](?:https?:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Sort what a tag refers to."""
        attributes = {name: value or "" for name, value in attrs}
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        loads = tag in LOADS or (tag == "link" and LOADED_LINKS & set(attributes.get("rel", "").split()))
        for name in ("src", "href", "data", "srcset", "poster"):
            if name in attributes:
                (self.loaded if loads else self.links).append(attributes[name])
        if IN_CSS.search(attributes.get("style", "")):
            self.loaded.append("https:" + attributes["style"])

    def handle_data(self, data):
        """Find what a style sheet within the page loads."""
        if self.get_starttag_text() and self.lasttag == "style" and IN_CSS.search(data):
            self.loaded.append(f"https: in style {data.strip()[:80]}")


def faults(site: Path) -> Iterator[str]:
    """What is wrong with ``site``, a line each."""
    site = site.resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.relative_to(site).parts}
    for path, page in pages.items():
        where = path.relative_to(site)
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
    found = list(faults(Path(sys.argv[1])))
    print(*found, f"{len(found)} faults in {sys.argv[1]}", sep="\n")
    sys.exit(bool(found))
