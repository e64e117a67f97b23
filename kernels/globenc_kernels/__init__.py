"""Triton kernels of globenc: an import package of its own that knows tensors and nothing of models.

It imports torch alone; triton is imported where a kernel is, so that everything but the kernels works
without it. The kernels themselves (`head_factors`, `contribution_norms`, `rollout_rows`) are not part
of this version: `unavailable_reason` says so, and the PyTorch path of `globenc` does the work.
"""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["unavailable_reason"]

MINIMUM_CAPABILITY = (8, 0)


def unavailable_reason(device: torch.device) -> str:
    """Why the kernels cannot run on a device, as a sentence without capital and full stop."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and the model is on {str(device)!r}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"it needs compute capability 8.0 or higher, and {device} has {capability[0]}.{capability[1]}"
    return "the fused kernels are not part of this version of globenc"
