"""Occlusion: what the model answers without one token (Zeiler and Fergus 2014; Li, Monroe and Jurafsky 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..encoders import Encoder
from ..inputs import check_inputs
from ..model_state import Loan
from .changed_texts import BATCH_TOKENS, ChangedTexts, check_removal, logits_of_rows, removable_tokens
from .gradients import answers_of, check_output, classes_of


def occlusion(
    model: nn.Module,
    *,
    label: str | Tensor = "predicted",
    output: str = "logit",
    removal: str = "mask",
    mask_token_id: int | None = None,
    special_tokens_mask: Tensor | None = None,
    batch_tokens: int = BATCH_TOKENS,
    **model_inputs: Any,
) -> Tensor:
    """y_c(text) - y_c(text without token i) of every token, with its sign: one forward pass for each.

    Args:
        model, label, output: as for `saliency`; texts alone, no images.
        removal: "mask" puts `mask_token_id` in a token's place, "delete" takes it out and closes the gap.
        mask_token_id: the tokenizer's, needed for "mask".
        special_tokens_mask: 1 at tokens that stay, [batch, n], as tokenizers return it; their scores are zero.
        batch_tokens: most tokens of a forward pass, padding included.
        **model_inputs: input_ids, attention_mask and token_type_ids, [batch, n].

    Returns:
        [batch, n], zero at padding; float64 for float64 models, else float32.

    Raises:
        TypeError, ValueError, FloatingPointError: as `saliency`; inputs or options that cannot be used.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> mask = explainer.tokenizer.mask_token_id
        >>> globenc.metrics.occlusion(explainer.model, mask_token_id=mask, **inputs).shape
        torch.Size([1, 5])
    """
    check_output(output)
    encoder = Encoder.of(model)
    mask = check_inputs(encoder, model_inputs)
    check_removal(encoder.model, model_inputs, removal, mask_token_id)
    removable = removable_tokens(mask, special_tokens_mask).cpu()
    changed = ChangedTexts(mask.cpu().numpy(), removal)
    batch, n = mask.shape
    # a text of one token has nothing left to read when it is deleted
    positions = [
        (text, token) for text, token in removable.nonzero().tolist() if removal == "mask" or int(mask[text].sum()) > 1
    ]
    variants = [changed.without_positions(text, token) for text, token in positions]
    ids, types = changed.tokens(model_inputs, mask_token_id)
    loan = Loan()

    def run() -> Tensor:
        loan.evaluation_mode(list(encoder.model.modules()))
        return logits_of_rows(encoder, ids, types, batch_tokens)

    logits = loan.run(run)
    classes = classes_of(label, logits[:batch])[changed.texts]
    answers = answers_of(encoder.model, logits, output).gather(1, classes[:, None])[:, 0]
    dtype = torch.float64 if encoder.model.dtype == torch.float64 else torch.float32
    scores = torch.zeros(batch, n, dtype=torch.float64)
    for (text, token), variant in zip(positions, variants, strict=True):
        scores[text, token] = answers[text] - answers[variant]
    return scores.to(mask.device, dtype)
