"""backend="triton" end to end: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from helpers import (
    METHODS,
    STAGES,
    attention_state,
    pictures,
    raw,
    row_error,
    tiny_model,
    tiny_vision,
    token_batch,
)

import globenc
from globenc.contributions.backend import choose_backend
from globenc.contributions.reference_backend import ReferenceBackend
from globenc.contributions.torch_backend import TorchBackend
from globenc.contributions.triton_backend import TritonBackend
from globenc.contributions.weight_cache import _WEIGHT_CACHE
from globenc.encoders import Encoder
from globenc.model_state import precise

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "max_position_embeddings": 80}
ROUNDING = 4e-7  # a step in each of two layers


def model_of(family: str = "bert", dtype: torch.dtype = torch.float32, **config):
    if family == "distilbert":
        sizes = {"dim": 48, "n_heads": 3, "n_layers": 2, "max_position_embeddings": 80}
    else:
        sizes = {**SIZES, "num_hidden_layers": 4} if family == "albert" else SIZES
    return tiny_model(family, dtype, **{**sizes, **config}).to(DEVICE)


def on_device(inputs: dict) -> dict:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def assert_as_good(found, expected, plain) -> None:
    """At most twice the error of the plain float32 computation, plus rounding."""
    error, allowed = row_error(found, expected).max(), 2 * row_error(plain, expected).max() + ROUNDING
    assert error <= allowed, f"{error:.1e} of {allowed:.1e}"


@pytest.fixture(scope="module")
def bert32():
    return model_of()


@pytest.fixture(scope="module")
def bert64(bert32):
    return copy.deepcopy(bert32).double()


CASES = {
    "cls": {"method": "N-Enc"},
    "layers": {"method": "N-Enc", "position": [0, -1], "per_layer": True},
    "mean": {"method": "N-ResLN", "position": "mean"},
    "all": {"method": "N-Res", "position": "all"},
    "row-normalize": {"method": "N", "row_normalize": True},
    "N-FixedRes": {"method": "N-FixedRes", "per_layer": True},
    "W": {"method": "W", "position": 1},
    "W-FixedRes": {"method": "W-FixedRes", "position": "mean"},
    "W-Res": {"method": "W-Res"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_attribute(bert32, bert64, options):
    inputs = on_device(token_batch((9, 4)))
    found, expected, plain = (
        globenc.attribute(model, backend=backend, **options, **inputs)
        for model, backend in ((bert32, "triton"), (bert64, "reference"), (bert32, "reference"))
    )
    assert found.scores.dtype == torch.float32
    assert_as_good(*(raw(out.scores, out.log2_scale) for out in (found, expected, plain)))
    if options.get("layers"):
        assert_as_good(*(raw(o.layer_scores, o.layer_log2_scale) for o in (found, expected, plain)))
    torch.testing.assert_close(found.model_output[0], plain.model_output[0], rtol=1e-4, atol=1e-5)


def test_every_case_is_a_method():
    assert {options["method"] for options in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "albert", "ernie", "data2vec-text"])
def test_families(family):
    model = model_of(family)
    inputs = on_device(token_batch((6,)))
    found, expected, plain = (
        globenc.contribution_maps(m, backend=b, **inputs)
        for m, b in ((model, "triton"), (copy.deepcopy(model).double(), "reference"), (model, "reference"))
    )
    assert_as_good(found, expected, plain)


PRE_NORM = {
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 10},
    "eurobert": {"num_key_value_heads": 1},
    "esm": {},
    "nomic_bert": {"head_dim": 16},
}


@pytest.mark.parametrize(
    ("family", "method", "lengths"),
    [
        ("modernbert", "N-Enc", (75,)),
        ("modernbert", "W-Res", (9, 4)),
        *((f, "N-Enc", (9, 4)) for f in list(PRE_NORM)[1:]),
    ],
    ids=str,
)
def test_windows_grouped_queries_and_layers_without_norms(family, method, lengths):
    model = model_of(family, **PRE_NORM[family])
    inputs = on_device(token_batch(lengths))
    double = copy.deepcopy(model).double()
    for call in (globenc.contribution_maps, globenc.attribute):
        found, expected, plain = (
            call(m, method=method, backend=b, **inputs)
            for m, b in ((model, "triton"), (double, "reference"), (model, "reference"))
        )
        if call is globenc.attribute:
            found, expected, plain = (raw(out.scores, out.log2_scale) for out in (found, expected, plain))
        assert_as_good(found, expected, plain)
    found, expected, plain = (
        globenc.mixing_ratios(m, backend=b, **inputs)
        for m, b in ((model, "triton"), (double, "reference"), (model, "reference"))
    )
    assert_as_good(found, expected, plain)


def test_layer_scale():
    model = tiny_vision("dinov2", torch.float32, hidden_size=48).to(DEVICE)
    found, expected, plain = (
        globenc.contribution_maps(m, backend=b, pixel_values=pictures(dtype=m.dtype).to(DEVICE))
        for m, b in ((model, "triton"), (copy.deepcopy(model).double(), "reference"), (model, "reference"))
    )
    assert_as_good(found, expected, plain)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deberta-v3", "it computes attention in code of its own"),
        ("longformer", "it computes attention in code of its own"),
        ("t5", "positions add to its scores"),
    ],
)
def test_attention_that_the_kernels_do_not_know(family, reason):
    model = tiny_model(family, torch.float32).to(DEVICE)
    if family == "t5":
        model = tiny_model("t5", torch.float32, d_model=48, d_kv=16).to(DEVICE)
    inputs = on_device(token_batch((6,)))
    for call in (globenc.contribution_maps, globenc.mixing_ratios):
        with pytest.raises(RuntimeError, match=f"backend='triton' cannot take this model: {reason}"):
            call(model, backend="triton", **inputs)
    with pytest.raises(RuntimeError, match=f"cannot take this model: {reason}"):
        globenc.attribute(model, backend="triton", position="mean", **inputs)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_changes_nothing(bert32, left):
    inputs = on_device(token_batch((8, 70), left=left, position_ids=True))
    alone = on_device(token_batch((8,), position_ids=True))
    batched = globenc.attribute(bert32, backend="triton", **inputs).scores[0]
    real = inputs["attention_mask"][0].bool()
    assert bool((batched[~real] == 0).all())
    torch.testing.assert_close(batched[real], globenc.attribute(bert32, backend="triton", **alone).scores[0])


@pytest.mark.parametrize("stage", STAGES)
def test_mixing_ratios(bert32, bert64, stage):
    inputs = on_device(token_batch((7, 5)))
    found, expected, plain = (
        globenc.mixing_ratios(m, method=stage, backend=b, **inputs)
        for m, b in ((bert32, "triton"), (bert64, "reference"), (bert32, "reference"))
    )
    assert_as_good(found, expected, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype):
    """As near to the model's own numbers in float64 as the PyTorch path, whose sums are in float32, within rounding."""
    model = model_of(dtype=dtype)
    inputs = on_device(token_batch((9, 5)))
    exact = globenc.attribute(copy.deepcopy(model).double(), backend="reference", **inputs).scores
    found, plain = (globenc.attribute(model, backend=backend, **inputs).scores for backend in ("triton", "torch"))
    assert found.dtype == torch.float32
    error, other = float(row_error(found, exact).max()), float(row_error(plain, exact).max())
    assert error <= 2 * other + torch.finfo(dtype).eps


def test_same_bits_twice(bert32):
    inputs = on_device(token_batch((9, 5)))
    first, second = (globenc.attribute(bert32, backend="triton", per_layer=True, **inputs) for _ in range(2))
    assert torch.equal(first.layer_scores, second.layer_scores)


def test_the_model_is_left_as_found(bert32):
    before = attention_state(bert32)
    globenc.attribute(bert32, backend="triton", **on_device(token_batch()))
    assert attention_state(bert32) == before


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast(DEVICE.type)])
def test_under(bert32, context):
    inputs = on_device(token_batch())
    expected = globenc.attribute(bert32, backend="triton", **inputs).scores
    with context():
        found = globenc.attribute(bert32, backend="triton", **inputs).scores
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)
    torch.testing.assert_close(globenc.attribute(bert32, backend="triton", **inputs).scores, expected)


def test_changed_weights_are_seen():
    """Also where nobody waits for the answer: a stale flag that comes true makes the call begin again."""
    model, inputs = model_of(), on_device(token_batch())
    globenc.attribute(model, backend="triton", **inputs)
    for layer in model.encoder.layer:
        layer.attention.output.dense.weight.data[:, 1] *= -3  # past the version counter
    found = globenc.attribute(model, backend="triton", **inputs).scores
    fresh = globenc.attribute(copy.deepcopy(model), backend="triton", **inputs).scores
    torch.testing.assert_close(found, fresh)


def test_a_stale_flag_begins_again(bert32, monkeypatch):
    calls = []
    real = TorchBackend.residual_mismatch

    def stale(backend, trace):
        calls.append(trace)
        if len(calls) == 1:
            trace.stale_cache_flags.append(torch.tensor(True))
        return real(backend, trace)

    monkeypatch.setattr(TorchBackend, "residual_mismatch", stale)
    globenc.attribute(bert32, backend="torch", **on_device(token_batch()))
    assert len(calls) == 2 * SIZES["num_hidden_layers"]


def test_layers_may_share_a_projection(monkeypatch):
    """Each with its own LayerNorms: what is cached of one layer is not taken for the other's."""
    model, inputs = model_of(), on_device(token_batch())
    first, second = (layer.attention.output for layer in model.encoder.layer)
    second.dense = first.dense
    for _ in range(2):
        found, plain = (globenc.contribution_maps(model, backend=b, **inputs) for b in ("triton", "reference"))
        assert float(row_error(found, plain).max()) < 1e-5
    keys = _WEIGHT_CACHE[first.dense]
    assert len({key for key in keys if "gram" in key[0]}) == 2


def test_weights_that_never_stand_still(bert32, monkeypatch):
    real = TorchBackend.residual_mismatch

    def stale(backend, trace):
        trace.stale_cache_flags.append(torch.tensor(True))
        return real(backend, trace)

    monkeypatch.setattr(TorchBackend, "residual_mismatch", stale)
    with pytest.raises(RuntimeError, match="weights change during the call"):
        globenc.attribute(bert32, backend="torch", **on_device(token_batch()))


def test_layernorm_weights_keep_their_digits():
    """In a half-precision model with float32 LayerNorms, neither what is cached nor the diagonal rounds them."""
    model, inputs = model_of(dtype=torch.bfloat16), on_device(token_batch())
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
            module.register_forward_pre_hook(lambda m, args: (args[0].float(),))
            module.register_forward_hook(lambda m, args, out: out.bfloat16())
    norm = model.encoder.layer[0].output.LayerNorm
    before = globenc.contribution_maps(model, backend="triton", **inputs)[0]
    norm.weight.data.mul_(1.0015)  # less than bfloat16 can tell
    after = globenc.contribution_maps(model, backend="triton", **inputs)[0]
    torch.testing.assert_close(after, before * 1.0015, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_products_that_are_told_to_round(bert32, backend):
    """A caller who allows TF32 or bfloat16 products for the model gets the model's numbers, not a false alarm."""
    inputs = on_device(token_batch())
    expected = globenc.attribute(bert32, backend=backend, **inputs).scores
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = globenc.attribute(bert32, backend=backend, **inputs).scores
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the interpreter")
def test_two_threads(bert32):
    inputs, results = token_batch(), []
    expected = globenc.attribute(bert32, backend="triton", **inputs).scores
    work = threading.Thread(target=lambda: results.append(globenc.attribute(bert32, backend="triton", **inputs).scores))
    work.start()
    results.append(globenc.attribute(bert32, backend="triton", **inputs).scores)
    work.join()
    assert len(results) == 2
    assert all(torch.equal(scores, expected) for scores in results)


def test_large_scores():
    """Attention weights come from differences of scores: large ones cost a rounding of the score and no more."""
    model = model_of()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.mul_(40)
    attention = model.encoder.layer[0].attention.self
    inputs = on_device(token_batch((30,)))
    found, expected, plain = (
        globenc.contribution_maps(m, backend=b, **inputs)[0]
        for m, b in ((model, "triton"), (copy.deepcopy(model).double(), "reference"), (model, "reference"))
    )
    embedded = model.embeddings(inputs["input_ids"])
    query, key = (m(embedded)[0].view(30, 3, 16).double() for m in (attention.query, attention.key))
    score = float(torch.einsum("ihd,jhd->hij", query, key).abs().max()) / 4
    assert score > 100
    error = float(row_error(found, expected).max())
    assert error <= 2 * float(row_error(plain, expected).max()) + score * torch.finfo(torch.float32).eps


def test_an_activation_patch_is_found(bert32):
    hook = bert32.encoder.layer[1].attention.output.dense.register_forward_hook(lambda m, a, out: out * 0.5)
    try:
        with pytest.raises(ValueError, match="layer 1: what enters the first LayerNorm is not the residual plus"):
            globenc.attribute(bert32, backend="triton", **on_device(token_batch()))
    finally:
        hook.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(value):
    model = model_of()
    with torch.no_grad():
        model.encoder.layer[0].attention.self.value.weight[3, 3] = value
    with pytest.raises(FloatingPointError, match="the attribution is not finite"):
        globenc.attribute(model, backend="triton", **on_device(token_batch()))


UNSUPPORTED = {
    "float64": ({}, torch.float64, "it computes in torch.float32, torch.float16, torch.bfloat16, and the layer is"),
    "head size": (
        {"num_attention_heads": 6},
        torch.float32,
        "it takes heads of size 16 to 128, and the layer's have 8",
    ),
    "heads": ({"hidden_size": 33 * 16, "num_attention_heads": 33}, torch.float32, "it takes 1 to 32 heads, and the"),
}


@pytest.mark.parametrize(("config", "dtype", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_models_that_kernels_cannot_take(config, dtype, message):
    model, inputs = model_of(dtype=dtype, **config), on_device(token_batch())
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot take this model: {message}.*use backend='torch'"):
        globenc.attribute(model, backend="triton", **inputs)
    before = attention_state(model)
    globenc.attribute(model, backend="auto", **inputs)
    assert attention_state(model) == before


def test_auto_leaves_single_layers_to_torch(monkeypatch):
    """Where the device has the kernels, a layer that they cannot take is PyTorch's, without a word."""
    mask = torch.ones(1, 7, dtype=torch.bool, device=DEVICE)
    monkeypatch.setattr("globenc.contributions.backend.takes_kernels", lambda device: True)
    model = model_of(dtype=torch.float64)
    layers = Encoder.of(model).layers
    assert isinstance(choose_backend("auto", mask, layers), TritonBackend)
    found = globenc.attribute(model, **on_device(token_batch()))
    expected = globenc.attribute(model, backend="torch", **on_device(token_batch()))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-14, atol=0)  # scaled in another order
    assert isinstance(choose_backend("torch", mask, layers), TorchBackend)
    assert isinstance(choose_backend("reference", mask, layers), ReferenceBackend)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="here is a GPU")
def test_auto_on_a_cpu_is_pytorch(bert32):
    layers = Encoder.of(bert32).layers
    assert isinstance(choose_backend("auto", torch.ones(1, 7, dtype=torch.bool), layers), TorchBackend)


def test_cpu_tensors_without_the_interpreter(programs):
    done = programs.start("import globenc; globenc.GlobEnc.from_pretrained(backend='triton', device='cpu')")
    _, errors = done.communicate(timeout=120)
    assert done.returncode != 0
    assert "backend='triton' cannot run here: it needs a CUDA GPU" in errors


def test_tf32_is_switched_off_inside_alone():
    """The caller's own matrix products keep the caller's setting; ours are true float32."""
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    fast, exact = ("tf32", "ieee") if name == "fp32_precision" else (True, False)
    try:
        setattr(matmul, name, fast)
        with precise(DEVICE):
            assert getattr(matmul, name) == exact
            with precise(DEVICE):
                pass
            assert getattr(matmul, name) == exact
        assert getattr(matmul, name) == fast
    finally:
        setattr(matmul, name, before)


def test_checkpoint_in_the_package():
    texts = ["a charming journey", "unflinchingly bleak and desperate to a fault"]
    found, expected = (
        globenc.GlobEnc.from_pretrained(backend=backend, device=str(DEVICE))(texts) for backend in ("triton", "torch")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.label == theirs.label
        torch.testing.assert_close(torch.as_tensor(ours.scores), torch.as_tensor(theirs.scores), rtol=1e-4, atol=1e-6)


def test_linear_layers_without_bias():
    model, inputs = model_of(), on_device(token_batch())
    for layer in model.encoder.layer:
        layer.attention.output.dense.bias = None
    found, expected = (globenc.contribution_maps(model, backend=backend, **inputs) for backend in ("triton", "torch"))
    assert float(row_error(found, expected).max()) < 1e-5


def test_out_of_memory_says_what_to_lower(bert32, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nProcess 1 has ...")

    monkeypatch.setattr("globenc.forward_pass.capture", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"with 2 texts of 9 tokens: take fewer texts at once.*20.00 GiB"):
        globenc.attribute(bert32, **on_device(token_batch((9, 5))))
