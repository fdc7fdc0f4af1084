"""A pytest plugin that runs any test as a user of ``pytorch_lightning``: ``-p tests.pytorch_lightning_user``.

The tests' imports of ``lightning.pytorch`` then give the twin package; the imports of this package stay as they are.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

OURS, THEIRS = "lightning.pytorch", "pytorch_lightning"

_import = builtins.__import__


def import_as_user(
    name: str,
    namespace: Mapping[str, Any] | None = None,
    locals_: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """``__import__``, in which a test's ``lightning.pytorch`` is ``pytorch_lightning``."""
    importer = str((namespace or {}).get("__name__", ""))
    if importer.partition(".")[0] != "tests" or not f"{name}.".startswith(f"{OURS}."):
        return _import(name, namespace, locals_, fromlist, level)
    module = _import(name.replace(OURS, THEIRS, 1), namespace, locals_, fromlist, level)
    # `import lightning.pytorch as pl` asks for the attribute `pytorch` of what it gets.
    return module if fromlist else SimpleNamespace(pytorch=module)


def pytest_configure() -> None:
    builtins.__import__ = import_as_user


def pytest_unconfigure() -> None:
    builtins.__import__ = _import
