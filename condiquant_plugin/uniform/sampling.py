"""What bounds are searched on, the same in every host: a bounded sample of a few images' values.

Images pass the network one by one, so that neither the sample nor a rounding tie depends on batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS_CROPS = 32
"""Images whose values bounds are searched on."""
_MOST_SAMPLES = 2**18


class Sample:
    """A sample of all entries in at most 1 MiB, however many tensors there are, and both extremes.

    Every tensor gives equally many entries, at places that depend on its number only: all hosts take the
    same. Where the sample outgrows its room, each tensor keeps the first half of its own.
    """

    def __init__(self) -> None:
        self._samples: list[Tensor] = []
        self._extremes: list[Tensor] = []
        self._share = _MOST_SAMPLES
        self._count = 0

    def __len__(self) -> int:
        """How many tensors have been added."""
        return self._count

    def add(self, x: Tensor) -> None:
        """Take entries of ``x``, any shape but empty."""
        entries = x.detach().reshape(-1)
        generator = torch.Generator().manual_seed(self._count)
        self._count += 1
        if entries.numel() <= self._share:
            places = torch.randperm(entries.numel(), generator=generator)
        else:
            places = torch.randint(entries.numel(), (self._share,), generator=generator)
        self._samples.append(entries[places.to(entries.device)])
        extremes = torch.stack([*self._extremes, *entries.aminmax()])
        self._extremes = list(extremes.aminmax())
        while sum(map(len, self._samples)) > _MOST_SAMPLES and self._share > 1:
            self._share //= 2
            self._samples = [sample[: self._share].clone() for sample in self._samples]

    def entries(self) -> Tensor:
        """What was taken, one-dimensional; the last two entries are the extremes of everything."""
        return torch.cat([*self._samples, torch.stack(self._extremes)])


class First:
    """The first tensor, whole, for what is always the same."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def __len__(self) -> int:
        """1 once there is one."""
        return int(self._first is not None)

    def add(self, x: Tensor) -> None:
        """Take a copy of ``x`` if it is the first."""
        if self._first is None:
            self._first = x.detach().clone()

    def entries(self) -> Tensor:
        """The tensor itself."""
        assert self._first is not None
        return self._first
