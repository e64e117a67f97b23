"""Attention flow: the most that can flow from an input token to a position through the layered graph of the maps.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

_MOST = 2**30  # capacities are whole numbers of 32 bits for scipy, and so is what flows into one token


def attention_flow(maps: Any, position: int = 0) -> np.ndarray:
    """Maximum flow from every token of the input to a token of the last layer.

    Args:
        maps: local maps [layers, n, n] of one text, rows are the receiving tokens; not negative.
        position: the receiving token.

    Returns:
        [n] float64, in the maps' own unit; exact to n * 1e-9 of the largest capacity, an edge.

    Raises:
        ValueError: maps of another shape, negative or not finite; a position outside them.

    Example:
        >>> attention_flow([[[0.5, 0.5], [0.0, 1.0]], [[0.2, 0.8], [0.0, 1.0]]]).round(3).tolist()
        [0.2, 1.0]
    """
    capacities = np.asarray(maps, dtype=np.float64)
    if capacities.ndim != 3 or capacities.shape[1] != capacities.shape[2] or 0 in capacities.shape:
        raise ValueError(f"maps must have shape [layers, n, n], got {list(capacities.shape)}")
    if not bool(np.isfinite(capacities).all()) or bool((capacities < 0).any()):
        raise ValueError("maps must be finite and not negative")
    layers, n, _ = capacities.shape
    if not 0 <= position < n:
        raise ValueError(f"position must be in 0..{n - 1}, got {position}")
    largest = float(capacities.max())
    if largest == 0:
        return np.zeros(n)
    unit = max(1, _MOST // n)
    whole = np.rint(capacities / largest * unit).astype(np.int32)
    # node l * n + j is token j behind layer l; edges lead from the input upwards
    layer, receiver, source = whole.nonzero()
    graph = csr_array(
        (whole[layer, receiver, source], (layer * n + source, (layer + 1) * n + receiver)),
        shape=((layers + 1) * n, (layers + 1) * n),
    )
    flows = [maximum_flow(graph, source, layers * n + position).flow_value for source in range(n)]
    return np.array(flows) * (largest / unit)
