"""Writing and reading IR with metadata."""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import openvino as ov

from condiquant_openvino.compaction import halve
from condiquant_plugin import InputError

_METADATA, _BIN_DIGEST = ["condiquant"], ["condiquant_bin_sha256"]
_HEAD = 1024


@cache
def core_of_process() -> ov.Core:
    """One core: loading the device plugins takes longer than compiling a small model."""
    return ov.Core()


def set_metadata(model: ov.Model, metadata: dict[str, Any]) -> None:
    """Attach JSON-serialisable ``metadata``; it is saved with the IR."""
    model.set_rt_info(json.dumps(metadata, sort_keys=True), _METADATA)


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


def save(
    model: ov.Model, path: str | os.PathLike[str], *, compress_to_fp16: bool = False
) -> dict[str, int]:
    """Write ``path`` (.xml) and its .bin, whose sha256 the .xml holds.

    Args:
        compress_to_fp16: store large float constants in half precision: half their size, values
            rounded to 11 bits.

    Returns:
        ``{"xml_bytes": ..., "bin_bytes": ...}``.

    Raises:
        InputError: if the name does not end in .xml or the folder cannot be written.
    """
    xml = Path(path)
    if xml.suffix != ".xml":
        raise InputError(f"{xml}: the name of an IR must end in .xml")
    temporary = xml.with_name(f".{xml.stem}.{os.getpid()}.xml")
    pairs = [(temporary.with_suffix(".bin"), xml.with_suffix(".bin")), (temporary, xml)]
    model = model.clone()
    if compress_to_fp16:
        halve(model)
    try:
        xml.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(model, temporary, compress_to_fp16=False)
        # The .bin is the same again: only the .xml holds what is added here.
        model.set_rt_info(_sha256(temporary.with_suffix(".bin")), _BIN_DIGEST)
        ov.save_model(model, temporary, compress_to_fp16=False)
        # Indentation is a sixth of the file.
        temporary.write_text(re.sub(r">\s+<", "><", temporary.read_text("utf-8")), "utf-8")
        # A kill between the two renames must not leave an old graph with new weights.
        xml.unlink(missing_ok=True)
        for source, target in pairs:
            os.replace(source, target)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {xml}: choose a folder you may write to") from error
    finally:
        for source, _ in pairs:
            if source.exists():
                source.unlink()
    return {"xml_bytes": xml.stat().st_size, "bin_bytes": xml.with_suffix(".bin").stat().st_size}


def read_ir(path: str | os.PathLike[str]) -> ov.Model:
    """Read an IR.

    Raises:
        InputError: if the .xml or its .bin is missing, unreadable or not an IR, or if the .bin is
            not the one that :func:`save` wrote.
    """
    xml = Path(path)
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
        if (digest := _bin_digest(model)) is not None and digest != _sha256(weights):
            raise InputError(f"{weights} is not what {xml.name} was saved with: export it again")
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{xml} with {weights.name} is not a readable OpenVINO IR ({reason}): export it again"
        ) from error
    return model


def _bin_digest(model: ov.Model) -> str | None:
    return model.get_rt_info(_BIN_DIGEST).astype(str) if model.has_rt_info(_BIN_DIGEST) else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
