"""Requested rows through the map, by the kernel and by the equations."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_rows_close
from kernel_cases import DEVICE, FLOAT32, NAN, TIGHT, Layer, check, make_layer

pytest.importorskip("triton")

import globenc_kernels as gk

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture(scope="module")
def rolled() -> tuple[Layer, gk.LocalMap]:
    """A layer of a few blocks, and its map."""
    layer = make_layer((65, 50), heads=2)
    return layer, layer.kernel_map()


@pytest.mark.parametrize("m", [1, 2, 16, 17, 32, 33, 40], ids=lambda m: f"m{m}")
def test_requested_rows(rolled, m):
    layer, local_map = rolled
    rows = torch.rand(2, 40, 65)[:, :m]  # not contiguous, not zero at padding
    exact = layer.equation_map("N-Enc")
    actual = gk.rollout_rows(rows.to(DEVICE), local_map)
    assert actual.shape == (2, m, 65)
    check(actual, rows @ layer.equation_map("N-Enc", FLOAT32), rows.double() @ exact, layer.step)


@pytest.mark.parametrize("m", [1, 3], ids=lambda m: f"m{m}")
@pytest.mark.parametrize("used", [(0, 65), (0, 1), (33, 34), (64, 65), (20, 50), (0, 0), (40, 40)], ids=str)
def test_used_rows(rolled, m, used):
    """Rows that are zero but for a range: the same result, and no other tile is looked at."""
    layer, local_map = rolled
    positions = torch.arange(65)
    rows = torch.rand(2, m, 65) * ((positions >= used[0]) & (positions < used[1]))
    expected = rows.double() @ layer.equation_map("N-Enc")
    tile = local_map.tiles(1 if m == 1 else 16).q
    rows = rows.masked_fill((positions < used[0] // tile * tile) | (positions >= -(-used[1] // tile) * tile), NAN)
    actual = gk.rollout_rows(rows.to(DEVICE), local_map, torch.tensor([used, used], dtype=torch.int32, device=DEVICE))
    assert_rows_close(actual.cpu(), expected, TIGHT)


def test_used_rows_of_each_text(rolled):
    layer, local_map = rolled
    rows = torch.zeros(2, 1, 65)
    rows[0, 0, 64], rows[1, 0, 2] = 1.0, 1.0
    used = torch.tensor([[64, 65], [2, 3]], dtype=torch.int32, device=DEVICE)
    actual = gk.rollout_rows(rows.to(DEVICE), local_map, used).cpu()
    assert_rows_close(actual, rows.double() @ layer.equation_map("N-Enc"), TIGHT)
    wrong = gk.rollout_rows(rows.to(DEVICE), local_map, used.flip(0)).cpu()
    with pytest.raises(AssertionError, match="row error"):
        assert_rows_close(wrong, rows.double() @ layer.equation_map("N-Enc"), TIGHT)
