"""Video files by PyAV: frames with their times, chunks of encoded frames, and the streams beside."""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray

from condiquant_plugin.errors import InputError
from condiquant_plugin.files import replacing, temporary_name
from condiquant_recipes.upscaling.picture_file import NoRoomError

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
CHUNK = ".nut"
"""A container that keeps any time base."""
_ENCODING = {"bf": "0", "x264-params": "force-cfr=1"}
"""Chunks join without frames that wait for later ones; the frame rate, not the time base, is written."""
_CARRIED = ("audio", "subtitle")
_HD_HEIGHT = 720
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
"""By ffmpeg's AVColorSpace; 2 is unspecified."""
_TAGS = {Colorspace.ITU709: 1, Colorspace.ITU601: 6}
_HIGHEST = {False: 255, True: 65535}
_QUALITIES, _CRF_RANGE = 100, 51
_logger = logging.getLogger(__name__)


class Frame:
    """A frame as a picture; see :class:`condiquant_openvino.running.tiling.Picture`."""

    channels = 3

    def __init__(self, frame: av.VideoFrame, pts: int, matrix: int, turns: int) -> None:
        self.pts, self.deep = pts, frame.format.components[0].bits > 8
        rgb = frame.reformat(
            format="rgb48le" if self.deep else "rgb24",
            src_colorspace=matrix,
            src_color_range=frame.color_range or ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
        ).to_ndarray()
        highest = np.float32(_HIGHEST[self.deep])
        self._pixels = np.rot90(rgb, turns).transpose(2, 0, 1).astype(np.float32) / highest
        _, self.height, self.width = self._pixels.shape

    def rows(self, top: int, bottom: int) -> NDArray[np.float32]:
        """Pixels in [0, 1], shape ``(3, bottom - top, width)``."""
        return self._pixels[:, top:bottom]


class VideoFile:
    """A video on the disk.

    Attributes:
        frames: how many there are, as far as the file says; 0 if it does not.
        size: height and width of an upright frame.

    Raises:
        InputError: unreadable, or without frames.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path), av.open(str(path)) as container:
            streams = [s for s in container.streams.video if not s.disposition & _cover()]
            if not streams:
                raise InputError(f"{path} has no video stream: give a video")
            stream = streams[0]
            self._index = stream.index
            self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            self.time_base: Fraction = stream.time_base or 1 / self.rate
            seconds = float((container.duration or 0) / av.time_base)
            self.frames = stream.frames or round(seconds * self.rate)
            first = next(self._decoded(container), None)
            if first is None:
                raise InputError(f"{path} has no frames that can be decoded: give another video")
            self.deep = first.format.components[0].bits > 8
            self._turns = round(first.rotation / 90) % 4
            self.matrix = _MATRICES.get(first.colorspace) or (
                Colorspace.ITU709 if first.height >= _HD_HEIGHT else Colorspace.ITU601
            )
            self.tags = {
                "colorspace": _TAGS.get(self.matrix, first.colorspace),
                "color_primaries": first.color_primaries,
                "color_trc": first.color_trc,
            }
            ratio: Fraction = stream.sample_aspect_ratio or Fraction(1)
            self.sample_aspect_ratio = 1 / ratio if self._turns % 2 else ratio
            size = (first.height, first.width)
            self.size = size[::-1] if self._turns % 2 else size

    def read(self, skipped: int = 0) -> Iterator[Frame]:
        """Frames behind the first ``skipped``, upright."""
        with naming(self.path), av.open(str(self.path)) as container:
            stream: Any = container.streams[self._index]
            stream.thread_type = "AUTO"
            pts = -1 if stream.start_time is None else stream.start_time - 1
            for number, frame in enumerate(self._decoded(container)):
                pts = pts + 1 if frame.pts is None else max(frame.pts, pts + 1)
                if number >= skipped:
                    yield Frame(frame, pts, self.matrix, self._turns)

    def _decoded(self, container: Any) -> Iterator[Any]:
        damaged = 0
        for packet in container.demux(container.streams[self._index]):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                damaged += 1
        if damaged:
            _logger.warning("%s: %d damaged packets were left out", self.path, damaged)

    def check_streams(self, output: Path) -> None:
        """Find out before long work whether a container takes the streams beside the picture.

        Raises:
            InputError: if not.
        """
        with av.open(str(self.path)) as source:
            for stream in self._beside(source):
                with av.open(os.devnull, "w", format=CONTAINERS[output.suffix.lower()]) as trial:
                    self._added(trial, stream, output)
            left = [s.type for s in source.streams if s.type not in (*_CARRIED, "video")]
        if left:
            _logger.warning("%s: streams of kind %s are left out", self.path, ", ".join(left))

    def join(self, chunks: Sequence[Path], output: Path) -> None:
        """Put chunks and the streams beside the picture together.

        Raises:
            InputError: a place that cannot be written, or no room.
        """
        container_format = CONTAINERS[output.suffix.lower()]
        with replacing(output) as temporary, naming(self.path, output), ExitStack() as files:
            source = files.enter_context(av.open(str(self.path)))
            first = files.enter_context(av.open(str(chunks[0])))
            joined = files.enter_context(av.open(str(temporary), "w", format=container_format))
            joined.metadata.update(source.metadata)
            joined.set_chapters(source.chapters())
            picture = joined.add_stream_from_template(first.streams.video[0])
            picture.time_base = self.time_base
            beside = {s.index: self._added(joined, s, output) for s in self._beside(source)}
            packets = heapq.merge(
                ((_seconds(p), 0, number, p, picture) for number, p in enumerate(_packets(chunks))),
                (
                    (_seconds(p), 1, number, p, beside[p.stream.index])
                    for number, p in enumerate(source.demux(*self._beside(source)))
                    if beside and p.dts is not None
                ),
            )
            for *_, packet, stream in packets:
                packet.stream = stream
                joined.mux(packet)

    def _beside(self, container: Any) -> list[Any]:
        return [stream for stream in container.streams if stream.type in _CARRIED]

    def _added(self, container: Any, stream: Any, output: Path) -> Any:
        try:
            added = container.add_stream_from_template(stream)
        except (ValueError, av.error.FFmpegError) as error:
            codec = stream.codec_context.name if stream.codec_context else "unknown"
            raise InputError(
                f"{output} cannot hold the {stream.type} stream ({codec}) of {self.path}: "
                "end the output in .mkv"
            ) from error
        added.metadata.update(stream.metadata)
        added.disposition = stream.disposition
        return added


class ChunkWriter:
    """Writes a chunk of H.264, whole or not at all.

    Args:
        size: height and width, even; frames of others are resampled.
        crf: constant rate factor of x264.
    """

    def __init__(self, video: VideoFile, size: tuple[int, int], crf: int, path: Path) -> None:
        self._video, self._size, self._path = video, size, path
        self._temporary = temporary_name(path)
        with naming(video.path, path):
            self._chunk = av.open(str(self._temporary), "w", format=CHUNK[1:])
        options = {"crf": str(crf), **_ENCODING}
        self._stream = stream = self._chunk.add_stream("libx264", rate=video.rate, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p10le" if video.deep else "yuv420p"
        stream.time_base = stream.codec_context.time_base = video.time_base
        stream.codec_context.sample_aspect_ratio = video.sample_aspect_ratio
        for tag, value in {**video.tags, "color_range": ColorRange.MPEG}.items():
            setattr(stream.codec_context, tag, value)

    def add(self, pts: int, pixels: NDArray[Any]) -> None:
        """Encode a frame, ``(height, width, 3)``, levels of 8 or 16 bits."""
        frame = av.VideoFrame.from_ndarray(pixels, "rgb48le" if self._video.deep else "rgb24")
        frame = frame.reformat(
            self._size[1],
            self._size[0],
            self._stream.pix_fmt,
            dst_colorspace=self._video.matrix,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.LANCZOS,
        )
        frame.pts, frame.time_base = pts, self._video.time_base
        with naming(self._video.path, self._path):
            self._chunk.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left, and give the chunk its name."""
        with naming(self._video.path, self._path):
            self._chunk.mux(self._stream.encode())
            self._chunk.close()
            self._temporary.replace(self._path)

    def drop(self) -> None:
        """Leave nothing of it."""
        with suppress(av.error.FFmpegError, OSError):
            self._chunk.close()
        self._temporary.unlink(missing_ok=True)


def constant_rate_factor(quality: int) -> int:
    """Of x264, from a quality of 1 to 100: 15 for 70, 0 (no loss) for 100.

    >>> constant_rate_factor(70)
    15
    """
    return round(_CRF_RANGE * (_QUALITIES - quality) / _QUALITIES)


def _packets(chunks: Sequence[Path]) -> Iterator[Any]:
    for path in chunks:
        with av.open(str(path)) as chunk:
            for packet in chunk.demux(video=0):
                if packet.dts is not None:
                    yield packet


def _seconds(packet: Any) -> float:
    return float(packet.dts * packet.time_base)


def _cover() -> Any:
    return av.stream.Disposition.attached_pic


@contextmanager
def naming(source: Path, target: Path | None = None) -> Iterator[None]:
    """What ffmpeg says, in one line with the file."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        if target is not None and "No space left" in reason:
            raise NoRoomError(
                f"no room left for {target}: free some and run again, which goes on from there"
            ) from error
        if target is not None:
            raise InputError(f"cannot write {target}: {reason}") from error
        raise InputError(f"{source} is no readable video ({reason}): convert it to mp4") from error
