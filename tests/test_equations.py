"""The definition itself: a layer solved by hand, and every equation again as plain loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
from helpers import METHODS, STAGES
from torch import nn

import globenc
from globenc import equations
from globenc.capture import LayerEnd, LayerTrace, ScoredAttention
from globenc.contributions.torch_backend import TorchLayer, mixing_ratios
from globenc.encoders import LayerModules
from globenc.methods import METHODS as TABLE
from globenc.methods import STAGES as STAGE_TABLE
from globenc.rollouts import full_map

# One layer, 2 tokens, 2 heads of size 1, hidden size 2, by hand.
#
#   queries           head 1: 0, 1        head 2: 1, 0
#   keys              head 1: 0, ln 3     head 2: ln 3, 0
#   scores (scale 1)  head 1: [0, 0]      head 2: [ln 3, 0]
#                             [0, ln 3]           [0,    0]
#   alpha             head 1: [1/2, 1/2]  head 2: [3/4, 1/4]
#                             [1/4, 3/4]          [1/2, 1/2]
#   values            head 1: 1, 2        head 2: 3, -1
#   W_O = [[1, 1], [1, -1]]: head 1 goes along (1, 1), head 2 along (1, -1), so
#   f1(x1) = (1, 1)   f1(x2) = (2, 2)     f2(x1) = (3, -3)   f2(x2) = (-1, 1)
#   x1 = (1, 0)       x2 = (0, 2)
#   gamma1 = (2, -1), s1 = 2, 4           gamma2 = (1, 3), s2 = 1/2, 1/4
#
# (4)  z11 = 1/2 (1, 1) + 3/4 (3, -3) = (2.75, -1.75)     |.|^2 = 7.5625 + 3.0625   = 10.625
#      z12 = 1/2 (2, 2) + 1/4 (-1, 1) = (0.75, 1.25)              0.5625 + 1.5625   = 2.125
#      z21 = 1/4 (1, 1) + 1/2 (3, -3) = (1.75, -1.25)             3.0625 + 1.5625   = 4.625
#      z22 = 3/4 (2, 2) + 1/2 (-1, 1) = (1, 2)                                      = 5
# (5)  z+11 = (3.75, -1.75)                                       14.0625 + 3.0625  = 17.125
#      z+22 = (1, 4)                                                                = 17
# (6)  11: mean 1,     ( 2.75, -2.75) / 2 * (2, -1) = ( 2.75,  1.375)   7.5625 + 1.890625 = 9.453125
#      12: mean 1,     (-0.25,  0.25) / 2 * (2, -1) = (-0.25, -0.125)   0.0625 + 0.015625 = 0.078125
#      21: mean 0.25,  ( 1.5,  -1.5)  / 4 * (2, -1) = ( 0.75,  0.375)   0.5625 + 0.140625 = 0.703125
#      22: mean 2.5,   (-1.5,   1.5)  / 4 * (2, -1) = (-0.75, -0.375)                     = 0.703125
# (11) 11: mean 2.0625,  (0.6875, -0.6875) * 2 * (1, 3) = ( 1.375, -4.125)   1.890625 + 17.015625 = 18.90625
#      12: mean -0.1875, (-0.0625, 0.0625) * 2 * (1, 3) = (-0.125,  0.375)   0.015625 + 0.140625  = 0.15625
#      21: mean 0.5625,  (0.1875, -0.1875) * 4 * (1, 3) = ( 0.75,  -2.25)    0.5625 + 5.0625      = 5.625
#      22: mean -0.5625, its opposite                                                             = 5.625
SQUARES = {
    "N": [[10.625, 2.125], [4.625, 5]],
    "N-Res": [[17.125, 2.125], [4.625, 17]],
    "N-ResLN": [[9.453125, 0.078125], [0.703125, 0.703125]],
    "N-Enc": [[18.90625, 0.15625], [5.625, 5.625]],
}
BY_HAND = {stage: [[math.sqrt(square) for square in row] for row in rows] for stage, rows in SQUARES.items()}
# (8), (14) with two tokens: off-diagonal over the sum of both. N-Enc: 18.90625 / 0.15625 = 121, so r1 = 1 / (1 + 11)
RATIOS = {
    stage: [rows[0][1] / (rows[0][1] + rows[0][0]), rows[1][0] / (rows[1][0] + rows[1][1])]
    for stage, rows in BY_HAND.items()
}
# W: the mean of the two alphas, 1/2 (1/2 + 3/4) = 5/8, ...
BY_HAND["W"] = [[5 / 8, 3 / 8], [3 / 8, 5 / 8]]
BY_HAND["W-FixedRes"] = [[13 / 16, 3 / 16], [3 / 16, 13 / 16]]  # (13)
BY_HAND["W-Res"] = [[11 / 12, 1 / 12], [1 / 2, 1 / 2]]  # (15) with r = 1/12, 1/2: the only other token gets all of r
# (16), row 1: 10.625 / 2.125 = 5, so the shares are sqrt(5) and 1 of sqrt(5) + 1
BY_HAND["N-FixedRes"] = [
    [0.5 * math.sqrt(5) / (math.sqrt(5) + 1) + 0.5, 0.5 / (math.sqrt(5) + 1)],
    [
        0.5 * math.sqrt(4.625) / (math.sqrt(4.625) + math.sqrt(5)),
        0.5 * math.sqrt(5) / (math.sqrt(4.625) + math.sqrt(5)) + 0.5,
    ],
]


def float64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def toy() -> equations.EncoderLayer:
    return equations.EncoderLayer(
        alpha=float64([[[1 / 2, 1 / 2], [1 / 4, 3 / 4]], [[3 / 4, 1 / 4], [1 / 2, 1 / 2]]]),
        value=float64([[[1], [2]], [[3], [-1]]]),
        output_weight=float64([1, 1], [1, -1]),
        hidden_states=float64([[1, 0], [0, 2]]),
        gamma1=float64(2, -1),
        s1=float64([2, 4]),
        gamma2=float64(1, 3),
        s2=float64([1 / 2, 1 / 4]),
        mask=torch.ones(1, 2, dtype=torch.bool),
    )


@pytest.fixture
def toy_trace() -> LayerTrace:
    """The same layer as the model would show it. (0, 2 s) has mean s and variance s^2."""
    projection = nn.Linear(2, 2, dtype=torch.float64)
    norms = [nn.LayerNorm(2, eps=0.0, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        projection.weight.copy_(float64([1, 1], [1, -1]))
        norms[0].weight.copy_(float64(2, -1))
        norms[1].weight.copy_(float64(1, 3))
    ln3 = math.log(3)
    return LayerTrace(
        modules=LayerModules(nn.Identity(), nn.Identity(), projection, *norms),
        attention=ScoredAttention(
            query=float64([[[0], [1]], [[1], [0]]]),
            key=float64([[[0], [ln3]], [[ln3], [0]]]),
            value=float64([[[1], [2]], [[3], [-1]]]),
            scaling=1.0,
        ),
        # sum_j alpha_ij v_j: token 1: 1/2 1 + 1/2 2 and 3/4 3 - 1/4; token 2: 1/4 1 + 3/4 2 and 1/2 3 - 1/2
        context=float64([[1.5, 2], [1.75, 1]]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        padded=False,
        hidden_states=float64([[1, 0], [0, 2]]),
        attention_norm_input=float64([[0, 4], [0, 8]]),
        end=LayerEnd(norm_inputs=(float64([[0, 1], [0, 1 / 2]]),), output=float64([[0, 0], [0, 0]])),
    )


def test_attention_weights_by_hand(toy, toy_trace):
    alpha = equations.attention_weights(toy_trace.attention.query, toy_trace.attention.key, 1.0, toy_trace.mask)
    torch.testing.assert_close(alpha, toy.alpha, rtol=1e-15, atol=0)


def test_transformed_values_by_hand(toy):
    f = equations.transformed_values(toy.value, toy.output_weight)
    assert f.tolist() == [[[[1, 1], [2, 2]], [[3, -3], [-1, 1]]]]


def test_contribution_vectors_by_hand(toy):
    vectors = equations.contribution_vectors(toy, "N-Enc")
    assert vectors.tolist() == [[[[1.375, -4.125], [-0.125, 0.375]], [[0.75, -2.25], [-0.75, 2.25]]]]


@pytest.mark.parametrize("method", METHODS)
def test_local_map_by_hand(toy, method):
    torch.testing.assert_close(equations.local_map(toy, method)[0], float64(*BY_HAND[method]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_mixing_ratio_by_hand(toy, stage):
    torch.testing.assert_close(equations.mixing_ratio(toy, stage)[0], float64(*RATIOS[stage]), rtol=1e-14, atol=0)
    if stage == "N-Enc":
        torch.testing.assert_close(equations.mixing_ratio(toy, stage), float64([1 / 12, 1 / 2]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_fast_path_by_hand(toy_trace, method):
    layer = TorchLayer(toy_trace, TABLE[method])
    torch.testing.assert_close(full_map(layer)[0], float64(*BY_HAND[method]), rtol=1e-13, atol=0)
    for i in (0, 1):
        row = TorchLayer(toy_trace, TABLE[method]).rows_at(torch.tensor([[i]]))
        torch.testing.assert_close(row[0, 0], float64(*BY_HAND[method][i]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_fast_mixing_ratio_by_hand(toy_trace, stage):
    ratio = mixing_ratios(toy_trace, STAGE_TABLE[stage])
    torch.testing.assert_close(ratio[0], float64(*RATIOS[stage]), rtol=1e-13, atol=0)


def test_rollout_by_hand():
    # A = [[11/12, 1/12], [1/2, 1/2]]; A A = [[121/144 + 6/144, 11/144 + 6/144], [11/24 + 6/24, 1/24 + 6/24]]
    # the second layer B = [[0, 2], [3, 0]] swaps and scales rows: B A = 2 and 3 times the other row of A
    a, b = float64(*BY_HAND["W-Res"]), float64([0, 2], [3, 0])
    squared = float64([127 / 144, 17 / 144], [17 / 24, 7 / 24])
    swapped = float64([1, 1], [11 / 4, 1 / 4])
    torch.testing.assert_close(equations.rollout(torch.stack([a, a])), torch.stack([a, squared]), rtol=1e-15, atol=0)
    torch.testing.assert_close(equations.rollout(torch.stack([a, b])), torch.stack([a, swapped]), rtol=1e-15, atol=0)
    for maps, expected in (([a, a], squared), ([a, b], swapped)):
        mantissa, log2_scale = globenc.rollout(torch.stack(maps))
        torch.testing.assert_close(mantissa[1] * torch.exp2(log2_scale[1])[:, None], expected, rtol=1e-15, atol=0)


def test_row_normalised_rollout_by_hand():
    # B's rows become [0, 1] and [1, 0]: the product is A with its rows swapped
    a, b = float64(*BY_HAND["W-Res"]), float64([0, 2], [3, 0])
    mantissa, log2_scale = globenc.rollout(torch.stack([5 * a, b]), row_normalize=True)
    torch.testing.assert_close(mantissa[1] * torch.exp2(log2_scale[1])[:, None], a.flip(0), rtol=1e-15, atol=0)


def test_unknown_method(toy):
    with pytest.raises(ValueError, match="method must be one of the eight of the paper, got 'N-ENC'"):
        equations.local_map(toy, "N-ENC")


# The same equations again, in plain Python on lists, one loop for one sum; nothing is taken from the package.


def random_layer(n, heads, head_dim, d, real, seed):
    numbers = random.Random(seed)

    def vector(size):
        return [numbers.gauss(0, 1) for _ in range(size)]

    return {
        "q": [[vector(head_dim) for _ in range(n)] for _ in range(heads)],
        "k": [[vector(head_dim) for _ in range(n)] for _ in range(heads)],
        "v": [[vector(head_dim) for _ in range(n)] for _ in range(heads)],
        "W": [vector(heads * head_dim) for _ in range(d)],
        "x": [vector(d) for _ in range(n)],
        "y": [[vector(d) for _ in range(n)] for _ in range(2)],  # what enters LayerNorm 1, 2
        "gamma": [vector(d) for _ in range(2)],
        "eps": [1e-2, 1e-3],
        "real": [j < real for j in range(n)],
    }


def loop_alpha(layer):
    alpha = []
    for q, k in zip(layer["q"], layer["k"], strict=True):
        rows = []
        for i in range(len(q)):
            scores = [sum(a * b for a, b in zip(q[i], kj, strict=True)) / math.sqrt(len(q[i])) for kj in k]
            weights = [math.exp(s) if layer["real"][j] else 0.0 for j, s in enumerate(scores)]
            rows.append([w / sum(weights) for w in weights])
        alpha.append(rows)
    return alpha


def loop_vector(layer, alpha, i, j, stage):
    d, heads, head_dim = len(layer["x"][0]), len(alpha), len(layer["q"][0][0])
    c = [0.0] * d
    for h in range(heads):  # (4)
        for row in range(d):
            for a in range(head_dim):
                c[row] += alpha[h][i][j] * layer["W"][row][h * head_dim + a] * layer["v"][h][j][a]
    if stage != "N" and i == j:  # (5)
        c = [a + b for a, b in zip(c, layer["x"][i], strict=True)]
    for norm in range({"N": 0, "N-Res": 0, "N-ResLN": 1, "N-Enc": 2}[stage]):  # (6), (7), (11)
        y = layer["y"][norm][i]
        mean_y, mean_c = sum(y) / d, sum(c) / d
        s = math.sqrt(sum((a - mean_y) ** 2 for a in y) / d + layer["eps"][norm])
        c = [(a - mean_c) / s * gamma for a, gamma in zip(c, layer["gamma"][norm], strict=True)]
    return c


def loop_ratio(layer, alpha, i, stage):
    n = len(layer["x"])
    others = [0.0] * len(layer["x"][0])
    for j in range(n):
        if j != i:
            others = [a + b for a, b in zip(others, loop_vector(layer, alpha, i, j, stage), strict=True)]
    size, own = math.hypot(*others), math.hypot(*loop_vector(layer, alpha, i, i, stage))  # (8), (14)
    return size / (size + own)


def loop_map(layer, method):
    alpha = loop_alpha(layer)
    heads, n = len(alpha), len(layer["x"])
    out = [[0.0] * n for _ in range(n)]
    for i in range(n):
        if not layer["real"][i]:
            continue
        w = [sum(alpha[h][i][j] for h in range(heads)) / heads for j in range(n)]
        for j in range(n):
            if not layer["real"][j]:
                continue
            if method in STAGES:
                out[i][j] = math.hypot(*loop_vector(layer, alpha, i, j, method))
            elif method == "W":
                out[i][j] = w[j]
            elif method == "W-FixedRes":  # (13)
                out[i][j] = 0.5 * w[j] + 0.5 * (i == j)
            elif method == "W-Res":  # (15)
                r = loop_ratio(layer, alpha, i, "N-Enc")
                others = sum(w[k] for k in range(n) if k != i)
                out[i][j] = 1 - r if i == j else r * w[j] / others
            elif method == "N-FixedRes":  # (16)
                norms = [math.hypot(*loop_vector(layer, alpha, i, k, "N")) if layer["real"][k] else 0 for k in range(n)]
                out[i][j] = 0.5 * norms[j] / sum(norms) + 0.5 * (i == j)
    return out


def as_equations(layer) -> equations.EncoderLayer:
    q, k, v = (float64(layer[name]) for name in "qkv")
    mask = torch.tensor([layer["real"]])
    y, eps = float64(*layer["y"]), layer["eps"]
    return equations.EncoderLayer(
        alpha=equations.attention_weights(q, k, q.shape[-1] ** -0.5, mask),
        value=v,
        output_weight=float64(*layer["W"]),
        hidden_states=float64(layer["x"]),
        gamma1=float64(*layer["gamma"][0]),
        s1=(y[0].var(-1, correction=0) + eps[0]).sqrt()[None],
        gamma2=float64(*layer["gamma"][1]),
        s2=(y[1].var(-1, correction=0) + eps[1]).sqrt()[None],
        mask=mask,
    )


SIZES = [
    pytest.param(3, 1, 2, 3, 3, id="n3-H1-d3"),
    pytest.param(5, 2, 3, 6, 5, id="n5-H2-d6"),
    pytest.param(4, 3, 2, 2, 4, id="n4-H3-d2"),
    pytest.param(6, 2, 2, 4, 4, id="n6-padded4-H2-d4"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "heads", "head_dim", "d", "real"), SIZES)
def test_local_map_by_loops(n, heads, head_dim, d, real, method):
    layer = random_layer(n, heads, head_dim, d, real, seed=n)
    actual = equations.local_map(as_equations(layer), method)[0]
    torch.testing.assert_close(actual, float64(*loop_map(layer, method)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("n", "heads", "head_dim", "d", "real"), SIZES)
def test_mixing_ratio_by_loops(n, heads, head_dim, d, real, stage):
    layer = random_layer(n, heads, head_dim, d, real, seed=n)
    alpha = loop_alpha(layer)
    expected = [loop_ratio(layer, alpha, i, stage) if layer["real"][i] else 0.0 for i in range(n)]
    torch.testing.assert_close(
        equations.mixing_ratio(as_equations(layer), stage)[0], float64(*expected), rtol=1e-12, atol=0
    )


def test_rollout_by_loops():
    maps = torch.rand(4, 2, 3, 3, dtype=torch.float64)
    rolled = equations.rollout(maps)
    for b in range(2):
        product = [[float(i == j) for j in range(3)] for i in range(3)]
        for layer in range(4):
            a = maps[layer, b].tolist()
            product = [[sum(a[i][k] * product[k][j] for k in range(3)) for j in range(3)] for i in range(3)]
            torch.testing.assert_close(rolled[layer, b], float64(*product), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_dtype(toy, dtype):
    layer = equations.EncoderLayer(**{k: v if k == "mask" else v.to(dtype) for k, v in vars(toy).items()})
    assert equations.local_map(layer, "N-Enc").dtype == dtype
    expected = float64(*BY_HAND["N-Enc"])
    torch.testing.assert_close(
        equations.local_map(layer, "N-Enc")[0].double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0
    )
