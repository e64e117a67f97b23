"""LayerNorm scales, gap and norms of stages, against the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_rows_close
from kernel_cases import (
    BFLOAT16,
    DEVICE,
    DTYPE_NAMES,
    FLOAT16,
    FLOAT32,
    NAN,
    TIGHT,
    check,
    gammas,
    linear_part,
    make_layer,
    on_device,
    one_by_one,
    over_bad,
    same_finite,
    scale_arguments,
)
from torch import Tensor

from globenc import equations

pytest.importorskip("triton")

import globenc_kernels as gk

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

over_widths = pytest.mark.parametrize(
    ("d", "dtype"),
    [
        pytest.param(d, dtype, id=f"d{d}-{DTYPE_NAMES[dtype]}")
        for d, dtype in ((2, FLOAT32), (24, FLOAT16), (80, FLOAT32), (768, BFLOAT16), (1000, FLOAT32), (4096, FLOAT32))
    ],
)


def scales_by_hand(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    x, context = given["hidden_states"].to(dtype), given["context"].to(dtype)
    y1, y2 = (y.to(dtype) for y in given["norm_inputs"])
    p, projected = (t.to(dtype) for t in given["check_direction"])
    s1, s2 = ((y.var(-1, correction=0) + eps).sqrt() for y, eps in zip((y1, y2), given["eps"], strict=True))
    bias = 0 if given["bias"] is None else given["bias"].to(dtype)
    gap = ((y1 - x - bias) @ p - context @ projected).abs()
    gap = gap / ((x.norm(dim=-1) + y1.norm(dim=-1)) * p.norm() / len(p) ** 0.5)
    return {"scale1": 1 / s1, "scale2": 1 / (s1 * s2), "gap": gap * given["tokens"].mask.cpu()}


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
    assert not bool(actual.gap.cpu()[~given["tokens"].mask.bool().cpu()].any())


def test_gap_of_a_consistent_layer():
    """Nothing but attention and bias between residual and LayerNorm 1: no gap; something else: its part along p."""
    layer = make_layer((5, 5))
    trace, projection = layer.trace, layer.trace.modules.output_projection
    p = torch.randn(24)
    given = {
        "hidden_states": trace.hidden_states,
        "eps": (1e-12, 1e-5),
        "context": trace.context,
        "check_direction": (p, p @ projection.weight.detach()),
        "bias": projection.bias.detach(),
        "tokens": layer.tokens,
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
        layer.tokens,
    )
    through = len(gammas(exact, stage))
    row_scale = (torch.ones_like(scales.gap), scales.scale1, scales.scale2)[through]
    diagonal_part = layer.attended.diagonal_context.flatten(2) @ weight.T
    residual = None if stage == "N" else layer.given("hidden_states")
    weights = tuple(norm.weight.detach().to(DEVICE) for norm in norms[:through])
    diagonal = gk.stage_norms(diagonal_part, residual, weights, row_scale)
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
