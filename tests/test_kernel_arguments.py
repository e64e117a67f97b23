"""What launchers take and refuse, where kernels run, and what a first launch says."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPE_NAMES,
    FLOAT32,
    INF,
    NAN,
    ROOT,
    make_layer,
    on_device,
    scale_arguments,
    weight_of,
)
from torch import Tensor

pytest.importorskip("triton")

import globenc_kernels as gk
from globenc_kernels import arguments, capability

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize(
    ("mask", "ranges"),
    [
        ("111", [0, 3, 0]),
        ("110", [0, 2, 0]),
        ("011", [1, 3, 0]),
        ("0110", [1, 3, 0]),
        ("01010", [1, 4, 1]),
        ("1", [0, 1, 0]),
        ("000", [0, 3, 1]),
    ],
)
def test_token_ranges(mask, ranges):
    real = torch.tensor([[c == "1" for c in mask]] * 2)
    for given in (real, real[:1].expand(2, -1), torch.stack([real, ~real], -1)[..., 0]):
        tokens = gk.TokenRanges(given.to(DEVICE))
        assert tokens.ranges.tolist() == [ranges] * 2
        assert torch.equal(tokens.mask.bool().cpu(), real)
        assert (tokens.mask.dtype, tokens.ranges.dtype) == (torch.int8, torch.int32)
        assert tokens.shape == (2, len(mask))
    assert tokens.to(tokens.mask.device) is tokens
    moved = tokens.to(torch.device("meta"))
    assert moved.mask.device.type == moved.ranges.device.type == "meta"
    assert moved.shape == tokens.shape


@pytest.fixture(scope="module")
def good() -> dict[str, dict[str, Any]]:
    """Arguments that fit, by function."""
    layer = make_layer((5, 4), heads=2)
    local_map = layer.kernel_map()
    heads = {name: layer.given(name) for name in ("query", "key", "value")}
    scores = {"tokens": layer.tokens, "scaling": 0.25, "window": None}
    names = ("query", "key", "log_sum_exp", "factors", "row_scale", "diagonal")
    return {
        "TokenRanges": {"attention_mask": layer.mask.to(DEVICE)},
        "attention": {**heads, **scores},
        "gram_weight": {"product": torch.randn(32, 24, dtype=torch.float64), "heads": 2, "dtype": FLOAT32},
        "head_factors": {"value": heads["value"], "weight": weight_of(layer, "N-Enc"), "tokens": layer.tokens},
        "LocalMap": {**scores, **{name: getattr(local_map, name) for name in names}},
        "rollout_rows": {
            "rows": torch.ones(2, 3, 5, device=DEVICE),
            "local_map": local_map,
            "used": layer.tokens.ranges[:, :2],
        },
        "layer_scales": on_device(scale_arguments(24, FLOAT32)),
        "stage_norms": {
            "vectors": torch.ones(2, 5, 24, device=DEVICE),
            "residual": torch.ones(2, 5, 24, device=DEVICE),
            "gammas": (torch.ones(24, device=DEVICE), torch.ones(24, device=DEVICE)),
            "scale": torch.ones(2, 5, device=DEVICE),
        },
    }


def test_good_arguments_are_taken(good):
    for name, given in good.items():
        getattr(gk, name)(**given)


def huge(tensor: Tensor) -> Tensor:
    """More tokens than there may be, without the memory."""
    return tensor[:, :, :1].expand(-1, -1, 131073, -1)


def part(i: int, change: Callable[[Tensor], Any]) -> Callable[[tuple], tuple]:
    return lambda given: (*given[:i], change(given[i]), *given[i + 1 :])


def double(tensor: Tensor) -> Tensor:
    return tensor.double()


def fewer(tensor: Tensor) -> Tensor:
    return tensor[:, :-1]


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def instead(value: Any) -> Callable[[Any], Any]:
    return lambda given: value


def longer(times: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.cat([tensor] * times, -1)


def with_parts(**changes: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda whole: replace(whole, **{name: change(getattr(whole, name)) for name, change in changes.items()})


FLOATS = "torch.float32 or torch.float16 or torch.bfloat16"
LIKE = f" must be on {DEVICE} like"
NO_SCALES = [0, 0.0, -1.0, INF, NAN]
NO_WINDOWS = [-1, True, 2.0]
# function, argument, how it is spoilt, the error, and what the message says behind the argument's name
WRONG: list[tuple[str, str, Callable[[Any], Any], type[Exception], str]] = [
    ("TokenRanges", "attention_mask", Tensor.long, TypeError, " must be torch.bool, got torch.int64"),
    ("TokenRanges", "attention_mask", Tensor.tolist, TypeError, " must be a tensor, got list"),
    ("TokenRanges", "attention_mask", lambda t: t[0], ValueError, " must have shape [batch, n], got [5]"),
    ("TokenRanges", "attention_mask", lambda t: t[:0], ValueError, " must have shape [batch, n], got [0, 5]"),
    ("attention", "query", instead(None), TypeError, " must be a tensor, got NoneType"),
    ("attention", "query", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("attention", "key", Tensor.half, TypeError, " must be torch.float32, got torch.float16"),
    ("attention", "value", Tensor.half, TypeError, " must be torch.float32, got torch.float16"),
    ("attention", "query", lambda t: t[0], ValueError, " must have shape [batch, heads, n, head_dim], got [2, 5, 16]"),
    ("attention", "key", fewer, ValueError, " must have the other tensors' shape [2, 2, 5, 16], got [2, 1, 5, 16]"),
    ("attention", "value", longer(2), ValueError, " must have the other tensors' shape [2, 2, 5, 16], got [2, 2, 5,"),
    ("attention", "query", lambda t: t.repeat(1, 17, 1, 1), ValueError, " must have 1 to 32 heads, got 34"),
    ("attention", "query", lambda t: t[..., :8], ValueError, " must have heads of size 16 to 128, got 8"),
    ("attention", "query", longer(10), ValueError, " must have heads of size 16 to 128, got 160"),
    ("attention", "query", huge, ValueError, " must have at most 131072 tokens, got 131073"),
    ("attention", "query", lambda t: t[:, :, :4], ValueError, " must have the mask's batch and tokens [2, 5], got"),
    ("attention", "query", elsewhere, ValueError, f"{LIKE} attention_mask, got meta"),
    ("attention", "key", elsewhere, ValueError, f"{LIKE} attention_mask, got meta"),
    *[("attention", "scaling", instead(s), ValueError, f" must be a positive number, got {s!r}") for s in NO_SCALES],
    *[("attention", "window", instead(w), ValueError, f" must be None or a number of tokens of at least 0, got {w!r}")
      for w in NO_WINDOWS],
    ("gram_weight", "product", Tensor.float, TypeError, " must be torch.float64, got torch.float32"),
    ("gram_weight", "product", lambda t: t[0], ValueError, " must have shape [heads * head_dim, hidden_size], got"),
    ("gram_weight", "product", lambda t: t[1:], ValueError, "'s 31 rows must be a multiple of heads, got 2"),
    ("gram_weight", "heads", instead(0), ValueError, ", got 0"),
    ("gram_weight", "dtype", instead(torch.float64), TypeError, " must be one of torch.float32, "),
    ("head_factors", "value", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("head_factors", "value", elsewhere, ValueError, f"{LIKE} attention_mask, got meta"),
    ("head_factors", "weight", with_parts(parts=Tensor.half), TypeError,
     ".parts must be torch.float64, got torch.float16"),
    ("head_factors", "weight", with_parts(parts=lambda t: t[:, :, :1]), ValueError,
     ".parts must have shape [1, 2, 2, 16, 16], got [1, 2, 1, 16, 16]"),
    ("head_factors", "weight", with_parts(parts=elsewhere), ValueError, f".parts{LIKE} the other tensors, got meta"),
    ("head_factors", "weight", with_parts(head_scale=lambda t: t[:1]), ValueError,
     ".head_scale must have shape [2], got [1]"),
    ("LocalMap", "query", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("LocalMap", "key", fewer, ValueError, " must have the other tensors' shape [2, 2, 5, 16], got [2, 1, 5, 16]"),
    ("LocalMap", "scaling", instead(-1), ValueError, " must be a positive number, got -1"),
    ("LocalMap", "window", instead(-1), ValueError, " must be None or a number of tokens of at least 0, got -1"),
    ("LocalMap", "log_sum_exp", double, TypeError, " must be torch.float32, got torch.float64"),
    ("LocalMap", "log_sum_exp", lambda t: t[..., :5], ValueError,
     " must have shape [2, 1, 2, 2, 64], got [2, 1, 2, 2, 5]"),
    ("LocalMap", "row_scale", fewer, ValueError, " must have shape [2, 5], got [2, 4]"),
    ("LocalMap", "row_scale", elsewhere, ValueError, f"{LIKE} the other tensors, got meta"),
    ("LocalMap", "diagonal", Tensor.half, TypeError, " must be torch.float32, got torch.float16"),
    ("LocalMap", "factors", with_parts(factor=lambda t: t[:, :, :2]), ValueError,
     ".factor must have shape [2, 1, 3, 64], got [2, 1, 2, 64]"),
    ("LocalMap", "factors", with_parts(key_scale=double), TypeError,
     ".key_scale must be torch.float32, got torch.float64"),
    ("rollout_rows", "rows", double, TypeError, " must be torch.float32, got torch.float64"),
    ("rollout_rows", "rows", lambda t: t[:, 0], ValueError, " must have shape [2, m, 5], got [2, 5]"),
    ("rollout_rows", "rows", lambda t: t[..., :-1], ValueError, " must have shape [2, m, 5], got [2, 3, 4]"),
    ("rollout_rows", "rows", lambda t: t[:, :0], ValueError, " must have shape [2, m, 5], got [2, 0, 5]"),
    ("rollout_rows", "rows", elsewhere, ValueError, f"{LIKE} the other tensors, got meta"),
    ("rollout_rows", "used", Tensor.long, TypeError, " must be torch.int32, got torch.int64"),
    ("rollout_rows", "used", lambda t: t[0], ValueError, " must have shape [2, 2], got [2]"),
    ("layer_scales", "hidden_states", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("layer_scales", "hidden_states", longer(200), ValueError, " must be at most 4096 wide, got 4800"),
    ("layer_scales", "norm_inputs", part(0, fewer), ValueError, "[0] must have shape [2, 5, 24], got [2, 4, 24]"),
    ("layer_scales", "norm_inputs", part(1, elsewhere), ValueError, f"[1]{LIKE} the other tensors, got meta"),
    ("layer_scales", "context", fewer, ValueError, " must have shape [2, 5, width], got [2, 4, 48]"),
    ("layer_scales", "context", longer(100), ValueError, " must be at most 4096 wide, got 4800"),
    ("layer_scales", "check_direction", part(0, longer(2)), ValueError, "[0] must have shape [24], got [48]"),
    ("layer_scales", "check_direction", part(1, Tensor.half), TypeError,
     "[1] must be torch.float32, got torch.float16"),
    ("layer_scales", "bias", longer(2), ValueError, " must have shape [24], got [48]"),
    ("layer_scales", "bias", elsewhere, ValueError, f"{LIKE} the other tensors, got meta"),
    ("layer_scales", "tokens", lambda t: gk.TokenRanges(t.mask[:, :4] != 0), ValueError, f"on {DEVICE}, got [2, 4] on"),
    ("layer_scales", "tokens", lambda t: t.to(torch.device("meta")), ValueError, f"on {DEVICE}, got [2, 5] on meta"),
    ("stage_norms", "vectors", double, TypeError, f" must be {FLOATS}, got torch.float64"),
    ("stage_norms", "vectors", longer(200), ValueError, " must be at most 4096 wide, got 4800"),
    ("stage_norms", "residual", fewer, ValueError, " must have shape [2, 5, 24], got [2, 4, 24]"),
    ("stage_norms", "residual", elsewhere, ValueError, f"{LIKE} the other tensors, got meta"),
    ("stage_norms", "gammas", part(1, Tensor.half), TypeError, "[1] must be torch.float32, got torch.float16"),
    ("stage_norms", "gammas", part(0, longer(2)), ValueError, "[0] must have shape [24], got [48]"),
    ("stage_norms", "gammas", lambda given: given * 2, ValueError, " must be at most two, got 4"),
    ("stage_norms", "scale", fewer, ValueError, " must have shape [2, 5], got [2, 4]"),
    ("stage_norms", "scale", double, TypeError, " must be torch.float32, got torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "argument", "change", "error", "message"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[4].rpartition('got ')[2]}") for case in WRONG],
)
def test_wrong_arguments(good, function, argument, change, error, message):
    """The message names the argument, what it must be, and what it is."""
    given = good[function]
    with pytest.raises(error) as raised:
        getattr(gk, function)(**{**given, argument: change(given[argument])})
    said = str(raised.value)
    assert argument in said
    assert message in said


def test_where_the_kernels_run(monkeypatch):
    cpu, cuda, meta = (torch.device(name) for name in ("cpu", "cuda:0", "meta"))
    major_minor = {cuda: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", major_minor.get)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "needs a CUDA GPU, and the model is on 'meta'" in gk.unavailable_reason(meta)

    monkeypatch.setattr(capability, "interpreted", lambda: False)
    assert gk.unavailable_reason(cuda) is None
    assert "needs a CUDA GPU, and the model is on 'cpu' (with TRITON_INTERPRET=1" in gk.unavailable_reason(cpu)
    major_minor[cuda] = (8, 0)
    assert gk.unavailable_reason(cuda) is None
    major_minor[cuda] = (7, 5)
    assert "needs compute capability 8.0 or higher, and cuda:0 has 7.5" in gk.unavailable_reason(cuda)

    monkeypatch.setattr(capability, "interpreted", lambda: True)
    assert gk.unavailable_reason(cpu) is None
    assert "TRITON_INTERPRET is set" in gk.unavailable_reason(cuda)

    monkeypatch.setattr(torch.version, "cuda", None)  # a build for other GPUs
    assert "needs a CUDA GPU, and the model is on 'cuda:0'" in gk.unavailable_reason(cuda)

    monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name: None)
    for device in (cpu, cuda, meta):
        assert gk.unavailable_reason(device) == "the package triton is not installed"


def test_what_the_kernels_run_on():
    fits = {"dtype": FLOAT32, "heads": 32, "n": 131072, "head_dim": 128, "hidden_size": 4096, "scaling": 0.125}
    assert gk.unsupported_reason(**fits) is None
    for dtype in DTYPE_NAMES:
        assert gk.unsupported_reason(**{**fits, "dtype": dtype}) is None
    assert gk.unsupported_reason(**{**fits, "head_dim": 16}) is None
    for wrong, reason in (
        ({"dtype": torch.float64}, "and the layer is torch.float64"),
        ({"heads": 33, "head_dim": 64}, "takes 1 to 32 heads, and the layer has 33"),
        ({"head_dim": 8}, "takes heads of size 16 to 128, and the layer's have 8"),
        ({"head_dim": 160}, "takes heads of size 16 to 128, and the layer's have 160"),
        ({"hidden_size": 4097}, "takes hidden sizes up to 4096, and the layer has 4097"),
        ({"n": 131073}, "takes up to 131072 tokens, and the text has 131073"),
        *(({"scaling": scaling}, f"and the layer's is {scaling}") for scaling in NO_SCALES),
    ):
        assert reason in (gk.unsupported_reason(**{**fits, **wrong}) or "nothing"), wrong


def test_the_interpreter_is_asked_for_when_kernels_are_imported():
    """Without TRITON_INTERPRET the kernels refuse the CPU, and say so before anything is launched."""
    code = """
import torch, globenc_kernels
print(globenc_kernels.interpreted(), globenc_kernels.unavailable_reason(torch.device("cpu")))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("False it needs a CUDA GPU"), done.stderr
    assert gk.interpreted() == (DEVICE.type == "cpu")


class FakeKernel:
    """Stands for a kernel on a GPU: waits for the note on its slow compilation, if one is on its way."""

    __name__ = "_attention_kernel"

    def __init__(self, fails: bool = False) -> None:
        self.grids: list[tuple[int, ...]] = []
        self.fails = fails

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            self.grids.append(grid)
            for thread in threading.enumerate():
                if isinstance(thread, threading.Timer) and thread.interval == 0:
                    thread.join(10)
            if self.fails:
                raise RuntimeError("out of resources")

        return run


@pytest.fixture
def no_gpu_needed(monkeypatch) -> None:
    """`launch` as on a GPU that has not seen any kernel, for tensors without numbers."""
    monkeypatch.setattr(arguments, "_launched", set())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)


SAID = "globenc: compiling attention_kernel for 12 heads of size 64, once for a model shape; Triton keeps it on disk\n"


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_slow_compilation_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "SLOW_COMPILATION", 0)
    kernel, tensor = FakeKernel(), torch.ones(3, device="meta")

    def launched(*args: Any, **options: Any) -> str:
        arguments.launch(kernel, (2, 3), *args, **options)
        out, err = capsys.readouterr()
        assert out == ""
        return err

    assert launched(tensor, 5, H=12, D=64) == SAID
    assert launched(tensor, 6, H=12, D=64) == ""  # sizes are no reason to compile anew
    assert launched(tensor.half(), 5, H=12, D=64) == SAID
    assert launched(tensor, 5, H=16, D=32) == SAID.replace("12", "16").replace("64", "32")
    assert launched(tensor, 5) == SAID.replace(" for 12 heads of size 64", "")
    assert kernel.grids == [(2, 3)] * 5


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_fast_compilation_says_nothing(capsys):
    kernel = FakeKernel()
    arguments.launch(kernel, (1,), torch.ones(3, device="meta"), H=12, D=64)
    assert kernel.grids == [(1,)]
    assert capsys.readouterr() == ("", "")
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.finished.is_set()]


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_failed_launch_is_raised_and_not_remembered(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "SLOW_COMPILATION", 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of resources"):
            arguments.launch(FakeKernel(fails=True), (1,), torch.ones(3, device="meta"))
        assert "compiling" in capsys.readouterr().err
    assert not arguments._launched
