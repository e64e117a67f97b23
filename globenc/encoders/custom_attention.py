"""Code that single families need: shared layers, and attention that bypasses transformers' interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig


def albert_layers(base_model: Any) -> list[nn.Module]:
    """ALBERT runs `num_hidden_layers` steps over `num_hidden_groups` groups of shared layers."""
    config = base_model.config
    layers: list[nn.Module] = []
    for step in range(config.num_hidden_layers):
        group = int(step / (config.num_hidden_layers / config.num_hidden_groups))
        layers.extend(base_model.encoder.albert_layer_groups[group].albert_layers)
    return layers


def deberta_values(attention: Any, projected: Tensor) -> Tensor:
    """DeBERTa projects a head's query, key and value side by side, and adds the value's bias afterwards."""
    batch, n, _ = projected.shape
    heads = attention.num_attention_heads
    value = projected.view(batch, n, heads, -1).chunk(3, dim=-1)[2] + attention.v_bias.view(heads, -1)
    return value.transpose(1, 2)


def longformer_inputs(attention: Any, hidden_states: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Queries, keys and values of Longformer: local attention in which every token sees the global tokens too, and the
    rows of the global tokens, which have separate projections."""
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


def bigbird_weights(attention: Any, weights: Tensor) -> Tensor:
    """In evaluation every random block of BigBird is the first block again, with the same weights; the weights that it
    returns hold them only once."""
    size = getattr(attention, "block_size", None)
    if size is None:  # full attention
        return weights
    weights = weights.clone()
    weights[:, :, size:-size, :size] *= 1 + attention.num_random_blocks
    return weights


def bigbird_full_attention(base_model: Any, n: int) -> tuple[Callable[[], None], Callable[[], None]] | None:
    """How to turn BigBird to full attention, and back: where a text is too short for blocks it turns for good."""
    config, layers = base_model.config, list(base_model.encoder.layer)
    if base_model.attention_type != "block_sparse" or n > (5 + 2 * config.num_random_blocks) * config.block_size:
        return None
    sparse = [(layer.attention, layer.attention.self) for layer in layers]
    with_type = [base_model, base_model.encoder, *layers, *(attention for attention, _ in sparse)]

    def undo() -> None:
        for attention, module in sparse:
            attention.self = module
        for module in with_type:
            module.attention_type = "block_sparse"

    return lambda: base_model.set_attention_type("original_full"), undo


def deberta_refuse(config: PreTrainedConfig) -> str | None:
    if getattr(config, "talking_head", False):
        return "talking heads mix the attention weights once more, which the method does not know"
    if getattr(config, "conv_kernel_size", 0):
        return (
            "a convolution between its layers mixes neighbouring tokens outside the attention (deberta-v2-xlarge and "
            "-xxlarge), which the method does not know; deberta-v3 has none"
        )
    return None
