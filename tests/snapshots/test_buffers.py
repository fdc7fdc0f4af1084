"""BufferBackup: every buffer comes back as the same tensor with the same bits, whatever was done to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stability_callbacks.snapshots import BufferBackup
from tests.host_reads import ForbidHostReads

NAN, INF = math.nan, math.inf
LARGE = (300, 300)  # more elements than are copied without asking
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

Restore = Callable[[BufferBackup], None]
RESTORES: dict[str, Restore] = {
    "restore": lambda backup: backup.restore(),
    "restore_where": lambda backup: backup.restore_where(torch.tensor(True)),
}


@pytest.fixture(params=RESTORES)
def restore(request: pytest.FixtureRequest) -> Restore:
    return RESTORES[request.param]


def holder(**buffers: Tensor | None) -> nn.Module:
    module = nn.Module()
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def bits(tensor: Tensor) -> list[int]:
    tensor = tensor.detach().resolve_conj().contiguous()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).view(torch.uint8).tolist()


def of_every_dtype(device: str) -> dict[str, Tensor]:
    """A small and a large buffer of every dtype, all of their bits at random: NaNs with payloads among the floats."""
    dtypes = [
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64,
        torch.complex128, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
    ]  # fmt: skip
    buffers: dict[str, Tensor] = {"bool": torch.tensor([True, False, True], device=device)}
    for dtype in dtypes:
        for size, shape in (("small", (6,)), ("large", LARGE)):
            count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
            raw = torch.randint(256, (count,), dtype=torch.uint8, device=device)
            buffers[f"{dtype}_{size}".removeprefix("torch.")] = raw.view(dtype).reshape(shape)
    return buffers


def overwrite(buffer: Tensor) -> None:
    """Write other bits to all of a buffer."""
    if buffer.dtype == torch.bool:
        buffer.logical_not_()
    else:
        raw = torch.view_as_real(buffer) if buffer.is_complex() else buffer
        raw.view(torch.uint8).bitwise_not_()


# ---- what comes back


@pytest.mark.parametrize("device", DEVICES)
def test_every_dtype_comes_back_bit_for_bit(restore: Restore, device: str) -> None:
    module = holder(**of_every_dtype(device))
    backup = BufferBackup(module)
    for _ in range(2):  # the second time into storage that exists
        objects, before = dict(module.named_buffers()), {name: bits(value) for name, value in module.named_buffers()}
        backup.take()
        for name, buffer in module.named_buffers():
            overwrite(buffer)
            assert bits(buffer) != before[name]
        restore(backup)
        for name, buffer in module.named_buffers():
            assert buffer is objects[name]
            assert bits(buffer) == before[name], name
        for buffer in module.buffers():
            overwrite(buffer)


@pytest.mark.parametrize("device", DEVICES)
def test_a_condition_that_does_not_hold_leaves_every_bit_alone(device: str) -> None:
    module = holder(**of_every_dtype(device))
    backup = BufferBackup(module)
    backup.take()
    for buffer in module.buffers():
        overwrite(buffer)
    after = {name: bits(buffer) for name, buffer in module.named_buffers()}
    backup.restore_where(torch.tensor(False, device=device))
    assert {name: bits(buffer) for name, buffer in module.named_buffers()} == after


SHAPES = {
    "0-dim": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0, 4),
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "strided": lambda: torch.arange(12.0)[::2],
    "slice of a larger one": lambda: torch.arange(12.0).reshape(3, 4)[:, 1:3],
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_every_shape_comes_back(make: Callable[[], Tensor], restore: Restore) -> None:
    module = holder(buffer=make())
    backup = BufferBackup(module)
    backup.take()
    module.buffer.mul_(2).add_(1)
    restore(backup)
    assert torch.equal(module.buffer, make())
    assert module.buffer.stride() == make().stride()


def test_the_rest_of_the_memory_stays(restore: Restore) -> None:
    base = torch.zeros(3, 4)
    backup = BufferBackup(holder(buffer=base[:, 1:3]))
    backup.take()
    base.fill_(7)
    restore(backup)
    assert torch.equal(base, torch.tensor([7.0, 0.0, 0.0, 7.0]).expand(3, 4))


def test_expanded_buffers_are_no_obstacle(restore: Restore) -> None:
    single = torch.tensor([[1.0], [2.0]])
    module = holder(buffer=single.expand(2, 5))
    backup = BufferBackup(module)
    backup.take()
    single.zero_()
    restore(backup)
    assert torch.equal(module.buffer, torch.tensor([[1.0], [2.0]]).expand(2, 5))


def test_overlapping_buffers_come_back(restore: Restore) -> None:
    base = torch.arange(4.0)
    module = holder(whole=base, part=base[1:3])
    backup = BufferBackup(module)
    backup.take()
    base.add_(10)
    restore(backup)
    assert module.whole.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_shared_buffers_come_back_and_stay_shared(restore: Restore) -> None:
    shared = torch.tensor([1.0, 2.0])
    model = nn.ModuleList([holder(table=shared), holder(table=shared)])
    model.append(model[0])
    backup = BufferBackup(model)
    backup.take()
    shared.add_(5)
    restore(backup)
    assert model[0].table is model[1].table is shared
    assert shared.tolist() == [1.0, 2.0]


def test_non_persistent_buffers_come_back(restore: Restore) -> None:
    module = nn.Module()
    module.register_buffer("cache", torch.ones(2), persistent=False)
    backup = BufferBackup(module)
    backup.take()
    module.cache.zero_()
    restore(backup)
    assert module.cache.tolist() == [1.0, 1.0]


def test_none_stays_none(restore: Restore) -> None:
    module = holder(nothing=None, something=torch.ones(1))
    backup = BufferBackup(module)
    backup.take()
    restore(backup)
    assert module.nothing is None


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("compressed", [False, True], ids=["coo", "csr"])
def test_sparse_buffers_come_back(compressed: bool) -> None:
    def make() -> Tensor:
        dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        return dense.to_sparse_csr() if compressed else dense.to_sparse()

    module = holder(adjacency=make())
    buffer = module.adjacency
    backup = BufferBackup(module)
    backup.take()
    backup.restore_where(torch.tensor(True))  # untouched, so there is nothing to do
    buffer.mul_(NAN)
    assert backup.nonfinite()[1].tolist() == [True]
    with pytest.raises(RuntimeError, match=r"buffer 'adjacency' .* is sparse and was written to"):
        backup.restore_where(torch.tensor(True))
    backup.restore()
    assert module.adjacency is buffer
    assert torch.equal(buffer.to_dense(), make().to_dense())


# ---- how buffers may change


@pytest.mark.parametrize("features", [8, 70_000])
def test_batch_normalization_is_undone_whatever_its_size(features: int, restore: Restore) -> None:
    norm = nn.BatchNorm1d(features)
    norm(torch.randn(4, features))
    version = norm.running_mean._version  # type: ignore[union-attr]
    before = copy.deepcopy(norm.state_dict())
    backup = BufferBackup(norm)
    backup.take()
    norm(torch.full((4, features), NAN))
    assert norm.running_mean._version == version  # type: ignore[union-attr]  # so counters alone would not do
    assert not norm.running_mean.isfinite().any()  # type: ignore[union-attr]
    restore(backup)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_large_masks_are_copied_only_when_written_to(restore: Restore) -> None:
    module = holder(mask=torch.zeros(LARGE, dtype=torch.int32))
    backup = BufferBackup(module)
    backup.take()
    [kept] = [each.values for each in backup._copies.values()]
    kept[0, 0] = 5  # a mark that a copy would wipe out
    backup.take()
    assert kept[0, 0] == 5
    module.mask.add_(1)
    backup.take()
    assert kept[0, 0] == 1
    module.mask.add_(1)
    restore(backup)
    assert torch.equal(module.mask, torch.ones_like(module.mask))


@pytest.mark.parametrize("shape", [(3,), LARGE])
def test_writes_through_data_are_undone(shape: tuple[int, ...], restore: Restore) -> None:
    module = holder(codebook=torch.ones(shape))
    backup = BufferBackup(module)
    for _ in range(2):
        backup.take()
        before = module.codebook.clone()
        module.codebook.data.mul_(2)
        restore(backup)
        assert torch.equal(module.codebook, before)
        module.codebook.data.mul_(2)


@pytest.mark.parametrize("shape", [(3,), LARGE])
def test_replaced_buffers_are_put_back(shape: tuple[int, ...]) -> None:
    module = holder(running=torch.ones(shape))
    original = module.running
    backup = BufferBackup(module)
    backup.take()
    module.running = 0.9 * module.running + NAN
    backup.restore()
    assert module.running is original
    assert torch.equal(module.running, torch.ones(shape))


@pytest.mark.parametrize("shape", [(3,), LARGE])
def test_replaced_buffers_get_their_numbers_back_on_the_device(shape: tuple[int, ...]) -> None:
    module = holder(running=torch.ones(shape))
    backup = BufferBackup(module)
    backup.take()
    module.running = torch.full(shape, NAN)
    replacement = module.running
    backup.restore_where(torch.tensor(False))
    assert module.running.isnan().all()
    backup.restore_where(torch.tensor(True))
    assert module.running is replacement
    assert torch.equal(replacement, torch.ones(shape))


@pytest.mark.parametrize(
    "replacement", [None, torch.ones(4), torch.ones(3).double()], ids=["removed", "other shape", "other dtype"]
)
def test_what_the_device_cannot_undo_is_an_error(replacement: Tensor | None) -> None:
    module = holder(running=torch.ones(3))
    backup = BufferBackup(module)
    backup.take()
    module.running = replacement
    with pytest.raises(RuntimeError, match="buffer 'running' appeared, went, changed its shape or type"):
        backup.restore_where(torch.tensor(True))
    backup.restore()
    assert module.running.tolist() == [1.0, 1.0, 1.0]


def test_a_buffer_that_was_none_is_none_again() -> None:
    module = holder(running=None)
    backup = BufferBackup(module)
    backup.take()
    module.running = torch.ones(3)
    with pytest.raises(RuntimeError, match="buffer 'running' appeared"):
        backup.restore_where(torch.tensor(True))
    backup.restore()
    assert module.running is None


def test_buffers_given_other_memory_are_backed_up_there(restore: Restore) -> None:
    module = holder(small=torch.ones(3), large=torch.ones(LARGE), mask=torch.ones(LARGE, dtype=torch.long))
    backup = BufferBackup(module)
    backup.take()
    for after in range(2, 6):
        for buffer in module.buffers():
            buffer.data = torch.full_like(buffer, NAN if buffer.is_floating_point() else 0)
            buffer.data = torch.full_like(buffer, after)  # perhaps where the buffer lay at the backup
        restore(backup)
        for buffer in module.buffers():
            assert torch.equal(buffer, torch.full_like(buffer, after - 1))
            buffer.data = torch.full_like(buffer, after)
        backup.take()


def test_buffers_given_another_shape_are_backed_up_so(restore: Restore) -> None:
    module = holder(queue=torch.ones(3))
    backup = BufferBackup(module)
    backup.take()
    module.queue.data = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        restore(backup)
    backup.take()
    module.queue.zero_()
    restore(backup)
    assert torch.equal(module.queue, torch.ones(5))


def test_buffers_registered_later_are_in_the_next_backup(restore: Restore) -> None:
    model = nn.Sequential(holder(one=torch.ones(1)))
    backup = BufferBackup(model)
    backup.take()
    model[0].register_buffer("two", torch.full((1,), 2.0))
    restore(backup)
    assert model[0].two.tolist() == [2.0]
    backup.take()
    model[0].two.zero_()
    restore(backup)
    assert model[0].two.tolist() == [2.0]


def test_removed_buffers_stay_away() -> None:
    module = holder(one=torch.ones(1), two=torch.ones(1))
    backup = BufferBackup(module)
    backup.take()
    del module.two
    backup.take()
    backup.restore()
    assert list(dict(module.named_buffers())) == ["one"]


def test_modules_added_later_are_found_by_a_refresh(restore: Restore) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    backup = BufferBackup(model)
    backup.take()
    model.append(holder(late=torch.ones(1)))
    backup.refresh()
    restore(backup)  # must not touch what was never backed up
    assert model[1].late.tolist() == [1.0]
    backup.take()
    model[1].late.zero_()
    restore(backup)
    assert model[1].late.tolist() == [1.0]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_buffers_join_when_they_have_a_shape(restore: Restore) -> None:
    norm = nn.LazyBatchNorm1d(affine=False)
    backup = BufferBackup(norm)
    backup.take()
    norm(torch.randn(4, 3))
    restore(backup)
    backup.take()
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    norm(torch.full((4, 3), NAN))
    restore(backup)
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


def test_buffers_made_in_inference_mode_are_no_obstacle(restore: Restore) -> None:
    module = holder()
    with torch.inference_mode():  # as a sanity check does that fills a cache
        module.register_buffer("cache", torch.ones(3))
    original = module.cache
    backup = BufferBackup(module)
    backup.take()
    backup.take()
    restore(backup)
    assert module.cache is original
    module.cache = torch.zeros(3)
    restore(backup)
    assert module.cache.tolist() == [1.0, 1.0, 1.0]


def test_there_must_be_a_backup(restore: Restore) -> None:
    module = holder(running=torch.ones(2))
    backup = BufferBackup(module)
    with pytest.raises(RuntimeError, match=r"no backup of the buffers: call `take\(\)` first"):
        restore(backup)
    with pytest.raises(RuntimeError, match="no backup"):
        backup.nonfinite()
    assert module.running.tolist() == [1.0, 1.0]


def test_a_module_without_buffers_is_fine(restore: Restore) -> None:
    backup = BufferBackup(nn.Linear(1, 1))
    backup.take()
    restore(backup)
    names, flags = backup.nonfinite()
    assert names == ()
    assert flags.shape == (0,)
    assert flags.dtype == torch.bool


# ---- which buffers became non-finite


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_element_makes_a_buffer_nonfinite(bad: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(
        holder(good=torch.ones(3, dtype=dtype), bad=torch.ones(3, dtype=dtype)),
        holder(count=torch.tensor(1), scalar=torch.tensor(1.0, dtype=dtype)),
    )
    backup = BufferBackup(model)
    backup.take()
    assert not backup.nonfinite()[1].any()
    model[0].bad[1] = bad
    model[1].scalar.fill_(bad)
    names, flags = backup.nonfinite()
    assert dict(zip(names, flags.tolist(), strict=True)) == {
        "0.good": False,
        "0.bad": True,
        "1.scalar": True,
    }


def test_large_finite_values_are_finite() -> None:
    module = holder(statistics=torch.ones(3), scales=torch.ones(1000).half())
    backup = BufferBackup(module)
    backup.take()
    module.statistics.fill_(torch.finfo(torch.float32).max)
    module.scales.fill_(torch.finfo(torch.float16).max)
    assert backup.nonfinite()[1].tolist() == [False, False]


@pytest.mark.parametrize("lowest", [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("size", [4, 300])
def test_constant_masks_do_not_count(size: int, lowest: float) -> None:
    module = holder(mask=torch.full((size, size), lowest).triu(1), statistics=torch.zeros(2))
    backup = BufferBackup(module)
    backup.take()
    assert not backup.nonfinite()[1].any()
    module.statistics.fill_(NAN)
    names, flags = backup.nonfinite()
    assert [name for name, flag in zip(names, flags.tolist(), strict=True) if flag] == ["statistics"]


def test_large_and_replaced_buffers_count() -> None:
    module = holder(table=torch.zeros(LARGE), untouched=torch.zeros(LARGE), running=torch.zeros(2))
    backup = BufferBackup(module)
    backup.take()
    module.table[5, 5] = NAN
    module.running = module.running + INF
    names, flags = backup.nonfinite()
    assert dict(zip(names, flags.tolist(), strict=True)) == {"table": True, "untouched": False, "running": True}


def test_the_host_reads_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), holder(table=torch.zeros(LARGE)))
    x, condition = torch.randn(4, 3), torch.tensor(True)
    with ForbidHostReads():
        backup = BufferBackup(model)
        backup.take()
        model[0](x)
        model[1].table.add_(1)
        backup.nonfinite()
        backup.restore_where(condition)
        backup.restore()
        backup.take()
