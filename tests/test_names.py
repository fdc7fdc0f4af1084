"""Names without the segments of wrappers, the same wherever they are shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from stability_callbacks import GradientMonitor
from stability_callbacks._names import plain_name
from stability_callbacks.diagnosis import find_cause
from stability_callbacks.initialization import signal_report
from tests.models import MemoryLogger, NormNet, fit, make_batches


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("net._orig_mod.0.weight", "net.0.weight"),
        ("_orig_mod", ""),
        ("", ""),
        ("a._checkpoint_wrapped_module.b", "a.b"),
        ("_fsdp_wrapped_module._orig_mod.a", "a"),
        ("_forward_module.net.0", "net.0"),
        ("my_orig_mod_x.weight", "my_orig_mod_x.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module.weight", "module.weight"),
    ],
)
def test_whole_segments_of_wrappers_go(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_a_segment_module_goes_only_where_it_is_the_wrappers() -> None:
    inner = nn.ModuleDict({"module": nn.DataParallel(nn.Linear(2, 2))})
    names = [name for name, _ in inner.named_parameters()]
    assert [plain_name(name, inner) for name in names] == ["module.weight", "module.bias"]
    outer = nn.DataParallel(inner)
    assert {plain_name(name, outer) for name, _ in outer.named_modules()} == {"", "module"}


class Breaking(nn.Module):
    """A layer whose output is not finite once it is told to break."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.breaks = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return (out * 0).log() if self.breaks else out


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, nn.DataParallel], ids=["checkpointed", "data parallel"])
@pytest.mark.parametrize(("name", "phase"), [("1.weight", "parameter"), ("1.running_var", "buffer")])
def test_a_cause_names_a_wrapped_parameter_or_buffer_plainly(wrap: Any, name: str, phase: str) -> None:
    norm = nn.BatchNorm1d(2).eval()
    getattr(norm, name.partition(".")[2]).data[0] = float("nan")
    model = nn.Sequential(nn.Linear(2, 2), wrap(norm))
    cause = find_cause(model, lambda: model(torch.ones(2, 2)).sum())
    assert (cause.phase, cause.module, cause.module_type) == (phase, "1", "BatchNorm1d")
    assert cause.explanation.startswith(f"{name} held 1 NaN")


WRAPPERS: dict[str, Any] = {
    "plain": lambda module: module,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "both": lambda module: torch.compile(checkpoint_wrapper(module), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_module_has_one_name_in_a_cause_a_report_and_a_metric(wrap: Any) -> None:
    breaking, model = Breaking(), NormNet()
    model.net.insert(0, wrap(breaking))
    batches, logger = make_batches(2), MemoryLogger()
    fit(model, batches, [GradientMonitor(per="layer")], logger=logger, log_every_n_steps=1)
    metrics = {name for name in logger.names() if name.startswith("grad_norm/net.0")}
    assert metrics == {"grad_norm/net.0.layer"}
    report = signal_report(model, batches[0], lambda model, batch: model.loss(batch))
    assert [row.name for row in report][:2] == ["net.0.layer", "net.1"]
    breaking.breaks = True
    cause = find_cause(model, lambda: model.loss(batches[0]))
    assert (cause.module, cause.module_type, cause.operation) == ("net.0", "Breaking", "log")
