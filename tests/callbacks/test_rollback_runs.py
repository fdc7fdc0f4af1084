"""What a rollback leaves to other runs and to the ones that go on from it: counters, states, files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Adam

from stability_callbacks import (
    FaultInjector,
    FlightRecorder,
    GradientClipping,
    LRSchedule,
    StepGuard,
    TrainingDivergedError,
)
from stability_callbacks.clipping import ZClip
from stability_callbacks.detection import NonFinite, Spike
from stability_callbacks.faults import Fault
from stability_callbacks.schedules import Scaled, WarmupConstant
from tests.callbacks.test_rollback import Scheduled, Spoil, rollback, ruin_weight, seeded
from tests.models import NormNet, ResumableLoader, assert_same_bits, fit, make_batches, poison, training_state

# ---- going on from the last good state


def diverged(directory: Path, model: pl.LightningModule) -> Path:
    """The last good checkpoint of a run whose data go bad after six batches."""
    batches = [*make_batches(6), *map(poison, make_batches(20))]
    guard = StepGuard(share_window=10, max_skipped_share=0.9)
    with pytest.raises(TrainingDivergedError, match=r"last-good.*Scaled\(WarmupConstant"):
        fit(model, batches, [guard, rollback(max_rollbacks=2, dirpath=directory)])
    return next(directory.glob("last-good-*.ckpt"))


def test_a_run_from_the_last_good_state_counts_failures_anew(tmp_path: Path) -> None:
    path = diverged(tmp_path, seeded(NormNet))
    batches = make_batches(26)
    batches[14] = poison(batches[14])  # one more bad step is none too many
    guard, callback = StepGuard(share_window=10, max_skipped_share=0.5), rollback(max_rollbacks=2, dirpath=tmp_path)
    trainer = fit(NormNet(), batches, [guard, callback], ckpt_path=path)
    assert trainer.global_step == 26
    assert callback.rollbacks == 2  # those of the run before


def test_it_can_go_on_at_another_rate(tmp_path: Path) -> None:
    path = diverged(tmp_path, seeded(Scheduled))
    slower = LRSchedule(Scaled(WarmupConstant(warmup=0), 0.1))
    model = seeded(Scheduled)
    fit(model, make_batches(26), [StepGuard(), rollback(), slower], ckpt_path=path)
    assert model.rates == pytest.approx([0.01] * len(model.rates))
    assert model.rates


@pytest.mark.parametrize("patience", [2, 4])
def test_a_run_whose_every_step_is_bad_stops_at_once(patience: int, tmp_path: Path) -> None:
    callback = rollback(patience=patience, dirpath=tmp_path)
    model = seeded(NormNet)
    with pytest.raises(TrainingDivergedError, match=r"no step was ever accepted.*weights are finite") as error:
        fit(model, list(map(poison, make_batches(20))), [StepGuard(), callback])
    assert callback.rollbacks == 0
    assert f"the first {patience} were" in str(error.value)
    assert model.trainer.global_step == patience
    assert not list(tmp_path.iterdir())


# ---- states


def states() -> dict[str, Any]:
    """A callback of each kind, made anew."""
    return {
        "guard": StepGuard([NonFinite(), Spike(window=4, min_history=2)]),
        "rollback": rollback(),
        "clipping": GradientClipping(ZClip(warmup_steps=2)),
        "schedule": LRSchedule(WarmupConstant(warmup=3)),
        "recorder": FlightRecorder(),
        "injector": FaultInjector([Fault("loss", "nan", steps=[3])]),
    }


STATES_OF_VERSION_1 = {
    "guard": {
        "skipped_steps": 3,
        "consecutive_skips": 1,
        "recent": [False, True, True, False, True],
        "detectors": [[{}, {"history": torch.ones(2, 4, dtype=torch.float64), "count": torch.full((2, 1), 4)}]],
    },
    "rollback": {
        "rollbacks": 2,
        "rollbacks_in_row": 1,
        "scale_at_rollback": 0.25,
        "steps_since": [7],
        "bad_in_row": {"SGD": 1},
        "steps_in_peace": 3,
        "rises": [{"spike": {}, "row": torch.tensor(1)}],
    },
    "clipping": {"attempted_steps": [9], "nonfinite_norms": 2, "clipped_steps": {"SGD": (3, 9)}, "rules": [[{}]]},
    "schedule": {"attempted_steps": [9]},
    "recorder": {"summary": {"nonfinite": [3, 1, 8, "net.0", "step=1-nonfinite"]}},
    "injector": {"attempted_steps": [9], "injected": []},
}


@pytest.mark.parametrize("name", STATES_OF_VERSION_1)
def test_a_state_of_the_first_version_is_taken_up(name: str) -> None:
    callback, old = states()[name], STATES_OF_VERSION_1[name]
    callback.load_state_dict(old)
    now = callback.state_dict()
    assert now.get("version", 2) == 2
    assert_same_bits({key: now[key] for key in old}, old)


@pytest.mark.parametrize("name", STATES_OF_VERSION_1)
def test_a_state_that_lacks_a_key_leaves_it_as_in_a_new_object(name: str) -> None:
    fresh, full = states()[name].state_dict(), STATES_OF_VERSION_1[name]
    for missing in full:
        callback = states()[name]
        callback.load_state_dict({key: value for key, value in full.items() if key != missing})
        assert_same_bits({missing: callback.state_dict()[missing]}, {missing: fresh[missing]})
    callback = states()[name]
    callback.load_state_dict({"of a later version": 1})
    assert_same_bits(callback.state_dict(), fresh)


def test_a_state_loaded_in_mid_training_goes_into_the_objects_that_the_ring_knows() -> None:
    guard = StepGuard([NonFinite(), Spike(window=8, min_history=2, threshold=1e3)])
    clipping, callback = GradientClipping(ZClip(warmup_steps=2, max_norm=None)), rollback()

    class Reload(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                for each in (guard, clipping, callback):
                    each.load_state_dict(each.state_dict())

        def on_train_end(self, *_: Any) -> None:
            assert callback._ring is not None
            known = {id(item) for item in callback._ring.stateful}
            assert {id(item) for each in (guard, clipping, callback) for item in each.statistics()} == known

    fit(seeded(NormNet), make_batches(10), [guard, clipping, callback, Reload()])


# ---- files


@pytest.mark.filterwarnings("ignore:Rollback writes its snapshots")
@pytest.mark.parametrize("max_memory", [None, 0])
def test_a_directory_that_cannot_be_written_to_fails_at_train_start(max_memory: int | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    storage = "disk" if max_memory is None else "memory"
    callback = rollback(storage=storage, max_memory=max_memory, dirpath=tmp_path / "file")
    model = seeded(NormNet)
    with pytest.raises(MisconfigurationException, match=r"can't write its snapshots to .*file: FileExistsError"):
        fit(model, make_batches(9), [StepGuard(), callback])
    assert model.trainer.global_step == 0


def test_two_runs_in_one_directory_leave_each_other_their_snapshots(tmp_path: Path) -> None:
    inner_model, inner = seeded(NormNet), rollback(storage="disk", dirpath=tmp_path)

    class AnotherRun(Callback):
        """Trains other weights in the same directory, step by step the same names, in the midst of the first."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                fit(inner_model, make_batches(9, seed=5), [StepGuard(), inner])

    good = make_batches(8)
    met = [*good[:6], make_batches(1, seed=1)[0], *good[4:]]
    callback = rollback(storage="disk", dirpath=tmp_path)
    with torch.random.fork_rng():
        healed = seeded(NormNet)
        fit(healed, met, [StepGuard(), callback, AnotherRun(), Spoil(ruin_weight, 6)])
    clean = seeded(NormNet)
    fit(clean, good, [StepGuard()])
    assert callback.rollbacks == 1
    assert_same_bits(dict(healed.state_dict()), dict(clean.state_dict()))
    owners = [torch.load(path)["stability_callbacks"]["run"] for path in tmp_path.glob("snapshot-step=*.ckpt")]
    assert sorted(map(owners.count, set(owners))) == [2, 2]


def test_a_snapshot_that_another_run_has_put_in_its_place_is_not_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(NormNet(), make_batches(9), [StepGuard(), rollback(storage="disk", dirpath=tmp_path / "other")])

    def replace(trainer: Any, model: Any) -> None:
        ruin_weight(trainer, model)
        shutil.copy(tmp_path / "other" / "snapshot-step=8.ckpt", tmp_path / "own" / "snapshot-step=8.ckpt")

    callback = rollback(storage="disk", dirpath=tmp_path / "own", keep=2)
    fit(seeded(NormNet), make_batches(14), [StepGuard(), callback, Spoil(replace, 9)])
    assert "snapshot-step=8.ckpt can't be read (RuntimeError('it was written by another run'" in caplog.text
    assert "restored the state of step 4" in caplog.text


# ---- resume


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_rollback_after_a_resume_goes_where_it_would_have_gone(tmp_path: Path) -> None:
    batches = make_batches(12)

    def callbacks(place: str, *more: Any) -> list[Any]:
        clipping = GradientClipping(ZClip(warmup_steps=2, max_norm=None))
        return [StepGuard(), clipping, rollback(storage="disk", dirpath=tmp_path / place), Spoil(ruin_weight, 7), *more]

    whole = seeded(NormNet)
    expected = fit(whole, ResumableLoader(batches), callbacks("whole"))
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6)
    first = callbacks("first", saved)
    fit(seeded(NormNet), ResumableLoader(batches), first, enable_checkpointing=True, max_steps=6)
    resumed, second = NormNet(), callbacks("second")
    trainer = fit(resumed, ResumableLoader(batches), second, ckpt_path=saved.best_model_path)
    assert second[2].rollbacks == 1
    assert_same_bits(training_state(resumed, trainer), training_state(whole, expected))
    assert len(list((tmp_path / "first").iterdir())) == 2  # they are the first run's, who may resume from it again


# ---- an optimizer that got another group


class Backbone(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.head(torch.tanh(self.backbone(batch))).pow(2).mean()

    def configure_optimizers(self) -> Adam:
        return Adam([each for each in self.parameters() if each.requires_grad], lr=0.01)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.001)


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_a_rollback_over_an_added_parameter_group(storage: str, tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 4, generator=stream) for _ in range(6)]
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            state = trainer.optimizers[0].state
            moments = {
                name: state[each]["exp_avg"].clone() for name, each in pl_module.named_parameters() if each in state
            }
            seen.append((weights, moments))

    callback = rollback(storage=storage, dirpath=tmp_path, every_n_steps=4, keep=2)
    model = seeded(Backbone)
    trainer = fit(
        model, batches, [Unfreeze(), StepGuard(), callback, Look(), SpoilAt(7)], max_epochs=2, log_every_n_steps=1
    )
    assert callback.rollbacks == 1
    assert [(group["lr"], len(group["params"])) for group in trainer.optimizers[0].param_groups] == [
        (0.01, 2),
        (0.001, 2),
    ]
    # Of step 6, taken when the group was added; after the rollback in step 8.
    snapshot, restored = seen[5], seen[7]
    assert_same_bits(restored[0], snapshot[0])
    assert_same_bits(restored[1], snapshot[1])
    assert all("head" in name for name in restored[1])


class SpoilAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.head.weight[0, 0] = float("nan")


def test_a_model_that_lost_a_parameter_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    def shrink(trainer: Any, model: Any) -> None:
        model.net[3].weight.data[0] = float("nan")
        model.register_parameter("spare", None)
        seen.update({name: value.clone() for name, value in model.state_dict().items()})

    class Spare(NormNet):
        def __init__(self) -> None:
            super().__init__()
            self.spare: nn.Parameter | None = nn.Parameter(torch.zeros(2), requires_grad=False)

    seen: dict[str, Any] = {}
    model = seeded(Spare)
    callback = rollback(storage="disk", dirpath=tmp_path)
    with pytest.raises(RuntimeError, match="the model has been changed: 'spare' is gone"):
        fit(model, make_batches(9), [StepGuard(), callback, Spoil(shrink, 6)])
    assert_same_bits(model.net[3].state_dict(), {name[6:]: seen[name] for name in seen if name.startswith("net.3.")})


# ---- probation


def test_finite_damage_that_a_steep_loss_hides_is_no_snapshot_to_go_back_to() -> None:
    class Falling(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(8.0))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.weight.abs() * (1 + 0.02 * batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def damage(trainer: Any, model: Any) -> None:
        model.weight.fill_(4.0)

    stream = torch.Generator().manual_seed(0)
    batches = [torch.randn((), generator=stream) for _ in range(80)]
    callback, model = rollback(every_n_steps=4, keep=3), seeded(Falling)
    # The loss has fallen from 8 to about 1, and is 4 again: within the window's spread.
    fit(model, batches, [StepGuard(), callback, Spoil(damage, 67), SpoilWeight(75)], log_every_n_steps=1)
    assert callback.rollbacks == 1
    assert float(model.weight.detach()) < 2.5  # that of step 60 was 2; the newest snapshot, of step 68, had 3.9


class SpoilWeight(SpoilAt):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.weight.fill_(float("nan"))
