"""Scan orders over grids."""

from __future__ import annotations

import pytest
import torch

from vlmamba.errors import ConfigError
from vlmamba.ssm.directions import scan_orders


def test_golden_orders_of_a_2_by_3_grid():
    orders, _ = scan_orders("csm", 2, 3)
    assert orders.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [0, 3, 1, 4, 2, 5],
        [5, 2, 4, 1, 3, 0],
    ]
    assert orders.dtype == torch.int64
    assert torch.equal(scan_orders("bsm", 2, 3)[0], orders[:2])
    assert torch.equal(scan_orders("forward", 2, 3)[0], orders[:1])
    assert torch.equal(scan_orders("backward", 2, 3)[0], orders[1:2])


@pytest.mark.parametrize("scan", ["forward", "backward", "bsm", "csm"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (3, 4), (5, 5)])
def test_inverses_put_patches_back(scan, grid):
    orders, inverses = scan_orders(scan, *grid)
    x = torch.arange(grid[0] * grid[1])
    for order, inverse in zip(orders, inverses, strict=True):
        assert torch.equal(x[order][inverse], x)
        assert torch.equal(x[inverse][order], x)


def test_symmetries():
    """Reversing the patches exchanges the directions in pairs; transposing a square exchanges the pairs."""
    orders, _ = scan_orders("csm", 4, 4)
    reversed_patches = 15 - orders
    assert torch.equal(reversed_patches, orders[[1, 0, 3, 2]])
    transpose = torch.arange(16).view(4, 4).t().reshape(-1)
    assert torch.equal(transpose[orders], orders[[2, 3, 0, 1]])


def test_errors():
    with pytest.raises(ConfigError, match=r"unknown scan 'bms'\. Did you mean 'bsm'"):
        scan_orders("bms", 2, 2)
    with pytest.raises(ConfigError, match="needs a grid of at least 1 x 1 patches, not 0 x 3"):
        scan_orders("bsm", 0, 3)
