"""Cutting the copy of a process off from its original and from the world, so that what it does stays in it."""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import gc
import io
import mmap
import os
import shutil
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, dataloader

__all__ = ["can_be_sealed", "seal"]

# Files that are open for reading and writing are copied up to this size; larger ones can only be read.
_LARGEST_FILE = 64 * 2**20

# Shared memory is copied up to this size.
_MOST_SHARED = 4 * 2**30

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Major number of the kernel's own devices: null, zero, random numbers.
_MEMORY_DEVICES = 1

# Audit events of what would be seen outside of the process.
_SEEN_OUTSIDE = (
    *(f"os.{name}" for name in ("remove", "rename", "rmdir", "mkdir", "truncate", "link", "symlink", "chmod", "chown")),
    *(f"os.{name}" for name in ("utime", "setxattr", "removexattr", "system", "exec", "posix_spawn", "kill", "killpg")),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "sqlite3.connect"),
)


def can_be_sealed() -> bool:
    """Whether this system can copy a process and cut the copy off: Linux, with its ``/proc``."""
    return sys.platform == "linux" and hasattr(os, "fork") and Path("/proc/self/maps").exists()


def seal(keep: int, others_ran: bool) -> None:
    """Cut this process, a copy that has just been forked, off from everything that it shares with others.

    - Files open for reading are opened again at their place; files open for writing, pipes to the workers of data
      loaders, sockets and the standard streams are replaced.
    - Memory shared with other processes becomes this process's own, and with it tensors, counters and semaphores.
    - Files that are opened for writing from now on are copies in memory. Removing files, starting programs, signals to
      other processes and the network raise ``PermissionError``.
    - Data loaders load in this process, since their workers serve the original.
    - Locks that another thread held are free, since nobody is here to release them.

    What code in C writes to a file that it opens by itself is not prevented.

    Args:
        keep: A file descriptor to leave as it is.
        others_ran: Whether the original had other threads.

    Raises:
        OSError: If something shared can't be cut off.
    """
    _end_with_the_original()
    for descriptor in [int(each.name) for each in Path("/proc/self/fd").iterdir()]:
        if descriptor != keep:
            _replace(descriptor)
    _unshare_memory()
    if others_ran:
        _free_locks()
    _load_in_this_process()
    _PrivateFiles().install()


def _end_with_the_original() -> None:
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # short of memory, this one goes first
    except OSError:
        return


# ---- open files


def _replace(descriptor: int) -> None:
    try:
        status, flags = os.fstat(descriptor), fcntl.fcntl(descriptor, fcntl.F_GETFL)
    except OSError:  # the one that listed them
        return
    if stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) == _MEMORY_DEVICES:
        return
    replacement = _private(descriptor, status, flags & os.O_ACCMODE)
    os.dup2(replacement, descriptor, inheritable=os.get_inheritable(descriptor))
    os.close(replacement)


def _private(descriptor: int, status: os.stat_result, access: int) -> int:
    """A descriptor that reads the same, and shares neither place nor content."""
    if access == os.O_WRONLY or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return os.open(os.devnull, os.O_RDWR)
    try:
        private = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    except OSError:  # no longer allowed
        return os.open(os.devnull, os.O_RDWR)
    if access == os.O_RDWR and status.st_size <= _LARGEST_FILE:
        private = _in_memory(private)
    os.lseek(private, os.lseek(descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
    return private


def _in_memory(descriptor: int) -> int:
    """A copy of a file in memory, instead of the file."""
    copy = os.memfd_create("private")
    with open(descriptor, "rb") as source, open(copy, "wb", closefd=False) as target:
        shutil.copyfileobj(source, target)
    return copy


# ---- shared memory


class _Mapping(NamedTuple):
    """A line of ``/proc/self/maps``."""

    start: int
    size: int
    access: str
    offset: int
    path: str

    @property
    def is_shared(self) -> bool:
        """Whether others see what is written here; devices are left alone, and can't be used in a copy anyway."""
        is_device = self.path.startswith("/dev/") and not self.path.startswith(("/dev/shm/", "/dev/zero"))
        return self.access.endswith("s") and "w" in self.access and not is_device and "anon_inode" not in self.path

    @property
    def protection(self) -> int:
        bits = {"r": mmap.PROT_READ, "w": mmap.PROT_WRITE, "x": mmap.PROT_EXEC}
        return sum(bit for letter, bit in bits.items() if letter in self.access)


def _mappings() -> Iterator[_Mapping]:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, access, offset, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        yield _Mapping(start, end - start, access, int(offset, 16), path[0] if path else "")


def _unshare_memory() -> None:
    shared = [each for each in _mappings() if each.is_shared]
    unnamed = [each for each in shared if not _map_privately(each)]
    if (size := sum(each.size for each in unnamed)) > _MOST_SHARED:
        raise OSError(f"{size:,} bytes of shared memory are too many to copy")
    for each in unnamed:
        _copy_over(each)


def _map_privately(mapping: _Mapping) -> bool:
    """Map a file that still has a name again, copied only where it is written to."""
    try:
        descriptor = os.open(mapping.path, os.O_RDONLY)
    except (OSError, ValueError):
        return False
    try:
        _map(mapping.start, mapping.size, mapping.protection, mmap.MAP_PRIVATE | _FIXED, descriptor, mapping.offset)
    finally:
        os.close(descriptor)
    return True


def _copy_over(mapping: _Mapping) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    copy = _map(0, mapping.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    ctypes.memmove(copy, mapping.start, mapping.size)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    pointer, length = ctypes.c_void_p, ctypes.c_size_t
    moved = libc.mremap(
        pointer(copy), length(mapping.size), length(mapping.size), ctypes.c_int(_MOVE_TO), pointer(mapping.start)
    )
    if moved != mapping.start:
        raise OSError(ctypes.get_errno(), "shared memory can't be replaced")


def _map(start: int, size: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    ]
    address: int | None = libc.mmap(start, size, protection, flags, descriptor, offset)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "shared memory can't be mapped")
    return address


_FIXED = 0x10  # MAP_FIXED
_MOVE_TO = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED


# ---- threads and processes that are not here


def _free_locks() -> None:
    kinds = type(threading.Lock()), type(threading.RLock())
    for each in gc.get_objects():
        if type(each) in kinds:
            each._at_fork_reinit()


def _load_in_this_process() -> None:
    """Let iterators that wait for workers load the next batch by themselves."""

    def iterator(loader: Any) -> Any:
        loader.num_workers, loader.timeout = 0, 0
        return dataloader._SingleProcessDataLoaderIter(loader)

    def next_data(self: Any) -> Any:
        if "_own_fetcher" not in vars(self):
            self._own_fetcher = dataloader._DatasetKind.create_fetcher(
                self._dataset_kind, self._dataset, self._auto_collation, self._collate_fn, self._drop_last
            )
        return self._own_fetcher.fetch(self._next_index())

    DataLoader._get_iterator = iterator  # type: ignore[method-assign, assignment]
    dataloader._MultiProcessingDataLoaderIter._next_data = next_data  # type: ignore[method-assign]


# ---- files that are opened later


class _PrivateFiles:
    """Whatever is opened for writing is a copy in memory, and read from there again."""

    def __init__(self) -> None:
        self._copies: dict[str, int] = {}
        self._open, self._open_descriptor = io.open, os.open

    def install(self) -> None:
        """Open files by this class from now on, and refuse what else would be seen outside."""
        io.open = builtins.open = self.open
        os.open = self.open_descriptor
        writer = torch.serialization._open_zipfile_writer_file

        def write_zip(name: Any) -> Any:
            return writer(self._place(name, writes=True, keeps=False))

        torch.serialization._open_zipfile_writer_file = write_zip  # type: ignore[assignment, misc]
        sys.addaudithook(self._refuse)

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``open``."""
        if isinstance(file, int) or kwargs.get("opener") is not None:
            return self._open(file, mode, *args, **kwargs)
        place = self._place(file, writes=any(letter in mode for letter in "wax+"), keeps="w" not in mode)
        if "x" in mode:
            self._refuse_existing(file)
            mode = mode.replace("x", "w")
        return self._open(place, mode, *args, **kwargs)

    def open_descriptor(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """Stands in for ``os.open``."""
        if dir_fd is not None:
            return self._open_descriptor(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            return os.memfd_create("private")
        if flags & os.O_EXCL and flags & os.O_CREAT:
            self._refuse_existing(path)
        writes = bool(flags & _WRITING)
        if writes and not flags & os.O_CREAT and os.path.realpath(path) not in self._copies:
            Path(path).stat()  # raises, if it isn't there
        place = self._place(path, writes, keeps=not flags & os.O_TRUNC)
        if place is not path:
            flags &= ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        return self._open_descriptor(place, flags, mode)

    def _place(self, path: Any, writes: bool, keeps: bool) -> Any:
        """What to open instead of a file."""
        name = os.fsdecode(os.path.realpath(path))
        if name not in self._copies:
            if not writes or name.startswith("/proc/self/"):
                return path
            file = Path(name)
            if file.is_dir():
                return path
            if file.exists() and not file.is_file():
                return os.devnull
            existing = self._open_descriptor(name, os.O_RDONLY) if keeps and file.exists() else None
            self._copies[name] = os.memfd_create("private") if existing is None else _in_memory(existing)
        return f"/proc/self/fd/{self._copies[name]}"

    def _refuse_existing(self, path: Any) -> None:
        if os.fsdecode(os.path.realpath(path)) in self._copies or Path(path).exists():
            raise FileExistsError(f"{path} exists")

    def _refuse(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & _WRITING or isinstance(path, int):
                return
            if os.fsdecode(path).startswith(("/proc/", os.devnull)) or Path(path).is_dir():  # for temporary files
                return
        elif event not in _SEEN_OUTSIDE or (event == "os.kill" and args[0] == os.getpid()):
            return
        raise PermissionError(f"{event}{args} would be seen outside of the copy of the process")
