"""The house's rules: imports only go down, and everything below the callbacks works without Lightning."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = "stability_callbacks"
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
OPTIONAL = {"matplotlib"}  # the extra `plot`
USERS = {"recipes", "configs", "benchmarks", "tests"}

ROOMS = 2  # clipping, detection, schedules, ...: every module that is not named below
STOREYS = {
    "_atomic": 0,
    "_nesting": 0,
    "_patterns": 0,
    "_validation": 0,
    "gradient_pass": 1,
    "engine": 3,
    "callbacks": 4,
    "replay": 4,
    "suite": 5,
    "__main__": 6,
    "": 6,
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def storey(module: str) -> int:
    room = module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]
    return STOREYS.get(room, ROOMS)


def top_level(module: str) -> str:
    return module.partition(".")[0]


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
BELOW_CALLBACKS = [name for name in MODULES if storey(name) <= ROOMS]


def imports(name: str) -> set[str]:
    """Return the modules imported anywhere in a module's source, under `TYPE_CHECKING` and inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            source = str(node.module)
            members = {f"{source}.{alias.name}" for alias in node.names}
            found.update(member if member in MODULES else source for member in members)
    return found


def offenders(forbidden: Callable[[str, str], bool]) -> dict[str, set[str]]:
    """Return, by module, its imports for which `forbidden(module, imported)` holds."""
    found = {name: {source for source in imports(name) if forbidden(name, source)} for name in MODULES}
    return {name: sources for name, sources in found.items() if sources}


def test_modules_are_found() -> None:
    assert f"{PACKAGE}.gradient_pass" in BELOW_CALLBACKS
    assert f"{PACKAGE}._validation" in imports(f"{PACKAGE}.gradient_pass")


def test_nothing_below_the_callbacks_imports_lightning() -> None:
    assert not offenders(lambda name, source: name in BELOW_CALLBACKS and top_level(source) in LIGHTNING)


def test_imports_only_go_down() -> None:
    assert not offenders(lambda name, source: top_level(source) == PACKAGE and storey(source) > storey(name))


def test_the_package_does_not_import_its_users() -> None:
    assert not offenders(lambda _, source: top_level(source) in USERS)


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
    stems = {path: path.stem.strip("_") for path in MODULES.values()}
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
