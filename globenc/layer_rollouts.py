"""The rollout made while the model runs: chosen rows from the top layer down, or whole matrices layer after layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .capture import AttentionTrace, LayerEnd, LayerTrace
from .contributions.layer_map import RolloutLayer, normalize_rows
from .contributions.layer_norms import late_scale
from .forward_pass import ForwardPass, WholeLayers
from .methods import Method
from .model_state import precise
from .rollouts import RequestedRows, full_map, multiply, top_down


class TopDownRollout:
    """The requested rows of the rollout: a consumer that holds every layer's map until the last one is there.

    A map is built right after its layer's attention where the backend can, so that queries, keys and values are freed
    before the feed-forward block allocates.
    """

    def __init__(
        self, forward_pass: ForwardPass, method: Method, rows: RequestedRows, per_layer: bool, row_normalize: bool
    ):
        self.forward_pass, self.backend = forward_pass, forward_pass.backend
        self.layers = forward_pass.encoder.layers
        self.method, self.rows = method, rows
        self.per_layer, self.row_normalize = per_layer, row_normalize
        self._maps: list[RolloutLayer] = []
        self._incomplete: dict[int, AttentionTrace] = {}

    def attention_done(self, index: int, trace: AttentionTrace) -> None:
        """As `LayerConsumer`."""
        if self.backend.maps_before_feed_forward:
            self._read(index, trace)
        else:
            self._incomplete[index] = trace

    def layer_done(self, index: int, end: LayerEnd) -> None:
        """As `LayerConsumer`."""
        if index in self._incomplete:
            self._read(index, self._incomplete.pop(index).completed(end))
            return
        scale = late_scale(self.layers[index], self.method, end)
        if scale is not None:
            self._maps[index].scale_rows(scale)

    def _read(self, index: int, trace: AttentionTrace) -> None:
        positions = self.rows.positions
        if index == len(self.layers) - 1 and positions is not None:
            self._maps.append(_ChosenRows(self.backend.top_rows(trace, self.method, positions), positions))
        else:
            self._maps.append(self.backend.layer_map(trace, self.method))
        self.forward_pass.check(trace)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mantissa [G, B, m, n] and log2 scale [G, B, m] of the requested rows; see `top_down`."""
        with torch.no_grad(), precise(self.forward_pass.mask.device):
            *below, top = self._maps
            rows = top.through(self.rows.weights, self.row_normalize)
            return top_down(rows, self.rows, reversed(below), self.row_normalize, self.per_layer)


class _ChosenRows:
    """Of the last layer's map, the rows at positions [B, m] alone, [B, m, n]."""

    def __init__(self, rows: Tensor, positions: Tensor):
        self.rows, self.positions = rows, positions

    def scale_rows(self, scale: Tensor) -> None:
        """As `RolloutLayer.scale_rows`."""
        self.rows = self.rows * scale.gather(1, self.positions)[:, :, None]

    def through(self, weights: Tensor, row_normalize: bool) -> Tensor:
        """As `RolloutLayer.through`, for weights of one at those positions."""
        return normalize_rows(self.rows) if row_normalize else self.rows


class WholeRollout(WholeLayers):
    """Every row of the rollout, multiplied layer after layer.

    Attributes:
        products: mantissa [B, n, n] and log2 scale [B, n] up to every layer, or up to the last one alone.
    """

    def __init__(self, forward_pass: ForwardPass, method: Method, per_layer: bool, row_normalize: bool):
        super().__init__(forward_pass)
        self.method, self.per_layer, self.row_normalize = method, per_layer, row_normalize
        self.products: list[tuple[Tensor, Tensor]] = []

    def read(self, trace: LayerTrace) -> None:
        """Multiply a layer's map with the product so far."""
        local = full_map(self.forward_pass.backend.layer_map(trace, self.method), self.row_normalize)
        if self.products:
            product = multiply(local, *self.products[-1])
        else:
            mask = self.forward_pass.mask
            product = multiply(local, None, torch.zeros(mask.shape, dtype=torch.float64, device=mask.device))
        if not self.per_layer:
            self.products.clear()
        self.products.append(product)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mantissa [G, B, n, n] and log2 scale [G, B, n], where G is 1 or, with `per_layer`, the number of layers."""
        mantissas, scales = zip(*self.products, strict=True)
        return torch.stack(mantissas), torch.stack(scales)
