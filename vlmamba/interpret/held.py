"""A model whose scans are held: every matrix of its hidden attention is a constant, only what they carry varies.

With the time steps, B, C, gates, attention weights and norm scales of a given input held fixed, a stack of Mamba blocks
is a linear map of the embedded tokens: a sum over all paths through the hidden attention matrices of all layers
(``M`` of `vlmamba.interpret.hidden_attention`) and the residual connections. The gradient of a held model is that map,
all channels and all layers composed, at the price of one backward pass: the rollout of hidden attention without its
usual losses (absolute values, averages over channels). That gradient times the input sums to the output itself, save
for what biases add. MambaLRP (Jafari et al. 2024, arXiv 2406.07592) holds the same quantities, for the same reason.

Shapes: B batch, L length, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba.models.connectors import base
from vlmamba.models.connectors.qmamba import CrossAttention
from vlmamba.models.language import blocks
from vlmamba.ssm.conv import causal_conv1d
from vlmamba.ssm.mixer import ACTIVATIONS, MambaMixer
from vlmamba.ssm.ops import selective_scan


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Within it, gradients of `model` go through values alone; outputs are as always.

    Held are the Mamba layers (time steps, B, C, gate, and the factor silu(x) / x of their activation), RMS norms (the
    scale), Q-Mamba's cross-attention (the weights) and GELU modules (the factor); other modules keep their gradients,
    such as a transformer's, and the functional activations inside the connectors.
    """
    changed: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, CrossAttention):
            for projection in (module.q_proj, module.k_proj):
                projection.forward = _detached(projection.forward)  # type: ignore[method-assign]
                changed.append(projection)
            continue
        forward = _held_forward(module)
        if forward is not None:
            module.forward = forward
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own shows again


def _held_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    if isinstance(module, MambaMixer):
        return functools.partial(_mixer, module)
    if isinstance(module, (base.RMSNorm, blocks.RMSNorm)):
        return functools.partial(_norm, module)
    if isinstance(module, nn.GELU):
        return functools.partial(_activation, functools.partial(F.gelu, approximate=module.approximate))
    return None


def _detached(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x: forward(x).detach()


def _activation(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) as x times the constant f(x) / x."""
    fixed = x.detach()
    return x * torch.where(fixed == 0, 0.0, function(fixed) / torch.where(fixed == 0, 1.0, fixed))


def _norm(norm: base.RMSNorm | blocks.RMSNorm, x: Tensor) -> Tensor:
    out = x.float()
    scale = torch.rsqrt(out.detach().pow(2).mean(-1, keepdim=True) + norm.eps)
    # The language model's norm answers in its weight's dtype, the connectors' in their input's.
    dtype = norm.weight.dtype if isinstance(norm, blocks.RMSNorm) else x.dtype
    return (norm.weight.float() * (out * scale)).to(dtype)


def _mixer(
    mixer: MambaMixer,
    hidden_states: Tensor,
    *,
    seq_idx: Tensor | None = None,
    state: None = None,
    state_at: None = None,
    reverse: bool = False,
) -> Tensor:
    assert state is None, "a held model runs whole sequences"
    assert state_at is None
    x, gate = mixer.in_proj(hidden_states).chunk(2, dim=-1)
    weight = mixer.conv1d.weight.squeeze(1)
    mixed = causal_conv1d(x, weight, mixer.conv1d.bias, activation=None, seq_idx=seq_idx, reverse=reverse)
    assert isinstance(mixed, Tensor)
    u = _activation(ACTIVATIONS[mixer.hidden_act], mixed)
    dt, B, C = (t.detach() for t in mixer._time_step_and_matrices(u))
    bias = mixer.time_step_bias()
    y = selective_scan(
        u, dt, mixer.decay(), B, C, mixer.D, gate.detach(), bias, seq_idx=seq_idx, reverse=reverse
    )
    assert isinstance(y, Tensor)
    return mixer.out_proj(y)
