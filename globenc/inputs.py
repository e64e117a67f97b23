"""What a model's inputs must be, checked before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .encoders import Encoder, accepted_inputs
from .errors import warn_caller
from .predictions import head_of

# arguments of `attribute` and its like, which stand beside the model's inputs
_OPTIONS = (
    *("method", "position", "per_layer", "row_normalize", "backend"),
    *("label", "answer", "reference", "maps", "mask_token_id"),
)


def check_inputs(encoder: Encoder, inputs: dict[str, Any]) -> Tensor:
    """Which tokens of a model's inputs are real, not padding: bool [batch, n].

    Raises:
        TypeError, ValueError: an input this model cannot take, named, with what to do.
    """
    model = encoder.model
    if head_of(model) == "MultipleChoice":
        raise ValueError(
            f"{type(model).__name__} reads several texts as one example: pass its encoder, model.base_model, and the "
            "choices as a batch of texts [batch, n]"
        )
    if inputs.get("output_attentions"):
        raise ValueError(
            "output_attentions must not be set: attention weights of a layer are contribution_maps(..., method='W')"
        )
    accepted = accepted_inputs(model)
    unknown = [name for name in inputs if accepted and name not in (*accepted, "output_hidden_states", "return_dict")]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*_OPTIONS, *accepted], n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{type(model).__name__} takes no input {unknown[0]!r}{hint}; it takes {', '.join(accepted)}")
    if encoder.family.reads_images:
        return _check_pixels(encoder, inputs)
    given = _check_text(encoder, inputs)
    batch, n = given.shape[:2]
    # a model of none (DeBERTa-v3) takes the zeros that its tokenizer gives, and does not look at them
    config: Any = model.config
    _check_ids("token_type_ids", inputs, (batch, n), getattr(config, "type_vocab_size", None) or None)
    positions = None if encoder.takes_any_length else getattr(config, "max_position_embeddings", None)
    _check_ids("position_ids", inputs, (batch, n), positions)
    if inputs.get("attention_mask") is None:
        return torch.ones(batch, n, dtype=torch.bool, device=given.device)
    mask = _check_mask(inputs["attention_mask"], batch, n)
    if not bool(mask[:, 0].all()) and _shifts_positions(encoder, inputs, mask):
        warn_caller(
            "the batch is padded on the left and no position_ids are given: the model reads its texts at shifted "
            "positions; pass position_ids = attention_mask.cumsum(-1).sub(1).clamp(min=0), or pad on the right"
        )
    return mask


def _check_text(encoder: Encoder, inputs: dict[str, Any]) -> Tensor:
    """The texts as they are given: input_ids [batch, n] or inputs_embeds [batch, n, d]."""
    tokens, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (tokens is None) == (embeds is None):
        raise ValueError("give input_ids [batch, n] or inputs_embeds [batch, n, d], one of the two")
    name, given, ndim = ("input_ids", tokens, 2) if tokens is not None else ("inputs_embeds", embeds, 3)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if given.ndim != ndim or 0 in given.shape:
        shape = "[batch, n]" if ndim == 2 else "[batch, n, d]"
        raise ValueError(f"{name} must have shape {shape} with no empty dimension, got {list(given.shape)}")
    model = encoder.model
    _check_devices(model, inputs)
    n, longest = given.shape[1], encoder.max_length
    if longest is not None and n > longest and not encoder.takes_any_length:
        raise ValueError(
            f"{name} has {n} tokens, and {type(model).__name__} takes at most {longest}: truncate the text"
        )
    embeddings: Any = model.get_input_embeddings()
    rows, width = embeddings.weight.shape
    if name == "inputs_embeds":
        if given.dtype != model.dtype or given.shape[2] != width:
            raise ValueError(
                f"inputs_embeds must be {model.dtype} with {width} numbers a token for this model, got {given.dtype} "
                f"with {given.shape[2]}"
            )
        return given
    if given.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {given.dtype}")
    low, high = (int(v) for v in torch.aminmax(given))
    if low < 0 or high >= rows:
        raise ValueError(
            f"input_ids must be in 0..{rows - 1}, got {low if low < 0 else high}: is the tokenizer this model's?"
        )
    return given


def _check_mask(mask: object, batch: int, n: int) -> Tensor:
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, n):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be a tensor of shape [batch, n] = {[batch, n]}, got {got}")
    real = mask.bool()
    if not bool((mask == real).all()):
        raise ValueError("attention_mask must hold 1 at real tokens and 0 at padding, got other values")
    empty = (~real.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"attention_mask is all zero for text {empty[0]} of the batch: it has no token to attribute to"
        )
    return real


def _shifts_positions(encoder: Encoder, inputs: dict[str, Any], mask: Tensor) -> bool:
    """Whether padding on the left moves the positions at which the model reads a text."""
    accepted, tokens = accepted_inputs(encoder.model), inputs.get("input_ids")
    if inputs.get("position_ids") is not None or (accepted and "position_ids" not in accepted):
        return False
    if not encoder.family.positions_after_padding or tokens is None:
        return True
    # such a model counts past padding that it knows by its id
    return bool((tokens[~mask] != getattr(encoder.model.config, "pad_token_id", None)).any())


def _check_devices(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Raises ValueError where an input is not where the model is."""
    device = next(model.parameters()).device
    for key, tensor in inputs.items():
        if isinstance(tensor, Tensor) and tensor.device != device and not hasattr(model, "hf_device_map"):
            raise ValueError(
                f"{key} is on {tensor.device} and the model on {device}: move it with .to({str(device)!r})"
            )
    if device.type == "meta":
        raise ValueError("the model's weights are on the meta device: load them first")


def _check_pixels(encoder: Encoder, inputs: dict[str, Any]) -> Tensor:
    """The tokens [B, n] of a vision model's images; raises as `check_inputs`."""
    model, family = encoder.model, encoder.family
    pixels, config = inputs.get("pixel_values"), model.config
    if not isinstance(pixels, Tensor):
        got = "nothing" if pixels is None else type(pixels).__name__
        raise ValueError(f"give pixel_values, a tensor [batch, channels, height, width]; got {got}")
    if pixels.ndim != 4 or 0 in pixels.shape or pixels.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values must have shape [batch, {config.num_channels}, height, width] with no empty dimension, got "
            f"{list(pixels.shape)}"
        )
    if pixels.dtype != model.dtype:
        raise ValueError(f"pixel_values must be {model.dtype} for this model, got {pixels.dtype}")
    _check_devices(model, inputs)
    height, width = pixels.shape[2:]
    expected = _pair(config.image_size)
    if (height, width) != expected and not inputs.get("interpolate_pos_encoding") and not family.relative_positions:
        raise ValueError(
            f"pixel_values must be {expected[0]} x {expected[1]} for this model, got {height} x {width}: use its image "
            "processor, or pass interpolate_pos_encoding=True"
        )
    n = len(patch_tokens(encoder, pixels))
    return torch.ones(len(pixels), n, dtype=torch.bool, device=pixels.device)


def patch_size(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of a vision model's patches in pixels."""
    return _pair(model.config.patch_size)


def patch_grid(model: PreTrainedModel, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that a vision model makes of pixel_values [batch, channels, height, width]."""
    height, width = patch_size(model)
    return pixels.shape[2] // height, pixels.shape[3] // width


def patch_tokens(encoder: Encoder, pixels: Tensor) -> list[str]:
    """Names of the tokens that a vision model makes of pixel_values [batch, channels, height, width]: special ones,
    then the patches as "row,column"."""
    rows, columns = patch_grid(encoder.model, pixels)
    special_tokens = encoder.family.special_tokens
    special = [] if special_tokens is None else special_tokens(encoder.model.config)
    return [*special, *(f"{row},{column}" for row in range(rows) for column in range(columns))]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check_ids(name: str, inputs: dict[str, Any], shape: tuple[int, int], rows: int | None) -> None:
    """Raises where optional ids are no integers of the shape [batch, n] below `rows`."""
    ids = inputs.get(name)
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    if ids.ndim != 2 or ids.shape[0] not in (1, shape[0]) or ids.shape[1] != shape[1]:
        raise ValueError(f"{name} must have shape [batch, n] = {list(shape)}, got {list(ids.shape)}")
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or (rows is not None and high >= rows):
        limit = f"in 0..{rows - 1}" if rows is not None else "at least 0"
        raise ValueError(f"{name} must be {limit} for this model, got {low if low < 0 else high}")
