"""From visual tokens back to patches: how much each patch adds to each token a connector gives.

Shapes: n images, V patches, T visual tokens, F vision width, C scan width, Q queries, A heads, P head width, W window.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.errors import ConfigError
from vlmamba.interpret.hidden_attention import vss_contributions
from vlmamba.models.connectors import Connector
from vlmamba.models.connectors.mlp import MLPConnector
from vlmamba.models.connectors.qmamba import CrossAttention, QMambaConnector, local_windows
from vlmamba.models.connectors.vss import VSS, VSSL2Connector, VSSMLPConnector


@torch.no_grad()
def token_patches(connector: Connector, features: Tensor) -> Tensor:
    """Shares of the patches in each visual token, (n, T, V); every row sums to 1.

    `mlp`: the identity. `vss-mlp`, `vss-l2`: the norm of what a patch adds to V_scan plus the residual connection at
    the token, through the scans' hidden attention. `qmamba`: its cross-attention, then the connector in front of it.

    Args:
        connector: The connector.
        features: (n, V, F), what it reads.

    Raises:
        ConfigError: The connector is of another kind.
    """
    if isinstance(connector, MLPConnector):
        return torch.eye(connector.num_patches, device=features.device).expand(len(features), -1, -1)
    if isinstance(connector, VSSL2Connector):
        residual = connector.linear_1(features)
        return _scan_shares(connector.vss, F.gelu(residual), residual)
    if isinstance(connector, VSSMLPConnector):
        return _scan_shares(connector.vss, features, features)
    if isinstance(connector, QMambaConnector):
        shares = query_attention(connector, features)
        return shares if connector.pre is None else shares @ token_patches(connector.pre, features)
    raise ConfigError(
        f"connector {connector.name!r} has no known way from its visual tokens back to patches; the methods "
        "'gradient', 'gradient-x-input' and 'hidden-attention' over all layers need none"
    )


def _scan_shares(vss: VSS, x: Tensor, residual: Tensor) -> Tensor:
    rows = []
    for target, added in enumerate(vss_contributions(vss, x, range(x.shape[1]))):
        added[:, target] += residual[:, target]
        rows.append(added.norm(dim=-1))
    shares = torch.stack(rows, dim=1)
    return shares / shares.sum(-1, keepdim=True)


@torch.no_grad()
def query_attention(connector: Connector, features: Tensor) -> Tensor:
    """Q-Mamba's cross-attention, mean over heads and layers, (n, Q, V) over what its queries read.

    Local windows are put back in their places on the patch grid; elsewhere a query has 0.

    Raises:
        ConfigError: The connector has no cross-attention.
    """
    if not isinstance(connector, QMambaConnector):
        raise ConfigError(
            f"method 'cross-attention' needs a Q-Mamba connector; connector {connector.name!r} has no cross-attention"
        )
    weights: list[Tensor] = []

    def record(module: Any, inputs: tuple[Tensor, ...]) -> None:
        weights.append(attention_weights(module, *inputs))

    with ExitStack() as hooks:
        for module in connector.modules():
            if isinstance(module, CrossAttention):
                hooks.callback(module.register_forward_pre_hook(record).remove)
        connector(features)
    return torch.stack(weights).mean(0)


def attention_weights(attention: CrossAttention, queries: Tensor, features: Tensor) -> Tensor:
    """The weights that `CrossAttention` gives to its keys, mean over heads, (n, Q, V)."""
    q, k = (
        x.unflatten(-1, (attention.num_heads, -1))
        for x in (attention.q_proj(queries), attention.k_proj(features))
    )
    scores = torch.einsum("nqap,nvap->naqv", q, k) * q.shape[-1] ** -0.5
    if attention.local:
        index, valid = (t.to(q.device) for t in local_windows(q.shape[1], k.shape[1]))
        mask = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=q.device)
        row = torch.arange(len(index), device=q.device)[:, None].expand_as(index)
        mask[row[valid], index[valid]] = True
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).mean(1)
