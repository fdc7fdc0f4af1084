"""Every class that a room exports keeps the laws of its kind, which it inherits by being exported."""

from __future__ import annotations

import doctest
import sys
from types import ModuleType
from typing import Any

import pytest

from stability_callbacks.schedules import Scaled, Schedule, WarmupConstant
from tests.contracts.clipping import CLIP_RULES
from tests.contracts.contract import Contract, Law, Make
from tests.contracts.detection import DETECTORS
from tests.contracts.initialization import POLICIES
from tests.contracts.schedules import SCHEDULES

CONTRACTS: list[Contract[Any]] = [CLIP_RULES, DETECTORS, SCHEDULES, POLICIES]
CASES = [case for contract in CONTRACTS for case in contract.cases()]

each_contract = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.base.__name__)


@pytest.mark.parametrize(("law", "make"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_exported_class_keeps_each_law(law: Law[Any], make: Make[Any]) -> None:
    law(make)


@each_contract
def test_no_exported_class_is_left_out(contract: Contract[Any]) -> None:
    assert not contract.complaint(), contract.complaint()
    assert {type(make()) for make in contract.makes()} == set(contract.exported())


def test_a_class_inherits_the_laws_by_being_exported() -> None:
    class Flat(WarmupConstant):
        """Can be made without arguments."""

    class Lifted(Scaled):
        """Can't."""

    room = ModuleType("room")
    vars(room).update(Flat=Flat, Lifted=Lifted, Schedule=Schedule, plot=print)
    room.__all__ = ["Flat", "Lifted", "Schedule", "plot"]  # type: ignore[attr-defined]
    contract: Contract[Schedule] = Contract(room, Schedule, {}, "tests/contracts/schedules.py")
    contract.law(lambda make: None)
    assert contract.exported() == [Flat, Lifted]
    assert [type(make()) for _, _, make in contract.cases()] == [Flat]
    assert contract.complaint() == (
        "room exports Lifted, which can't be made without arguments: "
        "add an example to EXAMPLES in tests/contracts/schedules.py"
    )


@each_contract
def test_the_class_that_the_documentation_writes_keeps_the_laws(
    contract: Contract[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of the base class's docstring is what a stranger copies."""
    module = ModuleType("written_in_a_docstring")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where pickle looks for its classes
    base, names = contract.base, dict(vars(sys.modules[contract.base.__module__]), __name__=module.__name__)
    [example] = doctest.DocTestFinder(recurse=False).find(base, base.__name__, globs=names)
    example.globs = vars(module)
    example.globs.update(names)
    assert not doctest.DocTestRunner().run(example, clear_globs=False).failed
    written = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, base) and each.__module__ == module.__name__
    ]
    assert written, f"the docstring of {base.__name__} writes no class"
    for each in written:
        for law in contract.laws:
            law(each)
