"""What a user writes: policies and a kind of finding of their own, that keep the laws and show wherever ours show.

No file of the package is touched for them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from stability_callbacks import FlightRecorder, GradientClipping, Initialization, LRSchedule, StepGuard
from stability_callbacks.clipping import ClipResult, ClipRule
from stability_callbacks.detection import Detector, StepEvidence
from stability_callbacks.diagnosis import Kind, kind_of, register_kind
from stability_callbacks.gradient_pass import GradientNorms, Parameters, named_gradients, scale_gradients_
from stability_callbacks.initialization import Policy, Role, constant
from stability_callbacks.report import write_report
from stability_callbacks.schedules import Schedule
from tests.contracts.clipping import CLIP_RULES
from tests.contracts.contract import Contract, Law, Make
from tests.contracts.detection import DETECTORS
from tests.contracts.initialization import POLICIES
from tests.contracts.schedules import SCHEDULES
from tests.models import NormNet, fit, make_batches

LEAP = register_kind(Kind("loss_leap", severity="warning", precedence=30, bundled=True, color="#123456"))


class ClipToLast(ClipRule):
    """Clips to a multiple of the last usable norm, as it was after clipping."""

    linear: ClassVar[bool] = True

    def __init__(self, factor: float = 1.5) -> None:
        self.factor = factor
        self._last: Tensor | None = None
        self._threshold: Tensor | None = None

    @property
    def threshold(self) -> Tensor | None:
        return self._threshold

    @torch.no_grad()
    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        pairs = named_gradients(parameters)
        norm = self.measure(pairs, norms).total
        last = torch.full_like(norm, torch.nan) if self._last is None else self._last.to(norm)
        usable = torch.isfinite(norm) & (norm > 0)
        self._threshold = torch.where(last.isnan(), torch.inf, self.factor * last)
        coefficient = torch.where(usable, (self._threshold / norm).clamp(max=1.0), 1.0)
        scale_gradients_(pairs, coefficient)
        self._last = torch.where(usable, norm * coefficient, last)
        return ClipResult(norm, norm * coefficient, coefficient)

    def state_dict(self) -> dict[str, Any]:
        known = self._last is not None and not self._last.isnan()
        return {"last": self._last.clone()} if known and self._last is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = state_dict["last"].clone() if "last" in state_dict else None


class LossLeap(Detector):
    """Votes against a loss far above the last accepted one."""

    kind: ClassVar[str] = LEAP.name
    compares_losses: ClassVar[bool] = True

    def __init__(self, factor: float = 20.0) -> None:
        self.factor = factor
        self._last = torch.tensor(torch.nan)

    def __call__(self, evidence: StepEvidence) -> Tensor:
        device = evidence.gradients.total.device
        loss = torch.tensor(torch.nan) if evidence.loss is None else evidence.loss.detach()
        return loss.to(device) > self.factor * self._last.to(device)

    def update(self, evidence: StepEvidence, accepted: Tensor) -> None:
        if evidence.loss is None or not evidence.gradients.names:
            return
        loss = evidence.loss.detach().to(accepted.device, torch.float32)
        self._last = torch.where(accepted & torch.isfinite(loss), loss, self._last.to(accepted.device))

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = state_dict["last"].clone()


class Staircase(Schedule):
    """Halves at equal distances."""

    def __init__(self, every: int = 6) -> None:
        self.every = every

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        return 0.5 ** (step // self.every)


class Biases(Policy):
    """Writes biases only."""

    def __init__(self, value: float = 0.01) -> None:
        self.value = value

    def rule(self, param: Any, call_graph: Any) -> Any:
        return constant(self.value) if param.role is Role.BIAS else None


OWN: list[tuple[Contract[Any], Callable[[], Any]]] = [
    (CLIP_RULES, ClipToLast),
    (DETECTORS, LossLeap),
    (SCHEDULES, Staircase),
    (POLICIES, Biases),
]
CASES = [(law, make) for contract, make in OWN for law in contract.laws]


@pytest.mark.parametrize(("law", "make"), CASES, ids=[f"{law.__name__}-{make.__name__}" for law, make in CASES])
def test_they_keep_the_laws(law: Law[Any], make: Make[Any]) -> None:
    law(make)


SPIKE, RATE = 7, 0.05


class Leaping(NormNet):
    """A network whose loss leaps once, a hundredfold."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (100.0 if self.global_step == SPIKE else 1.0)


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short run with all of them left behind."""
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    logger = CSVLogger(directory)
    callbacks = [
        Initialization(Biases()),
        LRSchedule(Staircase(every=5)),
        GradientClipping(ClipToLast(factor=1.05)),
        StepGuard([LossLeap()]),
        FlightRecorder(),
    ]
    fit(Leaping(), make_batches(12), callbacks, logger=logger)
    return Path(logger.log_dir)


def column(log_dir: Path, name: str) -> list[float]:
    """The values of a metric, by step."""
    with (log_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for row in rows if row.get(name)]


def test_the_schedule_shows_in_the_logged_rate(log_dir: Path) -> None:
    expected = [RATE * 0.5 ** (step // 5) for step in range(12)]
    assert column(log_dir, "lr/SGD") == pytest.approx(expected)


def test_the_clip_rule_shows_in_the_logged_threshold_and_norm(log_dir: Path) -> None:
    thresholds, coefficients = (
        column(log_dir, "stability/clip_threshold"),
        column(log_dir, "stability/clip_coefficient"),
    )
    assert len(thresholds) == len(coefficients) == 11  # of twelve steps, one is skipped
    assert thresholds[0] == float("inf")
    assert all(threshold < float("inf") for threshold in thresholds[1:])
    assert 0 < min(coefficients) < 1
    assert max(coefficients) == 1


def test_the_detector_shows_in_the_logged_counts_under_its_kind(log_dir: Path) -> None:
    assert column(log_dir, "stability/skipped_steps")[-1] == 1
    assert column(log_dir, f"stability/incidents/{LEAP.name}")[-1] == 1


def test_the_kind_stands_in_the_record(log_dir: Path) -> None:
    lines = (log_dir / "flight_record" / "incidents.jsonl").read_text().splitlines()
    [incident] = [json.loads(line) for line in lines]
    assert (incident["kind"], incident["step"], incident["action"]) == (LEAP.name, SPIKE, "skipped")
    assert kind_of(incident["kind"]) is LEAP


def test_the_kind_stands_on_the_page(log_dir: Path, tmp_path: Path) -> None:
    page = write_report(log_dir, tmp_path / "report.html").read_text()
    assert page.count(LEAP.name) >= 2  # in the summary, and in the table of incidents
