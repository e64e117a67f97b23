"""References: from where the chord of every activation is drawn to the text's own point.

"zero" is the frozen network's answer to empty input, "model" a text of mask tokens, "origin" the point 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .network import Answer, FrozenNetwork
from .operations import Line

REFERENCES = ("zero", "model", "origin")
MASK_TOKENS = 22  # of the text that "model" reads


def set_zero_reference(network: FrozenNetwork, answer: Answer) -> Tensor:
    """Chords from what each activation reads where all embeddings are zero; the frozen network's answer there."""
    return network.replay(torch.zeros_like(network.states[0]), answer)


def set_origin_reference(network: FrozenNetwork) -> None:
    """Chords from the origin: slope phi(h) / h, DecompX's linear activation and AttnLRP's identity rule."""
    for line in network.lines:
        _from_origin(line)


def _from_origin(line: Line) -> None:
    if bool((line.compute(line.h.new_zeros(1)) == 0).all()):
        line.from_origin()
    else:
        line.chord_from_constants(line.h.new_zeros(line.h.shape[-1]))


def set_constant_reference(network: FrozenNetwork, starts: Sequence[Tensor]) -> None:
    """Chords from constants, one vector [units] for each activation of the layers, and from the origin in the head.

    Raises:
        ValueError: the constants are of another network.
    """
    lines = network.lines[: len(starts)]
    shapes = [line.h.shape[-1:] for line in lines]
    if shapes != [start.shape for start in starts]:
        raise ValueError(
            "reference 'model' cannot be used: the model computes other activations on a text of mask tokens than on "
            "these texts (with chunk_size_feed_forward, for instance); use reference='zero'"
        )
    for line, start in zip(lines, starts, strict=True):
        if line.used:
            line.chord_from_constants(start)
    # of the head, where a text of mask tokens can be as far out on a tanh as any, and of the caller's own answer
    for line in network.lines[len(starts) :]:
        _from_origin(line)


@dataclass(frozen=True)
class _Cached:
    weights: tuple
    starts: list[Tensor]


_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[object, _Cached]] = weakref.WeakKeyDictionary()


def cached_points(model: nn.Module, key: object) -> list[Tensor] | None:
    """The constants of a model, if they have been read from these very weights."""
    entry = _CACHE.get(model, {}).get(key)
    return entry.starts if entry is not None and entry.weights == _state_of(model) else None


def cache_points(model: nn.Module, key: object, starts: list[Tensor]) -> None:
    """Note the constants of a model for the weights that it has."""
    _CACHE.setdefault(model, {})[key] = _Cached(_state_of(model), starts)


def _state_of(model: nn.Module) -> tuple:
    """What tells a model's weights from other ones: where they are, how often they were written to, some of them,
    since writes through `.data` are not counted, and the caller's hooks, which may change what is computed of them."""
    parameters = list(model.parameters())
    counters = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)
    with torch.no_grad():
        samples = torch.stack([p.flatten()[:: max(1, p.numel() // 32)].double().sum() for p in parameters])
    hooks = tuple(
        key
        for module in model.modules()
        for table in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in list(table.items())
        if not str(getattr(hook, "__module__", "")).startswith(__package__.split(".")[0] + ".")  # of other threads
    )
    return counters, tuple(samples.tolist()), hooks
