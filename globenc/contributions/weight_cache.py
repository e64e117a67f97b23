"""Tensors computed from a layer's weights alone, cached per layer until the weights change.

A change is detected by the weights' version counters and, since writes through `.data` bypass those, by a fingerprint:
the output projection along a fixed direction, and the LayerNorm weights. On a GPU the comparison of fingerprints is not
synchronised: it is appended to `trace.stale_cache_flags`, and `ForwardPass.with_fresh_weights` computes again where one
is true.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..capture import AttentionTrace
from ..encoders import LayerModules
from ..methods import Stage
from .layer_norms import norm_weight

T = TypeVar("T")


@dataclass(frozen=True)
class _Entry:
    """A cached value with the state of the weights that it was computed from."""

    version: int | None
    fingerprint: Tensor
    value: Any


_WEIGHT_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Entry]] = weakref.WeakKeyDictionary()


def cached_per_weights(trace: AttentionTrace, stage: Stage, key: Hashable, compute: Callable[[], T]) -> T:
    """compute(), cached under `key` until the layer's output projection or the stage's LayerNorm weights change."""
    projection, norms = trace.modules.output_projection, trace.modules.norms[: stage.norms]
    key = (key, *map(id, norms))  # layers may share a projection, each with its own norms
    weight = projection.weight.detach()
    version = None if weight.is_inference() else weight._version
    projected = trace.weight_fingerprint[1]
    fingerprint = torch.cat([projected, *(norm_weight(norm, projected) for norm in norms)])
    entries = _WEIGHT_CACHE.setdefault(projection, {})
    entry = entries.get(key)
    if entry is not None and entry.version == version and not _differs(entry.fingerprint, fingerprint, trace):
        return entry.value
    value = compute()
    entries[key] = _Entry(version, fingerprint, value)
    return value


def _differs(cached: Tensor, current: Tensor, trace: AttentionTrace) -> bool:
    """Whether two fingerprints differ; on a GPU, False for now, and the answer goes to `trace.stale_cache_flags`."""
    if (cached.device, cached.dtype, cached.shape) != (current.device, current.dtype, current.shape):
        return True
    differ = (current != cached).any()
    if current.device.type == "cpu":
        return bool(differ)
    trace.stale_cache_flags.append(differ)
    return False


def invalidate(modules: LayerModules) -> None:
    """Drop what is cached of a layer's weights."""
    _WEIGHT_CACHE.pop(modules.output_projection, None)
