"""What only a GPU can show: dispatch, streams, devices, compilations, sizes. Skipped elsewhere; for bench/gpu.py."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import raw, row_error, tiny_model, token_batch

import globenc
from globenc.contributions.backend import choose_backend
from globenc.contributions.triton_backend import TritonBackend
from globenc.encoders import Encoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 3, "max_position_embeddings": 600}


def model_on(device: str = "cuda", dtype: torch.dtype = torch.float32, **config):
    return tiny_model("bert", dtype, **{**SIZES, **config}).to(device)


def batch_on(device: str, *lengths: int) -> dict:
    return {name: tensor.to(device) for name, tensor in token_batch(lengths).items()}


def test_auto_takes_the_kernels():
    mask = torch.ones(1, 7, dtype=torch.bool, device="cuda")
    model, inputs = model_on(dtype=torch.bfloat16), batch_on("cuda", 40, 130)
    assert isinstance(choose_backend("auto", mask, Encoder.of(model).layers), TritonBackend)
    found, kernels = (globenc.attribute(model, backend=b, **inputs).scores for b in ("auto", "triton"))
    assert torch.equal(found, kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("n", [1, 64, 130, 517])
def test_maps(dtype, n):
    """The kernels on the model's own activations against the equations in float64 on the same activations."""
    model, inputs = model_on(dtype=dtype), batch_on("cuda", n, max(1, n // 3))
    found, plain = (globenc.contribution_maps(model, backend=b, **inputs) for b in ("triton", "torch"))
    exact = globenc.contribution_maps(copy.deepcopy(model).double(), backend="reference", **inputs)
    error, other = float(row_error(found, exact).max()), float(row_error(plain, exact).max())
    assert error <= 2 * other + 4 * torch.finfo(dtype).eps


def test_rows_and_maps_agree():
    model, inputs = model_on(), batch_on("cuda", 517, 300, 5)
    rolled = raw(*globenc.rollout(globenc.contribution_maps(model, backend="triton", **inputs)))[-1]
    out = globenc.attribute(model, backend="triton", position=[0, -1], **inputs)
    ends = [516, 299, 4]
    expected = torch.stack([rolled[b, [0, end]] for b, end in enumerate(ends)])
    assert float(row_error(raw(out.scores, out.log2_scale), expected).max()) < 5e-6


def test_no_compilation_for_another_length():
    """Head count, head size and dtype are compiled for, lengths and batches are not."""
    from globenc_kernels import rollout

    model = model_on(dtype=torch.bfloat16)
    kernel = rollout._rollout_rows_kernel

    def variants() -> int:
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    for lengths in ((64,), (65, 9), (1,)):
        globenc.attribute(model, backend="triton", per_layer=True, **batch_on("cuda", *lengths))
    known = variants()
    for lengths in ((128,), (129,), (300, 200, 100), (31, 7), (512,) * 4):
        globenc.attribute(model, backend="triton", per_layer=True, **batch_on("cuda", *lengths))
    assert variants() == known


def test_streams():
    model, inputs = model_on(), batch_on("cuda", 200, 90)
    expected = globenc.attribute(model, backend="triton", **inputs).scores
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = globenc.attribute(model, backend="triton", **inputs).scores
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    first, second = (model_on(device) for device in ("cuda:0", "cuda:1"))
    a = globenc.attribute(first, backend="triton", **batch_on("cuda:0", 100)).scores
    b = globenc.attribute(second, backend="triton", **batch_on("cuda:1", 100)).scores
    assert b.device.index == 1
    torch.testing.assert_close(a.cpu(), b.cpu())


def test_tf32_setting_changes_nothing_of_ours():
    model, inputs = model_on(), batch_on("cuda", 130)
    exact = globenc.contribution_maps(copy.deepcopy(model).double(), backend="reference", **inputs)[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        strict = globenc.contribution_maps(model, backend="triton", **inputs)[0]
    finally:
        torch.set_float32_matmul_precision(before)
    assert float(row_error(strict, exact).max()) < 1e-5


def test_memory_is_linear():
    """Twice the tokens, about twice the memory: nothing of size n x n."""
    model = model_on(dtype=torch.bfloat16, max_position_embeddings=16384)

    def peak(n: int) -> int:
        inputs = {"input_ids": torch.randint(5, 90, (1, n), device="cuda")}
        globenc.attribute(model, backend="triton", **inputs)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        globenc.attribute(model, backend="triton", **inputs)
        return torch.cuda.max_memory_allocated() - before

    assert peak(16384) <= 2.2 * peak(8192)


def test_wide_strides_and_far_offsets():
    """A batch whose queries lie beyond the first 2**31 elements of memory."""
    import globenc_kernels as kernels

    n, heads, head_dim = 65, 6, 16
    batch = 2
    memory = torch.empty(2**31 + 10 * n * heads * head_dim, dtype=torch.bfloat16, device="cuda")
    query = memory.as_strided((batch, heads, n, head_dim), (2**31, head_dim, heads * head_dim, 1))
    query.copy_(torch.randn(batch, heads, n, head_dim))
    tokens = kernels.TokenRanges(torch.ones(batch, n, dtype=torch.bool, device="cuda"))
    found = kernels.attention(query, query, query, tokens, 0.25).context
    near = query.contiguous()
    expected = kernels.attention(near, near, near, tokens, 0.25).context
    assert torch.equal(found, expected)


def test_out_of_memory():
    model = model_on(dtype=torch.bfloat16, max_position_embeddings=131072)
    inputs = {"input_ids": torch.randint(5, 90, (4, 131072), device="cuda")}
    with pytest.raises(torch.OutOfMemoryError, match="take fewer texts at once"):
        globenc.contribution_maps(model, backend="triton", **inputs)
