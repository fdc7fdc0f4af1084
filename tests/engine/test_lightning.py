"""Lightning's private names, and its two packages."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import pytorch_lightning.utilities.exceptions as their_exceptions
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import stability_callbacks
from stability_callbacks import Initialization, StepGuard
from stability_callbacks.engine import _lightning
from stability_callbacks.engine._lightning import both, check_private_names
from tests.models import NormNet, fit, make_batches

PACKAGE = Path(stability_callbacks.__file__).parent


def test_a_private_name_that_is_gone_is_told_at_train_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_FitLoop, "_should_accumulate")
    with pytest.raises(MisconfigurationException, match=r"no `Trainer\.fit_loop\._should_accumulate` any more.*2\.6"):
        fit(NormNet(), make_batches(2), [StepGuard()])


@pytest.mark.parametrize("package", [pl, pytorch_lightning])
def test_the_version_told_is_that_of_the_trainers_package(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer(package.Trainer):  # type: ignore[misc]
        pass

    trainer = Trainer(logger=False, accelerator="cpu", enable_model_summary=False)
    monkeypatch.setattr(_lightning, "_NAMES_OF_TRAINER", ("gone",))
    top = "pytorch_lightning" if package is pytorch_lightning else "lightning"
    monkeypatch.setattr(f"{top}.__version__", f"9.9 of {top}")
    with pytest.raises(MisconfigurationException, match=f"Lightning 9.9 of {top} has no `Trainer.gone`"):
        check_private_names(trainer)


def test_a_class_is_itself_and_its_twin() -> None:
    ours = _lightning.pl
    assert both(ours.Trainer) == (ours.Trainer, pytorch_lightning.Trainer)
    assert both(ours.callbacks.ModelCheckpoint)[1] is pytorch_lightning.callbacks.ModelCheckpoint
    assert both(Path) == (Path,)


def test_a_class_that_the_other_package_does_not_have_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning.trainer.trainer", SimpleNamespace())
    assert both(_lightning.pl.Trainer) == (_lightning.pl.Trainer,)


@pytest.mark.parametrize("package", [pl, pytorch_lightning])
@pytest.mark.parametrize("make", [StepGuard, Initialization])
def test_a_trainer_of_either_package_takes_a_lone_callback(make: Any, package: Any) -> None:
    callback = make()
    assert isinstance(callback, package.Callback)
    trainer = package.Trainer(callbacks=callback, logger=False, accelerator="cpu", enable_model_summary=False)
    assert callback in trainer.callbacks


@pytest.mark.parametrize("kind", [MisconfigurationException, their_exceptions.MisconfigurationException])
def test_who_catches_either_packages_error_catches_ours(kind: type[Exception]) -> None:
    error = _lightning.MisconfigurationException("wrong")
    with pytest.raises(kind, match="wrong"):
        raise error
    assert str(pickle.loads(pickle.dumps(error))) == "wrong"


def test_our_errors_are_of_both_kinds_everywhere() -> None:
    """Nobody raises Lightning's own error, or derives from its own callback."""
    offenders = {
        f"{path.name}: {line}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "_lightning.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("from lightning") and "MisconfigurationException" in line
    }
    assert not offenders


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
