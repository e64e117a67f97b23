"""What is cached of weights never outlives them."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import assert_rows_close, tiny_model, token_batch
from torch import nn

import globenc


def _optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(**token_batch((7,))).last_hidden_state.square().sum().backward()
    optimizer.step()


def _adam_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model(**token_batch((7,))).last_hidden_state.square().sum().backward()
    optimizer.step()


def _load_state(model):
    model.load_state_dict(tiny_model("bert", model.dtype, seed=5).state_dict())


def _dense(model):
    return model.encoder.layer[1].attention.output.dense.weight


def _swap_heads(model):
    weight = _dense(model).data
    weight[:, :8], weight[:, 8:16] = weight[:, 8:16].clone(), weight[:, :8].clone()


def _new_parameter(model):
    layer = model.encoder.layer[1].attention.output
    layer.dense.weight = nn.Parameter(layer.dense.weight.detach() * 1.5)


def _new_norm(model):
    old = model.encoder.layer[1].output.LayerNorm
    model.encoder.layer[1].output.LayerNorm = nn.LayerNorm(24, eps=old.eps, elementwise_affine=False)


def _no_grad_write(model):
    with torch.no_grad():
        _dense(model)[2, 5] += 0.01


CHANGES = {
    "optimizer-step": _optimizer_step,
    "adam-step": _adam_step,
    "load_state_dict": _load_state,
    "no_grad-write": _no_grad_write,
    "data-write-all": lambda model: _dense(model).data.mul_(1.01),
    "data-write-one": lambda model: _dense(model).data[3, 4].add_(0.01),
    "data-negate-row": lambda model: _dense(model).data[3].neg_(),
    "data-zero-column": lambda model: _dense(model).data[:, 3].zero_(),
    "data-zero-head": lambda model: _dense(model).data[:, 8:16].zero_(),
    "data-swap-heads": _swap_heads,
    "data-gamma1": lambda model: model.encoder.layer[1].attention.output.LayerNorm.weight.data[3].add_(0.1),
    "data-gamma2": lambda model: model.encoder.layer[1].output.LayerNorm.weight.data.mul_(-2),
    "data-transpose": lambda model: _dense(model).data.copy_(_dense(model).data.T.clone()),
    "new-parameter": _new_parameter,
    "new-norm": _new_norm,
    "value-projection": lambda model: model.encoder.layer[1].attention.self.value.weight.data[3].zero_(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_no_stale_weights(change, dtype):
    model = tiny_model("bert", dtype)
    inputs = token_batch((7, 4))
    before = {stage: globenc.contribution_maps(model, method=stage, **inputs) for stage in ("N", "N-Enc")}
    CHANGES[change](model)
    model.zero_grad()
    model.to(dtype)
    fresh = copy.deepcopy(model)
    for stage in before:
        maps = globenc.contribution_maps(model, method=stage, **inputs)
        assert torch.equal(maps, globenc.contribution_maps(fresh, method=stage, **inputs)), stage
    assert not torch.equal(maps, before[stage])


def test_no_stale_weights_after_dtype_change(bert):
    inputs = token_batch((7, 4))
    exact = globenc.contribution_maps(bert, **inputs)
    single = globenc.contribution_maps(bert.float(), **inputs)
    assert single.dtype == torch.float32
    assert_rows_close(single, exact, 1e-5)
    again = globenc.contribution_maps(bert.double(), **inputs)
    assert again.dtype == torch.float64
    assert_rows_close(again, exact, 1e-12)  # float32 weights to begin with


def test_model_can_be_forgotten():
    """Nothing keeps a model alive after its attribution."""
    import gc

    model = tiny_model("bert")
    globenc.attribute(model, **token_batch((7,)))
    gone = weakref.ref(model.encoder.layer[0].attention.output.dense)
    del model
    gc.collect()
    assert gone() is None
