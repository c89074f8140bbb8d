"""The package as a whole: what importing it loads, what it exports, and what the files around it say of it."""

import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typed
import yaml

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
import jaxnorm.surgery

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REPOSITORY, SITE = "https://github.com/jaxnorm/jaxnorm/", "https://jaxnorm.readthedocs.io/en/latest/"
DOCSTRINGS = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
docstrings = importlib.util.module_from_spec(DOCSTRINGS)
DOCSTRINGS.loader.exec_module(docstrings)
RAW = "https://raw.githubusercontent.com/jaxnorm/jaxnorm/main/"


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_loads_neither_flax_nor_optax():
    modules = loaded_by("import jaxnorm")
    assert "jaxnorm" in modules
    assert not modules & {"flax", "optax", "chex", "sklearn", "rich", "torch"}


MODULES = (jaxnorm, jaxnorm.linen, jaxnorm.nnx, jaxnorm.surgery)
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if name != "CONVENTIONS"  # a dictionary, which has no docstring
}


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_exported_is_documented_with_an_example(name):
    """A function says what it takes, gives and raises; what else there is has an example, or names what has one."""
    value, document = PUBLIC[name], inspect.getdoc(PUBLIC[name])
    assert document
    if inspect.isfunction(value):
        in_place = inspect.signature(value).return_annotation in (None, "None")
        gives = [] if in_place else ["Yields:" if hasattr(value, "__wrapped__") else "Returns:"]
        raises = [] if name == "jaxnorm.save_statistics" else ["Raises:"]
        for part in ("Args:", *gives, *raises, "Example:", ">>>"):
            assert part in document, part
    elif ">>>" not in document:
        shown = [PUBLIC.get(f"{name.rpartition('.')[0]}.{other}") for other in re.findall(r"`(\w+)`", document)]
        assert any(">>>" in inspect.getdoc(other) for other in shown if other is not None)


LAYERS = {name: value for name, value in PUBLIC.items() if name.startswith(("jaxnorm.linen", "jaxnorm.nnx"))}


CLASSES = [name for name, value in LAYERS.items() if inspect.isclass(value)]


@pytest.mark.parametrize("name", CLASSES)
def test_every_layer_says_how_it_is_called(name):
    document = inspect.getdoc(LAYERS[name].__call__)
    if "Standardized" not in name:  # those are called as Flax says
        for part in ("Args:", "Returns:"):
            assert part in document, part


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_of_a_layer_has_a_name_and_a_description(name):
    """So that editors show it: below its field, or in the docstring."""
    cls = LAYERS[name]
    of_flax = (
        "parent",
        "name",
        *(inspect.signature(cls.__mro__[2].__init__).parameters if "Standardized" in name else []),
    )
    signature = inspect.signature(cls)
    described, document = docstrings.arguments(cls), inspect.getdoc(cls)
    for argument, parameter in signature.parameters.items():
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), argument
        if argument not in of_flax:
            assert argument in described or re.search(rf"^ *[\w, ]*\b{argument}\b[\w, ]*: \S", document, re.M), argument


@pytest.mark.parametrize("module", ["jaxnorm.linen", "jaxnorm.nnx"])
def test_modules_of_layers_offer_their_layers_and_nothing_else(module):
    offered = {name for name in dir(importlib.import_module(module)) if not name.startswith("_")}
    assert offered == set(importlib.import_module(module).__all__)


def test_layers_run_as_they_are_typed():
    """What `make lint` checks with pyright, strictly."""
    assert all(y.shape[:1] == (4,) for y in typed.outputs())


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def figures():
    """What the README says was measured, from what the commands that it names have stored."""
    accuracy, speed = results("accuracy"), results("speed-cpu")["summary"]
    at = accuracy["kappa"].index(10_000)
    errors = {name.split(" ")[0] + name.partition(",")[2]: e[at] for name, e in accuracy["largest error"].items()}
    for name, words in (
        ("jaxnorm", "is {} in jaxnorm"),
        ("flax use_fast_variance=False", "{} in Flax with `use_fast_variance=False`"),
        ("torch", "{} in PyTorch"),
        ("flax", "and {} in Flax by default"),
        ("jaxnorm, at inference", "At inference jaxnorm's error is {}"),
    ):
        yield words.format(f"{errors[name]:.1e}")

    rows = {(r["case"], r["contender"]): r for r in results("compiled-h200")["rows"] if "case" in r}
    resnet50, leaky = (f"ResNet-50, {act}, batch 128" for act in ("relu", "leaky_relu"))
    held = {name: rows[leaky, name]["temporaries"] for name in ("invertible", "flax")}
    yield f"{1 - held['invertible'] / held['flax']:.0%} less memory for ResNet-50"
    yield f"{held['invertible']:,.0f} MB of temporaries instead of {held['flax']:,.0f} MB"
    yield f"moves {rows[resnet50, 'drop-in']['bytes / Flax']} of the bytes"

    def more(case):
        return rows[case, "drop-in"]["temporaries"] / rows[case, "flax"]["temporaries"] - 1

    yield f"and holds {-100 * more(resnet50):.1f}% less"
    yield f"ResNet-18 holds {100 * more('ResNet-18, relu'):.1f}% more"

    yield f"runs {speed['step']['flax.linen']['geometric mean']:.2f}x as fast as flax.linen's"
    yield f"batch norm in float32: {speed['step, batch, float32']['flax.linen']['geometric mean']:.2f}x"


def test_the_figures_of_the_readme_are_those_stored():
    text = " ".join(README.split())
    for figure in figures():
        assert figure in text


def taken(layer):
    """What a layer takes, of the columns of the table in the README, and whether its activation is built in."""
    names = {*inspect.signature(layer).parameters, *inspect.signature(layer.__call__).parameters}
    names -= {*layer._lacks[0]}
    columns = [name in names for name in ("mask", "axis_name", "activation", "invertible", "trainable", "momentum")]
    return columns, "activation" in layer._lacks[0]


def test_the_table_of_layers_in_the_readme_is_what_they_take():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("| `")]
    shown = {name: cells for names, *cells in rows for name in re.findall(r"\w+", names)}
    of_layers = {name: cls for name, cls in vars(jaxnorm.linen).items() if hasattr(cls, "_lacks")}
    assert shown.keys() == of_layers.keys()
    for name, cells in shown.items():
        columns, built_in = taken(of_layers[name])
        assert [cell == "✓" for cell in cells] == columns, name
        assert (cells[2] == "built in") == built_in, name


def test_the_links_of_the_readme_work_on_an_index_page():
    """They are absolute; those into the repository and the documentation are of files that are there."""
    links = re.findall(r"\]\(([^)]*)\)", README)
    assert links
    for link in links:
        assert link.startswith((REPOSITORY, SITE, RAW)), link
        path = re.sub(f"^{REPOSITORY}(blob|tree)/main/|^{RAW}", "", link)
        path = re.sub(rf"^{SITE}(.*)\.html(#.*)?$", r"docs/\1.md", path)
        assert (ROOT / path).exists(), link


def test_the_citation_is_of_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == jaxnorm.__version__
