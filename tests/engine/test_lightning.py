"""Lightning's private names, and its two packages."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import stability_callbacks
from stability_callbacks import StepGuard
from stability_callbacks.engine._lightning import both
from tests.models import NormNet, fit, make_batches

PACKAGE = Path(stability_callbacks.__file__).parent


def test_a_private_name_that_is_gone_is_told_at_train_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_FitLoop, "_should_accumulate")
    with pytest.raises(MisconfigurationException, match=r"no `Trainer\.fit_loop\._should_accumulate` any more.*2\.6"):
        fit(NormNet(), make_batches(2), [StepGuard()])


def test_a_class_is_itself() -> None:
    assert both(pl.Trainer)[0] is pl.Trainer


def test_private_names_of_lightning_are_used_in_one_file_only() -> None:
    """What begins with an underscore and hangs on a trainer, a loop, a strategy or a plugin."""
    names = ("trainer._", "fit_loop._", "epoch_loop._", "strategy._", "plugin._", "loaders._", "optimizer import _")
    offenders = {
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "_lightning.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(name in line for name in names) and "self._trainer" not in line
    }
    assert not offenders
