"""The table of encoder families: where in each one the method's pieces stand.

A family is described by names alone: the list of layers, and inside a layer the module that computes the attention,
the output projection, and the norms. A new encoder is a new row (`register_encoder`), never a new modelling file.

Two kinds of layers are known. Post-LN (BERT): `h = LN1(x + attention(x))`, then `LN2(h + feed_forward(h))`. Pre-LN
(ModernBERT, ViT): `h = x + attention(norm(x))`, then `h + feed_forward(norm(h))`; no norm follows the sum, so a
contribution is what a token adds to the residual stream, and N-Enc is N-Res.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

Layers = str | Callable[[nn.Module], list[nn.Module]]


@dataclass(frozen=True)
class OwnAttention:
    """How to see what a family computes that does not use transformers' attention interface.

    Attributes:
        value: dotted path inside a layer to the module that puts out the value vectors, [B, n, H * d_h].
        weights: dotted path to the module that is given the attention weights, [B, H, n, n]; None where the attention
            module returns them beside its context.
        mend: (attention module, those weights) -> the weights that it really used.
        split: (attention module, output of `value`) -> value vectors [B, H, n, d_h] where they are not simply heads
            side by side.
        inputs: instead of all this, (attention module, hidden states [B, n, d], keyword arguments it is called with) ->
            what its weights are made of, as `capture.LayerTrace` names it.
    """

    value: str | None = None
    weights: str | None = None
    mend: Callable[[Any, Tensor], Tensor] | None = None
    split: Callable[[Any, Tensor], Tensor] | None = None
    inputs: Callable[[Any, Tensor, dict[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Patches:
    """How a vision family makes tokens of a picture.

    Attributes:
        special: config -> names of the tokens in front of the patches.
    """

    special: Callable[[Any], list[str]]


@dataclass(frozen=True)
class EncoderFamily:
    """Where one family of encoders keeps what equations (4)-(11) need.

    All names but `layers` are dotted attribute paths inside one layer.

    Attributes:
        model_type: `config.model_type` of the family.
        layers: dotted path from the base model to its list of layers, or a function
            base model -> layers in order of execution (a shared layer stands there once per use).
        attention: module that calls the attention interface; in a post-LN layer its first argument is the residual x
            (in a pre-LN layer that is the layer's own).
        output_projection: `nn.Linear` W_O, b_O.
        attention_norm: the norm whose input is the attention block's output plus x: LayerNorm 1 of a post-LN layer, the
            one before the feed-forward block of a pre-LN layer.
        output_norm: LayerNorm 2; its input is the feed-forward output plus its own residual. None: pre-LN layers.
        output_scale: parameter that the attention block's output is multiplied with (DINOv2's layer scale).
        own_attention: for families that compute attention in code of their own.
        positions_after_padding: True where position ids start behind `pad_token_id` (RoBERTa), so
            that the longest text is `max_position_embeddings - pad_token_id - 1`.
        relative_positions: no table of positions limits the length of a text or the size of a picture.
        score_bias: positions add to the attention scores (T5), which the kernels do not know.
        pads: a text's numbers do not depend on the padding behind it.
        has_cls: the first token stands for the whole text or picture.
        patches: for vision encoders.
        prepare: (base model, n) -> what makes it what its forward pass over n tokens will make of it, and what undoes
            that, also half-way and twice; None where it stays as it is.
        refuse: config -> why a model of the family cannot be taken, without capital and full stop; or None.
        examples: a name or two a reader knows the family by.
        notes: what is particular about the family, for `globenc models`.
        tested: on what beyond tiny random configurations, which all are tested on.
    """

    model_type: str
    layers: Layers
    attention: str
    output_projection: str
    attention_norm: str
    output_norm: str | None
    output_scale: str | None = None
    own_attention: OwnAttention | None = None
    positions_after_padding: bool = False
    relative_positions: bool = False
    score_bias: bool = False
    pads: bool = True
    has_cls: bool = True
    patches: Patches | None = None
    prepare: Callable[[Any, int], tuple[Callable[[], None], Callable[[], None]] | None] | None = None
    refuse: Callable[[Any], str | None] | None = None
    examples: str = ""
    notes: str = ""
    tested: str = ""

    @property
    def pre_norm(self) -> bool:
        """Whether the norms stand in front of the blocks."""
        return self.output_norm is None


@dataclass(frozen=True)
class LayerModules:
    """The modules of one layer, resolved from its family's names.

    Attributes:
        attention, output_projection, attention_norm, output_norm, output_scale: as in `EncoderFamily`.
        block: the module whose first argument is the residual; the attention module itself if None.
        own: of the family, with the modules its paths lead to, `value` and `weights`.
    """

    attention: nn.Module
    output_projection: nn.Linear
    attention_norm: nn.Module
    output_norm: nn.Module | None
    block: nn.Module | None = None
    output_scale: nn.Parameter | None = None
    own: OwnAttention | None = None
    value: nn.Module | None = None
    weights: nn.Module | None = None

    @property
    def norms(self) -> tuple[Any, ...]:
        """The LayerNorms that a contribution goes through; none in a pre-LN layer."""
        return () if self.output_norm is None else (self.attention_norm, self.output_norm)

    @property
    def output_weight(self) -> Tensor:
        """W_O, [d, H * d_h], what scales the attention block's output included."""
        weight = self.output_projection.weight.detach()
        return weight if self.output_scale is None else weight * self.output_scale.detach()[:, None]

    @property
    def output_bias(self) -> Tensor | None:
        """b_O, [d], scaled likewise."""
        bias = self.output_projection.bias
        if bias is None:
            return None
        return bias.detach() if self.output_scale is None else bias.detach() * self.output_scale.detach()


def norm_eps(norm: Any) -> float:
    """What a LayerNorm adds to the variance."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def norm_width(norm: Any) -> tuple[int, ...]:
    """The shape a LayerNorm normalises."""
    return tuple(norm.normalized_shape) if hasattr(norm, "normalized_shape") else tuple(norm.weight.shape)


def _is_layer_norm(norm: Any) -> bool:
    # DeBERTa brings a LayerNorm of its own, with the same formula
    return isinstance(norm, nn.LayerNorm) or (hasattr(norm, "variance_epsilon") and hasattr(norm, "bias"))


def _albert_layers(base_model: Any) -> list[nn.Module]:
    """ALBERT runs `num_hidden_layers` steps over `num_hidden_groups` groups of shared layers."""
    config = base_model.config
    layers: list[nn.Module] = []
    for step in range(config.num_hidden_layers):
        group = int(step / (config.num_hidden_layers / config.num_hidden_groups))
        layers.extend(base_model.encoder.albert_layer_groups[group].albert_layers)
    return layers


def _deberta_values(attention: Any, projected: Tensor) -> Tensor:
    """DeBERTa projects a head's query, key and value side by side, and adds the value's bias afterwards."""
    batch, n, _ = projected.shape
    heads = attention.num_attention_heads
    value = projected.view(batch, n, heads, -1).chunk(3, dim=-1)[2] + attention.v_bias.view(heads, -1)
    return value.transpose(1, 2)


def _longformer_inputs(attention: Any, hidden_states: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Queries, keys and values of Longformer: local attention in which everyone sees the global tokens too, and the
    rows of those with projections of their own."""
    batch, n, _ = hidden_states.shape

    def heads(projection: nn.Module) -> Tensor:
        return projection(hidden_states).view(batch, n, attention.num_heads, -1).transpose(1, 2)

    inputs = {
        "query": heads(attention.query),
        "key": heads(attention.key),
        "value": heads(attention.value),
        "scaling": attention.head_dim**-0.5,
        "window": attention.one_sided_attn_window_size,
    }
    if options.get("is_global_attn"):
        inputs["global_keys"] = options["is_index_global_attn"]
        inputs["global_rows"] = {
            "query": heads(attention.query_global),
            "key": heads(attention.key_global),
            "value": heads(attention.value_global),
        }
    return inputs


def _bigbird_weights(attention: Any, weights: Tensor) -> Tensor:
    """In evaluation all random blocks of BigBird are the first block once more, with the same weights, which the
    weights it returns hold only once."""
    size = getattr(attention, "block_size", None)
    if size is None:  # full attention
        return weights
    weights = weights.clone()
    weights[:, :, size:-size, :size] *= 1 + attention.num_random_blocks
    return weights


def _bigbird_kind(base_model: Any, n: int) -> tuple[Callable[[], None], Callable[[], None]] | None:
    """BigBird turns to full attention, for good, where a text is too short for blocks; here only for a while."""
    config, layers = base_model.config, list(base_model.encoder.layer)
    if base_model.attention_type != "block_sparse" or n > (5 + 2 * config.num_random_blocks) * config.block_size:
        return None
    own = [(layer.attention, layer.attention.self) for layer in layers]
    typed = [base_model, base_model.encoder, *layers, *(attention for attention, _ in own)]

    def undo() -> None:
        for attention, module in own:
            attention.self = module
        for module in typed:
            module.attention_type = "block_sparse"

    return lambda: base_model.set_attention_type("original_full"), undo


def _deberta_refuse(config: Any) -> str | None:
    if getattr(config, "talking_head", False):
        return "talking heads mix the attention weights once more, which the method does not know"
    if getattr(config, "conv_kernel_size", 0):
        return (
            "a convolution between its layers mixes neighbouring tokens outside the attention (deberta-v2-xlarge and "
            "-xxlarge), which the method does not know; deberta-v3 has none"
        )
    return None


_BERT_LAYER: dict[str, Any] = {
    "layers": "encoder.layer",
    "attention": "attention.self",
    "output_projection": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "output_norm": "output.LayerNorm",
}
_ROTARY_BERT_LAYER: dict[str, Any] = {
    "layers": "layers",
    "attention": "self_attn",
    "output_projection": "self_attn.o_proj",
    "attention_norm": "post_attention_layernorm",
    "output_norm": "post_mlp_layernorm",
    "relative_positions": True,
}
_VIT_LAYER: dict[str, Any] = {
    "layers": "layers",
    "attention": "attention",
    "output_projection": "attention.o_proj",
    "attention_norm": "layernorm_after",
    "output_norm": None,
}
_DINOV2_LAYER: dict[str, Any] = {
    "layers": "encoder.layer",
    "attention": "attention",
    "output_projection": "attention.o_proj|attention.output.dense",
    "attention_norm": "norm2",
    "output_norm": None,
    "output_scale": "layer_scale1.lambda1",
    "relative_positions": True,  # its table of positions is interpolated
}
_CLIP_LAYER: dict[str, Any] = {
    "layers": "encoder.layers",
    "attention": "self_attn",
    "output_projection": "self_attn.out_proj",
    "attention_norm": "layer_norm2",
    "output_norm": None,
}
_T5_LAYER: dict[str, Any] = {
    "layers": "encoder.block",
    "attention": "layer.0.SelfAttention",
    "output_projection": "layer.0.SelfAttention.o",
    "attention_norm": "layer.1.layer_norm",
    "output_norm": None,
    "relative_positions": True,
    "score_bias": True,
    "has_cls": False,
}
_CLS = Patches(lambda config: ["[CLS]"])

_FAMILIES: dict[str, EncoderFamily] = {
    family.model_type: family
    for family in (
        EncoderFamily(
            "bert",
            **_BERT_LAYER,
            examples="bert-base-uncased, all-MiniLM-L6-v2",
            tested="a real checkpoint, the published code",
        ),
        EncoderFamily("roberta", **_BERT_LAYER, positions_after_padding=True, examples="roberta-base"),
        EncoderFamily("xlm-roberta", **_BERT_LAYER, positions_after_padding=True, examples="xlm-roberta-base"),
        EncoderFamily("camembert", **_BERT_LAYER, positions_after_padding=True, examples="camembert-base"),
        EncoderFamily(
            "electra", **_BERT_LAYER, examples="google/electra-base-discriminator", tested="the published code"
        ),
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
            notes="shared layers",
        ),
        EncoderFamily(
            "deberta-v2",
            **_BERT_LAYER,
            own_attention=OwnAttention("attention.self.value_proj", "attention.self.dropout"),
            refuse=_deberta_refuse,
            examples="microsoft/deberta-v3-base",
            notes="disentangled attention",
        ),
        EncoderFamily(
            "deberta",
            **_BERT_LAYER,
            own_attention=OwnAttention("attention.self.in_proj", "attention.self.dropout", split=_deberta_values),
            refuse=_deberta_refuse,
            examples="microsoft/deberta-base",
            notes="disentangled attention",
        ),
        EncoderFamily(
            "mpnet",
            layers="encoder.layer",
            attention="attention.attn",
            output_projection="attention.attn.o",
            attention_norm="attention.LayerNorm",
            output_norm="output.LayerNorm",
            own_attention=OwnAttention("attention.attn.v", "attention.attn.dropout"),
            positions_after_padding=True,
            examples="all-mpnet-base-v2",
            notes="relative positions in the scores",
        ),
        EncoderFamily(
            "longformer",
            **_BERT_LAYER,
            own_attention=OwnAttention(inputs=_longformer_inputs),
            positions_after_padding=True,
            examples="allenai/longformer-base-4096",
            notes="O(n window)",
        ),
        EncoderFamily(
            "big_bird",
            **_BERT_LAYER,
            own_attention=OwnAttention("attention.self.value", mend=_bigbird_weights),
            prepare=_bigbird_kind,
            pads=False,
            examples="google/bigbird-roberta-base",
            notes="sparse attention; depends on padding",
        ),
        EncoderFamily(
            "nomic_bert",
            **_ROTARY_BERT_LAYER,
            examples="nomic-ai/nomic-embed-text-v1.5",
            notes="rotary",
            tested="16,000 tokens",
        ),
        EncoderFamily(
            "jina_embeddings_v3", **_ROTARY_BERT_LAYER, examples="jinaai/jina-embeddings-v3-hf", notes="rotary"
        ),
        EncoderFamily(
            "modernbert",
            layers="layers",
            attention="attn",
            output_projection="attn.Wo",
            attention_norm="mlp_norm",
            output_norm=None,
            relative_positions=True,
            examples="answerdotai/ModernBERT-base",
            notes="rotary; local layers cost O(n window)",
            tested="25,000 tokens",
        ),
        EncoderFamily(
            "eurobert",
            layers="layers",
            attention="self_attn",
            output_projection="self_attn.o_proj",
            attention_norm="post_attention_layernorm",
            output_norm=None,
            relative_positions=True,
            examples="EuroBERT/EuroBERT-210m",
            notes="rotary, RMSNorm, grouped queries",
        ),
        EncoderFamily(
            "xlm-roberta-xl",
            **{**_BERT_LAYER, "attention_norm": "LayerNorm", "output_norm": None},
            positions_after_padding=True,
            examples="facebook/xlm-roberta-xl",
        ),
        EncoderFamily(
            "roberta-prelayernorm",
            **{**_BERT_LAYER, "attention_norm": "intermediate.LayerNorm", "output_norm": None},
            positions_after_padding=True,
            examples="andreasmadsen/efficient_mlm_m0.40",
        ),
        EncoderFamily("t5", **_T5_LAYER, examples="google/t5-v1_1-base (T5EncoderModel)", notes="RMSNorm, no [CLS]"),
        EncoderFamily("umt5", **_T5_LAYER, examples="google/umt5-base (UMT5EncoderModel)", notes="RMSNorm, no [CLS]"),
        EncoderFamily(
            "esm",
            **{**_BERT_LAYER, "attention_norm": "LayerNorm", "output_norm": None},
            positions_after_padding=True,
            examples="facebook/esm2_t12_35M_UR50D",
            notes="protein residues",
        ),
        EncoderFamily("vit", **_VIT_LAYER, patches=_CLS, examples="google/vit-base-patch16-224"),
        EncoderFamily(
            "deit",
            **_VIT_LAYER,
            patches=Patches(lambda config: ["[CLS]", "[DIST]"]),
            examples="facebook/deit-base-distilled-patch16-224",
        ),
        EncoderFamily("dinov2", **_DINOV2_LAYER, patches=_CLS, examples="facebook/dinov2-base", notes="layer scale"),
        EncoderFamily(
            "dinov2_with_registers",
            **_DINOV2_LAYER,
            patches=Patches(lambda config: ["[CLS]", *(f"[REG{k}]" for k in range(config.num_register_tokens))]),
            examples="facebook/dinov2-with-registers-base",
            notes="layer scale",
        ),
        EncoderFamily("clip_vision_model", **_CLIP_LAYER, patches=_CLS, examples="openai/clip-vit-base-patch32"),
        EncoderFamily(
            "siglip_vision_model",
            **_CLIP_LAYER,
            patches=Patches(lambda config: []),
            has_cls=False,
            examples="google/siglip-base-patch16-224",
            notes="no [CLS]",
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
    _FAMILIES[model_type] = family
    return family


def describe(family: EncoderFamily) -> dict[str, str]:
    """What `globenc models` and the README say of a family."""
    if family.patches is not None:
        longest = "any size" if family.relative_positions else "image_size"
    elif family.relative_positions:
        longest = "any; cut at max_position_embeddings" if not family.score_bias else "any"
    else:
        longest = "max_position_embeddings" + (" - pad_token_id - 1" if family.positions_after_padding else "")
    kernels = "no" if family.own_attention is not None or family.score_bias else "yes"
    return {
        "family": family.model_type,
        "examples": family.examples,
        "reads": "texts" if family.patches is None else "pictures",
        "layers": "pre-LN" if family.pre_norm else "post-LN",
        "kernels": kernels,
        "longest_text": longest,
        "notes": family.notes,
        "tested": family.tested,
    }


def supported_encoders() -> tuple[EncoderFamily, ...]:
    """All families globenc knows, built in and registered, in the order of the table."""
    return tuple(_FAMILIES.values())


def find_family(model: nn.Module) -> EncoderFamily:
    """The family of a transformers model.

    Raises:
        TypeError: the model is not a transformers model at all.
        ValueError: it is a decoder, an encoder-decoder, or of a family the table does not hold.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model.config, PreTrainedConfig):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a transformers encoder (a PreTrainedModel), got {got}{_instead_of(model)}")
    # a config may say otherwise: UMT5's encoder alone keeps that of the whole, and T5's is told by hand
    decoders = [part.decoder for part in (model, getattr(model, "base_model", model)) if hasattr(part, "decoder")]
    decodes = any(isinstance(decoder, PreTrainedModel) for decoder in decoders) or (None if decoders else False)
    return family_of_config(model.config, type(model).__name__, decodes)


def _instead_of(model: Any) -> str:
    """What to pass instead of something that is no transformers model."""
    kinds = {each.__module__.split(".")[0] for each in type(model).__mro__}
    if isinstance(model, type):
        return f": pass a model that is loaded, {model.__name__}.from_pretrained(...)"
    if isinstance(model, str | os.PathLike):
        return f"; GlobEnc.from_pretrained({os.fspath(model)!r}) loads one"
    if "peft" in kinds:
        return ": merge its adapters into the model and pass that, model.merge_and_unload()"
    if isinstance(model, PreTrainedConfig):
        return ": a configuration has no weights; load the model"
    where = type(model).__module__
    if kinds & {"optimum", "onnxruntime"} or where.startswith(("torch.jit", "torch.export", "torch.fx")):
        return ": an exported model does not show its layers; pass the transformers model that it was made from"
    if isinstance(model, list | tuple):
        return "; pass one model"
    path = _encoder_inside(model)
    return "" if path is None else f": pass the model inside, its {path}"


def _encoder_inside(outer: Any) -> str | None:
    """Where in another package's or a user's object the transformers model is, as it is written behind the object."""
    if isinstance(outer, nn.Module):
        found = next((name for name, part in outer.named_modules() if name and isinstance(part, PreTrainedModel)), None)
        if found is None:
            return None
        parts = ["[" + part + "]" if part.isdigit() else "." + part for part in found.split(".")]
        return "".join(parts)
    if isinstance(outer, list | tuple | dict) or not hasattr(outer, "__dict__"):
        return None
    for name, value in vars(outer).items():
        if isinstance(value, PreTrainedModel):
            return f".{name}"
        inside = _encoder_inside(value) if isinstance(value, nn.Module) else None
        if inside is not None:
            return f".{name}{inside}"
    return None


def family_of_config(config: PreTrainedConfig, name: str, decodes: bool | None = None) -> EncoderFamily:
    """The family of a model `name` with this config; raises ValueError as `find_family` does.

    `decodes`: whether the model has a decoder; None where that is not known.
    """
    model_type, known = config.model_type, ", ".join(_FAMILIES)
    if decodes or (config.is_encoder_decoder and not (decodes is False and model_type in _FAMILIES)):
        encoder = f"; load its encoder, {model_type.upper()}EncoderModel" if model_type in _FAMILIES else ""
        raise ValueError(
            f"model must be an encoder, got {name} of type {model_type!r}, an encoder-decoder: GlobEnc "
            f"decomposes bidirectional encoder layers{encoder}; supported: {known}"
        )
    if f"{model_type}_vision_model" in _FAMILIES:
        raise ValueError(
            f"model must be one encoder, got {name} of type {model_type!r}, which has two: pass its vision tower, "
            "model.vision_model"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"model must be an encoder, got {name} configured as a decoder (is_decoder or "
            "add_cross_attention is set in its config): load it with is_decoder=False"
        )
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model must be a supported encoder, got {name} of type {model_type!r}; supported: {known}. "
            f"If {model_type!r} is a bidirectional encoder on transformers' attention interface, register it in one "
            f"call: globenc.register_encoder({model_type!r}, layers=..., attention=..., output_projection=..., "
            "attention_norm=..., output_norm=...), see help(globenc.register_encoder)"
        )
    family = _FAMILIES[model_type]
    reason = family.refuse(config) if family.refuse is not None else None
    if reason is not None:
        raise ValueError(f"model {name} of type {model_type!r} cannot be taken: {reason}")
    return family


def _resolve(root: nn.Module, path: str, argument: str, family: EncoderFamily) -> nn.Module:
    *others, last = path.split("|")  # names differ between versions of transformers
    for other in others:
        try:
            return root.get_submodule(other)
        except AttributeError:
            continue
    try:
        return root.get_submodule(last)
    except AttributeError as error:
        raise ValueError(
            f"encoder family {family.model_type!r}: {argument}={path!r} does not exist in "
            f"{type(root).__name__} ({error}); correct it with globenc.register_encoder"
        ) from None


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _kind(weight: Any) -> str:
    if not isinstance(weight, Tensor):
        return "packed integers"
    return str(weight.dtype) if type(weight) in (Tensor, nn.Parameter) else type(weight).__name__


def _is_quantised(module: Any) -> bool:
    """Whether its weight is another than that of a linear layer in floating point: packed, a method, or of a kind of
    tensor that only looks like one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return callable(weight) or hasattr(module, "qweight") or "quant" in type(module).__module__
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return True
    return type(weight) not in (Tensor, nn.Parameter) and not type(weight).__module__.startswith("torch.distributed")


def layer_list(base_model: nn.Module, family: EncoderFamily) -> list[nn.Module]:
    """The layers in order of execution; raises ValueError where they are not where the family says."""
    if callable(family.layers):
        return list(family.layers(base_model))
    container = _resolve(base_model, family.layers, "layers", family)
    return list(container if isinstance(container, nn.ModuleList) else container.children())


def find_layers(base_model: nn.Module, family: EncoderFamily) -> list[LayerModules]:
    """The modules of every layer in order of execution; a shared layer stands there once per use.

    Raises:
        ValueError: a name of the family does not exist in this model, or is of an unusable kind.
    """
    resolved = []
    for layer in layer_list(base_model, family):
        attention, projection, attention_norm = (
            _resolve(layer, getattr(family, argument), argument, family)
            for argument in ("attention", "output_projection", "attention_norm")
        )
        output_norm = None
        if _is_quantised(projection):
            raise ValueError(
                f"output_projection of {family.model_type!r} is quantised ({_full_name(projection)}, with a weight of "
                f"{_kind(getattr(projection, 'weight', None))}): load the model without quantisation, in float32, "
                "bfloat16 or float16"
            )
        if type(projection) is not nn.Linear:
            raise ValueError(
                f"output_projection of {family.model_type!r} must be a plain torch.nn.Linear, got "
                f"{_full_name(projection)}; merge adapters (peft: model.merge_and_unload())"
            )
        if family.output_norm is not None:
            output_norm = _resolve(layer, family.output_norm, "output_norm", family)
            for argument, norm in (("attention_norm", attention_norm), ("output_norm", output_norm)):
                if not _is_layer_norm(norm):
                    raise ValueError(
                        f"{argument} of {family.model_type!r} must be a torch.nn.LayerNorm, got {type(norm).__name__}"
                    )
                if norm_width(norm) != (projection.out_features,):
                    raise ValueError(
                        f"{argument} of {family.model_type!r} must normalise what output_projection puts out: "
                        f"{projection.out_features} numbers, got {list(norm_width(norm))}"
                    )
            if attention_norm is output_norm:
                raise ValueError(
                    f"attention_norm and output_norm of {family.model_type!r} must be two modules, got one"
                )
        own, scale = family.own_attention, family.output_scale
        resolved.append(
            LayerModules(
                attention,
                projection,
                attention_norm,
                output_norm,
                block=layer if family.pre_norm else None,
                output_scale=None if scale is None else layer.get_parameter(scale),
                own=own,
                value=None if own is None or own.value is None else _resolve(layer, own.value, "value", family),
                weights=None if own is None or own.weights is None else _resolve(layer, own.weights, "weights", family),
            )
        )
    if not resolved:
        raise ValueError(f"model must have at least one encoder layer, got {type(base_model).__name__} with none")
    return resolved


def accepted_inputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the inputs that a model's forward takes; one that hands all keyword arguments on takes those of the
    class it is derived from. Empty where nothing tells."""
    names: list[str] = []
    for forward in [model.forward, *(vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))]:
        found, hands_on = _parameters(getattr(forward, "__func__", forward))
        names += found
        if not hands_on or forward.__module__.startswith("transformers."):
            break
    known = tuple(dict.fromkeys(names))
    return known if {"input_ids", "inputs_embeds", "pixel_values"} & set(known) else ()


@functools.lru_cache(maxsize=256)
def _parameters(forward: Callable) -> tuple[list[str], bool]:
    """The names of its parameters, and whether it takes any others."""
    parameters = inspect.signature(forward).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, parameter in parameters.items() if name != "self" and parameter.kind not in several]
    return named, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def max_length(model: nn.Module) -> int | None:
    """Most tokens one text may have in this model, special tokens included; None where nothing limits it.

    Where positions are relative it is the length that the model was made for, and longer texts run all the same
    (`takes_any_length`).
    """
    family, config = find_family(model), model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or family.patches is not None:
        return None
    padding = getattr(config, "pad_token_id", None)
    return int(positions) - (padding + 1 if family.positions_after_padding and padding is not None else 0)


def takes_any_length(model: nn.Module) -> bool:
    """Whether no table of positions ends somewhere."""
    config: Any = model.config
    rotary = getattr(config, "position_embedding_type", None) == "rotary"  # ESM may be either
    return find_family(model).relative_positions or rotary or not getattr(config, "position_biased_input", True)
