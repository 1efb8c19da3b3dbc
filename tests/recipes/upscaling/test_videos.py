import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from programs import started, wait_for
from videos import RATE, make, with_subtitles


class Seen:
    """What is in a video."""

    def __init__(self, path):
        with av.open(str(path)) as container:
            self.kinds = [stream.type for stream in container.streams]
            self.languages = [stream.language for stream in container.streams]
            self.metadata, self.chapters = container.metadata, container.chapters()
            self.rate = container.streams.video[0].average_rate
            frames = list(container.decode(video=0))
        self.times = [frame.time for frame in frames]
        self.size = frames[0].height, frames[0].width
        self.frames = frames
        self.packets = {}
        with av.open(str(path)) as container:
            for packet in container.demux():
                if packet.dts is not None and packet.stream.type != "video":
                    when = round(float(packet.pts * packet.time_base), 3)
                    self.packets.setdefault(packet.stream.type, []).append((when, bytes(packet)))

    def levels(self, number):
        return self.frames[number].to_ndarray(format="rgb24").astype(float)


def distance(found, expected):
    return np.abs(found - expected).mean()


def leftovers(folder):
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


def test_a_video_with_sound(tmp_path, upscale, network):
    """3 s: every frame at its time and enlarged by the network, the sound bit for bit."""
    source, target = make(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    assert upscale(source, target) == f"{target}\n"
    before, after = Seen(source), Seen(target)
    assert after.times == before.times
    assert len(after.times) == 72
    assert after.rate == before.rate == RATE
    assert after.size == (80, 96)
    assert after.packets == before.packets
    assert len(after.packets["audio"]) > 100
    for number in (0, 40, 71):
        expected = network(before.levels(number).astype(np.uint8))
        assert distance(after.levels(number), expected) < 3
    assert leftovers(tmp_path) == []


def test_subtitles_chapters_and_names_in_matroska(tmp_path, upscale):
    source = with_subtitles(tmp_path / "in.mkv", make(tmp_path / "in.mp4", 1))
    upscale(source, tmp_path / "out.mkv", "--scale", 1.5)
    before, after = Seen(source), Seen(tmp_path / "out.mkv")
    assert after.kinds == ["video", "audio", "subtitle"]
    assert after.languages == before.languages
    assert after.packets == before.packets
    assert [packet for _, packet in after.packets["subtitle"]] == [b"Good morning", b"Good night"]
    assert [chapter["metadata"] for chapter in after.chapters] == [{"title": "Morning"}]
    assert after.metadata["title"] == "A day"
    assert (after.size, after.rate) == ((30, 36), RATE)
    assert after.times == before.times


def test_uneven_times_stay(tmp_path, upscale):
    times = [0, 20, 60, 70, 200, 205, 206, 300, 310, 320, 600, 610]
    source = make(tmp_path / "in.mp4", 0.5, sound=False, times=times)
    upscale(source, tmp_path / "out.mov")
    before, after = Seen(source), Seen(tmp_path / "out.mov")
    assert len(set(np.diff(before.times).round(3))) > 5
    assert after.times == pytest.approx(before.times, abs=1e-3)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_telephones_video_comes_upright(tmp_path, upscale, network, rotation):
    source = make(tmp_path / "in.mp4", 0.1, sound=False, rotation=rotation)
    upscale(source, tmp_path / "out.mp4")
    before, after = Seen(source), Seen(tmp_path / "out.mp4")
    upright = np.rot90(before.levels(0), before.frames[0].rotation // 90)
    assert before.frames[0].rotation in (rotation, -rotation)
    assert after.frames[0].rotation == 0
    expected = network(np.ascontiguousarray(upright).astype(np.uint8))
    assert distance(after.levels(0), expected) < 4


def test_10_bits_stay(tmp_path, upscale):
    source = make(tmp_path / "in.mp4", 0.1, sound=False, pix_fmt="yuv420p10le")
    upscale(source, tmp_path / "out.mp4")
    assert Seen(tmp_path / "out.mp4").frames[0].format.name == "yuv420p10le"


@pytest.mark.parametrize("height", [480, 720])
@pytest.mark.parametrize("deep", [False, True])
def test_colours_stay_and_say_what_they_are(tmp_path, height, deep):
    """Saturated ones, whose matrix shows: that of television for small frames, of HD for large."""
    from condiquant_recipes.upscaling.video_file import ChunkWriter, VideoFile

    source = tmp_path / "in.mp4"
    with av.open(str(source), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = (
            height,
            32,
            "yuv420p10le" if deep else "yuv420p",
        )
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((height, 32, 3), "u1"), "rgb24")))
        out.mux(stream.encode())
    video = VideoFile(source)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (12, 200, 90)]
    writer = ChunkWriter(video, (height, 32), 0, tmp_path / "chunk.nut")
    for number, colour in enumerate(colours):
        levels = np.full((height, 32, 3), colour, np.uint8)
        writer.add(number * 512, levels.astype(np.uint16) * 257 if deep else levels)
    writer.close()
    chunk = VideoFile(tmp_path / "chunk.nut")
    found = [255 * frame.rows(8, 9)[:, 0, 8] for frame in chunk.read()]
    np.testing.assert_allclose(found, colours, atol=3)
    with av.open(str(tmp_path / "chunk.nut")) as container:
        frame = next(container.decode(video=0))
    assert frame.colorspace == (1 if height == 720 else 6)
    assert frame.color_range == 1


def test_quality(tmp_path, upscale):
    source, sizes = make(tmp_path / "in.mp4", 0.2, sound=False), []
    for options in (("--quality", 20), (), ("--quality", 100)):
        upscale(source, tmp_path / "out.mp4", "--overwrite", *options)
        sizes.append((tmp_path / "out.mp4").stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2]


def test_what_exists_is_skipped(tmp_path, upscale):
    source, target = make(tmp_path / "in.mp4", 0.1, sound=False), tmp_path / "out.mp4"
    target.write_text("old")
    assert "is there: skipped; --overwrite" in upscale(source, target)
    assert target.read_text() == "old"
    (tmp_path / "out").mkdir()
    upscale(source, tmp_path / "out", "--suffix", "_x4")
    assert Seen(tmp_path / "out" / "in_x4.mp4").size == (80, 96)


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_a_run_that_was_killed_goes_on(tmp_path, model, upscale, monkeypatch):
    """SIGKILL behind the first chunk: the rerun keeps it, and the frames are those of one run."""
    from condiquant_recipes.upscaling import video_file

    source, target = make(tmp_path / "in.mp4", 4), tmp_path / "out.mp4"
    parts = tmp_path / ".out.mp4.parts"
    command = [sys.executable, "-m", "condiquant_recipes", "upscale", model, source, target, "-q"]
    options = {"env": environment(), "stdout": subprocess.DEVNULL}
    with started(command, tmp_path / "errors", **options) as process:
        wait_for((parts / "000000.nut").exists, process)
        process.kill()
    assert not target.exists()
    survived = len(list(parts.glob("*.nut")))
    assert survived == 1
    read, turned = [], video_file.Frame.__init__

    def counted(frame, *arguments):
        read.append(arguments[1])
        turned(frame, *arguments)

    monkeypatch.setattr(video_file.Frame, "__init__", counted)
    upscale(source, target)
    assert len(read) == 96 - 64
    upscale(source, tmp_path / "at_once.mp4")
    found, expected = Seen(target), Seen(tmp_path / "at_once.mp4")
    assert found.times == expected.times == Seen(source).times
    assert found.packets == expected.packets
    for number in (0, 63, 64, 95):
        np.testing.assert_array_equal(found.levels(number), expected.levels(number))
    assert leftovers(tmp_path) == []


def test_chunks_of_other_options_are_dropped(tmp_path):
    from condiquant_recipes.upscaling.video import Chunks

    chunks = Chunks(tmp_path / "out.mp4", {"crf": 15})
    chunks.path(0).write_bytes(b"")
    chunks.path(2).write_bytes(b"")
    assert Chunks(tmp_path / "out.mp4", {"crf": 15}).count == 1
    assert Chunks(tmp_path / "out.mp4", {"crf": 16}).count == 0


def test_progress_says_frames_per_second_and_the_time_left(tmp_path, model):
    source = make(tmp_path / "in.mp4", 1, sound=False)
    command = [sys.executable, "-m", "condiquant_recipes", "upscale", model, source]
    ran = subprocess.run(
        [*command, tmp_path / "out.mp4"],
        env=environment() | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert re.search(r"24/24 .*0:00:00 [\d.]+ frames/s", ran.stderr), ran.stderr


def damaged(path, video):
    """A video whose frames are noise: its header is whole, and its packets are zeros."""
    with av.open(str(video)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                empty = av.Packet(bytes(len(bytes(packet))))
                empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                empty.stream = stream
                out.mux(empty)


def test_bad_input_in_one_line(tmp_path, upscale, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = make(Path("in.mp4"), 0.2)
    with_subtitles(Path("in.mkv"), good)
    damaged(Path("damaged.mp4"), good)
    Path("text.mp4").write_text("no video")
    with av.open("sound.mp4", "w") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), "f4"), "fltp", "mono")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    before = sorted(Path().iterdir())
    for arguments, message in (
        (("none.mp4", "out.mp4"), "none.mp4 does not exist: give a picture, a folder"),
        (("text.mp4", "out.mp4"), r"text.mp4 is no readable video \(.*\): convert it to mp4"),
        (("sound.mp4", "out.mp4"), "sound.mp4 has no video stream: give a video"),
        (("damaged.mp4", "out.mp4"), "damaged.mp4 has no frames that can be decoded"),
        (("in.mp4", "in.mp4"), "in.mp4 would overwrite its input: give another output"),
        (("in.mp4", "out.webm"), r"cannot write out.webm: end it in \.mp4"),
        (("in.mp4", "no/out.mp4"), "cannot write no/out.mp4: .* existing folder"),
        (("in.mkv", "out.mp4"), r"out.mp4 cannot hold the subtitle stream \(\w+\) of .*\.mkv"),
        (("in.mp4", "out.mp4", "--format", "png"), "--format png is for pictures"),
        (("in.mp4", "out.mp4", "--recursive"), "in.mp4 is a video: leave out --recursive"),
        (("in.mp4", "out.mp4", "--tile", "0"), "tile=0 is not supported"),
    ):
        error = upscale(*arguments, code=2)
        assert re.search(message, error), error
        assert sorted(Path().iterdir()) == before, arguments


_CAN_MOUNT = (
    sys.platform == "linux"
    and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
)


@pytest.mark.skipif(not _CAN_MOUNT, reason="needs a mount namespace, for a small disk")
@pytest.mark.parametrize(("size", "finished"), [("24k", []), ("100k", ["000000.nut"])])
def test_a_disk_that_becomes_full(tmp_path, model, size, finished):
    """While a chunk is written, or when they are joined: only whole chunks stay, for the rerun."""
    make(tmp_path / "in.mp4", 1, sound=False)
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-m", "condiquant_recipes", "upscale", model, "in.mp4"]
    called = " ".join(map(str, [*command, "disk/out.mp4", "-q", "--quality", 100]))
    script = f"mount -t tmpfs -o size={size} disk disk && {called}; ls -A disk disk/.out.mp4.parts"
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert re.fullmatch(
        r"condiquant: error: no room left for disk/.*goes on from there\n", ran.stderr
    )
    assert ran.stdout.split() == [
        "disk:", ".out.mp4.parts", "disk/.out.mp4.parts:", *finished, "state.json",
    ]  # fmt: skip
