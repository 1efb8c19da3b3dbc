import pytest
import torch
from basicsr.archs.ecbsr_arch import ECBSR

from condiquant_basicsr import build_network, folded, input_channels, load_network
from condiquant_basicsr.checkpoints import save_checkpoint
from condiquant_basicsr.quantizer import read_quantized
from condiquant_plugin.errors import InputError
from training_job import OPTIONS

ECBSR_Y = {
    "type": "ECBSR", "num_in_ch": 1, "num_out_ch": 1, "num_block": 2, "num_channel": 8,
    "with_idt": True, "act_type": "prelu", "scale": 2,
}  # fmt: skip


def test_folded_blocks_are_convolutions_that_compute_the_same():
    network = build_network(ECBSR_Y)
    image = torch.rand(1, 1, 12, 10)
    with torch.no_grad():
        several = network.train()(image)
        one = folded(network).train()(image)
    assert isinstance(network, ECBSR)
    assert not any(hasattr(module, "rep_params") for module in network.modules())
    torch.testing.assert_close(one, several, atol=1e-5, rtol=1e-4)


def test_networks_of_one_channel_load_where_they_are_asked_for(tmp_path):
    torch.save({"params": build_network(ECBSR_Y).state_dict()}, tmp_path / "y.pth")
    assert input_channels(ECBSR_Y) == 1
    assert input_channels(OPTIONS["network_g"]) == 3
    _, scale = load_network(ECBSR_Y, str(tmp_path / "y.pth"), channels=1)
    assert scale == 2
    with pytest.raises(InputError, match="does not take an RGB image"):
        load_network(ECBSR_Y, str(tmp_path / "y.pth"))


def test_checkpoints_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "net_g_1.pth"
    save_checkpoint({"params": {"a": torch.ones(2)}}, path)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(AttributeError):
        save_checkpoint({"params": lambda: None}, path)  # breaks off half-way
    with pytest.raises(InputError, match=r"cannot write .*net_g_1\.pth .*: make room on the disk"):
        save_checkpoint({"params": {}}, tmp_path / "absent" / "net_g_1.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["net_g_1.pth"]
    with pytest.raises(InputError, match="holds a float network: quantize it with"):
        read_quantized(path)
