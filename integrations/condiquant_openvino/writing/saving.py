"""Writing IR: whole files or none."""

from __future__ import annotations

import os
import re
import shutil
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import openvino as ov

from condiquant_openvino.running.reading import (
    BIN_DIGEST,
    LAYERS_DIGEST,
    file_digest,
    layers_digest,
    mark_if_ours,
)
from condiquant_openvino.writing.passes.compaction import halve
from condiquant_plugin import InputError

_UNKNOWN = "unknown"
_one_at_a_time = threading.Lock()


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
    mark_if_ours(model)
    for key in (BIN_DIGEST, LAYERS_DIGEST):
        model.set_rt_info(_UNKNOWN, key)
    try:
        xml.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{xml.stem}.", dir=xml.parent) as folder:
            new = Path(folder) / "new.xml"
            ov.save_model(model, new, compress_to_fp16=False)
            # Indentation is a sixth of the file.
            content = re.sub(rb">\s+<", b"><", new.read_bytes())
            for key, digest in (
                (BIN_DIGEST, file_digest(new.with_suffix(".bin"))),
                (LAYERS_DIGEST, layers_digest(content)),
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
