"""What an encoder layer computes in one forward pass, and the protocol of what reads it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..encoders import LayerModules

T = TypeVar("T", bound="AttentionTrace")


@dataclass(frozen=True)
class GlobalTokens:
    """Tokens with global attention (Longformer): every query sees them at any distance, and their rows are made of
    other queries, keys and values, without a window.

    Attributes:
        where: True at them, [B, n].
        query, key, value: of their rows, [B, H, n, d_h].
        scaling: factor of their scores.
    """

    where: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float

    def cut(self, n: int) -> GlobalTokens:
        """As `ScoredAttention.cut`."""
        query, key, value = (tensor[:, :, :n] for tensor in (self.query, self.key, self.value))
        return GlobalTokens(self.where[:, :n], query, key, value, self.scaling)


@dataclass(frozen=True)
class ScoredAttention:
    """Attention weights by what they are recomputed from: softmax_j(q_i k_j scaling + bias_ij) over the keys in reach.

    Attributes:
        query, key: as they enter the scores, keys of all heads, [B, H, n, d_h].
        value: [B, H, n, d_h].
        scaling: factor of the scores.
        window: a query sees keys at most this far from it; None sees all.
        bias: what is added to the scores, [B or 1, H, n, n]; None for nothing.
        global_tokens: None where no token has global attention.
        log_sum_exp: of each query's scores, [B, H, n]; None where it is not known.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None = None
    bias: Tensor | None = None
    global_tokens: GlobalTokens | None = None
    log_sum_exp: Tensor | None = None

    def cut(self, n: int) -> ScoredAttention:
        """Of the first n tokens: sparse attention reads some padding behind the inputs."""
        if self.query.shape[2] == n:
            return self
        tokens = None if self.global_tokens is None else self.global_tokens.cut(n)
        query, key, value = (tensor[:, :, :n] for tensor in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, global_tokens=tokens)


@dataclass(frozen=True)
class GivenWeights:
    """Attention weights as a family computes them in code of its own.

    Attributes:
        weights: [B, H, n, n].
        value: [B, H, n, d_h].
    """

    weights: Tensor
    value: Tensor

    def cut(self, n: int) -> GivenWeights:
        """As `ScoredAttention.cut`."""
        return GivenWeights(self.weights[:, :, :n, :n], self.value[:, :, :n])


class AttentionResult(NamedTuple):
    """What an attention returns: the context, [B, n, H, d_h], and what the layer's weights can be recomputed from."""

    context: Tensor
    attention: ScoredAttention


LayerAttention = Callable[[LayerModules, Tensor, ScoredAttention], AttentionResult | None]
"""An attention in place of torch's: the layer's modules, the residual x [B, n, d] and its inputs -> its result; None
leaves the layer to torch."""


@dataclass(frozen=True)
class LayerEnd:
    """What an encoder layer computes behind its attention block.

    Attributes:
        norm_inputs: what enters the LayerNorms there: y2, [B, n, d], alone; empty in a pre-LN layer.
        output: the layer's output, [B, n, d].
    """

    norm_inputs: tuple[Tensor, ...]
    output: Tensor


@dataclass(kw_only=True, eq=False)
class AttentionTrace:
    """What one encoder layer computes up to its feed-forward block, in the model's own dtype.

    Attributes:
        modules: the layer's modules (weights are read from them).
        attention: what its attention weights are made of, or the weights themselves.
        context: what the attention returns, heads side by side, [B, n, H * d_h].
        mask: True at real tokens, [B, n].
        padded: whether any position is padding.
        hidden_states: the residual x that is added to the attention block's output, [B, n, d].
        attention_norm_input: y1, the sum of both, [B, n, d].
        norm_ran_first: what is called the attention norm ran before the attention, so that y1 is something else; the
            trace comes at the layer's end then.
        stale_cache_flags: scalar tensors, each true where a cached tensor has turned out to be of other weights.
    """

    modules: LayerModules
    attention: ScoredAttention | GivenWeights
    context: Tensor
    mask: Tensor
    padded: bool
    hidden_states: Tensor
    attention_norm_input: Tensor
    norm_ran_first: bool = False
    stale_cache_flags: list[Tensor] = field(default_factory=list)

    @property
    def value(self) -> Tensor:
        """The value vectors, [B, H, n, d_h]."""
        return self.attention.value

    @property
    def global_tokens(self) -> GlobalTokens | None:
        """The tokens with global attention, if there are any."""
        return None if isinstance(self.attention, GivenWeights) else self.attention.global_tokens

    @property
    def norm_inputs(self) -> tuple[Tensor, ...]:
        """What enters the layer's LayerNorms, as far as it is known: y1, then y2; empty in a pre-LN layer."""
        return (self.attention_norm_input,) if self.modules.norms else ()

    @functools.cached_property
    def weight_fingerprint(self) -> tuple[Tensor, Tensor]:
        """A fixed direction p of the hidden space, [d], and p W_O, [H * d_h]: a fingerprint of what W_O does."""
        weight = self.modules.output_weight
        weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        direction = _direction(len(weight), weight.dtype, weight.device)
        return direction, direction @ weight

    def of_rows(self: T, tokens: GlobalTokens) -> T:
        """The trace that holds for the rows of tokens with global attention."""
        return replace(self, attention=ScoredAttention(tokens.query, tokens.key, tokens.value, tokens.scaling))

    def completed(self, end: LayerEnd) -> LayerTrace:
        """The trace of the whole layer."""
        return LayerTrace(**{part.name: getattr(self, part.name) for part in fields(AttentionTrace)}, end=end)


@dataclass(kw_only=True, eq=False)
class LayerTrace(AttentionTrace):
    """What one encoder layer computes in one forward pass; attributes as in `AttentionTrace` and `LayerEnd`."""

    end: LayerEnd

    @property
    def output(self) -> Tensor:
        """The layer's output, [B, n, d]."""
        return self.end.output

    @property
    def norm_inputs(self) -> tuple[Tensor, ...]:
        """What enters the layer's LayerNorms: y1 and y2, [B, n, d]; empty in a pre-LN layer."""
        return (*super().norm_inputs, *self.end.norm_inputs)


@functools.lru_cache(maxsize=64)
def _direction(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        direction = torch.linspace(1.0, 2.0, d, dtype=dtype, device=device)
        direction[1::2] *= -1
        return direction


class LayerConsumer(Protocol):
    """A reader of the layers of a forward pass, which come in order.

    The recorder hands a trace over and lets go of it: tensors that the consumer does not hold are freed before the
    model goes on.
    """

    def attention_done(self, index: int, trace: AttentionTrace) -> None:
        """Layer `index` has run its attention; its feed-forward block has not allocated anything yet."""

    def layer_done(self, index: int, end: LayerEnd) -> None:
        """Layer `index` is complete."""
