"""Does an attribution tell the truth? Gradient saliency, HTA, rank correlation, faithfulness, plausibility, flow.

Each function stands alone on tensors and arrays; `evaluate` puts them together to a report on a model and its texts.
"""

from ..functional import MethodsOutput, compare_methods
from .correlation import Correlation, spearman
from .faithfulness import Faithfulness, aopc, comprehensiveness, sufficiency
from .flow import attention_flow
from .gradients import hta, hta_maps, saliency
from .plausibility import Plausibility, align, plausibility
from .presets import PRESETS, evaluate_preset
from .run import Evaluation, evaluate

__all__ = [
    "PRESETS",
    "Correlation",
    "Evaluation",
    "Faithfulness",
    "MethodsOutput",
    "Plausibility",
    "align",
    "aopc",
    "attention_flow",
    "compare_methods",
    "comprehensiveness",
    "evaluate",
    "evaluate_preset",
    "hta",
    "hta_maps",
    "plausibility",
    "saliency",
    "spearman",
    "sufficiency",
]
