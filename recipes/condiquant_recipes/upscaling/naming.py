"""Which files are enlarged, and what the results are called."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from condiquant_plugin.errors import InputError
from condiquant_recipes.upscaling.picture_file import READABLE, kind_of

VIDEOS = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts")
) | frozenset((".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".y4m"))
WRITABLE = (".png", ".jpg", ".webp", ".tiff")
_SHOWN = 3
_logger = logging.getLogger(__name__)


class Kind(Enum):
    """What is enlarged."""

    picture = "a picture"
    folder = "a folder"
    video = "a video"


@dataclass(frozen=True)
class Job:
    """One picture and where its enlargement goes."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Names:
    """What results are called.

    Attributes:
        suffix: between a file's name and its ending.
        ending: with a dot; None for that of the input, or .png where that cannot be written.
    """

    suffix: str = ""
    ending: str | None = None

    def of(self, source: Path, folder: Path) -> Path:
        """The result of a picture, in a folder."""
        own = source.suffix if kind_of(source) in WRITABLE else ".png"
        return folder / f"{source.stem}{self.suffix}{self.ending or own}"


def kind(source: Path) -> Kind:
    """Whether an input is a picture, a folder or a video.

    Raises:
        InputError: nothing, or of an unknown type.
    """
    if source.is_dir():
        return Kind.folder
    if not source.exists():
        raise InputError(f"{source} does not exist: give a picture, a folder of them or a video")
    if source.suffix.lower() in READABLE:
        return Kind.picture
    if source.suffix.lower() in VIDEOS:
        return Kind.video
    raise InputError(
        f"{source}: unknown file type {source.suffix!r}; give a picture ({_listed(READABLE)}), "
        f"a folder of them or a video ({_listed(VIDEOS)})"
    )


def picture_job(source: Path, output: Path, names: Names) -> Job:
    """A picture into a file, or into a folder that exists.

    Raises:
        InputError: an output that cannot be written, or is the input.
    """
    check_suffix(names.suffix, output)
    target = names.of(source, output) if output.is_dir() else output
    if kind_of(target) not in WRITABLE:
        raise InputError(f"cannot write {target}: end it in {_listed(WRITABLE)}")
    if target == output and names.ending not in (None, kind_of(target)):
        raise InputError(f"{target} is not {names.ending}: leave out --format, or end it so")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: give a place in an existing folder")
    _check_apart(source, target)
    return Job(source, target)


def check_suffix(suffix: str, output: Path) -> None:
    """Refuse a suffix for a file that has its name.

    Raises:
        InputError: if it is not needed.
    """
    if suffix and not output.is_dir():
        raise InputError(f"{output} is a name: leave out --suffix {suffix}, or give a folder")


def folder_jobs(source: Path, output: Path, names: Names, *, recursive: bool) -> list[Job]:
    """All pictures of a folder; results of an earlier run in the same folder are none.

    Raises:
        InputError: no pictures, an output that is no folder or would overwrite an input, or two
            pictures that would become one file.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: give a folder for the pictures of {source}")
    found: list[Path] = []
    others: list[Path] = []
    inside = output.resolve() if output.resolve() != source.resolve() else None
    for file in sorted(_files(source, recursive=recursive)):
        if inside is None or inside not in file.resolve().parents:
            (found if file.suffix.lower() in READABLE else others).append(file)
    targets = {file: names.of(file, output / file.parent.relative_to(source)) for file in found}
    results = set(targets.values())
    jobs = [Job(file, targets[file]) for file in found if not (names.suffix and file in results)]
    if not jobs:
        deeper = "" if recursive else ", or --recursive for the folders in it"
        raise InputError(f"{source} has no pictures ({_listed(READABLE)}): give another{deeper}")
    taken: dict[Path, Path] = {}
    for job in jobs:
        _check_apart(job.source, job.target)
        if (other := taken.setdefault(job.target, job.source)) != job.source:
            raise InputError(
                f"{other} and {job.source} would both become {job.target}: rename one, or give "
                "another --format"
            )
    if others:
        more = ", ..." if len(others) > _SHOWN else ""
        shown = ", ".join(file.name for file in others[:_SHOWN]) + more
        _logger.warning("%s: skipped, as no pictures (%d): %s", source, len(others), shown)
    return jobs


def _files(folder: Path, *, recursive: bool) -> Iterator[Path]:
    for file in folder.rglob("*") if recursive else folder.iterdir():
        if file.is_file() and not file.name.startswith("."):
            yield file


def _check_apart(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        raise InputError(
            f"{target} would overwrite its input: give another output, or a --suffix for a folder"
        )


def _listed(suffixes: Iterable[str]) -> str:
    return ", ".join(sorted(suffix[1:] for suffix in suffixes))
