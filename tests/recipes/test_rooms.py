"""The rooms of the recipes import each other by their public face, and only as the table allows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "data": set(),
    "models": set(),
    "results": set(),
    "autograd": set(),
    "runner": {"data", "results"},
    "gradient_flow": {"data", "models", "results", "runner"},
}


def imported(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    modules = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.removeprefix("recipes.") for module in modules if module.startswith("recipes.")}


def test_every_room_is_in_the_table() -> None:
    assert {path.parent.name for path in (ROOT / "recipes").glob("*/__init__.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_what_the_table_allows(room: str) -> None:
    for path in (ROOT / "recipes" / room).glob("*.py"):
        others = {module for module in imported(path) if module.partition(".")[0] != room}
        assert others <= MAY_IMPORT[room], path.name


@pytest.mark.parametrize("command", ["mlp", "resnet", "lstm", "transformer"])
def test_commands_import_public_faces(command: str) -> None:
    assert imported(ROOT / "recipes" / f"{command}.py") <= {"models", "runner", "gradient_flow"}
