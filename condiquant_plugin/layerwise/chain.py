"""Whether blocks follow one another: each takes what the one before it gives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from condiquant_plugin.errors import InputError
from condiquant_plugin.forward_pass import run as run_model


def check_chain(model: nn.Module, blocks: Sequence[str], batch: Any) -> None:
    """Raise :class:`InputError` unless each block is called once, on what the one before it gives."""
    called: list[str] = []
    last: list[Any] = []
    common: list[Any] = []

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position = len(called)
        called.append(name)
        others = tree_flatten((args[1:], kwargs))
        if called != list(blocks[: len(called)]):
            raise InputError(
                f"{name} is block {position + 1} to be called: name blocks in their order"
            )
        if not args or not isinstance(args[0], Tensor):
            raise InputError(f"the first argument of {name} is no tensor: its blocks are no chain")
        if position and args[0] is not last[0]:
            raise InputError(
                f"{name} does not take what {blocks[position - 1]} returns: its blocks are no chain"
            )
        if position and not equal_arguments(others, common[0]):
            raise InputError(f"{name} takes other arguments than {blocks[0]}: name like blocks")
        common[:] = common or [others]

    def after(_: nn.Module, args: Any, output: Any) -> None:
        last[:] = [first_of(output)]

    handles = []
    for name in blocks:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(called) < len(blocks):
        raise InputError(f"{blocks[len(called)]} is not called: name the blocks that compute")


def first_of(output: Any) -> Any:
    """A block's output, or the first of its outputs."""
    return output[0] if isinstance(output, tuple | list) else output


def equal_arguments(a: tuple[list[Any], Any], b: tuple[list[Any], Any]) -> bool:
    """Whether arguments, as ``tree_flatten`` gives them, are the same values."""
    if a[1] != b[1]:
        return False
    return all(
        x is y
        or (
            torch.equal(x, y)
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype
            else not isinstance(x, Tensor) and bool(x == y)
        )
        for x, y in zip(a[0], b[0], strict=True)
    )
