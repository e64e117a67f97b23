"""A batch through the model, and a text's or an image's part of it as a result that shows itself."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from .attribution import Attribution
from .batching import BatchScores
from .class_score_batches import KnownLabel, Label, batch_class_scores
from .encoders import Encoder
from .functional import attribute
from .images import ImageAttribution, denormalized_images
from .inputs import patch_grid, patch_size, patch_tokens
from .predictions import predictions_of
from .rollouts import Position
from .tokenization import Encoding


class CallOptions(TypedDict, total=False):
    """What a call of `GlobEnc` takes by name, for its overloads; documented there."""

    method: str
    position: Position
    per_layer: bool
    row_normalize: bool
    label: Label
    reference: str
    max_length: int | None
    batch_tokens: int | None


def scored_batch(
    model: Any,
    tokenizer: Any,
    backend: str,
    count: int,
    inputs: dict[str, Any],
    *,
    label: KnownLabel = None,
    reference: str = "zero",
    required: bool = True,
    **options: Any,
) -> BatchScores:
    """A batch of `count` texts or images through the model.

    Args:
        model, tokenizer: what scores it.
        backend, **options: as in `globenc.attribute`, which has all of its options here.
        label, reference, required: as in `batch_class_scores`.
    """
    out = attribute(model, backend=backend, **options, **inputs)
    predictions = predictions_of(model, out.model_output, count)
    return BatchScores(
        scores=out.scores.cpu().numpy(),
        log2_scale=out.log2_scale.cpu().numpy(),
        layer_scores=None if out.layer_scores is None else out.layer_scores.cpu().numpy(),
        layer_log2_scale=None if out.layer_log2_scale is None else out.layer_log2_scale.cpu().numpy(),
        predictions=predictions,
        explained=batch_class_scores(
            model,
            tokenizer,
            inputs,
            out.model_output,
            predictions,
            label=label,
            reference=reference,
            required=required,
            position=options["position"],
            backend=backend,
        ),
    )


def text_result(
    model: Any,
    tokenizer: Any,
    encoding: Encoding,
    texts: tuple[str, str | None],
    scored: BatchScores,
    row: int,
    options: dict[str, Any],
) -> Attribution:
    """The result of one text, or pair of texts.

    Args:
        model, tokenizer: what scored it.
        encoding: its tokens.
        texts: as they were given.
        scored: its batch.
        row: its index in the batch.
        options: as the batch was scored with, see `scored_batch`.
    """
    special = (encoding.segments < 0).tolist()
    offsets = None if encoding.offsets is None else encoding.offsets.tolist()
    return Attribution(
        text=texts[0],
        text_pair=texts[1],
        tokens=tokenizer.convert_ids_to_tokens(encoding.ids.tolist()),
        offsets=[None if hidden or offsets is None else tuple(offsets[k]) for k, hidden in enumerate(special)],
        segments=[None if segment < 0 else segment for segment in encoding.segments.tolist()],
        word_ids=[None if word < 0 else word for word in encoding.word_ids.tolist()],
        truncated=encoding.lost,
        **_shared_fields(model, scored, row, len(encoding), options),
    )


def image_result(
    encoder: Encoder, processor: Any, pixels: Tensor, scored: BatchScores, row: int, options: dict[str, Any]
) -> ImageAttribution:
    """The result of one image, given as pixel_values [1, channels, height, width]; the rest as in `text_result`."""
    tokens = patch_tokens(encoder, pixels)
    return ImageAttribution(
        image=denormalized_images(pixels, processor)[0],
        tokens=tokens,
        grid=patch_grid(encoder.model, pixels),
        patch=patch_size(encoder.model),
        **_shared_fields(encoder.model, scored, row, len(tokens), options),
    )


def _shared_fields(model: Any, scored: BatchScores, row: int, n: int, options: dict[str, Any]) -> dict[str, Any]:
    """The fields that results of texts and of images share; n: tokens without padding."""
    whole = isinstance(options["position"], str) and options["position"] == "all"
    scores, scale, layer_scores, layer_scale = scored.of(row, n, whole)
    prediction = scored.predictions[row]
    return {
        "scores": scores,
        "log2_scale": scale if scale.ndim else float(scale),
        "layer_scores": layer_scores,
        "layer_log2_scale": layer_scale,
        "label": prediction.label,
        "probability": prediction.probability,
        "value": prediction.value,
        "labels": prediction.labels,
        **({} if scored.explained is None else scored.explained.of(row, n)),
        "method": options["method"],
        "position": options["position"],
        "row_normalize": options["row_normalize"],
        "model": model.config._name_or_path or type(model).__name__,
    }
