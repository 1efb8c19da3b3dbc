"""Which of a network's layers are quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from condiquant_plugin.errors import InputError

Scope = Literal["transformer", "all"]
"""``"transformer"`` takes linear layers and products of activations (attention); ``"all"`` every linear
layer and convolution but the first and the last, and products."""
Kind = Literal["linear", "convolution", "product"]
_HINTS: dict[Scope, str] = {
    "transformer": 'use scope "all" for convolutional networks',
    "all": "it leaves out the first and the last layer",
}
_Layer = TypeVar("_Layer")


def select_layers(
    found: Sequence[_Layer],
    kind: Callable[[_Layer], Kind],
    scope: Scope,
    *,
    is_excluded: Callable[[_Layer], bool],
    others: bool,
    network: str,
    exclusion: str,
) -> list[tuple[_Layer, bool]]:
    """The layers to quantize, each with whether it is in scope.

    Args:
        found: all layers and products behind the network's input, in the order of computation.
        kind: of each of them.
        is_excluded: whether the user leaves it out.
        others: also the layers outside the scope.
        network: its name, for messages.
        exclusion: the argument behind ``is_excluded``, for messages.

    Raises:
        InputError: if no layer in scope is left.
    """
    if not found:
        raise InputError(
            f"{network} has no linear layer, 2-d convolution or product of activations behind its "
            "input: there is nothing to quantize"
        )
    if scope == "transformer":
        outside = {place for place, layer in enumerate(found) if kind(layer) == "convolution"}
    else:
        weighted = [place for place, layer in enumerate(found) if kind(layer) != "product"]
        outside = {*weighted[:1], *weighted[-1:]}
    selected = [
        (layer, place not in outside)
        for place, layer in enumerate(found)
        if (others or place not in outside) and not is_excluded(layer)
    ]
    if not any(in_scope for _, in_scope in selected):
        raise InputError(
            f"scope={scope!r} matches no layer of {network}: {_HINTS[scope]}, and check {exclusion}"
        )
    return selected
