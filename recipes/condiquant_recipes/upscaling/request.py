"""What ``condiquant upscale`` was asked for, checked before the network is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from condiquant_plugin.errors import InputError
from condiquant_recipes.progress import Progress
from condiquant_recipes.upscaling.model import Hardware, read_run
from condiquant_recipes.upscaling.naming import (
    Job,
    Kind,
    Names,
    check_suffix,
    folder_jobs,
    kind,
    picture_job,
)
from condiquant_recipes.upscaling.picture_file import Wanted, pixels
from condiquant_recipes.upscaling.pictures import check_places, open_jobs, upscale_pictures

_PICTURE_QUALITY, _VIDEO_QUALITY = 95, 70
_ONE_TILE = 512**2
"""Pixels of a picture that is enlarged as fast as one can, by all cores at once."""


@dataclass(frozen=True)
class Request:
    """A model, what to enlarge with it, and how.

    Attributes:
        scale: None for the network's.
        ending: of pictures, with a dot; None for that of the input.
        quality: 1 to 100; None for 95 of pictures, 70 of videos.
    """

    model: Path
    source: Path
    output: Path
    scale: float | None
    ending: str | None
    quality: int | None
    suffix: str
    recursive: bool
    overwrite: bool
    bicubic_alpha: bool
    hardware: Hardware

    def run(self, progress: Progress) -> None:
        """Enlarge, and say where the result is.

        Raises:
            InputError: a model, an input or an output that cannot be used.
        """
        what = kind(self.source)
        if self.recursive and what is not Kind.folder:
            raise InputError(f"{self.source} is {what.value}: leave out --recursive")
        if what is Kind.video:
            self._video(progress)
            return
        names = Names(self.suffix, self.ending)
        if what is Kind.folder:
            jobs = folder_jobs(self.source, self.output, names, recursive=self.recursive)
        else:
            jobs = [picture_job(self.source, self.output, names)]
        left = self._pictures(jobs, progress)
        there = len(jobs) - len(left)
        if what is Kind.picture:
            print(f"{jobs[0].target}{there * ' is there: skipped; --overwrite replaces it'}")
        else:
            skipped = f", {there} were there: skipped; --overwrite replaces them" if there else ""
            print(f"{self.output}: {len(left)} pictures{skipped}")

    def _pictures(self, jobs: list[Job], progress: Progress) -> list[Job]:
        ir, own_scale = read_run(self.model)
        scale = self.scale or own_scale
        left = open_jobs(jobs, overwrite=self.overwrite)
        if left:
            check_places(left, scale)
            many = len(left) > 1 or pixels(left[0].source) > _ONE_TILE
            upscaler = self.hardware.open(self.model, ir, many=many)
            wanted = Wanted(scale, self.quality or _PICTURE_QUALITY, self.bicubic_alpha)
            upscale_pictures(upscaler, left, wanted, progress)
        return left

    def _video(self, progress: Progress) -> None:
        from condiquant_recipes.upscaling import video
        from condiquant_recipes.upscaling.video_file import VideoFile, constant_rate_factor

        if self.ending is not None:
            raise InputError(f"--format {self.ending[1:]} is for pictures: leave it out")
        output = self.output
        check_suffix(self.suffix, output)
        if output.is_dir():
            output = output / f"{self.source.stem}{self.suffix}{self.source.suffix}"
        found = VideoFile(self.source)
        video.check_output(found, output)
        if output.exists() and not self.overwrite:
            print(f"{output} is there: skipped; --overwrite replaces it")
            return
        ir, scale = read_run(self.model)
        size = video.even_size(found, self.scale or scale)
        crf = constant_rate_factor(self.quality or _VIDEO_QUALITY)
        said = video.described(found, self.model, size, crf, self.hardware)
        upscaler = self.hardware.open(self.model, ir, many=True)
        chunks = video.Chunks(output, said)
        video.upscale_video(upscaler, found, output, size, crf, chunks, progress)
        print(output)
