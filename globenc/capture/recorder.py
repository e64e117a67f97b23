"""Hooks that put together what a layer computes and hand it to a consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders import LayerModules
from ..model_state import active_recorder
from .trace import (
    AttentionResult,
    AttentionTrace,
    GivenWeights,
    GlobalTokens,
    LayerAttention,
    LayerConsumer,
    LayerEnd,
    ScoredAttention,
)


@dataclass
class _Block:
    """What is known of an attention block on its way.

    Attributes:
        hidden_states: the residual, [B, tokens, d].
        attention, context: once it has run; as in `AttentionTrace`.
        weights, value: of families with attention code of their own, before they are `GivenWeights`.
        sums: residual and attention block's output added up, in pieces where the feed-forward block reads it in pieces
            (`chunk_size_feed_forward`).
        norm_ran_first: as in `AttentionTrace`.
    """

    hidden_states: Tensor
    attention: ScoredAttention | GivenWeights | None = None
    context: Tensor | None = None
    weights: Tensor | None = None
    value: Tensor | None = None
    sums: list[Tensor] = field(default_factory=list)
    norm_ran_first: bool = False


@dataclass
class _Layer:
    """A layer on its way.

    Attributes:
        tokens: how many it reads; sparse attention may read some padding behind the inputs.
        block: its attention block; None once that is handed over.
        output_norm: inputs and outputs of LayerNorm 2, in pieces.
    """

    tokens: int
    block: _Block | None
    output_norm: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Recorder:
    """Puts the layers of one forward pass together and hands them on: the attention block, then the layer's end."""

    def __init__(
        self, layers: Sequence[LayerModules], mask: Tensor, consumer: LayerConsumer, attention: LayerAttention | None
    ):
        self.layers = layers
        self.mask = mask
        self.padded = not bool(mask.all())
        self.consumer = consumer
        self.attention = attention
        self.done = 0
        self.layer: _Layer | None = None

    def hooks(self) -> Iterator[tuple[Callable[..., Any], Callable[..., Any], dict[str, bool]]]:
        """What registers a hook, the hook, and options of the registration."""

        def each(name: str) -> list[Any]:
            # shared layers (ALBERT) run the same modules again: one hook a module
            modules = (getattr(layer, name) for layer in self.layers)
            return list({id(module): module for module in modules if module is not None}.values())

        for module in {id(m): m for layer in self.layers for m in [layer.block or layer.attention]}.values():
            yield module.register_forward_pre_hook, self.enter_block, {"with_kwargs": True}
        for module in each("attention_norm"):
            yield module.register_forward_pre_hook, self.enter_attention_norm, {}
        for module in each("output_norm"):
            yield module.register_forward_hook, self.leave_output_norm, {}
        for module in each("block"):
            yield module.register_forward_hook, self.leave_block, {}
        custom = self.layers[0].custom_attention
        if custom is None:
            return
        for module in each("value"):
            yield module.register_forward_hook, self.leave_value, {}
        for module in each("weights"):
            yield module.register_forward_pre_hook, self.enter_weights, {}
        if custom.value is not None and custom.weights is None:
            for module in each("attention"):
                yield module.register_forward_hook, self.leave_attention, {}
        for module in each("output_projection"):
            yield module.register_forward_pre_hook, self.enter_output_projection, {}

    def elsewhere(self) -> bool:
        """Whether a hook was called by another forward pass: another thread's, or one started inside."""
        return active_recorder() is not self

    def current(self, piece: str) -> _Layer:
        """The layer that a piece belongs to."""
        if self.layer is None or self.done >= len(self.layers):
            raise self.out_of_order(piece)
        return self.layer

    def current_block(self, piece: str) -> _Block:
        """The attention block that a piece belongs to."""
        block = self.current(piece).block
        if block is None:
            raise self.out_of_order(piece)
        return block

    def out_of_order(self, piece: str) -> RuntimeError:
        return RuntimeError(
            f"layer {self.done}: {piece} came out of order; the encoder family's names do not fit this "
            "model, correct them with globenc.register_encoder"
        )

    def enter_block(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        # another thread's pass may come to a hook before it is registered whole, and has no kwargs then
        if kwargs is None or self.elsewhere():
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        block = _Block(hidden_states)
        self.layer = _Layer(hidden_states.shape[1], block)
        custom = self.layers[self.done].custom_attention if self.done < len(self.layers) else None
        if custom is not None and custom.recompute_inputs is not None:
            block.attention = _scored(custom.recompute_inputs(module, hidden_states, kwargs))

    def computed_attention(self, inputs: ScoredAttention) -> AttentionResult | None:
        """The attention of this layer by other code than torch's, if there is any for it."""
        block = self.current_block("attention")
        if self.attention is None:
            return None
        return self.attention(self.layers[self.done], block.hidden_states, inputs)

    def attended(self, result: AttentionResult) -> None:
        block = self.current_block("attention")
        block.attention, block.context = result.attention, result.context.flatten(2)

    def leave_value(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not self.elsewhere() and self.layer is not None and self.layer.block is not None:
            self.layer.block.value = output

    def enter_weights(self, module: nn.Module, args: tuple) -> None:
        if not self.elsewhere():
            self.current_block("attention").weights = args[0]

    def leave_attention(self, module: nn.Module, args: tuple, output: tuple) -> None:
        if not self.elsewhere():
            self.current_block("attention").weights = output[1]

    def enter_output_projection(self, module: nn.Module, args: tuple) -> None:
        if self.elsewhere():
            return
        layer, block = self.layers[self.done], self.current_block("output_projection")
        block.context = args[0]
        if layer.custom_attention is None or layer.custom_attention.recompute_inputs is not None:
            return
        value, weights = block.value, block.weights
        if value is None or weights is None:
            raise RuntimeError(f"layer {self.done}: its attention did not show its weights and values")
        if layer.custom_attention.split_heads is not None:
            value = layer.custom_attention.split_heads(layer.attention, value)
        else:
            value = value.view(*value.shape[:2], weights.shape[1], -1).transpose(1, 2)
        if layer.custom_attention.correct_weights is not None:
            weights = layer.custom_attention.correct_weights(layer.attention, weights)
        block.attention = GivenWeights(weights, value)

    def enter_attention_norm(self, module: nn.Module, args: tuple) -> None:
        if self.elsewhere():
            return
        layer = self.current("attention_norm")
        if layer.block is None:  # the pieces behind a block that is handed over
            return
        block = layer.block
        block.sums.append(args[0])
        block.norm_ran_first = block.norm_ran_first or block.context is None
        if sum(piece.shape[1] for piece in block.sums) >= layer.tokens and not block.norm_ran_first:
            self.hand_over_block(layer, block)

    def leave_output_norm(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.elsewhere():
            return
        layer = self.current("output_norm")
        layer.output_norm.append((args[0], output))
        if sum(piece.shape[1] for _, piece in layer.output_norm) < layer.tokens:
            return
        inputs, outputs = zip(*layer.output_norm, strict=True)
        self.leave(layer, (_joined(inputs),), _joined(outputs))

    def leave_block(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.elsewhere():
            self.leave(self.current("layer"), (), output[0] if isinstance(output, tuple) else output)

    def hand_over_block(self, layer: _Layer, block: _Block) -> None:
        """The attention block is complete: the consumer gets it, and the recorder lets go of it."""
        if block.attention is None or block.context is None or not block.sums:
            raise wrong_norm(self.done)
        n = self.mask.shape[1]
        if layer.tokens < n:
            raise RuntimeError(f"layer {self.done} reads {layer.tokens} tokens where the inputs have {n}")
        trace = AttentionTrace(
            modules=self.layers[self.done],
            attention=block.attention.cut(n),
            context=block.context[:, :n],
            mask=self.mask.to(block.hidden_states.device),
            padded=self.padded,
            hidden_states=block.hidden_states[:, :n],
            attention_norm_input=_joined(block.sums)[:, :n],
            norm_ran_first=block.norm_ran_first,
        )
        layer.block = None
        self.consumer.attention_done(self.done, trace)

    def leave(self, layer: _Layer, norm_inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The layer is complete."""
        if layer.block is not None:
            self.hand_over_block(layer, layer.block)
        n = self.mask.shape[1]
        self.consumer.layer_done(self.done, LayerEnd(tuple(y[:, :n] for y in norm_inputs), output[:, :n]))
        self.layer = None
        self.done += 1


def wrong_norm(index: int) -> RuntimeError:
    """The error where `attention_norm` is not behind a layer's attention."""
    return RuntimeError(
        f"layer {index}: a norm ran before the attention, or none behind it; the encoder family's names do "
        "not fit this model, correct them with globenc.register_encoder"
    )


def _scored(parts: dict[str, Any]) -> ScoredAttention:
    """The record of an attention whose parts were recomputed by `CustomAttention.recompute_inputs`."""
    scored = {name: parts[name] for name in ("query", "key", "value", "scaling", "window")}
    if "global_keys" not in parts:
        return ScoredAttention(**scored)
    tokens = GlobalTokens(where=parts["global_keys"], **parts["global_rows"], scaling=parts["scaling"])
    return ScoredAttention(**scored, global_tokens=tokens)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), 1)
