import nncf
import pytest
import torch
from torch import nn

from condiquant_nncf import feature_blocks, find_layers, wrap
from condiquant_plugin import InputError
from networks import build


def names(network, scope, size=16, **arguments):
    layers = find_layers(wrap(network, torch.rand(1, 3, size, size)), scope, **arguments)
    return [layer.name for layer in layers]


def test_transformer_scope_of_swinir_is_its_linears_and_attention_products():
    found = names(build("swinir"), "transformer")
    block = "layers.{}.residual_group.blocks.{}"
    for layer in range(2):
        for index in range(2):
            prefix = block.format(layer, index)
            for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                assert f"{prefix}.{part}" in found
    assert sum("matmul" in n for n in found) == 2 * 4
    assert len(found) == 4 * 4 + 2 * 4


def test_position_bias_networks_of_dat_are_left_alone():
    found = names(build("dat"), "transformer", size=32)
    assert any(n.endswith("attn.qkv") for n in found)
    assert not any("pos" in n for n in found)


def test_fused_qkv_has_three_row_blocks():
    layers = find_layers(wrap(build("swinir"), torch.rand(1, 3, 16, 16)), "transformer")
    assert {layer.row_blocks for layer in layers if layer.name.endswith("qkv")} == {3}
    assert {layer.row_blocks for layer in layers if not layer.name.endswith("qkv")} == {1}


def test_scope_all_leaves_out_the_first_and_the_last_layer():
    found = names(build("edsr"), "all")
    assert "body.0.conv1" in found
    assert "conv_first" not in found
    assert "conv_last" not in found


def test_transformer_scope_matches_nothing_in_a_cnn():
    with pytest.raises(InputError, match=r'scope=.transformer. matches no layer.*"all"'):
        names(build("edsr"), "transformer")


def test_ignored_scope_is_nncfs():
    everything = names(build("swinir"), "transformer")
    ignored = nncf.IgnoredScope(patterns=[".*qkv.*"])
    assert names(build("swinir"), "transformer", ignored_scope=ignored) == [
        n for n in everything if not n.endswith("qkv")
    ]
    with pytest.raises(InputError, match="no_such_layer"):
        names(
            build("swinir"), "transformer", ignored_scope=nncf.IgnoredScope(names=["no_such_layer"])
        )


def test_a_bare_sequential_is_refused():
    with pytest.raises(InputError, match=r"bare nn\.Sequential"):
        names(nn.Sequential(nn.Conv2d(3, 4, 3)), "all")


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (2, 1)),
        nn.Conv2d(4, 8, 3, padding="same", groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ConvTranspose2d(4, 6, 4, 2, 1),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, dilation=2, groups=2),
    ],
    ids=str,
)
def test_geometry_is_the_modules(module):
    network = nn.Module()
    network.body = nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.Conv2d(module.out_channels, 3, 1))
    network.forward = network.body.forward
    [layer] = find_layers(wrap(network, torch.rand(1, 3, 16, 16)), "all")
    geometry = layer.geometry
    assert geometry.kernel_size == module.kernel_size
    assert geometry.stride == module.stride
    assert geometry.dilation == module.dilation
    assert geometry.groups == module.groups
    assert geometry.padding == ((1, 1) if module.padding == "same" else module.padding)
    if isinstance(module, nn.ConvTranspose2d):
        assert geometry.output_padding == module.output_padding


def test_feature_blocks_are_the_repeated_blocks():
    def blocks(name, scope):
        network = build(name)
        layers = find_layers(wrap(network, torch.rand(1, 3, 32, 32)), scope)
        return feature_blocks(network, layers)

    group = "layers.{}.residual_group.blocks.{}"
    assert blocks("swinir", "transformer") == [group.format(i, j) for i in (0, 1) for j in (0, 1)]
    assert blocks("dat", "transformer") == ["layers.0.blocks.0", "layers.0.blocks.1"]
    assert blocks("edsr", "all")[:2] == ["body.0", "body.1"]
