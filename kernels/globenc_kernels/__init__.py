"""Triton kernels of globenc: an import package of its own that knows tensors and nothing of models.

| step | file |
|---|---|
| attention forward, with log-sum-exp and what each token gives to itself | attention.py |
| value vectors -> a triangular factor a token | head_factors.py |
| LayerNorm scales and norms of vectors, O(n d) | layer_norms.py |
| the local map, its row sums | contribution_norms.py |
| target rows through the local map | rollout.py |
| gradients through attention with its weights held | transposed_product.py |

layouts.py says how the log-sum-exps and factors that they hand on lie in memory, tiles.py how much one program takes.

Where triton is not installed, `unavailable_reason` is all there is. With TRITON_INTERPRET=1 in the environment the
kernels run on CPU tensors, slowly, for checking.
"""

from __future__ import annotations

import importlib.util

from .capability import interpreted, unavailable_reason, unsupported_reason

__all__ = ["interpreted", "unavailable_reason", "unsupported_reason"]

if importlib.util.find_spec("triton") is not None:
    from .arguments import TokenRanges
    from .attention import AttentionOutput, attention
    from .contribution_norms import LocalMap, contribution_norms, row_sums
    from .head_factors import GramWeight, HeadFactors, gram_weight, head_factors
    from .layer_norms import LayerScales, layer_scales, stage_norms
    from .rollout import rollout_rows
    from .transposed_product import transposed_product

    __all__ += [
        "AttentionOutput",
        "GramWeight",
        "HeadFactors",
        "LayerScales",
        "LocalMap",
        "TokenRanges",
        "attention",
        "contribution_norms",
        "gram_weight",
        "head_factors",
        "layer_scales",
        "rollout_rows",
        "row_sums",
        "stage_norms",
        "transposed_product",
    ]
