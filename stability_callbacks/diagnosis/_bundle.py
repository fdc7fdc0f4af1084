"""All that is needed to look at an incident again: a directory that is there complete or not at all."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from os import PathLike
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stability_callbacks._atomic import atomic_path
from stability_callbacks.diagnosis._cause import Cause
from stability_callbacks.diagnosis._history_csv import StepRow, read_history, write_history
from stability_callbacks.diagnosis._history_plot import plot_history
from stability_callbacks.diagnosis._incident import Incident
from stability_callbacks.diagnosis._isolation import RandomState
from stability_callbacks.diagnosis._storable import from_storable, to_storable

__all__ = ["Bundle", "BundleError", "Manifest", "read_bundle", "read_manifest", "write_bundle"]

_FORMAT = 1
_MANIFEST = "manifest.json"
_INCIDENT, _CAUSE, _META = "incident.json", "cause.json", "meta.json"
_HISTORY, _PICTURE = "history.csv", "history.png"
_BATCH, _WEIGHTS, _RANDOM_STATE = "batch.pt", "weights.pt", "random_state.pt"
_PACKAGES = ("stability-callbacks", "torch", "numpy", "lightning", "pytorch-lightning")
_FLOAT = "__float__"  # JSON has no numbers that are not finite
_LEFT_OUT = object()


class BundleError(RuntimeError):
    """A bundle can't be read. The message names the file, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Bundle:
    """What was kept of an incident.

    Attributes:
        path: Its directory.
        incident: The incident.
        history: The steps before it, with gradient norms by layer.
        batches: The micro-batches of the step, on the CPU; None if they were not kept.
        weights: The model's ``state_dict`` before the step, on the CPU; None if it was not kept.
        random_state: State of the random generators before the step; None if it was not kept.
        cause: What was found to be the cause; None if it was not looked for.
        meta: What else is known, such as ``model`` (its class), ``hyper_parameters``, ``precision``; besides,
            ``versions`` of packages, and ``left_out``, a list of what could not be stored.
    """

    path: Path
    incident: Incident
    history: list[StepRow]
    batches: list[Any] | None
    weights: dict[str, Tensor] | None
    random_state: RandomState | None
    cause: Cause | None
    meta: dict[str, Any]


def write_bundle(
    directory: str | PathLike[str],
    *,
    incident: Incident,
    history: Sequence[StepRow] = (),
    batches: Sequence[Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    rng: RandomState | None = None,
    cause: Cause | None = None,
    meta: Mapping[str, Any] | None = None,
    run: str | None = None,
) -> Path:
    """Write all that is known of an incident to a directory of its own, named ``step=<n>-<kind>``.

    Processes other than the first append ``-rank<n>``, and where that name is taken a number follows. The directory is
    there complete or not at all. It holds ``manifest.json`` with the sizes and checksums of the others,
    ``incident.json``, ``meta.json``, and what was given of ``history.csv`` and ``history.png`` (if matplotlib is
    installed), ``batch.pt``, ``weights.pt``, ``random_state.pt``, and ``cause.json``.

    No file can run code when it is read. Batches are stored as plain structures of tensors, numbers, strings and
    containers; named tuples and dataclasses as their fields. What is none of these is left out, and listed.

    Args:
        directory: Where the bundles of a run are. It is made if need be.
        incident: The incident. The stored one's ``bundle`` is the new directory's name.
        history: The steps before it, such as ``StepHistory.rows(per="layer")``.
        batches: The micro-batches of the step, in any nesting.
        weights: The model's ``state_dict`` before the step. Of sharded tensors the local shard is stored: gather them.
        rng: State of the random generators before the step.
        cause: What was found to be the cause.
        meta: What else is known, such as ``model``, ``hyper_parameters``, ``precision``, ``accumulate``. Values that
            JSON does not have are left out, and listed; tuples become lists.
        run: Whose it is; see ``make_room``. Default: nobody's.

    Returns:
        The new directory.

    Raises:
        OSError: If it can't be written. Nothing is left then.

    Example:
        >>> incident = Incident(7, 0, 7, 0, "nonfinite", {"loss": math.nan}, "skipped")
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     path = write_bundle(directory, incident=incident, batches=[torch.ones(2)])
        ...     path.name, read_bundle(path).batches
        ('step=7-nonfinite', [tensor([1., 1.])])
    """
    with _reserved_path(Path(directory), incident) as target:
        _write(target, incident, history, batches, weights, rng, cause, meta, run)
    return target


def _write(
    target: Path,
    incident: Incident,
    history: Sequence[StepRow],
    batches: Sequence[Any] | None,
    weights: Mapping[str, Any] | None,
    rng: RandomState | None,
    cause: Cause | None,
    meta: Mapping[str, Any] | None,
    run: str | None,
) -> None:
    left_out: list[str] = []
    tensors = {_BATCH: batches, _WEIGHTS: weights, _RANDOM_STATE: None if rng is None else rng._asdict()}
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / _INCIDENT).write_text(replace(incident, bundle=target.name).to_json(indent=2))
        if history:
            write_history(history, temporary / _HISTORY)
            if importlib.util.find_spec("matplotlib"):
                plot_history(history, temporary / _PICTURE)
        for name, value in tensors.items():
            if value is not None:
                structure, missing = to_storable(value)
                left_out += [f"{name}: {place}" for place in missing]
                torch.save(structure, temporary / name)
        if cause is not None:
            _write_json(temporary / _CAUSE, cause._asdict())
        known = _plain(meta or {}, "meta", left_out)
        _write_json(temporary / _META, {**known, "versions": _versions(), "left_out": left_out})
        files = {each.name: [each.stat().st_size, _checksum(each)] for each in sorted(temporary.iterdir())}
        owner = {} if run is None else {"run": run}
        _write_json(temporary / _MANIFEST, {"format": _FORMAT, "written": time_ns(), **owner, "files": files})


def read_bundle(path: str | PathLike[str], *, tensors: bool = True, allow_classes: bool = False) -> Bundle:
    """Read a bundle, after a check that its files are what was written.

    Args:
        path: The bundle's directory.
        tensors: Whether to read the batches, weights and random state too, which may be large.
        allow_classes: Whether named tuples and dataclasses in the batches become what they were, by importing the
            modules that the file names: do so only if you trust it. Otherwise, and where a class is not found, they are
            of look-alike classes with the same fields but no methods.

    Returns:
        The bundle.

    Raises:
        BundleError: If a file is missing, incomplete or damaged, or of a later format.
    """
    directory = Path(path)
    files = read_manifest(directory).files
    wanted = [name for name in files if tensors or Path(name).suffix != ".pt"]
    for name in wanted:
        try:
            checksum = _checksum(directory / name)
        except OSError as error:
            raise _unreadable(directory / name, str(error)) from error
        if checksum != files[name].checksum:
            raise _unreadable(directory / name, "it is damaged: its checksum is not that of what was written")

    def read(name: str, reader: Callable[[Path], Any]) -> Any:
        if name not in wanted:
            return None
        try:
            return reader(directory / name)
        except Exception as error:
            raise _unreadable(directory / name, f"it can't be understood ({_one_line(error)})") from error

    def load(file: Path) -> Any:
        return from_storable(torch.load(file, map_location="cpu", weights_only=True), allow_classes)

    return Bundle(
        path=directory,
        incident=read(_INCIDENT, lambda file: Incident.from_json(file.read_text())),
        history=read(_HISTORY, read_history) or [],
        batches=read(_BATCH, lambda file: _of_type(load(file), list)),
        weights=read(_WEIGHTS, lambda file: _checked_weights(load(file))),
        random_state=read(_RANDOM_STATE, lambda file: _random_state(load(file))),
        cause=read(_CAUSE, lambda file: _cause(_read_json(file))),
        meta=read(_META, _read_json),
    )


class FileRecord(NamedTuple):
    """Size in bytes and checksum (CRC-32) of a file."""

    size: int
    checksum: int


class Manifest(NamedTuple):
    """What a bundle should hold.

    Attributes:
        written: When it was written, in nanoseconds since 1970.
        files: What is known of each other file, by its name.
        run: The run that wrote it; None if that is not known.
    """

    written: int
    files: dict[str, FileRecord]
    run: str | None = None


def read_manifest(directory: Path) -> Manifest:
    """Read a bundle's manifest, and check that its files are there in full size.

    Raises:
        BundleError: If they are not, or if the manifest is of a later format.
    """
    path = directory / _MANIFEST
    try:
        content = json.loads(path.read_text())
        form, written = int(content["format"]), int(content["written"])
        files = {name: FileRecord(int(size), int(checksum)) for name, (size, checksum) in content["files"].items()}
    except FileNotFoundError as error:
        raise _unreadable(path, "it is missing") from error
    except OSError as error:
        raise _unreadable(path, str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _unreadable(path, f"it is incomplete or damaged ({type(error).__name__}: {_one_line(error)})") from error
    if form > _FORMAT:
        raise BundleError(
            f"{path} is of format {form}, and this version reads up to {_FORMAT}: install a newer stability-callbacks"
        )
    for name in (_INCIDENT, _META, *files):
        file = directory / name
        if name not in files or Path(name).name != name or not file.is_file():
            raise _unreadable(file, "it is missing")
        if file.stat().st_size != files[name].size:
            raise _unreadable(file, f"it has {file.stat().st_size} bytes instead of {files[name].size}")
    run = content.get("run")
    return Manifest(written, files, run if isinstance(run, str) else None)


def _unreadable(path: Path, reason: str) -> BundleError:
    return BundleError(
        f"the bundle {path.parent} can't be read because of {path.name}: {reason}. Use another bundle, such as the "
        "next older one, or copy this one again from where it came from"
    )


@contextmanager
def _reserved_path(directory: Path, incident: Incident) -> Iterator[Path]:
    """A free name, held by an empty directory so that no other process takes it; a bundle will replace that."""
    kind = re.sub(r"[^\w.-]", "_", incident.kind)  # of a user's own detector
    name = f"step={incident.step}-{kind}" + (f"-rank{incident.rank}" if incident.rank else "")
    directory.mkdir(parents=True, exist_ok=True)
    for path in (directory / each for each in chain([name], (f"{name}-{number}" for number in count(2)))):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        break
    try:
        yield path
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, allow_nan=False, indent=2))


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = _of_type(json.loads(path.read_text(), object_hook=_number), dict)
    return content


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"it must hold a {kind.__name__}, but holds a {type(value).__name__}")
    return value


def _checked_weights(value: Any) -> dict[str, Tensor]:
    content: dict[Any, Any] = _of_type(value, dict)
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise TypeError(f"its keys must be names of parameters and buffers, but one is {wrong[0]!r}")
    return content


def _cause(values: Mapping[str, Any]) -> Cause:
    """The cause on record; what newer versions tell beside is left out."""
    cause = Cause(**{name: value for name, value in values.items() if name in Cause._fields})
    if type(cause.reproduced) is not bool:
        raise TypeError(f"reproduced must be true or false, got {cause.reproduced!r}")
    for name, value in cause._asdict().items():
        if name != "reproduced" and not isinstance(value, str) and (value is not None or name == "explanation"):
            raise TypeError(f"{name} must be a string{'' if name == 'explanation' else ' or null'}, got {value!r}")
    return cause


def _random_state(values: Any) -> RandomState:
    """The state, after the generators of torch, NumPy and Python have taken it once: they know what is valid."""
    state = RandomState(**_of_type(values, dict))
    now = RandomState.capture()
    try:
        state.restore()
    finally:
        now.restore()
    return state


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _number(content: dict[str, Any]) -> Any:
    return float(content[_FLOAT]) if content.keys() == {_FLOAT} else content


def _plain(value: Any, place: str, left_out: list[str]) -> Any:
    """The part of a value that JSON has; the rest is listed. A list with a gap would be another one: all of it goes."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(float(value))}
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = {key: _plain(item, f"{place}[{key!r}]", left_out) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not _LEFT_OUT}
    if isinstance(value, (list, tuple)):
        elements = [_plain(item, f"{place}[{index}]", left_out) for index, item in enumerate(value)]
        return elements if all(element is not _LEFT_OUT for element in elements) else _LEFT_OUT
    left_out.append(place)
    return _LEFT_OUT
