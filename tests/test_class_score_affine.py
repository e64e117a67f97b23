"""The frozen network is affine in the embeddings: replayed at points of a line, it answers with points of a line."""

from __future__ import annotations

import pytest
import torch
from helpers import FAMILIES, NO_CLS, VISION, pictures, tiny_model, tiny_vision, token_batch

from globenc.forward_pass import ForwardPass
from globenc.frozen import FrozenNetwork
from globenc.frozen.references import set_origin_reference, set_zero_reference

DIRECTION = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def first_token(output):
    return output.last_hidden_state[:, 0] @ DIRECTION


def label(output):
    return output.logits[:, 1]


@pytest.mark.parametrize("reference", ["zero", "origin"])
@pytest.mark.parametrize("family", [*FAMILIES, *VISION])
def test_the_frozen_network_is_affine(family, reference):
    if family in VISION:
        model, inputs, answer = tiny_vision(family), {"pixel_values": pictures()}, first_token
    else:
        head = "Model" if family in NO_CLS else "SequenceClassification"
        model, inputs = tiny_model(family, head=head), token_batch((9, 4))
        answer = first_token if family in NO_CLS else label
    forward_pass = ForwardPass(model, inputs)

    def check() -> None:
        # with constants, since without them a replay lets go of what further replays need
        network = FrozenNetwork(
            forward_pass.encoder, forward_pass.inputs, forward_pass.mask, True, forward_pass.backend
        )
        _, value = network.record(answer)
        if reference == "zero":
            set_zero_reference(network, answer)
        else:
            set_origin_reference(network)
            for line in network.lines:  # slopes of lines through the origin are made when they are used
                line.slope = (line.output / line.h).nan_to_num(0.5) if line.slope is None else line.slope
        e = network.states[0].detach()
        assert (network.replay(e, answer) - value).abs().max() < 1e-10
        first, second = (torch.randn(e.shape, generator=generator, dtype=e.dtype) for _ in range(2))
        points = (first, second, 0.3 * first + 0.7 * second, torch.zeros_like(e))
        values = [network.replay(point, answer) for point in points]
        size = 1 + max(one.abs().max() for one in values)
        assert (0.3 * values[0] + 0.7 * values[1] - values[2]).abs().max() < 1e-11 * size
        assert (values[0] - values[1]).abs().max() > 1e-3
        (gradient,), constants = network.pull(value, [network.states[0]])
        assert ((gradient * first).sum((1, 2)) + values[3] - values[0]).abs().max() < 1e-11 * size
        assert (constants - values[3]).abs().max() < 1e-11 * size

    generator = torch.Generator().manual_seed(0)
    forward_pass.prepared(check)
