"""Class scores by every backend: the products of held attention weights, alone and in the whole call."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import attention_state, row_error, synthetic_layer, tiny_model, token_batch
from torch import Tensor

import globenc
from globenc.capture import ScoredAttention
from globenc.contributions import attention_weights
from globenc.contributions.reference_backend import ReferenceBackend
from globenc.contributions.torch_backend import TorchBackend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "max_position_embeddings": 80}
REFERENCES = ("zero", "model", "origin")
FAMILIES = ("bert", "roberta", "albert", "distilbert", "modernbert")


def classifier(family: str = "bert", dtype: torch.dtype = torch.float64, head: str = "SequenceClassification"):
    sizes = {
        "distilbert": {"dim": 48, "n_heads": 3, "n_layers": 2, "max_position_embeddings": 80},
        "t5": {"d_model": 48, "d_kv": 16},
    }.get(family, SIZES)
    return tiny_model(family, dtype, head, **sizes).to(DEVICE)


def last_token(output) -> Tensor:
    return output[0][:, -1, :5].sum(-1)


def scores_of(model, backend: str, inputs: dict, **options) -> globenc.ClassScores:
    options = {"mask_token_id": 4, **options}
    on_device = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    return globenc.class_scores(model, backend=backend, **options, **on_device)


def products(attention: ScoredAttention, mask: Tensor | None, value: Tensor, gradient: Tensor) -> list[list[Tensor]]:
    """Both products by the equations and by PyTorch."""
    weights = [backend.held_weights(attention, mask) for backend in (ReferenceBackend(), TorchBackend())]
    return [[held.product(value) for held in weights], [held.transposed_product(gradient) for held in weights]]


@pytest.mark.parametrize("small_blocks", [False, True], ids=["one-block", "tiles"])
@pytest.mark.parametrize("window", [None, 0, 5], ids=["", "window0", "window5"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_products(monkeypatch, small_blocks, window, padded):
    trace = synthetic_layer((150, 150), 3, 16, 24, torch.float64)
    attention = ScoredAttention(trace.query, trace.key, trace.value, trace.scaling, window)
    mask = torch.arange(150) < torch.tensor([150, 40])[:, None] if padded else None
    if small_blocks:
        monkeypatch.setattr(attention_weights, "SCORES_PER_BLOCK", 1)
        monkeypatch.setattr(attention_weights, "QUERIES_PER_BLOCK", 16)
        monkeypatch.setattr(attention_weights, "QUERIES_PER_TILE", 16)
        if window is None:
            scores = trace.query @ trace.key.transpose(2, 3) * trace.scaling
            scores = scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)
            attention = replace(attention, log_sum_exp=scores.logsumexp(3))
    value, gradient = torch.randn(2, 3, 150, 16).double(), torch.randn(2, 150, 3, 32).double()
    if mask is not None:
        gradient = gradient * mask[:, :, None, None]
    (exact, found), (exact_back, found_back) = products(attention, mask, value, gradient)
    real = torch.ones(2, 150, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(found[real], exact[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(found_back, exact_back, rtol=0, atol=1e-12)
    assert found_back.shape == (2, 3, 150, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_products_in_half_precision_are_summed_in_float32(dtype):
    trace = synthetic_layer((150,), 2, 16, 24, dtype)
    attention = ScoredAttention(trace.query, trace.key, trace.value, trace.scaling)
    gradient = torch.randn(1, 150, 2, 16).to(dtype)
    for exact, found in products(attention, None, trace.value, gradient):
        assert found.dtype == exact.dtype == dtype
        assert float(row_error(found, exact).max()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_and_torch_agree(family, reference):
    model, inputs = classifier(family), token_batch((9, 4))
    for label in ("predicted", "all"):
        options = {"reference": reference, "label": label}
        exact, found = (scores_of(model, backend, inputs, **options) for backend in ("reference", "torch"))
        torch.testing.assert_close(found.scores, exact.scores, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.remainder, exact.remainder, rtol=0, atol=1e-10)
        assert float(exact.completeness_gap.max()) < 1e-10


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_positions_that_add_to_the_scores(backend):
    model, inputs = classifier("t5", head="Model"), token_batch((9, 4))
    answer = lambda output: output[0][:, 0, 3]  # noqa: E731
    assert float(scores_of(model, backend, inputs, answer=answer).completeness_gap.max()) < 1e-10


TRITON_CASES = {
    "zero": ("bert", {"reference": "zero"}),
    "model": ("bert", {"reference": "model"}),
    "origin": ("bert", {"reference": "origin"}),
    "all-labels": ("bert", {"label": "all"}),
    "layers-and-maps": ("bert", {"per_layer": True, "maps": True}),
    "albert": ("albert", {}),
    "distilbert": ("distilbert", {}),
    "modernbert": ("modernbert", {}),
}


@pytest.mark.parametrize(("family", "options"), TRITON_CASES.values(), ids=TRITON_CASES.keys())
def test_triton(family, options):
    check_triton(classifier(family, torch.float32), token_batch((9, 4)), **options)


@pytest.mark.parametrize("reference", REFERENCES)
def test_triton_with_padding_on_the_left(reference):
    inputs = token_batch((70, 4), left=True, position_ids=True)
    check_triton(classifier(dtype=torch.float32, head="Model"), inputs, reference=reference, answer=last_token)


def check_triton(model, inputs: dict, **options) -> None:
    """As near to the equations in float64 as PyTorch in float32 is, within rounding."""
    pytest.importorskip("triton")
    exact = scores_of(copy.deepcopy(model).double(), "reference", inputs, **options)
    found, plain = (scores_of(model, backend, inputs, **options) for backend in ("triton", "torch"))
    for name in ("scores", "remainder", "maps", "layer_scores"):
        of_exact, of_found, of_plain = (getattr(out, name) for out in (exact, found, plain))
        if of_exact is None:
            assert of_found is None
            continue
        size = float(of_exact.abs().max())
        error, other = (float((out - of_exact).abs().max()) / size for out in (of_found, of_plain))
        assert error <= 2 * other + 2e-6, f"{name}: {error:.1e}, PyTorch {other:.1e}"
    summed = found.scores.abs().sum(-1) + found.remainder.abs() + found.logits.abs()
    assert bool((found.completeness_gap <= 1e-4 * summed).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_triton_in_half_precision(dtype):
    pytest.importorskip("triton")
    model, inputs = classifier(dtype=dtype), token_batch((9, 4))
    exact = scores_of(copy.deepcopy(model).double(), "reference", inputs, label=[0, 1]).scores
    found, plain = (scores_of(model, backend, inputs, label=[0, 1]).scores for backend in ("triton", "torch"))
    assert found.dtype == torch.float32
    size = float(exact.abs().max())
    error, other = (float((scores - exact).abs().max()) / size for scores in (found, plain))
    assert error <= 2 * other + 4 * torch.finfo(dtype).eps


def test_the_kernels_are_what_runs(monkeypatch):
    """One attention a layer in the pass and one in its replay, and one transposed product a layer, for all labels."""
    kernels = pytest.importorskip("globenc_kernels")
    calls: list[str] = []

    def counted(name: str):
        function = getattr(kernels, name)

        def call(*args, **options):
            calls.append(name)
            return function(*args, **options)

        return call

    for name in ("attention", "transposed_product"):
        monkeypatch.setattr(kernels, name, counted(name))
    model = classifier(dtype=torch.float32)
    scores_of(model, "triton", token_batch((6,)))
    assert calls.count("attention") == 4
    # the rows that tell how much of the top layer the answer reads come from that layer's output alone
    assert calls.count("transposed_product") == 2
    calls.clear()
    scores_of(model, "triton", token_batch((6,)), reference="origin", label="all")
    assert calls.count("attention") == calls.count("transposed_product") == 2
    calls.clear()
    scores_of(model, "torch", token_batch((6,)))
    assert not calls


@pytest.mark.parametrize(
    ("family", "reason"),
    [("deberta-v3", "it computes attention in code of its own"), ("t5", "positions add to its scores")],
)
def test_triton_does_not_fall_back(family, reason):
    pytest.importorskip("triton")
    model = classifier(family, torch.float32, "Model")
    before = attention_state(model)
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot take this model: {reason}"):
        scores_of(model, "triton", token_batch((6,)), answer=last_token)
    assert attention_state(model) == before


def test_auto_leaves_layers_that_the_kernels_cannot_take_to_torch(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("globenc.contributions.backend.takes_kernels", lambda device: True)
    model, inputs = classifier(), token_batch((9, 4))  # float64
    found, expected = (scores_of(model, backend, inputs) for backend in ("auto", "torch"))
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, reference, torch, triton; got 'fast'"):
        scores_of(classifier(), "fast", token_batch((6,)))
