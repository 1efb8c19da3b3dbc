"""Tensors that wait for their turn: in memory up to a budget, then on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

BUDGET = 2**28
"""Bytes in memory."""


class Shelf:
    """Tensors by key, put in the place of one another."""

    def __init__(self) -> None:
        self._used = 0
        self._held: dict[int, Tensor] = {}
        self._filed: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, key: int, tensor: Tensor) -> None:
        """Keep ``tensor``, in the place of what the key had."""
        if (before := self._held.pop(key, None)) is not None:
            self._used -= before.nbytes
        if key not in self._filed and self._used + tensor.nbytes <= BUDGET:
            self._held[key] = tensor
            self._used += tensor.nbytes
            return
        self._filed[key] = tensor.shape, tensor.dtype, tensor.device
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        flat.numpy().tofile(self._file(key))

    def get(self, key: int) -> Tensor:
        """What was put there."""
        if key in self._held:
            return self._held[key]
        shape, dtype, device = self._filed[key]
        # As a copy: of a mapped file the pages that were read would count as this process' memory.
        content = bytearray(self._file(key).read_bytes())
        return torch.frombuffer(content, dtype=dtype).view(shape).to(device)

    def _file(self, key: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="condiquant-")
        return Path(self._folder.name) / str(key)
