"""The Triton kernels against the equations: compiled where there is a GPU, under Triton's interpreter elsewhere.

Whatever a launcher makes is full of NaN before a kernel writes to it, and so is all that kernels find at padding.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_rows_close, row_error, synthetic_trace
from torch import Tensor

from globenc import equations
from globenc.capture import LayerTrace

pytest.importorskip("triton")

import globenc_kernels as gk
from globenc_kernels import arguments, capability

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_NAMES = {FLOAT32: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}
over_dtypes = pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.get)
TIGHT = 2e-6  # ten times what was measured for random heads, whatever the dtype of query, key and value
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    """What is made without values is made of NaN: an element that no kernel writes shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def made(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's numbers on the CPU, in the dtype of a model, and what equations and kernels make of them.

    The trace is finite; the kernels find `at_padding` where `mask` is False.
    """

    trace: LayerTrace
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
    def texts(self) -> gk.Texts:
        return gk.Texts(self.mask.to(DEVICE))

    @functools.cached_property
    def attended(self) -> gk.AttentionOutput:
        query, key, value = map(self.given, ("query", "key", "value"))
        return gk.attention(query, key, value, self.texts, self.trace.scaling, self.window)

    def factors(self, method: str) -> gk.HeadFactors:
        if method not in self._factors:
            self._factors[method] = gk.head_factors(self.given("value"), weight_of(self, method), self.texts)
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
                "texts": self.texts,
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
    trace = synthetic_trace((max(lengths),) * len(lengths), heads, head_dim, d, dtype, kind, seed=seed)
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


# ---------------------------------------------------------------------------------------------- sizes and dtypes

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


@pytest.fixture(scope="module", params=SIZES, ids=case_id)
def layer(request) -> Layer:
    """A layer of random heads; its hidden size is not heads * head_dim."""
    return make_layer(*request.param)


def test_attention(layer):
    trace, mask, attended = layer.trace, layer.mask, layer.attended
    dtype = trace.query.dtype

    def contexts(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        alpha, value = layer.alpha(dtype), trace.value.to(dtype)
        own = alpha.diagonal(dim1=2, dim2=3)[..., None] * value
        return (alpha @ value).transpose(1, 2)[mask], own.transpose(1, 2)

    assert attended.context.dtype == attended.own_context.dtype == dtype
    (plain, plain_own), (exact, exact_own) = contexts(dtype), contexts(torch.float64)
    check(attended.context.cpu()[mask], plain, exact)
    check(attended.own_context, plain_own, exact_own, layer.step)  # zero at padding, like the equations'
    rounding = torch.finfo(dtype).eps / 2
    assert_rows_close(attended.own_context.cpu(), exact_own, TIGHT + rounding)

    assert attended.own_weight.dtype == attended.log_sum_exp.dtype == FLOAT32
    plain, exact = (layer.alpha(dtype).diagonal(dim1=2, dim2=3) for dtype in (FLOAT32, torch.float64))
    check(attended.own_weight, plain, exact, layer.step)


def test_log_sum_exp(layer):
    """exp2 of a score less its row's log-sum-exp is the attention weight: that is all it is for."""
    trace = layer.trace
    batch, heads, n, _ = trace.query.shape
    lse = layer.attended.log_sum_exp.cpu()
    assert lse.shape == (batch, -(-n // 64), heads, 2, 64)
    largest, log_total = lse.permute(3, 0, 2, 1, 4).flatten(3)[..., :n, None].double()
    base = torch.log(torch.tensor(2.0, dtype=torch.float64))
    lse = largest * trace.scaling / base + log_total
    scores = trace.query.double() @ trace.key.double().transpose(2, 3) * trace.scaling
    exact, plain = layer.alpha(), layer.alpha(FLOAT32)
    seen = exact > 0
    weights = torch.exp(scores - lse.double() * torch.log(torch.tensor(2.0, dtype=torch.float64)))
    rows = layer.mask[:, None].expand(-1, heads, -1)
    check(torch.where(seen, weights, 0.0)[rows], plain[rows], exact[rows], layer.step)


def test_head_factors(layer):
    """R_j^T R_j are the inner products of u^h_j = M W_O^h v^h_j."""
    heads = layer.trace.value.shape[1]

    def inner_products(dtype: torch.dtype) -> Tensor:
        u = layer.transformed("N-Enc", dtype)
        return torch.einsum("bhjd,bkjd->bjhk", u, u)

    factors = layer.factors("N-Enc")
    assert factors.factor.dtype == factors.key_scale.dtype == FLOAT32
    r = triangles(factors, heads)
    exact = inner_products(torch.float64)
    length = exact.diagonal(dim1=2, dim2=3).sqrt()
    size = length[..., None] * length[..., None, :]
    actual, plain = (r.transpose(2, 3) @ r) / size, (inner_products(FLOAT32) / size).float()
    if layer.trace.value.dtype == FLOAT32:
        check(actual[layer.mask], plain[layer.mask], (exact / size)[layer.mask])
    assert_rows_close(actual[layer.mask], (exact / size)[layer.mask], 2 * TIGHT)
    scale, longest = factors.key_scale.cpu()[layer.mask].double(), length.amax(-1)[layer.mask]
    assert bool((scale.log2() % 1 == 0).all()), "powers of two"
    assert bool(((longest / scale > 0.99) & (longest / scale < 2.01)).all())


@pytest.mark.parametrize("method", ["N-Enc", "W-FixedRes"])
def test_map_and_rows_of_it(layer, method):
    """The whole map, its row sums, and one and two target rows through it."""
    local_map = layer.kernel_map(method)
    check_map(layer, method, gk.contribution_norms(local_map))

    exact, plain = layer.equation_map(method), layer.equation_map(method, FLOAT32)
    sums = gk.row_sums(local_map)
    check(one_by_one(sums), one_by_one(plain.sum(-1)), one_by_one(exact.sum(-1)), layer.step)
    assert_rows_close(one_by_one(sums).cpu(), one_by_one(exact.sum(-1)), TIGHT)
    for m in (1, 2) if method == "N-Enc" else (1,):
        rows = torch.rand(len(exact), m, exact.shape[-1])
        actual = gk.rollout_rows(rows.to(DEVICE), local_map)
        assert actual.dtype == FLOAT32
        check(actual, rows @ plain, rows.double() @ exact, layer.step)
        assert_rows_close(actual.cpu(), rows.double() @ exact, TIGHT)


@pytest.mark.parametrize("stage", ["N", "N-Res", "N-ResLN"])
def test_other_stages(stage):
    check_map(make_layer((40, 9)), stage)


@pytest.mark.parametrize("m", [1, 2, 16, 17, 32, 33, 40], ids=lambda m: f"m{m}")
def test_target_rows(rolled, m):
    layer, local_map = rolled
    rows = torch.rand(2, 40, 65)[:, :m]  # not contiguous, not zero at padding
    exact = layer.equation_map("N-Enc")
    actual = gk.rollout_rows(rows.to(DEVICE), local_map)
    assert actual.shape == (2, m, 65)
    check(actual, rows @ layer.equation_map("N-Enc", FLOAT32), rows.double() @ exact, layer.step)


@pytest.fixture(scope="module")
def rolled() -> tuple[Layer, gk.LocalMap]:
    """A layer of a few blocks, and its map."""
    layer = make_layer((65, 50), heads=2)
    return layer, layer.kernel_map()


@pytest.mark.parametrize("m", [1, 3], ids=lambda m: f"m{m}")
@pytest.mark.parametrize("used", [(0, 65), (0, 1), (33, 34), (64, 65), (20, 50), (0, 0), (40, 40)], ids=str)
def test_used_rows(rolled, m, used):
    """Rows that are zero but for a range: the same result, and no other tile is looked at."""
    layer, local_map = rolled
    positions = torch.arange(65)
    rows = torch.rand(2, m, 65) * ((positions >= used[0]) & (positions < used[1]))
    expected = rows.double() @ layer.equation_map("N-Enc")
    tile = local_map.tiles(1 if m == 1 else 16).q
    rows = rows.masked_fill((positions < used[0] // tile * tile) | (positions >= -(-used[1] // tile) * tile), NAN)
    actual = gk.rollout_rows(rows.to(DEVICE), local_map, torch.tensor([used, used], dtype=torch.int32, device=DEVICE))
    assert_rows_close(actual.cpu(), expected, TIGHT)


def test_used_rows_of_each_text(rolled):
    layer, local_map = rolled
    rows = torch.zeros(2, 1, 65)
    rows[0, 0, 64], rows[1, 0, 2] = 1.0, 1.0
    used = torch.tensor([[64, 65], [2, 3]], dtype=torch.int32, device=DEVICE)
    actual = gk.rollout_rows(rows.to(DEVICE), local_map, used).cpu()
    assert_rows_close(actual, rows.double() @ layer.equation_map("N-Enc"), TIGHT)
    wrong = gk.rollout_rows(rows.to(DEVICE), local_map, used.flip(0)).cpu()
    with pytest.raises(AssertionError, match="row error"):
        assert_rows_close(wrong, rows.double() @ layer.equation_map("N-Enc"), TIGHT)


@pytest.mark.parametrize("stage", ["N", "N-Res", "N-ResLN", "N-Enc"])
def test_by_kernels_alone(stage):
    """A layer's map with scales and diagonal from the kernels too, and two layers of rollout, in float32."""
    layer = make_layer((9, 5))
    exact, modules = layer.encoder_layer(), layer.trace.modules
    norms = (modules.attention_norm, modules.output_norm)
    weight, bias = (p.detach().to(DEVICE) for p in modules.output_projection.parameters())
    scales = gk.layer_scales(
        layer.given("hidden_states"),
        (layer.given("attention_norm_input"), layer.given("output_norm_input")),
        (norms[0].eps, norms[1].eps),
        layer.attended.context.flatten(2),
        (torch.ones(24, device=DEVICE), weight.sum(0)),
        bias,
        layer.texts,
    )
    through = len(gammas(exact, stage))
    row_scale = (torch.ones_like(scales.gap), scales.scale1, scales.scale2)[through]
    own = layer.attended.own_context.flatten(2) @ weight.T
    residual = None if stage == "N" else layer.given("hidden_states")
    weights = tuple(norm.weight.detach().to(DEVICE) for norm in norms[:through])
    diagonal = gk.stage_norms(own, residual, weights, row_scale)
    local_map = layer.kernel_map(stage, row_scale=row_scale, diagonal=diagonal)
    check(gk.contribution_norms(local_map), layer.equation_map(stage, FLOAT32), layer.equation_map(stage), layer.step)

    rows = torch.eye(9)[None, :2].expand(2, -1, -1)  # the first two tokens
    once = gk.rollout_rows(rows.to(DEVICE), local_map)
    twice = gk.rollout_rows(once, local_map)
    plain, expected = (
        equations.rollout(torch.stack([layer.equation_map(stage, dtype)] * 2))[1, :, :2]
        for dtype in (FLOAT32, torch.float64)
    )
    check(twice, plain, expected, layer.step)


# ---------------------------------------------------------------------------------- the checks above can fail


@pytest.fixture(scope="module")
def right() -> tuple[Layer, gk.LocalMap]:
    """A layer whose map passes."""
    layer = make_layer((17, 9), window=10)
    check_map(layer, "N-Enc")
    return layer, layer.kernel_map()


@pytest.mark.parametrize(
    "wrong",
    ["log_sum_exp", "factor", "key_scale", "row_scale", "diagonal", "scaling", "query", "texts", "window"],
)
def test_a_wrong_map_is_found(right, wrong):
    layer, good = right
    last = good.factors.factor.clone()
    last[0, 0, -1, 7] *= 1.001  # one number of one token
    changed = {
        "log_sum_exp": {"log_sum_exp": good.log_sum_exp + 1e-5},
        "factor": {"factors": replace(good.factors, factor=last)},
        "key_scale": {"factors": replace(good.factors, key_scale=good.factors.key_scale * 2)},
        "row_scale": {"row_scale": good.row_scale * (1 + 1e-5)},
        "diagonal": {"diagonal": good.diagonal * (1 + 1e-6)},
        "scaling": {"scaling": good.scaling * (1 + 1e-5)},
        "query": {"query": good.query.flip(1)},
        "texts": {"texts": gk.Texts(real_tokens((17, 8)).to(DEVICE))},
        "window": {"window": 9},
    }[wrong]
    with pytest.raises(AssertionError, match="row error"):
        check_map(layer, "N-Enc", gk.contribution_norms(replace(good, **changed)))


def test_the_check_can_fail():
    exact = torch.rand(3, 5, dtype=torch.float64)
    plain = exact.float()
    check(plain, plain, exact)
    for bad in (plain * (1 + 1e-6), plain.clone().fill_(NAN), torch.zeros_like(plain)):
        with pytest.raises(AssertionError, match="row error"):
            check(bad, plain, exact)
    with pytest.raises(AssertionError, match="no measure"):
        check(plain, plain * INF, exact)


def test_outputs_are_poisoned():
    for made in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(2, dtype=FLOAT16)):
        assert bool(made.isnan().all())
    assert not torch.ones(3, dtype=torch.int32).new_empty(2).is_floating_point()
    # what stands behind the last query is nobody's: it still holds what it was made of
    assert bool(make_layer((7,)).attended.log_sum_exp[..., 7:].isnan().all())


# ------------------------------------------------------------------------------ padding, strides, the same again


def all_of(layer: Layer, method: str = "N-Enc") -> dict[str, Tensor]:
    """All that kernels make of a layer, by name; [B, n, ...] each."""
    local_map = layer.kernel_map(method)
    attended, heads = layer.attended, layer.trace.query.shape[1]
    n = layer.mask.shape[1]
    rows = torch.rand(len(layer.mask), 2, n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    lse = attended.log_sum_exp.movedim(4, 2).flatten(1, 2)[:, :n].flatten(2)
    results = {
        "context": attended.context,
        "own_context": attended.own_context,
        "own_weight": attended.own_weight.transpose(1, 2),
        "log_sum_exp": lse,
        "row_sums": gk.row_sums(local_map),
        "map": gk.contribution_norms(local_map),
        "rollout-m1": gk.rollout_rows(rows[:, :1], local_map).transpose(1, 2),
        "rollout-m2": gk.rollout_rows(rows, local_map).transpose(1, 2),
    }
    if local_map.factors is not None:
        results["factors"] = triangles(local_map.factors, heads)
    return {name: result.cpu() for name, result in results.items()}


@pytest.mark.parametrize(
    ("padding", "window", "dtype"),
    [
        pytest.param("right", None, FLOAT32, id="right-fp32"),
        pytest.param("left", 3, FLOAT32, id="left-window3-fp32"),
        pytest.param("left", None, BFLOAT16, id="left-bf16"),
        pytest.param("holes", None, FLOAT32, id="holes-fp32"),
        pytest.param("holes", 3, FLOAT16, id="holes-window3-fp16"),
    ],
)
def test_what_stands_at_padding_changes_nothing(padding, window, dtype):
    """Not one bit of a real token's result; and padding gets zeros."""
    layer = make_layer((70, 9), dtype=dtype, padding=padding, window=window, heads=1)
    expected = all_of(replace(layer, at_padding=0.0))
    found = all_of(layer)  # with NaN there
    for name, result in found.items():
        assert torch.equal(result[layer.mask], expected[name][layer.mask]), name
        if name not in ("context", "log_sum_exp", "factors"):
            assert not bool(result[~layer.mask].any()), name
    assert not bool(found["map"].transpose(1, 2)[~layer.mask].any())


def test_a_text_alone():
    """A text gets what it gets without the others and without its padding."""
    lengths = (65, 31)
    layer = make_layer(lengths, padding="left")
    together = all_of(layer)
    names = ("query", "key", "value", "hidden_states", "attention_norm_input", "output_norm_input")
    for b, length in enumerate(lengths):
        parts = {name: getattr(layer.trace, name)[b : b + 1, ..., -length:, :] for name in names}
        alone = Layer(replace(layer.trace, **parts), torch.ones(1, length, dtype=torch.bool))
        check_map(alone, "N-Enc", together["map"][b : b + 1, -length:, -length:])


@pytest.mark.parametrize("method", ["N-Enc", "W-FixedRes"])
def test_no_real_token(method):
    """A text of padding gets zeros everywhere, and the text beside it is none the worse."""
    layer = make_layer((70, 70), heads=2, dtype=BFLOAT16)
    layer = replace(layer, mask=layer.mask & torch.tensor([[True], [False]]))
    results = all_of(layer, method)
    for name in set(results) - {"context", "log_sum_exp", "factors"}:
        assert not bool(results[name][1].any()), name
        assert bool(results[name][0].isfinite().all()), name


def fused(tensor: Tensor) -> Tensor:
    """A view of one tensor [batch, n, 3, heads, head_dim], as one projection for all three leaves it."""
    return torch.stack([tensor.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)


@functools.cache
def twins(dtype: torch.dtype) -> tuple[Layer, dict[str, Tensor]]:
    """A layer whose two texts have the same queries, keys and values; and all that kernels make of it."""
    layer = make_layer((17, 17), heads=2, dtype=dtype)
    first = {name: getattr(layer.trace, name)[:1].repeat(2, 1, 1, 1) for name in ("query", "key", "value")}
    layer = replace(layer, trace=replace(layer.trace, **first))
    return layer, all_of(layer)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads-first": Tensor.contiguous,
    "tokens-first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "fused": fused,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "expanded": lambda t: t.transpose(1, 2)[:1].contiguous().expand(len(t), -1, -1, -1).transpose(1, 2),
}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(layout, dtype, id=f"{layout}-{DTYPE_NAMES[dtype]}")
        for layout in LAYOUTS
        for dtype in ((FLOAT32, BFLOAT16) if layout in ("fused", "expanded") else (FLOAT32,))
    ],
)
def test_strides(layout, dtype):
    """Where the numbers lie in memory changes no bit."""
    names, (layer, expected) = ("query", "key", "value"), twins(dtype)

    class Laid(Layer):
        def given(self, name: str) -> Tensor:
            tensor = super().given(name)
            return LAYOUTS[layout](tensor) if name in names else tensor

    laid = Laid(layer.trace, layer.mask)
    tensor = laid.given("query")
    assert torch.equal(tensor, layer.given("query"))
    copied = arguments.heads_last(tensor).data_ptr() != tensor.data_ptr()
    assert copied == (layout in ("heads-first", "transposed", "sliced", "expanded"))
    for name, result in all_of(laid).items():
        assert torch.equal(result, expected[name]), name


def test_other_arguments_may_be_strided():
    layer = make_layer((33, 33), heads=2)
    good = layer.kernel_map()

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, NAN)], -1)[..., 0]

    factors = gk.HeadFactors(strided(good.factors.factor), strided(good.factors.key_scale))
    names = ("log_sum_exp", "row_scale", "diagonal")
    other = replace(good, factors=factors, **{name: strided(getattr(good, name)) for name in names})
    rows = torch.rand(2, 3, 33, device=DEVICE)
    assert torch.equal(gk.rollout_rows(rows, good), gk.rollout_rows(strided(rows), other))
    y, gamma = torch.rand(2, 5, 24, device=DEVICE), torch.rand(24, device=DEVICE)
    assert torch.equal(gk.stage_norms(y, y, (gamma,)), gk.stage_norms(strided(y), strided(y), (strided(gamma),)))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=DTYPE_NAMES.get)
def test_the_same_call_gives_the_same_bits(dtype):
    layer = make_layer((70, 9), heads=1, dtype=dtype)
    first, second = all_of(layer), all_of(replace(layer))  # a new object keeps nothing of the old one
    for name, result in first.items():
        assert torch.equal(result[layer.mask], second[name][layer.mask]), name


# --------------------------------------------------------------------------------------------- awkward numbers

KINDS = ["cancel", "staircase", "low-rank", "repeat", "zero-values", "zero-head", "more-heads-than-d"]


def awkward_layer(kind: str, dtype: torch.dtype, seed: int = 0) -> Layer:
    d = 3 if kind == "more-heads-than-d" else 24
    named = kind not in ("zero-head", "more-heads-than-d")
    layer = make_layer((13,), heads=4, dtype=dtype, d=d, kind=kind if named else "random", seed=seed)
    if kind == "zero-head":
        with torch.no_grad():
            layer.trace.modules.output_projection.weight[:, 16:32] = 0
    return layer


@over_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_heads(kind, dtype):
    """Heads that cancel, repeat or are zero: never worse than twice the direct sum in the same dtype.

    In half precision neither values nor factors have the digits that are left where heads cancel, or depend on each
    other; where they only repeat or are zero, nothing is lost.
    """
    for seed in range(2 if dtype == FLOAT32 else 1):
        layer = awkward_layer(kind, dtype, seed)
        local_map = layer.kernel_map("N")
        check_map(layer, "N", gk.contribution_norms(local_map), tight=False)
        if kind in ("repeat", "zero-values", "zero-head"):
            check_map(layer, "N", gk.contribution_norms(local_map))


def test_awkward_heads_do_cancel():
    """What that is for: the float16 sum has no digit left, and the float32 one has lost three."""
    for dtype, lost in ((FLOAT16, 1e-1), (FLOAT32, 1e-5)):
        layer = awkward_layer("cancel", dtype)
        error = row_error(off_diagonal(layer.equation_map("N", dtype)), off_diagonal(layer.equation_map("N")))
        assert float(error.max()) > lost, dtype


@over_dtypes
def test_zero_values(dtype):
    """Zeros are written, not left as they were found."""
    layer = make_layer((5, 3), heads=2, dtype=dtype, kind="zero-values")
    assert not bool(layer.attended.context.cpu()[layer.mask].any())
    assert not bool(layer.attended.own_context.any())
    assert not bool(gk.contribution_norms(layer.kernel_map("N")).any())


def test_values_that_vanish():
    """Heads shorter than float32's smallest normal number are as good as zero, and never NaN."""
    layer = make_layer((5,), heads=2)
    layer = replace(layer, trace=replace(layer.trace, value=layer.trace.value * 1e-20))
    with torch.no_grad():
        layer.trace.modules.output_projection.weight.mul_(1e-20)
    local_map = off_diagonal(gk.contribution_norms(layer.kernel_map("N")).cpu())
    assert bool((local_map <= 1e-38).all())


@pytest.mark.parametrize("power", [-8, 8], ids=lambda p: f"1e{p}")
@pytest.mark.parametrize(
    ("what", "dtype"),
    [
        pytest.param(what, dtype, id=f"{what}-{DTYPE_NAMES[dtype]}")
        for what in ("value", "output_projection", "attention_norm", "output_norm", "one-head")
        for dtype in ((FLOAT32,) if what.endswith("norm") else (FLOAT32, BFLOAT16))
    ],
)
def test_scales(what, power, dtype):
    layer = make_layer((9,), heads=2, dtype=dtype)
    if what == "value":
        layer = replace(layer, trace=replace(layer.trace, value=layer.trace.value * 10.0**power))
    else:
        with torch.no_grad():
            weight = getattr(layer.trace.modules, "output_projection" if what == "one-head" else what).weight
            (weight[:, :16] if what == "one-head" else weight).mul_(10.0**power)
    check_map(layer, "N-Enc")


@over_dtypes
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8], ids=lambda s: f"{s:g}")
def test_gram_weight(dtype, scale):
    """The parts add up to P of heads of any size."""
    product = torch.randn(3 * 20, 24, dtype=torch.float64)
    product[:20] *= scale
    product[40:] = 0
    weight = gk.gram_weight(product.to(DEVICE), 3, dtype)
    assert weight.parts.dtype == {FLOAT32: torch.float64}.get(dtype, dtype)
    assert bool((weight.head_scale.log2() % 1 == 0).all())
    size = weight.head_scale.cpu().double()
    total = weight.parts.cpu().double().sum(0) * (size[:, None] * size)[:, :, None, None]
    exact = (product @ product.T).view(3, 20, 3, 20).transpose(1, 2)
    assert_rows_close(total.flatten(2), exact.flatten(2), 1e-15 if dtype == FLOAT32 else 2.0**-22)


# ------------------------------------------------------------------------------- NaN and Inf of real activations


def spoil(layer: Layer, name: str, place: tuple[int, ...], bad: float) -> Layer:
    tensor = getattr(layer.trace, name).clone()
    tensor[place] = bad
    return replace(layer, trace=replace(layer.trace, **{name: tensor}))


over_bad = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("method", ["N-Enc", "W-FixedRes"])
def test_bad_activations_are_seen(name, bad, method):
    """Attention, map, row sums and rollout are NaN or infinite wherever the equations are, and nowhere else."""
    layer = spoil(make_layer((9, 5), heads=2), name, (0, 1, 3, 5), bad)
    mask, alpha = layer.mask, layer.alpha(FLOAT32)
    context = (alpha @ layer.trace.value).transpose(1, 2)
    assert not bool(context.isfinite().all())
    same_finite(layer.attended.context.cpu()[mask], context[mask])
    same_finite(layer.attended.own_weight, alpha.diagonal(dim1=2, dim2=3))

    expected = off_diagonal(layer.equation_map(method, FLOAT32))
    local_map = layer.kernel_map(method, diagonal=torch.ones(2, 9, device=DEVICE))
    same_finite(off_diagonal(gk.contribution_norms(local_map).cpu()), expected)
    same_finite(gk.row_sums(local_map), expected.sum(2))
    for m in (1, 2):
        rows = torch.rand(2, m, 9) + 0.1
        actual = gk.rollout_rows(rows.to(DEVICE), local_map).cpu()
        same_finite(actual.transpose(1, 2)[mask], (rows @ expected).transpose(1, 2)[mask])


def same_finite(actual: Tensor, plain: Tensor) -> None:
    assert torch.equal(actual.isfinite().cpu(), plain.isfinite())


@pytest.mark.parametrize("n", [1, 20], ids=lambda n: f"n{n}")
def test_a_row_without_any_score(n):
    """Inf times a negative number at every key: scores of -Inf are not padding, and their row is NaN."""
    layer = make_layer((n,), heads=2)
    layer.trace.key[:, 1, :, 5] = layer.trace.key[:, 1, :, 5].abs().neg()
    layer = spoil(layer, "query", (0, 1, 0, 5), INF)
    assert bool(layer.alpha(FLOAT32)[0, 1, 0].isnan().all())
    attended = layer.attended
    assert bool(attended.context[0, 0, 1].isnan().all())
    assert bool(attended.own_context[0, 0, 1].isnan().all())
    assert bool(attended.own_weight[0, 1, 0].isnan())
    local_map = layer.kernel_map("N", diagonal=torch.ones(1, n, device=DEVICE))
    assert bool(gk.contribution_norms(local_map)[0, 0, 1:].isnan().all())


@over_bad
def test_bad_values_are_seen_in_factors(bad):
    layer = spoil(make_layer((20, 9), heads=3), "value", (0, 1, 3, 5), bad)
    r = triangles(layer.factors("N-Enc"), 3)
    assert bool(r[0, 3, :, 1].isnan().any())
    assert bool((r[0, 3] @ torch.ones(3, dtype=torch.float64)).isnan().any())
    finite = layer.mask.clone()
    finite[0, 3] = False
    assert bool(r[finite].isfinite().all())


@pytest.mark.parametrize("name", ["row_scale", "diagonal", "log_sum_exp", "rows"])
def test_bad_scales_are_seen(name):
    """NaN in one number of one query: in its row of the map, and in all that the row goes into."""
    layer = make_layer((9, 5), heads=2)
    good = layer.kernel_map()
    rows = torch.rand(2, 2, 9, device=DEVICE)
    if name == "rows":
        rows[0, 1, 3] = NAN
        local_map = good
    else:
        tensor = getattr(good, name).clone()
        tensor[(0, 0, 1, 1, 3) if name == "log_sum_exp" else (0, 3)] = NAN
        local_map = replace(good, **{name: tensor})
        expected = torch.zeros(9, dtype=torch.bool)
        expected[3 if name == "diagonal" else slice(None)] = True
        if name != "diagonal":
            expected[3] = False  # the diagonal is given
        found = gk.contribution_norms(local_map).cpu().isnan()
        assert torch.equal(found[0, 3], expected)
        assert int(found.sum()) == int(expected.sum())
        assert torch.equal(gk.row_sums(local_map).cpu()[0].isnan().nonzero().flatten(), torch.tensor([3]))
    rolled = gk.rollout_rows(rows, local_map).cpu().isnan()
    if name == "rows":
        assert bool(rolled[0, 1].all())
        assert not bool(rolled[0, 0].any())
    else:
        assert torch.equal(rolled[0], expected.expand(2, -1))
    assert not bool(rolled[1].any())


# ------------------------------------------------------------------------------------------------ layer norms


over_widths = pytest.mark.parametrize(
    ("d", "dtype"),
    [
        pytest.param(d, dtype, id=f"d{d}-{DTYPE_NAMES[dtype]}")
        for d, dtype in ((2, FLOAT32), (24, FLOAT16), (80, FLOAT32), (768, BFLOAT16), (1000, FLOAT32), (4096, FLOAT32))
    ],
)


def scale_arguments(d: int, dtype: torch.dtype, width: int = 48) -> dict[str, Any]:
    """Random arguments of layer_scales, with means that are not small beside the deviations; two tokens are padding."""
    x, y1, y2 = (torch.randn(2, 5, d) * 2 + shift for shift in (0, 3, 20))
    return {
        "hidden_states": x.to(dtype),
        "norm_inputs": (y1.to(dtype), y2.to(dtype)),
        "eps": (1e-12, 1e-5),
        "context": torch.randn(2, 5, width).to(dtype),
        "probe": (torch.randn(d), torch.randn(width)),
        "bias": torch.randn(d).to(dtype),
        "texts": gk.Texts(real_tokens((3, 5), "left").to(DEVICE)),
    }


def on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {name: on_device(v) for name, v in value.items()}
    return tuple(map(on_device, value)) if isinstance(value, tuple) else value


def scales_by_hand(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    x, context = given["hidden_states"].to(dtype), given["context"].to(dtype)
    y1, y2 = (y.to(dtype) for y in given["norm_inputs"])
    p, projected = (t.to(dtype) for t in given["probe"])
    s1, s2 = ((y.var(-1, correction=0) + eps).sqrt() for y, eps in zip((y1, y2), given["eps"], strict=True))
    bias = 0 if given["bias"] is None else given["bias"].to(dtype)
    gap = ((y1 - x - bias) @ p - context @ projected).abs()
    gap = gap / ((x.norm(dim=-1) + y1.norm(dim=-1)) * p.norm() / len(p) ** 0.5)
    return {"scale1": 1 / s1, "scale2": 1 / (s1 * s2), "gap": gap * given["texts"].mask.cpu()}


@over_widths
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_layer_scales(d, dtype, bias):
    given = scale_arguments(d, dtype)
    if not bias:
        given["bias"] = None
    actual = gk.layer_scales(**on_device(given))
    plain, exact = scales_by_hand(given, FLOAT32), scales_by_hand(given, torch.float64)
    for name in ("scale1", "scale2"):
        check(one_by_one(getattr(actual, name)), one_by_one(plain[name]), one_by_one(exact[name]))
    # a gap is a difference: its error is relative to the vectors' lengths, not to itself
    assert float((actual.gap.cpu() - exact["gap"]).abs().max()) < 5e-6
    assert float(exact["gap"].max()) > 1e-2
    assert not bool(actual.gap.cpu()[~given["texts"].mask.bool().cpu()].any())


def test_gap_of_a_consistent_layer():
    """Nothing but attention and bias between residual and LayerNorm 1: no gap; something else: its part along p."""
    layer = make_layer((5, 5))
    trace, projection = layer.trace, layer.trace.modules.output_projection
    p = torch.randn(24)
    given = {
        "hidden_states": trace.hidden_states,
        "eps": (1e-12, 1e-5),
        "context": trace.context,
        "probe": (p, p @ projection.weight.detach()),
        "bias": projection.bias.detach(),
        "texts": layer.texts,
    }

    def gap(y1: Tensor, **changed: Any) -> Tensor:
        return gk.layer_scales(**on_device({**given, "norm_inputs": (y1, trace.output_norm_input), **changed})).gap

    assert float(gap(trace.attention_norm_input).max()) < 1e-6
    assert float(gap(trace.attention_norm_input + 0.01 * p).min()) > 1e-4
    assert float(gap(trace.attention_norm_input, bias=None).min()) > 1e-4
    silent = {name: torch.zeros_like(given[name]) for name in ("hidden_states", "context")}
    assert not bool(gap(torch.zeros(2, 5, 24), bias=None, **silent).any())  # zero of zero


@over_bad
@pytest.mark.parametrize(
    ("which", "spoiled"),
    [
        ("hidden_states", {"gap"}),
        ("attention_norm_input", {"scale1", "scale2", "gap"}),
        ("output_norm_input", {"scale2"}),
        ("context", {"gap"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_activations_are_seen_in_layer_scales(which, spoiled, bad):
    given = scale_arguments(24, FLOAT32)
    y1, y2 = given["norm_inputs"]
    {**given, "attention_norm_input": y1, "output_norm_input": y2}[which][1, 2, 3] = bad
    scales = gk.layer_scales(**on_device(given))
    for name in ("scale1", "scale2", "gap"):
        finite = torch.ones(2, 5, dtype=torch.bool)
        finite[1, 2] = name not in spoiled
        same_finite(getattr(scales, name), torch.where(finite, 0.0, NAN))


@pytest.mark.parametrize("through", [0, 1, 2], ids=["no-norm", "one-norm", "two-norms"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@over_widths
def test_stage_norms(d, dtype, residual, through):
    y, x = (torch.randn(2, 5, d).to(dtype) for _ in range(2))
    weights, scale = tuple(torch.randn(d) for _ in range(through)), torch.rand(2, 5)

    def by_hand(dtype: torch.dtype) -> Tensor:
        z = y.to(dtype) + x.to(dtype) if residual else y.to(dtype)
        norms = linear_part(z[:, :, None], tuple(gamma.to(dtype) for gamma in weights)).norm(dim=-1)
        return norms * scale.to(dtype)[..., None] if residual else norms

    extra = (x, weights, scale) if residual else (None, weights)
    actual = gk.stage_norms(*on_device((y, *extra)))
    check(one_by_one(actual), by_hand(FLOAT32), by_hand(torch.float64))


@pytest.mark.parametrize("power", [-30, -8, 8, 30], ids=lambda p: f"1e{p}")
def test_stage_norms_of_any_scale(power):
    """No square leaves float32's range."""
    y, scale = torch.randn(2, 5, 24), 10.0**power
    for vectors, gamma in ((y * scale, torch.ones(24)), (y, torch.full((24,), scale))):
        exact = linear_part(vectors.double()[:, :, None], (gamma.double(),)).norm(dim=-1)
        assert_rows_close(gk.stage_norms(*on_device((vectors, None, (gamma,))))[..., None].cpu(), exact, TIGHT)
    assert not bool(gk.stage_norms(torch.zeros(2, 5, 24, device=DEVICE), None, ()).any())


@over_bad
@pytest.mark.parametrize("through", [0, 1, 2], ids=["no-norm", "one-norm", "two-norms"])
@pytest.mark.parametrize("which", [0, 1], ids=["vectors", "residual"])
def test_bad_activations_are_seen_in_stage_norms(which, through, bad):
    vectors = torch.randn(2, 2, 5, 24)
    vectors[which, 1, 2, 3] = bad
    weights = (torch.ones(24, device=DEVICE),) * through
    scale = torch.ones(2, 5, device=DEVICE)
    scale[0, 0] = bad
    actual = gk.stage_norms(*vectors.to(DEVICE), weights, scale)
    expected = torch.zeros(2, 5)
    expected[0, 0] = expected[1, 2] = NAN
    same_finite(actual, expected)


# ------------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("mask", "ranges"),
    [
        ("111", [0, 3, 0]),
        ("110", [0, 2, 0]),
        ("011", [1, 3, 0]),
        ("0110", [1, 3, 0]),
        ("01010", [1, 4, 1]),
        ("1", [0, 1, 0]),
        ("000", [0, 3, 1]),
    ],
)
def test_texts(mask, ranges):
    real = torch.tensor([[c == "1" for c in mask]] * 2)
    for given in (real, real[:1].expand(2, -1), torch.stack([real, ~real], -1)[..., 0]):
        texts = gk.Texts(given.to(DEVICE))
        assert texts.ranges.tolist() == [ranges] * 2
        assert torch.equal(texts.mask.bool().cpu(), real)
        assert (texts.mask.dtype, texts.ranges.dtype) == (torch.int8, torch.int32)
        assert texts.shape == (2, len(mask))
    assert texts.to(texts.mask.device) is texts
    moved = texts.to(torch.device("meta"))
    assert moved.mask.device.type == moved.ranges.device.type == "meta"
    assert moved.shape == texts.shape


# ----------------------------------------------------------------------------------------------- wrong arguments


@pytest.fixture(scope="module")
def good() -> dict[str, dict[str, Any]]:
    """Arguments that fit, by function."""
    layer = make_layer((5, 4), heads=2)
    local_map = layer.kernel_map()
    heads = {name: layer.given(name) for name in ("query", "key", "value")}
    scores = {"texts": layer.texts, "scaling": 0.25, "window": None}
    names = ("query", "key", "log_sum_exp", "factors", "row_scale", "diagonal")
    return {
        "Texts": {"attention_mask": layer.mask.to(DEVICE)},
        "attention": {**heads, **scores},
        "gram_weight": {"product": torch.randn(32, 24, dtype=torch.float64), "heads": 2, "dtype": FLOAT32},
        "head_factors": {"value": heads["value"], "weight": weight_of(layer, "N-Enc"), "texts": layer.texts},
        "LocalMap": {**scores, **{name: getattr(local_map, name) for name in names}},
        "rollout_rows": {
            "rows": torch.ones(2, 3, 5, device=DEVICE),
            "local_map": local_map,
            "used": layer.texts.ranges[:, :2],
        },
        "layer_scales": on_device(scale_arguments(24, FLOAT32)),
        "stage_norms": {
            "vectors": torch.ones(2, 5, 24, device=DEVICE),
            "residual": torch.ones(2, 5, 24, device=DEVICE),
            "gammas": (torch.ones(24, device=DEVICE), torch.ones(24, device=DEVICE)),
            "scale": torch.ones(2, 5, device=DEVICE),
        },
    }


def test_good_arguments_are_taken(good):
    for name, given in good.items():
        getattr(gk, name)(**given)


def huge(tensor: Tensor) -> Tensor:
    """More tokens than there may be, without the memory."""
    return tensor[:, :, :1].expand(-1, -1, 131073, -1)


def part(i: int, change: Callable[[Tensor], Any]) -> Callable[[tuple], tuple]:
    return lambda given: (*given[:i], change(given[i]), *given[i + 1 :])


def double(tensor: Tensor) -> Tensor:
    return tensor.double()


def fewer(tensor: Tensor) -> Tensor:
    return tensor[:, :-1]


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def instead(value: Any) -> Callable[[Any], Any]:
    return lambda given: value


def longer(times: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.cat([tensor] * times, -1)


def with_parts(**changes: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda whole: replace(whole, **{name: change(getattr(whole, name)) for name, change in changes.items()})


FLOATS = "torch.float32 or torch.float16 or torch.bfloat16"
LIKE = f" must be on {DEVICE} like"
NO_SCALES = [0, 0.0, -1.0, INF, NAN]
NO_WINDOWS = [-1, True, 2.0]
# function, argument, how it is spoilt, the error, and what the message says behind the argument's name
WRONG: list[tuple[str, str, Callable[[Any], Any], type[Exception], str]] = [
    ("Texts", "attention_mask", Tensor.long, TypeError, " must be torch.bool, got torch.int64"),
    ("Texts", "attention_mask", Tensor.tolist, TypeError, " must be a tensor, got list"),
    ("Texts", "attention_mask", lambda t: t[0], ValueError, " must have shape [batch, n], got [5]"),
    ("Texts", "attention_mask", lambda t: t[:0], ValueError, " must have shape [batch, n], got [0, 5]"),
    ("attention", "query", instead(None), TypeError, " must be a tensor, got NoneType"),
    ("attention", "query", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("attention", "key", Tensor.half, TypeError, " must be torch.float32, got torch.float16"),
    ("attention", "value", Tensor.half, TypeError, " must be torch.float32, got torch.float16"),
    ("attention", "query", lambda t: t[0], ValueError, " must have shape [batch, heads, n, head_dim], got [2, 5, 16]"),
    ("attention", "key", fewer, ValueError, " must have the other tensors' shape [2, 2, 5, 16], got [2, 1, 5, 16]"),
    ("attention", "value", longer(2), ValueError, " must have the other tensors' shape [2, 2, 5, 16], got [2, 2, 5,"),
    ("attention", "query", lambda t: t.repeat(1, 17, 1, 1), ValueError, " must have 1 to 32 heads, got 34"),
    ("attention", "query", lambda t: t[..., :8], ValueError, " must have heads of size 16 to 128, got 8"),
    ("attention", "query", longer(10), ValueError, " must have heads of size 16 to 128, got 160"),
    ("attention", "query", huge, ValueError, " must have at most 131072 tokens, got 131073"),
    ("attention", "query", lambda t: t[:, :, :4], ValueError, " must have the mask's batch and tokens [2, 5], got"),
    ("attention", "query", elsewhere, ValueError, f"{LIKE} attention_mask, got meta"),
    ("attention", "key", elsewhere, ValueError, f"{LIKE} attention_mask, got meta"),
    *[("attention", "scaling", instead(s), ValueError, f" must be a positive number, got {s!r}") for s in NO_SCALES],
    *[("attention", "window", instead(w), ValueError, f" must be None or a number of tokens of at least 0, got {w!r}")
      for w in NO_WINDOWS],
    ("gram_weight", "product", Tensor.float, TypeError, " must be torch.float64, got torch.float32"),
    ("gram_weight", "product", lambda t: t[0], ValueError, " must have shape [heads * head_dim, hidden_size], got"),
    ("gram_weight", "product", lambda t: t[1:], ValueError, "'s 31 rows must be a multiple of heads, got 2"),
    ("gram_weight", "heads", instead(0), ValueError, ", got 0"),
    ("gram_weight", "dtype", instead(torch.float64), TypeError, " must be one of torch.float32, "),
    ("head_factors", "value", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("head_factors", "value", elsewhere, ValueError, f"{LIKE} attention_mask, got meta"),
    ("head_factors", "weight", with_parts(parts=Tensor.half), TypeError,
     ".parts must be torch.float64, got torch.float16"),
    ("head_factors", "weight", with_parts(parts=lambda t: t[:, :, :1]), ValueError,
     ".parts must have shape [1, 2, 2, 16, 16], got [1, 2, 1, 16, 16]"),
    ("head_factors", "weight", with_parts(parts=elsewhere), ValueError, f".parts{LIKE} the other tensors, got meta"),
    ("head_factors", "weight", with_parts(head_scale=lambda t: t[:1]), ValueError,
     ".head_scale must have shape [2], got [1]"),
    ("LocalMap", "query", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("LocalMap", "key", fewer, ValueError, " must have the other tensors' shape [2, 2, 5, 16], got [2, 1, 5, 16]"),
    ("LocalMap", "scaling", instead(-1), ValueError, " must be a positive number, got -1"),
    ("LocalMap", "window", instead(-1), ValueError, " must be None or a number of tokens of at least 0, got -1"),
    ("LocalMap", "log_sum_exp", double, TypeError, " must be torch.float32, got torch.float64"),
    ("LocalMap", "log_sum_exp", lambda t: t[..., :5], ValueError,
     " must have shape [2, 1, 2, 2, 64], got [2, 1, 2, 2, 5]"),
    ("LocalMap", "row_scale", fewer, ValueError, " must have shape [2, 5], got [2, 4]"),
    ("LocalMap", "row_scale", elsewhere, ValueError, f"{LIKE} the other tensors, got meta"),
    ("LocalMap", "diagonal", Tensor.half, TypeError, " must be torch.float32, got torch.float16"),
    ("LocalMap", "factors", with_parts(factor=lambda t: t[:, :, :2]), ValueError,
     ".factor must have shape [2, 1, 3, 64], got [2, 1, 2, 64]"),
    ("LocalMap", "factors", with_parts(key_scale=double), TypeError,
     ".key_scale must be torch.float32, got torch.float64"),
    ("rollout_rows", "rows", double, TypeError, " must be torch.float32, got torch.float64"),
    ("rollout_rows", "rows", lambda t: t[:, 0], ValueError, " must have shape [2, m, 5], got [2, 5]"),
    ("rollout_rows", "rows", lambda t: t[..., :-1], ValueError, " must have shape [2, m, 5], got [2, 3, 4]"),
    ("rollout_rows", "rows", lambda t: t[:, :0], ValueError, " must have shape [2, m, 5], got [2, 0, 5]"),
    ("rollout_rows", "rows", elsewhere, ValueError, f"{LIKE} the other tensors, got meta"),
    ("rollout_rows", "used", Tensor.long, TypeError, " must be torch.int32, got torch.int64"),
    ("rollout_rows", "used", lambda t: t[0], ValueError, " must have shape [2, 2], got [2]"),
    ("layer_scales", "hidden_states", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("layer_scales", "hidden_states", longer(200), ValueError, " must be at most 4096 wide, got 4800"),
    ("layer_scales", "norm_inputs", part(0, fewer), ValueError, "[0] must have shape [2, 5, 24], got [2, 4, 24]"),
    ("layer_scales", "norm_inputs", part(1, elsewhere), ValueError, f"[1]{LIKE} the other tensors, got meta"),
    ("layer_scales", "context", fewer, ValueError, " must have shape [2, 5, width], got [2, 4, 48]"),
    ("layer_scales", "context", longer(100), ValueError, " must be at most 4096 wide, got 4800"),
    ("layer_scales", "probe", part(0, longer(2)), ValueError, "[0] must have shape [24], got [48]"),
    ("layer_scales", "probe", part(1, Tensor.half), TypeError, "[1] must be torch.float32, got torch.float16"),
    ("layer_scales", "bias", longer(2), ValueError, " must have shape [24], got [48]"),
    ("layer_scales", "bias", elsewhere, ValueError, f"{LIKE} the other tensors, got meta"),
    ("layer_scales", "texts", lambda t: gk.Texts(t.mask[:, :4] != 0), ValueError, f"on {DEVICE}, got [2, 4] on"),
    ("layer_scales", "texts", lambda t: t.to(torch.device("meta")), ValueError, f"on {DEVICE}, got [2, 5] on meta"),
    ("stage_norms", "vectors", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("stage_norms", "vectors", longer(200), ValueError, " must be at most 4096 wide, got 4800"),
    ("stage_norms", "residual", fewer, ValueError, " must have shape [2, 5, 24], got [2, 4, 24]"),
    ("stage_norms", "residual", elsewhere, ValueError, f"{LIKE} the other tensors, got meta"),
    ("stage_norms", "gammas", part(1, Tensor.half), TypeError, "[1] must be torch.float32, got torch.float16"),
    ("stage_norms", "gammas", part(0, longer(2)), ValueError, "[0] must have shape [24], got [48]"),
    ("stage_norms", "gammas", lambda given: given * 2, ValueError, " must be at most two, got 4"),
    ("stage_norms", "scale", fewer, ValueError, " must have shape [2, 5], got [2, 4]"),
    ("stage_norms", "scale", double, TypeError, " must be torch.float32, got torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "argument", "change", "error", "message"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[4].rpartition('got ')[2]}") for case in WRONG],
)
def test_wrong_arguments(good, function, argument, change, error, message):
    """The message names the argument, what it must be, and what it is."""
    given = good[function]
    with pytest.raises(error) as raised:
        getattr(gk, function)(**{**given, argument: change(given[argument])})
    said = str(raised.value)
    assert argument in said
    assert message in said


# ------------------------------------------------------------------- where the kernels can run, and the launch


def test_where_the_kernels_run(monkeypatch):
    cpu, cuda, meta = (torch.device(name) for name in ("cpu", "cuda:0", "meta"))
    major_minor = {cuda: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", major_minor.get)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "needs a CUDA GPU, and the model is on 'meta'" in gk.unavailable_reason(meta)

    monkeypatch.setattr(capability, "interpreted", lambda: False)
    assert gk.unavailable_reason(cuda) is None
    assert "needs a CUDA GPU, and the model is on 'cpu' (with TRITON_INTERPRET=1" in gk.unavailable_reason(cpu)
    major_minor[cuda] = (8, 0)
    assert gk.unavailable_reason(cuda) is None
    major_minor[cuda] = (7, 5)
    assert "needs compute capability 8.0 or higher, and cuda:0 has 7.5" in gk.unavailable_reason(cuda)

    monkeypatch.setattr(capability, "interpreted", lambda: True)
    assert gk.unavailable_reason(cpu) is None
    assert "TRITON_INTERPRET is set" in gk.unavailable_reason(cuda)

    monkeypatch.setattr(torch.version, "cuda", None)  # a build for other GPUs
    assert "needs a CUDA GPU, and the model is on 'cuda:0'" in gk.unavailable_reason(cuda)

    monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name: None)
    for device in (cpu, cuda, meta):
        assert gk.unavailable_reason(device) == "the package triton is not installed"


def test_what_the_kernels_run_on():
    fits = {"dtype": FLOAT32, "heads": 32, "n": 131072, "head_dim": 128, "hidden_size": 4096, "scaling": 0.125}
    assert gk.unsupported_reason(**fits) is None
    for dtype in DTYPE_NAMES:
        assert gk.unsupported_reason(**{**fits, "dtype": dtype}) is None
    assert gk.unsupported_reason(**{**fits, "head_dim": 16}) is None
    for wrong, reason in (
        ({"dtype": torch.float64}, "and the layer is torch.float64"),
        ({"heads": 33, "head_dim": 64}, "takes 1 to 32 heads, and the layer has 33"),
        ({"head_dim": 8}, "takes heads of size 16 to 128, and the layer's have 8"),
        ({"head_dim": 160}, "takes heads of size 16 to 128, and the layer's have 160"),
        ({"hidden_size": 4097}, "takes hidden sizes up to 4096, and the layer has 4097"),
        ({"n": 131073}, "takes up to 131072 tokens, and the text has 131073"),
        *(({"scaling": scaling}, f"and the layer's is {scaling}") for scaling in NO_SCALES),
    ):
        assert reason in (gk.unsupported_reason(**{**fits, **wrong}) or "nothing"), wrong


def test_the_interpreter_is_asked_for_when_kernels_are_imported():
    """Without TRITON_INTERPRET the kernels refuse the CPU, and say so before anything is launched."""
    code = """
import torch, globenc_kernels
print(globenc_kernels.interpreted(), globenc_kernels.unavailable_reason(torch.device("cpu")))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("False it needs a CUDA GPU"), done.stderr
    assert gk.interpreted() == (DEVICE.type == "cpu")


class FakeKernel:
    """Stands for a kernel on a GPU: waits for the note on its slow compilation, if one is on its way."""

    __name__ = "_attention_kernel"

    def __init__(self, fails: bool = False) -> None:
        self.grids: list[tuple[int, ...]] = []
        self.fails = fails

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            self.grids.append(grid)
            for thread in threading.enumerate():
                if isinstance(thread, threading.Timer) and thread.interval == 0:
                    thread.join(10)
            if self.fails:
                raise RuntimeError("out of resources")

        return run


@pytest.fixture
def no_gpu_needed(monkeypatch) -> None:
    """`launch` as on a GPU that has not seen any kernel, for tensors without numbers."""
    monkeypatch.setattr(arguments, "_launched", set())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)


SAID = "globenc: compiling attention_kernel for 12 heads of size 64, once for a model shape; Triton keeps it on disk\n"


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_slow_compilation_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "SLOW_COMPILATION", 0)
    kernel, tensor = FakeKernel(), torch.ones(3, device="meta")

    def launched(*args: Any, **options: Any) -> str:
        arguments.launch(kernel, (2, 3), *args, **options)
        out, err = capsys.readouterr()
        assert out == ""
        return err

    assert launched(tensor, 5, H=12, D=64) == SAID
    assert launched(tensor, 6, H=12, D=64) == ""  # sizes are no reason to compile anew
    assert launched(tensor.half(), 5, H=12, D=64) == SAID
    assert launched(tensor, 5, H=16, D=32) == SAID.replace("12", "16").replace("64", "32")
    assert launched(tensor, 5) == SAID.replace(" for 12 heads of size 64", "")
    assert kernel.grids == [(2, 3)] * 5


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_fast_compilation_says_nothing(capsys):
    kernel = FakeKernel()
    arguments.launch(kernel, (1,), torch.ones(3, device="meta"), H=12, D=64)
    assert kernel.grids == [(1,)]
    assert capsys.readouterr() == ("", "")
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.finished.is_set()]


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_failed_launch_is_raised_and_not_remembered(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "SLOW_COMPILATION", 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of resources"):
            arguments.launch(FakeKernel(fails=True), (1,), torch.ones(3, device="meta"))
        assert "compiling" in capsys.readouterr().err
    assert not arguments._launched
