"""FLOPs of a model, counted operation by operation, and the peaks of GPUs to compare them with.

Counted, with a multiplication and an addition as one FLOP each: matrix products, convolutions and attention scores by
`torch.utils.flop_counter`, selective scans and causal convolutions by the closed forms below. Other elementwise
operations are not, and neither is what activation checkpointing computes again (model FLOPs, as PaLM's appendix B,
arXiv:2204.02311, defines MFU).

Shapes: B batch, L length, D channels, N state size, K kernel width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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
    batch, length, channels = u
    return scan_flops(batch, length, channels, A[1], skip=D is not None)


def _scan_backward(grads: Any, u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = u
    return scan_backward_flops(batch, length, channels, A[1], skip=D is not None)


def _conv(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = x
    return conv_flops(batch, length, channels, weight[1])


def _conv_backward(grads: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _conv(x, weight)


def counting() -> Any:
    """A `FlopCounterMode` that also knows the state-space operations (as ops: under the backend "shapes")."""
    from torch.utils.flop_counter import FlopCounterMode

    from vlmamba.ssm import compiled  # noqa: F401  (defines the ops)

    ops = torch.ops.vlmamba
    mapping = {
        ops.selective_scan: _scan,
        ops.selective_scan_backward: _scan_backward,
        ops.causal_conv1d: _conv,
        ops.causal_conv1d_backward: _conv_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    # Its tracker of modules hangs hooks on the graph, also on that of a recomputation, which keep its tensors alive.
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules:
    """In place of torch's `ModuleTracker`: totals are all that is asked for."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None: ...


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
        """Count a model as it trains: what is frozen has no gradients of weights.

        Args:
            model: A `VLMambaForConditionalGeneration` with trained parts set, not cut over processes; not changed.
            length: Tokens of the sample that is counted.
        """
        from vlmamba.training.tracing import StepShape, trace_step

        length = max(length, model.multi_modal_projector.num_tokens + 2)
        shape = StepShape(rows=1, length=length, images=1, supervised=2)
        precision = "bf16" if any(p.dtype == torch.bfloat16 for p in model.parameters()) else "fp32"
        flops = trace_step(model, shape, precision=precision, recompute=False).flops
        return cls(
            per_token=(flops["language"] + flops["language backward"]) / length,
            per_supervised=(flops["loss"] + flops["loss backward"]) / shape.supervised,
            per_image=flops["images"] + flops["images backward"],
        )

    def total(self, *, tokens: float, supervised: float, images: float) -> float:
        """Of so many of each."""
        return self.per_token * tokens + self.per_supervised * supervised + self.per_image * images
