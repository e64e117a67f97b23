"""Whatever is borrowed goes back: interrupts at any moment, precision settings, threads that share a model."""

from __future__ import annotations

import functools
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import assert_rows_close, attention_state, tiny_model, token_batch

import globenc
from globenc import model_state
from globenc.contributions.completeness import rounding
from globenc.model_state import Loan, precise

CALLS = {
    "attribute": lambda model, inputs: globenc.attribute(model, **inputs),
    "all": lambda model, inputs: globenc.attribute(model, position="all", **inputs),
    "completeness_gap": lambda model, inputs: globenc.completeness_gap(model, **inputs),
    "compare_methods": lambda model, inputs: globenc.compare_methods(model, **inputs),
    "saliency": lambda model, inputs: globenc.metrics.saliency(model, **inputs),
    "hta": lambda model, inputs: globenc.metrics.hta_maps(model, **inputs),
    "aopc": lambda model, inputs: globenc.metrics.aopc(
        model, torch.ones(inputs["input_ids"].shape), mask_token_id=4, **inputs
    ),
}


def training_model(family="bert", **config):
    model = tiny_model(family, head="SequenceClassification", **config)
    model.train()
    next(iter(model.base_model.children())).eval()  # not all of it
    return model


def everything(model):
    """What a call may not leave changed: the model, the thread's modes, the process's settings."""
    return {
        **attention_state(model),
        "modules": [id(module) for module in model.modules()],
        "grad mode": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()),
        "precision": (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        if hasattr(torch.backends.cuda.matmul, "fp32_precision")
        else torch.backends.cuda.matmul.allow_tf32,
        "recorder": model_state.active_recorder(),
        "borrowed": [
            len(borrowed._taken)
            for borrowed in (
                model_state._evaluating,
                model_state._frozen,
                model_state._captured,
                model_state._eager,
                model_state._precise,
            )
        ],
    }


TAKING = ("model_state.py", "custom_attention.py")  # the files in which something of the caller's is changed


class Interrupt(BaseException):
    """What a signal's handler raises; no exception that any code expects."""


def interrupted_at(call, step):
    """Run call(), interrupted before the `step`-th line of globenc's own code; whether it came that far."""
    left = [step]

    def trace(frame, event, argument):
        if "globenc" not in frame.f_code.co_filename:
            return None
        if event in ("line", "call"):
            left[0] -= 1
            if left[0] == 0:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return left[0] <= 0


def lines_of(call):
    """The lines and calls of globenc's own code that a call runs, (file, line) in order: step k is entry k - 1."""
    lines = []

    def trace(frame, event, argument):
        if "globenc" not in frame.f_code.co_filename:
            return None
        if event in ("line", "call"):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return lines


def evenly(steps, count):
    """About `count` of so many steps, half of them at the ends, where most is taken and given back."""
    ends = [k for k in range(1, steps) if k < 300 or k > steps - 300]
    return {*ends[:: max(1, 2 * len(ends) // count)], *range(1, steps, max(1, 2 * steps // count))}


def check_interrupts(call, model, inputs, choose):
    """`choose`: lines of the call -> the steps before which it is interrupted."""
    CALLS[call](model, inputs)
    before, lines = everything(model), lines_of(lambda: CALLS[call](model, inputs))
    chosen, came = choose(lines), 0
    for step in sorted(chosen):
        came += interrupted_at(lambda: CALLS[call](model, inputs), step)
        assert everything(model) == before, f"line {step} of {len(lines)}, {lines[step - 1]}"
    assert came > len(chosen) / 2
    CALLS[call](model, inputs)
    assert everything(model) == before


# an interrupt inside a generator that is being closed cannot be raised: Python reports it instead
unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unraisable
@pytest.mark.parametrize(("call", "family"), [("attribute", "bert"), ("saliency", "bert"), ("all", "big_bird")])
def test_an_interrupt_before_any_line_changes_nothing(call, family):
    check_interrupts(call, training_model(family), token_batch((5, 3)), lambda lines: evenly(len(lines), 100))


CASES = [(call, family) for call in CALLS for family in ("bert", "big_bird", "deberta-v2", "longformer")]


def smallest(family):
    """A model of a first and a last layer, and two texts: every line that more of them run, they run."""
    config = {"attention_window": [6, 6]} if family == "longformer" else {}
    return training_model(family, num_hidden_layers=2, **config), token_batch((2, 1))


@functools.cache
def distinct_lines(call, family):
    model, inputs = smallest(family)
    CALLS[call](model, inputs)
    return set(lines_of(lambda: CALLS[call](model, inputs)))


@unraisable
@pytest.mark.slow
@pytest.mark.parametrize(("call", "family"), CASES)
def test_an_interrupt_before_every_line_changes_nothing(call, family):
    """Each line of the package is interrupted at its first run, in the first case that runs it. The lines that take and
    give back are so in every case, at their first and at their last run, and so are some lines of all."""
    earlier = [case for case in CASES[: CASES.index((call, family))] if call in case or family in case]
    tried = set().union(*(distinct_lines(*case) for case in earlier))

    def choose(lines):
        first = {line: step for step, line in reversed([*enumerate(lines, 1)])}
        last = {line: step for step, line in enumerate(lines, 1)}
        taking = [line for line in first if Path(line[0]).name in TAKING]
        new = {first[line] for line in first if line not in tried}
        return new | {first[line] for line in taking} | {last[line] for line in taking} | evenly(len(lines), 20)

    check_interrupts(call, *smallest(family), choose)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "family"), CASES)
def test_the_smallest_cases_run_every_line_of_larger_ones(call, family):
    model, inputs = training_model(family), token_batch((5, 3))
    CALLS[call](model, inputs)
    assert set(lines_of(lambda: CALLS[call](model, inputs))) == distinct_lines(call, family)


@pytest.mark.slow
def test_two_thousand_signals_in_training_mode_change_nothing():
    model, inputs = training_model(), token_batch((7, 4))
    before, expected = everything(model), globenc.attribute(model, **inputs).scores
    random, came = torch.Generator().manual_seed(0), 0
    start = time.perf_counter()
    for _ in range(20):
        globenc.attribute(model, **inputs)
    duration = (time.perf_counter() - start) / 20

    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        while came < 2000:
            delay = float(torch.rand((), generator=random)) * 1.1 * duration + 1e-6
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                globenc.attribute(model, **inputs)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                came += 1
            assert everything(model) == before, f"interrupt {came}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert torch.equal(globenc.attribute(model, **inputs).scores, expected)


new_switches = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 has no such switch"
)


@pytest.fixture
def precision():
    """torch's switches for products of float32, none of them set; as they were again at the end."""
    parts = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "none"
    yield parts
    for part, setting in zip(parts, before, strict=True):
        part.fp32_precision = setting


@new_switches
@pytest.mark.parametrize("setting", ["tf32", "ieee"])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["all", "cuda.matmul", "mkldnn.matmul"])
def test_a_sound_model_is_taken_under_every_precision_setting(bert, precision, part, setting):
    model, inputs = bert.float(), token_batch((7, 4))
    expected = globenc.attribute(model, **inputs).scores
    precision[part].fp32_precision = setting
    before = [p.fp32_precision for p in precision]
    assert_rows_close(globenc.attribute(model, **inputs).scores, expected, 1e-5)
    assert [p.fp32_precision for p in precision] == before
    precision[part].fp32_precision = "none"  # what followed a general switch follows it still
    assert [p.fp32_precision for p in precision] == ["none"] * 3


@new_switches
def test_rounding_goes_by_the_callers_switch_inside_too(precision):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    exact = rounding(torch.float32, gpu)
    precision[1].fp32_precision = "tf32"
    assert rounding(torch.float32, gpu) > 100 * exact
    with precise(cpu):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert rounding(torch.float32, gpu) > 100 * exact
        assert rounding(torch.float32, cpu) == exact  # that switch is of GPUs alone
    assert rounding(torch.float64, gpu) < exact


@new_switches
def test_a_lowered_projection_is_no_patched_one(bert, precision, monkeypatch):
    """As on a GPU in TF32: the model's own products have 10 bits, and the switch says so."""
    model, inputs = bert.float(), token_batch((7, 4))
    linear = torch.nn.functional.linear

    def lowered(x, weight, bias=None):
        return linear(x.bfloat16().float(), weight.bfloat16().float(), bias)

    monkeypatch.setattr(torch.nn.functional, "linear", lowered)
    with pytest.raises(ValueError, match="residual plus the output projection"):
        globenc.attribute(model, **inputs)
    precision[2].fp32_precision = "tf32"
    assert bool(torch.isfinite(globenc.attribute(model, **inputs).scores).all())


@new_switches
@pytest.mark.parametrize("part", [0, 1], ids=["all", "cuda.matmul"])
def test_an_interrupt_leaves_the_switches(bert, precision, part):
    model, inputs = bert.float(), token_batch((5, 3))
    globenc.attribute(model, **inputs)
    precision[part].fp32_precision = "tf32"
    before = [p.fp32_precision for p in precision]
    lines = [0]

    def run():
        with precise(torch.device("cpu")):
            pass

    steps = len(lines_of(lambda: Loan().run(run)))
    for step in range(1, steps + 1):
        lines[0] += interrupted_at(lambda: Loan().run(run), step)
        assert [p.fp32_precision for p in precision] == before, step
    assert lines[0] > 20
    assert not torch.is_autocast_enabled("cpu")


def test_a_vmap_that_was_left_open_is_closed(bert):
    """As an interrupt in the midst of torch's own lines leaves it."""

    def interrupted(*_):
        torch._C._vmapmode_increment_nesting()
        raise Interrupt

    handle = bert.encoder.layer[1].register_forward_pre_hook(interrupted)
    with pytest.raises(Interrupt):
        globenc.metrics.hta_maps(bert, **token_batch((5,)))
    handle.remove()
    assert torch.rand(2).shape == (2,)


def test_autocast_is_as_before(bert):
    inputs = token_batch((7, 4))
    expected = globenc.attribute(bert, **inputs).scores
    with torch.autocast("cpu", torch.bfloat16):
        assert_rows_close(globenc.attribute(bert, **inputs).scores, expected, 1e-12)
        assert torch.is_autocast_enabled("cpu")
        assert torch.ones(2, 2).matmul(torch.ones(2, 2)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_threads_share_a_model_that_changes_its_attention():
    """BigBird's short texts turn it to full attention: its calls wait for each other."""
    model = training_model("big_bird")
    batches = [token_batch((n,), seed=n) for n in (5, 30, 7, 40)]
    expected = [globenc.attribute(model, **inputs).scores for inputs in batches]
    before = everything(model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: globenc.attribute(model, **batches[k % 4]).scores, range(40)))
    for k, scores in enumerate(found):
        assert torch.equal(scores, expected[k % 4]), k
    assert everything(model) == before


def test_what_went_back_is_not_given_back_again():
    """Behind the release of a lock another thread has the model, and may have changed it for itself."""
    calls, loan = [], Loan()

    def body():
        loan.change(lambda: calls.append("lock"), lambda: calls.append("release"))
        loan.change(lambda: calls.append("do"), lambda: calls.append("undo"))

    loan.run(body)
    assert calls == ["lock", "do", "undo", "release"]


def test_what_was_cut_short_is_given_back_the_second_time():
    """The mechanism itself: an undo that is interrupted is called again."""
    calls = []

    def undo():
        calls.append("undo")
        if len(calls) == 2:
            raise Interrupt

    loan = Loan()
    with pytest.raises(Interrupt):
        loan.run(lambda: loan.change(lambda: calls.append("do"), undo))
    assert calls == ["do", "undo", "undo"]
