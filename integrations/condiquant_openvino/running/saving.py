"""Writing and reading IR with metadata."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openvino as ov

from condiquant_openvino.writing.passes.compaction import halve
from condiquant_plugin import InputError

_METADATA = ["condiquant"]
_BIN_DIGEST, _LAYERS_DIGEST = ["condiquant_bin_sha256"], ["condiquant_layers_sha256"]
_UNKNOWN = "unknown"
_HEAD = 1024
_one_at_a_time = threading.Lock()


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
    """Write ``path`` (.xml) and its .bin; the .xml holds the sha256 of the .bin and of its own layers.

    An IR that was there before stays whole if anything fails. A kill between the two renames leaves its
    .xml beside the new .bin, which :func:`read_ir` refuses.

    Args:
        compress_to_fp16: store float constants in half precision, as
            :func:`condiquant_openvino.halve`; ``model`` itself stays as it is.

    Returns:
        ``{"xml_bytes": ..., "bin_bytes": ...}``.

    Raises:
        InputError: if the name does not end in .xml or the files cannot be written.
    """
    xml = Path(path)
    if xml.suffix != ".xml":
        raise InputError(f"{xml}: the name of an IR must end in .xml")
    model = model.clone()
    if compress_to_fp16:
        halve(model)
    for key in (_BIN_DIGEST, _LAYERS_DIGEST):
        model.set_rt_info(_UNKNOWN, key)
    try:
        xml.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{xml.stem}.", dir=xml.parent) as folder:
            new = Path(folder) / "new.xml"
            ov.save_model(model, new, compress_to_fp16=False)
            # Indentation is a sixth of the file.
            content = re.sub(rb">\s+<", b"><", new.read_bytes())
            for key, digest in (
                (_BIN_DIGEST, _sha256(new.with_suffix(".bin"))),
                (_LAYERS_DIGEST, _layers_digest(content)),
            ):
                unknown, known = (f'<{key[0]} value="{v}"'.encode() for v in (_UNKNOWN, digest))
                content = content.replace(unknown, known)
            new.write_bytes(content)
            with _one_at_a_time:
                _put_in_place(new, xml)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or str(error).strip().splitlines()[-1]
        raise InputError(f"cannot write {xml} ({reason}): choose another folder") from error
    return {"xml_bytes": xml.stat().st_size, "bin_bytes": xml.with_suffix(".bin").stat().st_size}


def _put_in_place(new: Path, xml: Path) -> None:
    weights, backup = xml.with_suffix(".bin"), new.with_name("backup.bin")
    if weights.is_file():
        shutil.copyfile(weights, backup)
    os.replace(new.with_suffix(".bin"), weights)
    try:
        os.replace(new, xml)
    except BaseException:
        if backup.exists():
            os.replace(backup, weights)
        else:
            weights.unlink()
        raise


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
        # Other tools that change an IR of ours keep its rt_info, digests too.
        is_as_saved = _digest(model, _LAYERS_DIGEST) == _layers_digest(xml.read_bytes())
        if is_as_saved and _digest(model, _BIN_DIGEST) != _sha256(weights):
            raise InputError(f"{weights} is not what {xml.name} was saved with: export it again")
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{xml} with {weights.name} is not a readable OpenVINO IR ({reason}): export it again"
        ) from error
    return model


def _digest(model: ov.Model, key: list[str]) -> str | None:
    return model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None


def _layers_digest(xml: bytes) -> str:
    return hashlib.sha256(xml[xml.find(b"<layers>") : xml.rfind(b"</layers>")]).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
