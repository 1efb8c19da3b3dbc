"""How long a search for bits takes, part by part; what it calibrates is counted for itself.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/precision_search.py RECIPE
[TARGET]``, such as ``dat_light/x4.yml fidelity=45``; without a target only what the layers' bits cost.
"""

import os
import sys
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from condiquant_plugin import sensitivity
from condiquant_recipes.precision import costs, search
from condiquant_recipes.precision.target import Target
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.source import load_source

PARTS = {
    "moments": (sensitivity, "collect_moments"),
    "bounds": (sensitivity.PrecisionStudy, "_searched"),
    "rounding": (sensitivity.GPTQ, "solve"),
    "sensitivity": (sensitivity.PrecisionStudy, "sensitivity"),
    "single changes": (costs.LayerCosts, "_rank_correlation"),
    "bytes": (costs.LayerCosts, "_stored_bytes"),
    "costs": (costs.LayerCosts, "__init__"),
    "calibrations": (search._Search, "_calibrated"),
}


def main() -> None:
    torch.manual_seed(0)
    recipe = load_recipe(recipe_path(sys.argv[1]), ["budget=quick"])
    source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), [])
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, _timed(getattr(owner, attribute), spent[name]))
    started = time.perf_counter(), time.process_time()
    found = costs.LayerCosts(recipe, source, Progress())
    print(f"rank correlation {found.rank_correlation:.3f}")
    if target := sys.argv[2:]:
        print(search.find_precision(found, None, Target.parse(*target), Progress()).held_out)
    spent["all"] = [time.perf_counter() - started[0], time.process_time() - started[1]]
    for name, (wall, cpu) in spent.items():
        print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU")


def _timed(function: Any, spent: list[float]) -> Any:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - started[0]
            spent[1] += time.process_time() - started[1]

    return timed


if __name__ == "__main__":
    main()
