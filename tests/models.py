"""Small models and loaders that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from stability_callbacks.clipping import ClipResult, NormClip
from stability_callbacks.gradient_pass import GradientNorms, Parameters, measure_gradients

OptimizerFactory = Callable[[Any], Optimizer]


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


class TinyModel(pl.LightningModule):
    """Base: automatic optimization with an optimizer that the test chooses."""

    def __init__(self, optimizer: OptimizerFactory = sgd) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class NormNet(TinyModel):
    """A network with batch normalization: float and integer buffers."""

    def __init__(self, optimizer: OptimizerFactory = sgd) -> None:
        super().__init__(optimizer)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)


class EvaluatedNet(NormNet):
    """The same with all that a trainer may ask for besides training."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class SparseNet(TinyModel):
    """An embedding with sparse gradients, and a 0-dim parameter."""

    def __init__(self, optimizer: OptimizerFactory = sgd) -> None:
        super().__init__(optimizer)
        self.embedding = nn.Embedding(16, 8, sparse=True)
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.ones(()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        tokens = x.nan_to_num(0.0, 0.0, 0.0).abs().mul(5).long().clamp(max=15)
        # The poison of a bad batch comes in by a factor, since tokens can't be NaN.
        poison = (x * 0).sum()
        return nn.functional.cross_entropy(self.head(self.embedding(tokens).mean(1)) * self.temperature + poison, y)


class TiedNet(TinyModel):
    """Two layers that share one weight, a frozen one, and one that the loss does not use."""

    def __init__(self, optimizer: OptimizerFactory = sgd) -> None:
        super().__init__(optimizer)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.second(self.frozen(self.first(x)).tanh())), y)


MODELS: dict[str, type[TinyModel]] = {"batch_norm": NormNet, "sparse": SparseNet, "tied": TiedNet}


class BufferNet(TinyModel):
    """A network that shields its loss from bad inputs, but not its buffer."""

    def __init__(self, optimizer: OptimizerFactory = sgd) -> None:
        super().__init__(optimizer)
        self.net = nn.Linear(4, 3)
        self.register_buffer("input_mean", torch.zeros(4))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        if self.training:
            self.input_mean.lerp_(x.mean(0), 0.1)
        return nn.functional.cross_entropy(self.net(x.nan_to_num(0.0, 0.0, 0.0)), y)


class LossNet(BufferNet):
    """A network whose loss alone bears the mark of a bad input: gradients and buffers stay finite."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return super().loss((x.nan_to_num(0.0, 0.0, 0.0), y)) + (0 * x).sum().detach()


class Silent(pl.LightningModule):
    """Reads no tensor itself, so that whatever is read is read by others."""

    def __init__(self, optimizer: OptimizerFactory) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class TwoOptimizers(pl.LightningModule):
    """Manual optimization: two networks, each with its optimizer, stepped in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.two = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer, net in zip(self.optimizers(), (self.one, self.two), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.one.parameters(), lr=0.1, momentum=0.9),
            torch.optim.SGD(self.two.parameters(), lr=0.2),
        ]


class ResumableLoader:
    """A loader whose place in the epoch can be saved, as Lightning asks for an exact resume.

    Args:
        batches: The batches of an epoch, in order.
    """

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self._next = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        for index in range(start, len(self.batches)):
            self._next = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._start = state_dict["next"] % len(self.batches)


class AverageClip(NormClip):
    """A rule with a memory: clips to the average of the norms so far, and keeps the number and sum of them."""

    def __init__(self) -> None:
        super().__init__(max_norm=1.0)
        self.count = torch.zeros(())
        self.sum = torch.zeros(())

    def __repr__(self) -> str:
        return "AverageClip()"

    def clip_(self, parameters: Parameters, norms: GradientNorms | None = None) -> ClipResult:
        parameters = list(parameters)
        norms = measure_gradients(parameters) if norms is None else norms
        seen = norms.finite & (norms.total > 0)
        self.count += seen
        self.sum += torch.where(seen, norms.total, 0.0)
        self.max_norm = self.sum / self.count.clamp(min=1)
        return super().clip_(parameters, norms)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count.clone(), "sum": self.sum.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self.sum = state_dict["count"].clone(), state_dict["sum"].clone()


class MemoryLogger(Logger):
    """Keeps every call: where on the x-axis, and what."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, name: str) -> dict[int | None, float]:
        """The values of one metric by step."""
        return {step: metrics[name] for step, metrics in self.calls if name in metrics}

    def names(self) -> set[str]:
        return {name for _, metrics in self.calls for name in metrics}


def fp16(init_scale: float = 1024.0) -> MixedPrecision:
    """Mixed precision with a real loss scaler, which ``Trainer(precision="16-mixed")`` does not use on the CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def make_batches(count: int, seed: int = 0, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def poison(batch: tuple[Tensor, Tensor], value: float = float("nan")) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = x.clone()
    x[0, 0] = value
    return x, y


def seeded(make: Callable[..., Any], *arguments: Any) -> Any:
    """What a function or class makes after the same seed as ever."""
    torch.manual_seed(0)
    return make(*arguments)


def fit(
    model: pl.LightningModule, batches: Any, callbacks: Any = (), ckpt_path: Any = None, **arguments: Any
) -> pl.Trainer:
    """Fit quietly on the CPU; ``batches`` is a list of batches or a loader."""
    trainer = make_trainer(callbacks, **arguments)
    trainer.fit(model, train_dataloaders=loader_of(batches), ckpt_path=ckpt_path)
    return trainer


def make_trainer(callbacks: Any = (), **arguments: Any) -> pl.Trainer:
    """A quiet trainer on the CPU that logs every step."""
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        **arguments,
    }
    return pl.Trainer(callbacks=list(callbacks), **settings)


def loader_of(batches: Any) -> Any:
    """A list of batches as a loader whose place can be saved; a loader as it is."""
    return ResumableLoader(batches) if isinstance(batches, list) else batches


def training_state(model: pl.LightningModule, trainer: pl.Trainer) -> dict[str, Any]:
    """Everything that a skip must leave alone: parameters, buffers, and the optimizers' state."""
    return {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
    }


def state_after(model: pl.LightningModule, batches: Any, callbacks: Any = (), **arguments: Any) -> dict[str, Any]:
    """Fit, and everything of the training state after it."""
    return training_state(model, fit(model, batches, callbacks, **arguments))


def assert_same_bits(one: Any, other: Any, path: str = "state") -> None:
    """Equality to the last bit, NaN equal to NaN, of nested states."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor), path
        assert one.dtype == other.dtype, path
        assert one.shape == other.shape, path
        assert torch.equal(_bits(one), _bits(other)), f"{path}: {one} != {other}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{path}: {one.keys()} != {other.keys()}"
        for key in one:
            assert_same_bits(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(left, right, f"{path}[{index}]")
    else:
        same = one == other or (one != one and other != other)  # NaN is the only value unequal to itself
        assert same, f"{path}: {one!r} != {other!r}"


def _bits(tensor: Tensor) -> Tensor:
    values = tensor.detach().to_dense().reshape(-1)
    if values.is_floating_point():
        values = torch.where(values.isnan(), torch.full_like(values, float("nan")), values)
    return values.contiguous().view(torch.uint8)
