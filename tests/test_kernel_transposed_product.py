"""Gradients through attention with its weights held: the kernel against the equations."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BFLOAT16,
    DEVICE,
    FLOAT16,
    FLOAT32,
    INF,
    NAN,
    SIZES,
    Layer,
    case_id,
    check,
    layer_of_size,
    make_layer,
    spoil,
)
from torch import Tensor

pytest.importorskip("triton")

import globenc_kernels as gk

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture(scope="module", params=SIZES, ids=case_id)
def layer(request) -> Layer:
    return layer_of_size(request.param)


def random_gradient(layer: Layer, labels: int = 1) -> Tensor:
    """[B, n, H, labels * d_h] in the layer's dtype, finite."""
    batch, heads, n, head_dim = layer.trace.query.shape
    gradient = torch.randn(batch, n, heads, labels * head_dim, generator=torch.Generator().manual_seed(3))
    return gradient.to(layer.trace.query.dtype)


def exact_product(layer: Layer, gradient: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """sum_i alpha_ij g_i by the equations, [B, H, n, labels * d_h]."""
    return layer.alpha(dtype).transpose(2, 3) @ gradient.to(dtype).transpose(1, 2)


def product_of(layer: Layer, gradient: Tensor) -> Tensor:
    """The same by the kernel, with NaN at padding."""
    trace = layer.trace
    given = gradient.to(DEVICE)
    if not layer.mask.all():
        given = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=DEVICE).copy_(given)
        given[~layer.mask] = layer.at_padding
    result = gk.transposed_product(
        layer.given("query"), layer.given("key"), layer.attended.log_sum_exp, given, layer.tokens, trace.scaling,
        layer.window,
    )  # fmt: skip
    assert result.dtype == gradient.dtype
    return result.cpu()


def check_product(layer: Layer, gradient: Tensor) -> None:
    found = product_of(layer, gradient)
    plain, exact = exact_product(layer, gradient, layer.trace.query.dtype), exact_product(layer, gradient)
    assert found.shape == exact.shape
    check(found, plain, exact, layer.step)
    assert not bool(found.transpose(1, 2)[~layer.mask].any())


def test_transposed_product(layer):
    check_product(layer, random_gradient(layer))


@pytest.mark.parametrize("labels", [2, 3, 5], ids=lambda labels: f"labels{labels}")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["fp32", "bf16"])
def test_several_labels_side_by_side(labels, dtype):
    """Each label's gradient gives what it gives alone, to the bit."""
    layer = make_layer((65, 9), heads=2, head_dim=20, dtype=dtype, window=40)
    gradient = random_gradient(layer, labels)
    check_product(layer, gradient)
    together = product_of(layer, gradient)
    for part, alone in zip(together.split(20, 3), gradient.split(20, 3), strict=True):
        assert torch.equal(part, product_of(layer, alone))


LAYOUTS = {
    "heads-first": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens-in-front": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda g: torch.cat([g, g], 3)[..., : g.shape[3]],
    "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "fused": lambda g: torch.stack([g] * 3, 2)[:, :, 1],
}


@pytest.mark.parametrize("labels", [1, 2], ids=lambda labels: f"labels{labels}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_gradient(layout, labels):
    layer = make_layer((33, 20), heads=3, dtype=FLOAT16, padding="left")
    gradient = random_gradient(layer, labels)
    strided = LAYOUTS[layout](gradient)
    assert labels == 2 or not strided.is_contiguous()
    assert torch.equal(product_of(layer, strided), product_of(layer, gradient))


def test_an_expanded_gradient():
    layer = make_layer((33, 33), heads=2)
    gradient = random_gradient(layer)[:, :1, :, :1].expand(-1, 33, -1, 16)
    assert torch.equal(product_of(layer, gradient), product_of(layer, gradient.contiguous()))


@pytest.mark.parametrize("name", ["query", "key"])
def test_what_is_not_finite_is_seen(name):
    """A NaN at a real token is not lost on the way."""
    layer = spoil(make_layer((20,), heads=2), name, (0, 1, 3, 5), NAN)
    found = product_of(layer, random_gradient(layer))
    assert bool(found[0, 1].isnan().any())
    assert bool(found[0, 0].isfinite().all())


def test_a_gradient_that_is_not_finite():
    layer = make_layer((20,), heads=2)
    gradient = random_gradient(layer)
    gradient[0, 4, 1, 2] = INF
    found = product_of(layer, gradient)
    assert bool((found[0, 1, :, 2] == INF).all())
    assert int(found.isfinite().logical_not().sum()) == 20


def test_same_bits_twice():
    layer = make_layer((130,), heads=2)
    gradient = random_gradient(layer)
    assert torch.equal(product_of(layer, gradient), product_of(layer, gradient))


WRONG = {
    "type": ("gradient must be a tensor, got NoneType", lambda g: None),
    "dtype": ("gradient must be torch.float32, got torch.float16", lambda g: g.half()),
    "heads": (r"gradient must have shape \[2, 9, 2, labels \* head_dim\], got \[2, 9, 1, 16\]", lambda g: g[:, :, :1]),
    "part of a head": ("gradient must have a multiple of the 16 numbers of a head, .* got 15", lambda g: g[..., :15]),
    "too many": (
        "of at most 32767 labels, got 524288",
        lambda g: g[..., :1].expand(-1, -1, -1, 16 * 32768),
    ),
}


@pytest.mark.parametrize(("message", "change"), WRONG.values(), ids=WRONG)
def test_wrong_gradients(message, change):
    layer = make_layer((9, 4), heads=2)
    trace, lse = layer.trace, layer.attended.log_sum_exp
    with pytest.raises((TypeError, ValueError), match=message):
        gk.transposed_product(
            layer.given("query"), layer.given("key"), lse, change(random_gradient(layer).to(DEVICE)), layer.tokens,
            trace.scaling,
        )  # fmt: skip


def test_wrong_log_sum_exp():
    layer = make_layer((9, 4), heads=2)
    lse = layer.attended.log_sum_exp[:, :, :1]
    with pytest.raises(ValueError, match=r"log_sum_exp must have shape \[2, 1, 2, 2, 64\], got \[2, 1, 1, 2, 64\]"):
        gk.transposed_product(
            layer.given("query"), layer.given("key"), lse, random_gradient(layer).to(DEVICE), layer.tokens,
            layer.trace.scaling,
        )  # fmt: skip
