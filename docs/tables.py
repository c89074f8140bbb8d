"""Tables of the documentation that are made from stored files: each function gives Markdown, and what it has read."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

COLORS = {"holds": "success", "holds under conditions": "warning", "contradicted": "danger", "not shown": "muted"}
"""How a verdict is shown."""
SIDES = {"for": "success", "against": "danger", "undecided": "muted"}
"""How an effect is shown."""
EFFECT = re.compile(r".*: ([+-][\d.]+)(?: \[([+-][\d.]+), ([+-][\d.]+)\])? ?(.*?)(?: \(the same in all\))?$")
"""What `tools.figures` writes: mean, ends of the interval, unit."""


class Verdict(NamedTuple):
    """What a notebook says of a claim, as the cells of its table."""

    claim: str
    effects: str
    comparisons: str
    smallest: str
    verdict: str


def claims(root: Path) -> dict[str, str]:
    """The claims of the notebooks, in their order; read, not imported, which would take all that notebooks need."""
    for node in ast.parse((root / "notebooks" / "tools.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CLAIMS":
            return ast.literal_eval(node.value)
    raise ValueError("notebooks/tools.py has no CLAIMS.")


def decided(notebook: Mapping[str, Any]) -> Iterator[Verdict]:
    """The verdicts in the outputs of a notebook, given as the contents of its file."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            lines = "".join(output.get("data", {}).get("text/markdown", "")).splitlines()
            if lines and lines[0] == "| claim |  | effect [interval] | comparisons | looked for | verdict |":
                for line in lines[2:]:
                    claim, _, *rest = line.strip("| ").split(" | ")
                    yield Verdict(claim, *rest)


def side(effect: str, smallest: str) -> str:
    """Whether an effect counts for a claim, against it, or not; ``smallest`` lists what was looked for, by unit."""
    found = EFFECT.fullmatch(effect)
    if not found:
        raise ValueError(f"not an effect: {effect!r}")
    mean, low, high, unit = found.groups()
    sizes = [size.partition(" ") for size in smallest.split(", ")]
    size = next(float(number) for number, _, of in sizes if of == unit)
    if (low or mean).startswith("+") and float(mean) >= size:
        return "for"
    return "against" if (high or mean).startswith("-") and float(mean) <= -size else "undecided"


def verdicts(root: Path) -> tuple[str, list[Path]]:
    """Every claim in order: in one table, then with the effects that each notebook measured."""
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    found = [(path, verdict) for path in notebooks for verdict in decided(json.loads(path.read_text()))]
    overview, lines = ["| claim | verdict | notebook |", "|---|---|---|"], []
    for claim, text in claims(root).items():
        rows = [(f"[{path.name[:2]}](notebooks/{path.name})", v) for path, v in found if v.claim == claim]
        badges = " ".join(dict.fromkeys(badge(v.verdict) for _, v in rows))
        overview.append(f"| [{text}](#claim-{claim}) | {badges} | {', '.join(link for link, _ in rows)} |")
        lines += [f"(claim-{claim})=", "", f"## {text[0].upper()}{text[1:]}", ""]
        for link, v in rows:
            many = "1 comparison" if v.comparisons == "1" else f"{v.comparisons} comparisons"
            lines += [f"{badge(v.verdict)} in notebook {link}: {many}, looked for {v.smallest}", ""]
            for effect in v.effects.split("; "):
                sided = side(effect, v.smallest)
                lines.append(f"- {{bdg-{SIDES[sided]}}}`{sided}` {effect}")
            lines.append("")
        if not rows:
            lines += ["No verdict.", ""]
    return "\n".join([*overview, "", *lines]), [root / "notebooks" / "tools.py", *notebooks]


def badge(verdict: str) -> str:
    """A verdict in its color."""
    return f"{{bdg-{COLORS[verdict]}}}`{verdict}`"


def results(root: Path, name: str) -> tuple[str, list[Path]]:
    """All rows of a file of ``benchmarks/results``: one table for those with the same columns and units."""
    path = root / "benchmarks" / "results" / name
    by_columns: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        named = {named_with_unit(column, row): value for column, value in flat(row).items()}
        by_columns.setdefault(tuple(named), []).append(named)
    lines = []
    for columns, rows in by_columns.items():
        shown = [c for c in columns if c != "target" or len({row[c] for row in rows}) > 1]
        lines += [f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
        lines += ["| " + " | ".join(str(row[column]) for column in shown) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines), [path]


def named_with_unit(column: str, row: dict[str, object]) -> str:
    """A column of a row of networks with its unit, which is another for whole networks."""
    if "case" in row and column in ("accessed", "bytes", "temporaries", "temporaries more"):
        return f"{column}, {'MB' if str(row['case']).startswith('ResNet') else 'activations'}"
    return column


def flat(row: dict[str, object]) -> dict[str, object]:
    """A row with one level: ``{"a": {"b": 1}}`` becomes ``{"a: b": 1}``; what is empty is left out."""
    result: dict[str, object] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            result |= {f"{key}: {k}": v for k, v in flat(value).items()}
        else:
            result[key] = value
    return result


def first_steps(root: Path) -> tuple[str, list[Path]]:
    """How long a step takes to begin, divided by the time with Flax's norms, by network and target."""
    paths, stages = sorted((root / "benchmarks" / "results").glob("first-step-*.json")), ("trace", "lower", "compile")
    targets = [path.stem.removeprefix("first-step-") for path in paths]
    rows = [{(r["case"], r["contender"]): r for r in json.loads(path.read_text())["rows"]} for path in paths]
    lines = [f"| {', '.join(stages)} | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
    for case, contender in rows[0]:
        if contender != "flax":
            figures = [", ".join(str(r[case, contender][stage]["of Flax's"]) for stage in stages) for r in rows]
            lines.append(f"| {case}: {contender} | {' | '.join(figures)} |")
    return "\n".join(lines), paths


def remedies(root: Path) -> tuple[str, list[Path]]:
    """The accuracy of the variants; without headings, which the search would take for those of the page."""
    path = root / "benchmarks" / "results" / "remedies.md"
    _, _, tables = path.read_text().partition("\n## ")
    return re.sub(r"^## (.*)$", r"**\1**", f"## {tables}", flags=re.MULTILINE), [path]
