"""One micro-step of training without values: every operation runs on shapes, and memory and FLOPs are counted.

The model is copied into torch's FakeTensorMode, where its own code runs forward and backward (autocast and activation
checkpointing included) and nothing is computed. Each storage is followed from its first use to its release, so the
peak is that of the code as it stands, not of a formula. Kernels' own workspace is not seen. Blocks of a language model
are alike, so a few of them are run and the rest is extrapolated, phase by phase.

Shapes: B rows, L length, n images, C channels, S image size, D width, X vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlmamba.models.language import language_logits, run_language_model
from vlmamba.models.language.loss import summed_loss
from vlmamba.ssm.mixer import keeps_fp32
from vlmamba.ssm.registry import use_backend
from vlmamba.training.flops import Counter, alike_blocks, block_counts, copy_on_shapes
from vlmamba.training.precision import autocast

FORWARD = ("images", "language", "loss")
BACKWARD = ("loss backward", "language backward", "images backward")
PHASES = (*FORWARD, *BACKWARD)


@dataclass(frozen=True)
class StepShape:
    """What one forward pass of one process is given.

    Attributes:
        rows: B.
        length: L, visual tokens included.
        images: n.
        supervised: Positions with a label, over all rows.
        packed: Whether a row holds several samples (segment ids) rather than one with padding.
    """

    rows: int
    length: int
    images: int
    supervised: int
    packed: bool = False


@dataclass
class StepTrace:
    """What a micro-step took, in bytes and FLOPs.

    Attributes:
        peaks: Most memory held in each phase besides parameters and gradients.
        peaks_with_grads: The same with the gradients made so far.
        activations: Held between forward and backward, without the loss's own.
        flops: Of each phase; recomputation counts where it happens.
    """

    peaks: dict[str, float] = field(default_factory=dict)
    peaks_with_grads: dict[str, float] = field(default_factory=dict)
    activations: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Most memory besides parameters and gradients."""
        return max(self.peaks.values())

    def peak_with(self, share: float) -> float:
        """Most memory besides parameters where this share of each gradient is kept from when it is made; at most."""
        both = self.peaks_with_grads
        return max((1 - share) * peak + share * both[phase] for phase, peak in self.peaks.items())

    def along(self, other: StepTrace, steps: float) -> StepTrace:
        """This trace moved by so many times the difference from it to another one."""

        def move(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {key: a[key] + steps * (b[key] - a[key]) for key in a}

        return StepTrace(
            move(self.peaks, other.peaks),
            move(self.peaks_with_grads, other.peaks_with_grads),
            self.activations + steps * (other.activations - self.activations),
            move(self.flops, other.flops),
        )


def trace_step(
    model: Any, shape: StepShape, *, precision: str = "bf16", gathered: bool = False, recompute: bool = True
) -> StepTrace:
    """Run a micro-step of a model on shapes alone.

    Args:
        model: A `VLMambaForConditionalGeneration` on any device, also "meta", with trained parts, precision and
            activation checkpointing set; it is not changed.
        shape: The batch.
        precision: See `TrainConfig`.
        gathered: Weights that train are there in bf16 already, as where they are cut and gathered, and are not cast
            from fp32 in the forward pass.
        recompute: False: without the model's activation checkpointing.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    blocks = alike_blocks(model.language_model)

    def trace(count: int) -> StepTrace:
        with FakeTensorMode(allow_non_fake_inputs=True):  # tables that a connector keeps from call to call
            copied = copy_on_shapes(model, blocks, count, recompute=recompute)
            if gathered and precision == "bf16":
                _cast_trained(copied)
            memory = _Memory(copied, flops := Counter())
            with use_backend("shapes"), flops, memory:
                _run(copied, shape, precision, memory)
        return memory.trace

    few, more = block_counts(blocks, recompute=recompute)
    if few == more:
        return trace(few)
    return trace(few).along(trace(more), (len(blocks) - few) / (more - few))


def _run(model: Any, shape: StepShape, precision: str, memory: _Memory) -> None:
    """The forward pass of `VLMambaForConditionalGeneration`, whose checks need values, and its backward pass."""
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    size = model.vision_tower.image_size
    pixels = torch.empty(max(shape.images, 1), model.vision_tower.num_channels, size, size)
    samples = torch.zeros(shape.rows, shape.length, dtype=torch.int32) if shape.packed else None
    with autocast(precision, torch.device("cpu")):
        memory.phase("images")
        embeds = model.get_input_embeddings()(ids)
        visual = model.get_image_features(pixels)
        places = (ids == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, visual.to(embeds.dtype))
        memory.phase_in_backward("images backward", embeds)
        memory.phase("language")
        hidden = run_language_model(model.language_model, inputs_embeds=embeds, seq_idx=samples).hidden
        memory.phase_in_backward("language backward", hidden)
        del visual, places, embeds
        memory.trace.activations = memory.live
        memory.phase("loss")
        index = torch.zeros(shape.supervised, dtype=torch.long)
        rows, targets = hidden.flatten(0, 1)[index], index
        loss = summed_loss(rows, targets, partial(language_logits, model.language_model))
        del hidden, rows
    memory.phase("loss backward")
    loss.backward()
    memory.close()


def _cast_trained(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not keeps_fp32(name):
            parameter.data = parameter.data.to(torch.bfloat16)


# --- memory -------------------------------------------------------------------------------------------------


class _Memory(TorchDispatchMode):
    """Follows every storage from its first use to its release."""

    def __init__(self, model: nn.Module, flops: Any) -> None:
        super().__init__()
        self.flops, self.counted = flops, 0.0
        self.live = 0.0
        self.grads = 0.0
        self.trace = StepTrace()
        self.current = ""
        self.known = weakref.WeakSet(t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._drop)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self._mark()
        return out

    def _follow(self, storage: Any) -> None:
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.live += size
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.live -= size

    def _drop(self, parameter: Tensor) -> None:
        """Gradients are counted apart: how long they stay depends on the strategy."""
        self.grads += parameter.numel() * parameter.element_size()
        parameter.grad = None

    def _mark(self) -> None:
        peaks, with_grads = self.trace.peaks, self.trace.peaks_with_grads
        peaks[self.current] = max(peaks.get(self.current, 0.0), self.live)
        with_grads[self.current] = max(with_grads.get(self.current, 0.0), self.live + self.grads)

    def phase(self, name: str) -> None:
        """Begin a phase."""
        if self.current:
            now = float(self.flops.total)
            self.trace.flops[self.current] = now - self.counted
            self.counted = now
        self.current = name
        if name:
            self._mark()

    def phase_in_backward(self, name: str, tensor: Tensor) -> None:
        """Begin a phase when backward reaches a tensor; without gradient there it holds nothing."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.phase(name))

    def close(self) -> None:
        """The step is over."""
        self.phase("")
        for name in PHASES:
            self.trace.peaks.setdefault(name, 0.0)
            self.trace.peaks_with_grads.setdefault(name, 0.0)
            self.trace.flops.setdefault(name, 0.0)
