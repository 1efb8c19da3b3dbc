"""What a file is that was given for a checkpoint, told by its content."""

from __future__ import annotations

import zipfile
from pathlib import Path

_HEAD = 512
_AGAIN = "fetch it again"
_SIGNATURES = (
    (b"version https://git-lfs", "a git-lfs pointer", "run git lfs pull, or download the file"),
    (b"GGUF", "a GGUF file", "give the PyTorch checkpoint it was made from"),
    (b"\x89HDF", "an HDF5 file", "give a PyTorch checkpoint"),
    (b"\x93NUMPY", "a NumPy array", "give a PyTorch checkpoint"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and give the checkpoint in it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and give the checkpoint in it"),
    (b"Rar!", "a RAR archive", "unpack it and give the checkpoint in it"),
    (b"\x89PNG", "a PNG image", "give the checkpoint"),
    (b"\xff\xd8\xff", "a JPEG image", "give the checkpoint"),
    (b"\0\5\x16\7", "macOS metadata (AppleDouble)", "give the file without ._ before its name"),
)
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_PRODUCER = b"\x12"
"""Tag that follows the version at the beginning of ONNX models."""


def holds_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of its JSON header, then that."""
    return _head(path)[8:10] in (b'{"', b"{}", b"{ ")


def holds_pytorch(path: Path) -> bool:
    """Whether a file begins as those of ``torch.save`` do, which other pickles and archives do, too."""
    return _head(path).startswith((_ZIP, _PICKLE))


def foreign_kind(path: Path) -> tuple[str, str] | None:
    """What a file is if it is no whole checkpoint, and what to do about it; None if it may be one."""
    head = _head(path)
    if not head:
        return "an empty file", _AGAIN
    if head.startswith(_ZIP):
        return _archive(path)
    for signature, kind, remedy in _SIGNATURES:
        if head.startswith(signature):
            return kind, remedy
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML)", "download the file itself, not the page that shows it"
    if text.startswith(b"<"):
        return "an XML file", "give a PyTorch checkpoint"
    if path.suffix.lower() == ".onnx" or (head[:1] == b"\x08" and head[2:3] == _PRODUCER):
        return "an ONNX model", "give the PyTorch checkpoint it was exported from"
    if head.startswith(_PICKLE) or holds_safetensors(path):
        return None
    if all(byte >= ord(" ") or byte in b"\t\r\n" for byte in head) and head.isascii():
        return f"a text file that begins {head[:24].decode()!r}", "give the checkpoint"
    return None


def _archive(path: Path) -> tuple[str, str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError):
        return "a file of torch.save or another ZIP archive that is cut off or damaged", _AGAIN
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        return (
            "a TorchScript program",
            "save the weights alone: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)",
        )
    if "data.pkl" not in inside:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"a ZIP archive of {shown or 'nothing'}", "unpack it and give the checkpoint in it"
    return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)
