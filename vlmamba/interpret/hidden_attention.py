"""The hidden attention of a Mamba layer: how much each earlier token adds to what the layer gives at one token.

Per channel the selective scan is a matrix (Ali, Zimerman and Wolf 2024, "The Hidden Attention of Mamba Models",
arXiv 2403.01590, section 3):

    y[t] = sum over s <= t of  M[t, s] u[s]  + D u[t],    M[t, s] = C[t] . exp(A (dt[s+1] + ... + dt[t])) dt[s] B[s]

One row t of it costs L x N values a channel, so rows are computed one at a time and channels in chunks: nothing of
size L x L x E exists. A row is signed and has one entry a channel; what a token adds to the layer's *output* at t is
the vector W_out (M[t, s] u[s] silu(z[t])), whose norm is the measure used here (the matrix entries alone miss how large
u is, what the gate lets through and what the projection keeps).

Shapes: B batch, L length, E inner width, N state size, D model width, V patches, T targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.errors import ShapeError
from vlmamba.models.connectors.vss import VSS
from vlmamba.ssm.checks import check_shape
from vlmamba.ssm.directions import SCANS, scan_orders
from vlmamba.ssm.mixer import MambaMixer

CHUNK = 1 << 24
"""Values of the largest intermediate tensor, (B, L, channels, N)."""


@dataclass(frozen=True)
class ScanParts:
    """What the scan of one layer read in one call.

    Attributes:
        u: (B, L, E), its input.
        dt: (B, L, E), time steps after the softplus.
        A: (E, N).
        B: (B, L, N).
        C: (B, L, N).
        D: (E).
        gate: (B, L, E), silu(z).
        segments: (B, L), which run of equal `seq_idx` a token belongs to; None for one sequence a row.
        reverse: Whether the scan goes from the last token to the first.
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    gate: Tensor
    segments: Tensor | None = None
    reverse: bool = False

    def weights(self, target: int) -> Tensor:
        """Row `target` of the matrices M, (B, L, E): zero where the target does not see the source."""
        total = self.dt.double().cumsum(1)  # differences of long sums: fp64, or late decays lose all digits
        if self.reverse:
            before = total - self.dt
            gap = before - before[:, target, None]
        else:
            gap = total[:, target, None] - total
        gap = gap.clamp(min=0).to(self.u.dtype)
        batch, length, channels = self.u.shape
        product = self.C[:, target, None] * self.B
        width = max(1, CHUNK // (batch * length * self.A.shape[1]))
        rows = [
            torch.einsum("bln,blen->ble", product, torch.exp(gap[..., part, None] * self.A[part]))
            for part in (slice(i, i + width) for i in range(0, channels, width))
        ]
        return torch.cat(rows, dim=-1) * self.dt * self.seen(target).unsqueeze(-1)

    def seen(self, target: int) -> Tensor:
        """Which sources a target sees, (B, L) bool."""
        time = torch.arange(self.u.shape[1], device=self.u.device)
        seen = (time >= target if self.reverse else time <= target).expand(self.u.shape[:2])
        return seen if self.segments is None else seen & (self.segments == self.segments[:, target, None])

    def contributions(self, target: int) -> Tensor:
        """M[target, s] u[s] for every source s, (B, L, E), without the skip and the gate."""
        return self.weights(target) * self.u

    def skip(self, target: int) -> Tensor:
        """D u[target], (B, E), without the gate."""
        return self.D * self.u[:, target]


def scan_parts(
    mixer: MambaMixer, hidden_states: Tensor, *, seq_idx: Tensor | None = None, reverse: bool = False
) -> ScanParts:
    """What a layer's scan reads for an input.

    Args:
        mixer: The layer.
        hidden_states: (B, L, D), the layer's input.
        seq_idx: As in `MambaMixer.forward`.
        reverse: As in `MambaMixer.forward`.

    Raises:
        ShapeError: The input is not the layer's.
    """
    check_shape("scan_parts", "hidden_states", hidden_states, (None, None, mixer.hidden_size), "(B, L, D)")
    check_shape("scan_parts", "seq_idx", seq_idx, tuple(hidden_states.shape[:2]), "(B, L)")
    x, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
    u = mixer._convolve(x, seq_idx=seq_idx, initial_state=None, reverse=reverse)
    dt, B, C = mixer._time_step_and_matrices(u)
    bias = mixer.time_step_bias()
    dt = dt if bias is None else dt + bias
    segments = None
    if seq_idx is not None:
        changes = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long(), (1, 0))
        segments = changes.cumsum(1)
    A, D = (p.to(u.dtype) for p in (mixer.decay(), mixer.D))
    return ScanParts(u, F.softplus(dt).to(u.dtype), A, B, C, D, F.silu(z), segments, reverse)


def mixer_contributions(mixer: MambaMixer, parts: ScanParts, targets: Sequence[int]) -> Iterator[Tensor]:
    """What each token adds to a layer's output at the targets.

    Args:
        mixer: The layer.
        parts: Of `scan_parts`.
        targets: Positions.

    Yields:
        For each target (B, L, D). Over the sources they sum to the layer's output at the target, less the bias of
        `out_proj`; the target's own row holds the skip (D u) as well.

    Raises:
        ShapeError: A target is not a position of the sequence.
    """
    length = parts.u.shape[1]
    nothing = mixer.out_proj(torch.zeros_like(parts.u[:1, :1]))  # a bias is nobody's contribution
    for target in targets:
        if not 0 <= target < length:
            raise ShapeError(f"target {target} is not a position of a sequence of {length} tokens")
        inner = parts.contributions(target)
        inner[:, target] += parts.skip(target)
        yield mixer.out_proj(inner * parts.gate[:, target, None]) - nothing


def vss_contributions(vss: VSS, x: Tensor, targets: Sequence[int]) -> Iterator[Tensor]:
    """What each patch adds to a 2-D scan's result at the target patches, all directions merged.

    Args:
        vss: The scan.
        x: (B, V, C), its input in raster order.
        targets: Patches.

    Yields:
        For each target (B, V, C); over the patches they sum to the scan's result at the target.
    """
    orders, inverses = (table.to(x.device) for table in scan_orders(vss.scan, *vss.grid))
    names = ["shared"] * len(orders) if vss.share_weights else list(SCANS[vss.scan])
    mixers = [vss.mixers[name] for name in names]
    rows = []
    for mixer, order, inverse in zip(mixers, orders, inverses, strict=True):
        assert isinstance(mixer, MambaMixer)
        times = [int(inverse[target]) for target in targets]
        rows.append(mixer_contributions(mixer, scan_parts(mixer, x[:, order]), times))
    for parts in zip(*rows, strict=True):
        merged = torch.stack([part[:, inverse] for part, inverse in zip(parts, inverses, strict=True)]).sum(0)
        yield merged / len(orders) if vss.merge == "mean" else merged
