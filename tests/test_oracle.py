"""The published code's outputs in float64 (see data/oracle) as the measure of every backend."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import METHODS, STAGES, assert_rows_close, raw, row_error
from transformers import AutoModel

import globenc

ORACLE = Path(__file__).parent / "data" / "oracle"
SHARED = Path(__file__).parents[2] / "shared"
CASES = {
    "bert-n17": (ORACLE / "tiny-bert_n17.npz", ORACLE / "models" / "tiny-bert"),
    "bert-n1": (ORACLE / "tiny-bert_n1.npz", ORACLE / "models" / "tiny-bert"),
    "bert-batch3": (ORACLE / "tiny-bert_batch3.npz", ORACLE / "models" / "tiny-bert"),
    "electra-batch2": (ORACLE / "tiny-electra_batch2.npz", ORACLE / "models" / "tiny-electra"),
}
# real sentences through a real model; both are too large to ship
SENTENCES = (SHARED / "oracle" / "minilm-sst2_sentences4.npz", SHARED / "models" / "minilm-sst2")
BACKENDS = ("torch", "reference")
EXACT = 1e-10
FLOAT32 = 1e-5

over_cases = pytest.mark.parametrize("case", CASES)
over_methods = pytest.mark.parametrize("method", METHODS)
over_stages = pytest.mark.parametrize("stage", STAGES)
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float64, EXACT, id="float64"), pytest.param(torch.float32, FLOAT32, id="float32")],
)


class Oracle:
    """A case's numbers on the real tokens of each text, and the model that made them."""

    def __init__(self, case: str, dtype: torch.dtype):
        numbers, model = CASES.get(case, SENTENCES)
        if not numbers.exists() or not model.exists():
            pytest.skip(f"needs {numbers.name} and the model {model.name}, which are not part of the package")
        with np.load(numbers) as stored:
            self.numbers = {name: torch.from_numpy(stored[name]) for name in stored.files}
        self.inputs = {name[3:]: value for name, value in self.numbers.items() if name.startswith("in.")}
        self.model = AutoModel.from_pretrained(model, dtype=dtype)
        self.batch = len(self.inputs["input_ids"])
        with torch.no_grad():
            self.last_hidden = self.model(**self.inputs).last_hidden_state

    def real(self, b: int) -> torch.Tensor:
        return self.numbers[f"row{b}.idx"]

    def local(self, method: str, b: int) -> torch.Tensor:
        """[layers, m, m]"""
        if method in STAGES:
            real = self.real(b)
            return self.numbers[method][:, b][:, real][..., real]
        return self.one_token_is_one(self.numbers[f"row{b}.local.{method}"], method)

    def rollout(self, method: str, b: int) -> torch.Tensor:
        """[layers, m, m]"""
        return self.one_token_is_one(self.numbers[f"row{b}.rollout.{method}"], method)

    @staticmethod
    def one_token_is_one(values: torch.Tensor, method: str) -> torch.Tensor:
        """The published W-Res of a single token is NaN, which is a fault there: its row is the identity."""
        if method == "W-Res" and values.shape[-1] == 1:
            assert values.isnan().all()
            return torch.ones_like(values)
        return values


@cache
def oracle(case: str, dtype: torch.dtype) -> Oracle:
    return Oracle(case, dtype)


@cache
def maps_of(case: str, dtype: torch.dtype, method: str, backend: str) -> torch.Tensor:
    o = oracle(case, dtype)
    return globenc.contribution_maps(o.model, method=method, backend=backend, **o.inputs)


@over_dtypes
@over_cases
def test_last_hidden(case, dtype, tolerance):
    """The model runs here as it ran there; all else rests on this."""
    o = oracle(case, dtype)
    for b in range(o.batch):
        assert_rows_close(o.last_hidden[b, o.real(b)], o.numbers["last_hidden"][b, o.real(b)], tolerance)


@over_dtypes
@over_backends
@over_methods
@over_cases
def test_local_maps(case, method, backend, dtype, tolerance):
    o = oracle(case, dtype)
    maps = maps_of(case, dtype, method, backend)
    assert maps.dtype == dtype
    for b in range(o.batch):
        real = o.real(b)
        assert_rows_close(maps[:, b][:, real][..., real], o.local(method, b), tolerance)
        assert maps[:, b].count_nonzero() == maps[:, b][:, real][..., real].count_nonzero()  # padding is zero


@over_dtypes
@over_backends
@over_stages
@over_cases
def test_mixing_ratios(case, stage, backend, dtype, tolerance):
    o = oracle(case, dtype)
    ratios = globenc.mixing_ratios(o.model, method=stage, backend=backend, **o.inputs)
    for b in range(o.batch):
        real, expected = o.real(b), o.numbers[f"ratio_{stage}"][:, b][:, o.real(b)]
        if len(real) == 1:  # nothing to mix with: zero, up to rounding of a number between 0 and 1
            assert bool((expected == 0).all())
            assert float(ratios[:, b, real].abs().max()) <= tolerance
        else:  # token by token, each ratio a row of its own
            assert_rows_close(ratios[:, b, real][..., None], expected[..., None], tolerance)
        assert ratios[:, b].count_nonzero() == ratios[:, b, real].count_nonzero()  # padding is zero


@over_dtypes
@over_backends
@over_methods
@over_cases
def test_rollout_of_maps(case, method, backend, dtype, tolerance):
    o = oracle(case, dtype)
    rolled = raw(*globenc.rollout(maps_of(case, dtype, method, backend)))
    for b in range(o.batch):
        real = o.real(b)
        assert_rows_close(rolled[:, b][:, real][..., real], o.rollout(method, b), tolerance)


@over_dtypes
@over_backends
@over_methods
@over_cases
def test_attribute_all(case, method, backend, dtype, tolerance):
    o = oracle(case, dtype)
    out = globenc.attribute(o.model, method=method, position="all", per_layer=True, backend=backend, **o.inputs)
    layers, last = raw(out.layer_scores, out.layer_log2_scale), raw(out.scores, out.log2_scale)
    for b in range(o.batch):
        real, expected = o.real(b), o.rollout(method, b)
        assert_rows_close(layers[:, b][:, real][..., real], expected, tolerance)
        assert_rows_close(last[b, real][:, real], expected[-1], tolerance)


@over_dtypes
@over_backends
@over_methods
@over_cases
def test_attribute_cls(case, method, backend, dtype, tolerance):
    o = oracle(case, dtype)
    out = globenc.attribute(o.model, method=method, position="cls", per_layer=True, backend=backend, **o.inputs)
    layers, last = raw(out.layer_scores, out.layer_log2_scale), raw(out.scores, out.log2_scale)
    for b in range(o.batch):
        real, expected = o.real(b), o.rollout(method, b)[:, 0]
        assert_rows_close(layers[:, b][:, real], expected, tolerance)
        assert_rows_close(last[b, real], expected[-1], tolerance)


@over_dtypes
@over_cases
def test_published_aggregate(case, dtype, tolerance):
    """What the published code itself calls GlobEnc: the whole rollout over N-Enc, padding zero."""
    o = oracle(case, dtype)
    if "globenc" not in o.numbers:
        pytest.skip("the published code has no aggregate for this architecture")
    out = globenc.attribute(o.model, position="all", **o.inputs)
    assert_rows_close(raw(out.scores, out.log2_scale), o.numbers["globenc"], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["W-Res", "N-FixedRes", "N-Enc"])
def test_real_sentences(method, backend):
    """Every number of a real model at once, float64; each of the three methods needs all that the others need."""
    test_last_hidden("sentences", torch.float64, EXACT)
    test_local_maps("sentences", method, backend, torch.float64, EXACT)
    test_rollout_of_maps("sentences", method, backend, torch.float64, EXACT)
    test_attribute_cls("sentences", method, backend, torch.float64, EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_real_sentences_float32(method):
    test_attribute_cls("sentences", method, "torch", torch.float32, FLOAT32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels take no CPU tensors")
@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("bert-n17", "N-Enc"),
        ("bert-n1", "W-Res"),
        pytest.param("bert-batch3", "W-Res", marks=pytest.mark.slow),
        pytest.param("electra-batch2", "N-Enc", marks=pytest.mark.slow),
        pytest.param("bert-batch3", "N-FixedRes", marks=pytest.mark.slow),
        pytest.param("sentences", "N-Enc", marks=pytest.mark.slow),
    ],
)
def test_kernels(case, method):
    """The Triton kernels, in the interpreter, against the published code's numbers."""
    if case != "sentences":
        test_local_maps(case, method, "triton", torch.float32, FLOAT32)
        test_mixing_ratios(case, "N-Enc", "triton", torch.float32, FLOAT32)
    test_attribute_cls(case, method, "triton", torch.float32, FLOAT32)


@over_dtypes
@over_backends
def test_one_token_w_res_is_exactly_one(backend, dtype, tolerance):
    assert bool((maps_of("bert-n1", dtype, "W-Res", backend) == 1).all())


def test_the_comparison_can_fail():
    expected = oracle("bert-n17", torch.float64).local("N-Enc", 0)
    assert_rows_close(expected * (1 + 1e-12), expected, EXACT)
    for wrong in (expected * (1 + 1e-9), expected.mT, expected.flip(0), torch.full_like(expected, torch.nan)):
        with pytest.raises(AssertionError, match="row error"):
            assert_rows_close(wrong, expected, EXACT)
    one_entry = expected.clone()
    one_entry[1, 3, 5] += 2e-10 * one_entry[1, 3].max()
    with pytest.raises(AssertionError, match="row error"):
        assert_rows_close(one_entry, expected, EXACT)
    with pytest.raises(AssertionError, match="shape"):
        assert_rows_close(expected[0], expected, EXACT)
    assert row_error(torch.tensor([1e-30, 0.0]), torch.zeros(2)) == torch.inf  # a row of zeros allows nothing
