"""Every class that a room exports keeps the laws of its kind, which it inherits by being exported."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contracts.clipping import CLIP_RULES
from tests.contracts.contract import Contract, Law, Make
from tests.contracts.detection import DETECTORS

CONTRACTS: list[Contract[Any]] = [CLIP_RULES, DETECTORS]
CASES = [case for contract in CONTRACTS for case in contract.cases()]


@pytest.mark.parametrize(("law", "make"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_exported_class_keeps_each_law(law: Law[Any], make: Make[Any]) -> None:
    law(make)
