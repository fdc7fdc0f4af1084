"""The cause of a non-finite step: the batch is run once more, and the first thing that broke is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils import checkpoint

from stability_callbacks._names import plain_name
from stability_callbacks._validation import check_instance
from stability_callbacks.activations import ModuleStack, modules_by_name
from stability_callbacks.diagnosis._backward_trace import Break, first_break
from stability_callbacks.diagnosis._forward_trace import ForwardTrace
from stability_callbacks.diagnosis._isolation import isolated
from stability_callbacks.diagnosis._numeric_errors import numeric_fault, raising_line
from stability_callbacks.diagnosis._origin import Origin, Site
from stability_callbacks.diagnosis._values import describe, is_finite

__all__ = ["Cause", "find_cause"]


class Cause(NamedTuple):
    """The first thing that broke in a step.

    Args:
        reproduced: Whether the fault came up again. If not, only ``explanation`` has something to say.
        phase: Where it was: ``"input"``, the batch held a non-finite value; ``"parameter"``, ``"buffer"``, one of the
            model's did, before the forward pass or, for a buffer, because of it; ``"forward"``, an operation made one;
            ``"loss"``, the loss is not finite but no operation was seen to make it so; ``"backward"``, the forward pass
            is fine, and a gradient is not.
        module: Full name of the module; ``""`` is the model itself, with all that ran outside of its submodules.
        module_type: The module's class.
        operation: The operation, such as ``"log"``, or the node of the backward pass, such as ``"SqrtBackward0"``.
        source: The user's line of code, as ``"model.py:42 in forward: `y = x.log()`"``.
        explanation: All of it in words, with the numbers that tell why.
        reason: Why the operation broke, in a word for machines: ``"overflow"``, ``"overflow_float16"`` (of float16 and
            smaller types), ``"precision"``, ``"pole"``, ``"domain"``, ``"empty"``, ``"one_element"``, ``"masked_row"``,
            ``"nonfinite_input"``, ``"equal_values"``, ``"singular"``, ``"alignment"`` or ``"unset_memory"``; None where
            it can't be told, or an older version wrote it.
    """

    reproduced: bool
    phase: str | None
    module: str | None
    module_type: str | None
    operation: str | None
    source: str | None
    explanation: str
    reason: str | None = None

    @classmethod
    def not_found(cls, explanation: str) -> Cause:
        """That nothing was found, and why."""
        return cls(False, None, None, None, None, None, explanation)


def find_cause(model: nn.Module, run: Callable[[], Tensor | None], batch: Any = None) -> Cause:
    """Run the offending batch once more and name the first thing that broke; nothing else changes.

    In the forward pass each operation is watched. One that makes NaN or infinity from finite inputs is the producer,
    those after it pass it on; only what reaches the loss counts, so a ``log(0)`` that a ``where`` throws away is not
    blamed. Infinities that are written on purpose, as attention masks are, be they written by an operation or held by a
    buffer or the batch, are no fault by themselves: if NaN is made of them, as by the softmax of a row that is masked
    entirely, the operation that makes it is named. If the loss is finite, the gradients are computed in the same way,
    and the first node of the backward pass is named whose non-finite gradients reach a parameter. If that node worked
    with values that were not finite, which something hid from the loss, it is not to blame: the origin of those values
    is named instead.

    An overflow is told from a pole, such as ``log(0)``, by running the operation once more in float64.

    It costs several forward passes and waits for the device at each operation, and needs memory for one more set of
    gradients. Models compiled by ``torch.compile`` run eagerly. If several processes train together, all have to call
    it. The run takes place in :func:`isolated`; wrap the call in ``isolated(model, rng)`` to give the run the random
    state that the step had.

    Args:
        model: The model that trains.
        run: Computes the loss of the batch, as the training step does: under autocast if there, multiplied by the loss
            scale if that matters. It must not step an optimizer.
        batch: The batch, of any nesting, to look for non-finite values in it. Default None: unknown.

    Returns:
        The cause. If the fault does not come up again ``reproduced`` is False and the explanation says so. An exception
        that ``run`` raises ends the search, but not training: the cause is then what was not finite before it, or the
        line that raised it if it is about numbers.

    Raises:
        TypeError: If ``model`` is not a module, or ``run`` cannot be called.

    Example:
        >>> class Log(nn.Module):
        ...     def forward(self, x):
        ...         return x.log()
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Log())
        >>> batch = -torch.ones(3, 2)
        >>> _ = [nn.init.ones_(each) for each in model.parameters()]
        >>> cause = find_cause(model, lambda: model(batch).mean(), batch)
        >>> cause.phase, cause.module, cause.module_type, cause.operation
        ('forward', '2', 'Log', 'log')
        >>> print(cause.explanation)
        log made 6 -inf in 6 values (log of 6 values <= 0) in module '2' (Log)
    """
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    if not callable(run):
        raise TypeError(f"`run` must be a function that computes the loss, got {run!r} of type {type(run).__name__}")
    modules = ModuleStack(model)
    with isolated(model), torch.inference_mode(False), torch.enable_grad(), _eager():
        trace = ForwardTrace(modules, batch, stop=__name__)
        try:
            with modules.watching(), trace:
                loss = run()
            return _verdict(model, trace, loss)
        except Exception as error:  # noqa: BLE001  # the user's code may raise anything; training goes on
            return _failed(model, trace, error)


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled code as it was written, and let checkpoints be differentiated without touching ``.grad``."""
    reentrant = checkpoint.CheckpointFunction
    with torch.compiler.set_stance("force_eager"):
        checkpoint.CheckpointFunction = _NonReentrantCheckpoint  # type: ignore[misc, assignment]
        try:
            yield
        finally:
            checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


class _NonReentrantCheckpoint:
    """Stands in for the reentrant checkpoint, which only ``backward`` can differentiate."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _verdict(model: nn.Module, trace: ForwardTrace, loss: Tensor | None) -> Cause:
    """Judge what the second run has shown."""
    cause = None if loss is None else _cause_in_gradients_or_loss(model, trace, loss)
    if cause is not None:
        return cause
    for name, origin in trace.spoiled_buffers():
        return _cause_of_spoiled_buffer(model, name, origin)
    fault = trace.fault_before()
    if fault is not None:
        return _cause_of(model, fault, "; it reached neither the loss nor a gradient")
    outcome = "gave no loss" if loss is None else "gave a finite loss and finite gradients"
    return Cause.not_found(
        f"The second run {outcome}. The fault may have come from another process, a kernel that is not deterministic,"
        " the hardware, a loss scale that was too large, gradients summed over several batches, or randomness or state"
        " that the second run did not share."
    )


def _cause_in_gradients_or_loss(model: nn.Module, trace: ForwardTrace, loss: Tensor) -> Cause | None:
    finite = is_finite(loss)
    # Where several processes train together, all of them go backward: there may be collectives on the way.
    together = distributed.is_available() and distributed.is_initialized()
    parameters = [(plain_name(name, model), parameter) for name, parameter in model.named_parameters()]
    broken = first_break(loss, parameters, trace.origin_of_operands) if finite or together else None
    if not finite:
        origin = trace.origin_of(loss)
        return _unexplained_loss(loss) if origin is None else _cause_of(model, trace.explained(origin))
    return None if broken is None else _cause_of_break(model, trace, broken)


def _cause_of(model: nn.Module, origin: Origin, addition: str = "") -> Cause:
    if origin.phase == "input":
        return Cause(True, "input", None, None, None, None, origin.what + addition)
    if origin.site is None:
        return _cause(model, origin.phase, Site(_owner(origin.name), None), None, origin.what, addition)
    return _cause(model, "forward", origin.site, origin.name, origin.what, addition, origin.reason)


def _cause_of_break(model: nn.Module, trace: ForwardTrace, broken: Break) -> Cause:
    if broken.parameter is not None:
        site = Site(_owner(broken.parameter), None)
    else:
        site = trace.site_of(broken.sequence_number, broken.node) or Site("", None)
    origin = None if broken.origin is None else trace.explained(broken.origin)
    if origin is None:
        return _cause(model, "backward", site, broken.node, broken.what, "", broken.reason)
    if not origin.intended or origin.phase == "input":
        addition = f"; the loss hid it, but the gradient of {broken.node} did not{_in_words(model, site)}"
        return _cause_of(model, origin, addition)
    # A mask of infinities is as it was meant: what multiplies it by a gradient of 0 is to blame.
    return _cause(model, "backward", site, broken.node, f"{broken.what}; {origin.what}", "", "nonfinite_input")


def _cause_of_spoiled_buffer(model: nn.Module, name: str, origin: Origin | None) -> Cause:
    what = f"the forward pass made {name} non-finite" + (f": {origin.what}" if origin else "")
    site = origin.site if origin else None
    operation, reason = (origin.name, origin.reason) if origin and site else (None, None)
    return _cause(model, "buffer", site or Site(_owner(name), None), operation, what, "", reason)


def _cause(
    model: nn.Module,
    phase: str,
    site: Site,
    operation: str | None,
    what: str,
    addition: str = "",
    reason: str | None = None,
) -> Cause:
    kind = type(modules_by_name(model)[site.module]).__name__
    source = None if site.line is None else str(site.line)
    explanation = f"{what}{_in_words(model, site)}{addition}"
    return Cause(True, phase, site.module, kind, operation, source, explanation, reason)


def _in_words(model: nn.Module, site: Site) -> str:
    kind = type(modules_by_name(model)[site.module]).__name__
    where = f"in module '{site.module}' ({kind})" if site.module else f"in {kind} itself, outside of its submodules"
    return f" {where}" + ("" if site.line is None else f", at {site.line}")


def _unexplained_loss(loss: Tensor) -> Cause:
    what = f"the loss holds {describe(loss)}, and no operation was seen to make it so: it came from outside of PyTorch"
    return Cause(True, "loss", None, None, None, None, what)


def _failed(model: nn.Module, trace: ForwardTrace, error: Exception) -> Cause:
    """Judge a second run that raised: by the fault that was there before, or by what the exception says of numbers."""
    first_line = str(error).partition("\n")[0]
    text = f"the second run failed with {type(error).__name__}: {first_line}"
    fault = trace.fault_before() or trace.first_made
    if fault is not None:
        return _cause_of(model, fault, f"; {text}")
    if numeric_fault(error) is None:
        return Cause.not_found(text)
    last = trace.last_operation or ("", Site("", None))
    said = re.match(r"(?:torch\.)?((?:linalg\.)?\w+): ", first_line)
    site = Site(last[1].module, raising_line(error))
    return _cause(model, "forward", site, said[1] if said else last[0], "")._replace(explanation=text)


def _owner(name: str) -> str:
    """Full name of the module that a parameter or buffer belongs to."""
    return name.rpartition(".")[0]
