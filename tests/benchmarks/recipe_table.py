"""Results of a recipe as a Markdown table, from the metrics.json of finished runs.

python tests/benchmarks/recipe_table.py OUT [OUT ...]
"""

import json
import sys
from pathlib import Path
from statistics import median


def main(folders: list[Path]) -> None:
    print("| run | set | float | quantized | κ median | .bin + .xml KiB | layer parity | ties |")
    print("|---|---|---|---|---|---|---|---|")
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        layers, ir = metrics["layers"], metrics["ir"]
        kappa = " → ".join(
            f"{median(layer[key] for layer in layers):.0f}"
            for key in ("condition_before", "condition_after")
        )
        for name, scores in metrics["quantized"].items():
            cells = [
                folder.name,
                name,
                *(f"{s['psnr']:.2f} / {s['ssim']:.4f}" for s in (metrics["float"][name], scores)),
                kappa,
                f"{ir['bin_bytes'] / 1024:.0f} + {ir['xml_bytes'] / 1024:.0f}",
                f"{ir['parity_layer_max']:.0e}",
                f"{ir['tie_rate']:.0e}",
            ]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
