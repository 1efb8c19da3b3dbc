"""Moments of the layers of one block, as batches pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from condiquant_plugin.layerwise.moments import LayerGeometry, Moments, moments_of, no_moments


class ReachedError(Exception):
    """Ends a forward pass of which nothing more is wanted."""


@dataclass(frozen=True)
class _Seen:
    """The last input of a layer, and its moments where another may take the same."""

    x: Tensor
    name: str
    moments: Moments | None


class Collector:
    """Sums of a block's layers over batches.

    Args:
        layers: by name.
        geometries: of each.
        dtype: of the sums.
        quantized: whether they are those of quantized inputs, too.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        geometries: Mapping[str, LayerGeometry],
        *,
        dtype: torch.dtype,
        quantized: bool,
    ) -> None:
        self.moments = {
            name: no_moments(
                layer.weight,  # type: ignore[arg-type]
                geometries[name],
                quantized=quantized,
                dtype=dtype,
            )
            for name, layer in layers.items()
        }
        self._geometries, self._dtype = geometries, dtype
        self._together: set[str] = set()
        self._seen: _Seen | None = None
        self._batches = 0
        self._size = 0
        self._first: dict[str, int] = {}
        self._first_size = 0

    def next_batch(self, size: int) -> None:
        """Inputs from now on belong to a batch of so many numbers."""
        if self._batches == 1:
            self._first = {name: m.samples for name, m in self.moments.items()}
            self._first_size = self._size
        self._batches += 1
        self._size = size
        self._seen = None
        self._before = {name: m.samples for name, m in self.moments.items()}

    def add(self, name: str, x: Tensor, codes: Tensor | None = None) -> None:
        """One input of a layer, and what its quantizer makes of it."""
        geometry, mine, seen = self._geometries[name], self.moments[name], self._seen
        of = partial(moments_of, x, geometry, codes, name=name, dtype=self._dtype)
        if codes is not None:
            of(into=mine)
        elif seen and seen.x is x and self._geometries[seen.name] == geometry:
            self._together |= {seen.name, name}  # query, key and value take one tensor
            new = seen.moments or of()
            mine += new
            self._seen = _Seen(x, name, new)
        elif self._batches == 1 or name in self._together:
            mine += (new := of())
            self._seen = _Seen(x, name, new)
        else:
            of(into=mine)
            self._seen = _Seen(x, name, None)

    @property
    def has_all(self) -> bool:
        """Whether all layers have seen as much of this batch, for its size, as of the first, whole one."""
        return self._batches > 1 and all(
            self._first[name] > 0
            and (m.samples - self._before[name]) * self._first_size
            == self._first[name] * self._size
            for name, m in self.moments.items()
        )


def share_equal(moments: dict[str, Moments]) -> None:
    """Let consecutive layers of equal Gram matrices have one: query, key and value."""
    last: Moments | None = None
    for name, mine in moments.items():
        if (
            last is not None
            and mine.quantized_gram is None
            and mine.samples == last.samples
            and torch.equal(mine.total, last.total)
            and torch.equal(mine.gram, last.gram)
        ):
            moments[name] = last
        last = moments[name]


@contextmanager
def observed(
    layers: Mapping[str, nn.Module], observe: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """``observe(name, input)`` whenever a layer is called."""

    def hook(
        name: str, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        observe(name, args[0] if args else kwargs["input"])

    hooks = [
        layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
