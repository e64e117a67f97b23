"""Positions, the rollout's scale, and the rollout up to every layer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import METHODS, assert_rows_close, raw, tiny_model, token_batch
from torch import nn

import globenc
from globenc import functional

LENGTHS = (9, 4, 6)


def batch(left: bool) -> dict[str, torch.Tensor]:
    return token_batch(LENGTHS, left=left, position_ids=True)


over_sides = pytest.mark.parametrize("left", [False, True], ids=["padded-right", "padded-left"])
over_layers = pytest.mark.parametrize("layers", [False, True], ids=["last", "layers"])
over_methods = pytest.mark.parametrize("method", METHODS)


def every_row(model, method, left, layers) -> tuple[list[torch.Tensor], globenc.AttributionOutput]:
    """The rollout's own values among the real tokens of each text, [..., m, m]."""
    inputs = batch(left)
    out = globenc.attribute(model, method=method, position="all", per_layer=layers, **inputs)
    values = raw(out.layer_scores, out.layer_log2_scale) if layers else raw(out.scores, out.log2_scale)
    real = [mask.nonzero().flatten() for mask in inputs["attention_mask"]]
    return [values[..., b, :, :][..., r, :][..., r] for b, r in enumerate(real)], out


@pytest.fixture(scope="module")
def model():
    return tiny_model("bert")


@over_layers
@over_sides
@over_methods
def test_every_position_is_made_of_rows_of_all(model, method, left, layers):
    inputs = batch(left)
    real = inputs["attention_mask"].bool()
    rows, whole = every_row(model, method, left, layers)
    assert whole.scores.shape == (3, 9, 9)
    first_weights = torch.rand(3, 9, dtype=torch.float64)
    positions = {  # position, and what it is in the rows of one text of m tokens
        "cls": ("cls", lambda r, b: r[..., 0, :]),
        "position": (2, lambda r, b: r[..., 2, :]),
        "negative": (-1, lambda r, b: r[..., -1, :]),
        "mean": ("mean", lambda r, b: r.mean(-2)),
        "list": ([3, 0, -2], lambda r, b: r[..., [3, 0, -2], :]),
        "tuple": ((1,), lambda r, b: r[..., [1], :]),
        "range": (range(4), lambda r, b: r[..., :4, :]),
        "weights": (first_weights, lambda r, b: first_weights[b][real[b]] @ r),
    }
    for name, (position, expected) in positions.items():
        out = globenc.attribute(model, method=method, position=position, per_layer=layers, **inputs)
        values = raw(out.layer_scores, out.layer_log2_scale) if layers else raw(out.scores, out.log2_scale)
        several = name in ("list", "tuple", "range")
        assert out.scores.ndim == (3 if several else 2), name
        torch.testing.assert_close(out.scores.sum(-1), torch.ones_like(out.scores[..., 0]), rtol=1e-12, atol=0)
        for b in range(3):
            assert_rows_close(
                values[..., b, :, real[b]] if several else values[..., b, real[b]], expected(rows[b], b), 1e-12
            )
            assert bool((values[..., b, :, ~real[b]] == 0).all() if several else (values[..., b, ~real[b]] == 0).all())


@over_sides
def test_all_has_zero_rows_and_columns_at_padding(model, left):
    inputs = batch(left)
    out = globenc.attribute(model, position="all", **inputs)
    real = inputs["attention_mask"].bool()
    assert bool((out.scores[~real] == 0).all())
    assert bool((out.scores.mT[~real] == 0).all())
    torch.testing.assert_close(out.scores.sum(-1), real.double(), rtol=1e-12, atol=0)
    assert bool((out.log2_scale[~real] == 0).all())


@pytest.mark.parametrize("shape", ["[n]", "[1, n]", "[batch, n]", "[1, 2, n]", "[batch, 2, n]"])
def test_shapes_of_weights(model, shape):
    inputs = token_batch((7, 7, 7))
    sizes = {"n": 7, "batch": 3, "1": 1, "2": 2}
    weights = torch.rand(*(sizes[word] for word in shape.strip("[]").split(", ")))
    out = globenc.attribute(model, position=weights, **inputs)
    whole = globenc.attribute(model, position="all", **inputs)
    full = weights.double()
    full = full[None, None] if full.ndim == 1 else full[:, None] if full.ndim == 2 else full
    expected = full.expand(3, -1, -1) @ raw(whole.scores, whole.log2_scale)
    if weights.ndim < 3:
        expected = expected[:, 0]
    assert out.scores.shape == expected.shape
    assert_rows_close(raw(out.scores, out.log2_scale), expected, 1e-12)


def test_weights_are_a_scale_of_the_raw_values_alone(model):
    inputs = token_batch((7,))
    weights = torch.rand(7)
    small, large = (globenc.attribute(model, position=weights * factor, **inputs) for factor in (1.0, 1024.0))
    torch.testing.assert_close(small.scores, large.scores, rtol=1e-14, atol=0)
    torch.testing.assert_close(small.log2_scale + 10, large.log2_scale, rtol=0, atol=1e-12)


def test_weights_at_padding_count_for_nothing(model):
    inputs = token_batch((7, 4))
    weights = torch.ones(2, 7)
    out = globenc.attribute(model, position=weights / inputs["attention_mask"].sum(-1, keepdim=True), **inputs)
    mean = globenc.attribute(model, position="mean", **inputs)
    assert_rows_close(raw(out.scores, out.log2_scale), raw(mean.scores, mean.log2_scale), 1e-7)  # float32 weights


BAD_POSITIONS = [
    ("cIs", ValueError, r'position must be "cls", "mean", "all", a token position.*got \'cIs\''),
    (4, ValueError, r"inside the text, got 4 for 4 tokens \(positions 0 to 3, or -4 to -1"),
    (-5, ValueError, "got -5 for 4 tokens"),
    ([0, 7], ValueError, "got 7 for 4 tokens"),
    ([], TypeError, "position must be"),
    (None, TypeError, "position must be"),
    (1.0, TypeError, "position must be"),
    (True, TypeError, "position must be"),
    ([0, "cls"], TypeError, "position must be"),
    (b"cls", TypeError, "position must be"),
    (torch.ones(6), ValueError, r"batch=2, n=7; got \[6\]|n=7"),
    (torch.ones(3, 7), ValueError, r"got \[3, 7\]"),
    (torch.ones(2, 0, 7), ValueError, r"got \[2, 0, 7\]"),
    (torch.tensor(1.0), ValueError, r"got \[\]"),
    (torch.full((7,), torch.nan), ValueError, "finite"),
    (-torch.ones(7), ValueError, "not negative"),
    (torch.zeros(7), ValueError, "positive sum"),
    (torch.tensor([0.0, 0, 0, 0, 1, 1, 1]), ValueError, "positive sum over the real tokens of every text"),
]


@pytest.mark.parametrize(("position", "error", "message"), BAD_POSITIONS, ids=lambda v: str(v)[:20])
def test_bad_positions(model, position, error, message):
    with pytest.raises(error, match=message):
        globenc.attribute(model, position=position, **token_batch((7, 4)))


@pytest.mark.parametrize("target", ["cls", 1])
def test_a_target_is_told_which_argument_is_meant(model, target, tmp_path):
    """In Captum and others a target is a class: nobody who means one is given a token's scores."""
    explainer = globenc.GlobEnc.from_pretrained()
    for call in (
        lambda: explainer("a film", target=target),
        lambda: globenc.attribute(model, target=target, **token_batch((7, 4))),
        lambda: functional.compare_methods(model, target=target, **token_batch((7, 4))),
        lambda: globenc.extract(["a"], tmp_path / "out", target=target),
    ):
        with pytest.raises(TypeError, match=rf"takes no 'target': .* position={target!r} where .* label={target!r}"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("position", ["cls", "mean", -1, [0, 2], "all"], ids=str)
@pytest.mark.parametrize("row_normalize", [False, True], ids=["plain", "row-normalised"])
def test_layers_are_rollouts_of_truncated_models(model, position, row_normalize):
    inputs = token_batch((7, 4))
    options = {"position": position, "row_normalize": row_normalize, **inputs}
    out = globenc.attribute(model, per_layer=True, **options)
    assert torch.equal(out.layer_scores[-1], out.scores)
    assert torch.equal(out.layer_log2_scale[-1], out.log2_scale)
    last = globenc.attribute(model, **options)
    assert last.layer_scores is None
    assert last.layer_log2_scale is None
    assert_rows_close(raw(out.scores, out.log2_scale), raw(last.scores, last.log2_scale), 1e-12)
    for depth in (1, 2, 3):
        short = copy.deepcopy(model)
        short.encoder.layer = nn.ModuleList(list(short.encoder.layer)[:depth])
        short.config.num_hidden_layers = depth
        alone = globenc.attribute(short, **options)
        assert_rows_close(
            raw(out.layer_scores[depth - 1], out.layer_log2_scale[depth - 1]),
            raw(alone.scores, alone.log2_scale),
            1e-12,
        )


@over_methods
@over_sides
def test_row_normalisation(model, method, left):
    """Against a plain product of row-normalised maps; rows of a product of such maps sum to 1."""
    inputs = batch(left)
    maps = globenc.contribution_maps(model, method=method, **inputs)
    maps = maps / maps.sum(-1, keepdim=True).clamp(min=1e-300)
    product = maps[0]
    for local in maps[1:]:
        product = local @ product
    out = globenc.attribute(model, method=method, position="all", row_normalize=True, **inputs)
    assert_rows_close(raw(out.scores, out.log2_scale), product, 1e-12)
    torch.testing.assert_close(out.log2_scale, torch.zeros_like(out.log2_scale), rtol=0, atol=1e-12)
    plain = globenc.attribute(model, method=method, position="all", **inputs)
    assert torch.allclose(out.scores, plain.scores, rtol=1e-6) == method.startswith(("W", "N-Fixed"))


def plain_product(maps: torch.Tensor) -> torch.Tensor:
    """Of the maps in Python's integers' manner: each row scaled to sum 1, logarithms added; [.., n, n], [.., n]."""
    maps = maps.double()
    log2 = torch.zeros(maps.shape[1:-1], dtype=torch.float64)
    rows = None
    for local in maps:
        if rows is None:
            rows = local
        else:
            top = torch.where(rows.sum(-1) > 0, log2, -torch.inf).amax(-1, keepdim=True)
            rows = local @ (rows * torch.exp2(log2 - top)[..., None])
            log2 = top.expand_as(log2)
        total = rows.sum(-1)
        safe = torch.where(total > 0, total, 1.0)
        rows, log2 = rows / safe[..., None], log2 + safe.log2()
    return rows, log2


@pytest.mark.parametrize(
    ("dtype", "position"),
    [
        (torch.float64, "all"),
        (torch.bfloat16, "cls"),
        *((d, t) for d in (torch.float32, torch.float16) for t in ("cls", "mean", "all")),
    ],
    ids=str,
)
def test_depth_does_not_overflow(dtype, position):
    """48 layers whose maps multiply to 2^400: beyond float32 many times over, exact all the same."""
    model = tiny_model("bert", dtype, num_hidden_layers=48)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.output.LayerNorm.weight.mul_(60)
            layer.attention.output.LayerNorm.weight.mul_(60)
            layer.intermediate.dense.weight.mul_(0.01)
            layer.attention.self.query.weight.mul_(0.01)
    inputs = token_batch((7, 4))
    maps = globenc.contribution_maps(model, **inputs)
    rows, log2 = plain_product(maps)
    out = globenc.attribute(model, position=position, per_layer=True, **inputs)
    assert bool(torch.isfinite(out.layer_scores).all())
    scores, scale = out.scores.double(), out.log2_scale
    assert float(scale.max()) > 250
    if position == "cls":
        rows, log2 = rows[:, 0], log2[:, 0]
    elif position == "mean":
        real = inputs["attention_mask"].bool()
        top = torch.where(real, log2, -torch.inf).amax(-1, keepdim=True)
        rows = (torch.exp2(log2 - top)[:, None] * real[:, None] / real.sum(-1)[:, None, None]) @ rows
        log2 = top[:, 0] + rows.sum(-1).log2()[:, 0]
        rows = (rows / rows.sum(-1, keepdim=True))[:, 0]
    else:
        real = inputs["attention_mask"].bool()
        scores, scale, rows, log2 = scores[real], scale[real], rows[real], log2[real]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    assert_rows_close(scores, rows, tolerance)
    torch.testing.assert_close(scale, log2, rtol=0, atol=10 * tolerance)


def test_float32_depth_equals_float64():
    """The same deep model in both precisions: 40 layers, far beyond float32's range."""
    outs = []
    for dtype in (torch.float64, torch.float32):
        model = tiny_model("bert", dtype, num_hidden_layers=40)
        with torch.no_grad():
            for layer in model.encoder.layer:
                layer.output.LayerNorm.weight.mul_(30)
                layer.attention.self.query.weight.mul_(0.02)
                layer.intermediate.dense.weight.mul_(0.1)
        outs.append(globenc.attribute(model, per_layer=True, **token_batch((7, 4))))
    exact, single = outs
    assert single.scores.dtype == torch.float32
    assert float(exact.log2_scale.min()) > 130
    assert_rows_close(single.layer_scores, exact.layer_scores, 1e-3)
    torch.testing.assert_close(single.layer_log2_scale, exact.layer_log2_scale, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, dtype) for size in (1e30, 1e-30) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    + [(5e4, torch.float16), (1e-4, torch.float16), (1e-41, torch.float32), (1e300, torch.float64)],
    ids=str,
)
def test_rollout_of_huge_and_tiny_maps(size, dtype):
    maps = (torch.rand(60, 2, 5, 5, dtype=torch.float64) + 0.1).to(dtype) * size
    rows, log2 = plain_product(maps)
    mantissa, scale = globenc.rollout(maps)
    assert mantissa.dtype == dtype
    assert scale.dtype == torch.float64
    assert bool(torch.isfinite(mantissa).all())
    total = mantissa[-1].double().sum(-1)
    tolerance = 100 * torch.finfo(dtype).eps
    assert_rows_close(mantissa[-1] / total[..., None], rows, tolerance)
    torch.testing.assert_close(scale[-1] + total.log2(), log2, rtol=1e-14, atol=10 * tolerance)


def test_rollout_rows_of_very_different_size():
    """Rows whose sizes come apart by 2^40 with every layer: each keeps its own scale."""
    maps = torch.rand(10, 6, 6, dtype=torch.float64).triu() + 1e-3 * torch.eye(6, dtype=torch.float64)
    maps[:, 0] *= 2.0**20
    maps[:, 5] *= 2.0**-20
    exact_rows, exact_log2 = plain_product(maps)
    mantissa, scale = globenc.rollout(maps)
    total = mantissa[-1].sum(-1)
    assert_rows_close(mantissa[-1] / total[:, None], exact_rows, 1e-10)
    torch.testing.assert_close(scale[-1] + total.log2(), exact_log2, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_maps_next_to_padding(dtype):
    """A padded row is zero and has no scale that others must be measured by: 200 layers of 1e-3 beside it."""
    maps = torch.zeros(200, 2, 5, 5, dtype=dtype)
    maps[:, 0] = 1e-3 * (torch.rand(200, 5, 5) + 0.1)
    maps[:, 1, :3, :3] = maps[:, 0, :3, :3]
    mantissa, scale = globenc.rollout(maps)
    alone, alone_scale = globenc.rollout(maps[:, 1:, :3, :3])
    assert float(alone_scale[-1].max()) < -1000
    assert_rows_close(mantissa[-1, 1, :3, :3], alone[-1, 0], 1e-5)
    torch.testing.assert_close(scale[-1, 1, :3], alone_scale[-1, 0], rtol=0, atol=1e-4)
    assert bool((mantissa[-1, 1, 3:] == 0).all())


def test_all_of_a_deep_model_of_small_values_beside_padding():
    """The same through a model: method N of 60 layers whose values are small, a text beside a longer one."""
    model = tiny_model("bert", torch.float32, num_hidden_layers=60)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.output.dense.weight.mul_(1e-3)
    inputs = token_batch((7, 4))
    together = globenc.attribute(model, method="N", position="all", **inputs)
    alone = globenc.attribute(model, method="N", position="all", **token_batch((4,)))
    assert float(alone.log2_scale.max()) < -150
    assert_rows_close(together.scores[1:, :4, :4], alone.scores, 1e-3)
    torch.testing.assert_close(together.log2_scale[1:, :4], alone.log2_scale, rtol=0, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 4), (2, 3, 5, 5), (2, 2, 3, 4, 4)], ids=str)
def test_rollout_shapes(shape):
    maps = torch.rand(shape, dtype=torch.float64)
    mantissa, scale = globenc.rollout(maps)
    assert mantissa.shape == shape
    assert scale.shape == shape[:-1]
    product = maps[0]
    for local in maps[1:]:
        product = local @ product
    assert_rows_close(raw(mantissa, scale)[-1], product, 1e-13)


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        (torch.ones(3, 4), ValueError, r"\[layers, ..., n, n\], got \[3, 4\]"),
        (torch.ones(2, 3, 4), ValueError, r"got \[2, 3, 4\]"),
        (torch.ones(0, 4, 4), ValueError, r"got \[0, 4, 4\]"),
        (torch.ones(2, 0, 0), ValueError, r"got \[2, 0, 0\]"),
        (torch.ones(2, 4, 4, dtype=torch.long), TypeError, "floating-point torch tensor, got a torch.int64 tensor"),
        ([[[1.0]]], TypeError, "floating-point torch tensor, got list"),
    ],
    ids=["flat", "not-square", "no-layer", "no-token", "integers", "list"],
)
def test_rollout_refuses(maps, error, message):
    with pytest.raises(error, match=message):
        globenc.rollout(maps)
