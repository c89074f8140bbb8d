"""What is done to docstrings and signatures before they are shown as the API."""

import inspect
import re

SECTION = re.compile(r"^(Attributes|Args):\n((?: +.*\n|\n(?= ))*)", re.MULTILINE)
FIELD = re.compile(r"^  ([*\w]+):.*\n(?:   +.*\n|\n(?=   ))*", re.MULTILINE)


def fields(section: re.Match[str] | None) -> dict[str, str]:
    """The lines on each field of a section, by its name."""
    return {field[1]: field[0] for field in FIELD.finditer(section[2])} if section else {}


def with_inherited_fields(cls: type, document: str) -> str:
    """The docstring of a class, with the fields that it has from private bases of the package, below its own."""
    own = SECTION.search(document + "\n")
    described, heading = fields(own), own[1] if own else ""
    for base in cls.__mro__[1:]:
        if base.__module__.startswith("jaxnorm") and base.__name__.startswith("_"):
            section = SECTION.search(inspect.cleandoc(base.__doc__ or "") + "\n")
            for name, lines in fields(section).items():
                described.setdefault(name, lines)
            heading = heading or (section[1] if section else "")
    if described == fields(own):
        return document
    block = f"{heading}:\n{''.join(described.values())}\n"
    if own:
        return document[: own.start()] + block + document[own.end() :].lstrip("\n")
    before, example, after = document.partition("Example:\n")
    return f"{before.rstrip()}\n\n{block}{example}{after}"


def shortened(signature: str) -> str:
    """A signature without the addresses and modules of defaults, and without what Flax passes for itself."""
    signature = re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)(?: at \w+)?'?>", r"\1", signature)
    return re.sub(r", parent=<[^>]*>", "", signature)
