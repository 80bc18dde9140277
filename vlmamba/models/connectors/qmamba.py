"""Q-Mamba: learned queries through causal Mamba layers, each followed by cross-attention to the image and an FFN.

The "query-based cross-modal projector" (docs/connectors.md): queries of width 768 go through 24 blocks of a
causal Mamba layer (sequence mixer), cross-attention to the visual features, and a feed-forward network (channel
mixer). With local attention query i sees its own share of the keys alone.

Shapes: B images, V keys (patches), F vision width, D text width, Q queries, C query width, A heads, P head width,
W window.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vlmamba.errors import CheckpointError, ConfigError
from vlmamba.models.connectors.base import Connector, RMSNorm
from vlmamba.ssm.mixer import MambaMixer


@functools.lru_cache(maxsize=16)
def local_windows(num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """Keys that each query sees under local attention: floor(i*K/Q) .. ceil((i+1)*K/Q) - 1.

    Returns:
        Key indices (Q, W), rows padded with the last key of the window, and which of them count (Q, W) bool.
    """
    # Kept from call to call, so never a tensor of inference mode, nor one without values (`training.tracing`).
    with torch.inference_mode(False), _disable_current_modes():
        q = torch.arange(num_queries, device="cpu")
        first = q * num_keys // num_queries
        end = -(-(q + 1) * num_keys // num_queries)
        offsets = torch.arange(int((end - first).max()), device="cpu")
        index = first[:, None] + offsets
        return index.clamp(max=num_keys - 1), index < end[:, None]


class CrossAttention(nn.Module):
    """Attention from queries to visual features, over all keys or each query's own window.

    Args:
        dim: C, width of the queries.
        feature_dim: Width of the features.
        num_heads: A.
        local: Window attention rather than all keys.
    """

    def __init__(self, dim: int, feature_dim: int, num_heads: int, *, local: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"num_heads must divide the width: width={dim}, num_heads={num_heads}")
        self.num_heads, self.local = num_heads, local
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(feature_dim, dim)
        self.v_proj = nn.Linear(feature_dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """(B, Q, C) queries and (B, V, F) features to (B, Q, C)."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1))
            for x in (self.q_proj(queries), self.k_proj(features), self.v_proj(features))
        )
        if self.local:
            index, valid = (t.to(q.device) for t in local_windows(q.shape[1], k.shape[1]))
            # One query against its W keys: (B, Q, A, 1, P) x (B, Q, A, W, P).
            out = F.scaled_dot_product_attention(
                q.unsqueeze(3),
                k[:, index].transpose(2, 3),
                v[:, index].transpose(2, 3),
                attn_mask=valid[:, None, None, :],
            ).squeeze(3)
        else:
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return self.out_proj(out.flatten(2))


class QMambaBlock(nn.Module):
    """Causal Mamba layer, cross-attention, FFN, each pre-normed and residual; `norm` and `mixer` named as Mamba's."""

    def __init__(
        self,
        dim: int,
        feature_dim: int,
        num_heads: int,
        *,
        local: bool,
        ffn: bool,
        ffn_ratio: float,
        state_size: int,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = MambaMixer(dim, state_size=state_size)
        self.cross_norm = RMSNorm(dim)
        self.cross_attention = CrossAttention(dim, feature_dim, num_heads, local=local)
        hidden = int(dim * ffn_ratio)
        self.ffn_norm = RMSNorm(dim) if ffn else None
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) if ffn else None

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """(B, Q, C) queries and (B, V, F) features to (B, Q, C)."""
        queries = queries + self.mixer(self.norm(queries))
        queries = queries + self.cross_attention(self.cross_norm(queries), features)
        if self.ffn is not None and self.ffn_norm is not None:
            queries = queries + self.ffn(self.ffn_norm(queries))
        return queries


class QMambaConnector(Connector):
    """Q-Mamba, with another connector in front of it or none.

    Args:
        vision_dim: F.
        text_dim: D.
        grid: Rows and columns of patches.
        num_queries: Q, the visual tokens of an image (the paper: 128, 256, 512, 729).
        depth: Number of blocks (24, as Mamba-130M has layers).
        width: C (768, as Mamba-130M).
        attention: "local" or "global".
        num_heads: A; one for every 64 of width when left out.
        ffn: With the feed-forward network.
        ffn_ratio: Its hidden width over C.
        state_size: N of the Mamba layers.
        pre: Connector in front, which gives features of width D; None reads the encoder's features.
        pre_options: Its options.

    Raises:
        ConfigError: A value that does not fit.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        text_dim: int,
        grid: tuple[int, int],
        num_queries: int = 256,
        depth: int = 24,
        width: int = 768,
        attention: str = "local",
        num_heads: int | None = None,
        ffn: bool = True,
        ffn_ratio: float = 4.0,
        state_size: int = 16,
        pre: str | None = "vss-l2",
        pre_options: Mapping[str, Any] | None = None,
    ) -> None:
        from vlmamba.models.connectors import build_connector

        super().__init__(vision_dim=vision_dim, text_dim=text_dim, grid=grid)
        if attention not in ("local", "global"):
            raise ConfigError(f"connector 'qmamba': attention must be 'local' or 'global', got {attention!r}")
        if num_queries < 1 or depth < 1:
            raise ConfigError(
                f"connector 'qmamba': num_queries and depth must be at least 1, got {num_queries} and {depth}"
            )
        if pre is None and pre_options:
            raise ConfigError(
                f"connector 'qmamba': pre_options {dict(pre_options)} without a connector in front (pre)"
            )
        self.num_queries = num_queries
        self.pre = (
            build_connector(
                pre, vision_dim=vision_dim, text_dim=text_dim, grid=self.grid, **dict(pre_options or {})
            )
            if pre is not None
            else None
        )
        feature_dim = vision_dim if self.pre is None else text_dim
        heads = num_heads or max(width // 64, 1)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)
        self.feature_norm = RMSNorm(feature_dim)
        self.layers = nn.ModuleList(
            QMambaBlock(
                width,
                feature_dim,
                heads,
                local=attention == "local",
                ffn=ffn,
                ffn_ratio=ffn_ratio,
                state_size=state_size,
            )
            for _ in range(depth)
        )
        self.norm_f = RMSNorm(width)
        self.out_proj = nn.Linear(width, text_dim)

    @property
    def num_tokens(self) -> int:
        """Q."""
        return self.num_queries

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks that queries go through."""
        return self.layers

    def project(self, features: Tensor) -> Tensor:
        """(B, V, F) -> (B, Q, D)."""
        features = self.feature_norm(features if self.pre is None else self.pre(features))
        queries = self.queries.to(features.dtype).expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.out_proj(self.norm_f(queries))

    def set_scan(self, scan: str) -> None:
        """Change the scan directions of the connector in front."""
        if self.pre is None:
            super().set_scan(scan)
        else:
            self.pre.set_scan(scan)
            self.options["pre_options"] = {**(self.options.get("pre_options") or {}), "scan": scan}

    def set_num_queries(self, count: int) -> None:
        """Keep `count` of the queries, evenly spaced, so that with local attention their windows still cover the image.

        Raises:
            ConfigError: There are fewer, or none was asked for.
        """
        if not 1 <= count <= self.num_queries:
            raise ConfigError(f"connector 'qmamba' has {self.num_queries} queries, so {count} cannot be kept")
        kept = torch.arange(count, device=self.queries.device) * self.num_queries // count
        self.queries = nn.Parameter(self.queries.detach()[kept], requires_grad=self.queries.requires_grad)
        self.num_queries = self.options["num_queries"] = count

    def load_part(self, part: str, state: Mapping[str, Tensor]) -> None:
        """Initialise the connector in front ("pre") or the Mamba layers ("layers").

        Args:
            part: "pre": `state` is a connector's; "layers": a Mamba language model's, whose
                ``backbone.layers.N.{norm,mixer}`` go to the blocks by name (Mamba-130M fits the default sizes).
            state: Tensors by name.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
            ConfigError: There is no such part.
        """
        if part == "pre" and self.pre is not None:
            _load_exactly(self.pre, dict(state), "the connector in front (pre)")
        elif part == "layers":
            names = [n for n in self.layers.state_dict() if n.split(".")[1] in ("norm", "mixer")]
            found = {n: state[f"backbone.layers.{n}"] for n in names if f"backbone.layers.{n}" in state}
            missing = sorted(set(names) - found.keys())
            if missing:
                raise CheckpointError(
                    f"Q-Mamba's {len(self.layers)} Mamba layers cannot start from this language model: "
                    f"{len(missing)} tensors are missing, first backbone.layers.{missing[0]}"
                )
            _load_exactly(self.layers, found, "Q-Mamba's Mamba layers", partial=True)
        else:
            parts = "layers" if self.pre is None else "pre, layers"
            raise ConfigError(f"connector 'qmamba' has no part {part!r} to initialise; it has: {parts}")


def _load_exactly(module: nn.Module, state: dict[str, Tensor], what: str, *, partial: bool = False) -> None:
    own = module.state_dict()
    wrong = [
        f"{name}: {tuple(own[name].shape)} here, {tuple(tensor.shape)} in the file"
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape
    ]
    missing = [] if partial else sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    if wrong or missing or unexpected:
        raise CheckpointError(
            f"the weights do not fit {what}: shapes {wrong[:3] or 'ok'}; missing {missing[:3] or 'none'}; "
            f"unexpected {unexpected[:3] or 'none'}. Build both with the same sizes and options."
        )
    module.load_state_dict(state, strict=False)
