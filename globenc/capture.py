"""One forward pass of an unmodified transformers encoder, handing over what each layer computed.

Queries, keys and values come through transformers' attention interface, the residual and the
LayerNorm inputs through forward hooks. A layer is handed to `consume` the moment it is complete, so
that its tensors need not outlive it. The model is left exactly as found, also after an exception.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from .encoders import LayerModules

ATTENTION = "globenc_capture"


@dataclass
class LayerTrace:
    """What one encoder layer computed in one forward pass, in the model's own dtype.

    Attributes:
        modules: the layer's modules (weights are read from them).
        query, key, value: as they enter the attention scores, [B, H, n, d_h].
        scaling: factor of the scores.
        context: what the attention returns, heads side by side, [B, n, H * d_h].
        mask: True at real tokens, [B, n].
        padded: whether any position is padding.
        hidden_states: the residual x that is added to the attention block's output, [B, n, d].
        attention_norm_input: y1, what enters LayerNorm 1, [B, n, d].
        output_norm_input: y2, what enters LayerNorm 2, [B, n, d].
        output: the layer's output, [B, n, d].
        attention: what the attention kernel left beside the context; None where torch's attention ran.
        doubts: scalar tensors, true where something kept from earlier calls has turned out to be of other weights.
    """

    modules: LayerModules
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    context: Tensor
    mask: Tensor
    padded: bool
    hidden_states: Tensor
    attention_norm_input: Tensor
    output_norm_input: Tensor
    output: Tensor
    attention: Any = None
    doubts: list[Tensor] = field(default_factory=list)

    @functools.cached_property
    def probe(self) -> tuple[Tensor, Tensor]:
        """A fixed direction p of the hidden space, [d], and p W_O, [H * d_h]: a fingerprint of what W_O does."""
        weight = self.modules.output_projection.weight.detach()
        weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        direction = _direction(len(weight), weight.dtype, weight.device)
        return direction, direction @ weight


@functools.lru_cache(maxsize=64)
def _direction(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        direction = torch.linspace(1.0, 2.0, d, dtype=dtype, device=device)
        direction[1::2] *= -1
        return direction


Attend = Callable[[LayerModules, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Any] | None]
"""An attention of our own: the layer's modules and residual, query, key, value, scaling -> context [B, n, H, d_h] and
what it leaves for the layer's trace; None where it leaves the layer to torch."""


@dataclass
class _Partial:
    """A layer on its way; LayerNorm 2 may come in pieces (`chunk_size_feed_forward`)."""

    hidden_states: Tensor
    attention: dict[str, Any] = field(default_factory=dict)
    attention_norm_input: Tensor | None = None
    output_norm: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Recorder:
    """Collects the pieces of the layers of one forward pass and hands complete layers on."""

    def __init__(
        self,
        layers: list[LayerModules],
        mask: Tensor,
        consume: Callable[[int, LayerTrace], None],
        attend: Attend | None,
    ):
        self.layers = layers
        self.own_attention = attend
        self.mask = mask
        self.padded = not bool(mask.all())
        self.consume = consume
        self.done = 0
        self.partial: _Partial | None = None

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        # shared layers (ALBERT) run the same modules again: one hook a module
        for module in {id(layer.attention): layer.attention for layer in self.layers}.values():
            yield module.register_forward_pre_hook(self.enter_attention, with_kwargs=True)
        for module in {id(layer.attention_norm): layer.attention_norm for layer in self.layers}.values():
            yield module.register_forward_pre_hook(self.enter_attention_norm)
        for module in {id(layer.output_norm): layer.output_norm for layer in self.layers}.values():
            yield module.register_forward_hook(self.leave_output_norm)

    def current(self, piece: str) -> _Partial:
        if self.partial is None or self.done >= len(self.layers):
            raise RuntimeError(
                f"layer {self.done}: {piece} came out of order; the encoder family's names do not fit this "
                "model, correct them with globenc.register_encoder"
            )
        return self.partial

    def elsewhere(self) -> bool:
        """Whether a hook was called by another forward pass than ours: another thread's, or one started inside."""
        return getattr(_active, "recorder", None) is not self

    def enter_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.elsewhere():
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.partial = _Partial(hidden_states)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor | None:
        """The context by an attention of our own, if there is one for this layer."""
        partial = self.current("attention")
        attended = None
        if self.own_attention is not None:
            layer, residual = self.layers[self.done], partial.hidden_states
            attended = self.own_attention(layer, residual, query, key, value, scaling)
        context, left = (None, None) if attended is None else attended
        partial.attention = {"query": query, "key": key, "value": value, "scaling": scaling, "attention": left}
        return context

    def attended(self, context: Tensor) -> None:
        self.current("attention").attention["context"] = context.flatten(2)

    def enter_attention_norm(self, module: nn.Module, args: tuple) -> None:
        if self.elsewhere():
            return
        self.current("attention_norm").attention_norm_input = args[0]

    def leave_output_norm(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.elsewhere():
            return
        partial = self.current("output_norm")
        partial.output_norm.append((args[0], output))
        if sum(piece.shape[1] for _, piece in partial.output_norm) < partial.hidden_states.shape[1]:
            return
        if not partial.attention or partial.attention_norm_input is None:
            raise RuntimeError(
                f"layer {self.done}: output_norm ran before attention and attention_norm; the encoder family's "
                "names do not fit this model, correct them with globenc.register_encoder"
            )
        inputs, outputs = zip(*partial.output_norm, strict=True)
        trace = LayerTrace(
            modules=self.layers[self.done],
            mask=self.mask.to(partial.hidden_states.device),
            padded=self.padded,
            hidden_states=partial.hidden_states,
            attention_norm_input=partial.attention_norm_input,
            output_norm_input=inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1),
            output=outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1),
            **partial.attention,
        )
        self.partial = None
        self.consume(self.done, trace)
        self.done += 1


_active = threading.local()  # .recorder: the recorder of this thread's capture, if any


class _Borrowed:
    """Attributes of shared objects changed for a while: set by the first who asks, put back by the last who leaves.

    Models share configurations and threads share models, so that saving and restoring by each capture on its own
    would put back what another one has set.
    """

    def __init__(self, attribute: str, value: Any):
        self.attribute, self.value = attribute, value
        self.lock = threading.Lock()
        self.kept: dict[int, tuple[Any, Any, int]] = {}  # id -> object, its own value, how many need the other

    def take(self, things: list[Any]) -> None:
        with self.lock:
            for thing in things:
                _, own, users = self.kept.get(id(thing), (thing, getattr(thing, self.attribute), 0))
                self.kept[id(thing)] = thing, own, users + 1
                setattr(thing, self.attribute, self.value)

    def give_back(self, things: list[Any]) -> None:
        with self.lock:
            for thing in things:
                _, own, users = self.kept.pop(id(thing))
                if users > 1:
                    self.kept[id(thing)] = thing, own, users - 1
                else:
                    setattr(thing, self.attribute, own)


_evaluating = _Borrowed("training", False)
_captured = _Borrowed("_attn_implementation_internal", ATTENTION)
_products: list[Any] = [torch.backends.cuda.matmul]
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    _products += [torch.backends.mkldnn.matmul]  # type: ignore[attr-defined, unused-ignore]
    _precise = _Borrowed("fp32_precision", "ieee")
else:  # torch < 2.9
    _precise = _Borrowed("allow_tf32", False)


@contextlib.contextmanager
def precise(device: torch.device) -> Iterator[None]:
    """Numbers keep their own precision inside, whatever the caller's autocast and TF32 settings say."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        _precise.take(_products)
        stack.callback(_precise.give_back, _products)
        yield


def _capturing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that also shows q, k, v to the recorder of this thread.

    `attention_mask` is the 2-D padding mask [B, n] or None, as flash attention takes it; another thread's forward pass
    that met a capture half-way may bring a 4-D one.
    """
    recorder = getattr(_active, "recorder", None)
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    elif attention_mask is not None and recorder is not None:
        raise ValueError(
            f"attention_mask must have shape [batch, n], got {list(attention_mask.shape)}; GlobEnc's rows need one "
            "set of real tokens per text"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = None if recorder is None else recorder.attend(query, key, value, scaling)
    if output is None:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        output = output.transpose(1, 2).contiguous()
    if recorder is not None:
        recorder.attended(output)
    return output, None


AttentionInterface.register(ATTENTION, _capturing_attention)
AttentionMaskInterface.register(ATTENTION, flash_attention_mask)


def unwrap(model: Any) -> Any:
    """The eager model behind `torch.compile(model)` and `DataParallel`."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@contextlib.contextmanager
def _as_found(modules: list[nn.Module]) -> Iterator[None]:
    """Evaluation mode and the capturing attention inside, everything as it was outside."""
    owners = (getattr(module, "config", None) for module in modules)  # layers may have a configuration of their own
    configs = list({id(config): config for config in owners if isinstance(config, PreTrainedConfig)}.values())
    training = [module for module in modules if module.training or id(module) in _evaluating.kept]
    with contextlib.ExitStack() as stack:
        _evaluating.take(training)
        stack.callback(_evaluating.give_back, training)
        _captured.take(configs)
        stack.callback(_captured.give_back, configs)
        yield


def _eager(modules: list[nn.Module]) -> contextlib.AbstractContextManager:
    """Run modules compiled in place (`module.compile()`) eagerly, so that hooks see their tensors."""
    if any(module._compiled_call_impl is not None for module in modules):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def capture(
    model: PreTrainedModel,
    layers: list[LayerModules],
    model_inputs: dict[str, Any],
    mask: Tensor,
    consume: Callable[[int, LayerTrace], None],
    attend: Attend | None = None,
) -> Any:
    """Run `model(**model_inputs)` once, without gradients and dropout, and show every layer to `consume`.

    Args:
        model: a transformers encoder of a known family, with any head.
        layers: its layers in order of execution (`find_layers`).
        model_inputs: keyword arguments of its forward.
        mask: True at real tokens, [B, n].
        consume: called with (layer index, LayerTrace) as soon as a layer is complete, in order.
        attend: an attention of our own in place of torch's.

    Returns:
        The model's own output object.

    Raises:
        RuntimeError: the family's names do not fit the model.
    """
    recorder = _Recorder(layers, mask, consume, attend)
    modules = list(model.modules())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager(modules))
        stack.enter_context(_as_found(modules))
        for handle in recorder.hooks():
            stack.callback(handle.remove)
        previous = getattr(_active, "recorder", None)
        _active.recorder = recorder
        stack.callback(setattr, _active, "recorder", previous)
        output = model(**model_inputs)
    if recorder.done != len(layers):
        raise RuntimeError(
            f"{type(model).__name__} ran {recorder.done} of its {len(layers)} encoder layers through the attention "
            "interface; its encoder family's names do not fit it, correct them with globenc.register_encoder"
        )
    return output
