"""Where the kernels can run, and on what: asked before anything is launched."""

from __future__ import annotations

import importlib.util

import torch

from .arguments import DTYPES, HEAD_DIMS, MAX_HEADS, MAX_HIDDEN_SIZE, MAX_TOKENS

MINIMUM_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 when they were imported."""
    from triton.runtime import JITFunction

    from .layer_norms import _stage_norms_kernel

    return not isinstance(_stage_norms_kernel, JITFunction)


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, as a sentence without capital and full stop; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        if interpreted():
            return None
        return (
            "it needs a CUDA GPU, and the model is on 'cpu' (with TRITON_INTERPRET=1 in the environment the kernels "
            "run there for checking, slowly)"
        )
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs a CUDA GPU, and the model is on {str(device)!r}"
    if interpreted():
        return "TRITON_INTERPRET is set, which is for CPU tensors: unset it"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"it needs compute capability 8.0 or higher, and {device} has {capability[0]}.{capability[1]}"
    return None


def unsupported_reason(
    dtype: torch.dtype, heads: int, n: int, head_dim: int, hidden_size: int, scaling: float
) -> str | None:
    """Why the kernels cannot take a layer of this shape, in words; None: they can."""
    if dtype not in DTYPES:
        return f"it computes in {', '.join(str(d) for d in DTYPES)}, and the layer is {dtype}"
    if heads > MAX_HEADS:
        return f"it takes 1 to {MAX_HEADS} heads, and the layer has {heads}"
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"it takes heads of size {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, and the layer's have {head_dim}"
    if max(hidden_size, heads * head_dim) > MAX_HIDDEN_SIZE:
        return f"it takes hidden sizes up to {MAX_HIDDEN_SIZE}, and the layer has {max(hidden_size, heads * head_dim)}"
    if n > MAX_TOKENS:
        return f"it takes up to {MAX_TOKENS} tokens, and the text has {n}"
    if not 0 < scaling < float("inf"):
        return f"it takes positive factors of scores, and the layer's is {scaling}"
    return None
