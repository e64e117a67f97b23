"""The table of encoder families: where in each one the method's pieces stand.

A family is described by names alone: the list of layers, and inside a layer the module that calls
transformers' attention interface, the output projection, and the two LayerNorms. A new post-LN
encoder is a new row (`register_encoder`), never a new modelling file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig

Layers = str | Callable[[nn.Module], list[nn.Module]]


@dataclass(frozen=True)
class EncoderFamily:
    """Where one family of post-LN encoders keeps what equations (4)-(11) need.

    All names but `layers` are dotted attribute paths inside one layer.

    Attributes:
        model_type: `config.model_type` of the family.
        layers: dotted path from the base model to its list of layers, or a function
            base model -> layers in order of execution (a shared layer stands there once per use).
        attention: module that calls the attention interface; its first argument is the residual x.
        output_projection: `nn.Linear` W_O, b_O.
        attention_norm: first LayerNorm; its input is the attention block's output plus x.
        output_norm: second LayerNorm; its input is the feed-forward output plus its own residual.
        positions_after_padding: True where position ids start behind `pad_token_id` (RoBERTa), so
            that the longest text is `max_position_embeddings - pad_token_id - 1`.
        examples: a name or two a reader knows the family by.
    """

    model_type: str
    layers: Layers
    attention: str
    output_projection: str
    attention_norm: str
    output_norm: str
    positions_after_padding: bool = False
    examples: str = ""


@dataclass(frozen=True)
class LayerModules:
    """The modules of one layer, resolved from its family's names."""

    attention: nn.Module
    output_projection: nn.Linear
    attention_norm: nn.LayerNorm
    output_norm: nn.LayerNorm


def _albert_layers(base_model: Any) -> list[nn.Module]:
    """ALBERT runs `num_hidden_layers` steps over `num_hidden_groups` groups of shared layers."""
    config = base_model.config
    layers: list[nn.Module] = []
    for step in range(config.num_hidden_layers):
        group = int(step / (config.num_hidden_layers / config.num_hidden_groups))
        layers.extend(base_model.encoder.albert_layer_groups[group].albert_layers)
    return layers


_BERT_LAYER: dict[str, Any] = {
    "layers": "encoder.layer",
    "attention": "attention.self",
    "output_projection": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "output_norm": "output.LayerNorm",
}

_FAMILIES: dict[str, EncoderFamily] = {
    family.model_type: family
    for family in (
        EncoderFamily("bert", **_BERT_LAYER, examples="bert-base-uncased, all-MiniLM-L6-v2"),
        EncoderFamily("roberta", **_BERT_LAYER, positions_after_padding=True, examples="roberta-base"),
        EncoderFamily("xlm-roberta", **_BERT_LAYER, positions_after_padding=True, examples="xlm-roberta-base"),
        EncoderFamily("camembert", **_BERT_LAYER, positions_after_padding=True, examples="camembert-base"),
        EncoderFamily("electra", **_BERT_LAYER, examples="google/electra-base-discriminator"),
        EncoderFamily(
            "distilbert",
            layers="transformer.layer",
            attention="attention",
            output_projection="attention.out_lin",
            attention_norm="sa_layer_norm",
            output_norm="output_layer_norm",
            examples="distilbert-base-uncased",
        ),
        EncoderFamily(
            "albert",
            layers=_albert_layers,
            attention="attention",
            output_projection="attention.dense",
            attention_norm="attention.LayerNorm",
            output_norm="full_layer_layer_norm",
            examples="albert-base-v2",
        ),
    )
}


def register_encoder(
    model_type: str,
    *,
    layers: Layers,
    attention: str,
    output_projection: str,
    attention_norm: str,
    output_norm: str,
    positions_after_padding: bool = False,
    examples: str = "",
) -> EncoderFamily:
    """Teach globenc a post-LN encoder family; replaces a family registered under the same name.

    The encoder must compute, in every layer, `h = LN1(x + W_O attention(x) + b_O)` and
    `LN2(h + feed_forward(h))`, and its attention must go through transformers'
    `AttentionInterface`. `globenc.completeness_gap(model, ...)` tells whether the names were right:
    it is below 1e-12 in float64 when they are.

    Args:
        model_type: the model's `config.model_type`.
        layers: dotted path from the base model to its layers, or a function base model -> layers.
        attention: dotted path inside a layer to the module that calls the attention interface.
        output_projection: ... to the `nn.Linear` after the heads.
        attention_norm: ... to the LayerNorm behind the attention block.
        output_norm: ... to the LayerNorm behind the feed-forward block.
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
        "output_norm": output_norm,
    }
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
        positions_after_padding,
        examples,
    )
    _FAMILIES[model_type] = family
    return family


def supported_encoders() -> tuple[EncoderFamily, ...]:
    """All families globenc knows, built in and registered, in the order of the table."""
    return tuple(_FAMILIES.values())


def find_family(model: nn.Module) -> EncoderFamily:
    """The family of a transformers model.

    Raises:
        TypeError: the model is not a transformers model at all.
        ValueError: it is a decoder, an encoder-decoder, or of a family the table does not hold.
    """
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise TypeError(
            f"model must be a transformers encoder (a PreTrainedModel with a config), got {type(model).__name__}; "
            "of a SentenceTransformer pass its `[0].auto_model`"
        )
    return family_of_config(cast(PreTrainedConfig, model.config), type(model).__name__)


def family_of_config(config: PreTrainedConfig, name: str) -> EncoderFamily:
    """The family of a model `name` with this config; raises ValueError as `find_family` does."""
    model_type, known = config.model_type, ", ".join(_FAMILIES)
    if config.is_encoder_decoder:
        raise ValueError(
            f"model must be an encoder, got {name} of type {model_type!r}, an encoder-decoder: GlobEnc "
            f"decomposes bidirectional encoder layers; supported: {known}"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"model must be an encoder, got {name} configured as a decoder (is_decoder or "
            "add_cross_attention is set in its config): load it with is_decoder=False"
        )
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model must be a supported post-LN encoder, got {name} of type {model_type!r}; supported: {known}. "
            f"If {model_type!r} is a bidirectional post-LN encoder, register it in one call: "
            f"globenc.register_encoder({model_type!r}, layers=..., attention=..., output_projection=..., "
            "attention_norm=..., output_norm=...), see help(globenc.register_encoder)"
        )
    return _FAMILIES[model_type]


def _resolve(root: nn.Module, path: str, argument: str, family: EncoderFamily) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"encoder family {family.model_type!r}: {argument}={path!r} does not exist in "
            f"{type(root).__name__} ({error}); correct it with globenc.register_encoder"
        ) from None


def find_layers(base_model: nn.Module, family: EncoderFamily) -> list[LayerModules]:
    """The modules of every layer in order of execution; a shared layer stands there once per use.

    Raises:
        ValueError: a name of the family does not exist in this model, or is of an unusable kind.
    """
    if callable(family.layers):
        layers = list(family.layers(base_model))
    else:
        container = _resolve(base_model, family.layers, "layers", family)
        layers = list(container if isinstance(container, nn.ModuleList) else container.children())
    resolved = []
    for layer in layers:
        attention, projection, attention_norm, output_norm = (
            _resolve(layer, getattr(family, argument), argument, family)
            for argument in ("attention", "output_projection", "attention_norm", "output_norm")
        )
        if type(projection) is not nn.Linear:
            raise ValueError(
                f"output_projection of {family.model_type!r} must be a plain torch.nn.Linear, got "
                f"{type(projection).__name__}; merge adapters (peft: model.merge_and_unload()) or load the "
                "model without quantisation"
            )
        for argument, norm in (("attention_norm", attention_norm), ("output_norm", output_norm)):
            if not isinstance(norm, nn.LayerNorm):
                raise ValueError(
                    f"{argument} of {family.model_type!r} must be a torch.nn.LayerNorm, got {type(norm).__name__}"
                )
            if norm.normalized_shape != (projection.out_features,):
                raise ValueError(
                    f"{argument} of {family.model_type!r} must normalise what output_projection puts out: "
                    f"{projection.out_features} numbers, got {list(norm.normalized_shape)}"
                )
        if attention_norm is output_norm:
            raise ValueError(f"attention_norm and output_norm of {family.model_type!r} must be two modules, got one")
        resolved.append(LayerModules(attention, projection, attention_norm, output_norm))  # type: ignore[arg-type]
    if not resolved:
        raise ValueError(f"model must have at least one encoder layer, got {type(base_model).__name__} with none")
    return resolved


def max_length(model: nn.Module) -> int | None:
    """Most tokens one text may have in this model, special tokens included; None where nothing limits it."""
    family, config = find_family(model), model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    padding = getattr(config, "pad_token_id", None)
    return int(positions) - (padding + 1 if family.positions_after_padding and padding is not None else 0)
