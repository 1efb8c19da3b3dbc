"""SRVGGNetCompact and RRDBNet from ncnn files (``.param``, ``.bin``) to BasicSR's state dicts.

Layout of the blobs: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure. The
networks of Real-ESRGAN take and give RGB in 0 to 1, as the ncnn-vulkan program feeds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from condiquant_plugin.errors import InputError

_MAGIC = "7767517"
_FLOAT16, _FLOAT32 = 0x01306B47, 0
_KERNEL = 3
_WEIGHTED = ("Convolution", "PReLU")


class _Layer(NamedTuple):
    kind: str
    options: dict[int, str]

    def number(self, key: int) -> int:
        return int(self.options.get(key, "0"))


def read_network(param: Path, blobs: Path) -> dict[str, Tensor]:
    """State dict (float32) of BasicSR's ``SRVGGNetCompact`` with PReLU or ``RRDBNet`` of scale 4.

    Raises:
        InputError: another network, a resize behind the network, or blobs that do not fit the text.
    """
    layers = _read_layers(param)
    names = _names_of_compact(layers, param) or _names_of_rrdb(layers)
    if not names:
        raise InputError(
            f"{param}: only SRVGGNetCompact and RRDBNet x4 are read from ncnn files; convert others"
        )
    reader = _Reader(blobs)
    state: dict[str, Tensor] = {}
    weighted = (layer for layer in layers if layer.kind in _WEIGHTED)
    for index, (name, layer) in enumerate(zip(names, weighted, strict=True)):
        size = layer.number(0)
        if layer.kind == "PReLU":
            state[f"{name}.weight"] = reader.float32(size)
            continue
        channels = layer.number(6) // (size * _KERNEL**2)
        shape = (size, channels, _KERNEL, _KERNEL)
        if layer.number(6) != np.prod(shape) or layer.number(1) != _KERNEL:
            raise InputError(f"{param}: layer {index} is no {_KERNEL}x{_KERNEL} convolution")
        state[f"{name}.weight"] = reader.weight(layer.number(6)).reshape(shape)
        state[f"{name}.bias"] = reader.float32(size)
    reader.finish()
    return state


def _read_layers(param: Path) -> list[_Layer]:
    try:
        magic, counts, *lines = param.read_text(encoding="ascii").split("\n")
        layers = []
        for fields in (line.split() for line in lines if line.strip()):
            first = 4 + int(fields[2]) + int(fields[3])
            pairs = (field.split("=") for field in fields[first:])
            layers.append(_Layer(fields[0], {int(key): value for key, value in pairs}))
        announced = int(counts.split()[0])
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{param}: not a readable ncnn .param file ({error})") from error
    if magic.strip() != _MAGIC or announced != len(layers):
        raise InputError(f"{param}: not a whole ncnn .param file: fetch it again")
    return layers


def _names_of_compact(layers: list[_Layer], param: Path) -> list[str]:
    """Of its layers with weights, in order; empty for another network."""
    kinds = [layer.kind for layer in layers]
    body = kinds.count("PReLU")
    expected = ["Input", "Split", *["Convolution", "PReLU"] * body, "Convolution"]
    expected += ["PixelShuffle", "Interp", "BinaryOp"]
    if kinds == [*expected, "Interp"]:
        native = layers[-4].number(0)
        raise InputError(
            f"{param.name}: this is the x{native} network with a resize behind it;"
            f" its native scale is {native}: take the x{native} file"
        )
    return [f"body.{index}" for index in range(2 * body + 1)] if kinds == expected else []


def _names_of_rrdb(layers: list[_Layer]) -> list[str]:
    """Of its convolutions, in order; empty for another network."""
    kinds = [layer.kind for layer in layers if layer.kind != "Split"]
    dense = [*["Convolution", "Concat"] * 4, "Convolution", "Eltwise"]
    body = [*dense * 3, "Eltwise"]
    tail = ["Convolution", "BinaryOp", *["Interp", "Convolution"] * 2, *["Convolution"] * 2]
    count = (len(kinds) - len(tail) - 2) // len(body)
    if kinds != ["Input", "Convolution", *body * count, *tail]:
        return []
    blocks = [
        f"body.{block}.rdb{part}.conv{convolution}"
        for block in range(count)
        for part in range(1, 4)
        for convolution in range(1, 6)
    ]
    return ["conv_first", *blocks, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]


class _Reader:
    """Takes blobs from the front of a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0
        try:
            self._data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error

    def weight(self, count: int) -> Tensor:
        flag = int.from_bytes(self._take(4), "little")
        if flag == _FLOAT16:
            padded = self._take((2 * count + 3) // 4 * 4)
            return _to_tensor(np.frombuffer(padded, "<f2", count))
        if flag == _FLOAT32:
            return self.float32(count)
        raise InputError(f"{self._path}: weights of ncnn type {flag:#x}; use an fp16 or fp32 file")

    def float32(self, count: int) -> Tensor:
        return _to_tensor(np.frombuffer(self._take(4 * count), "<f4"))

    def finish(self) -> None:
        if self._position != len(self._data):
            raise InputError(f"{self._path} is longer than its .param file says: they do not match")

    def _take(self, size: int) -> bytes:
        taken = self._data[self._position : self._position + size]
        if len(taken) != size:
            raise InputError(f"{self._path} is shorter than its .param file says: fetch it again")
        self._position += size
        return taken


def _to_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
