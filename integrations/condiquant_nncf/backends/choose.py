"""The backend of a model."""

from __future__ import annotations

from typing import Any

from nncf.common.factory import build_graph
from nncf.common.graph.graph import NNCFGraph
from nncf.common.utils.backend import BackendType, get_backend

from condiquant_nncf.backends.base import CondiQuantAlgoBackend
from condiquant_plugin.errors import InputError

AVAILABLE_BACKENDS = [BackendType.TORCH, BackendType.OPENVINO]
_REMEDIES = {
    BackendType.ONNX: "convert the model with openvino.convert_model and give the ov.Model",
    BackendType.TORCH_FX: "give the torch.nn.Module itself instead of the exported GraphModule",
}


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
