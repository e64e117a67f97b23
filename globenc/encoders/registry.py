"""The families that are known: those of the table, and those that a user registers."""

from __future__ import annotations

from .family import EncoderFamily, Layers
from .table import FAMILIES


def register_encoder(
    model_type: str,
    *,
    layers: Layers,
    attention: str,
    output_projection: str,
    attention_norm: str,
    output_norm: str | None,
    positions_after_padding: bool = False,
    examples: str = "",
) -> EncoderFamily:
    """Teach globenc an encoder family; replaces a family registered under the same name.

    The encoder must compute, in every layer, `h = LN1(x + W_O attention(x) + b_O)` and `LN2(h + feed_forward(h))`
    (post-LN), or `h = x + W_O attention(norm(x)) + b_O` and `h + feed_forward(norm(h))` (pre-LN, `output_norm=None`),
    and its attention must go through transformers' `AttentionInterface`. `globenc.completeness_gap(model, ...)` tells
    whether the names were right: it is below 1e-12 in float64 when they are.

    Args:
        model_type: the model's `config.model_type`.
        layers: dotted path from the base model to its layers, or a function base model -> layers.
        attention: dotted path inside a layer to the module that calls the attention interface.
        output_projection: ... to the `nn.Linear` after the heads.
        attention_norm: ... to the norm that reads the attention block's output plus the residual: LN1 of a post-LN
            layer, the norm before the feed-forward block of a pre-LN layer.
        output_norm: ... to the LayerNorm behind the feed-forward block; None for pre-LN layers.
        positions_after_padding: position ids start behind `pad_token_id`, as in RoBERTa.
        examples: a checkpoint name for `globenc models`.

    Returns:
        The family as registered.

    Raises:
        TypeError: a name is not a string (or, for `layers`, neither a string nor a function).

    Example:
        >>> import globenc
        >>> family = globenc.register_encoder(
        ...     "my-bert", layers="encoder.layer", attention="attention.self",
        ...     output_projection="attention.output.dense", attention_norm="attention.output.LayerNorm",
        ...     output_norm="output.LayerNorm")
        >>> family.model_type
        'my-bert'
    """
    names = {
        "model_type": model_type,
        "attention": attention,
        "output_projection": output_projection,
        "attention_norm": attention_norm,
    }
    if output_norm is not None:
        names["output_norm"] = output_norm
    for argument, value in names.items():
        if not isinstance(value, str) or not value:
            raise TypeError(f"{argument} must be a non-empty string, got {value!r}")
    if not isinstance(layers, str) and not callable(layers):
        raise TypeError(f"layers must be a dotted path or a function base model -> layers, got {layers!r}")
    family = EncoderFamily(
        model_type,
        layers,
        attention,
        output_projection,
        attention_norm,
        output_norm,
        positions_after_padding=positions_after_padding,
        examples=examples,
    )
    FAMILIES[model_type] = family
    return family


def describe(family: EncoderFamily) -> dict[str, str]:
    """A family's row in `globenc models` and in the README."""
    if family.reads_images:
        longest = "any size" if family.relative_positions else "image_size"
    elif family.relative_positions:
        longest = "any; cut at max_position_embeddings" if not family.score_bias else "any"
    else:
        longest = "max_position_embeddings" + (" - pad_token_id - 1" if family.positions_after_padding else "")
    kernels = "no" if family.custom_attention is not None or family.score_bias else "yes"
    return {
        "family": family.model_type,
        "examples": family.examples,
        "reads": "images" if family.reads_images else "texts",
        "layers": "pre-LN" if family.pre_norm else "post-LN",
        "kernels": kernels,
        "longest_text": longest,
        "notes": family.notes,
        "tested": family.tested,
    }


def supported_encoders() -> tuple[EncoderFamily, ...]:
    """All families globenc knows, built in and registered, in the order of the table."""
    return tuple(FAMILIES.values())
