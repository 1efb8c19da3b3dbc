"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from condiquant_plugin.errors import InputError


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place at the end; gone if anything fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
