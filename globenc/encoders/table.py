"""The table of encoder families: which modules of each one the method needs.

A family is described by names alone: the list of layers, and inside a layer the module that computes the attention,
the output projection, and the norms. A new encoder is a new row (`register_encoder`), never a new modelling file.

Two kinds of layers are known. Post-LN (BERT): `h = LN1(x + attention(x))`, then `LN2(h + feed_forward(h))`. Pre-LN
(ModernBERT, ViT): `h = x + attention(norm(x))`, then `h + feed_forward(norm(h))`; no norm follows the sum, so a
contribution is what a token adds to the residual stream, and N-Enc is N-Res.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .custom_attention import (
    albert_layers,
    bigbird_full_attention,
    bigbird_weights,
    deberta_refuse,
    deberta_values,
    longformer_inputs,
)
from .family import CustomAttention, EncoderFamily

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


def _cls(config: PreTrainedConfig) -> list[str]:
    return ["[CLS]"]


def _cls_and_distillation(config: PreTrainedConfig) -> list[str]:
    return ["[CLS]", "[DIST]"]


def _cls_and_registers(config: PreTrainedConfig) -> list[str]:
    return ["[CLS]", *(f"[REG{k}]" for k in range(config.num_register_tokens))]


def _no_special_tokens(config: PreTrainedConfig) -> list[str]:
    return []


FAMILIES: dict[str, EncoderFamily] = {
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
            layers=albert_layers,
            attention="attention",
            output_projection="attention.dense",
            attention_norm="attention.LayerNorm",
            output_norm="full_layer_layer_norm",
            examples="albert-base-v2",
            notes="shared layers",
        ),
        EncoderFamily("ernie", **_BERT_LAYER, examples="nghuyong/ernie-3.0-base-zh", notes="task type embeddings"),
        EncoderFamily(
            "data2vec-text", **_BERT_LAYER, positions_after_padding=True, examples="facebook/data2vec-text-base"
        ),
        EncoderFamily(
            "deberta-v2",
            **_BERT_LAYER,
            custom_attention=CustomAttention("attention.self.value_proj", "attention.self.dropout"),
            refuse=deberta_refuse,
            examples="microsoft/deberta-v3-base",
            notes="disentangled attention",
        ),
        EncoderFamily(
            "deberta",
            **_BERT_LAYER,
            custom_attention=CustomAttention(
                "attention.self.in_proj", "attention.self.dropout", split_heads=deberta_values
            ),
            refuse=deberta_refuse,
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
            custom_attention=CustomAttention("attention.attn.v", "attention.attn.dropout"),
            positions_after_padding=True,
            examples="all-mpnet-base-v2",
            notes="relative positions in the scores",
        ),
        EncoderFamily(
            "longformer",
            **_BERT_LAYER,
            custom_attention=CustomAttention(recompute_inputs=longformer_inputs),
            positions_after_padding=True,
            examples="allenai/longformer-base-4096",
            notes="O(n window)",
        ),
        EncoderFamily(
            "big_bird",
            **_BERT_LAYER,
            custom_attention=CustomAttention("attention.self.value", correct_weights=bigbird_weights),
            prepare=bigbird_full_attention,
            padding_invariant=False,
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
        EncoderFamily("vit", **_VIT_LAYER, special_tokens=_cls, examples="google/vit-base-patch16-224"),
        EncoderFamily(
            "deit",
            **_VIT_LAYER,
            special_tokens=_cls_and_distillation,
            examples="facebook/deit-base-distilled-patch16-224",
        ),
        EncoderFamily(
            "dinov2", **_DINOV2_LAYER, special_tokens=_cls, examples="facebook/dinov2-base", notes="layer scale"
        ),
        EncoderFamily(
            "dinov2_with_registers",
            **_DINOV2_LAYER,
            special_tokens=_cls_and_registers,
            examples="facebook/dinov2-with-registers-base",
            notes="layer scale",
        ),
        EncoderFamily("clip_vision_model", **_CLIP_LAYER, special_tokens=_cls, examples="openai/clip-vit-base-patch32"),
        EncoderFamily(
            "siglip_vision_model",
            **_CLIP_LAYER,
            special_tokens=_no_special_tokens,
            has_cls=False,
            examples="google/siglip-base-patch16-224",
            notes="no [CLS]",
        ),
    )
}
