"""Attention with log-sum-exp: the kernel against the equations."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_rows_close
from kernel_cases import (
    DEVICE,
    FLOAT32,
    INF,
    SIZES,
    TIGHT,
    Layer,
    case_id,
    check,
    layer_of_size,
    make_layer,
    over_dtypes,
    spoil,
)
from torch import Tensor

pytest.importorskip("triton")

import globenc_kernels as gk

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture(scope="module", params=SIZES, ids=case_id)
def layer(request) -> Layer:
    return layer_of_size(request.param)


def test_attention(layer):
    trace, mask, attended = layer.trace, layer.mask, layer.attended
    dtype = trace.query.dtype

    def contexts(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        alpha, value = layer.alpha(dtype), trace.value.to(dtype)
        diagonal = alpha.diagonal(dim1=2, dim2=3)[..., None] * value
        return (alpha @ value).transpose(1, 2)[mask], diagonal.transpose(1, 2)

    assert attended.context.dtype == attended.diagonal_context.dtype == dtype
    (plain, plain_diagonal), (exact, exact_diagonal) = contexts(dtype), contexts(torch.float64)
    check(attended.context.cpu()[mask], plain, exact)
    check(attended.diagonal_context, plain_diagonal, exact_diagonal, layer.step)  # zero at padding, like the equations'
    rounding = torch.finfo(dtype).eps / 2
    assert_rows_close(attended.diagonal_context.cpu(), exact_diagonal, TIGHT + rounding)

    assert attended.diagonal_weight.dtype == attended.log_sum_exp.dtype == FLOAT32
    plain, exact = (layer.alpha(dtype).diagonal(dim1=2, dim2=3) for dtype in (FLOAT32, torch.float64))
    check(attended.diagonal_weight, plain, exact, layer.step)


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


@pytest.mark.parametrize("n", [1, 20], ids=lambda n: f"n{n}")
def test_a_row_without_any_score(n):
    """Inf times a negative number at every key: scores of -Inf are not padding, and their row is NaN."""
    layer = make_layer((n,), heads=2)
    layer.trace.key[:, 1, :, 5] = layer.trace.key[:, 1, :, 5].abs().neg()
    layer = spoil(layer, "query", (0, 1, 0, 5), INF)
    assert bool(layer.alpha(FLOAT32)[0, 1, 0].isnan().all())
    attended = layer.attended
    assert bool(attended.context[0, 0, 1].isnan().all())
    assert bool(attended.diagonal_context[0, 0, 1].isnan().all())
    assert bool(attended.diagonal_weight[0, 1, 0].isnan())
    local_map = layer.kernel_map("N", diagonal=torch.ones(1, n, device=DEVICE))
    assert bool(gk.contribution_norms(local_map)[0, 0, 1:].isnan().all())


@over_dtypes
def test_zero_values(dtype):
    """Zeros are written, not left as they were found."""
    layer = make_layer((5, 3), heads=2, dtype=dtype, kind="zero-values")
    assert not bool(layer.attended.context.cpu()[layer.mask].any())
    assert not bool(layer.attended.diagonal_context.any())
    assert not bool(gk.contribution_norms(layer.kernel_map("N")).any())
