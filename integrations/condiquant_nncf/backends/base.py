"""What the algorithms need of a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.common.graph.transformations.commands import TargetPoint
from torch import Tensor

from condiquant_nncf.layer import Layer
from condiquant_plugin.errors import InputError
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer

Solved = tuple[Sequence[Layer], Tensor, Tensor | None]
"""All uses of a weight, the weight, and the bias."""


class CondiQuantAlgoBackend(ABC):
    """One model of one framework, and NNCF's graph of it."""

    quantizer_class: ClassVar[type[FakeQuantizer]] = FakeQuantizer
    """What :meth:`insert_quantizers` takes."""

    def __init__(self, model: Any, graph: NNCFGraph) -> None:
        self.model, self.graph = model, graph

    @property
    @abstractmethod
    def model_name(self) -> str:
        """For messages."""

    @abstractmethod
    def copy_of_model(self) -> Any:
        """A model that can be changed while this one stays."""

    @abstractmethod
    def outputs(self, items: Iterable[Any]) -> list[Tensor]:
        """The first output for each item of a dataset, simulated in float32."""

    @abstractmethod
    def is_quantized(self) -> bool:
        """Whether the model holds quantizers or compressed weights already."""

    def check_is_float(self) -> None:
        """Raise :class:`InputError` if the model :meth:`is_quantized`."""
        if self.is_quantized():
            raise InputError(f"{self.model_name} is quantized already: give the float model")

    @abstractmethod
    def input_nodes(self) -> list[NNCFNode]:
        """Where the model's inputs come in."""

    @abstractmethod
    def passes_values(self, node: NNCFNode) -> bool:
        """False for a node whose output depends on the shape of its input only."""

    @abstractmethod
    def is_layer(self, node: NNCFNode) -> bool:
        """Whether the node is a matrix product or a 2-d convolution."""

    @abstractmethod
    def is_convolution(self, node: NNCFNode) -> bool:
        """Whether the node is a convolution, plain or transposed."""

    @abstractmethod
    def activation_ports(self, node: NNCFNode) -> tuple[int, ...]:
        """Input ports without a constant: one for a layer with a weight, two for a product."""

    def takes_softmax_map(self, layer: Layer, port: int) -> bool:
        """Whether a factor of a product is a softmax map, whose rows the product sums over."""
        return False

    @abstractmethod
    def layer(self, node: NNCFNode) -> Layer:
        """Describe a node that :meth:`is_layer`, row blocks and scope aside.

        Raises:
            InputError: a layer that the method cannot express; the message names the node.
        """

    @abstractmethod
    def weight(self, layer: Layer) -> Tensor:
        """The weight in PyTorch's shape of such a layer, or ``(in, out)`` if ``weight_transposed``."""

    @abstractmethod
    def bias(self, layer: Layer) -> Tensor | None:
        """The bias, shape ``(out,)``."""

    @abstractmethod
    def update(self, solved: Sequence[Solved]) -> Any:
        """The model with new weights, in the shape of :meth:`weight`, and where given new biases."""

    @abstractmethod
    def target_point(self, layer: Layer, port: int) -> TargetPoint:
        """Where an input of the layer is seen."""

    @abstractmethod
    def insert_quantizers(
        self, quantizers: Sequence[tuple[Layer, int | None, FakeQuantizer]]
    ) -> Any:
        """The model with quantizers on input ports, or, where the port is ``None``, on weights."""
