"""Draws ``pareto.svg`` of a comparison: python docs/figures/pareto.py OUT/compare.json"""

import json
import sys
from pathlib import Path

from condiquant_recipes.comparison.page import GROUPS, fronts
from condiquant_recipes.comparison.plots import STYLES

report = json.loads(Path(sys.argv[1]).read_text())
against_size, _ = fronts(report)
(axes,) = against_size.figure.axes
for group, title in GROUPS.items():
    if group != "float" and any(row["group"] == group for row in report["rows"]):
        marker, colour = STYLES[group]
        axes.plot([], [], marker, color=colour, label=title)
axes.legend(frameon=False, loc="upper left", title=f"{report['recipe']}")
for number, accuracy in against_size.below:
    axes.set_xlabel(
        f"{axes.get_xlabel()}  ({number} {report['rows'][number - 1]['label']}: {accuracy:.1f} dB)"
    )
against_size.figure.savefig(Path(__file__).with_name("pareto.svg"), metadata={"Date": None})
