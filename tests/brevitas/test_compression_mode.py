"""``weight_compression_mode``, beside Brevitas' ``gptq_mode`` and the plugin's own way through blocks."""

import re

import pytest
import torch
from brevitas import nn as qnn
from brevitas.graph.gptq import gptq_mode
from torch import nn

from condiquant_brevitas import weight_compression_mode
from condiquant_plugin import InputError
from condiquant_plugin.compression import CompressionConfig, compress_blocks, compressed_weights
from language_networks import llama, tokens


def compressed(model, **settings):
    with torch.no_grad(), weight_compression_mode(model, **settings) as mode:
        for _ in range(mode.num_layers):
            for ids in tokens(3):
                mode.model(ids, use_cache=False)
            mode.update()
    return mode


@pytest.mark.parametrize("method", ["arb_rc", "pbs2p", "adasvd", "gptq"])
def test_one_shot_finds_what_the_blocks_give(method):
    expected, found = llama(2), llama(2)
    settings = {} if method == "adasvd" else {"group_size": 16}
    config = CompressionConfig(method, adaptive=False, inputs="original", **settings)
    batches = [{"input_ids": ids, "use_cache": False} for ids in tokens(3)]
    reports = compress_blocks(expected, batches, config)
    mode = compressed(
        found, method=method, sequential=False, name_blacklist=["lm_head"], **settings
    )
    assert mode.num_layers == 1
    assert mode.report.keys() == reports.keys() == compressed_weights(found).keys()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=1e-3, atol=1e-5)
    for name, report in reports.items():
        assert mode.report[name].bits_per_weight == report.bits_per_weight
    assert not any("weight_orig" in name for name, _ in found.named_buffers())
    assert "forward" not in vars(found)


def test_sequential_layers_see_the_compressed_ones_before():
    def error(**settings):
        model, exact = llama(2), llama(2)
        compressed(
            model, method="gptq", bits=2, group_size=16, name_blacklist=["lm_head"], **settings
        )
        with torch.no_grad():
            return sum(
                float((model(ids).logits - exact(ids).logits).square().mean()) for ids in tokens(3)
            )

    assert error(sequential=True) != error(sequential=False)
    mode = compressed(llama(2), group_size=16, name_blacklist=["lm_head"])
    assert mode.num_layers == 14
    parallel = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    mode = compressed(
        llama(2), group_size=16, name_blacklist=["lm_head"], group_of_parallel_layers=[parallel]
    )
    assert mode.num_layers == 12
    assert len(mode.report) == 14


def test_the_protocol_is_that_of_gptq_mode_on_brevitas_layers():
    torch.manual_seed(0)
    layers = [qnn.QuantLinear(16, 16, bias=True, weight_bit_width=4) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()
    x = torch.randn(64, 16)
    for mode in (weight_compression_mode, gptq_mode):
        settings = {"method": "gptq", "bits": 4, "group_size": 16} if mode is not gptq_mode else {}
        with torch.no_grad(), mode(model, **settings) as running:
            for _ in range(running.num_layers):
                running.model(x)
                running.update()
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "int4"}, "mode='int4' is not known"),
        ({"adaptive": True}, "adaptive=True is not for this mode"),
        ({"inputs": "original"}, "inputs='original' is not for this mode: use sequential"),
        ({"group_size": 24}, "group_size=24 does not divide the 32 inputs of model.layers.0"),
        ({"name_blacklist": ["nothing"]}, "there is no module 'nothing'"),
    ],
)
def test_bad_input_is_named_and_the_model_stays_as_it_was(settings, words):
    model = llama(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(words)):
        compressed(model, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model)
