"""An incident once more, from its bundle: without a trainer, and without the run that it happened in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn

from stability_callbacks.diagnosis import Bundle, Cause, find_cause, isolated
from stability_callbacks.engine import loss_of
from stability_callbacks.engine._lightning import attached_trainer, both
from stability_callbacks.gradient_pass import measure_gradients

__all__ = ["Replay", "ReplayError", "build_model", "import_factory", "replay"]

# Another device and other kernels round otherwise; half precision differs by about as much.
_TOLERANCE = 0.02


class ReplayError(RuntimeError):
    """A bundle can't be run again like this. The message says what to change."""


class Replay(NamedTuple):
    """What came of running a step once more.

    Attributes:
        reproduced: Whether what the record tells was reproduced.
        verdict: The same in words.
        found: The cause that was found; None for a step whose numbers were finite.
        numbers: For such a step, the loss and the gradient norm as recorded and as they are now.
    """

    reproduced: bool
    verdict: str
    found: Cause | None
    numbers: dict[str, tuple[float, float]]


def import_factory(name: str) -> Callable[..., nn.Module]:
    """Import what builds the model.

    Args:
        name: ``"package.module:Class"``, or a function instead of the class.

    Returns:
        It.

    Raises:
        ReplayError: If the name has another form, or can't be imported.
    """
    module, separator, attribute = name.partition(":")
    if not (module and separator and attribute):
        raise ReplayError(f"--model must be of the form package.module:Class, got {name!r}")
    if module == "__main__":
        raise ReplayError(
            f"{name} was defined in the script that was run, and here that is another program. Give the script's own "
            f"name: of train.py, --model train:{attribute}. It is imported, so its training must stand under "
            'if __name__ == "__main__".'
        )
    try:
        factory = attrgetter(attribute)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise ReplayError(f"can't import {name}: {error}. The working directory is searched too.") from error
    if not callable(factory):
        raise ReplayError(f"{name} must be a class or a function that builds the model, got {factory!r}")
    return factory  # type: ignore[no-any-return]


def build_model(
    factory: Callable[..., Any], bundle: Bundle, arguments: Mapping[str, Any] | None = None
) -> pl.LightningModule | nn.Module:
    """Build the model as it was when the bundle was written, with its weights.

    Args:
        factory: The model's class, or a function that builds it.
        bundle: The bundle.
        arguments: Arguments by name. Default: those of the recorded hyper-parameters that ``factory`` takes.

    Returns:
        The model, on the CPU.

    Raises:
        ReplayError: If the model can't be built, has no ``training_step``, or the weights do not fit.
    """
    if bundle.weights is None:
        why = bundle.meta.get("without_weights") or "FlightRecorder(save_batch=True) keeps them, if there is room"
        raise ReplayError(f"{bundle.path} holds no weights: {why}")
    if arguments is None:
        arguments = _fitting_hyper_parameters(factory, bundle)
    try:
        model = factory(**arguments)
    except Exception as error:
        raise ReplayError(f"building the model failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module) or not hasattr(model, "training_step"):
        raise ReplayError(f"the model must be a module with a training_step, got a {type(model).__name__}")
    if isinstance(model, both(pl.LightningModule)):
        model.trainer = _RecordedTrainer(bundle)  # type: ignore[assignment]
        model.configure_model()
    model = _precision(bundle, "cpu").convert_module(model)
    try:
        model.load_state_dict(bundle.weights, strict=True)
    except Exception as error:  # a model's own `_load_from_state_dict` may raise anything
        raise ReplayError(
            f"the weights in the bundle do not fit the model: {error}\nIf its size depends on arguments, give them by "
            "--model-args; if layers are made in `setup`, give a function as --model that makes them."
        ) from error
    return model


def replay(bundle: Bundle, model: nn.Module, device: str = "cpu") -> Replay:
    """Run the step of an incident once more and compare what happens with the record.

    Of a step that was not finite the cause is looked for again, see :func:`~stability_callbacks.diagnosis.find_cause`.
    Of one that was, such as a spike, loss and gradient norm are compared. Micro-batches come in their order, under the
    recorded precision's autocast; the first one gets the recorded random state.

    Args:
        bundle: The bundle, with its tensors.
        model: The model with the weights of the bundle.
        device: Where to run.

    Returns:
        What came of it.

    Raises:
        ReplayError: If the bundle holds no batch, or the model needs a trainer.
    """
    if not bundle.batches:
        raise ReplayError(f"{bundle.path} holds no batch: FlightRecorder(save_batch=True) keeps them")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter is how torch says that it was built without CUDA
        raise ReplayError(f"can't run on {device!r}: {error}") from error
    precision = _precision(bundle, device)

    def run(batch: Any, batch_idx: int) -> Tensor | None:
        with precision.train_step_context():
            return loss_of(model, batch, batch_idx)

    batches = [move_data_to_device(batch, torch.device(device)) for batch in bundle.batches]
    indices = _batch_indices(bundle)
    runs = [partial(run, batch, index) for batch, index in zip(batches, indices, strict=True)]
    recorded = _finite_numbers(bundle)
    with isolated(model, bundle.random_state):
        if recorded:
            return _compare_numbers(recorded, _loss_and_norm(model, runs))
        found = _first_cause(model, runs, batches)
    if not found.reproduced and (refused := _refused_by_trainer(model)):
        raise ReplayError(
            f"training_step asks its trainer for {refused}, and a replay has none: it knows `global_step`, "
            "`current_epoch` and a logger that keeps nothing. Give a function as --model whose model does without."
        )
    return _compare_causes(bundle.cause, found)


class _RecordedTrainer:
    """What a model may know of its trainer: where it was, and loggers that keep nothing."""

    def __init__(self, bundle: Bundle) -> None:
        self.global_step, self.current_epoch = bundle.incident.step, bundle.incident.epoch
        self.global_rank, self.local_rank, self.world_size, self.is_global_zero = 0, 0, 1, True
        self.training, self.sanity_checking, self.precision = True, False, bundle.meta.get("precision", "32-true")
        self.logger = DummyLogger()
        self.loggers = [self.logger]
        self.refused: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # those are asked for by Python itself
            self.refused.append(name)
        raise AttributeError(f"a replay has no trainer, and can't tell its {name!r}")


def _refused_by_trainer(model: nn.Module) -> str:
    trainer = attached_trainer(model)
    return ", ".join(f"`{name}`" for name in dict.fromkeys(trainer.refused)) if trainer is not None else ""


def _fitting_hyper_parameters(factory: Callable[..., Any], bundle: Bundle) -> dict[str, Any]:
    known: dict[str, Any] = bundle.meta.get("hyper_parameters") or {}
    if not isinstance(known, dict):
        raise ReplayError(f"{bundle.path / 'meta.json'}: hyper_parameters must be an object, got {known!r}")
    parameters = inspect.signature(factory).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return known
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    missing = [each.name for each in named if each.default is each.empty and each.name not in known]
    if missing:
        raise ReplayError(
            f"the model needs {', '.join(missing)}, and the bundle does not tell: save_hyperparameters() would keep "
            "what JSON can hold. Give --model-args, or a function as --model that builds the model without arguments."
        )
    return {each.name: known[each.name] for each in named if each.name in known}


def _precision(bundle: Bundle, device: str) -> Precision:
    name = bundle.meta.get("precision", "32-true")
    if name in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(name, torch.device(device).type)
    if name in ("16-true", "bf16-true"):
        return HalfPrecision(name)
    if name not in ("32-true", "64-true"):
        raise ReplayError(f"the run's precision was {name!r}, which can't be replayed")
    return DoublePrecision() if name == "64-true" else Precision()


def _batch_indices(bundle: Bundle) -> list[int]:
    indices = bundle.meta.get("batch_indices") or [bundle.incident.batch_idx] * len(bundle.batches or [])
    if not isinstance(indices, list) or len(indices) != len(bundle.batches or []):
        raise ReplayError(
            f"{bundle.path / 'meta.json'}: batch_indices must have one number for each of "
            f"{len(bundle.batches or [])} micro-batches, got {indices!r}"
        )
    return indices


def _finite_numbers(bundle: Bundle) -> dict[str, float]:
    """Loss and gradient norm of a step that nothing but its numbers sets apart; empty if one is not finite."""
    if bundle.cause is not None and bundle.cause.reproduced:
        return {}
    values = {name: bundle.incident.evidence.get(name) for name in ("loss", "grad_norm")}
    finite = {name: each for name, each in values.items() if isinstance(each, float) and math.isfinite(each)}
    return finite if len(finite) == len(values) else {}


def _first_cause(model: nn.Module, runs: Sequence[Callable[[], Tensor | None]], batches: Sequence[Any]) -> Cause:
    for place, (run, batch) in enumerate(zip(runs, batches, strict=True), start=1):
        cause = find_cause(model, run, batch)
        if cause.reproduced or place == len(runs):
            break
        _try(run)  # so that the next one finds random states and buffers as this one leaves them
    return cause


def _loss_and_norm(model: nn.Module, runs: Sequence[Callable[[], Tensor | None]]) -> dict[str, float]:
    """The mean loss, and the norm of its gradient."""
    total = 0.0
    for run in runs:
        loss = _try(run)
        if loss is not None:
            (loss / len(runs)).backward()
            total += float(loss.detach()) / len(runs)
    return {"loss": total, "grad_norm": float(measure_gradients(model.named_parameters()).total)}


def _try(run: Callable[[], Tensor | None]) -> Tensor | None:
    try:
        return run()
    except Exception as error:
        raise ReplayError(f"training_step failed with {type(error).__name__}: {error}") from error


def _compare_numbers(recorded: Mapping[str, float], now: Mapping[str, float]) -> Replay:
    same = all(math.isclose(recorded[name], now[name], rel_tol=_TOLERANCE) for name in recorded)
    verdict = "Loss and gradient norm are those on record." if same else "They are not those on record."
    return Replay(same, verdict, None, {name: (recorded[name], now[name]) for name in recorded})


def _compare_causes(recorded: Cause | None, found: Cause) -> Replay:
    if not found.reproduced:
        return Replay(False, "The fault was not reproduced.", found, {})
    if recorded is None or not recorded.reproduced:
        return Replay(True, "The fault was reproduced. The record has no cause to compare it with.", found, {})
    same = (recorded.phase, recorded.module, recorded.operation) == (found.phase, found.module, found.operation)
    verdict = "This is the cause on record." if same else f"The cause on record is another: {recorded.explanation}"
    return Replay(same, verdict, found, {})
