"""Imports run one way: neither files nor folders import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("hnet", "experiments", "tpu")
    for file in (ROOT / package).rglob("*.py")
}


def imported(file: Path) -> set[str]:
    """Modules of this project that a file imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys()


def room(module: str) -> str:
    """Folder of `hnet`, file of `hnet` itself, or another package."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "hnet" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("place", [lambda module: module, room], ids=["files", "folders"])
def test_nothing_imports_what_imports_it(place):
    graph: dict[str, set[str]] = {}
    for module, file in FILES.items():
        used = {place(name) for name in imported(file)} - {place(module)}
        graph.setdefault(place(module), set()).update(used)
    assert "hnet.config" in graph["hnet.stage"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"imports in a circle: {' -> '.join(e.args[1])}")
