"""DQC: bounds, and optionally weights, trained so that the quantized network follows the float one.

After 2DQuant (arXiv 2406.06649, section 3.3). Differences: the feature loss is the mean over blocks of a
relative distance, so it neither vanishes nor grows with depth; bounds and weights move at rates relative to
the steps of their grids; the checkpoint is chosen on held-out calibration crops.
"""

from condiquant_plugin.distillation.features import captured, feature_blocks, feature_loss
from condiquant_plugin.distillation.loop import DistillationResult, distill
from condiquant_plugin.distillation.loss import DistillationLoss
from condiquant_plugin.distillation.rates import parameter_groups
from condiquant_plugin.distillation.settings import DistillationConfig
from condiquant_plugin.distillation.teacher import OutputCache

__all__ = [
    "DistillationConfig",
    "DistillationLoss",
    "DistillationResult",
    "OutputCache",
    "captured",
    "distill",
    "feature_blocks",
    "feature_loss",
    "parameter_groups",
]
