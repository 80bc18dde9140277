"""Orders in which a two-dimensional grid of patches is scanned.

The names are VL-Mamba's (arXiv:2403.13600, section 3.2): the bidirectional scan (BSM) and the cross scan
(CSM).

Shape legend: H W grid, S directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmamba.errors import ConfigError
from vlmamba.registry import close_matches

SCANS: dict[str, tuple[str, ...]] = {
    "forward": ("rows",),
    "backward": ("rows_reversed",),
    "bsm": ("rows", "rows_reversed"),
    "csm": ("rows", "rows_reversed", "columns", "columns_reversed"),
}
"""The directions of each scan, in the order of the tables that `scan_orders` gives."""


def scan_orders(
    scan: str, height: int, width: int, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Index tables of a scan over a grid whose patches are stored row by row.

    Args:
        scan: "forward" (row by row), "backward" (that reversed), "bsm" (both) or "csm" (both, then column by
            column and that reversed).
        height: H.
        width: W.
        device: Where the tables live.

    Returns:
        Two int64 tables (S, H*W): `orders[s, i]` is the patch that direction s visits as its i-th, so
        `x[:, orders[s]]` is the sequence to scan; `inverses[s, p]` is when it visits patch p, so
        `y[:, inverses[s]]` puts results back in place.

    Raises:
        ConfigError: The scan is unknown, or the grid is empty.
    """
    if scan not in SCANS:
        known = sorted(SCANS)
        raise ConfigError(f"unknown scan {scan!r}.{close_matches(scan, known)} Known: {', '.join(known)}.")
    if height < 1 or width < 1:
        raise ConfigError(f"scan {scan!r} needs a grid of at least 1 x 1 patches, not {height} x {width}.")
    rows = torch.arange(height * width, device=device)
    columns = rows.view(height, width).t().reshape(-1)
    directions = {
        "rows": rows,
        "rows_reversed": rows.flip(0),
        "columns": columns,
        "columns_reversed": columns.flip(0),
    }
    orders = torch.stack([directions[name] for name in SCANS[scan]])
    return orders, torch.argsort(orders, dim=1)
