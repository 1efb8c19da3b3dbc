"""A finished comparison as a Markdown table.

python tests/benchmarks/compare_table.py OUT
"""

import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console

from condiquant_recipes.comparison.table import remarks, table


def main(folder: Path) -> None:
    report = json.loads((folder / "compare.json").read_text())
    rendered = table(report)
    rendered.box, rendered.title, rendered.padding = box.MARKDOWN, None, 0
    caption, rendered.caption = str(rendered.caption), None
    console = Console(width=1000)
    console.print(rendered)
    print(f"\n{caption}.\n")
    for remark in remarks(report):
        print(f"- {remark}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
