"""Checkpoint files: reading them without running code in them, and writing them."""

from __future__ import annotations

import _codecs
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from condiquant_basicsr import ncnn
from condiquant_basicsr.file_kinds import foreign_kind, holds_pytorch, holds_safetensors
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import replacing

_STATE_KEYS = (
    "params_ema", "params", "state_dict", "model_state_dict", "model", "net_g", "netG", "generator",
    "net",
)  # fmt: skip
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that torch.compile, FSDP and activation checkpointing put into names, anywhere in them."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAVE_TRIES = 3
_FORBIDDEN = re.compile(r"GLOBAL (\S+)|got <class '([^']+)'>")
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*m")
_logger = logging.getLogger(__name__)

_scalar: Any = np.float64(0).__reduce__()[0]


def _scalar_of_numpy_1(*arguments: Any) -> Any:
    return _scalar(*arguments)


_scalar_of_numpy_1.__module__ = "numpy.core.multiarray"
_scalar_of_numpy_1.__qualname__ = "scalar"
_HARMLESS = [
    _scalar,
    _scalar_of_numpy_1,
    np.dtype,
    _codecs.encode,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?SU"},
]
"""What pickled NumPy scalars, such as a PSNR beside the weights, are made by."""


def load_state_dict(path: Path, param_key: str | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint: safetensors, ncnn ``.bin`` beside ``.param``, else PyTorch's.

    Float types of 8 bits become float32, with a line in the log. A common prefix ``module.`` is dropped,
    and what torch.compile, FSDP and activation checkpointing add to names.

    Args:
        param_key: entry that holds the weights; by default the first of ``params_ema``, ``params``,
            ``state_dict``, ``model_state_dict``, ``model``, ``net_g``, ``netG``, ``generator``, ``net``,
            else the only one that holds any, else the checkpoint itself; entries in it likewise. As in
            BasicSR ``params`` stands in for a missing ``params_ema``.

    Raises:
        InputError: unreadable, no weights in it, a NaN or Inf in a tensor, or tensors that are no plain
            numbers.
    """
    content = read_checkpoint(path)
    state: Any = content if param_key is None else content[entry_named(param_key, content, path)]
    while (key := _weights_key(state, path)) is not None:
        state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path}: holds no weights; give a checkpoint or another param_key")
    tensors = {}
    converted = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name!r} is no tensor; choose the weights by param_key")
        tensors[_unwrapped(str(name))] = plain = _plain(tensor, f"{path}: {name}")
        if plain.dtype != tensor.dtype:
            converted.add(_name(tensor.dtype))
        if not plain.isfinite().all():
            raise InputError(f"{path}: NaN or Inf in {name}; use a sound checkpoint")
    if converted:
        _logger.warning("%s: %s converted to float32", path, ", ".join(sorted(converted)))
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def entry_named(param_key: str, content: Mapping[str, Any], path: Path) -> str:
    """``param_key``; as in BasicSR ``params`` stands in for a missing ``params_ema``.

    Raises:
        InputError: the checkpoint has no such entry.
    """
    for key in (param_key, "params" if param_key == "params_ema" else param_key):
        if key in content:
            return key
    keys = ", ".join(str(key) for key in list(content)[:5])
    raise InputError(
        f"{path}: no entry {param_key!r}; it has {keys}: correct param_key_g, or leave it out"
    )


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Content of a checkpoint file, on the CPU: safetensors, ncnn ``.bin``, else PyTorch's.

    Raises:
        InputError: not there or unreadable, which says what the file is instead, or no mapping.
    """
    try:
        if path.suffix.lower() == ".bin" and not holds_pytorch(path):
            return ncnn.read_network(path.with_suffix(".param"), path)
        if (foreign := foreign_kind(path)) is not None:
            kind, remedy = foreign
            raise InputError(f"{path}: not a readable checkpoint but {kind}: {remedy}")
        if holds_safetensors(path):
            return load_file(path)
        # An open file: by the suffix of a path torch chooses other readers.
        with path.open("rb") as file, safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint{_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def save_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint, whole or not at all; as in BasicSR an error of the disk gets further tries.

    Raises:
        InputError: none of them succeeded.
    """
    for remaining in reversed(range(_SAVE_TRIES)):
        try:
            with replacing(path) as temporary:
                torch.save(dict(content), temporary)
            return
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            if not remaining:
                raise InputError(
                    f"cannot write {path} ({' '.join(str(error).split())}): make room on the disk, then"
                    " run again with --auto_resume"
                ) from error
            time.sleep(1)


def _reason(error: Exception) -> str:
    """What an error of torch or safetensors means for the file, with the remedy."""
    if isinstance(error, OSError) and error.strerror:
        return f" ({error.strerror})"
    text = " ".join(_TERMINAL_CODE.sub("", str(error)).split())
    if "weights_only" in text or "Weights only" in text:
        if found := _FORBIDDEN.search(text):
            return (
                f": it holds a pickled Python object ({found[1] or found[2]}), which can run code and is"
                " not loaded; save the tensors alone: torch.save(model.state_dict(), NEW_FILE)"
            )
        return ": neither a whole file of torch.save nor of another known kind; fetch it again"
    if isinstance(error, (EOFError, IndexError)) or "PytorchStreamReader" in text:
        return ": it is cut off or damaged; fetch it again"
    if "incomplete" in text or "deserializing header" in text:
        return ": a safetensors file that is cut off or damaged; fetch it again"
    return f" ({text[:120] or type(error).__name__}); give another file"


def _weights_key(state: Any, path: Path) -> str | None:
    """Key of the entry that holds the weights, if they are not the mapping itself.

    Raises:
        InputError: several may be meant.
    """
    if not isinstance(state, Mapping):
        return None
    holding = [key for key, value in state.items() if next(_tensors_in(value), None) is not None]
    known = [key for key in _STATE_KEYS if key in holding]
    if known or any(isinstance(value, Tensor) for value in state.values()):
        return next(iter(known), None)
    if len(holding) > 1:
        raise InputError(
            f"{path}: several entries hold weights ({', '.join(map(str, holding[:5]))}): choose one by"
            " param_key_g"
        )
    return next(iter(holding), None)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors by name, at any depth; those of an optimiser have numbers."""
    for key, entry in value.items() if isinstance(value, Mapping) else ():
        if isinstance(key, str):
            yield from [entry] if isinstance(entry, Tensor) else _tensors_in(entry)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _plain(tensor: Tensor, where: str) -> Tensor:
    """Dense, on the CPU, in a type that torch computes in; integers stay."""
    strange = tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided
    if not strange and tensor.is_floating_point() and tensor.dtype not in _FLOATS:
        try:
            return tensor.float()
        except (RuntimeError, NotImplementedError):
            strange = True
    if strange or tensor.is_meta:
        raise InputError(
            f"{where} is a tensor of {_name(tensor.dtype)}, which is no plain weight: save float32 ones"
        )
    return tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
