"""The laws, and what else asks for Lightning's classes, for a user of ``pytorch_lightning``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import ROOT

# The laws as a whole. Of the rest what asks a trainer, a module, a callback, a logger or an error for its class.
LAWS = ["tests/test_laws.py"]
ESSENTIALS = [
    "tests/engine/test_lightning.py",
    "tests/engine/test_lifecycle.py",
    "tests/engine/test_training_step.py",
    "tests/callbacks/test_step_guard.py",
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("files", [LAWS, ESSENTIALS], ids=["laws", "essentials"])
def test_all_holds_for_users_of_pytorch_lightning(files: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.pytorch_lightning_user", "-p", "no:cacheprovider", "-q"]
    run = subprocess.run(
        [*command, *files, f"--basetemp={tmp_path / 'inner'}"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_the_plugin_gives_tests_the_other_package() -> None:
    script = (
        "from tests.pytorch_lightning_user import pytest_configure; pytest_configure()\n"
        "import tests.models, stability_callbacks.engine._lightning as ours, pytorch_lightning, lightning.pytorch\n"
        "assert tests.models.pl is pytorch_lightning and ours.pl is lightning.pytorch\n"
        "assert issubclass(tests.models.NormNet, pytorch_lightning.LightningModule)\n"
        "assert issubclass(tests.models.MemoryLogger, pytorch_lightning.loggers.Logger)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
