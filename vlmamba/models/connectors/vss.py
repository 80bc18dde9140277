"""VL-Mamba's vision selective scan (arXiv 2403.13600, section 3.2): a 2-D scan around one Mamba layer.

The patches are unfolded into one sequence a direction, each goes through the Mamba layer, each result returns to
patch order, and all are merged. BSM scans the raster forward and backward; CSM adds the column-major order and its
reverse.

Shapes: B images, V = H*W patches, F vision width, D text width, C scan width, S directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba.errors import ConfigError
from vlmamba.models.connectors.base import Connector, RMSNorm
from vlmamba.registry import close_matches
from vlmamba.ssm.directions import SCANS, scan_orders
from vlmamba.ssm.mixer import MambaMixer


class VSS(nn.Module):
    """A 2-D scan around one Mamba layer (weights shared by the directions) or one a direction.

    Args:
        dim: C, width of the features.
        grid: Rows and columns of patches.
        scan: "bsm", "csm", "forward" or "backward".
        share_weights: One Mamba layer for all directions, which then run as one batched call.
        merge: "sum" or "mean" over the directions.
        state_size: N of the Mamba layer.
        expand: Inner width over C.

    Raises:
        ConfigError: Unknown scan or merge.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        *,
        scan: str = "bsm",
        share_weights: bool = True,
        merge: str = "sum",
        state_size: int = 16,
        expand: int = 2,
    ) -> None:
        super().__init__()
        if merge not in ("sum", "mean"):
            raise ConfigError(f"merge must be 'sum' or 'mean', got {merge!r}")
        self.grid, self.merge, self.share_weights = grid, merge, share_weights
        self.scan = _check_scan(scan)
        names = ["shared"] if share_weights else list(SCANS[scan])
        self.mixers = nn.ModuleDict(
            {n: MambaMixer(dim, intermediate_size=expand * dim, state_size=state_size) for n in names}
        )

    def set_scan(self, scan: str) -> None:
        """Change the directions; without shared weights only to ones that have weights."""
        directions = SCANS[_check_scan(scan)]
        missing = [] if self.share_weights else [d for d in directions if d not in self.mixers]
        if missing:
            raise ConfigError(
                f"scan {scan!r} needs the directions {', '.join(missing)}, but this connector has weights only for "
                f"{', '.join(self.mixers)} (share_weights=False)"
            )
        self.scan = scan

    def forward(self, x: Tensor) -> Tensor:
        """(B, V, C) -> (B, V, C)."""
        orders, inverses = (table.to(x.device) for table in scan_orders(self.scan, *self.grid))
        if self.share_weights:
            scanned = self.mixers["shared"](torch.cat([x[:, order] for order in orders]))
            parts = list(scanned.chunk(len(orders)))
        else:
            parts = [self.mixers[d](x[:, order]) for d, order in zip(SCANS[self.scan], orders, strict=True)]
        merged = torch.stack([y[:, inverse] for y, inverse in zip(parts, inverses, strict=True)]).sum(0)
        return merged / len(orders) if self.merge == "mean" else merged


class _ScanConnector(Connector):
    vss: VSS

    def set_scan(self, scan: str) -> None:
        """Change the scan directions, also after training."""
        self.vss.set_scan(scan)
        self.options["scan"] = scan


class VSSMLPConnector(_ScanConnector):
    """``V_scan = VSS(V_img); V_out = MLP(Norm(V_scan + V_img))`` (VL-Mamba, "VSS-MLP").

    Args:
        vision_dim: F, also the scan width.
        text_dim: D.
        grid: Rows and columns of patches.
        scan: "bsm", "csm", "forward" or "backward".
        share_weights: One Mamba layer for all directions.
        merge: "sum" or "mean".
        state_size: N of the Mamba layer.
        expand: Inner width over F.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        text_dim: int,
        grid: tuple[int, int],
        scan: str = "bsm",
        share_weights: bool = True,
        merge: str = "sum",
        state_size: int = 16,
        expand: int = 2,
    ) -> None:
        super().__init__(vision_dim=vision_dim, text_dim=text_dim, grid=grid)
        self.vss = VSS(
            vision_dim,
            self.grid,
            scan=scan,
            share_weights=share_weights,
            merge=merge,
            state_size=state_size,
            expand=expand,
        )
        self.norm = RMSNorm(vision_dim)
        self.linear_1 = nn.Linear(vision_dim, text_dim)
        self.linear_2 = nn.Linear(text_dim, text_dim)

    def project(self, features: Tensor) -> Tensor:
        """(B, V, F) -> (B, V, D)."""
        x = self.norm(self.vss(features) + features)
        return self.linear_2(F.gelu(self.linear_1(x)))


class VSSL2Connector(_ScanConnector):
    """``V' = Linear(V_img); V_out = Linear(Norm(VSS(GELU(V')) + V'))`` (VL-Mamba, "VSS-L2", its best).

    Args:
        vision_dim: F.
        text_dim: D.
        grid: Rows and columns of patches.
        scan: "bsm", "csm", "forward" or "backward".
        share_weights: One Mamba layer for all directions.
        merge: "sum" or "mean".
        width: C, the scan's width; D when left out (the paper does not give it).
        state_size: N of the Mamba layer.
        expand: Inner width over C.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        text_dim: int,
        grid: tuple[int, int],
        scan: str = "bsm",
        share_weights: bool = True,
        merge: str = "sum",
        width: int | None = None,
        state_size: int = 16,
        expand: int = 2,
    ) -> None:
        super().__init__(vision_dim=vision_dim, text_dim=text_dim, grid=grid)
        width = width or text_dim
        self.linear_1 = nn.Linear(vision_dim, width)
        self.vss = VSS(
            width,
            self.grid,
            scan=scan,
            share_weights=share_weights,
            merge=merge,
            state_size=state_size,
            expand=expand,
        )
        self.norm = RMSNorm(width)
        self.linear_2 = nn.Linear(width, text_dim)

    def project(self, features: Tensor) -> Tensor:
        """(B, V, F) -> (B, V, D)."""
        x = self.linear_1(features)
        return self.linear_2(self.norm(self.vss(F.gelu(x)) + x))


def _check_scan(scan: str) -> str:
    if scan not in SCANS:
        raise ConfigError(
            f"unknown scan {scan!r}.{close_matches(scan, list(SCANS))} Known: {', '.join(SCANS)}."
        )
    return scan
