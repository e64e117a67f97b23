"""Every vision family of the table, and what its images must be."""

from __future__ import annotations

import pytest
import torch
from helpers import METHODS, VISION, assert_rows_close, pictures, tiny_vision

import globenc


@pytest.mark.parametrize("family", VISION)
def test_images(family):
    model, pixels = tiny_vision(family), pictures()
    assert float(globenc.completeness_gap(model, pixel_values=pixels).max()) < 1e-12
    for method in METHODS:
        if method == "N-ResLN":
            continue
        maps = [
            globenc.contribution_maps(model, method=method, backend=b, pixel_values=pixels)
            for b in ("torch", "reference")
        ]
        assert_rows_close(*maps, 1e-12)
    out = globenc.attribute(model, position="mean", pixel_values=pixels)
    with torch.no_grad():
        own = model(pixel_values=pixels).last_hidden_state
    assert torch.equal(out.model_output.last_hidden_state, own)
    special = next(f for f in globenc.supported_encoders() if f.model_type == family).special_tokens(model.config)
    assert out.scores.shape == (2, 9 + len(special))
    alone = globenc.attribute(model, position="mean", pixel_values=pixels[1:])
    assert_rows_close(alone.scores, out.scores[1:], 1e-12)


def test_images_of_another_size():
    wide = pictures(1, (20, 12))
    assert globenc.attribute(tiny_vision("dinov2"), pixel_values=wide).scores.shape == (1, 16)
    model = tiny_vision("vit")
    assert globenc.attribute(model, pixel_values=wide, interpolate_pos_encoding=True).scores.shape == (1, 16)
    with pytest.raises(ValueError, match="pixel_values must be 12 x 12 for this model, got 20 x 12"):
        globenc.attribute(model, pixel_values=wide)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (None, "give pixel_values, a tensor .* got nothing"),
        ([[1.0]], "give pixel_values, a tensor .* got list"),
        (torch.zeros(3, 12, 12).double(), r"shape \[batch, 3, height, width\]"),
        (torch.zeros(1, 1, 12, 12).double(), r"shape \[batch, 3, height, width\]"),
        (torch.zeros(0, 3, 12, 12).double(), "no empty dimension"),
        (torch.zeros(1, 3, 12, 12), "pixel_values must be torch.float64 for this model, got torch.float32"),
    ],
)
def test_wrong_images(pixels, message):
    with pytest.raises(ValueError, match=message):
        globenc.attribute(tiny_vision("vit"), pixel_values=pixels)


def test_layer_scale_of_dinov2_is_part_of_the_projection():
    model, pixels = tiny_vision("dinov2"), pictures()
    before = globenc.contribution_maps(model, method="N", pixel_values=pixels)
    with torch.no_grad():
        model.encoder.layer[0].layer_scale1.lambda1.mul_(3)
    assert_rows_close(globenc.contribution_maps(model, method="N", pixel_values=pixels)[0], 3 * before[0], 1e-12)
