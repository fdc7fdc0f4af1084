"""The house's rules: imports keep to one table without circles, and all below the callbacks works without Lightning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture import (
    ALLOWED,
    PACKAGE,
    ROOT,
    WITH_LIGHTNING,
    all_imports,
    cycles,
    cycles_between_rooms,
    cycles_inside_rooms,
    forbidden,
    imports,
    read_sources,
    room_of,
    top_level,
    unneeded,
)

LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
OPTIONAL = {"matplotlib", "pytorch-lightning"}  # the extra `plot`; the other package of Lightning, if it is there
USERS = {"recipes", "configs", "benchmarks", "tests"}

SOURCES = read_sources()
IMPORTS = all_imports(SOURCES)
BELOW_CALLBACKS = [name for name in SOURCES if room_of(name) not in WITH_LIGHTNING]


def offenders(forbids: Callable[[str, str], bool]) -> dict[str, set[str]]:
    """Return, by module, its imports for which `forbids(module, imported)` holds."""
    found = {name: {source for source in imported if forbids(name, source)} for name, imported in IMPORTS.items()}
    return {name: sources for name, sources in found.items() if sources}


# ---- the package


def test_modules_are_found() -> None:
    assert f"{PACKAGE}.gradient_pass._norms" in BELOW_CALLBACKS
    assert f"{PACKAGE}.callbacks.rollback" in SOURCES
    assert f"{PACKAGE}._validation" in IMPORTS[f"{PACKAGE}.gradient_pass._pass"]


def test_rooms_import_what_the_table_allows() -> None:
    assert not forbidden(SOURCES)


def test_the_table_allows_no_more_than_is_needed() -> None:
    assert not unneeded(SOURCES)


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert not cycles(ALLOWED)
    assert not cycles_between_rooms(SOURCES)


def test_no_modules_of_a_room_import_each_other_in_a_circle() -> None:
    assert not cycles_inside_rooms(SOURCES)


def test_nothing_below_the_callbacks_imports_lightning() -> None:
    assert not offenders(lambda name, source: name in BELOW_CALLBACKS and top_level(source) in LIGHTNING)
    assert not [room for room in ALLOWED if room not in WITH_LIGHTNING and WITH_LIGHTNING & set(ALLOWED[room])]


def test_the_package_does_not_import_its_users() -> None:
    assert not offenders(lambda _, source: top_level(source) in USERS)


def test_the_table_is_printed_by_a_command() -> None:
    command = [sys.executable, "-m", "tests.architecture"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = dict(line.split(maxsplit=1) for line in run.stdout.splitlines()[: len(ALLOWED)])
    assert rows["clipping"] == "_device_state, _patterns, _validation, gradient_pass, schedules"
    assert rows["numerics"] == "-"
    assert "The code keeps to it, and has no circle" in run.stdout


# ---- the checker, on made-up sources


def made_up(**sources: str) -> dict[str, str]:
    names = {name: ".".join([PACKAGE, *name.split("__")]) for name in sources}
    return {PACKAGE: "", **{names[name]: source for name, source in sources.items()}}


REPORT = {"report": "", "report___scale": "SCALE = 1"}


@pytest.mark.parametrize(
    "source",
    [
        "from stability_callbacks.report._scale import SCALE",
        "from stability_callbacks.report import _scale",
        "from stability_callbacks import report",
        "import stability_callbacks.report._scale as scale",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stability_callbacks.report._scale import SCALE",
        "def clip():\n    from stability_callbacks.report._scale import SCALE",
        "try:\n    import stability_callbacks.report\nexcept ImportError:\n    pass",
        "import importlib\nreport = importlib.import_module('stability_callbacks.report')",
    ],
)
def test_a_clip_rule_must_not_import_the_reports_scale(source: str) -> None:
    sources = made_up(clipping="", clipping___rule=source, **REPORT)
    (message,) = forbidden(sources)
    assert message == "stability_callbacks.clipping._rule imports report, which the table does not allow clipping"


def test_what_the_table_allows_may_be_imported_and_what_a_room_holds() -> None:
    lines = (
        "import torch",
        "from stability_callbacks.schedules import Scaled",
        "from stability_callbacks.clipping import _rule",
    )
    sources = made_up(clipping="", clipping___rule="", clipping___agc="\n".join(lines), schedules="")
    assert not forbidden(sources)


@pytest.mark.parametrize("source", ["import stability_callbacks", "from stability_callbacks import StepGuard"])
def test_the_package_itself_is_a_room_that_nobody_below_imports(source: str) -> None:
    (message,) = forbidden(made_up(clipping=source))
    assert (
        message == "stability_callbacks.clipping imports stability_callbacks, which the table does not allow clipping"
    )


def test_a_new_room_must_be_entered_in_the_table() -> None:
    (message,) = forbidden(made_up(cellar="import stability_callbacks.schedules", schedules=""))
    assert message == "stability_callbacks.cellar imports schedules, which the table does not allow cellar"


def test_relative_imports_are_refused() -> None:
    with pytest.raises(ValueError, match="relative imports are not followed"):
        imports("from ._rule import ClipRule", [])


def test_entries_without_an_import_are_found() -> None:
    table = {"clipping": ("schedules",), "schedules": (), "gone": ()}
    sources = made_up(clipping="", schedules="")
    assert unneeded(sources, table) == ["there is no room gone", "clipping does not import schedules"]


def test_circles_are_found() -> None:
    one = "def f():\n    from stability_callbacks.two import y"
    assert cycles_between_rooms(made_up(one=one, two="import stability_callbacks.one")) == [("one", "two")]
    long = {"a": "b", "b": "c", "c": "a", "d": "a"}
    assert cycles({name: [target] for name, target in long.items()}) == [("a", "b", "c")]
    assert not cycles({"a": ["b", "c"], "b": ["c"], "c": []})


def test_circles_between_the_modules_of_a_room_are_found() -> None:
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stability_callbacks.room._two import Two"
    sources = made_up(room="", room___one=hidden, room___two="from stability_callbacks.room._one import One")
    assert cycles_inside_rooms(sources) == [(f"{PACKAGE}.room._one", f"{PACKAGE}.room._two")]
    assert not cycles_inside_rooms(sources, exempt=["room"])
    face = made_up(room="from stability_callbacks.room._one import One", room___one="import stability_callbacks.room")
    assert cycles_inside_rooms(face) == [(f"{PACKAGE}.room", f"{PACKAGE}.room._one")]


# ---- dependencies and names


def test_imported_packages_are_declared_dependencies() -> None:
    requirements = [Requirement(line) for line in requires("stability-callbacks") or ()]
    needed = [each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    declared = set(map(canonicalize_name, [*OPTIONAL, *needed]))  # "Jinja2" and "jinja2" are one package
    providers = {name: set(map(canonicalize_name, found)) for name, found in packages_distributions().items()}

    def undeclared(_: str, source: str) -> bool:
        package = top_level(source)
        return package not in {PACKAGE, *sys.stdlib_module_names} and declared.isdisjoint(providers.get(package, ()))

    assert not offenders(undeclared)


def test_files_are_named_after_what_they_hold() -> None:
    vague = {"utils", "helpers", "common", "misc"}
    stems = {path: path.stem.strip("_") for path in (ROOT / PACKAGE).rglob("*.py")}
    assert not [path for path, stem in stems.items() if stem in vague or "manager" in stem]


WITHOUT_LIGHTNING = """
import importlib, sys

blocked, modules = {blocked!r}, {modules!r}
sys.modules.update(dict.fromkeys(blocked))  # importing one of them now raises ModuleNotFoundError

for name in modules:
    importlib.import_module(name)

import stability_callbacks

try:
    stability_callbacks.StepGuard
except ImportError as error:
    assert error.name.partition(".")[0] in blocked, error
else:
    raise AssertionError("StepGuard came without Lightning")
"""


def test_everything_below_the_callbacks_works_where_lightning_is_not_installed() -> None:
    script = WITHOUT_LIGHTNING.format(blocked=sorted(LIGHTNING | OPTIONAL), modules=BELOW_CALLBACKS)
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
