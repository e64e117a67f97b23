"""Batches: which texts or images go together, padding, how many tokens fit into memory, scores without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .class_score_batches import BatchClassScores
from .encoders import Encoder, accepted_inputs
from .images import open_image
from .inputs import patch_tokens
from .predictions import Prediction
from .rollouts import Position, check_position
from .tokenization import Encoding


def by_length(lengths: Sequence[int], budget: int, padded: bool = True) -> list[list[int]]:
    """Indices of texts, batched by length so that batch size times longest text stays within the budget.

    `padded`: texts of a batch may differ in length.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= budget and (padded or longest == lengths[i]):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad(encodings: Sequence[Encoding], tokenizer: Any, model: Any) -> dict[str, Any]:
    """Model inputs of a batch, padded on the right, on the model's device."""
    device = next(model.parameters()).device
    lengths = np.array([len(e) for e in encodings])
    real = np.arange(lengths.max()) < lengths[:, None]
    columns = {"input_ids": ([e.ids for e in encodings], tokenizer.pad_token_id or 0)}
    accepted = accepted_inputs(model)
    types = [e.type_ids for e in encodings if e.type_ids is not None]
    if types and "token_type_ids" in tokenizer.model_input_names and (not accepted or "token_type_ids" in accepted):
        columns["token_type_ids"] = (types, 0)
    inputs = {}
    for name, (rows, filler) in columns.items():
        padded = np.full(real.shape, filler, dtype=np.int64)
        padded[real] = np.concatenate(rows)
        inputs[name] = torch.from_numpy(padded).to(device)
    inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64)).to(device)
    return inputs


def image_batches(
    encoder: Encoder, processor: Any, images: Sequence[Any], position: Position, budget: int, single: bool
) -> Iterator[list[torch.Tensor]]:
    """Images as pixel_values [1, channels, height, width], neighbours of one size together, up to `budget` tokens.

    Raises:
        OSError, TypeError, ValueError: an image cannot be read or does not have the position; with its index unless
            it is a `single` one.
    """
    batch: list[torch.Tensor] = []
    for k, image in enumerate(images):
        where = "the image" if single else f"images[{k}]"
        pixels = processor(open_image(image, where), return_tensors="pt")["pixel_values"]
        n = len(patch_tokens(encoder, pixels))
        try:
            check_position(position, n, many=len(images) > 1)
        except ValueError as error:
            raise ValueError(str(error) if single else f"{where}: {error}") from None
        if batch and (pixels.shape != batch[0].shape or (len(batch) + 1) * n > budget):
            yield batch
            batch = []
        batch.append(pixels)
    yield batch


def memory_budget(model: Any, explained: bool = False) -> int:
    """Tokens of a batch, padding included, for the memory that is free now: 256 to 4,096 on a CPU, whose caches
    gain nothing by more, 1,024 to 65,536 on a GPU. Where class scores are asked for (`explained`), a token takes more:
    what its activations read is held."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else free_memory()
    config = model.config
    depth, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    size = max(model.dtype.itemsize, 2) + 2  # half precision is accompanied by float32
    token = (
        (2 if explained else 1)
        * size
        * (8 * width * depth + 4 * getattr(config, "intermediate_size", 4 * width) + heads * heads)
    )
    low, high = (1024, 65536) if cuda else (256, 4096)
    fitting = high if free is None else max(low, min(high, free // 2 // token))
    return 1 << fitting.bit_length() - 1


def free_memory() -> int | None:
    """Bytes of main memory that are free or can be freed; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


@dataclass(frozen=True)
class BatchScores:
    """What `globenc.attribute` gives for a batch, as arrays on the CPU, with the model's predictions and class scores.

    Attributes:
        scores, log2_scale, layer_scores, layer_log2_scale: as in `globenc.AttributionOutput`.
        predictions: one for each text.
        explained: class scores; None where no label is explained.
    """

    scores: np.ndarray
    log2_scale: np.ndarray
    layer_scores: np.ndarray | None
    layer_log2_scale: np.ndarray | None
    predictions: list[Prediction]
    explained: BatchClassScores | None = None

    def of(self, row: int, n: int, whole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """The four arrays of one text of n tokens, without padding; `whole`: its positions are all of its tokens."""
        scores, scale = self.scores[row, ..., :n], self.log2_scale[row]
        layer_scores = None if self.layer_scores is None else self.layer_scores[:, row, ..., :n]
        layer_scale = None if self.layer_log2_scale is None else self.layer_log2_scale[:, row]
        if whole:
            scores, scale = scores[:n], scale[:n]
            layer_scores = None if layer_scores is None else layer_scores[:, :n]
            layer_scale = None if layer_scale is None else layer_scale[:, :n]
        return scores, scale, layer_scores, layer_scale
