"""Head factors: R_j of every key against the inner products of its transformed value vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_rows_close, row_error
from kernel_cases import (
    BFLOAT16,
    DEVICE,
    DTYPE_NAMES,
    FLOAT16,
    FLOAT32,
    SIZES,
    TIGHT,
    Layer,
    case_id,
    check,
    check_map,
    layer_of_size,
    make_layer,
    off_diagonal,
    over_bad,
    over_dtypes,
    spoil,
    triangles,
)
from torch import Tensor

pytest.importorskip("triton")

import globenc_kernels as gk

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture(scope="module", params=SIZES, ids=case_id)
def layer(request) -> Layer:
    return layer_of_size(request.param)


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


@over_bad
def test_bad_values_are_seen_in_factors(bad):
    layer = spoil(make_layer((20, 9), heads=3), "value", (0, 1, 3, 5), bad)
    r = triangles(layer.factors("N-Enc"), 3)
    assert bool(r[0, 3, :, 1].isnan().any())
    assert bool((r[0, 3] @ torch.ones(3, dtype=torch.float64)).isnan().any())
    finite = layer.mask.clone()
    finite[0, 3] = False
    assert bool(r[finite].isfinite().all())
