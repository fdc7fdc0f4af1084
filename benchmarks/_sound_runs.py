"""Small training runs in which nothing is wrong, on real data: what protects must leave them as good as they were.

Each learns within seconds on one core. The rates were set by hand with seed 100, which the benchmark does not use, and
without any callback. Those called low leave a run unfinished; the one called high is near the largest that still works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._digit_networks import MLP, PixelLSTM, ResNet
from recipes.data import Digits, MNIST5k, SineWaves, Text
from recipes.transformer import CharTransformer

__all__ = ["SOUND_RUNS", "SoundRun"]

CLASSES = 10
SIDE = 14  # of MNIST's images, averaged down
MakeOptimizer = Callable[[Iterator[nn.Parameter]], Optimizer]


class SoundRun(NamedTuple):
    """A run that is sound without any callback.

    Attributes:
        kind: What to ask ``stability_suite`` for.
        metric: What ``score`` of the module measures: "accuracy" is better high, all others are better low.
        steps: Training batches.
        module: Makes the module; its weights depend on the global seed.
        data: Makes the data from a seed that gives their order.
    """

    kind: str
    metric: str
    steps: int
    module: Callable[[], SoundModule | GAN]
    data: Callable[[int], L.LightningDataModule]


class SoundModule(L.LightningModule):
    """A network, its loss, and its optimizer.

    Args:
        net: Makes the network.
        optimizer: Makes the optimizer.
        task: "classify", "characters" (classify each), "reconstruct" or "regress".
        rate: The factor of the learning rate at each step.
        scale: The factor of the loss: another unit of what is predicted.
    """

    def __init__(
        self,
        net: Callable[[], nn.Module],
        optimizer: MakeOptimizer,
        task: str = "classify",
        rate: Callable[[int], float] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.net = net()
        self.make_optimizer = optimizer
        self.task = task
        self.rate = rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs = self.net(inputs)
        if self.task == "classify":
            return nn.functional.cross_entropy(outputs, targets)
        return self.scale * self._errors(outputs, inputs, targets).mean()

    @torch.no_grad()
    def score(self, data: L.LightningDataModule) -> float:
        """The metric on the test data."""
        self.eval()
        return float(torch.cat([self._judge(*batch) for batch in data.test_dataloader()]).mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.rate is None:
            return optimizer
        scheduler = {"scheduler": LambdaLR(optimizer, self.rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _judge(self, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = self.net(inputs)
        if self.task == "classify":
            right: Tensor = outputs.argmax(1) == targets
            return right.float()
        return self._errors(outputs, inputs, targets)

    def _errors(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.task == "characters":
            return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        wanted = inputs.flatten(1) if self.task == "reconstruct" else targets
        errors: Tensor = (outputs - wanted).square().flatten(1).sum(1)
        return errors


class GAN(L.LightningModule):
    """Two small networks that play against each other, each with its own Adam, in manual optimization."""

    LATENT = 16

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(self.LATENT, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)
        )
        self.critic = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, _ = batch
        optimizers: Any = self.optimizers()
        for_generator, for_critic = optimizers
        fake = self.generator(torch.randn(len(real), self.LATENT))

        for_critic.zero_grad()
        loss = _says(self.critic(real), 1.0) + _says(self.critic(fake.detach()), 0.0)
        self.manual_backward(loss)
        for_critic.step()

        for_generator.zero_grad()
        self.manual_backward(_says(self.critic(fake), 1.0))
        for_generator.step()

    @torch.no_grad()
    def score(self, data: L.LightningDataModule) -> float:
        """The energy distance of the generated images from the test images: 0 for equal distributions."""
        real = torch.cat([images.flatten(1) for images, _ in data.test_dataloader()])
        fake = self.generator(torch.randn(1000, self.LATENT, generator=torch.Generator().manual_seed(0)))
        between, within_real, within_fake = (torch.cdist(*pair) for pair in ((real, fake), (real, real), (fake, fake)))
        n, m = len(real), len(fake)
        return float(2 * between.mean() - within_real.sum() / (n * (n - 1)) - within_fake.sum() / (m * (m - 1)))

    def configure_optimizers(self) -> list[Optimizer]:
        return [
            Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
            Adam(self.critic.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        ]


def _says(logits: Tensor, label: float) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


class NoisyDigits(Digits):
    """Digits of which 30 % have a random label in training, the same for all seeds."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        images, labels = self.train.tensors
        generator = torch.Generator().manual_seed(0)
        wrong = torch.rand(len(labels), generator=generator) < 0.3
        random = torch.randint(CLASSES, labels.shape, generator=generator)
        self.train = TensorDataset(images, torch.where(wrong, random, labels))


class Diabetes(L.LightningDataModule):
    """The progression of 442 patients' diabetes from ten measurements; the target keeps its unit and is about 150."""

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        parts = train_test_split(*load_diabetes(return_X_y=True), test_size=110, random_state=0)
        x, test_x, y, test_y = (torch.as_tensor(part, dtype=torch.float32) for part in parts)
        mean, std = x.mean(0), x.std(0)
        self.train = TensorDataset((x - mean) / std, y[:, None])
        self.test = TensorDataset((test_x - mean) / std, test_y[:, None])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, generator=order)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, len(self.test))


def _cnn(norm: bool, channels: int = 16) -> nn.Module:
    """Two convolutions with pooling, then two linear layers."""
    layers: list[nn.Module] = []
    for before, after in ((1, channels), (channels, 2 * channels)):
        layers += [nn.Conv2d(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if norm else [])]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    side = SIDE // 2 // 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(2 * channels * side**2, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


def _flat(net: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), net())


class PixelGRU(PixelLSTM):
    """The same reader of pixels with a GRU."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width)
        self.lstm = nn.GRU(1, width, batch_first=True)  # type: ignore[assignment]


class Forecaster(nn.Module):
    """An LSTM that reads a wave, ``(batch, steps, 1)``, and predicts how it goes on."""

    def __init__(self, width: int = 32, horizon: int = 8) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.head = nn.Linear(width, horizon)

    def forward(self, waves: Tensor) -> Tensor:
        states, _ = self.lstm(waves)
        values: Tensor = self.head(states[:, -1])
        return values


def _autoencoder(pixels: int = SIDE * SIDE) -> nn.Module:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 16))
    return nn.Sequential(encoder, nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, pixels))


def _regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def _characters(norm: Any) -> nn.Module:
    return CharTransformer(torch.Size([32]), 103, Adam, layers=2, width=32, heads=4, norm=norm)


def _warmup(step: int) -> float:
    return min(1.0, (step + 1) / 40)


def _cosine(step: int, steps: int = 330) -> float:
    return _warmup(step) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, step / steps)))))


def _run(
    kind: str,
    net: Callable[[], nn.Module],
    optimizer: Any,
    data: Callable[..., L.LightningDataModule],
    batch_size: int,
    steps: int,
    metric: str = "accuracy",
    **options: Any,
) -> SoundRun:
    module = partial(SoundModule, net, optimizer, **options)
    return SoundRun(kind, metric, steps, module, lambda seed: data(batch_size=batch_size, seed=seed))


def _sgd(lr: float, momentum: float = 0.9, **options: Any) -> Any:
    return partial(SGD, lr=lr, momentum=momentum, **options)


_MNIST = partial(MNIST5k, side=SIDE)
_TEXT = partial(Text, length=32)
_MLP = partial(_flat, MLP)
_BN, _NO_BN = partial(_cnn, True), partial(_cnn, False)

SOUND_RUNS: dict[str, SoundRun] = {
    "MLP, SGD 0.1": _run("mlp", _MLP, _sgd(0.1), Digits, 32, 400),
    "MLP, SGD 0.003, low rate": _run("mlp", _MLP, _sgd(0.003), Digits, 32, 400),
    "MLP, SGD 0.01, batches of 4": _run("mlp", _MLP, _sgd(0.01), Digits, 4, 800),
    "MLP, Adam 0.003, noisy labels": _run("mlp", _MLP, partial(Adam, lr=3e-3), NoisyDigits, 32, 500),
    "CNN, no norm, SGD 0.03": _run("cnn", _NO_BN, _sgd(0.03), _MNIST, 64, 220),
    "CNN, batch norm, SGD 0.001, low rate": _run("cnn", _BN, _sgd(0.001), _MNIST, 64, 220),
    "CNN, batch norm, SGD 0.01": _run("cnn", _BN, _sgd(0.01), _MNIST, 64, 220),
    "CNN, batch norm, SGD 0.2, high rate": _run("cnn", _BN, _sgd(0.2), _MNIST, 64, 220),
    "CNN, batch norm, AdamW 0.003": _run("cnn", _BN, partial(AdamW, lr=3e-3), _MNIST, 64, 220),
    "CNN, batch norm, SGD 0.01, noisy labels": _run(
        "cnn", partial(_flat, partial(ResNet, blocks=0)), _sgd(0.01), NoisyDigits, 32, 400
    ),
    "ResNet, SGD 0.1, cosine": _run(
        "cnn", partial(_flat, ResNet), _sgd(0.1, weight_decay=5e-4, nesterov=True), Digits, 32, 330, rate=_cosine
    ),
    "LSTM, Adam 0.01": _run("rnn", partial(_flat, PixelLSTM), partial(Adam, lr=1e-2), Digits, 32, 500),
    "LSTM, SGD 0.3": _run("rnn", partial(_flat, PixelLSTM), _sgd(0.3), Digits, 32, 500),
    "GRU, Adam 0.01": _run("rnn", partial(_flat, PixelGRU), partial(Adam, lr=1e-2), Digits, 32, 500),
    "GRU, SGD 0.1": _run("rnn", partial(_flat, PixelGRU), _sgd(0.1), Digits, 32, 500),
    "LSTM, forecasts, squared error x1000, SGD 0.00002": _run(
        "rnn", Forecaster, _sgd(2e-5), SineWaves, 32, 400, "squared error", task="regress", scale=1000.0
    ),
    "Transformer, pre-LN, AdamW 0.003": _run(
        "transformer",
        partial(_characters, "pre"),
        partial(AdamW, lr=3e-3),
        _TEXT,
        16,
        400,
        "nats",
        task="characters",
        rate=_warmup,
    ),
    "Transformer, pre-LN, SGD 0.3": _run(
        "transformer", partial(_characters, "pre"), _sgd(0.3), _TEXT, 16, 400, "nats", task="characters", rate=_warmup
    ),
    "Transformer, post-LN, AdamW 0.003": _run(
        "transformer",
        partial(_characters, "post"),
        partial(AdamW, lr=3e-3),
        _TEXT,
        16,
        400,
        "nats",
        task="characters",
        rate=_warmup,
    ),
    "autoencoder, Adam 0.003": _run(
        "mlp", _autoencoder, partial(Adam, lr=3e-3), _MNIST, 64, 400, "squared error", task="reconstruct"
    ),
    "autoencoder, SGD 0.0003": _run(
        "mlp", _autoencoder, _sgd(0.0003), _MNIST, 64, 400, "squared error", task="reconstruct"
    ),
    "regression, SGD 0.00003": _run("mlp", _regressor, _sgd(3e-5), Diabetes, 32, 500, "squared error", task="regress"),
    "GAN, two Adams 0.001": SoundRun("mlp", "energy distance", 500, GAN, lambda seed: Digits(batch_size=64, seed=seed)),
}
