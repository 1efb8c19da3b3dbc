import pytest
import torch
from torch import nn

import condiquant_nncf
from condiquant_openvino import convert
from condiquant_openvino.parity.check import check_parities


class Attention(nn.Module):
    """One head, straight in front of a linear layer or a norm: nothing separates what the plugin fuses."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.projection = nn.Linear(16, 16)

    def forward(self, x):
        tokens = x.flatten(2).transpose(-2, -1).repeat(1, 1, 4)
        scores = self.queries(tokens) @ self.keys(tokens).transpose(-2, -1)
        attended = scores.softmax(-1) @ self.values(tokens)
        return self.projection(self.norm(attended))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_attention_straight_in_front_of_a_layer(norm, seed):
    torch.manual_seed(seed)
    images = torch.rand(4, 4, 8, 8)
    config = condiquant_nncf.QuantizationConfig(scope="transformer", recondition=None)
    model = condiquant_nncf.quantize_network(Attention(norm).eval(), images, config).model
    parities = check_parities(model, convert(model, images, static=True), [images[:1]])
    for parity in parities.values():
        parity.raise_if_broken()
