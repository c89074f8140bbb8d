"""The package as a whole: what importing it loads, what it exports, and what the files around it say of it."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

import jaxnorm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REPOSITORY, SITE = "https://github.com/jaxnorm/jaxnorm/", "https://jaxnorm.readthedocs.io/en/latest/"
RAW = "https://raw.githubusercontent.com/jaxnorm/jaxnorm/main/"


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_loads_neither_flax_nor_optax():
    modules = loaded_by("import jaxnorm")
    assert "jaxnorm" in modules
    assert not modules & {"flax", "optax", "chex", "sklearn", "rich", "torch"}


def test_everything_exported_is_documented_with_an_example():
    for name in jaxnorm.__all__:
        document = getattr(jaxnorm, name).__doc__
        assert document, name
        if inspect.isfunction(getattr(jaxnorm, name)):
            raises = [] if name == "save_statistics" else ["Raises:"]
            for part in ("Args:", "Returns:", *raises, "Example:", ">>>"):
                assert part in document, (name, part)


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def figures():
    """What the README says was measured, from what the commands that it names have stored."""
    accuracy, speed = results("accuracy"), results("speed-cpu")["summary"]
    errors = [values[accuracy["kappa"].index(10_000)] for values in accuracy["largest error"].values()]
    ours, flax, torch = (f"{error:.1e}" for error in errors)
    yield f"is {ours} here, {torch} in PyTorch and {flax} in Flax"

    rows = {(r["case"], r["contender"]): r for r in results("compiled-h200")["rows"] if "case" in r}
    share = {
        (act, contender): rows[f"ResNet-50, {act}, batch 128", contender]["bytes / Flax"]
        for act in ("relu", "silu")
        for contender in ("drop-in", "inside")
    }
    stack = "8 x (conv, norm, act), unrolled, leaky_relu"
    kept, flax = (rows[stack, contender]["temporaries"] for contender in ("invertible", "flax"))
    yield f"a training step of ResNet-50 moves {share['relu', 'inside']} of the bytes"
    yield f"keep {kept:.2f} activations a layer instead of {flax:.2f}"
    yield f"moves {share['relu', 'drop-in']}, and {share['silu', 'drop-in']} with SiLU"

    yield f"is {speed['step']['flax.linen']['geometric mean']:.2f} times as fast as flax.linen's"
    yield f"batch norm in float32 is not, {speed['step, batch, float32']['flax.linen']['geometric mean']:.2f}"


def test_the_figures_of_the_readme_are_those_stored():
    text = " ".join(README.split())
    for figure in figures():
        assert figure in text


def test_the_links_of_the_readme_work_on_an_index_page():
    """They are absolute; those into the repository and the documentation are of files that are there."""
    links = re.findall(r"\]\(([^)]*)\)", README)
    assert links
    for link in links:
        assert link.startswith((REPOSITORY, SITE, RAW)), link
        path = re.sub(f"^{REPOSITORY}(blob|tree)/main/|^{RAW}", "", link)
        path = re.sub(rf"^{SITE}(.*)\.html$", r"docs/\1.md", path)
        assert (ROOT / path).exists(), link


def test_the_citation_is_of_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == jaxnorm.__version__
