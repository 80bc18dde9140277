"""State-space operations: selective scan, causal convolution, decode step, states, scan orders.

The operations are time-major, (B, L, D), and are served by backends (`explain` says which, and why). The
Mamba layer is in `vlmamba.ssm.mixer`, its states in `vlmamba.ssm.state`, two-dimensional scan orders in
`vlmamba.ssm.directions`.
"""

from __future__ import annotations

from vlmamba.ssm.conv import causal_conv1d
from vlmamba.ssm.ops import selective_scan, selective_state_update
from vlmamba.ssm.registry import explain, use_backend
from vlmamba.ssm.spec import ScanSpec

__all__ = [
    "ScanSpec",
    "causal_conv1d",
    "explain",
    "selective_scan",
    "selective_state_update",
    "use_backend",
]
