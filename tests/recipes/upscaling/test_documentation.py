"""The commands of docs/upscaling.md, as they stand there."""

import re
import shlex
from pathlib import Path

import pyvips

from videos import make, with_subtitles

PAGE = Path(__file__).parents[3] / "docs" / "upscaling.md"


def test_commands(tmp_path, monkeypatch, condiquant, model, photograph):
    block = re.search(r"```sh\n(.*?)```", PAGE.read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    Path("MODEL").symlink_to(model)
    Path("photos/more").mkdir(parents=True)
    for name in ("photo.jpg", "photos/a.png", "photos/more/b.jpg"):
        photograph.write_to_file(name)
    with_subtitles(Path("film.mkv"), make(Path("sound.mp4"), 0.2))
    for line in block.splitlines():
        _, *arguments = shlex.split(line, comments=True)
        condiquant(*arguments, "-q")
    for name in ("photo_x4.png", "large/a_x4.webp", "large/more/b_x4.webp"):
        assert pyvips.Image.new_from_file(name).width == 4 * 44
    assert Path("film_x4.mkv").stat().st_size > 0


def test_every_option_is_on_the_page(condiquant):
    offered = set(re.findall(r"--[a-z][a-z-]+", condiquant("upscale", "--help")))
    documented = set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text()))
    assert offered - {"--quiet", "--help"} <= documented
    assert documented <= offered
