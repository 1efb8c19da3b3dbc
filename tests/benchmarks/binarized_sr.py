"""Binarized bodies at equal training: PSNR on test sets of BiDRNSR with every kind of block.

Run: ``CONDIQUANT_DATA=DATA python tests/benchmarks/binarized_sr.py FOLDER [--minutes 5]``

FOLDER gets a JSON file and the weights of each row, and rows that are there are not trained again. All
rows of a seed see the same crops in the same order; the checkpoint is the best on photographs held out of
training, never on a test set. ``--minutes`` trains one seed of every block, as long as fits.
"""

import argparse
import json
import math
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from condiquant_basicsr import evaluate, matlab_downscale, test_pairs, upscale
from condiquant_basicsr.binarized import BiDRNSR
from condiquant_basicsr.data.images import read_image, to_tensor, to_uint8
from condiquant_plugin.files import replacing, write_atomic
from condiquant_plugin.pictures import pictures

BLOCKS = ("float", "plain", "e2fif", "bbcu", "bidrb")
SETS = ("Set5", "Set14")
HELD_OUT = 20
VALIDATIONS = 8


@dataclass(frozen=True)
class Training:
    """What all rows share."""

    scale: int = 4
    num_feat: int = 32
    num_block: int = 4
    iterations: int = 3000
    batch: int = 8
    crop: int = 24
    rate: float = 2e-3
    options: dict = field(default_factory=dict)
    """More arguments of BiDRNSR."""


class Photographs:
    """HR images and their LR images in memory: the training set, and those held out."""

    def __init__(self, folder: Path, scale: int) -> None:
        files = list(pictures(sorted(folder.iterdir())))
        pairs = [self._pair(file, scale) for file in files]
        self.held_out, self.training = pairs[:HELD_OUT], pairs[HELD_OUT:]
        self.scale = scale

    @staticmethod
    def _pair(file: Path, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        hr = read_image(file)
        height, width = (size // scale * scale for size in hr.shape[1:])
        hr = hr[:, :height, :width]
        return to_tensor(matlab_downscale(to_uint8(hr), scale)), hr

    def batch(self, chance: random.Random, count: int, size: int):
        lrs, hrs = [], []
        for _ in range(count):
            lr, hr = self.training[chance.randrange(len(self.training))]
            top, left = (chance.randint(0, side - size) for side in lr.shape[1:])
            pair = []
            for image, factor in ((lr, 1), (hr, self.scale)):
                rows, columns = (slice(p * factor, (p + size) * factor) for p in (top, left))
                pair.append(image[:, rows, columns])
            turns, mirrored = chance.randrange(4), chance.random() < 0.5
            pair = [image.flip(2) if mirrored else image for image in pair]
            lr, hr = (torch.rot90(image, turns, (1, 2)) for image in pair)
            lrs.append(lr)
            hrs.append(hr)
        return torch.stack(lrs), torch.stack(hrs)


@torch.no_grad()
def held_out_psnr(network, photographs: Photographs) -> float:
    """Mean over images, of all channels."""
    network.eval()
    errors = [
        F.mse_loss(network(lr[None]).clamp(0, 1)[0], hr).item() for lr, hr in photographs.held_out
    ]
    network.train()
    return float(np.mean([-10 * np.log10(error) for error in errors]))


def train(block: str, seed: int, training: Training, photographs: Photographs, seconds: float):
    """The network at its best checkpoint and what is to be said of it.

    The rate falls along a cosine, over all iterations or over ``seconds``, which end it early.
    """
    torch.manual_seed(seed)
    chance = random.Random(seed)
    network = BiDRNSR(
        num_feat=training.num_feat,
        num_block=training.num_block,
        upscale=training.scale,
        block=block,
        **training.options,
    ).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=training.rate)
    best, started, every = (
        (-np.inf, 0, None),
        time.perf_counter(),
        training.iterations // VALIDATIONS,
    )
    for iteration in range(1, training.iterations + 1):
        lr, hr = photographs.batch(chance, training.batch, training.crop)
        loss = F.l1_loss(network(lr), hr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        share = (time.perf_counter() - started) / seconds
        late, share = share >= 1, min(max(share, iteration / training.iterations), 1)
        for group in optimizer.param_groups:
            group["lr"] = training.rate * (1 + math.cos(math.pi * share)) / 2
        if iteration % max(every, 1) == 0 or late:
            score = held_out_psnr(network, photographs)
            state = {name: value.clone() for name, value in network.state_dict().items()}
            best = max(best, (score, iteration, state), key=lambda entry: entry[0])
            print(
                f"{block} seed {seed}: {iteration}/{training.iterations}, held out {score:.3f} dB, "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
        if late:
            break
    network.load_state_dict(best[2])
    return network.eval(), {
        "held_out_psnr": best[0],
        "iteration": best[1],
        "trained_iterations": iteration,
        "seconds": time.perf_counter() - started,
    }


def scores(run, data: Path, scale: int) -> dict[str, float]:
    return {name: evaluate(run, test_pairs(data, name, scale), scale)["psnr"] for name in SETS}


def bicubic(image: torch.Tensor, scale: int) -> torch.Tensor:
    """MATLAB's, as the literature counts it: Keys' kernel with a = -1/2."""
    size = [side * scale for side in image.shape[2:]]
    return F.interpolate(image, size, mode="bicubic", antialias=True)


def row(
    block: str,
    seed: int,
    training: Training,
    photographs: Photographs,
    data: Path,
    folder: Path,
    seconds: float = float("inf"),
) -> dict:
    """Of a file, or trained."""
    path = folder / f"{block}_{seed}.json"
    if path.is_file():
        found = json.loads(path.read_text())
        whole = found["trained_iterations"] == training.iterations or seconds < float("inf")
        if found["training"] == asdict(training) and whole:
            return found
    network, report = train(block, seed, training, photographs, seconds)
    result = {
        "block": block,
        "seed": seed,
        "training": asdict(training),
        **report,
        "psnr": scores(
            partial(upscale, network, scale=training.scale, multiple=1), data, training.scale
        ),
    }
    with replacing(path.with_suffix(".pth")) as temporary:
        torch.save({"params": network.state_dict()}, temporary)
    write_atomic(path, json.dumps(result, indent=1).encode())
    return result


def table(rows: list[dict], data: Path, scale: int) -> str:
    """Mean and half of the spread over the seeds, by block."""
    lines = [
        f"| block | {' | '.join(SETS)} | held out | seconds |",
        "|---|" + "---|" * (len(SETS) + 2),
    ]
    base = scores(partial(bicubic, scale=scale), data, scale)
    lines.append(f"| bicubic | {' | '.join(f'{base[name]:.2f}' for name in SETS)} | | |")
    for block in BLOCKS:
        own = [entry for entry in rows if entry["block"] == block]
        if not own:
            continue
        cells = []
        for name in SETS:
            values = [entry["psnr"][name] for entry in own]
            spread = (max(values) - min(values)) / 2
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        held_out = statistics.mean(entry["held_out_psnr"] for entry in own)
        seconds = statistics.mean(entry["seconds"] for entry in own)
        lines.append(f"| {block} | {' | '.join(cells)} | {held_out:.2f} | {seconds:.0f} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", nargs="+", default=BLOCKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, help="of all rows, of one seed")
    default = Training()
    for name in ("num_feat", "num_block", "iterations", "batch", "crop", "rate"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--options", type=json.loads, default={}, help="more of BiDRNSR, as JSON")
    return parser.parse_args()


def main() -> None:
    given, data = arguments(), Path(os.environ["CONDIQUANT_DATA"])
    names = [field.name for field in fields(Training) if hasattr(given, field.name)]
    training = Training(**{name: getattr(given, name) for name in names})
    seeds, seconds = given.seeds, float("inf")
    if given.minutes:
        seeds, seconds = seeds[:1], given.minutes * 60 / len(given.blocks)
    given.folder.mkdir(parents=True, exist_ok=True)
    photographs = Photographs(data / "calibration" / "BSDS500_train", training.scale)
    rows = [
        row(block, seed, training, photographs, data, given.folder, seconds)
        for seed in seeds
        for block in given.blocks
    ]
    print(table(rows, data, training.scale))


if __name__ == "__main__":
    main()
