"""What is done to docstrings and signatures before they are shown as the API."""

import ast
import dataclasses
import importlib
import inspect
import re
from functools import cache
from itertools import pairwise


@cache
def below_fields(module: str) -> dict[str, dict[str, str]]:
    """The strings below the fields of the classes of a module, which Python itself throws away."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    return {
        c.name: {
            field.target.id: inspect.cleandoc(str(doc.value.value))
            for field, doc in pairwise(c.body)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
        }
        for c in tree.body
        if isinstance(c, ast.ClassDef)
    }


def arguments(cls: type) -> dict[str, str]:
    """What describes each argument of a layer: below its field, in the class or in a base; the help of a setting."""
    docs: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if c.__module__.startswith("jaxnorm")]):
        docs |= below_fields(base.__module__)[base.__name__]
    if dataclasses.is_dataclass(cls):  # the settings of the training program
        docs |= {field.name: field.metadata["help"] for field in dataclasses.fields(cls) if "help" in field.metadata}
    return {name: docs[name] for name in inspect.signature(cls.__init__).parameters if name in docs}


def with_arguments(cls: type, document: str) -> str:
    """The docstring of a layer, with all its arguments before what it raises and the example."""
    described = arguments(cls)
    if not described or "Args:\n" in document:
        return document
    texts = {name: re.sub(r"(?<!\S)--\w[\w-]*", r"``\g<0>``", text) for name, text in described.items()}
    lines = [f"  {name}: {text}".replace("\n", "\n    ") for name, text in texts.items()]
    before, *after = re.split(r"^(?=Raises:|Example:)", document, maxsplit=1, flags=re.MULTILINE)
    return f"{before.rstrip()}\n\n" + "\n".join(["Args:", *lines]) + f"\n\n{''.join(after)}"


def shortened(signature: str) -> str:
    """A signature without the addresses and modules of defaults, and without what Flax passes for itself."""
    signature = re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)(?: at \w+)?'?>", r"\1", signature)
    return re.sub(r", parent=<[^>]*>", "", signature)
