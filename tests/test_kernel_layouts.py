"""All kernels together: padding, memory layout and repetition change no bit; and the checks can fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    BFLOAT16,
    DEVICE,
    DTYPE_NAMES,
    FLOAT16,
    FLOAT32,
    INF,
    NAN,
    Layer,
    all_of,
    check,
    check_map,
    make_layer,
)
from torch import Tensor

pytest.importorskip("triton")

import globenc_kernels as gk
from globenc_kernels import arguments

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


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
