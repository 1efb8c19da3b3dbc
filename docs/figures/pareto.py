"""Draws ``pareto.svg`` of a comparison: python docs/figures/pareto.py OUT/compare.json"""

import json
import sys
from pathlib import Path

from condiquant_recipes.comparison.page import fronts

against_size, _ = fronts(json.loads(Path(sys.argv[1]).read_text()))
against_size.figure.savefig(Path(__file__).with_name("pareto.svg"), metadata={"Date": None})
