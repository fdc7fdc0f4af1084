"""Running code in a copy of the process, so that nothing it does can be seen here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from stability_callbacks.diagnosis._sealed import can_be_sealed, seal
from stability_callbacks.snapshots import RandomState

__all__ = ["TIMEOUT", "Failure", "in_a_line", "run_in_fork"]

T = TypeVar("T")

TIMEOUT = 300.0
"""Seconds. Other processes of a distributed run wait meanwhile, and NCCL gives up after 600."""


class Failure(NamedTuple):
    """Why work in a copy of the process has no result.

    Args:
        reason: In words.
        started: Whether it was begun at all.
        timed_out: Whether it did not end in time.
    """

    reason: str
    started: bool = True
    timed_out: bool = False

    def __str__(self) -> str:
        return f"the search failed: {self.reason}" if self.started else f"not looked for: {self.reason}"


def in_a_line(error: BaseException) -> str:
    """An exception's class and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def run_in_fork(work: Callable[[], T], timeout: float = TIMEOUT) -> T | Failure:
    """Run code in a copy of this process, and give its result; whatever else it does is lost with the copy.

    Reach for it to run a user's code once more in the middle of training: modules, iterators, generators, globals and
    objects of any kind are the copy's own, and so are shared memory and what is written to files, see
    :func:`~stability_callbacks.diagnosis._sealed.seal`. The copy costs what a ``fork`` costs, and memory only for what
    the work writes to. It has one thread, and no accelerator.

    Args:
        work: The code. Its result is pickled, so it should be made of plain values.
        timeout: Seconds after which the copy is ended. Default 300.

    Returns:
        The result, or a :class:`Failure` if the system can't copy a process, or the work raises, crashes or does not
        end in time. Only interrupts of this process raise.

    Example:
        >>> numbers = iter([1, 2, 3])
        >>> run_in_fork(lambda: next(numbers) * 10)
        10
        >>> next(numbers)
        1
        >>> str(run_in_fork(lambda: 1 // 0))
        'the search failed: ZeroDivisionError: integer division or modulo by zero'
    """
    if not can_be_sealed():
        return Failure("this system can't copy a process; replay the bundle", started=False)
    random_state = RandomState.capture()
    others_ran = len(sys._current_frames()) > 1
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver:
        try:
            pid = _fork()
        except OSError as error:
            sender.close()
            return Failure(f"the process can't be copied ({error})", started=False)
        if pid == 0:
            _run_and_exit(work, sender, random_state, others_ran)
        try:
            sender.close()
            result: T | Failure = _received(receiver, pid, timeout)
            return result
        finally:
            _end(pid)


def _fork() -> int:
    # Python 3.12 warns of other threads, and so do libraries; what they may have left locked is seen to.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


# ---- in the copy


def _run_and_exit(work: Callable[[], Any], sender: Connection, random_state: RandomState, others_ran: bool) -> NoReturn:
    """Do the work, send what came of it, and end without any of the cleaning up that is the original's business."""

    def sealed_off() -> Any:
        gc.disable()
        _restore_signals()
        seal(keep=sender.fileno(), others_ran=others_ran)
        gc.freeze()  # garbage of the original may hold files and processes, which its finalizers would end
        gc.enable()
        torch.set_num_threads(1)  # the other threads of a pool are not here
        random_state._replace(cuda=()).restore()  # Python seeds its generator anew in a copy
        return work()

    try:
        sender.send_bytes(_pickled(sealed_off))
    finally:
        os._exit(0)


def _pickled(work: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(work())
    except BaseException as error:  # noqa: BLE001  # the original must hear of it, and go on
        return pickle.dumps(Failure(in_a_line(error)))


def _restore_signals() -> None:
    os.setsid()  # an interrupt from the terminal is for the original; what is started here ends with this process
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)


# ---- in the original


def _received(receiver: Connection, pid: int, timeout: float) -> Any:
    if not receiver.poll(timeout):
        return Failure(f"it did not end within {timeout:g} s", timed_out=True)
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return Failure(f"the copy of the process {_ending(pid)}")
    except Exception as error:  # noqa: BLE001  # a class that only the copy knew
        return Failure(f"its result can't be read ({type(error).__name__}: {error})")


def _ending(pid: int) -> str:
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is reaped later, since its id must stay its own
    except ChildProcessError:  # somebody else reaps all children
        return "ended"
    if ended is None or ended.si_code == os.CLD_EXITED:
        return f"ended with exit code {ended.si_status if ended else 0}"
    return f"was ended by {signal.Signals(ended.si_status).name}"


def _end(pid: int) -> None:
    """End the copy and what it started, and leave no zombie."""
    for end in (os.killpg, os.kill):  # it may not have become the leader of a group yet
        try:
            end(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return
