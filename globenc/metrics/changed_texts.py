"""Texts without some of their tokens, and a model's logits for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batching import by_length
from ..encoders import Encoder
from ..predictions import by_name, logits_of, returning_tuples

REMOVALS = ("mask", "delete")
BATCH_TOKENS = 2048
NO_CHANGE = -1  # of a text without removable tokens

_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


class ChangedTexts:
    """The texts of a batch [batch, n] as they are, and then without some of their tokens; each variant once."""

    def __init__(self, mask: np.ndarray, removal: str):
        self.mask, self.removal = mask, removal
        self.texts: list[int] = []  # which text of the batch each variant is of
        self._removed: list[np.ndarray] = []
        self._known: dict[tuple[int, bytes], int] = {}
        for text in range(len(mask)):
            self._index(text, np.zeros(mask.shape[1], bool))

    def without_positions(self, text: int, positions: Any) -> int:
        """Index of a text without the tokens at some positions."""
        removed = np.zeros(self.mask.shape[1], bool)
        removed[positions] = True
        return self._index(text, removed)

    def without(self, text: int, ranked: np.ndarray, order: str, share: float) -> int:
        """Index of a text without a share of its removable tokens, whose positions are ranked, most important first."""
        if not len(ranked):
            return NO_CHANGE
        count = max(1, int(share * len(ranked) + 0.5))
        picked = {"most": ranked[:count], "least": ranked[::-1][:count], "keep": ranked[count:]}[order]
        if self.removal == "delete" and len(picked) == self.mask[text].sum():
            picked = picked[:-1]  # nothing would be left to read
        return self.without_positions(text, picked)

    def tokens(
        self, inputs: Mapping[str, Any], mask_token_id: int | None
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """The variants' token ids, and their types where the inputs have them."""
        input_ids = inputs["input_ids"].cpu().numpy()
        types = inputs.get("token_type_ids")
        type_ids = None if types is None else np.broadcast_to(types.cpu().numpy(), input_ids.shape)
        id_rows: list[np.ndarray] = []
        type_rows: list[np.ndarray] = []
        for text, removed in zip(self.texts, self._removed, strict=True):
            remaining = self.mask[text] & ~removed if self.removal == "delete" else self.mask[text]
            changed = np.where(removed, mask_token_id, input_ids[text]) if self.removal == "mask" else input_ids[text]
            id_rows.append(changed[remaining])
            if type_ids is not None:
                type_rows.append(type_ids[text][remaining])
        return id_rows, None if type_ids is None else type_rows

    def _index(self, text: int, removed: np.ndarray) -> int:
        key = (text, removed.tobytes())
        if key not in self._known:
            self._known[key] = len(self.texts)
            self.texts.append(text)
            self._removed.append(removed)
        return self._known[key]


def check_removal(model: Any, inputs: dict[str, Any], removal: str, mask_token_id: int | None) -> None:
    if removal not in REMOVALS:
        raise ValueError(f"removal must be one of {', '.join(REMOVALS)}; got {removal!r}")
    if removal == "mask":
        check_mask_token(model, mask_token_id, "removal 'mask'", ", or removal='delete'")
    others = [name for name in inputs if name not in _COLUMNS]
    if others or "input_ids" not in inputs:
        raise ValueError(
            f"texts are changed token by token: give {', '.join(_COLUMNS)} alone, got "
            f"{', '.join(others or inputs) or 'nothing'}"
        )


def check_mask_token(model: Any, token: int | None, needed_for: str, instead: str = "") -> int:
    """The mask token, which the model's embeddings have.

    Raises:
        ValueError: they have not, or there is none.
    """
    if token is None:
        raise ValueError(f"mask_token_id is needed for {needed_for}: give the tokenizer's{instead}")
    rows = model.get_input_embeddings().weight.shape[0]
    if not 0 <= token < rows:
        raise ValueError(f"mask_token_id must be in 0..{rows - 1} for this model, got {token}")
    return token


def removable_tokens(mask: Tensor, special_tokens_mask: Tensor | None) -> Tensor:
    """True at the real tokens that may go, [batch, n].

    Raises:
        ValueError: special_tokens_mask has another shape.
    """
    if special_tokens_mask is None:
        return mask
    if special_tokens_mask.shape != mask.shape:
        raise ValueError(
            f"special_tokens_mask must have shape [batch, n] = {[*mask.shape]}, got {list(special_tokens_mask.shape)}"
        )
    return mask & ~special_tokens_mask.bool().to(mask.device)


def logits_of_rows(
    encoder: Encoder, ids: list[np.ndarray], types: list[np.ndarray] | None, batch_tokens: int
) -> Tensor:
    """Class logits [texts, classes] of unpadded texts, float64 on the CPU."""
    model = encoder.model
    device = next(model.parameters()).device
    filler = getattr(model.config, "pad_token_id", None) or 0
    rows: list[Tensor] = [torch.empty(0)] * len(ids)
    with torch.no_grad(), returning_tuples(model):
        for batch in by_length([len(row) for row in ids], batch_tokens, encoder.family.padding_invariant):
            columns = {
                "input_ids": _padded([ids[k] for k in batch], filler),
                "attention_mask": _padded([np.ones(len(ids[k]), np.int64) for k in batch], 0),
            }
            if types is not None:
                columns["token_type_ids"] = _padded([types[k] for k in batch], 0)
            inputs = {name: column.to(device) for name, column in columns.items()}
            logits = logits_of(model, model(**by_name(model, inputs)))
            if logits is None or logits.ndim != 2:
                raise ValueError(f"{type(model).__name__} has no class logits: give a model that classifies texts")
            for k, row in zip(batch, logits.double().cpu(), strict=True):
                rows[k] = row
    stacked = torch.stack(rows)
    if not bool(torch.isfinite(stacked).all()):
        raise FloatingPointError("the model's logits are not finite: its weights hold NaN or infinity")
    return stacked


def _padded(rows: list[np.ndarray], filler: int) -> Tensor:
    """Rows of whole numbers as one tensor [batch, longest], filled behind their ends."""
    padded = np.full((len(rows), max(len(row) for row in rows)), filler, np.int64)
    for k, row in enumerate(rows):
        padded[k, : len(row)] = row
    return torch.from_numpy(padded)
