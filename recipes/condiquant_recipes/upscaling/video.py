"""Enlarging a video in chunks, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condiquant_openvino.running.reading import file_digest
from condiquant_openvino.running.upscaling import Upscaler
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import check_room, check_writable, remove_leftovers, write_atomic
from condiquant_recipes.progress import Progress
from condiquant_recipes.upscaling.model import Hardware
from condiquant_recipes.upscaling.video_file import (
    CHUNK,
    CONTAINERS,
    ChunkWriter,
    Frame,
    VideoFile,
)

_FRAMES = 64
"""Of a chunk: what a kill may cost."""
_AHEAD = 2
_STATE = "state.json"
_COPIES = 2
"""An enlargement is larger than its input, and its chunks lie beside it until they are joined."""


def parts_of(output: Path) -> Path:
    """The folder of chunks that lies beside a video while it is enlarged."""
    return output.with_name(f".{output.name}.parts")


def check_output(video: VideoFile, output: Path) -> None:
    """Find out before long work whether a video can be written.

    Raises:
        InputError: another container, a place that cannot be written, streams that it does not
            take, or surely no room.
    """
    if output.suffix.lower() not in CONTAINERS:
        known = ", ".join(CONTAINERS)
        raise InputError(f"cannot write {output}: end it in {known}")
    if not output.parent.is_dir():
        raise InputError(f"cannot write {output}: give a place in an existing folder")
    if output.exists() and output.samefile(video.path):
        raise InputError(f"{output} would overwrite its input: give another output")
    check_writable(output.parent)
    check_room(output.parent, _COPIES * video.path.stat().st_size)
    video.check_streams(output)


class Chunks:
    """The finished chunks of an enlargement; those of another one are dropped.

    Args:
        said: what the chunks depend on.
    """

    def __init__(self, output: Path, said: dict[str, Any]) -> None:
        self.folder = parts_of(output)
        state, text = self.folder / _STATE, json.dumps(said, sort_keys=True)
        if not state.is_file() or state.read_text() != text:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            write_atomic(state, text.encode())
        remove_leftovers([output])
        self.clean()

    def path(self, number: int) -> Path:
        """Of a chunk."""
        return self.folder / f"{number:06d}{CHUNK}"

    @property
    def count(self) -> int:
        """How many are finished, without a gap."""
        number = 0
        while self.path(number).exists():
            number += 1
        return number

    def clean(self) -> None:
        """Remove what is half-written."""
        remove_leftovers(self.path(self.count + number) for number in range(_AHEAD))

    def all(self) -> list[Path]:
        """Those that are finished."""
        return [self.path(number) for number in range(self.count)]

    def drop(self) -> None:
        """Remove them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def described(
    video: VideoFile, model: Path, size: tuple[int, int], crf: int, hardware: Hardware
) -> dict[str, Any]:
    """What the frames of an enlargement depend on."""
    status = video.path.stat()
    return {
        "source": [str(video.path.resolve()), status.st_size, status.st_mtime_ns],
        "model": [file_digest(model.with_suffix(suffix)) for suffix in (".xml", ".bin")],
        "size": list(size),
        "crf": crf,
        "frames": _FRAMES,
        "hardware": [hardware.device, hardware.precision, hardware.tile, hardware.overlap],
    }


def even_size(video: VideoFile, scale: float) -> tuple[int, int]:
    """Height and width of the enlargement: half the colours of H.264 need even ones."""
    height, width = (2 * max(round(scale * side / 2), 1) for side in video.size)
    return height, width


def upscale_video(
    upscaler: Upscaler,
    video: VideoFile,
    output: Path,
    size: tuple[int, int],
    crf: int,
    chunks: Chunks,
    progress: Progress,
) -> None:
    """Enlarge what is left of a video, then put it together with its sound and subtitles.

    Args:
        size: height and width of the result, even.
        crf: constant rate factor of x264.

    Raises:
        InputError: what cannot be read or written, or no room.
    """
    first = chunks.count
    skipped = first * _FRAMES
    reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    waiting: deque[Future[None]] = deque()
    chunk: ChunkWriter | None = None

    def write(task: Callable[..., None], *arguments: Any) -> None:
        waiting.append(writer.submit(task, *arguments))
        while len(waiting) > _AHEAD:
            waiting.popleft().result()

    try:
        with progress.bar("upscaling", max(video.frames, skipped)) as advance:
            start = perf_counter()
            frames = enlarged(upscaler, _ahead(video.read(skipped), reader))
            for number, (pts, levels) in enumerate(frames):
                if chunk is None:
                    path = chunks.path(first + number // _FRAMES)
                    chunk = ChunkWriter(video, size, crf, path)
                write(chunk.add, pts, levels)
                if number % _FRAMES == _FRAMES - 1:
                    write(chunk.close)
                    chunk = None
                done = number + 1
                rate = done / (perf_counter() - start)
                advance(f"{rate:.2f} frames/s", skipped + done, max(video.frames, skipped + done))
            if chunk is not None:
                write(chunk.close)
                chunk = None
            while waiting:
                waiting.popleft().result()
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown(cancel_futures=True)
        if chunk is not None:
            chunk.drop()
        chunks.clean()
    video.join(chunks.all(), output)
    chunks.drop()


def enlarged(upscaler: Upscaler, frames: Iterator[Frame]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Time and levels, ``(height, width, 3)`` of 8 or 16 bits, of each enlargement."""
    held: list[NDArray[np.float32]] = []
    for frame, rows in upscaler.bands(frames):
        held.append(rows)
        scale = rows.shape[2] // frame.width
        if sum(band.shape[1] for band in held) == scale * frame.height:
            kind = np.uint16 if frame.deep else np.uint8
            highest = np.float32(np.iinfo(kind).max)
            pixels = np.concatenate(held, axis=1).clip(0, 1) * highest
            held.clear()
            yield frame.pts, np.ascontiguousarray(np.rint(pixels).astype(kind).transpose(1, 2, 0))


def _ahead(frames: Iterator[Frame], reader: ThreadPoolExecutor) -> Iterator[Frame]:
    """Frames that are decoded beside."""
    waiting: deque[Future[Frame | None]] = deque()
    for _ in range(_AHEAD):
        waiting.append(reader.submit(next, frames, None))
    while (frame := waiting.popleft().result()) is not None:
        waiting.append(reader.submit(next, frames, None))
        yield frame
