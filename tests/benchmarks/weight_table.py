"""The table of docs/weight_compression.md and its plot, of the folder that weight_compression.py fills.

python tests/benchmarks/weight_table.py OUT [--svg docs/figures/weights.svg]
"""

import argparse
import json
from base64 import b64decode
from pathlib import Path

from condiquant_recipes.weight_comparison.comparing import REPORT
from condiquant_recipes.weight_comparison.page import front

MIB, GIB = 2**20, 2**30
COLUMNS = (
    ("perplexity", "perplexity", "{:.4g}", 1),
    ("bits_per_weight", "bits per weight", "{:.2f}", 1),
    ("output_error", "output error", "{:.4f}", 1),
    ("bin_bytes", "`.bin`, MiB", "{:.0f}", MIB),
    ("memory_bytes", "memory, MiB", "{:.0f}", MIB),
    ("cpu_seconds", "CPU s", "{:.0f}", 1),
    ("peak_memory_bytes", "peak GiB", "{:.2f}", GIB),
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    rows = json.loads((given.out / "rows" / REPORT).read_text())["rows"]
    rows = [row | {"number": number} for number, row in enumerate(rows, 1)]
    print(f"| | weights | {' | '.join(head for _, head, *_ in COLUMNS)} | front |")
    print(f"|{'---|' * (len(COLUMNS) + 3)}")
    for row in rows:
        cells = [
            form.format(row[key] / unit) if row.get(key) is not None else "–"
            for key, _, form, unit in COLUMNS
        ]
        mark = "*" if row["pareto_bits"] else ""
        print(f"| {row['number']} | {row['label']} | {' | '.join(cells)} | {mark} |")
    if given.svg:
        plot = front([row for row in rows if not row["reason"]])
        given.svg.write_bytes(b64decode(plot.uri.partition(",")[2]))


if __name__ == "__main__":
    main()
