"""How a family of encoders is described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

Layers = str | Callable[[nn.Module], list[nn.Module]]


@dataclass(frozen=True)
class CustomAttention:
    """How to see the attention of a family that bypasses transformers' attention interface.

    Attributes:
        value: dotted path inside a layer to the module that puts out the value vectors, [B, n, H * d_h].
        weights: dotted path to the module that is given the attention weights, [B, H, n, n]; None where the attention
            module returns them beside its context.
        correct_weights: (attention module, those weights) -> the weights that it really used.
        split_heads: (attention module, output of `value`) -> value vectors [B, H, n, d_h] where they are not simply
            heads side by side.
        recompute_inputs: instead of all this, (attention module, hidden states [B, n, d], keyword arguments of its
            call) -> "query", "key", "value", each [B, H, n, d_h], "scaling" and "window" as in `ScoredAttention`, and
            where some tokens attend to all and all to them, "global_keys", bool [B, n], and "global_rows", the query,
            key and value of those tokens' rows.
    """

    value: str | None = None
    weights: str | None = None
    correct_weights: Callable[[Any, Tensor], Tensor] | None = None
    split_heads: Callable[[Any, Tensor], Tensor] | None = None
    recompute_inputs: Callable[[Any, Tensor, dict[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class EncoderFamily:
    """Where one family of encoders has the modules that equations (4)-(11) need.

    All names but `layers` are dotted attribute paths inside one layer; `a|b` is `a` or, in other versions of
    transformers, `b`.

    Attributes:
        model_type: `config.model_type` of the family.
        layers: dotted path from the base model to its list of layers, or a function
            base model -> layers in order of execution (a shared layer stands there once per use).
        attention: module that calls the attention interface; in a post-LN layer its first argument is the residual x
            (in a pre-LN layer that is the layer's first argument).
        output_projection: `nn.Linear` W_O, b_O.
        attention_norm: the norm whose input is the attention block's output plus x: LayerNorm 1 of a post-LN layer, the
            one before the feed-forward block of a pre-LN layer.
        output_norm: LayerNorm 2, which reads the feed-forward output plus the feed-forward block's input; None for
            pre-LN layers.
        output_scale: parameter that the attention block's output is multiplied with (DINOv2's layer scale).
        custom_attention: of families whose attention bypasses transformers' attention interface.
        positions_after_padding: True where position ids start behind `pad_token_id` (RoBERTa), so
            that the longest text is `max_position_embeddings - pad_token_id - 1`.
        relative_positions: no table of positions limits the length of a text or the size of an image.
        score_bias: positions add to the attention scores (T5), which the kernels do not know.
        padding_invariant: scores do not change when padding is appended.
        has_cls: the first token stands for the whole text or image.
        special_tokens: of vision encoders: config -> names of the tokens in front of an image's patches.
        prepare: (base model, n) -> two functions: one changes the model as its forward pass over n tokens would change
            it, the other undoes that, also when called half-way or twice; None where nothing changes.
        refuse: config -> why a model of the family cannot be taken, a clause without a full stop; or None.
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
    custom_attention: CustomAttention | None = None
    positions_after_padding: bool = False
    relative_positions: bool = False
    score_bias: bool = False
    padding_invariant: bool = True
    has_cls: bool = True
    special_tokens: Callable[[PreTrainedConfig], list[str]] | None = None
    prepare: Callable[[Any, int], tuple[Callable[[], None], Callable[[], None]] | None] | None = None
    refuse: Callable[[PreTrainedConfig], str | None] | None = None
    examples: str = ""
    notes: str = ""
    tested: str = ""

    @property
    def reads_images(self) -> bool:
        """Whether it is a family of vision encoders."""
        return self.special_tokens is not None

    @property
    def pre_norm(self) -> bool:
        """Whether the norms stand in front of the blocks."""
        return self.output_norm is None
