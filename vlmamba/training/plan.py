"""What a run will need: memory of each GPU under every strategy, tokens, hours, and what to change if it does not fit.

Works from the recipe alone, without weights, data or a GPU. Activations and FLOPs come from the model's own step run on
shapes (`vlmamba.training.tracing`); what parameters, gradients and optimizer states take follows from how each strategy
of `vlmamba.training.parallel` keeps them, and is arithmetic. Not seen: fragmentation, libraries' own buffers and
kernels' workspace, for which `RESERVE` is left free.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlmamba.errors import ConfigError
from vlmamba.models.builder import build_meta_model
from vlmamba.ssm.mixer import keeps_fp32
from vlmamba.training.config import TrainConfig
from vlmamba.training.data import plan_settings
from vlmamba.training.flops import FlopCount, peak_of
from vlmamba.training.parallel.fsdp2 import blocks
from vlmamba.training.parallel.zero import zero_sizes
from vlmamba.training.parts import set_modes
from vlmamba.training.tracing import StepShape, StepTrace, trace_step

GIB = float(2**30)
SINGLE, DDP, ZERO2, ZERO3 = "single", "ddp", "zero2", "zero3"
FSDP_GRADS, FSDP_FULL, FSDP_HYBRID = "fsdp2 grads", "fsdp2 full", "fsdp2 hybrid"
FLAGS = {
    SINGLE: "--parallel single",
    DDP: "--parallel ddp",
    FSDP_GRADS: "--parallel fsdp2 --sharding.shard grads",
    FSDP_FULL: "--parallel fsdp2 --sharding.shard full",
    FSDP_HYBRID: "--parallel fsdp2 --sharding.hybrid true",
    ZERO2: "--parallel zero2",
    ZERO3: "--parallel zero3",
}
RESERVE = 0.08
"""Share of the memory left free, an assumption."""
DEFAULT_MFU = 0.25
"""An assumption. Transformers of this size are reported at 0.33 to 0.39 on H100s
(github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md); Mamba's scan is bound by memory."""


@dataclass(frozen=True)
class PlanSettings:
    """What the run is planned for.

    Attributes:
        gpus: Number of GPUs, one process each.
        memory: GiB of each.
        gpu: Its name, for its peak.
        mfu: Share of the peak that training reaches, an assumption.
        per_host: GPUs of a host.
        length: Tokens of the longest rows; None: `data.pack_length`, else `data.max_length`.
        text_tokens: Mean text tokens of a sample; None: `DEFAULT_TEXT`.
        supervised: Share of the text tokens with a label.
    """

    gpus: int = 8
    memory: float = 80.0
    gpu: str = "A100"
    mfu: float = DEFAULT_MFU
    per_host: int = 8
    length: int | None = None
    text_tokens: float = 250.0
    supervised: float = 0.5

    def __post_init__(self) -> None:
        for name in ("gpus", "memory", "mfu", "per_host", "text_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"plan: {name} must be positive, got {getattr(self, name)}.")
        if not (self.mfu <= 1 and 0 <= self.supervised <= 1):
            raise ConfigError(
                f"plan: mfu {self.mfu} and supervised {self.supervised} are shares from 0 to 1."
            )
        if peak_of(self.gpu) is None:
            raise ConfigError(
                f"plan: the peak of the GPU {self.gpu!r} is not known; name A100, H100, H200 or another one of "
                "vlmamba.training.flops.PEAK_FLOPS."
            )

    @property
    def budget(self) -> float:
        """Bytes that a run may take."""
        return self.memory * GIB * (1.0 - RESERVE)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step.

    Attributes:
        parameters: Masters, frozen parts, and weights gathered for computing.
        gradients: Those that are kept, and the buffers in which they are exchanged.
        optimizer: Moments, and masters that the optimizer keeps apart.
        activations: Kept from forward to backward.
        temporary: Logits and what else lives for a moment.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporary


@dataclass(frozen=True)
class Sizes:
    """Parameter counts that memory depends on.

    Attributes:
        trained: Parameters that train.
        whole: Of these, those that FSDP2 never cuts.
        block: Trained parameters of the largest repeated block.
        root: Trained parameters outside of the blocks.
        frozen_bytes: Bytes of all others.
    """

    trained: int
    whole: int
    block: int
    root: int
    frozen_bytes: int

    @classmethod
    def of(cls, model: Any, precision: str) -> Sizes:
        """Count a model with trained parts and precision set."""
        named = list(model.named_parameters())
        trained = {n: p for n, p in named if p.requires_grad}
        in_blocks = [sum(p.numel() for p in b.parameters() if p.requires_grad) for b in blocks(model)]
        total = sum(p.numel() for p in trained.values())
        return cls(
            trained=total,
            whole=sum(p.numel() for n, p in trained.items() if precision == "bf16" and keeps_fp32(n)),
            block=max(in_blocks, default=0),
            root=total - sum(in_blocks),
            frozen_bytes=sum(p.numel() * p.element_size() for _, p in named if not p.requires_grad),
        )


@dataclass(frozen=True)
class Choice:
    """What a user may change: strategy, rows of a micro-batch, and recomputation of every n-th block (0: none)."""

    strategy: str
    micro: int
    every_nth: int


class Planner:
    """Plans one recipe; traces are made when they are asked for and kept.

    Args:
        config: The recipe.
        settings: What for.
        model: A meta model of these sizes, of which trained parts are set anew; built when left out.

    Raises:
        ConfigError: A setting is wrong, or batch and GPUs do not go together.
        MissingFileError: Sizes are not known: neither files nor presets are there.
    """

    def __init__(self, config: TrainConfig, settings: PlanSettings, model: Any = None) -> None:
        from vlmamba.training.run import fit_micro_batch, set_trained_parts

        self.settings = settings
        self.config = fit_micro_batch(config, settings.gpus)
        plan_settings(self.config, settings.gpus)
        self.model = build_meta_model(config.model) if model is None else model
        set_trained_parts(self.model, config)
        set_modes(self.model)
        self.sizes = Sizes.of(self.model, config.precision)
        self.visual = int(self.model.multi_modal_projector.num_tokens)
        self.trace = functools.lru_cache(maxsize=64)(self._trace)

    # --- the run as written ---

    @property
    def every_nth(self) -> int:
        """Which blocks are recomputed as the recipe says; 0: none."""
        return self.config.checkpoint_every_nth if self.config.gradient_checkpointing else 0

    @property
    def length(self) -> int:
        """Tokens of the longest rows."""
        return self.settings.length or self.config.data.pack_length or self.config.data.max_length

    @property
    def micro(self) -> int:
        """Rows of a forward pass."""
        batch = self.config.batch
        if self.config.data.pack_length is not None:
            return 1
        if batch.micro_batch_size is not None:
            return batch.micro_batch_size
        assert batch.tokens_per_micro_batch is not None
        return max(batch.tokens_per_micro_batch // self.length, 1)

    def shape(self, micro: int) -> StepShape:
        """The largest micro-batch: every row is as long as can be and holds an image, a packed row as many samples as
        fit.
        """
        length, packed = self.length, self.config.data.pack_length is not None
        samples = max(length / (self.visual + self.settings.text_tokens), 1.0) if packed else 1.0
        images = round(samples * micro)
        text = max(length * micro - images * self.visual, 1)
        return StepShape(micro, length, images, max(round(text * self.settings.supervised), 1), packed)

    # --- memory ---

    def _trace(self, micro: int, every_nth: int, gathered: bool) -> StepTrace:
        from vlmamba.training.run import enable_checkpointing

        if every_nth:
            enable_checkpointing(self.model.language_model, every_nth=every_nth)
            if not self.model.vision_tower.frozen:
                self.model.vision_tower.set_gradient_checkpointing(True)
            set_modes(self.model)
        precision = self.config.precision
        return trace_step(
            self.model, self.shape(micro), precision=precision, gathered=gathered, recompute=every_nth > 0
        )

    def memory(self, choice: Choice) -> Memory:
        """Of each GPU."""
        gathered = choice.strategy.startswith("fsdp2") and self.config.precision == "bf16"
        trace = self.trace(choice.micro, choice.every_nth, gathered)
        kept = self._kept(choice.strategy)
        peak, gradients = trace.peak, kept.gradients
        grow = choice.strategy == SINGLE or choice.strategy.startswith("fsdp2")
        if grow and not self.config.sharding.cpu_offload and self.micro_steps(choice.micro) == 1:
            # Gradients grow while activations are released; with more micro-steps they are there from the first on.
            parts = self._parts(choice.strategy)
            gradients -= 4 * (self.sizes.trained - self.sizes.whole * (parts > 1)) / parts
            gradients += trace.peak_with(1 / parts) - peak
        return dataclasses.replace(
            kept, gradients=gradients, activations=trace.activations, temporary=peak - trace.activations
        )

    def _parts(self, strategy: str) -> int:
        """Into how many parts what trains is cut."""
        if strategy in (SINGLE, DDP):
            return 1
        return (
            min(self.settings.gpus, self.settings.per_host) if strategy == FSDP_HYBRID else self.settings.gpus
        )

    def _kept(self, strategy: str) -> Memory:
        """Parameters, gradients and optimizer states, a running mean of the weights (ema) among them."""
        s, gpus = self.sizes, self.settings.gpus
        n, offload = float(s.trained), self.config.sharding.cpu_offload
        mean = 0 if self.config.ema is None else 4
        if strategy in (SINGLE, DDP):
            return Memory(4 * n + s.frozen_bytes, 4 * n, (8 + mean) * n, 0, 0)
        if strategy in (ZERO2, ZERO3):
            # The engine keeps the gradients' parts of the last step while it gathers new ones, and whole buckets.
            zero = zero_sizes(self.config, stage=int(strategy[-1]))
            buckets = (
                4.0 * zero["reduce_bucket_size"] * (2 if strategy == ZERO2 and zero["overlap_comm"] else 1)
            )
            weights = 4 * n
            if strategy == ZERO3:
                live = max(zero["stage3_max_live_parameters"], s.root + 2 * s.block)
                weights = 4 * n / gpus + 4 * min(live, n)
            host = 0.0 if offload else 12 * n / gpus
            return Memory(weights + s.frozen_bytes, 2 * 4 * n / gpus + buckets, host, 0, 0)
        parts = self._parts(strategy)
        cut = n - s.whole
        width = 2 if self.config.precision == "bf16" else 4
        full = strategy == FSDP_FULL or (strategy == FSDP_HYBRID and self.config.sharding.shard == "full")
        gathered = width * (min(cut, s.root + 2 * s.block) if full else cut)
        exchanged = (width + 4) * max(
            s.block, s.root
        )  # gradients of one group, and their fp32 copy to reduce
        frozen = s.frozen_bytes / (parts if self.config.sharding.shard_frozen else 1)
        masters, moments, gradients = (0.0, 0.0, 0.0) if offload else (4 * cut, (8 + mean) * cut, 4 * cut)
        return Memory(
            masters / parts + 4 * s.whole + gathered + frozen,
            gradients / parts + 4 * s.whole + exchanged,
            moments / parts + (8 + mean) * s.whole,
            0,
            0,
        )

    def micro_steps(self, micro: int) -> int:
        """Forward passes of a process in an optimizer step, at least."""
        batch, packed = self.config.batch, self.config.data.pack_length
        if batch.tokens_per_step is not None and packed is not None:
            return batch.tokens_per_step // packed // self.settings.gpus
        samples = batch.global_batch_size / self.settings.gpus
        return max(round(samples / max(self.shape(micro).images, 1)), 1)

    def fits(self, choice: Choice) -> bool:
        """Whether it fits with the reserve left free."""
        return self.memory(choice).total <= self.settings.budget

    def strategies(self) -> list[str]:
        """Those that so many GPUs can use."""
        if self.settings.gpus == 1:
            return [SINGLE]
        return [DDP, FSDP_GRADS, FSDP_FULL, FSDP_HYBRID, ZERO2, ZERO3]

    def chosen(self) -> Choice:
        """The run as the recipe says."""
        config, strategy = self.config, self.config.parallel
        if strategy == "auto":
            strategy = SINGLE if self.settings.gpus == 1 else "fsdp2"
        if strategy == "fsdp2":
            kind = "hybrid" if config.sharding.hybrid else config.sharding.shard
            strategy = f"fsdp2 {kind}"
        return Choice(strategy, self.micro, self.every_nth)

    # --- what to change ---

    def smaller(self, micro: int) -> Iterator[int]:
        """Smaller micro-batches that divide the step, the largest first."""
        batch = self.config.batch
        per_gpu = batch.global_batch_size // self.settings.gpus
        if batch.micro_batch_size is None or self.config.data.pack_length is not None:
            return
        yield from (m for m in range(micro - 1, 0, -1) if per_gpu % m == 0)

    def fitting(self) -> list[Choice]:
        """Changes after which the run fits: one setting at a time, then two; each as small as it can be."""
        now = self.chosen()
        policies = [p for p in (2, 1) if now.every_nth == 0 or p < now.every_nth]
        others = [s for s in self.strategies() if s != now.strategy]
        found = [self._first(dataclasses.replace(now, micro=m) for m in self.smaller(now.micro))]
        found.append(self._first(dataclasses.replace(now, every_nth=p) for p in policies))
        found += [c for s in others if self.fits(c := dataclasses.replace(now, strategy=s))]
        if not any(found):
            last = dataclasses.replace(now, every_nth=1)
            found = [
                self._first(dataclasses.replace(last, strategy=s, micro=m) for m in self.smaller(now.micro))
                for s in [now.strategy, *others]
            ]
        return [choice for choice in found if choice is not None]

    def _first(self, choices: Iterator[Choice]) -> Choice | None:
        return next((choice for choice in choices if self.fits(choice)), None)

    # --- time ---

    def samples(self, samples: float | None, tokens: float | None) -> float | None:
        """Of the run, where a number of tokens may end it (`DataFacts`)."""
        if tokens is None:
            return samples
        held = tokens / (self.visual + self.settings.text_tokens)
        return held if samples is None else min(samples, held)

    @functools.cached_property
    def flops(self) -> FlopCount:
        """Model FLOPs."""
        return FlopCount.of(self.model, length=-(-(self.visual + 16) // 1024) * 1024)

    def recomputation(self) -> float:
        """FLOPs with recomputation over those without."""
        if not self.every_nth:
            return 1.0
        with_it = sum(self.trace(1, self.every_nth, False).flops.values())
        return with_it / sum(self.trace(1, 0, False).flops.values())

    def flops_of(self, samples: float) -> float:
        """Model FLOPs of so many samples of one image each."""
        text = self.settings.text_tokens
        return samples * self.flops.total(
            tokens=self.visual + text, supervised=text * self.settings.supervised, images=1
        )

    def seconds(self, samples: float) -> float:
        """Time for so many samples."""
        peak = peak_of(self.settings.gpu)
        assert peak is not None
        rate = self.settings.gpus * peak * self.settings.mfu
        return self.flops_of(samples) * self.recomputation() / rate
