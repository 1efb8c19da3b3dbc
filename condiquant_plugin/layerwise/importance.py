"""How much each block of a network changes what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from condiquant_plugin.forward_pass import run
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.chain import first_of


@torch.no_grad()
def block_importance(
    model: nn.Module, batches: Sequence[Any], blocks: Sequence[str]
) -> dict[str, float]:
    """``1 - cosine`` of a block's input and output, the mean over tokens: 0 for a block that does nothing.

    The first and the last block of a language model change most.

    Args:
        batches: as :func:`condiquant_plugin.layerwise.blocks.solve_block_by_block` takes them.
        blocks: names of modules that take and give ``(..., features)`` first.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in blocks}

    def compare(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        similarity = F.cosine_similarity(args[0], first_of(output), dim=-1)
        sums[name] += torch.tensor([float(similarity.double().sum()), similarity.numel()])

    hooks = [
        model.get_submodule(name).register_forward_hook(partial(compare, name)) for name in blocks
    ]
    try:
        with distributed.failing_together("comparing blocks"):
            for batch in batches:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: max(1 - float(s[0] / s[1]), 0.0) for name, s in sums.items()}
    agreed: dict[str, float] = distributed.agreed(found)
    return agreed
