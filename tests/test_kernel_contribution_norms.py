"""The layer's local map, its row sums and rows through it, against the equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_rows_close
from kernel_cases import (
    DEVICE,
    FLOAT32,
    INF,
    NAN,
    SIZES,
    TIGHT,
    Layer,
    case_id,
    check,
    check_map,
    layer_of_size,
    make_layer,
    off_diagonal,
    one_by_one,
    real_tokens,
    same_finite,
    spoil,
)

pytest.importorskip("triton")

import globenc_kernels as gk

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture(scope="module", params=SIZES, ids=case_id)
def layer(request) -> Layer:
    return layer_of_size(request.param)


@pytest.mark.parametrize("method", ["N-Enc", "W-FixedRes"])
def test_map_and_rows_of_it(layer, method):
    """The whole map, its row sums, and one and two requested rows through it."""
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


@pytest.fixture(scope="module")
def right() -> tuple[Layer, gk.LocalMap]:
    """A layer whose map passes."""
    layer = make_layer((17, 9), window=10)
    check_map(layer, "N-Enc")
    return layer, layer.kernel_map()


@pytest.mark.parametrize(
    "wrong",
    ["log_sum_exp", "factor", "key_scale", "row_scale", "diagonal", "scaling", "query", "tokens", "window"],
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
        "tokens": {"tokens": gk.TokenRanges(real_tokens((17, 8)).to(DEVICE))},
        "window": {"window": 9},
    }[wrong]
    with pytest.raises(AssertionError, match="row error"):
        check_map(layer, "N-Enc", gk.contribution_norms(replace(good, **changed)))


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
    same_finite(layer.attended.diagonal_weight, alpha.diagonal(dim1=2, dim2=3))

    expected = off_diagonal(layer.equation_map(method, FLOAT32))
    local_map = layer.kernel_map(method, diagonal=torch.ones(2, 9, device=DEVICE))
    same_finite(off_diagonal(gk.contribution_norms(local_map).cpu()), expected)
    same_finite(gk.row_sums(local_map), expected.sum(2))
    for m in (1, 2):
        rows = torch.rand(2, m, 9) + 0.1
        actual = gk.rollout_rows(rows.to(DEVICE), local_map).cpu()
        same_finite(actual.transpose(1, 2)[mask], (rows @ expected).transpose(1, 2)[mask])


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
