"""What each part of the method gives: all of them, each left out, none, and each alone, one seed.

Run from the repository root: ``CONDIQUANT_DATA=DATA python tests/benchmarks/ablation.py RECIPE BUDGET W/A
[--sets Set5 Set14]``, as ``dat_light/x4.yml quick 3/3``. Rows as :mod:`budgets` has them.
"""

import argparse

from budgets import OFF, row

_ALONE = {"equal channels": "condiquant.equalize=true"}
"""Where ``auto`` would go by another part."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("budget")
    parser.add_argument("width")
    parser.add_argument("--sets", nargs="+", default=["Set5"])
    given = parser.parse_args()
    given.method = "condiquant"

    def show(title: str, off: list[str]) -> None:
        given.overrides = [OFF[part] for part in off]
        if len(off) == len(OFF) - 1:
            (kept,) = OFF.keys() - set(off)
            given.overrides += [_ALONE[kept]] if kept in _ALONE else []
        print(f"{title}: {row(given, given.width, 0)}", flush=True)

    show("all", [])
    for part in OFF:
        show(f"all but {part}", [part])
    show("none", list(OFF))
    for part in OFF:
        show(f"only {part}", [other for other in OFF if other != part])


if __name__ == "__main__":
    main()
