"""From a network with fake quantizers to the bounds, weights and biases that it is trained or run with.

Bounds are searched first, on the float network (DOBI). Then each of the candidates gives the layers new
weights, whose bounds are searched anew and whose rounding keeps the layers' outputs. The same is tried on
the network with equalized channels, which computes the same in floats. Of several candidates the one that
is closest to the float network on images held out from all that stays.
"""

from condiquant_plugin.calibration.candidates import Calibration, candidates, fidelity_in_db
from condiquant_plugin.calibration.images import held_out
from condiquant_plugin.calibration.job import calibrate

__all__ = ["Calibration", "calibrate", "candidates", "fidelity_in_db", "held_out"]
