"""What is made of a layer's weights alone and is kept while they stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from ..capture import AttentionTrace
from ..encoders import LayerModules
from ..methods import Stage
from .layer_norms import norm_weight

_kept: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def kept(trace: AttentionTrace, stage: Stage, key: Hashable, make: Callable[[], Any]) -> Any:
    """make(), kept under `key` while the layer's output projection and the stage's LayerNorm weights stay the same.

    The same means: neither a version counter nor, because writes through `.data` pass those by, the weights' product
    with a fixed vector has changed. On a GPU nobody waits for that answer: it is left in `trace.stale_cache_flags`, and who finds
    it true calls `forget` and begins again.
    """
    modules = trace.modules
    weight = modules.output_projection.weight.detach()
    norms = modules.norms[: stage.norms]
    key = (key, *map(id, norms))  # layers may share a projection, with norms of their own
    version = None if weight.is_inference() else weight._version
    seen = torch.cat([trace.probe[1], *(norm_weight(norm, trace.probe[1]) for norm in norms)])
    things = _kept.setdefault(modules.output_projection, {})
    if key in things:
        old_version, old_seen, thing = things[key]
        like = (seen.device, seen.dtype, seen.shape)
        if version == old_version and like == (old_seen.device, old_seen.dtype, old_seen.shape):
            differ = (seen != old_seen).any()
            if seen.device.type == "cpu":
                if not bool(differ):
                    return thing
            else:
                trace.stale_cache_flags.append(differ)
                return thing
    thing = make()
    things[key] = version, seen, thing
    return thing


def forget(modules: LayerModules) -> None:
    """Drop what is kept of a layer's weights."""
    _kept.pop(modules.output_projection, None)
