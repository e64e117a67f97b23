"""The protocol of a backend, and the choice of one: the equations as written, PyTorch, or the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..capture import AttentionResult, AttentionTrace, ScoredAttention
from ..encoders import LayerModules
from ..methods import Method, Stage
from .layer_map import LayerMap
from .reference_backend import ReferenceBackend
from .torch_backend import TorchBackend

BACKENDS = ("auto", "reference", "torch", "triton")


class HeldWeights(Protocol):
    """A layer's attention weights alpha, [B, H, n, n], held for class scores; stored for short texts at most."""

    @property
    def in_memory(self) -> bool:
        """Whether they are stored, so that a product with them is the cheapest attention."""

    def product(self, value: Tensor) -> Tensor:
        """sum_j alpha_ij v_j, the context [B, n, H, d_h] of other value vectors [B, H, n, d_h]."""

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """sum_i alpha_ij g_i, [B, H, n, d] for [B, n, H, d]: what a context's gradients are of the value vectors.

        The gradients of several labels stand side by side: d is labels * d_h. They are zero at padding.
        """


class Backend(Protocol):
    """Computes the method's numbers from what a layer computed."""

    @property
    def maps_before_feed_forward(self) -> bool:
        """Whether maps, rows and mismatch can be asked for before a layer's feed-forward block has run.

        Maps and rows then lack 1 / s2, by which they are multiplied at the layer's end (`late_scale`). A backend that
        cannot needs a `LayerTrace`.
        """

    def attention(
        self, modules: LayerModules, hidden_states: Tensor, inputs: ScoredAttention
    ) -> AttentionResult | None:
        """The layer's attention from its residual x [B, n, d] and its inputs; None leaves it to torch."""

    def held_weights(self, attention: ScoredAttention, mask: Tensor | None) -> HeldWeights:
        """The attention weights of what `attention` here, or torch's, has computed; `mask`: real tokens [B, n], None
        where all are."""

    def layer_map(self, trace: AttentionTrace, method: Method) -> LayerMap:
        """The layer's local map, [B, n, n]."""

    def top_rows(self, trace: AttentionTrace, method: Method, positions: Tensor) -> Tensor:
        """Rows of the last layer's map at positions [B, m], the cheapest way there is, [B, m, n]."""

    def mixing_ratios(self, trace: AttentionTrace, stage: Stage) -> Tensor:
        """(8), (14): r_i of a stage, [B, n]; zero at padding."""

    def residual_mismatch(self, trace: AttentionTrace) -> Tensor:
        """By how much what enters the first norm is not x + W_O context + b_O, a scalar tensor; rounding stays below
        1."""


def choose_backend(name: str, mask: Tensor, layers: Sequence[LayerModules]) -> Backend:
    """The backend of that name for texts with real tokens `mask` [B, n] and a model's layers.

    "auto" takes the kernels where the device has them (and, layer by layer, where they know its shape), else PyTorch.
    An explicit choice never falls back.

    Raises:
        ValueError: no such backend.
        RuntimeError: backend "triton" cannot run here, or cannot take the model; the message says why.
    """
    check_backend(name, mask.device)
    if name == "reference":
        return ReferenceBackend()
    if name == "triton" and layers[0].custom_attention is not None:
        raise RuntimeError(
            "backend='triton' cannot take this model: it computes attention in code of its own; use "
            "backend='torch' or 'auto'"
        )
    if name == "triton" or (name == "auto" and takes_kernels(mask.device)):
        from .triton_backend import TritonBackend  # triton is imported where it is used

        return TritonBackend(mask, explicit=name == "triton")
    return TorchBackend()


def check_backend(name: str, device: torch.device) -> None:
    """Whether a backend of that name can run on a device.

    Raises:
        ValueError, RuntimeError: as `choose_backend`.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "triton":
        reason = _kernels_missing(device)
        if reason is not None:
            raise RuntimeError(f"backend='triton' cannot run here: {reason}; use backend='torch'")


def takes_kernels(device: torch.device) -> bool:
    """Whether "auto" means the kernels on a device."""
    return device.type == "cuda" and _kernels_missing(device) is None


def _kernels_missing(device: torch.device) -> str | None:
    from globenc_kernels import unavailable_reason

    return unavailable_reason(device)
