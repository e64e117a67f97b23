"""Hooks that collect the pieces of a layer and hand complete layers on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders import LayerModules
from ..model_state import active_recorder
from .trace import Attend, AttentionInputs, Begin, Finish, LayerTrace


@dataclass
class _Partial:
    """A layer on its way; what the feed-forward block reads may come in pieces (`chunk_size_feed_forward`)."""

    tokens: int
    hidden_states: Tensor | None
    finish: Finish | None = None
    attention: dict[str, Any] = field(default_factory=dict)
    attention_norm: list[Tensor] = field(default_factory=list)
    output_norm: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Recorder:
    """Collects the pieces of the layers of one forward pass and hands complete layers on."""

    def __init__(
        self,
        layers: Sequence[LayerModules],
        mask: Tensor,
        consume: Callable[[int, LayerTrace], None],
        attend: Attend | None,
        begin: Begin | None,
    ):
        self.layers = layers
        self.own_attention = attend
        self.mask = mask
        self.padded = not bool(mask.all())
        self.consume = consume
        self.begin = begin
        self.done = 0
        self.partial: _Partial | None = None

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
        own = self.layers[0].own
        if own is None:
            return
        for module in each("value"):
            yield module.register_forward_hook, self.leave_value, {}
        for module in each("weights"):
            yield module.register_forward_pre_hook, self.enter_weights, {}
        if own.value is not None and own.weights is None:
            for module in each("attention"):
                yield module.register_forward_hook, self.leave_attention, {}
        for module in each("output_projection"):
            yield module.register_forward_pre_hook, self.enter_output_projection, {}

    def current(self, piece: str) -> _Partial:
        if self.partial is None or self.done >= len(self.layers):
            raise RuntimeError(
                f"layer {self.done}: {piece} came out of order; the encoder family's names do not fit this "
                "model, correct them with globenc.register_encoder"
            )
        return self.partial

    def elsewhere(self) -> bool:
        """Whether a hook was called by another forward pass than ours: another thread's, or one started inside."""
        return active_recorder() is not self

    def enter_block(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.elsewhere():
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.partial = _Partial(hidden_states.shape[1], hidden_states)
        own = self.layers[self.done].own if self.done < len(self.layers) else None
        if own is not None and own.inputs is not None:
            self.partial.attention = own.inputs(module, hidden_states, kwargs)

    def attend(self, inputs: AttentionInputs) -> Tensor | None:
        """The context by an attention of our own, if there is one for this layer."""
        partial = self.current("attention")
        attended = None
        if self.own_attention is not None:
            assert partial.hidden_states is not None
            attended = self.own_attention(self.layers[self.done], partial.hidden_states, inputs)
        context, left = (None, None) if attended is None else attended
        partial.attention = {**vars(inputs), "attention": left}
        return context

    def attended(self, context: Tensor, log_sum_exp: Tensor | None) -> None:
        self.current("attention").attention.update(context=context.flatten(2), log_sum_exp=log_sum_exp)

    def leave_value(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not self.elsewhere() and self.partial is not None:
            self.partial.attention["value"] = output

    def enter_weights(self, module: nn.Module, args: tuple) -> None:
        if not self.elsewhere():
            self.current("attention").attention["weights"] = args[0]

    def leave_attention(self, module: nn.Module, args: tuple, output: tuple) -> None:
        if not self.elsewhere():
            self.current("attention").attention["weights"] = output[1]

    def enter_output_projection(self, module: nn.Module, args: tuple) -> None:
        if self.elsewhere():
            return
        layer, attention = self.layers[self.done], self.current("output_projection").attention
        attention["context"] = args[0]
        if layer.own is None or layer.own.inputs is not None:
            return
        value, weights = attention.get("value"), attention.get("weights")
        if value is None or weights is None:
            raise RuntimeError(f"layer {self.done}: its attention did not show its weights and values")
        if layer.own.split is not None:
            value = layer.own.split(layer.attention, value)
        else:
            value = value.view(*value.shape[:2], weights.shape[1], -1).transpose(1, 2)
        if layer.own.mend is not None:
            weights = layer.own.mend(layer.attention, weights)
        attention.update(query=None, key=None, scaling=1.0, value=value, weights=weights)

    def enter_attention_norm(self, module: nn.Module, args: tuple) -> None:
        if self.elsewhere():
            return
        partial = self.current("attention_norm")
        if partial.finish is not None:  # the pieces after the first, of a layer that has been begun
            return
        partial.attention_norm.append(args[0])
        if self.begin is None or sum(piece.shape[1] for piece in partial.attention_norm) < partial.tokens:
            return
        partial.finish = self.begin(self.done, self.trace(partial, None, None))
        if partial.finish is not None:  # nothing of it need outlive this
            partial.hidden_states, partial.attention, partial.attention_norm = None, {}, []

    def leave_output_norm(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.elsewhere():
            return
        partial = self.current("output_norm")
        partial.output_norm.append((args[0], output))
        if sum(piece.shape[1] for _, piece in partial.output_norm) < partial.tokens:
            return
        inputs, outputs = zip(*partial.output_norm, strict=True)
        self.leave(partial, _whole(inputs), _whole(outputs))

    def leave_block(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.elsewhere():
            self.leave(self.current("layer"), None, output[0] if isinstance(output, tuple) else output)

    def leave(self, partial: _Partial, output_norm_input: Tensor | None, output: Tensor) -> None:
        """The layer is complete."""
        if partial.finish is None:
            self.consume(self.done, self.trace(partial, output_norm_input, output))
        else:
            n = self.mask.shape[1]
            partial.finish(None if output_norm_input is None else output_norm_input[:, :n], output[:, :n])
        self.partial = None
        self.done += 1

    def trace(self, partial: _Partial, output_norm_input: Tensor | None, output: Tensor | None) -> LayerTrace:
        """What is known of the layer."""
        if not partial.attention or not partial.attention_norm:
            raise RuntimeError(
                f"layer {self.done}: a norm ran before the attention, or none behind it; the encoder family's names do "
                "not fit this model, correct them with globenc.register_encoder"
            )
        n = self.mask.shape[1]
        if partial.tokens < n:
            raise RuntimeError(f"layer {self.done} reads {partial.tokens} tokens where the inputs have {n}")
        assert partial.hidden_states is not None
        trace = LayerTrace(
            modules=self.layers[self.done],
            mask=self.mask.to(partial.hidden_states.device),
            padded=self.padded,
            # sparse attention may read some padding behind the inputs
            hidden_states=partial.hidden_states[:, :n],
            attention_norm_input=_whole(partial.attention_norm)[:, :n],
            output_norm_input=None if output_norm_input is None else output_norm_input[:, :n],
            output=None if output is None else output[:, :n],
            **_cut(partial.attention, n),
        )
        if trace.global_keys is not None:
            others = _cut(partial.attention["global_rows"], n)
            trace.global_rows = replace(trace, **others, window=None, global_keys=None, global_rows=None)
        return trace


def _cut(attention: dict[str, Any], n: int) -> dict[str, Any]:
    """What an attention left, for n tokens."""
    heads = {name: attention[name] for name in ("query", "key", "value") if attention.get(name) is not None}
    cut: dict[str, Any] = {**attention, **{name: tensor[:, :, :n] for name, tensor in heads.items()}}
    if "context" in attention:
        cut["context"] = attention["context"][:, :n]
    if attention.get("global_keys") is not None:
        cut["global_keys"] = attention["global_keys"][:, :n]
    if attention.get("weights") is not None:
        cut["weights"] = attention["weights"][:, :, :n, :n]
    return {**cut, "global_rows": None} if "global_rows" in cut else cut


def _whole(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), 1)
