import sys

import torch
from torch.nn.parallel import replicate

from condiquant_basicsr.models.quantized_base import ReplicatedParameters
from condiquant_nncf import QuantizationConfig, quantize_network
from networks import build


def test_replicas_for_several_gpus_are_quantized_and_trained(monkeypatch):
    def copies(tensors, devices, detach=False):
        return [[tensor * 1 for tensor in tensors] for _ in devices]

    module = sys.modules[replicate.__module__]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)  # of CUDA only
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    config = QuantizationConfig(scope="all")
    network = quantize_network(build("edsr"), torch.rand(4, 3, 16, 16), config).model
    image = torch.rand(2, 3, 16, 16)
    expected = network(image)
    expected.square().mean().backward()
    wanted = {name: p.grad for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = None
    replicas = ReplicatedParameters(network).replicate(network, [0, 1])
    for replica in replicas:
        output = replica(image)
        assert torch.equal(output, expected)
        output.square().mean().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * wanted[name])
