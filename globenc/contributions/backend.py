"""Which code makes a layer's map: the equations as they stand, PyTorch, or the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..capture import Attend
from .reference_backend import reference_layer
from .torch_backend import MakeLayer, torch_layer

BACKENDS = ("auto", "reference", "torch", "triton")


def layer_maps(backend: str, mask: Tensor) -> tuple[MakeLayer, Attend | None]:
    """What makes a layer's map for texts with real tokens `mask` [B, n], and the attention that this needs, if any.

    "auto" takes the kernels where the device has them (and, layer by layer, where they know its shape), else PyTorch.
    An explicit choice never falls back.

    Raises:
        ValueError: no such backend.
        RuntimeError: backend "triton" cannot run here; the message says why.
    """
    check_backend(backend, mask.device)
    if backend == "reference":
        return reference_layer, None
    if backend == "triton" or (backend == "auto" and takes_kernels(mask.device)):
        from .triton_backend import FusedLayers  # triton is imported where it is used

        layers = FusedLayers(mask, explicit=backend == "triton")
        return layers, layers.attend
    return torch_layer, None


def check_backend(backend: str, device: torch.device) -> None:
    """Raises as `layer_maps`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton":
        reason = _kernels_missing(device)
        if reason is not None:
            raise RuntimeError(f"backend='triton' cannot run here: {reason}; use backend='torch'")


def takes_kernels(device: torch.device) -> bool:
    """Whether "auto" means the kernels on a device."""
    return device.type == "cuda" and _kernels_missing(device) is None


def _kernels_missing(device: torch.device) -> str | None:
    from globenc_kernels import unavailable_reason

    return unavailable_reason(device)
