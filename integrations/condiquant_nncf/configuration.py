"""The quantization of the core with NNCF's way of leaving layers out; the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nncf

from condiquant_nncf.layer import Layer
from condiquant_nncf.layers import find_layers
from condiquant_plugin import configuration
from condiquant_plugin.layerwise.precision import check_rules_match

if TYPE_CHECKING:
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper


@dataclass(frozen=True)
class QuantizationConfig(configuration.QuantizationConfig):
    """:class:`condiquant_plugin.configuration.QuantizationConfig`, with layers left out by NNCF's rules."""

    ignored_scope: nncf.IgnoredScope | None = None

    def find_layers(self, model: GraphModelWrapper | Any) -> list[Layer]:
        """The layers to quantize; see :func:`condiquant_nncf.find_layers`.

        Raises:
            InputError: as there; a rule of ``layers`` without a layer, or rules that leave none.
        """
        others = self.other_bits is not None
        found = find_layers(model, self.scope, self.ignored_scope, others=others)
        if self.layers:
            every = find_layers(model, self.scope, self.ignored_scope, others=True)
            inside, outside = ([layer.name for layer in layers] for layers in (found, every))
            check_rules_match(self.layers, inside, outside, self.scope)
        return self.quantized_of(found, lambda la: la.name, lambda la: la.weight_node is not None)
