"""Models that FSDP2 can shard."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard

__all__ = ["ShardableModule"]


class ShardableModule(L.LightningModule):
    """A LightningModule that shards its parameters over the processes where the Trainer's strategy is FSDP2's."""

    def configure_model(self) -> None:
        trainer = self._trainer
        if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy) or isinstance(self, FSDPModule):
            return
        assert self.device_mesh is not None
        fully_shard(self, mesh=self.device_mesh["data_parallel"])
