"""The float network's outputs, kept by the content of each crop."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

CACHE_BYTES = 2**28
"""Of the outputs that :meth:`OutputCache.keep` holds."""


class OutputCache:
    """What the teacher gave for crops that come again, whatever data loader they come from.

    A found output is the teacher's own, bit for bit: batches of another size may differ in the last bits,
    so what :meth:`keep` holds serves batches of the size it is from. Full before any crop came again, the
    cache empties itself and stays off.

    Args:
        limit: bytes of the outputs that are kept.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit, self.bytes, self.has_repeats, self.is_off = limit, 0, False, False
        self._given: dict[bytes, Tensor] = {}
        self._kept: dict[tuple[int, bytes], Tensor] = {}

    def add(self, crops: Tensor, outputs: Tensor) -> None:
        """Outputs of crops known beforehand, whatever the limit; they serve batches of any size."""
        self._given |= zip(self.keys(crops), outputs, strict=True)

    @staticmethod
    def keys(crops: Tensor) -> list[bytes]:
        """One for the content of each of the crops, ``(count, ...)``."""
        kind = repr((crops.dtype, crops.shape[1:])).encode()
        rows = crops.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
        return [blake2b(row, digest_size=16, key=blake2b(kind).digest()).digest() for row in rows]

    def find(self, keys: Sequence[bytes]) -> Tensor | None:
        """Outputs of a batch, ``(count, ...)``, if there are those of all its crops."""
        found = [self._given.get(key, self._kept.get((len(keys), key))) for key in keys]
        self.has_repeats |= any(output is not None for output in found)
        outputs = [output for output in found if output is not None]
        return torch.stack(outputs) if len(outputs) == len(keys) else None

    def keep(self, keys: Sequence[bytes], outputs: Tensor) -> None:
        """Remember a batch's outputs if there is room for them, of which nobody may change a value."""
        new = {(len(keys), key): output for key, output in zip(keys, outputs, strict=True)}
        if self.bytes + outputs.nbytes <= self.limit:
            self._kept |= new
            self.bytes += outputs.nbytes  # rows of a batch share its memory
        elif not self.has_repeats:
            self._kept.clear()
            self.bytes, self.is_off = 0, not self._given
