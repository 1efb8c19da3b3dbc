"""Enlarging pictures one after the other, with reading and writing beside."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from condiquant_openvino.running.upscaling import Upscaler
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import check_room, check_writable, remove_leftovers
from condiquant_recipes.progress import Progress
from condiquant_recipes.upscaling.naming import Job
from condiquant_recipes.upscaling.picture_file import (
    Enlargement,
    NoRoomError,
    PictureFile,
    Wanted,
    kind_of,
)

_logger = logging.getLogger(__name__)
_AHEAD = 4
_LOSSY = (".jpg", ".webp", ".heic", ".heif", ".avif", ".gif")
_LOSSLESS_FACTOR = 4
"""At least so much larger is a photograph without loss."""
_SURELY = 0.5
"""An enlargement has less in a pixel than its input has."""


def open_jobs(jobs: Sequence[Job], *, overwrite: bool) -> list[Job]:
    """Those that are still to be done; what a killed run left half-written is removed."""
    left = [job for job in jobs if overwrite or not job.target.exists()]
    remove_leftovers(job.target for job in left)
    return left


def check_places(jobs: Sequence[Job], scale: float) -> None:
    """Find out before long work whether the results can be written.

    Raises:
        InputError: a folder that cannot be written, or surely no room.
    """
    needed: dict[Path, float] = {}
    for job in jobs:
        kinds = kind_of(job.source), kind_of(job.target)
        factor = _LOSSLESS_FACTOR if kinds[0] in _LOSSY and kinds[1] not in _LOSSY else 1
        size = _SURELY * factor * scale**2 * job.source.stat().st_size
        needed[job.target.parent] = needed.get(job.target.parent, 0) + size
    for folder in needed:
        check_writable(folder)
    if needed:
        check_room(next(iter(needed)), sum(needed.values()))


def upscale_pictures(
    upscaler: Upscaler, jobs: Sequence[Job], wanted: Wanted, progress: Progress
) -> None:
    """Enlarge pictures; one that cannot be read or written does not stop the others.

    Raises:
        InputError: the first picture that failed, at the end; or no room, at once.
    """
    for folder in {job.target.parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    with progress.bar("upscaling", len(jobs)) as advance:
        alone = len(jobs) == 1

        def tiles(done: int, total: int) -> None:
            advance("tiles", done, total)

        line = _Line(
            upscaler,
            iter(jobs),
            wanted,
            (lambda _: None) if alone else advance,
            tiles if alone else None,
        )
        line.run()
    if line.failures:
        first = line.failures[0]
        if len(jobs) > 1:
            done = len(jobs) - len(line.failures)
            raise InputError(f"{first} ({len(line.failures)} failed, {done} written)")
        raise InputError(first)


class _Line:
    """Reader, network and writer, each a few pictures ahead of the next."""

    def __init__(
        self,
        upscaler: Upscaler,
        jobs: Iterator[Job],
        wanted: Wanted,
        advance: Callable[[str], object],
        tiles: Callable[[int, int], object] | None,
    ) -> None:
        self._upscaler, self._jobs, self._wanted = upscaler, jobs, wanted
        self._advance, self._tiles = advance, tiles
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._ahead: deque[Future[PictureFile]] = deque()
        self._open: dict[PictureFile, Enlargement | None] = {}
        self._closing: deque[tuple[Enlargement, Future[None]]] = deque()
        self._read: PictureFile | None = None
        self.failures: list[str] = []

    def run(self) -> None:
        """Enlarge all; :class:`NoRoomError` ends it."""
        try:
            while not self._run_until_one_fails():
                pass
            self._close_all_but(0)
        finally:
            for enlargement in self._open.values():
                if enlargement is not None:
                    enlargement.drop()
            for enlargement, written in self._closing:
                if written.cancel():
                    enlargement.drop()
            self._reader.shutdown(cancel_futures=True)
            self._writer.shutdown()

    def _run_until_one_fails(self) -> bool:
        try:
            for picture, rows in self._upscaler.bands(self._pictures(), self._tiles):
                self._add(picture, rows)
        except NoRoomError:
            raise
        except InputError as error:
            self._fail(error)
            if self._read is not None and (begun := self._open.pop(self._read, None)) is not None:
                begun.drop()
            return False
        return True

    def _pictures(self) -> Iterator[PictureFile]:
        def read(job: Job) -> PictureFile:
            return PictureFile(job.source, job.target, self._wanted).read_ahead()

        while True:
            while len(self._ahead) < _AHEAD and (job := next(self._jobs, None)) is not None:
                self._ahead.append(self._reader.submit(read, job))
            if not self._ahead:
                return
            try:
                self._read = self._ahead.popleft().result()
            except InputError as error:
                self._fail(error)
            else:
                if self._read.deep and self._upscaler.takes_u8:
                    _logger.warning("%s: its 16 bits enter an IR of 8-bit images", self._read.path)
                yield self._read

    def _add(self, picture: PictureFile, rows: NDArray[np.float32]) -> None:
        enlargement = self._open.get(picture)
        try:
            if picture not in self._open:
                scale = rows.shape[2] // picture.width
                enlargement = self._open[picture] = Enlargement(picture, scale)
            finished = enlargement is not None and enlargement.add(rows)
        except NoRoomError:
            raise
        except InputError as error:
            if enlargement is not None:
                enlargement.drop()
            self._open[picture] = None
            self._fail(error)
            return
        if enlargement is not None and finished:
            del self._open[picture]
            self._closing.append((enlargement, self._writer.submit(enlargement.write)))
            self._close_all_but(_AHEAD)

    def _close_all_but(self, count: int) -> None:
        while len(self._closing) > count:
            enlargement, written = self._closing[0]
            try:
                written.result()
            except NoRoomError:
                raise
            except InputError as error:
                self._fail(error)
            else:
                self._advance(enlargement.target.name)
            self._closing.popleft()

    def _fail(self, error: InputError) -> None:
        self.failures.append(str(error))
        self._advance("")
