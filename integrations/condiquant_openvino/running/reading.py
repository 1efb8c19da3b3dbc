"""Reading IR with metadata, and the digests that tell a whole one."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import openvino as ov

from condiquant_openvino.markers import mark_by_names, set_version
from condiquant_plugin import InputError

_METADATA = ["condiquant"]
BIN_DIGEST, LAYERS_DIGEST = ["condiquant_bin_sha256"], ["condiquant_layers_sha256"]
_HEAD = 1024


@cache
def core_of_process() -> ov.Core:
    """One core: loading the device plugins takes longer than compiling a small model."""
    return ov.Core()


def set_metadata(model: ov.Model, metadata: dict[str, Any]) -> None:
    """Attach JSON-serialisable ``metadata``; it is saved with the IR."""
    model.set_rt_info(json.dumps(metadata, sort_keys=True), _METADATA)


def mark_if_ours(model: ov.Model) -> None:
    """Mark the quantizers of an IR that an earlier version wrote; other models have none to mark."""
    if any(model.has_rt_info(key) for key in (_METADATA, BIN_DIGEST)):
        mark_by_names(model)
    else:
        set_version(model)


def read_metadata(model: ov.Model | str | os.PathLike[str]) -> dict[str, Any]:
    """Metadata of a model or of an IR file; empty if it has none.

    Raises:
        InputError: if the file is no IR.
    """
    if not isinstance(model, ov.Model):
        model = read_ir(model)
    if not model.has_rt_info(_METADATA):
        return {}
    metadata: dict[str, Any] = json.loads(model.get_rt_info(_METADATA).astype(str))
    return metadata


def read_ir(path: str | os.PathLike[str]) -> ov.Model:
    """Read an IR.

    Raises:
        InputError: if the .xml or its .bin is missing, unreadable or not an IR, or if the .bin is
            not the one that :func:`save` wrote.
    """
    xml = Path(path)
    if not xml.exists():
        raise InputError(f"{xml} does not exist: give the .xml of an IR, or the folder of a run")
    if xml.suffix != ".xml":
        raise InputError(f"{xml} is not an OpenVINO IR: give the .xml file")
    weights = xml.with_suffix(".bin")
    for file in (xml, weights):
        if not file.is_file():
            raise InputError(f"{file} does not exist: an IR is a .xml and a .bin side by side")
    try:
        # OpenVINO tries other formats on what is no IR, and they print lines of their own.
        with xml.open("rb") as stream:
            if b"<net" not in stream.read(_HEAD):
                raise InputError(f"{xml} is not a readable OpenVINO IR: export it again")
        model = core_of_process().read_model(xml)
        # Other tools that change an IR of ours keep its rt_info, digests too.
        is_as_saved = _digest(model, LAYERS_DIGEST) == layers_digest(xml.read_bytes())
        if is_as_saved and _digest(model, BIN_DIGEST) != file_digest(weights):
            raise InputError(f"{weights} is not what {xml.name} was saved with: export it again")
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{xml} with {weights.name} is not a readable OpenVINO IR ({reason}): export it again"
        ) from error
    mark_if_ours(model)
    return model


def _digest(model: ov.Model, key: list[str]) -> str | None:
    return model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None


def layers_digest(xml: bytes) -> str:
    """sha256 of the layers in an .xml."""
    return hashlib.sha256(xml[xml.find(b"<layers>") : xml.rfind(b"</layers>")]).hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
