"""Layers for the kernel tests: what a kernel is given, what the equations make of it, and how both are compared.

Whatever a launcher makes is full of NaN before a kernel writes to it, and so is all that kernels find at padding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SyntheticLayer, assert_rows_close, row_error, synthetic_layer
from torch import Tensor

from globenc import equations

pytest.importorskip("triton")

import globenc_kernels as gk

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_NAMES = {FLOAT32: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}
over_dtypes = pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.get)
TIGHT = 2e-6  # ten times what was measured for random heads, whatever the dtype of query, key and value
NAN, INF = float("nan"), float("inf")
over_bad = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's numbers on the CPU, in the dtype of a model, and what equations and kernels make of them.

    The trace is finite; the kernels find `at_padding` where `mask` is False.
    """

    trace: SyntheticLayer
    mask: Tensor
    window: int | None = None
    at_padding: float = NAN
    _factors: dict[str, gk.HeadFactors] = field(default_factory=dict, init=False)

    def given(self, name: str) -> Tensor:
        """A tensor of the trace as the kernels get it."""
        tensor = getattr(self.trace, name)
        real = self.mask[:, None, :, None] if tensor.ndim == 4 else self.mask[:, :, None]
        return tensor.masked_fill(~real, self.at_padding).to(DEVICE)

    def alpha(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Attention weights, [B, H, n, n]; zero outside the window and in padded rows."""
        query, key = self.trace.query.to(dtype), self.trace.key.to(dtype)
        alpha = equations.attention_weights(query, key, self.trace.scaling, self.mask)
        if self.window is not None:
            positions = torch.arange(query.shape[2])
            alpha = torch.where((positions[:, None] - positions).abs() <= self.window, alpha, 0.0)
            alpha = alpha / alpha.sum(-1, keepdim=True)
        return torch.where(self.mask[:, None, :, None], alpha, 0.0)

    def encoder_layer(self, dtype: torch.dtype = torch.float64) -> equations.EncoderLayer:
        """The layer as equations see it, everything computed in `dtype`."""
        trace, modules = self.trace, self.trace.modules
        norms = (modules.attention_norm, modules.output_norm)
        inputs = (trace.attention_norm_input.to(dtype), trace.output_norm_input.to(dtype))
        gamma1, gamma2 = (norm.weight.detach().to(dtype) for norm in norms)
        s1, s2 = ((y.var(-1, correction=0) + norm.eps).sqrt() for y, norm in zip(inputs, norms, strict=True))
        weight = modules.output_projection.weight.detach().to(dtype)
        return equations.EncoderLayer(
            self.alpha(dtype), trace.value.to(dtype), weight, trace.hidden_states.to(dtype),
            gamma1, s1, gamma2, s2, self.mask,
        )  # fmt: skip

    def equation_map(self, method: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """The local map by the equations in `dtype`."""
        return equations.local_map(self.encoder_layer(dtype), method)

    def transformed(self, method: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """u^h_j = M W_O^h v^h_j, [B, H, n, d]."""
        layer = self.encoder_layer(dtype)
        return linear_part(equations.transformed_values(layer.value, layer.output_weight), gammas(layer, method))

    @functools.cached_property
    def tokens(self) -> gk.TokenRanges:
        return gk.TokenRanges(self.mask.to(DEVICE))

    @functools.cached_property
    def attended(self) -> gk.AttentionOutput:
        query, key, value = map(self.given, ("query", "key", "value"))
        return gk.attention(query, key, value, self.tokens, self.trace.scaling, self.window)

    def factors(self, method: str) -> gk.HeadFactors:
        if method not in self._factors:
            self._factors[method] = gk.head_factors(self.given("value"), weight_of(self, method), self.tokens)
        return self._factors[method]

    @property
    def step(self) -> float:
        """What rounding a row's log-sum-exp to float32 does to the attention weights that are made from it.

        Where every query sees but one key the plain softmax is exact by luck, and is no measure.
        """
        seen = self.alpha() > 0
        if int(seen.sum(3).max()) == 1:
            return TIGHT
        scores = self.trace.query.double() @ self.trace.key.double().transpose(2, 3) * self.trace.scaling
        log_sum_exp = torch.where(seen, scores, -INF).logsumexp(3)
        return torch.finfo(FLOAT32).eps * max(1.0, float(log_sum_exp[seen.any(3)].abs().max()))

    def kernel_map(self, method: str = "N-Enc", **exchanged: Any) -> gk.LocalMap:
        """The map as the kernels get it; row scales and diagonal are the equations' own, so that only kernels err."""
        layer = self.encoder_layer()
        scale = torch.full_like(layer.s1, 0.5) if method == "W-FixedRes" else torch.ones_like(layer.s1)
        for s in (layer.s1, layer.s2)[: len(gammas(layer, method))]:
            scale = scale / s
        diagonal = self.equation_map(method).diagonal(dim1=1, dim2=2)
        scale, diagonal = (t.masked_fill(~self.mask, self.at_padding).float().to(DEVICE) for t in (scale, diagonal))
        return gk.LocalMap(
            **{
                "query": self.given("query"),
                "key": self.given("key"),
                "scaling": self.trace.scaling,
                "log_sum_exp": self.attended.log_sum_exp,
                "factors": None if method == "W-FixedRes" else self.factors(method),
                "row_scale": scale,
                "diagonal": diagonal,
                "tokens": self.tokens,
                "window": self.window,
                **exchanged,
            }
        )


def make_layer(
    lengths=(7,),
    heads: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = FLOAT32,
    padding: str = "right",
    window: int | None = None,
    d: int = 24,
    kind: str = "random",
    seed: int = 0,
) -> Layer:
    trace = synthetic_layer((max(lengths),) * len(lengths), heads, head_dim, d, dtype, kind, seed=seed)
    return Layer(trace, real_tokens(lengths, padding), window)


def real_tokens(lengths, padding: str = "right") -> Tensor:
    """Texts of these lengths with padding on the "right" or the "left"; "holes": on the right and in every text."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    if padding == "holes":
        mask[:, 3:-1:4] = False
        mask[0, 60:-2] = False  # also a whole block of keys
    return mask.flip(1) if padding == "left" else mask


def gammas(layer: equations.EncoderLayer, method: str) -> tuple[Tensor, ...]:
    """LayerNorm weights that a stage goes through."""
    return {"N-ResLN": (layer.gamma1,), "N-Enc": (layer.gamma1, layer.gamma2)}.get(method, ())


def linear_part(z: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """M z of vectors [a, b, c, d]: the LayerNorms without their scale."""
    for gamma in weights:
        z = equations.layer_norm_part(z, gamma, z.new_ones(z.shape[:2]))
    return z


def weight_of(layer: Layer, method: str) -> gk.GramWeight:
    exact = layer.encoder_layer()
    product = linear_part(exact.output_weight.T[None, None], gammas(exact, method))[0, 0]  # (M W_O)^T
    return gk.gram_weight(product.to(DEVICE), layer.trace.value.shape[1], layer.trace.value.dtype)


def triangles(factors: gk.HeadFactors, heads: int) -> Tensor:
    """R_j of every token, [B, n, H, H], float64."""
    batch, n = factors.key_scale.shape
    packed = factors.factor.transpose(2, 3).flatten(1, 2)[:, :n].double() * factors.key_scale.double()[..., None]
    result = torch.zeros(batch, n, heads, heads, dtype=torch.float64)
    rows, columns = torch.triu_indices(heads, heads)
    result[:, :, rows, columns] = packed.cpu()
    return result


def off_diagonal(local_map: Tensor) -> Tensor:
    return local_map.masked_fill(torch.eye(local_map.shape[-1], dtype=torch.bool), 0)


def check(actual: Tensor, plain: Tensor, exact: Tensor, step: float = 0.0) -> None:
    """No row errs more than twice as much as the plain computation's worst row does, plus a rounding step."""
    error = row_error(plain, exact)
    assert bool(torch.isfinite(error).all()), "the plain computation is no measure here"
    assert_rows_close(actual.cpu(), exact, 2 * float(error.max()) + max(step, torch.finfo(plain.dtype).eps))


def check_map(layer: Layer, method: str, actual: Tensor | None = None, tight: bool = True) -> None:
    """The kernel's map, or `actual`, against the equations: the diagonal as given, the rest measured.

    The measure is what equations in the layer's own dtype lose, or, `tight`, no more than float32 loses where nothing
    cancels, however few digits query, key and value come with.
    """
    actual = (gk.contribution_norms(layer.kernel_map(method)) if actual is None else actual).cpu()
    dtype = layer.trace.query.dtype
    exact, plain = layer.equation_map(method), layer.equation_map(method, dtype)
    assert actual.dtype == FLOAT32
    given = exact.diagonal(dim1=1, dim2=2).float()
    assert_rows_close(actual.diagonal(dim1=1, dim2=2), given, 0)
    check(off_diagonal(actual), off_diagonal(plain), off_diagonal(exact), layer.step)
    if tight:
        assert_rows_close(off_diagonal(actual), off_diagonal(exact), TIGHT)


def one_by_one(tensor: Tensor) -> Tensor:
    """Every element as a row of its own."""
    return tensor[..., None]


def same_finite(actual: Tensor, plain: Tensor) -> None:
    assert torch.equal(actual.isfinite().cpu(), plain.isfinite())


def spoil(layer: Layer, name: str, place: tuple[int, ...], bad: float) -> Layer:
    tensor = getattr(layer.trace, name).clone()
    tensor[place] = bad
    return replace(layer, trace=replace(layer.trace, **{name: tensor}))


def all_of(layer: Layer, method: str = "N-Enc") -> dict[str, Tensor]:
    """All that kernels make of a layer, by name; [B, n, ...] each."""
    local_map = layer.kernel_map(method)
    attended, heads = layer.attended, layer.trace.query.shape[1]
    n = layer.mask.shape[1]
    rows = torch.rand(len(layer.mask), 2, n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    lse = attended.log_sum_exp.movedim(4, 2).flatten(1, 2)[:, :n].flatten(2)
    results = {
        "context": attended.context,
        "diagonal_context": attended.diagonal_context,
        "diagonal_weight": attended.diagonal_weight.transpose(1, 2),
        "log_sum_exp": lse,
        "row_sums": gk.row_sums(local_map),
        "map": gk.contribution_norms(local_map),
        "rollout-m1": gk.rollout_rows(rows[:, :1], local_map).transpose(1, 2),
        "rollout-m2": gk.rollout_rows(rows, local_map).transpose(1, 2),
    }
    if local_map.factors is not None:
        results["factors"] = triangles(local_map.factors, heads)
    return {name: result.cpu() for name, result in results.items()}


def on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {name: on_device(v) for name, v in value.items()}
    return tuple(map(on_device, value)) if isinstance(value, tuple) else value


def scale_arguments(d: int, dtype: torch.dtype, width: int = 48) -> dict[str, Any]:
    """Random arguments of layer_scales, with means that are not small beside the deviations; two tokens are padding."""
    x, y1, y2 = (torch.randn(2, 5, d) * 2 + shift for shift in (0, 3, 20))
    return {
        "hidden_states": x.to(dtype),
        "norm_inputs": (y1.to(dtype), y2.to(dtype)),
        "eps": (1e-12, 1e-5),
        "context": torch.randn(2, 5, width).to(dtype),
        "check_direction": (torch.randn(d), torch.randn(width)),
        "bias": torch.randn(d).to(dtype),
        "tokens": gk.TokenRanges(real_tokens((3, 5), "left").to(DEVICE)),
    }


SIZES = [
    ((1,), 1, 16, FLOAT32),
    ((1,), 12, 64, BFLOAT16),
    ((7,), 6, 80, FLOAT32),
    ((7,), 3, 20, BFLOAT16, "right", 100),
    ((31,), 16, 32, FLOAT16),
    ((31,), 1, 128, FLOAT32, "right", 0),
    ((7,), 32, 16, FLOAT32),
    ((64, 30, 1), 1, 128, FLOAT16, "left"),
    ((65, 2, 31), 3, 64, BFLOAT16),
    ((65,), 12, 64, BFLOAT16),
    ((65, 64), 6, 64, FLOAT32, "left"),
    ((65, 7, 40), 6, 32, FLOAT16, "holes", 1),
    ((127,), 6, 16, FLOAT32, "right", 5),
    ((130, 65, 4), 3, 32, FLOAT32, "holes"),
    ((130, 99), 1, 80, BFLOAT16, "left", 64),
]


def case_id(case: tuple) -> str:
    lengths, heads, head_dim, dtype, *more = case
    name = f"B{len(lengths)}-n{max(lengths)}-H{heads}-d{head_dim}-{DTYPE_NAMES[dtype]}"
    padding, window = (*more, *("right", None)[len(more) :])
    if min(lengths) < max(lengths) or padding != "right":
        name += f"-{padding}"
    return name if window is None else f"{name}-window{window}"


@functools.cache
def layer_of_size(case: tuple) -> Layer:
    """A layer of random heads for a case of `SIZES`; its hidden size is not heads * head_dim."""
    return make_layer(*case)
