"""``condiquant upscale`` against plain OpenVINO, one process for each picture, and benchmark_app.

Run from the repository root, on cores of its own: ``taskset -c 0 python tests/benchmarks/upscale_speed.py
MODEL [SIDE] [COUNT] [ROUNDS]``; MODEL is the folder of a run, SIDE that of the pictures (a static IR: of
its tile). Everything takes turns, so that drift hits all alike; ratios are medians over the rounds.
Seconds of whole processes are of the CPU, which on one core are those of the clock without neighbours.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from tempfile import TemporaryDirectory

import pyvips
import skimage.data

_PLAIN = """
import sys
import numpy as np, openvino as ov, pyvips
model, source, target, cache = sys.argv[1:]
core = ov.Core()
properties = {"INFERENCE_PRECISION_HINT": "f32"} | ({"CACHE_DIR": cache} if cache else {})
network = core.compile_model(core.read_model(model), "CPU", properties)
pixels = pyvips.Image.new_from_file(source).numpy().transpose(2, 0, 1)[None].astype("f4") / 255
output = network([np.ascontiguousarray(pixels)])[0][0]
levels = np.rint(output.clip(0, 1) * 255).astype("u1").transpose(1, 2, 0)
pyvips.Image.new_from_array(np.ascontiguousarray(levels)).pngsave(target)
"""
_STEADY = """
import sys
from pathlib import Path
from time import perf_counter
from condiquant_recipes import cli
from condiquant_recipes.upscaling import request
work = request.upscale_pictures
def timed(*arguments):
    start = perf_counter()
    work(*arguments)
    print("seconds", perf_counter() - start)
request.upscale_pictures = timed
sys.argv[0] = "condiquant"
cli.main()
"""


def seconds(*command):
    """Of the CPU."""
    before = getrusage(RUSAGE_CHILDREN)
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def upscale(*arguments):
    return [sys.executable, "-m", "condiquant_recipes", "upscale", *arguments, "-q"]


def first_pixel(model, picture, folder, rounds):
    """Start to finish of one picture, compiled anew and from a warm cache."""
    plain = [sys.executable, "-c", _PLAIN, model / "model.xml", picture, folder / "plain.png"]
    for name, cache in (("compiled anew", ""), ("from a warm cache", folder / "cache")):
        times = []
        for number in range(rounds + bool(cache)):
            ours = folder / (str(number) if not cache else "ours")
            target = folder / "ours.png"
            first = seconds(*plain, cache)
            second = seconds(*upscale(model, picture, target, "--cache", ours, "--overwrite"))
            times.append((first, second))
        times = times[bool(cache) :]
        ratio = median(second / first for first, second in times)
        plain_s, ours_s = (median(column) for column in zip(*times, strict=True))
        print(f"first pixel, {name}: plain {plain_s:.2f} s, ours {ours_s:.2f} s, ratio {ratio:.2f}")


def of_a_folder(model, source, folder, rounds, side):
    """Pictures per second of one process for all, of one for each, and of the network alone."""
    pictures = sorted(source.iterdir())
    some = pictures[: max(len(pictures) // 10, 3)]
    cache, figures = ("--cache", folder / "cache"), []
    seconds(*upscale(model, some[0], folder / "warm.png", *cache))
    for _ in range(rounds):
        shutil.rmtree(folder / "out", ignore_errors=True)
        whole = len(pictures) / seconds(*upscale(model, source, folder / "out", *cache))
        spent = 0.0
        for picture in some:
            no_cache = ("--cache", folder / "none")
            shutil.rmtree(folder / "none", ignore_errors=True)
            spent += seconds(*upscale(model, picture, folder / "one.png", "--overwrite", *no_cache))
        single = len(some) / spent
        shutil.rmtree(folder / "out")
        command = [sys.executable, "-c", _STEADY, "upscale", model, source, folder / "out", "-q"]
        ran = subprocess.run([*map(str, command), *map(str, cache)], capture_output=True, text=True)
        steady = len(pictures) / float(re.search(r"seconds ([\d.]+)", ran.stdout)[1])
        figures.append((whole, single, steady, benchmark_app(model / "model.xml", side)))
    whole, single, steady, alone = (median(column) for column in zip(*figures, strict=True))
    print(f"{len(pictures)} pictures of {side}x{side}: {whole:.2f} a second with the start")
    print(
        f"  one process for each: {single:.2f}, ratio {median(w / o for w, o, *_ in figures):.1f}"
    )
    print(f"  without the start, by the clock: {steady:.2f}")
    ratio = median(s / a for *_, s, a in figures)
    print(f"  benchmark_app: {alone:.2f}, ratio {ratio:.2f}")


def benchmark_app(xml, side):
    """Frames of the network per second of the clock, with default options but f32."""
    program = Path(sysconfig.get_path("scripts")) / "benchmark_app"
    command = [program, "-m", xml, "-d", "CPU", "-infer_precision", "f32", "-t", "6"]
    command += ["-data_shape", f"[1,3,{side},{side}]", "-hint", "throughput"]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return float(re.search(r"Throughput: +([\d.]+) FPS", ran.stdout)[1])


def main():
    model, *numbers = sys.argv[1:]
    side, count, rounds = [*map(int, numbers), *(64, 100, 5)[len(numbers) :]]
    cat = pyvips.Image.new_from_array(skimage.data.chelsea().copy())
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for number in range(count):
            x, y = 13 * number % (451 - side), 7 * number % (300 - side)
            cat.crop(x, y, side, side).pngsave(str(folder / "in" / f"{number:03}.png"))
        model = Path(model).resolve()
        first_pixel(model, folder / "in" / "000.png", folder, rounds)
        of_a_folder(model, folder / "in", folder, rounds, side)


if __name__ == "__main__":
    main()
