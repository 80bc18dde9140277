"""FLOPs of a model, counted operation by operation, and the peaks of GPUs to compare them with.

Counted, with a multiplication and an addition as one FLOP each: matrix products, convolutions and attention scores by
the rules of `torch.utils.flop_counter`, selective scans and causal convolutions by the closed forms below. Other
elementwise operations are not, and neither is what activation checkpointing computes again (model FLOPs, as PaLM's
appendix B, arXiv:2204.02311, defines MFU).

Shapes: B batch, L length, D channels, N state size, K kernel width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlmamba.models.connectors import Connector
from vlmamba.models.language import language_logits, run_language_model
from vlmamba.models.language.loss import summed_loss
from vlmamba.ssm.registry import use_backend

# Dense bf16 tensor-core peaks, FLOP/s, matched against the start of the device's name, the longest first. NVIDIA's
# data sheets give most of them with 2:4 sparsity, which doubles them: A100 (datasheet 2188504, May 2022) 312 dense;
# H100 (datasheet 3118236) SXM 1,979, PCIe 1,513 and NVL 1,671 sparse; H200 (datasheet 3002446) SXM 1,979 and NVL 1,671
# sparse; B200 4,500 sparse; L40S 733 sparse.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device in bf16, or None where it is not known (a CPU, another GPU)."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Peak of a GPU in bf16 by its name, with or without the maker's; None where it is not known."""
    full = name if name.startswith("NVIDIA ") else f"NVIDIA {name}"
    known = sorted((k for k in PEAK_FLOPS if full.startswith(k)), key=len)
    return PEAK_FLOPS[known[-1]] if known else None


# --- closed forms -------------------------------------------------------------------------------------------


def scan_flops(batch: int, length: int, channels: int, size: int, *, skip: bool = True) -> int:
    """FLOPs of a selective scan, for each token and channel:

    7 for each state: dt A (1) and its exponential (1), (dt u) B (1), decay h + increment (2), C . h (2);
    1 for dt u, and 2 for the skip connection D u.
    """
    return batch * length * channels * (7 * size + 1 + 2 * skip)


def scan_backward_flops(batch: int, length: int, channels: int, size: int, *, skip: bool = True) -> int:
    """FLOPs of the gradients of a selective scan, without computing the states again.

    15 for each state: the gradient of h, C dy + decay dh (3); of C, h dy (2); of B, (dt u) dh (2); of dt u, B dh (2);
    of the decay's exponent, dh h decay (2); of dt through A (2); of A (2). 3 for dt and u from dt u (2 products, 1
    sum); 4 for the skip connection.
    """
    return batch * length * channels * (15 * size + 3 + 4 * skip)


def conv_flops(batch: int, length: int, channels: int, kernel: int) -> int:
    """FLOPs of a causal depthwise convolution; its gradients take twice as many."""
    return 2 * batch * length * channels * kernel


def _scan(u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = u.shape
    return scan_flops(batch, length, channels, A.shape[1], skip=D is not None)


def _scan_backward(grads: Any, u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = u.shape
    return scan_backward_flops(batch, length, channels, A.shape[1], skip=D is not None)


def _conv(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = x.shape
    return conv_flops(batch, length, channels, weight.shape[1])


def _conv_backward(grads: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _conv(x, weight)


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of what runs under it, the state-space operations' too (as ops: under the backend "shapes")."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry

        from vlmamba.ssm import compiled  # noqa: F401  (defines the ops)

        super().__init__()
        ops = torch.ops.vlmamba
        self.total = 0
        self.rules: dict[Any, Callable[..., int]] = {
            **flop_registry,
            ops.selective_scan: _scan,
            ops.selective_scan_backward: _scan_backward,
            ops.causal_conv1d: _conv,
            ops.causal_conv1d_backward: _conv_backward,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = self.rules.get(func._overloadpacket)
        if rule is not None:
            self.total += rule(*args, **(kwargs or {}), out_val=out)
        return out


# --- modules on shapes --------------------------------------------------------------------------------------


def alike_blocks(part: nn.Module) -> nn.ModuleList:
    """Blocks of a language model or a connector that run one after another, however many there are; empty where a
    connector names none (`Connector.blocks`).
    """
    if isinstance(part, Connector):
        return part.blocks if part.blocks is not None else nn.ModuleList()
    return next((m for m in part.modules() if isinstance(m, nn.ModuleList)), nn.ModuleList())


def block_counts(blocks: nn.ModuleList, *, recompute: bool = False) -> tuple[int, int]:
    """How many blocks to run, twice, for extrapolation; the same number twice where that would not do.

    Everything that is counted grows by the same amount with each further block. Where blocks differ (LoRA or training
    on some), all are run.
    """
    signatures = [
        [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters()]
        for block in blocks
    ]
    recomputed = [recompute and getattr(block, "gradient_checkpointing", False) for block in blocks]
    period = next((i for i, flag in enumerate(recomputed[1:], start=1) if flag), 1) if any(recomputed) else 1
    total = len(blocks)
    few = period * -(-2 // period)
    more = few + period
    alike = all(s == signatures[0] for s in signatures)
    if not alike or more >= total or (total - few) % period:
        return total, total
    return few, more


def copy_on_shapes(
    module: nn.Module, blocks: nn.ModuleList, count: int, *, recompute: bool, dtype: torch.dtype | None = None
) -> Any:
    """The same modules around tensors without values, under FakeTensorMode or ``torch.device("meta")``; only so many
    of the blocks, which are the module's own.
    """
    memo: dict[int, Any] = {id(block): None for block in blocks[count:]}
    for parameter in module.parameters():
        empty = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    copied = copy.deepcopy(module, memo)
    for each in copied.modules():
        if isinstance(each, nn.ModuleList) and any(block is None for block in each):
            del each[count:]
        if not recompute and getattr(each, "gradient_checkpointing", False):
            each.gradient_checkpointing = False  # type: ignore[assignment]
    return copied


# --- of a run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlopCount:
    """Model FLOPs of training, forward and backward: of each token in the language model without its head, of each
    supervised token in the head, and of each image in encoder and connector.

    Exact for Mamba, whose cost is linear in the length; that of attention over text is counted at one length.
    """

    per_token: float
    per_supervised: float
    per_image: float

    @classmethod
    def of(cls, model: Any, *, length: int = 256) -> FlopCount:
        """Count a model as it trains: what is frozen has no gradients of weights. What is alike in two models is
        counted once.

        Args:
            model: A `VLMambaForConditionalGeneration` with trained parts set, not cut over processes; not changed.
            length: Tokens of the sample that is counted.
        """
        tower, connector, language = model.vision_tower, model.multi_modal_projector, model.language_model
        text = model.config.text_config
        length = max(length, connector.num_tokens + 2)
        embedding = model.get_input_embeddings()
        reached = any(p.requires_grad for part in (tower, connector, embedding) for p in part.parameters())
        trains = any(p.requires_grad for p in language.parameters())
        size = tower.image_size
        image = _part(
            tower, "image", tower.config_dict(), (1, tower.num_channels, size, size), False
        ) + _part(
            connector,
            "tokens",
            (connector.name, connector.options, connector.grid),
            (1, connector.num_patches, connector.vision_dim),
            not tower.frozen,
        )
        words = text.to_dict()
        tokens = _part(language, "language", words, (1, length, text.hidden_size), reached)
        supervised = _part(language, "loss", words, (2, text.hidden_size), reached or trains)
        return cls(per_token=tokens / length, per_supervised=supervised / 2, per_image=image)

    def total(self, *, tokens: float, supervised: float, images: float) -> float:
        """Of so many of each."""
        return self.per_token * tokens + self.per_supervised * supervised + self.per_image * images


_counted: dict[str, int] = {}
"""FLOPs of parts that were counted, by all that they depend on."""


def _part(part: nn.Module, run: str, config: Any, shape: tuple[int, ...], differentiated: bool) -> int:
    """FLOPs of a part, forward and backward.

    Args:
        part: A tower, connector or language model.
        run: How it is run: "image", "tokens", "language" or "loss".
        config: What it was built from.
        shape: Of its input.
        differentiated: Whether the gradient of the input is needed.
    """
    trained = [(name, tuple(p.shape), p.requires_grad) for name, p in part.named_parameters()]
    key = json.dumps([run, config, shape, differentiated, trained], default=str, sort_keys=True)
    if key not in _counted:
        blocks = nn.ModuleList() if run == "image" else alike_blocks(part)
        few, more = block_counts(blocks)
        base = _count(part, blocks, few, run, shape, differentiated)
        if more > few and run != "loss":
            each = (_count(part, blocks, more, run, shape, differentiated) - base) // (more - few)
            base += (len(blocks) - few) * each
        _counted[key] = base
    return _counted[key]


def _count(
    part: nn.Module, blocks: nn.ModuleList, count: int, run: str, shape: tuple[int, ...], differentiated: bool
) -> int:
    """FLOPs of a part with so many of its blocks."""
    with torch.device("meta"), use_backend("shapes"), Counter() as counter:
        copied = copy_on_shapes(part, blocks, count, recompute=False, dtype=torch.float32)
        given = torch.empty(shape, requires_grad=differentiated)
        if run == "language":
            out = run_language_model(copied, inputs_embeds=given).hidden
        elif run == "loss":
            targets = torch.empty(shape[0], dtype=torch.long)
            out = summed_loss(given, targets, partial(language_logits, copied))
        else:
            out = copied(given)
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return counter.total
