"""The house stands on its floors: a module imports only from the rooms below it, and no file outgrows a head."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "offramp"
GROUND = {"types", "errors", "_extras", "_specs"}
BELOW: dict[str, set[str]] = {  # room -> rooms it may import, besides the ground floor and itself
    "types": set(), "errors": set(), "_extras": set(), "_specs": set(), "_kernel": set(),
    # the evidence wing: tensors and numbers, never an nn.Module
    "functional": set(), "table": set(), "policies": {"functional", "table"},
    # choose times what a policy takes to decide with the clock that times the heads it decides after
    "exhaustive": {"functional", "table", "policies"},
    "choose": {"functional", "table", "policies", "exhaustive", "cost"},
    "report": {"functional", "table", "policies", "choose", "cost"},
    # the model wing
    "cost": set(), "graph": {"cost"}, "nn": {"graph", "cost", "functional"}, "data": {"functional"},
    "models": set(),
    "train": {"nn", "data", "functional", "graph", "cost"}, "runtime": {"nn", "functional", "cost", "graph"},
    # what a masked network leaves to do, and who does it
    "sparse": {"nn", "graph", "cost", "functional", "_kernel", "runtime"},
    # the bridges from model to evidence; what single pixels cost depends on which, so no table can hold it
    "prices": {"nn", "cost", "table", "functional"},
    "record": {"nn", "graph", "cost", "table", "functional", "data", "prices"},
    "layer_cascade": {"nn", "cost", "functional", "graph"},
    # a deployed network as files: what the runtime runs, with the plan that it obeys
    "deployed": {"runtime", "sparse", "nn", "graph", "policies", "choose", "table"},
    # which part of a network a device holds: a network's costs, or those that its table has
    "devices": {"nn", "prices", "table"},
    # one image in pictures: a network's answers, as the report draws them
    "walks": {"nn", "runtime", "report", "functional", "cost"},
    "testing": {"functional", "table", "policies", "choose", "nn", "runtime"},
}
ROOF = {"__init__", "__main__", "cli"}  # may import everything


def rooms_imported(path: Path, text: str | None = None) -> set[str]:
    here = path.relative_to(SRC.parent).with_suffix("").parts  # ("offramp", "nn", "heads")
    found = set()
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("offramp.")}
    return found


FILES = [path for path in sorted(SRC.rglob("*.py")) if path.relative_to(SRC).with_suffix("").parts[0] not in ROOF]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(SRC).with_suffix("").parts[0]
    assert room in BELOW, f"{room} is a new room: say in BELOW what it may stand on"
    upward = rooms_imported(path) - BELOW[room] - GROUND - {room}
    assert not upward, f"{path.relative_to(SRC)} reaches up to {sorted(upward)}"


def test_the_floors_themselves_have_no_circle() -> None:
    resting: set[str] = set()
    while waiting := [room for room in BELOW if room not in resting]:
        landed = [room for room in waiting if BELOW[room] <= resting]
        assert landed, f"these rooms stand on each other: {waiting}"
        resting |= set(landed)


@pytest.mark.parametrize("text", [
    "from offramp.nn import heads", "import offramp.nn.heads", "from ..nn.heads import build", "from .. import nn",
    "def late():\n    from offramp.nn.heads import build",
])
def test_an_upward_import_is_seen(text: str) -> None:
    assert rooms_imported(SRC / "choose" / "imagined.py", text) == {"nn"}


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_no_file_outgrows_400_lines(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (SRC.parents[1] / folder).rglob("*.py")}
    too_long = {str(path.relative_to(SRC.parents[1])): count for path, count in lengths.items() if count > 400}
    assert not too_long, f"split these: {too_long}"


def code_lines(text: str) -> int:
    """Lines that hold code: no blanks, comments or docstrings, which a ruler should not make anyone save on."""
    told: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        first = node.body[0] if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            told |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    written: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            written |= set(range(token.start[0], token.end[0] + 1))
    return len(written - told)


def test_code_lines_leave_out_what_only_tells() -> None:
    told = '"""Told\nat length."""\n\n# why\nx = (\n    1)\n\ndef f():\n    """Told."""\n    return x  # so\n'
    assert code_lines(told) == 4


def test_rooms_and_the_package_stay_small() -> None:
    # 12,000 lines were meant for the depth of one paper; each further one (MESS, EENet, SlimSeg) brings about 3,000,
    # and ADP-C, with what runs masks sparsely and against a deadline, 5,000.
    # What one has to hold in the head is a room, so that a room is what has the hard limit.
    sizes: dict[str, int] = {}
    for path in SRC.rglob("*.py"):
        room = path.relative_to(SRC).parts[0]
        sizes[room] = sizes.get(room, 0) + code_lines(path.read_text())
    assert max(sizes.values()) < 2_500, sizes
    assert sum(sizes.values()) < 26_000, sizes
