"""Files that are either whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from condiquant_plugin.errors import InputError

_TEMPORARY = re.compile(r"\.(.+)\.\d+(?:\.raw)?")


def check_writable(folder: Path) -> None:
    """Find out before long work whether files can be made in a folder, or the folder itself.

    Raises:
        InputError: if not.
    """
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another") from error


def check_room(folder: Path, needed: float) -> None:
    """Find out before long work whether a disk has room.

    Args:
        needed: bytes.

    Raises:
        InputError: if not.
    """
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"no room in {folder}: {needed / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are "
            "free: free some or choose another"
        )


def remove_leftovers(files: Iterable[Path]) -> None:
    """Remove what processes that were killed while writing ``files`` have left beside them."""
    by_folder: dict[Path, set[str]] = {}
    for file in files:
        by_folder.setdefault(file.parent, set()).add(file.name)
    for folder, names in by_folder.items():
        for found in folder.glob(".*") if folder.is_dir() else ():
            named = _TEMPORARY.fullmatch(found.name)
            if named and named[1] in names:
                found.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place at the end; gone if anything fails."""
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``; raises OSError and leaves nothing behind."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
