"""Outputs of the blocks inside both networks, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def feature_blocks(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the blocks that hold ``layers``: their nearest ancestors in a list of modules.

    These are the places where a quantized network is compared with the float one (2DQuant's features). A
    layer itself is none: with equalized channels its output is another one.
    """
    blocks: dict[str, None] = {}
    for layer in layers:
        name = layer.rpartition(".")[0]
        while name:
            parent, _, _ = name.rpartition(".")
            if isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential):
                blocks[name] = None
                break
            name = parent
    return list(blocks)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over blocks and samples of ``|F/|F| - Fq/|Fq||`` in the Frobenius norm (2DQuant, equation 8).

    Args:
        student, teacher: one tensor per block, ``(batch, ...)``.
    """
    distances = []
    for quantized, reference in zip(student, teacher, strict=True):
        directions = [
            f.flatten(1) / f.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-12)
            for f in (quantized, reference)
        ]
        distances.append((directions[0] - directions[1]).norm(dim=1).mean())
    return torch.stack(distances).mean()


@contextmanager
def captured(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the named modules during the forward passes inside the block."""
    features: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: features.__setitem__(name, output)

    handles = [network.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
