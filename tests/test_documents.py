"""The documents: their code runs, what they name is there, and what is public has its place in them."""

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import json
import re
import statistics
import warnings
from pathlib import Path
from unittest import SkipTest

import jax
import jax.numpy as jnp
import pytest
from checks import quick_first
from flax import nnx
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

import jaxnorm.linen
import jaxnorm.nnx
import jaxnorm.surgery
import jaxnorm.training

pytestmark = pytest.mark.any_version

ROOT = Path(__file__).parent.parent
DOCS, RESULTS, NOTEBOOKS = ROOT / "docs", ROOT / "benchmarks" / "results", ROOT / "notebooks"
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if p.relative_to(DOCS).parts[0] not in ("_build", "notebooks")]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
PARSERS = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path="/", pattern="*.md")
TAB = re.compile(r"^(:{3,})\{tab-item\} (.+?)$.*?^\1$", re.MULTILINE | re.DOTALL)
MODULES = ("jaxnorm", "jaxnorm.linen", "jaxnorm.nnx", "jaxnorm.surgery", "jaxnorm.training")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def load(name):
    """A module of ``docs/``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, docstrings, figures, prose, tables = map(load, ("check", "docstrings", "figures", "prose", "tables"))


def readings():
    """Each document, and each page with tabs once for every tab that a reader can choose."""
    for path in DOCUMENTS:
        names = list(dict.fromkeys(name for _, name in TAB.findall(path.read_text())))
        yield from ((path, name) for name in names or [None])


def as_read(text, tab):
    """The text with the one tab that is open, its lines where they were."""
    return TAB.sub(lambda found: found[0] if found[2] == tab else "\n" * found[0].count("\n"), text)


# Of the pages `make test` runs two: one takes up to three seconds.
@pytest.mark.parametrize(
    "reading",
    quick_first(2, list(readings())),
    ids=lambda reading: "-".join(filter(None, (str(reading[0].relative_to(ROOT)), reading[1]))),
)
def test_code_runs(reading, tmp_path):
    """What a reader sees, alone and in order, in one namespace."""
    path, tab = reading
    page = tmp_path / path.name
    page.write_text(as_read(path.read_text(), tab))
    document = PARSERS.parse(page)
    for example in document.examples():
        with contextlib.suppress(SkipTest), jax.numpy_rank_promotion("allow"):
            example.evaluate()


def test_no_page_hides_code(tmp_path):
    assert list(check.hidden(DOCS)) == []
    assert not check.HIDDEN.search((ROOT / "README.md").read_text())
    (tmp_path / "page.md").write_text("<!--- invisible-code-block: python\nx = 1\n--->")
    assert list(check.hidden(tmp_path)) == ["page.md: code that readers do not see"]


@each_document
def test_no_page_needs_several_devices(path):
    """Most readers have one; these tests have eight."""
    assert not re.search(r"make_mesh\(\(\d|jax\.devices\(\)\[", path.read_text())


def test_a_reader_sees_one_tab():
    text = "a\n::::{tab-item} One\n:::{x}\n:::\n::::\nb\n::::{tab-item} Two\n2\n::::\nc"
    assert as_read(text, "Two") == "a\n\n\n\n\nb\n::::{tab-item} Two\n2\n::::\nc"


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
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").rglob("*.md")))
    entries = re.findall(
        rf"^ *\.\. (?:auto(?:function|class)|py:data):: {re.escape(name)}\.(\w+)$", pages, re.MULTILINE
    )
    assert sorted(entries) == sorted(public(importlib.import_module(name)))


@pytest.mark.parametrize("name", sorted({*jaxnorm.training.__all__} - {"MODELS", "NORMS"}))
def test_every_name_of_the_training_program_has_an_example(name):
    value = getattr(jaxnorm.training, name)
    document = inspect.getdoc(value)
    assert ">>>" in document
    if inspect.isfunction(value):
        assert "Args:" in document
        assert "Returns:" in document


def test_the_constants_of_the_training_program_have_an_example():
    assert doctest.testfile(str(DOCS / "api/training/networks.md"), module_relative=False) == (0, 5)


def test_no_description_of_an_argument_sends_readers_elsewhere():
    """An argument is described where it is, not as that of another function."""
    for path in sorted((ROOT / "jaxnorm").glob("[!_t]*/*.py")):
        assert not re.findall(r"^ +[\w, ]+: as (?:in|of|for) `.*", path.read_text(), re.MULTILINE), path


def test_arguments_are_shown_before_the_example():
    shown = docstrings.with_arguments(jaxnorm.nnx.GhostBatchNorm, "It is.\n\nExample:\n  None\n")
    assert shown.startswith("It is.\n\nArgs:\n  num_features: How many features")
    assert shown.endswith(
        "  virtual_batch_size: How many consecutive examples are normalized together.\n\nExample:\n  None\n"
    )
    assert docstrings.with_arguments(jaxnorm.nnx.AdaLN, "It is.") == "It is."
    assert "  batch_size: examples per step, over all" in docstrings.with_arguments(jaxnorm.training.Settings, "It is.")


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
    rows = "| a | it hurts | x: -2 [-3, -1] points; y: -1 [-2, +0] points | 2 | 1 points | not shown |\n"
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
    assert "- {bdg-success}`for` x: +0.9 [+0.8, +1.0]\n" in helps
    assert "{bdg-muted}`not shown` in notebook [02](notebooks/02_what.ipynb): 2 comparisons, looked for 1 po" in hurts
    assert "- {bdg-danger}`against` x: -2 [-3, -1] points\n- {bdg-muted}`undecided` y: -1 [-2, +0] points\n" in hurts
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


def networks(chip):
    """Rows by case and contender, Flax's own left out."""
    rows = [row for row in results(f"compiled-{chip}")["rows"] if "case" in row]
    return {(r["case"], r["contender"]): r for r in rows if not r["contender"].startswith("flax")}


def pages_say(*figures):
    """Both pages that name figures of networks, each of which has one or more of these in its text."""
    texts = [" ".join((DOCS / page).read_text().split()) for page in ("benchmarks.md", "comparison.md")]
    for figure in figures:
        assert any(figure in text for text in texts), figure


def test_what_is_said_of_networks_on_an_h200_is_the_results():
    found = networks("h200")
    assert max(row["bytes / Flax"] for row in found.values()) <= 1
    assert max(row["kernels more a norm"] for (_, c), row in found.items() if c == "inside") < 3
    assert max(row["kernels more a norm"] for (_, c), row in found.items() if c == "invertible") < 7.5
    more = [
        row["temporaries more"] for (case, c), row in found.items() if c == "inside, policy" and "ResNet" not in case
    ]
    assert 0.12 < max(more) <= 0.25
    resnet18 = {c: found["ResNet-18, relu", c]["temporaries"] for c in ("drop-in", "inside")}
    pages_say(
        f"swapped moves {found['ResNet-50, relu, batch 128', 'drop-in']['bytes / Flax']} of them",
        f"with SiLU {found['ResNet-50, silu, batch 128', 'drop-in']['bytes / Flax']}.",
        f"holds {found['ResNet-50, leaky_relu, batch 128', 'invertible']['temporaries']:.0f} MB of temporaries",
        f"ResNet-18 holds {resnet18['drop-in']:.0f} MB, with the activation inside {resnet18['inside']:.0f} MB",
    )


def test_what_is_said_of_networks_on_a_tpu_is_the_results():
    found = networks("tpu-v5e")
    counted = {key: row for key, row in found.items() if "copies more a norm" in row}
    more = {key: row["accessed / Flax"] for key, row in counted.items() if row["accessed / Flax"] > 1}
    assert more == {("4 x residual block, relu", "inside"): 1.012}
    scans = [
        row["bytes / Flax"]
        for (case, c), row in found.items()
        if "scan" in case and not c.endswith(("checkpoint", "policy"))
    ]

    def most(what, invertible):
        rows = [(c == "invertible", row) for (_, c), row in counted.items() if not c.endswith("policy")]
        return max(what(row) for inverted, row in rows if inverted == invertible)

    def copies(row):
        return row["copies more a norm"]

    def percent(case, contender):
        return f"{abs(100 * found[case, contender]['bytes / Flax'] - 100):.1f}%"

    policies = [row for (_, c), row in counted.items() if c.endswith("policy")]
    computing = max(row["kernels more a norm"] - copies(row) for row in policies)
    pages_say(
        f"{min(scans):.2f} to {max(scans):.2f} under `lax.scan`",
        f"{percent('ResNet-18, relu', 'drop-in')} more in ResNet-18",
        f"{percent('4 x residual block, relu', 'drop-in')} more in residual blocks with ReLU, "
        f"{percent('4 x residual block, relu', 'inside')} with the activation inside",
        f"{percent('4 x residual block, silu', 'drop-in')} less in those with SiLU, "
        f"{percent('4 x residual block, silu', 'inside')} more with the activation inside",
        f"{percent('ResNet-50, relu, batch 256', 'drop-in')} more in ResNet-50 at batch 256",
        f"up to {most(copies, False):.1f} small copies more, in the invertible mode {most(copies, True):.1f}",
        f"up to {most(lambda row: row['kernels more a norm'] - copies(row), True):.1f} computing kernels more, "
        f"{computing:.0f} with",
    )


def test_what_is_said_of_memory_is_the_results():
    found = {(r["case"], r["contender"]): r["temporaries"] for r in results("compiled-h200")["rows"] if "case" in r}
    rows = [row for row in rows_of("howto/less_memory.md", "network")]
    stacks = [
        f"8 x ({order}), {kind}" for order in ("conv, norm, act", "norm, act, conv") for kind in ("unrolled", "scan")
    ]
    assert len(rows) == len(stacks)
    for name, *figures in rows:
        order, _, kind = name.replace("`lax.scan`", "scan").partition("; ")
        case = f"8 x ({order}), {kind}"
        expected = [found[f"{case}, relu", c] for c in ("flax", "drop-in", "inside")]
        assert figures == [f"{n:.2f}" for n in (*expected, found[f"{case}, leaky_relu", "invertible"])], name
    for name, *figures in rows_of("howto/less_memory.md", "network | Flax, checkpoint"):
        case = f"8 x (norm, act, conv), {name.replace('`lax.scan`', 'scan').partition('; ')[2]}, relu"
        of = [found[case, c] for c in ("flax, checkpoint", "inside, checkpoint", "inside, policy")]
        assert figures == [f"{n:.2f}" for n in of], name


def test_what_is_said_of_inference_is_the_results():
    found = {(r["network"], r["dtype"], r["library"]): r for r in results("folded-h200")["rows"]}
    for (network, dtype, library), row in found.items():
        assert row["plain"]["kernels"] == found[network, dtype, "flax"]["plain"]["kernels"], (network, dtype, library)
    row = found["ResNet-50", "float32", "jaxnorm"]
    ours, flax = (found["ResNet-18", "bfloat16", library] for library in ("jaxnorm", "flax"))
    pages_say(
        f"{row['plain']['kernels']} for ResNet-50 in float32, folded {row['folded']['kernels']}.",
        f"moves {ours['plain']['MB']} MB, with Flax's norms {flax['plain']['MB']} MB; "
        f"folded {ours['folded']['MB']} and {flax['folded']['MB']} MB.",
    )


def test_units_in_one_column_are_one_unit():
    text, _ = tables.results(ROOT, "compiled-h200.json")
    headers = [line for line in text.splitlines() if line.startswith("| case")]
    assert len(headers) == 2
    assert "temporaries, MB" in headers[0] + headers[1]
    for table in text.split("\n\n"):
        cases = re.findall(r"^\| (ResNet)?", table, re.MULTILINE)[2:]
        assert len({*cases}) <= 1, table[:80]


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


# Prose and figures ---------------------------------------------------------------------------------------------------


def test_prose_that_is_found(tmp_path, monkeypatch):
    """In paragraphs, cells and docstrings, over the ends of lines; not in code, formulas and examples."""
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    page, module = tmp_path / "page.md", tmp_path / "module.py"
    page.write_text("# a\n\nIt is\nbesides.\n\n`besides` $besides$\n\n```python\nbesides\n```\n\n| besides |\n|---|\n")
    assert [fault.partition(": ")[0] for fault in prose.found(page)] == ["page.md:3", "page.md:12"]
    module.write_text('def f():\n    """What\n    is said of it.\n\n    Example:\n      >>> besides\n    """\n')
    assert [fault.partition(": ")[0] for fault in prose.found(module)] == ["module.py:2"]
    page.write_text("word " * prose.LONGEST + ". " + "word " * (prose.LONGEST + 1))
    assert [f"{prose.LONGEST + 1} words" in fault for fault in prose.found(page)] == [True]


@pytest.mark.parametrize("path", list(prose.chosen()), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose(path):
    assert list(prose.found(path)) == []


def test_lines_of_pages_fit():
    for path in prose.chosen():
        if path.suffix == ".md":
            lines = [line for line in path.read_text().splitlines() if not line.startswith(("|", "!["))]
            assert [line for line in lines if len(line) > 120 and "](http" not in line] == [], path.name


def test_sides_of_effects_are_those_of_the_verdicts():
    """The page marks each effect; the marks imply the verdict that the notebook computed."""
    rows = 0
    for path in NOTEBOOKS.glob("*.ipynb"):
        for verdict in tables.decided(json.loads(path.read_text())):
            sides = {tables.side(effect, verdict.smallest) for effect in verdict.effects.split("; ")}
            implied = "holds" if sides == {"for"} else "holds under conditions" if "for" in sides else "not shown"
            assert verdict.verdict == ("contradicted" if sides == {"against"} else implied), verdict
            rows += 1
    assert rows > 20


def test_verdicts_are_the_same_with_other_seeds():
    """Of every claim of every notebook, in the table that `benchmarks/verdicts_again.py` printed."""
    lines = (RESULTS / "verdicts-again.md").read_text().splitlines()[2:]
    again = {(path, claim): (old, new) for path, claim, old, new, _ in (li.strip("| ").split(" | ", 4) for li in lines)}
    stored = {
        (path.stem, v.claim): (v.verdict, v.verdict)
        for path in NOTEBOOKS.glob("*.ipynb")
        for v in tables.decided(json.loads(path.read_text()))
    }
    assert again == stored


def test_accuracies_of_the_choice_are_those_measured():
    """Each percentage of the page is in the tables that its benchmark wrote."""
    measured = set(re.findall(r"([\d.]+) ±", (RESULTS / "remedies.md").read_text()))
    said = set(re.findall(r"(\d+\.\d)%", (DOCS / "choosing.md").read_text()))
    assert len(said) > 20
    assert said <= measured


@pytest.mark.slow
def test_figures_are_drawn_from_the_results(tmp_path):
    figures.draw(tmp_path)
    stored = {path.name: path.read_bytes() for path in (DOCS / "figures").iterdir()}
    assert stored == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


# Messages ------------------------------------------------------------------------------------------------------------


def applied(x, variables=None, **settings):
    """What a layer for eight features says to ``x``."""
    made = jaxnorm.linen.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((2, 8)))
    return jaxnorm.linen.BatchNorm(**settings).apply(made if variables is None else variables, x)


def in_two(x):
    return jaxnorm.batch_norm(x, axis_name="r", axis_index_groups=[[0, 1]])


def frozen_flax():
    module = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    jaxnorm.surgery.freeze(module, affine=True)


def of_torch(**settings):
    state = {name: jnp.ones(8) for name in ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")}
    jaxnorm.surgery.convert(state, "torch", "jaxnorm.linen", prefix="bn" if settings else "layer2", **settings)


IMAGES = jnp.zeros((8, 6, 6, 16))
PARAMETERS = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
QUOTED = {
    "one value": lambda: jaxnorm.layer_norm(jnp.ones((8, 1))),
    "one value, layer": lambda: applied(jnp.ones((1, 8)), use_running_average=False, update_running_average=False),
    "groups": lambda: jaxnorm.group_norm(IMAGES, num_groups=5),
    "axis name": lambda: jaxnorm.batch_norm(IMAGES, axis_name="data"),
    "groups of replicas": lambda: jax.vmap(in_two, axis_name="r")(IMAGES.reshape(4, 2, 6, 6, 16)),
    "mask": lambda: jaxnorm.batch_norm(IMAGES, mask=jnp.ones(8, bool)),
    "mask of steps": lambda: jaxnorm.batch_norm(jnp.zeros((3, 5, 8)), mask=jnp.ones((3, 5), bool)),
    "mask of what": lambda: jaxnorm.batch_norm(IMAGES[..., :8], mask=jnp.ones(8, bool)),
    "integers": lambda: jaxnorm.batch_norm(jnp.ones((2, 2), int)),
    "invertible": lambda: jaxnorm.batch_norm(IMAGES, activation="relu", invertible=True),
    "scale": lambda: jaxnorm.batch_norm(IMAGES.astype(jnp.bfloat16), jnp.zeros(16), invertible=True),
    "features": lambda: applied(jnp.ones((2, 5)), use_running_average=True),
    "never updated": lambda: applied(jnp.ones((2, 8)), use_running_average=True),
    "which statistics": lambda: applied(jnp.ones((2, 8))),
    "immutable": lambda: applied(jnp.ones((2, 8)), use_running_average=False),
    "no averages": lambda: applied(jnp.ones((2, 8)), PARAMETERS, use_running_average=True),
    "frozen": frozen_flax,
    "names": of_torch,
    "cumulative": lambda: of_torch(momentum=None),
}
"""What makes the messages that pages quote."""
MESSAGE = re.compile(
    r"`((?:UserWarning: )?(?:[A-Za-z_]+: (?!/)[^`]*(?:got|almost)|Cannot update|Tried to|Parameter \")[^`]*)`"
)


def quoted():
    """Each message that a page quotes, with the page."""
    for path in PAGES:
        for message in MESSAGE.findall(" ".join(path.read_text().split())):
            yield message.removeprefix("UserWarning: "), path


def test_messages_that_pages_quote_are_given():
    """A quotation may leave out a part in the middle, "...", and what comes after it."""
    given = []
    for call in QUOTED.values():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                call()
            except Exception as error:  # of jaxnorm and of Flax
                given.append(str(error))
        given += [str(warning.message) for warning in warned]
    found = list(quoted())
    assert len(found) > 20
    for message, path in found:
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert any(re.match(pattern, " ".join(text.split())) for text in given), (path.name, message)


def test_every_loss_of_time_is_in_the_list():
    """Forward passes slower than Flax's, steps slower than PyTorch's; by one percent, of a norm and dtype."""
    behind = (DOCS / "comparison.md").read_text().partition("## Where jaxnorm is behind")[2].partition("**Compile")[0]
    for case, times in results("speed-cpu")["summary"].items():
        kind, *norm = case.split(", ")
        for library, time in times.items():
            listed = library == "flax.linen" if kind == "forward" else library.startswith(("flax", "torch"))
            if norm and len(norm) == 2 and listed and time["geometric mean"] < 0.99:
                assert f"{time['geometric mean']:.2f}" in behind, (case, library)


# The site ------------------------------------------------------------------------------------------------------------


def test_check_finds_what_is_wrong_with_a_site(tmp_path):
    """Links that lead nowhere and whatever a browser would load from elsewhere; not links for the reader to follow."""
    assert list(check.faults(tmp_path)) == [f"{tmp_path}: no pages"]
    (tmp_path / "b.html").write_text('<p id="here">b</p><img src="data:image/png;base64,AA==">')
    (tmp_path / "s.css").write_text("a { color: red }")
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="s.css"><a href="b.html#here">b</a><a href="#top" id="top">a</a>'
        '<a href="https://example.org/">elsewhere</a>'
        f'<div class="pst-scrollable-table-container"><table><tr><td>|</td></tr></table></div><code>{"a" * 50}</code>'
        "<pre>| a | b |</pre>"
    )
    assert list(check.faults(tmp_path)) == []
    wrong = {
        "<p>| a | b |\n| - | - |</p>": "a table as raw text: | a | b |",
        "<table><tr><td>a</td></tr></table>": "1 tables outside a box that scrolls",
        f"<p>{'a' * 50}</p>": "a word too long: aaa",
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
        found = next(check.faults(tmp_path))
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
