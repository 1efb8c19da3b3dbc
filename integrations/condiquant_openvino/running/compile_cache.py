"""Where OpenVINO keeps what it has compiled, so that the next process need not."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from condiquant_openvino.running.reading import file_digest
from condiquant_plugin import InputError

CACHE_VARIABLE = "CONDIQUANT_CACHE"
_KEPT = 8
_NAME = 16


def cache_properties(path: Path, folder: Path | None = None) -> dict[str, str]:
    """``CACHE_DIR`` for an IR: a folder of its own, named by what is in its files.

    The eight IRs that were used last are kept.

    Args:
        folder: by default ``CONDIQUANT_CACHE`` of the environment, or the platform's cache folder;
            if that cannot be written, nothing is kept.

    Raises:
        InputError: if the given folder cannot be written.
    """
    given = folder or os.environ.get(CACHE_VARIABLE)
    base = Path(given) if given else _platform_folder()
    digests = "".join(file_digest(path.with_suffix(suffix)) for suffix in (".xml", ".bin"))
    own = base / hashlib.sha256(digests.encode()).hexdigest()[:_NAME]
    try:
        own.mkdir(parents=True, exist_ok=True)
        os.utime(own)
        others = sorted(base.iterdir(), key=lambda kept: kept.stat().st_mtime, reverse=True)
        for unused in others[_KEPT:]:
            if len(unused.name) == _NAME:
                shutil.rmtree(unused, ignore_errors=True)
    except OSError as error:
        if given:
            raise InputError(
                f"cannot write to the cache {base} ({error.strerror}): give another --cache"
            ) from error
        return {}
    return {"CACHE_DIR": str(own)}


def _platform_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("condiquant")) / "compiled"
