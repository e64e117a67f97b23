"""Integrated gradients: Sundararajan, Taly and Yan, ICML 2017."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .changed_texts import check_mask_token, removable_tokens
from .gradients import AnswerGradients

BASELINES = ("zero", "mask")
STEPS = 20


def integrated_gradients(
    model: nn.Module,
    *,
    label: str | Tensor = "predicted",
    output: str = "logit",
    baseline: str = "zero",
    steps: int = STEPS,
    mask_token_id: int | None = None,
    special_tokens_mask: Tensor | None = None,
    **model_inputs: Any,
) -> Tensor:
    """<mean of dy_c/de_i on the straight line from a baseline e0 to e, e_i - e0_i> of every token, with its sign.

    At the embedding block's output, by the midpoint rule: `steps` forward and backward passes. With many steps the
    scores sum to y_c(e) - y_c(e0).

    Args:
        model, label, output, **model_inputs: as for `saliency`.
        baseline: e0: "zero", or "mask", the embeddings of the text with mask tokens for its own.
        steps: points on the line.
        mask_token_id: the tokenizer's, needed for "mask", as are input_ids.
        special_tokens_mask: 1 at tokens that "mask" does not replace, [batch, n], as tokenizers return it; their scores
            are zero. None: it replaces all.

    Returns:
        [batch, n], zero at padding; float64 for float64 models, else float32.

    Raises:
        TypeError, ValueError, FloatingPointError: as `saliency`; a baseline or a number of steps that cannot be used.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.metrics.integrated_gradients(explainer.model, **inputs).shape
        torch.Size([1, 5])
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}; got {baseline!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive whole number, got {steps!r}")
    gradients = AnswerGradients(model, model_inputs, label, output)
    start = None
    if baseline == "mask":
        token = check_mask_token(gradients.encoder.model, mask_token_id, "baseline 'mask'", ", or baseline='zero'")
        if "input_ids" not in model_inputs:
            raise ValueError("baseline 'mask' replaces tokens: give input_ids, or baseline='zero'")
        replaced = removable_tokens(gradients.mask, special_tokens_mask).to(model_inputs["input_ids"].device)
        masked = {**model_inputs, "input_ids": model_inputs["input_ids"].masked_fill(replaced, token)}
        start = AnswerGradients(model, masked, label, output).at()[1]
    states = gradients.at()[1]
    start = torch.zeros_like(states) if start is None else start
    total = torch.zeros_like(states)
    for step in range(steps):
        total += gradients.at(start + (step + 0.5) / steps * (states - start))[0]
    return gradients.tokens((total / steps * (states - start)).sum(-1))
