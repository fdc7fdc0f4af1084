"""Which room of the package may import which: the one table, and what checks a package against it.

A room is a module or package directly below ``stability_callbacks``. ``python -m tests.architecture`` prints the table,
with what the code does not keep to.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "stability_callbacks"

# Each room with the rooms that it may import, from the ground up. An import that is not here fails the tests, also one
# under TYPE_CHECKING or inside of a function; so does an entry that no import needs.
ALLOWED: dict[str, tuple[str, ...]] = {
    # Ground floor: no room of its own ideas knows another.
    "errors": (),
    "_atomic": (),
    "_identity": (),
    "_names": (),
    "_nesting": (),
    "_optimizers": (),
    "_validation": (),
    "_device_state": (),
    "_patterns": ("_validation",),
    # First storey: one measurement, shared by all.
    "gradient_pass": ("_validation",),
    "activations": ("_names", "_nesting", "gradient_pass"),
    # Second storey: the ideas, pure PyTorch.
    "numerics": (),
    "penalties": ("gradient_pass",),
    "histograms": ("_validation",),
    "schedules": ("_validation",),
    "detection": ("_device_state", "_nesting", "_validation", "gradient_pass"),
    "clipping": ("_device_state", "_patterns", "_validation", "gradient_pass", "schedules"),
    "snapshots": ("_identity", "_optimizers", "_validation", "gradient_pass"),
    "faults": ("_names", "_nesting", "_validation", "activations", "gradient_pass", "snapshots"),
    "diagnosis": ("_atomic", "_names", "_nesting", "_validation", "activations", "gradient_pass", "snapshots"),
    "initialization": ("_names", "_validation", "activations", "diagnosis"),
    "report": ("_atomic", "diagnosis"),
    # Third storey: what drives the callbacks.
    "engine": (
        "_atomic",
        "_identity",
        "_names",
        "_optimizers",
        "clipping",
        "diagnosis",
        "errors",
        "gradient_pass",
        "schedules",
        "snapshots",
    ),
    # Fourth storey: the callbacks themselves, and a step once more from its bundle.
    "callbacks": (
        "_patterns",
        "_validation",
        "activations",
        "clipping",
        "detection",
        "diagnosis",
        "engine",
        "faults",
        "gradient_pass",
        "histograms",
        "initialization",
        "penalties",
        "schedules",
        "snapshots",
    ),
    "replay": ("diagnosis", "engine", "gradient_pass"),
    "suite": ("_validation", "callbacks", "clipping", "initialization", "schedules"),
    # Entries: the package itself (as room ""), and the command line.
    "": ("callbacks", "errors", "suite"),
    "__main__": ("diagnosis", "replay", "report"),
}

# The rooms that may import Lightning, and those above them.
WITH_LIGHTNING = {"engine", "callbacks", "replay", "suite", "", "__main__"}


def read_sources(root: Path = ROOT) -> dict[str, str]:
    """The sources of the package's modules, by full name; a package's own is that of its ``__init__``."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for path in sorted((root / PACKAGE).rglob("*.py"))
    }


def room_of(module: str) -> str:
    """The room of a module of the package; ``""`` for the package itself."""
    return module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def top_level(module: str) -> str:
    return module.partition(".")[0]


def imports(source: str, modules: Iterable[str]) -> set[str]:
    """The modules imported anywhere in a source: under ``TYPE_CHECKING``, inside functions and by name, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError("relative imports are not followed: write the module's full name")
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(member if member in modules else str(node.module) for member in members)
        elif isinstance(node, ast.Call) and _name_of(node.func) in ("import_module", "__import__"):
            found.update(each.value for each in node.args[:1] if isinstance(each, ast.Constant))
    return found


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def all_imports(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """What each module imports."""
    return {name: imports(source, sources) for name, source in sources.items()}


def arrows(sources: Mapping[str, str]) -> dict[tuple[str, str], set[str]]:
    """The imports from room to room, each with the modules that import."""
    found: dict[tuple[str, str], set[str]] = {}
    for name, imported in all_imports(sources).items():
        for source in imported:
            if top_level(source) == PACKAGE and room_of(source) != room_of(name):
                found.setdefault((room_of(name), room_of(source)), set()).add(name)
    return found


def forbidden(sources: Mapping[str, str], allowed: Mapping[str, Iterable[str]] = ALLOWED) -> list[str]:
    """The imports that the table does not have, in words."""
    return [
        f"{', '.join(sorted(names))} imports {target or PACKAGE}, which the table does not allow {room or PACKAGE}"
        for (room, target), names in sorted(arrows(sources).items())
        if target not in allowed.get(room, ())
    ]


def unneeded(sources: Mapping[str, str], allowed: Mapping[str, Iterable[str]] = ALLOWED) -> list[str]:
    """What stands in the table and is not in the code."""
    there, rooms = arrows(sources), {room_of(name) for name in sources}
    gone = [f"there is no room {room}" for room in allowed if room not in rooms]
    return gone + [
        f"{room} does not import {target}"
        for room, targets in allowed.items()
        for target in targets
        if room in rooms and (room, target) not in there
    ]


def cycles(graph: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """The groups of nodes of a graph that can reach each other, and nodes with an arrow to themselves."""
    return [each for each in _components(graph) if len(each) > 1 or each[0] in graph.get(each[0], ())]


def _components(graph: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    reached = {node: set(_reached(graph, node)) for node in graph}
    groups = {
        tuple(sorted({node} | {other for other in reached[node] if node in reached.get(other, ())})) for node in graph
    }
    return sorted(groups)


def _reached(graph: Mapping[str, Iterable[str]], start: str) -> Iterator[str]:
    seen: set[str] = set()
    nodes = list(graph.get(start, ()))
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            yield node
            nodes.extend(graph.get(node, ()))


def cycles_between_rooms(sources: Mapping[str, str]) -> list[tuple[str, ...]]:
    graph: dict[str, set[str]] = {}
    for room, target in arrows(sources):
        graph.setdefault(room, set()).add(target)
    return cycles(graph)


def cycles_inside_rooms(sources: Mapping[str, str], exempt: Iterable[str] = ()) -> list[tuple[str, ...]]:
    graph = {
        name: {each for each in imported if top_level(each) == PACKAGE and room_of(each) == room_of(name)}
        for name, imported in all_imports(sources).items()
        if room_of(name) not in exempt
    }
    return cycles(graph)


def table() -> str:
    """The table as text, and what the code does not keep to."""
    sources = read_sources()
    width = max(map(len, ALLOWED))
    lines = [f"{room or '(package)':<{width}}  {', '.join(targets) or '-'}" for room, targets in ALLOWED.items()]
    circles = [*cycles_between_rooms(sources), *cycles_inside_rooms(sources)]
    faults = [*forbidden(sources), *unneeded(sources), *(f"circle: {' <-> '.join(each)}" for each in circles)]
    return "\n".join([*lines, "", *(faults or ["The code keeps to it, and has no circle."])])


if __name__ == "__main__":
    print(table())  # noqa: T201
