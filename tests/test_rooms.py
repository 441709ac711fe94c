"""Imports between the rooms of `snn_rl` go down, and there is no circle: by the source, wherever an import stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each room may import: cli -> vision, share -> runs -> rl -> core -> base.
BELOW: dict[str, set[str]] = {"base": set(), "core": {"base"}, "rl": {"base", "core"}}
BELOW["runs"] = {"base", "core", "rl"}
BELOW["vision"] = BELOW["share"] = {"base", "core", "rl", "runs"}
BELOW["cli"] = {"base", "core", "rl", "runs", "vision", "share"}


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of a package by its name; a package's name is that of its __init__."""
    found = {}
    for file in sorted((root / "snn_rl").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(name: str, file: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports anywhere: in functions and for type checkers, too."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            submodules = [f"{module}.{alias.name}" for alias in node.names]
            wanted = [submodule if submodule in modules else module for submodule in submodules]
        else:
            continue
        yield from (module for module in wanted if module.split(".")[0] == "snn_rl")


def graph_of(root: Path) -> dict[str, set[str]]:
    modules = modules_of(root)
    return {name: set(imports_of(name, file, modules)) for name, file in modules.items()}


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def arrows_up(graph: Mapping[str, set[str]]) -> list[str]:
    found = []
    for name, wanted in graph.items():
        room = room_of(name)
        if room in BELOW:  # the others stand above the rooms
            found += [f"{name} -> {other}" for other in sorted(wanted) if room_of(other) not in BELOW[room] | {room}]
    return found


def test_every_module_is_in_a_room() -> None:
    assert {room_of(name) for name in modules_of(ROOT)} == BELOW.keys() | {"", "__main__", "_public"}


def test_imports_go_down() -> None:
    assert arrows_up(graph_of(ROOT)) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(graph_of(ROOT)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_library_code_imports_no_package_of_the_repository() -> None:
    for name, file in modules_of(ROOT).items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"agents", "envs", "scripts", "benchmarks", "tests"}, name


@pytest.mark.parametrize(
    "line",
    [
        "import snn_rl.rl.b",
        "from snn_rl.rl import b",
        "from snn_rl.rl.b import name",
        "from ..rl import b",
        "from ..rl.b import name",
        "if TYPE_CHECKING:\n    from snn_rl.rl.b import name",
        "def f():\n    import snn_rl.rl.b",
    ],
)
def test_an_import_is_seen_wherever_and_however_it_is_written(line: str, tmp_path: Path) -> None:
    for file, text in {"core/a.py": line, "rl/b.py": "from snn_rl.core import a", "rl/__init__.py": ""}.items():
        (tmp_path / "snn_rl" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "snn_rl" / file).write_text(text)
    graph = graph_of(tmp_path)
    assert graph["snn_rl.core.a"] == {"snn_rl.rl.b"}
    assert graph["snn_rl.rl.b"] == {"snn_rl.core.a"}
    assert arrows_up(graph) == ["snn_rl.core.a -> snn_rl.rl.b"]
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
