"""Does an attribution tell the truth? Gradient saliency, HTA, rank correlation, faithfulness, plausibility, flow.

Each function stands alone on tensors and arrays.
"""

from .correlation import Correlation, spearman
from .flow import attention_flow
from .gradients import hta, hta_maps, saliency
from .plausibility import Plausibility, align, plausibility

__all__ = [
    "Correlation",
    "Plausibility",
    "align",
    "attention_flow",
    "hta",
    "hta_maps",
    "plausibility",
    "saliency",
    "spearman",
]
