"""Copies of training state to go back to. Pure PyTorch."""

from stability_callbacks.snapshots._buffers import BufferBackup
from stability_callbacks.snapshots._group_entries import GroupWrites
from stability_callbacks.snapshots._random_state import RandomState
from stability_callbacks.snapshots._readable import newest_readable_checkpoint
from stability_callbacks.snapshots._ring import SnapshotRing

__all__ = ["BufferBackup", "GroupWrites", "RandomState", "SnapshotRing", "newest_readable_checkpoint"]
