"""Small real networks for tests, from the hosts' own architectures."""

import torch
from torch import nn

from condiquant_basicsr import build_network

SECTIONS = {
    "swinir": {
        "type": "SwinIR", "upscale": 2, "img_size": 16, "window_size": 8, "img_range": 1.0,
        "depths": [2, 2], "embed_dim": 24, "num_heads": [2, 2], "mlp_ratio": 2,
        "upsampler": "pixelshuffledirect", "resi_connection": "1conv",
    },
    "dat": {
        "type": "DAT", "upscale": 2, "img_size": 32, "img_range": 1.0, "depth": [2],
        "embed_dim": 32, "num_heads": [2], "expansion_factor": 2, "resi_connection": "1conv",
        "split_size": [8, 8], "upsampler": "pixelshuffledirect",
    },
    "edsr": {
        "type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_block": 2, "upscale": 2,
    },
    "compact": {
        "type": "SRVGGNetCompact", "num_feat": 16, "num_conv": 3, "upscale": 2, "act_type": "prelu",
    },
}  # fmt: skip


def build(name: str) -> nn.Module:
    """The network with weights of trained magnitude, so that activations are alive."""
    torch.manual_seed(0)
    network = build_network(SECTIONS[name])
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "table" not in parameter_name:
                nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    return network


@torch.no_grad()
def skewed(spread: float = 30.0) -> nn.Module:
    """The compact network with every fourth channel so many times larger, computing the same."""
    network = build("compact")
    for first, second in ((0, 2), (2, 4), (4, 6)):
        factors = torch.ones(16)
        factors[::4] = spread
        network.body[first].weight.mul_(factors.view(-1, 1, 1, 1))
        network.body[first].bias.mul_(factors)
        network.body[second].weight.div_(factors.view(1, -1, 1, 1))
    return network
