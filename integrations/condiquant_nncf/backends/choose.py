"""What the algorithms need of a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nncf.common.factory import build_graph
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.common.graph.transformations.commands import TargetPoint
from nncf.common.utils.backend import BackendType, get_backend
from torch import Tensor

from condiquant_plugin.errors import InputError
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer

if TYPE_CHECKING:
    from condiquant_nncf.layers import Layer

AVAILABLE_BACKENDS = [BackendType.TORCH, BackendType.OPENVINO]
_REMEDIES = {
    BackendType.ONNX: "convert the model with openvino.convert_model and give the ov.Model",
    BackendType.TORCH_FX: "give the torch.nn.Module itself instead of the exported GraphModule",
}


Solved = tuple[Sequence["Layer"], Tensor, Tensor | None]
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


def get_algo_backend(model: Any, graph: NNCFGraph | None = None) -> CondiQuantAlgoBackend:
    """The backend of a model; on torch the model is NNCF's ``GraphModelWrapper``.

    Raises:
        InputError: a backend that NNCF supports and CondiQuant does not.
        nncf.UnsupportedBackendError: a model of no backend at all.
    """
    kind = check_backend(model)
    if graph is None:
        graph = build_graph(model)
    if kind is BackendType.OPENVINO:
        from condiquant_nncf.backends.openvino import OVCondiQuantAlgoBackend

        return OVCondiQuantAlgoBackend(model, graph)
    from condiquant_nncf.backends.torch import PTCondiQuantAlgoBackend

    return PTCondiQuantAlgoBackend(model, graph)


def check_backend(model: Any) -> BackendType:
    """The framework of a model; raises as :func:`get_algo_backend`."""
    kind = get_backend(model)
    if kind not in AVAILABLE_BACKENDS:
        raise InputError(f"CondiQuant has no {kind.value} backend: {_REMEDIES[kind]}")
    return kind


def get_float_backend(model: Any, graph: NNCFGraph) -> CondiQuantAlgoBackend:
    """As :func:`get_algo_backend`, for a model that is yet to be quantized.

    Raises:
        InputError: also a model that is quantized or compressed already.
    """
    backend = get_algo_backend(model, graph)
    backend.check_is_float()
    return backend
