"""One forward pass of an unmodified transformers encoder, handing over what each layer computed.

Queries, keys and values come through transformers' attention interface, the residual and the
LayerNorm inputs through forward hooks; of families with attention code of their own, the attention weights
and values through hooks as well. A layer is handed to `consume` the moment it is complete, so
that its tensors need not outlive it. The model is left exactly as found, also after an exception.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from .encoders import LayerModules
from .model_state import ATTENTION, Loan, active_recorder


@dataclass
class LayerTrace:
    """What one encoder layer computed in one forward pass, in the model's own dtype.

    Attributes:
        modules: the layer's modules (weights are read from them).
        query, key: as they enter the attention scores, [B, H, n, d_h]; None where there are `weights`.
        value: [B, H, n, d_h].
        scaling: factor of the scores.
        context: what the attention returns, heads side by side, [B, n, H * d_h].
        mask: True at real tokens, [B, n].
        padded: whether any position is padding.
        hidden_states: the residual x that is added to the attention block's output, [B, n, d].
        attention_norm_input: y1, the sum of both, [B, n, d].
        output_norm_input: y2, what enters LayerNorm 2, [B, n, d]; None in a pre-LN layer, and to `begin`.
        output: the layer's output, [B, n, d]; None to `begin`.
        window: a query sees keys at most this far from it; None sees all.
        bias: what is added to the scores, [B or 1, H, n, n]; None for nothing.
        global_keys: True at tokens that every query sees, however far, [B, n]; None for none.
        global_rows: the trace that holds for the rows of those tokens: other queries, keys and values, no window.
        log_sum_exp: of each query's scores, [B, H, n]; None where torch does not tell.
        weights: the attention weights themselves, [B, H, n, n], of families that compute them in code of their own.
        attention: what the attention kernel left beside the context; None where torch's attention ran.
        doubts: scalar tensors, true where something kept from earlier calls has turned out to be of other weights.
    """

    modules: LayerModules
    query: Tensor | None
    key: Tensor | None
    value: Tensor
    scaling: float
    context: Tensor
    mask: Tensor
    padded: bool
    hidden_states: Tensor
    attention_norm_input: Tensor
    output_norm_input: Tensor | None
    output: Tensor | None
    window: int | None = None
    bias: Tensor | None = None
    global_keys: Tensor | None = None
    global_rows: LayerTrace | None = None
    log_sum_exp: Tensor | None = None
    weights: Tensor | None = None
    attention: Any = None
    doubts: list[Tensor] = field(default_factory=list)

    @functools.cached_property
    def probe(self) -> tuple[Tensor, Tensor]:
        """A fixed direction p of the hidden space, [d], and p W_O, [H * d_h]: a fingerprint of what W_O does."""
        weight = self.modules.output_weight
        weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        direction = _direction(len(weight), weight.dtype, weight.device)
        return direction, direction @ weight


@functools.lru_cache(maxsize=64)
def _direction(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        direction = torch.linspace(1.0, 2.0, d, dtype=dtype, device=device)
        direction[1::2] *= -1
        return direction


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention interface is called with; attributes as in `LayerTrace`, keys and values of all heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None
    bias: Tensor | None


Attend = Callable[[LayerModules, Tensor, AttentionInputs], tuple[Tensor, Any] | None]
"""An attention of our own: the layer's modules and residual, and its inputs -> context [B, n, H, d_h] and what it
leaves for the layer's trace; None where it leaves the layer to torch."""


Finish = Callable[[Tensor | None, Tensor], None]
"""Told the end of a layer that was begun: what entered LayerNorm 2, None in a pre-LN layer, and the layer's output."""
Begin = Callable[[int, LayerTrace], Finish | None]
"""Shown a layer between its attention and its feed-forward block; who returns a `Finish` needs it no longer."""


@dataclass
class _Partial:
    """A layer on its way; what the feed-forward block reads may come in pieces (`chunk_size_feed_forward`)."""

    tokens: int
    hidden_states: Tensor | None
    finish: Finish | None = None
    attention: dict[str, Any] = field(default_factory=dict)
    attention_norm: list[Tensor] = field(default_factory=list)
    output_norm: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Recorder:
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


def _capturing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that also shows q, k, v to the recorder of this thread.

    `attention_mask` is the 2-D padding mask [B, n] or None, as flash attention takes it; another thread's forward pass
    that met a capture half-way may bring a 4-D one. `sliding_window` is flash attention's: one more than how far a
    query sees.
    """
    recorder = active_recorder()
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    elif attention_mask is not None and recorder is not None:
        raise ValueError(
            f"attention_mask must have shape [batch, n], got {list(attention_mask.shape)}; GlobEnc's rows need one "
            "set of real tokens per text"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if key.shape[1] != query.shape[1]:  # grouped queries share keys and values
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    window = None if sliding_window is None or sliding_window > query.shape[2] else sliding_window - 1
    inputs = AttentionInputs(query, key, value, scaling, window, position_bias)
    output, log_sum_exp = None if recorder is None else recorder.attend(inputs), None
    if output is None:
        if recorder is not None and query.device.type == "cpu" and window is None and position_bias is None:
            output, log_sum_exp = _flash_attention(inputs, attention_mask)
        else:
            output = _attention(inputs, attention_mask, dropout)
        output = output.transpose(1, 2).contiguous()
    if recorder is not None:
        recorder.attended(output, log_sum_exp)
    return output, None


def _flash_attention(inputs: AttentionInputs, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What `scaled_dot_product_attention` runs on a CPU, for the log-sum-exp that it keeps to itself."""
    query = inputs.query
    scores_mask = None
    if mask is not None:
        scores_mask = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    try:
        context, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, inputs.key, inputs.value, 0.0, False, attn_mask=scores_mask, scale=inputs.scaling
        )
    except (RuntimeError, AttributeError):  # a shape that it does not take, or another torch
        return _attention(inputs, mask, 0.0), None
    return context, log_sum_exp


QUERIES_AT_ONCE = 512  # of a local layer


def _attention(inputs: AttentionInputs, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k scaling + bias) v over real keys in reach, [B, H, n, d_h]; O(n window) in a local layer."""
    query, key, value, bias = inputs.query, inputs.key, inputs.value, inputs.bias

    def attend(rows: slice, keys: slice) -> Tensor:
        allowed = None if mask is None else mask[..., keys] if mask.shape[2] == 1 else mask[..., rows, keys]
        if window is not None:
            distance = distances(rows, keys, query.device)
            reach = distance <= window
            # a padded query may see no real key: it sees itself
            allowed = reach if allowed is None else allowed & reach | (distance == 0)
        if bias is not None:
            part = bias[..., rows, keys].to(query.dtype)
            allowed = part if allowed is None else part.masked_fill(~allowed, torch.finfo(query.dtype).min)
        return nn.functional.scaled_dot_product_attention(
            query[:, :, rows], key[:, :, keys], value[:, :, keys],
            attn_mask=allowed, dropout_p=dropout, scale=inputs.scaling,
        )  # fmt: skip

    n, window = query.shape[2], inputs.window
    if window is None:
        return attend(slice(None), slice(None))
    blocks = [slice(start, min(start + QUERIES_AT_ONCE, n)) for start in range(0, n, QUERIES_AT_ONCE)]
    return torch.cat([attend(rows, in_reach(rows, window, n)) for rows in blocks], 2)


def in_reach(rows: slice, window: int | None, n: int) -> slice:
    """The keys that queries of a slice see."""
    return slice(0, n) if window is None else slice(max(0, rows.start - window), min(n, rows.stop + window))


def distances(rows: slice, keys: slice, device: torch.device) -> Tensor:
    """|i - j| of queries and keys, [rows, keys]."""
    i = torch.arange(rows.start, rows.stop, device=device)
    return (i[:, None] - torch.arange(keys.start, keys.stop, device=device)).abs()


AttentionInterface.register(ATTENTION, _capturing_attention)
AttentionMaskInterface.register(ATTENTION, flash_attention_mask)


def capture(
    model: PreTrainedModel,
    layers: Sequence[LayerModules],
    model_inputs: dict[str, Any],
    mask: Tensor,
    consume: Callable[[int, LayerTrace], None],
    attend: Attend | None = None,
    begin: Begin | None = None,
) -> Any:
    """Run `model(**model_inputs)` once, without gradients and dropout, and show every layer to `consume`.

    Args:
        model: a transformers encoder of a known family, with any head.
        layers: its layers in order of execution (`Encoder.layers`).
        model_inputs: keyword arguments of its forward.
        mask: True at real tokens, [B, n].
        consume: called with (layer index, LayerTrace) as soon as a layer is complete, in order.
        attend: an attention of our own in place of torch's.
        begin: shown each layer before its feed-forward block; one that it takes over is not shown to `consume`.

    Returns:
        The model's own output object.

    Raises:
        RuntimeError: the family's names do not fit the model.
    """
    recorder, loan = _Recorder(layers, mask, consume, attend, begin), Loan()
    modules = list(model.modules())

    def run() -> Any:
        loan.evaluation_mode(modules)
        if layers[0].own is None:
            loan.attention(modules)
        for register, hook, options in recorder.hooks():
            loan.hook(register, hook, **options)
        loan.recorder(recorder)
        with torch.no_grad():
            return model(**model_inputs)

    output = loan.run(run)
    if recorder.done != len(layers):
        raise RuntimeError(
            f"{type(model).__name__} ran {recorder.done} of its {len(layers)} encoder layers through the attention "
            "interface; its encoder family's names do not fit it, correct them with globenc.register_encoder"
        )
    return output
