"""Which checkpoint to go on from after a crash."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from stability_callbacks._validation import check_instance

__all__ = ["newest_readable_checkpoint"]

_log = logging.getLogger(__name__)


def newest_readable_checkpoint(directory: str | Path) -> Path | None:
    """The newest checkpoint of a directory that is not damaged, for ``Trainer.fit(ckpt_path=...)``.

    Use it when a job may be killed at any moment and is started again by the same command. A process that is
    killed, or a disk that is full, while it writes a checkpoint may leave half a file, and that is the newest one then.
    Each damaged one is named in a warning, and the next older one is tried.

    A file is damaged if it is not a whole archive of ``torch.save``, or a part of it does not match its checksum:
    ``torch.load`` alone does not notice flipped bits in a weight. For that it is read once, in pieces; nothing in it is
    executed. Whether objects in it are to be trusted remains a matter of ``Trainer.fit(weights_only=...)``.

    Args:
        directory: Where ``ModelCheckpoint`` writes. Files in it that end in ``.ckpt`` count, the last one written
            first; subdirectories, and so sharded checkpoints, do not.

    Returns:
        Its path; None if there is none, as when the job is started for the first time. That is said in a warning.

    Raises:
        TypeError: If ``directory`` is neither a string nor a path.
        NotADirectoryError: If it is a file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     torch.save({"state_dict": {}}, Path(directory, "step=1.ckpt"))
        ...     newest_readable_checkpoint(directory).name
        'step=1.ckpt'

        The first time this starts anew, and from then on where it was:

        >>> trainer.fit(model, data, ckpt_path=newest_readable_checkpoint("checkpoints"))  # doctest: +SKIP
    """
    folder = directory if isinstance(directory, Path) else Path(check_instance("directory", directory, str, "a path"))
    if folder.is_file():
        raise NotADirectoryError(f"`directory` must be the directory that holds the checkpoints, got the file {folder}")
    found = [(path.stat().st_mtime_ns, path.name, path) for path in folder.glob("*.ckpt") if path.is_file()]
    for *_, path in sorted(found, reverse=True):
        problem = _damage(path)
        if problem is None:
            return path
        _log.warning("The checkpoint %s is damaged (%s); trying an older one.", path, problem)
    if found:
        _log.warning("None of the %d checkpoints in %s can be read.", len(found), folder)
    elif deeper := sorted(path for path in folder.rglob("*/*.ckpt") if path.is_file()):
        _log.warning(
            "There is no checkpoint in %s itself, but %d below it, such as %s: give that directory to go on.",
            folder,
            len(deeper),
            deeper[-1],
        )
    else:
        missing = "" if folder.is_dir() else ", which does not exist"
        _log.warning("There is no checkpoint in %s%s: training starts anew.", folder, missing)
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                return f"{part} does not match its checksum"
        torch.load(path, map_location="meta", mmap=True, weights_only=True)  # reads all but the tensors' values
    except UnpicklingError:
        return None  # whole, with objects in it that need trust
    except Exception as error:  # noqa: BLE001  # whatever a damaged file gives rise to; the older one is tried
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no content'}"
    return None
