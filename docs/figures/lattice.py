"""Draws ``lattice.svg``: python docs/figures/lattice.py"""

from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

from condiquant_plugin.uniform import grid

rcParams["svg.hashsalt"] = "lattice"

BITS, LOWER, UPPER = 3, -0.53, 1.0

cells = grid.lattice(BITS, "weight")
snapped = grid.snap(torch.tensor(LOWER), torch.tensor(UPPER), BITS, "weight")
step, zero = float(snapped.step), int(snapped.zero)
fine = step / cells.refinement
codes = range(2**BITS)

figure = Figure(figsize=(8.4, 2.7), layout="constrained")
axis = figure.subplots()
axis.axvline(0, color="tab:red", linewidth=1)
axis.text(0, 1.62, "0", color="tab:red", ha="center", fontsize=9)
for code in codes:
    as_searched, level = LOWER + code * step, float(snapped.lower) + code * step
    axis.plot([as_searched] * 2, [1, 1.3], color="tab:gray", linewidth=1.5)
    axis.text(as_searched, 1.36, code, ha="center", fontsize=8, color="tab:gray")
    axis.plot([level] * 2, [0, 0.34], color="tab:blue", linewidth=2.5)
    axis.text(level, 0.4, code, ha="center", fontsize=8, color="tab:blue")
    axis.text(level, -0.3, code * cells.refinement - zero, ha="center", fontsize=8)
for tick in range(cells.refinement * codes[-1] + 1):
    axis.plot([float(snapped.lower) + tick * fine] * 2, [0, 0.14], color="black", linewidth=0.6)
axis.annotate(
    "", (LOWER, 1.15), (LOWER + step, 1.15), arrowprops={"arrowstyle": "<->", "linewidth": 0.8}
)
axis.text(LOWER + step / 2, 1.02, "step", ha="center", fontsize=8)
left = LOWER - 0.06
for height, text in (
    (1.1, "bounds as searched\n3-bit codes"),
    (0.14, f"snapped to the lattice\nof step / {cells.refinement}"),
    (-0.36, "integers in the kernel"),
):
    axis.text(left, height, text, ha="right", va="bottom", fontsize=8)
axis.set(xlim=(LOWER - 0.45, UPPER + 0.05), ylim=(-0.45, 1.75))
axis.set_axis_off()
figure.savefig(Path(__file__).with_name("lattice.svg"), metadata={"Date": None})
