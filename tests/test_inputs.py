"""Tensors that cannot be attributed: each is refused in one sentence."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import tiny_model

import globenc

IDS = torch.tensor([[5, 6, 7]])


BAD_INPUTS = {
    "nothing": ({}, ValueError, "give input_ids .* or inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.ones(1, 3, 24)}, ValueError, "one of the two"),
    "unknown-input": (
        {"input_ids": IDS, "pixel_values": 1},
        TypeError,
        "takes no input 'pixel_values'; it takes input_ids",
    ),
    "misspelt": ({"input_ids": IDS, "row_normalise": True}, TypeError, "takes no input 'row_normalise'"),
    "list": ({"input_ids": [[5, 6]]}, TypeError, "input_ids must be a tensor, got list"),
    "flat": ({"input_ids": IDS[0]}, ValueError, r"input_ids must have shape \[batch, n\] .* got \[3\]"),
    "no-text": ({"input_ids": IDS[:0]}, ValueError, r"no empty dimension, got \[0, 3\]"),
    "no-token": ({"input_ids": IDS[:, :0]}, ValueError, r"no empty dimension, got \[1, 0\]"),
    "floats": ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
    "beyond-vocabulary": ({"input_ids": IDS + 90}, ValueError, r"input_ids must be in 0..89, got 97"),
    "negative-id": ({"input_ids": IDS - 6}, ValueError, r"input_ids must be in 0..89, got -1"),
    "too-long": ({"input_ids": IDS.repeat(1, 17)}, ValueError, "input_ids has 51 tokens, and BertForSeq.* at most 48"),
    "mask-zero": (
        {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])},
        ValueError,
        "attention_mask is all zero for text 1 of the batch",
    ),
    "mask-shape": ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, ValueError, r"= \[1, 3\], got \[1, 4\]"),
    "mask-4d": ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 3, 3)}, ValueError, r"got \[1, 1, 3, 3\]"),
    "mask-list": ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, ValueError, "got list"),
    "mask-additive": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[0.0, 0, -1e9]])},
        ValueError,
        "1 at real tokens",
    ),
    "mask-nan": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, torch.nan]])},
        ValueError,
        "1 at real tokens",
    ),
    "other-device": (
        {"input_ids": IDS.to("meta")},
        ValueError,
        r"input_ids is on meta and the model on cpu: move it with",
    ),
    "mask-other-device": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 3, device="meta")},
        ValueError,
        "attention_mask is on meta and the model on cpu",
    ),
    "attentions": ({"input_ids": IDS, "output_attentions": True}, ValueError, "output_attentions must not be set"),
    "method": ({"input_ids": IDS, "method": "GlobEnc"}, ValueError, "method must be one of"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_tensors(classifier, case):
    inputs, error, message = BAD_INPUTS[case]
    for call in (globenc.attribute, globenc.contribution_maps):
        with pytest.raises(error, match=message) as raised:
            call(classifier, **inputs)
        assert "\n" not in str(raised.value)


def test_model_without_weights():
    with torch.device("meta"):
        model = transformers.BertModel(tiny_model("bert").config)
    with pytest.raises(ValueError, match="meta device: load them first"):
        globenc.attribute(model, input_ids=IDS.to("meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("position", ["cls", "mean", "all"])
def test_activations_that_are_not_finite(value, position):
    model = tiny_model("bert", torch.float32)
    model.embeddings.word_embeddings.weight.data[6] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        globenc.attribute(model, position=position, input_ids=IDS)
    globenc.attribute(model, position=position, input_ids=torch.tensor([[5, 7]]))
