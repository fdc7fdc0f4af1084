"""Copies of training state to go back to. Pure PyTorch."""

from stability_callbacks.snapshots._buffers import BufferBackup

__all__ = ["BufferBackup"]
