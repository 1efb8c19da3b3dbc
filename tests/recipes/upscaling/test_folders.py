import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import pyvips
import skimage.data

from programs import started, wait_for


def loaded(path):
    return pyvips.Image.new_from_file(str(path))


@pytest.fixture
def folder(tmp_path, photograph):
    """Pictures of several kinds, also in a folder of their folder."""
    place = tmp_path / "in"
    (place / "more").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "c.webp", "more/d.tiff"):
        photograph.write_to_file(str(place / name))
    photograph.crop(3, 5, 20, 11).write_to_file(str(place / "small.PNG"))
    (place / "notes.txt").write_text("no picture")
    return place


def names(place):
    return sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())


def test_a_folder_keeps_names_and_formats(tmp_path, upscale, folder, caplog):
    out = tmp_path / "out"
    assert upscale(folder, out) == f"{out}: 4 pictures\n"
    assert names(out) == ["a.png", "b.jpg", "c.webp", "small.PNG"]
    assert "skipped, as no pictures (1): notes.txt" in caplog.text
    assert (loaded(out / "b.jpg").width, loaded(out / "small.PNG").width) == (176, 80)
    assert loaded(out / "b.jpg").get("vips-loader") == "jpegload"


def test_recursive_with_names_of_their_own(tmp_path, upscale, folder):
    upscale(folder, tmp_path / "out", "-r", "--format", "png", "--suffix", "_x4")
    expected = ["a_x4.png", "b_x4.png", "c_x4.png", "more/d_x4.png", "small_x4.png"]
    assert names(tmp_path / "out") == expected


def test_a_second_run_goes_on(tmp_path, upscale, folder):
    out = tmp_path / "out"
    upscale(folder, out)
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    (out / "b.jpg").unlink()
    assert "1 pictures, 3 were there: skipped" in upscale(folder, out)
    after = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    assert [name for name in before if before[name] != after[name]] == ["b.jpg"]
    upscale(folder, out, "--overwrite")
    assert all((out / name).stat().st_mtime_ns > time_ for name, time_ in after.items())


def test_results_beside_their_inputs_are_no_inputs(upscale, folder):
    for done in ("4 pictures\n", "0 pictures, 4 were there"):
        assert done in upscale(folder, folder, "--suffix", "_x4")
    assert "b_x4.jpg" in names(folder)
    assert "b_x4_x4.jpg" not in names(folder)


def test_output_inside_the_input_is_no_input(upscale, folder):
    for done in ("5 pictures\n", "0 pictures, 5 were there"):
        assert done in upscale(folder, folder / "out", "-r")
    assert not (folder / "out" / "out").exists()


def test_one_bad_picture_does_not_stop_the_others(tmp_path, upscale, folder):
    data = (folder / "a.png").read_bytes()
    (folder / "b.jpg").write_bytes(data[: len(data) // 2])
    pyvips.Image.black(4, 4).cast("float").write_to_file(str(folder / "float.tiff"))
    error = upscale(folder, tmp_path / "out", code=2)
    assert "b.jpg is no readable picture" in error
    assert "(2 failed, 3 written)" in error
    assert names(tmp_path / "out") == ["a.png", "c.webp", "small.PNG"]


def test_one_that_breaks_off_while_it_streams(tmp_path, upscale, folder, monkeypatch):
    from condiquant_recipes.upscaling import picture_file

    monkeypatch.setattr(picture_file, "_DECODED_AHEAD", 0)
    data = (folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])
    error = upscale(folder, tmp_path / "out", "--tile", 8, "--overlap", 2, code=2)
    assert "b.png is no readable picture" in error
    assert "(1 failed, 4 written)" in error
    assert names(tmp_path / "out") == ["a.png", "b.jpg", "c.webp", "small.PNG"]


def test_one_too_large_for_the_disk_does_not_stop_the_others(
    tmp_path, upscale, folder, monkeypatch
):
    from condiquant_recipes.upscaling import picture_file

    monkeypatch.setattr(picture_file, "_SMALL", 4 * 20 * 4 * 11 * 3)
    monkeypatch.setattr(picture_file, "free_memory", lambda: 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60_000))
    for name in ("b.jpg", "c.webp"):
        (folder / name).unlink()
    error = upscale(folder, tmp_path / "out", code=2)
    assert "no room in" in error
    assert "(1 failed, 1 written)" in error
    assert names(tmp_path / "out") == ["small.PNG"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in/a.png", "in/a.png"), "a.png would overwrite its input: give another output"),
        (("in", "in"), "a.png would overwrite its input: .*--suffix"),
        (
            ("in/notes.txt", "out.png"),
            r"notes.txt: unknown file type '.txt'; give a picture \(avif",
        ),
        (("in/none.png", "out.png"), "in/none.png does not exist: give a picture, a folder"),
        (("empty", "out"), r"empty has no pictures \(avif.*or --recursive"),
        (("in", "in/a.png"), "in/a.png is a file: give a folder"),
        (("in/a.png", "out.bmp"), "cannot write out.bmp: end it in jpg, png, tiff, webp"),
        (("in/a.png", "no/out.png"), "cannot write no/out.png: .* existing folder"),
        (("in/a.png", "out.png", "--format", "jpg"), "out.png is not .jpg: leave out --format"),
        (("in/a.png", "out.png", "--suffix", "_x"), "out.png is a name: leave out --suffix _x"),
        (("in/a.png", "out.png", "--recursive"), "in/a.png is a picture: leave out --recursive"),
        (("in", "out", "--suffix", "a/b"), "--suffix 'a/b' has a folder in it"),
        (("in/a.png", "out.webp", "--scale", "64", "--overlap", "-1"), "overlap=-1"),
        (("in/long.png", "out.webp"), "20000 pixels on a side, and webp holds 16383: .*tiff"),
        (("in/a.png", "out.png", "--device", "ABACUS"), "device 'ABACUS' is not available"),
        (("in/a.png", "out.png", "--threads", "0"), "--threads"),
        (("in/a.png", "out.png", "--cache", "in/a.png"), "cannot write to the cache in/a.png"),
    ],
)
def test_bad_input_in_one_line(
    tmp_path, upscale, folder, monkeypatch, photograph, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    pyvips.Image.black(5000, 1).write_to_file(str(folder / "long.png"))
    before = names(tmp_path)
    error = upscale(*arguments, code=2)
    assert re.search(message, error), error
    assert names(tmp_path) == before


def test_two_pictures_of_one_name(tmp_path, upscale, folder, photograph):
    photograph.write_to_file(str(folder / "a.jpg"))
    error = upscale(folder, tmp_path / "out", "--format", "png", code=2)
    assert "a.jpg and" in error
    assert "a.png would both become" in error


@pytest.mark.parametrize("path", ["none", "none.xml", "none.pth"])
def test_a_model_that_does_not_exist(tmp_path, condiquant, folder, path):
    error = condiquant("upscale", path, folder / "a.png", tmp_path / "out.png", "-q", code=2)
    assert error == f"{path} does not exist: give the .xml of an IR, or the folder of a run"


def test_a_disk_that_is_surely_too_small(tmp_path, upscale, folder, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = upscale(folder, tmp_path / "out", code=2)
    assert "no room in" in error
    assert "0.0 MiB are free: free some or choose another" in error
    assert not (tmp_path / "out").exists()


_CAN_MOUNT = (
    sys.platform == "linux"
    and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
)


def environment():
    places = [Path(p) for p in sys.path if p]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}


@pytest.mark.skipif(not _CAN_MOUNT, reason="needs a mount namespace, for a small disk")
def test_a_disk_that_becomes_full(tmp_path, model, photograph):
    """What was written stays whole, and the rest leaves nothing."""
    for place in ("in", "disk", "copy"):
        (tmp_path / place).mkdir()
    for number in range(6):
        photograph.jpegsave(str(tmp_path / "in" / f"{number}.jpg"), Q=10)
    command = [sys.executable, "-m", "condiquant_recipes", "upscale", model, "in", "disk", "-q"]
    called = " ".join(map(str, [*command, "--quality", 100]))
    script = (
        f"mount -t tmpfs -o size=72k disk disk && {called}; echo $?; ls -A disk; cp disk/* copy"
    )
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.stderr.startswith("condiquant: error: no room left for disk/"), ran.stderr
    assert ran.stderr.count("\n") == 1
    assert "free some and run again, which goes on from there" in ran.stderr
    code, *left = ran.stdout.split()
    assert code == "2"
    assert left
    assert left == [f"{number}.jpg" for number in range(len(left))]
    for name in left:
        assert loaded(tmp_path / "copy" / name).copy_memory().width == 176


def test_a_run_that_was_killed_goes_on(tmp_path, model, upscale):
    """SIGKILL in the middle: what is there is whole, and the rerun does the rest alone."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    cat = skimage.data.chelsea()
    for number in range(9):
        crop = cat[60:124, 10 * number : 64 + 10 * number].copy()
        pyvips.Image.new_from_array(crop).write_to_file(str(source / f"{number:02}.png"))
    command = [sys.executable, "-m", "condiquant_recipes", "upscale", model, source, out, "-q"]
    options = {"env": environment(), "stdout": subprocess.DEVNULL}
    with started(command, tmp_path / "errors", **options) as process:
        wait_for(lambda: len(list(out.glob("*.png"))) >= 2, process)
        process.kill()
    survived = {file: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert 2 <= len(survived) < 9
    (out / ".08.png.4711").write_bytes(b"half-written")
    (out / ".of another program.12").write_bytes(b"")
    assert f"{9 - len(survived)} pictures, {len(survived)} were there" in upscale(source, out)
    assert len(list(out.glob("*.png"))) == 9
    for file in out.glob("*.png"):
        assert loaded(file).copy_memory().width == 4 * 64
    assert survived == {file: file.stat().st_mtime_ns for file in survived}
    assert [file.name for file in out.glob(".*")] == [".of another program.12"]


def test_set14(tmp_path, upscale):
    data = os.environ.get("CONDIQUANT_DATA")
    if not data:
        pytest.skip("set CONDIQUANT_DATA to a folder with Set14")
    source = Path(data) / "Set14" / "LR_bicubic" / "X4"
    assert "14 pictures" in upscale(source, tmp_path / "out")
    for file in source.iterdir():
        found, low = loaded(tmp_path / "out" / file.name), loaded(file)
        assert (found.width, found.height, found.bands) == (
            4 * low.width,
            4 * low.height,
            low.bands,
        )
