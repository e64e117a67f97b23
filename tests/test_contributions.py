"""The fast path against the equations, layer by layer: exact in float64, as good as the direct sum in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import METHODS, STAGES, SyntheticLayer, assert_rows_close, row_error, synthetic_layer

from globenc import equations
from globenc.contributions import attention_weights, head_factors
from globenc.contributions.completeness import completeness_gap
from globenc.contributions.reference_backend import equation_layer
from globenc.contributions.torch_backend import TorchBackend, TorchLayer, mixing_ratios
from globenc.methods import METHODS as TABLE
from globenc.methods import STAGES as STAGE_TABLE
from globenc.rollouts import full_map

FLOAT32_EPS = torch.finfo(torch.float32).eps


def fast_map(layer: SyntheticLayer, method: str) -> torch.Tensor:
    return full_map(TorchLayer(layer.trace(), TABLE[method]))


def fast_row(layer: SyntheticLayer, method: str, positions: torch.Tensor) -> torch.Tensor:
    """Rows of the last layer's map, which may take a way of their own."""
    return TorchBackend().top_rows(layer.trace(), TABLE[method], positions)


def direct_map(layer: SyntheticLayer, method: str) -> torch.Tensor:
    return equations.local_map(equation_layer(layer.trace()), method)


def widened(layer: SyntheticLayer) -> SyntheticLayer:
    """The same numbers in float64."""
    modules = {}
    for name, module in vars(layer.modules).items():
        if module is None:
            continue
        wide = torch.nn.Identity()
        if isinstance(module, torch.nn.Linear):
            wide = torch.nn.Linear(module.in_features, module.out_features, dtype=torch.float64)
        elif isinstance(module, torch.nn.LayerNorm):
            wide = torch.nn.LayerNorm(module.normalized_shape, eps=module.eps, dtype=torch.float64)
        wide.load_state_dict(module.state_dict())
        modules[name] = wide
    tensors = {
        name: value.double()
        for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return replace(layer, modules=type(layer.modules)(**modules), **tensors)


def check_float32(*draws: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """No row of the fast path errs more than twice as much as the direct float32 sum does, plus a rounding step.

    A draw is (fast, direct, exact). The direct sum's error is that of its worst row among all draws: a row of one or
    two entries comes out exact by luck.
    """
    plain = torch.cat([row_error(direct, exact).flatten() for _, direct, exact in draws])
    assert bool(torch.isfinite(plain).all()), "the direct sum is no measure here"
    allowed = 2 * plain.max() + FLOAT32_EPS
    error = torch.cat([row_error(fast, exact).flatten() for fast, _, exact in draws])
    assert bool((error <= allowed).all()), f"row error {error.max():.2e}, allowed {allowed:.2e}"


def draw(layer: SyntheticLayer, method: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fast_map(layer, method), direct_map(layer, method), direct_map(widened(layer), method)


SIZES = [
    pytest.param((1,), 1, 4, None, id="B1-n1-H1-d4"),
    pytest.param((1,), 12, 4, None, id="B1-n1-H12-d48"),
    pytest.param((7,), 6, 8, None, id="B1-n7-H6-d48"),
    pytest.param((31,), 12, 4, None, id="B1-n31-H12-d48"),
    pytest.param((64,), 1, 16, None, id="B1-n64-H1-d16"),
    pytest.param((65,), 6, 5, None, id="B1-n65-H6-d30"),
    pytest.param((130,), 12, 2, None, id="B1-n130-H12-d24"),
    pytest.param((65, 31, 1), 6, 4, None, id="B3-n65-H6-d24"),
    pytest.param((7, 7, 7), 1, 8, None, id="B3-n7-H1-d8"),
    pytest.param((130, 64, 2), 6, 2, None, id="B3-n130-H6-d12"),
    pytest.param((31, 7), 12, 2, 5, id="B2-n31-H12-d5-more-heads-than-d"),
    pytest.param((9,), 6, 3, 2, id="B1-n9-H6-d2"),
]
over_sizes = pytest.mark.parametrize(("lengths", "heads", "head_dim", "d"), SIZES)
over_kinds = pytest.mark.parametrize("kind", ["random", "cancel", "repeat", "zero-values", "low-rank"])


@pytest.mark.parametrize("method", METHODS)
@over_sizes
def test_float64_equals_equations(lengths, heads, head_dim, d, method):
    layer = synthetic_layer(lengths, heads, head_dim, d)
    expected = direct_map(layer, method)
    assert_rows_close(fast_map(layer, method), expected, 1e-12)
    last = torch.tensor(lengths)[:, None] - 1
    for positions in (last, torch.cat([last, 0 * last, last // 2, last], 1)):  # few rows, many rows
        index = positions[..., None].expand(-1, -1, max(lengths))
        assert_rows_close(fast_row(layer, method, positions), expected.gather(1, index), 1e-12)


@pytest.mark.parametrize("method", METHODS)
@over_kinds
def test_float64_degenerate(kind, method):
    layer = synthetic_layer((13, 5), heads=6, head_dim=8, kind=kind)
    # where heads cancel to one part in a thousand the direct sum has lost three digits itself
    assert_rows_close(fast_map(layer, method), direct_map(layer, method), 1e-11 if kind == "cancel" else 1e-12)


@pytest.mark.parametrize("stage", STAGES)
@over_sizes
def test_float64_mixing_ratios(lengths, heads, head_dim, d, stage):
    layer = synthetic_layer(lengths, heads, head_dim, d)
    expected = equations.mixing_ratio(equation_layer(layer.trace()), stage)
    torch.testing.assert_close(mixing_ratios(layer.trace(), STAGE_TABLE[stage]), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@over_sizes
def test_float32_errs_like_the_direct_sum(lengths, heads, head_dim, d, method):
    draws, first_rows = [], []
    for seed in range(6 if max(lengths) < 31 else 1):
        layer = synthetic_layer(lengths, heads, head_dim, d, dtype=torch.float32, seed=seed)
        fast, direct, exact = draw(layer, method)
        draws.append((fast, direct, exact))
        row = fast_row(layer, method, torch.zeros(len(lengths), 1, dtype=torch.long))
        first_rows.append((row, direct[:, :1], exact[:, :1]))
    check_float32(*draws)
    check_float32(*first_rows, *draws)


@pytest.mark.parametrize("residual", [1.0, 1e-3, 0.0], ids=lambda r: f"residual{r:g}")
@pytest.mark.parametrize("stage", STAGES)
@over_kinds
def test_float32_degenerate(kind, stage, residual):
    """With a small residual the diagonal no longer hides what is left where the heads cancel."""
    options = {"heads": 6, "head_dim": 8, "dtype": torch.float32, "kind": kind, "residual": residual}
    check_float32(*(draw(synthetic_layer((24, 9), seed=seed, **options), stage) for seed in range(3)))


def test_float32_cancelling_pairs_one_by_one():
    """Not only a row's largest: the mean relative error of single pairs where all heads cancel."""
    options = {"heads": 2, "head_dim": 8, "dtype": torch.float32, "kind": "cancel", "residual": 0.0}
    for seed in range(4):
        fast, direct, exact = draw(synthetic_layer((40,), seed=seed, **options), "N-Enc")
        error, plain = (row_error(m[..., None], exact[..., None]).mean() for m in (fast, direct))
        assert plain > 1e-5  # they do cancel
        assert error <= 2 * plain


@pytest.mark.parametrize("outside", [0.1, 0.29, 0.35, 0.5])
@pytest.mark.parametrize("heads", [4, 12])
def test_float32_heads_that_cancel_only_together(heads, outside):
    """No head is close to the others' span and yet their sum is small: a check of neighbours does not see it."""
    options = {"heads": heads, "d": 48, "dtype": torch.float32, "kind": "staircase", "residual": 0.0}
    check_float32(*(draw(synthetic_layer((12,), seed=seed, outside=outside, **options), "N") for seed in range(4)))


def test_the_float32_check_can_fail():
    fast, direct, exact = draw(synthetic_layer((9,), dtype=torch.float32), "N-Enc")
    check_float32((fast, direct, exact))
    wrong = fast.clone()
    wrong[0, 4] *= 1 + 1e-5
    for bad in (wrong, torch.full_like(fast, torch.nan)):
        with pytest.raises(AssertionError, match="row error"):
            check_float32((bad, direct, exact))
    with pytest.raises(AssertionError, match="no measure"):
        check_float32((fast, torch.full_like(fast, torch.inf), exact))


def test_float32_gram_matrix_is_not_good_enough():
    """What the factor is for: the norm from a float32 Gram matrix fails the same check where heads cancel."""
    layer = synthetic_layer((40,), heads=2, dtype=torch.float32, kind="cancel")
    exact = equation_layer(layer.trace())
    f = equations.transformed_values(exact.value, exact.output_weight)
    gram = torch.einsum("bhjd,bkjd->bjhk", f, f)
    norms = torch.einsum("bhij,bjhk,bkij->bij", exact.alpha, gram, exact.alpha).clamp(min=0).sqrt()
    fast, direct, exact = draw(layer, "N")
    check_float32((fast, direct, exact))
    with pytest.raises(AssertionError, match="row error"):
        check_float32((norms, direct, exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@over_kinds
def test_no_nan_at_equal_or_zero_heads(kind, dtype):
    layer = synthetic_layer((8,), heads=12, head_dim=2, d=3, dtype=dtype, kind=kind, residual=0.0)
    for method in METHODS:
        assert bool(torch.isfinite(fast_map(layer, method)).all()), method


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    """From what a half-precision model hands over the map is as exact as from a float32 model."""
    layer = synthetic_layer((33,), heads=6, dtype=dtype)
    fast = fast_map(layer, "N-Enc")
    assert fast.dtype == torch.float32
    check_float32((fast, direct_map(layer, "N-Enc"), direct_map(widened(layer), "N-Enc")))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scores_per_block", [1, 400, 1500], ids=lambda s: f"scores{s}")
def test_block_boundaries(monkeypatch, method, scores_per_block):
    """Blocks of one row, of a few rows with a rest, and keys in chunks with a rest give what one block gives."""
    layer = synthetic_layer((31, 12), heads=6, head_dim=4)
    whole = fast_map(layer, method)
    blocks = len(list(TorchLayer(layer.trace(), TABLE[method]).blocks()))
    monkeypatch.setattr(attention_weights, "SCORES_PER_BLOCK", scores_per_block)
    monkeypatch.setattr(attention_weights, "QUERIES_PER_BLOCK", 1)
    monkeypatch.setattr(head_factors, "TOKENS_PER_CHUNK", 7)
    tiles = list(TorchLayer(layer.trace(), TABLE[method]).blocks())
    assert len(tiles) > blocks
    assert [rows.start for rows, _, _ in tiles] == [0] + [rows.stop for rows, _, _ in tiles[:-1]]
    assert tiles[-1][0].stop == 31
    assert_rows_close(torch.cat([tile for _, _, tile in tiles], 1), whole, 1e-13)


@pytest.mark.parametrize("stage", STAGES)
def test_block_boundaries_of_mixing_ratios(monkeypatch, stage):
    layer = synthetic_layer((31, 12), heads=6, head_dim=4)
    whole = mixing_ratios(layer.trace(), STAGE_TABLE[stage])
    monkeypatch.setattr(attention_weights, "SCORES_PER_BLOCK", 400)
    monkeypatch.setattr(attention_weights, "QUERIES_PER_BLOCK", 1)
    monkeypatch.setattr(head_factors, "TOKENS_PER_CHUNK", 5)
    torch.testing.assert_close(mixing_ratios(layer.trace(), STAGE_TABLE[stage]), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_non_contiguous_tensors(dtype):
    layer = synthetic_layer((12, 5), heads=6, dtype=dtype)
    strided = {}
    for name in ("query", "key", "value", "context", "hidden_states", "attention_norm_input", "output_norm_input"):
        tensor = getattr(layer, name)
        strided[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        assert not strided[name].is_contiguous()
    for method in METHODS:
        tolerance = 20 * torch.finfo(dtype).eps
        assert_rows_close(fast_map(replace(layer, **strided), method), fast_map(layer, method), tolerance)


def test_completeness_gap_of_a_consistent_layer():
    layer = synthetic_layer((9, 4), heads=6)
    gap = completeness_gap(layer.trace())
    assert gap.shape == (2, 9)
    assert float(gap.max()) < 1e-13
    assert bool((gap[1, 4:] == 0).all())


@pytest.mark.parametrize("wrong", ["value", "query", "hidden_states", "attention_norm_input", "output"])
def test_completeness_gap_can_fail(wrong):
    layer = synthetic_layer((9, 4), heads=6)
    moved = getattr(layer, wrong).clone()
    moved[0, ..., :3, :2] += 0.01
    assert float(completeness_gap(replace(layer, **{wrong: moved}).trace()).max()) > 1e-4


def test_layer_norm_without_weight():
    layer = synthetic_layer((9,), heads=3)
    plain = torch.nn.LayerNorm(24, elementwise_affine=False).double()
    ones = torch.nn.LayerNorm(24).double()
    bare = replace(layer, modules=replace(layer.modules, output_norm=plain))
    affine = replace(layer, modules=replace(layer.modules, output_norm=ones))
    assert torch.equal(fast_map(bare, "N-Enc"), fast_map(affine, "N-Enc"))
    assert_rows_close(fast_map(bare, "N-Enc"), direct_map(bare, "N-Enc"), 1e-12)


@pytest.mark.parametrize("power", [-8, -4, 4, 8], ids=lambda p: f"1e{p}")
def test_float32_layers_of_any_scale(power):
    """A layer whose LayerNorm weights and activations are all so large or small: only the map's scale changes."""
    scale = 10.0**power
    layer = synthetic_layer((20,), heads=6, dtype=torch.float32)
    with torch.no_grad():
        for norm in (layer.modules.attention_norm, layer.modules.output_norm):
            norm.weight.mul_(scale)
            norm.eps *= scale**2
    names = ("value", "context", "hidden_states", "attention_norm_input", "output_norm_input")
    check_float32(draw(replace(layer, **{name: getattr(layer, name) * scale for name in names}), "N-Enc"))
