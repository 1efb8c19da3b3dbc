"""Checkpoint files: every form that is read, and what is said of those that are not."""

import argparse
import io
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save as serialize
from safetensors.torch import save_file

from condiquant_basicsr import load_network, load_state_dict
from errors_in_one_line import message_of


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 broken"])
def test_corrupt_file_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(content)
    assert "not a readable checkpoint" in message_of(load_state_dict, path)


def test_pickled_code_is_refused(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"params": torch.nn.Linear(2, 2)}, path)
    assert "not a readable checkpoint" in message_of(load_state_dict, path)


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
    message = message_of(load_state_dict, tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: not a readable checkpoint")
    assert part in message
    assert "\x1b" not in message
    assert "weights_only" not in message.lower().replace(" ", "_")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_module_saved_whole_is_named(tmp_path, swinir):
    torch.save(swinir, tmp_path / "net.pth")
    message = message_of(load_state_dict, tmp_path / "net.pth")
    assert "(basicsr.archs.swinir_arch.SwinIR), which can run code" in message


def test_an_unreadable_place_says_why(tmp_path):
    assert "Is a directory" in message_of(load_state_dict, tmp_path)


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
    assert "a.weight is a tensor of" in message_of(load_state_dict, tmp_path / "net.pth")


@pytest.mark.parametrize("content", [[1, 2], {}, {"iter": 3}, {"params": {}}])
def test_checkpoint_without_weights(tmp_path, content):
    path = tmp_path / "net.pth"
    torch.save(content, path)
    assert str(path) in message_of(load_state_dict, path)
