"""DDP: every process holds the whole model and optimizer; gradients are averaged while backward runs."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlmamba.training.parallel.base import Parallel

ALWAYS_USED = ("multi_modal_projector.", "language_model.")
"""Parts of which every parameter takes part in every forward pass. An encoder that trains may end in layers behind the
one whose features are taken."""


class DDP(Parallel):
    """`torch.nn.parallel.DistributedDataParallel`."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model inside DDP; all processes begin with rank 0's weights."""
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        # Buffers need no message in every forward pass; the flag got another name in torch 2.13.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {flag: False}
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **options,
            find_unused_parameters=not all(name.startswith(ALWAYS_USED) for name in trained),
        )

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged in the last micro-step only."""
        return contextlib.nullcontext() if last else model.no_sync()  # type: ignore[operator]
