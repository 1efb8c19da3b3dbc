"""Small videos, made by ffmpeg's libraries."""

from fractions import Fraction

import av
import numpy as np
import skimage.data

RATE = Fraction(24000, 1001)
SIZE = 20, 24
SUBTITLES = """1
00:00:00,500 --> 00:00:01,500
Good morning

2
00:00:02,000 --> 00:00:02,800
Good night
"""


def pictures(count, size=SIZE):
    """The camera moves over a cat."""
    cat = skimage.data.chelsea()[::2, ::2]
    for number in range(count):
        x = number % 60
        yield np.ascontiguousarray(cat[40 + x : 40 + x + size[0], 40 + x : 40 + x + size[1]])


def make(path, seconds=3, sound=True, times=None, size=SIZE, pix_fmt="yuv420p", rotation=0):
    """A video of H.264 with a sound of AAC, by ffmpeg's libraries."""
    count = round(seconds * RATE)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=RATE, options={"crf": "8"})
        video.height, video.width, video.pix_fmt = *size, pix_fmt
        if times is not None:
            video.time_base = video.codec_context.time_base = Fraction(1, 600)
        if rotation:
            video.set_display_rotation(rotation)
        audio = out.add_stream("aac", rate=44100) if sound else None
        for number, levels in enumerate(pictures(count, size)):
            frame = av.VideoFrame.from_ndarray(levels, "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 600)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio:
            wave = np.sin(2 * np.pi * 440 * np.arange(44100 * seconds) / 44100).astype("f4")
            for start in range(0, len(wave), 1024):
                part = wave[None, start : start + 1024]
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), "fltp", "mono")
                frame.sample_rate, frame.pts = 44100, start
                out.mux(audio.encode(frame))
            out.mux(audio.encode())
    return path


def with_subtitles(path, video):
    """The streams of a video, and those of a subtitle file."""
    path.with_suffix(".srt").write_text(SUBTITLES)
    with (
        av.open(str(video)) as first,
        av.open(str(path.with_suffix(".srt"))) as second,
        av.open(str(path), "w") as out,
    ):
        chapter = {"id": 1, "start": 0, "end": 900, "time_base": Fraction(1, 1000)}
        out.set_chapters([{**chapter, "metadata": {"title": "Morning"}}])
        out.metadata["title"] = "A day"
        added = []
        for source in (first, second):
            streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
            for stream in streams.values():
                if stream.type != "video":
                    stream.metadata["language"] = "eng"
            added.append((source, streams))
        for source, streams in added:
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    out.mux(packet)
    return path
