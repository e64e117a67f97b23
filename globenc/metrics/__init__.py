"""Does an attribution tell the truth? Gradients, HTA, occlusion, rank correlation, faithfulness, plausibility, flow.

Each measure stands alone on tensors, arrays and models; `globenc.evaluate` puts them together to a report on a model
and its texts.

A value that is not defined, such as the correlation of a constant row, is NaN in arrays and records, null in files,
counted as `undefined`, and in no mean.
"""

from .correlation import Correlation, spearman
from .faithfulness import Faithfulness, aopc, comprehensiveness, sufficiency
from .flow import attention_flow
from .gradients import gradient_times_input, hta, hta_maps, saliency
from .integrated import integrated_gradients
from .occlusion import occlusion
from .plausibility import Plausibility, align, plausibility

__all__ = [
    "Correlation",
    "Faithfulness",
    "Plausibility",
    "align",
    "aopc",
    "attention_flow",
    "comprehensiveness",
    "gradient_times_input",
    "hta",
    "hta_maps",
    "integrated_gradients",
    "occlusion",
    "plausibility",
    "saliency",
    "spearman",
    "sufficiency",
]
