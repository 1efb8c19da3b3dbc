"""One layer of a network, as NNCF's graph has it."""

from __future__ import annotations

from dataclasses import dataclass, field

from nncf.common.graph.graph import NNCFNode
from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.moments import LayerGeometry


@dataclass(frozen=True)
class Layer:
    """A layer with a weight, or the product of two activations (``weight_name is None``)."""

    name: str
    """Module name of a layer with a weight, on both backends where the graph keeps it, else NNCF's node
    name. Of a product, :func:`condiquant_plugin.calls.product_name` on torch, else NNCF's node name. A
    further use of the same weight has ``#1``, ``#2`` … behind it."""
    node: NNCFNode = field(repr=False)
    geometry: LayerGeometry = LayerGeometry()
    weight_node: NNCFNode | None = field(default=None, repr=False)
    bias_node: NNCFNode | None = field(default=None, repr=False)
    weight_name: str | None = None
    """Name of the weight in the model: as in ``state_dict``, or of the constant."""
    bias_name: str | None = None
    weight_port: int = 1
    weight_transposed: bool = False
    """Whether the weight of a matrix product is kept as ``(in_features, out_features)``."""
    activation_ports: tuple[int, ...] = (0,)
    """Input ports that carry activations."""
    transposed_inputs: frozenset[int] = frozenset()
    """Activation ports whose last two axes are the other way round than the product takes them."""
    row_blocks: int = 1
    """3 for a fused query-key-value projection: its row blocks are matrices of their own."""
    in_scope: bool = True
    """False for a layer outside the scope, which gets bits of its own."""
    reuses_weight: bool = False
    """Whether an earlier layer has the same weight."""

    @property
    def output_axis(self) -> int:
        """Axis of the weight that counts output channels."""
        return int(self.geometry.kind == "conv_transpose" or self.weight_transposed)

    def rows_first(self, weight: Tensor) -> Tensor:
        """The weight as :mod:`condiquant_plugin.layerwise.moments` takes it, and back."""
        return weight.mT.contiguous() if self.weight_transposed and weight.ndim else weight

    def features_last(self, x: Tensor, port: int) -> Tensor:
        """What arrives at ``port`` in the order of the product."""
        return x.mT if port in self.transposed_inputs else x

    def input_name(self, port: int) -> str:
        """Name of the quantizer at ``port``."""
        suffix = "input" if self.weight_node is not None else f"input{port}"
        return f"{self.name}.{suffix}"


def same_padding(kernel: tuple[int, int], dilation: tuple[int, int], name: str) -> tuple[int, int]:
    """Padding that keeps the size at stride 1.

    Raises:
        InputError: an even kernel, which needs more on one side.
    """
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(total % 2 for total in totals):
        raise InputError(f'{name} has padding="same" with an even kernel: put it in ignored_scope')
    return totals[0] // 2, totals[1] // 2
