"""What a training run is: one frozen `TrainConfig` made of small ones. Recipes in `train/` return it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vlmamba.config import Config, Free, Later, NotNegative, Positive, Share
from vlmamba.errors import ConfigError
from vlmamba.models.builder import ModelConfig


class SourceConfig(Config):
    """One data source."""

    annotations: str
    """JSON list or JSON lines in LLaVA's format; with kind hf a data set's name or folder, with kind webdataset
    tar shards (`shards/*.tar`, `shards/{00000..00127}.tar`)."""
    kind: Literal["llava", "hf", "webdataset"] = "llava"
    """What it is: LLaVA's files, a Hugging Face data set, or tar shards."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    subset: str | None = None
    """Configuration of a Hugging Face data set that has several."""
    image_root: str = ""
    """Folder that the rows' image paths start from; empty: the folder of the annotations."""
    weight: float = 1.0
    """How often each row is seen an epoch: 2 twice, 0.5 every second row. Streamed: its share of the rows."""
    name: str | None = None
    """Name in logs; by default that of the file."""
    hint: str = ""
    """Where to get the files, shown when they are missing."""
    expected_rows: int | None = None
    """Rows of the published file, for planning while it is not there."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"data.sources: the weight of {self.annotations} must be positive, got {self.weight}."
            )

    @property
    def root(self) -> Path:
        """The image folder."""
        return Path(self.image_root) if self.image_root else Path(self.annotations).parent


class DataConfig(Config, at="data"):
    """What is trained on, and in which order."""

    sources: tuple[SourceConfig, ...]
    """Annotation files with their image folders; mixed by their weights."""
    stream: bool = False
    """Read hf and webdataset sources from beginning to end instead of by row; needs epochs none and max_steps."""
    max_length: Positive[int] = 2048
    """Longest sample in tokens, image tokens included; longer answers are cut, images never."""
    image_position: Literal["inline", "front"] = "inline"
    """Whether `<image>` stays where it stands in its turn or moves to the front of it."""
    order: Literal["random", "length", "modality_length"] = "random"
    """Batches at random, of similar length, or of similar length and with or without images."""
    pack_length: int | None = None
    """Pack samples one after another into rows of at most so many tokens, a multiple of 64, instead of padding
    them; a micro-batch is then one row. none: no packing."""
    num_workers: Free[NotNegative[int]] = 4
    """Processes that read and decode; 0 reads in the training process."""
    max_bad_fraction: Share[float] = 0.001
    """Share of samples that may be unusable (skipped and counted) before the run stops."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources: no source given.")
        if self.stream:
            self._check_stream()
        if self.pack_length is not None and (self.pack_length % 64 or self.pack_length < self.max_length):
            fitting = max(-(-max(self.pack_length, self.max_length) // 64) * 64, 64)
            raise ConfigError(
                f"data.pack_length {self.pack_length} must be a multiple of 64 and hold the longest sample "
                f"(data.max_length {self.max_length}); {fitting} does."
            )

    def _check_stream(self) -> None:
        if self.pack_length is not None or self.order != "random":
            raise ConfigError(
                "data.stream reads rows whose lengths are not known ahead, so neither data.pack_length nor "
                f"data.order {self.order} can be had. Read the sources by row (data.stream false) for that."
            )
        whole = [s.annotations for s in self.sources if s.kind == "llava"]
        if whole:
            raise ConfigError(
                f"data.stream: {whole[0]} is of kind llava, which is read by row. Set data.stream false, or the kind "
                "of the source to hf or webdataset."
            )


class BatchConfig(Config, at="batch"):
    """How many samples make an optimizer step, and how it is cut into pieces that fit the memory."""

    global_batch_size: Positive[int]
    """Samples per optimizer step, over all processes."""
    tokens_per_step: Later[int | None] = None
    """With data.pack_length, of which it is a multiple: a step is so many tokens in packed rows, equally many for every
    process, and as many samples as they hold; global_batch_size then has no say."""
    micro_batch_size: Free[Positive[int | None]] = None
    """Samples per forward pass of one process; has no say when data.pack_length is set."""
    tokens_per_micro_batch: Free[int | None] = None
    """Or: tokens per forward pass, padding included; has no say when data.pack_length is set."""

    @property
    def step(self) -> str:
        """What makes a step, in words."""
        if self.tokens_per_step is not None:
            return f"{self.tokens_per_step:,} tokens"
        return f"{self.global_batch_size:,} samples"

    def __post_init__(self) -> None:
        if (self.micro_batch_size is None) == (self.tokens_per_micro_batch is None):
            raise ConfigError(
                "batch: set exactly one of micro_batch_size and tokens_per_micro_batch, got "
                f"{self.micro_batch_size} and {self.tokens_per_micro_batch} (none switches one off)."
            )
        if self.micro_batch_size is not None and self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch.global_batch_size {self.global_batch_size} is not a multiple of "
                f"batch.micro_batch_size {self.micro_batch_size}."
            )


class GroupConfig(Config):
    """Multipliers for the parameters that a pattern matches."""

    match: str
    """Module name, glob, or re:<expression> over dotted parameter names."""
    lr: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float = 1.0
    """Factor on the weight decay."""


class OptimConfig(Config, at="optim"):
    """The optimizer."""

    name: Literal["adamw", "radam"] = "adamw"
    """adamw or radam (rectified Adam with decoupled weight decay)."""
    lr: Positive[float]
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means."""
    eps: Positive[float] = 1e-8
    """Added to the denominator."""
    weight_decay: NotNegative[float] = 0.0
    """Decoupled; never on biases, norms and other vectors, nor on Mamba's A_log and D."""
    groups: tuple[GroupConfig, ...] = ()
    """Own multipliers for some parameters; the first match counts."""

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas must lie in [0, 1), got {self.betas}.")


class LoRAConfig(Config):
    """Low-rank adapters instead of whole weights."""

    match: tuple[str, ...]
    """Linear layers that are adapted: names of layers or of modules around them, globs, or re:<expression>."""
    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the adapter's input."""

    def __post_init__(self) -> None:
        if not self.match:
            raise ConfigError("lora.match: no pattern given. Name at least one layer, or set lora none.")
        if self.rank < 1 or not self.alpha > 0 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"lora: rank must be at least 1, alpha positive and dropout in [0, 1), got {self.rank}, {self.alpha} "
                f"and {self.dropout}."
            )


class EvaluationConfig(Config, at="evaluations"):
    """A function that measures the model during training."""

    function: str
    """`eval/file.py:function` or `package.module:function`, called with model, processor, step and the options."""
    every: Positive[int] = 1000
    """Steps between two calls; also called after the last step."""
    options: dict[str, Any] = {}  # noqa: RUF012 - Config copies defaults
    """Its further keyword arguments."""


class ScheduleConfig(Config, at="schedule"):
    """Learning rate over the run."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Curve after the warm-up."""
    warmup_ratio: Share[float] = 0.03
    """Warm-up as a share of all steps, rounded up."""
    warmup_steps: NotNegative[int | None] = None
    """Or as a number of steps, which then counts."""
    min_lr_ratio: Share[float] = 0.0
    """Where the curve ends, as a share of the peak."""


class ShardingConfig(Config):
    """How parameters are spread over processes under parallel fsdp2, and offloaded under zero2 and zero3."""

    shard: Literal["grads", "full"] = "grads"
    """grads: a block's weights stay gathered from its forward to its backward. full: they are gathered twice,
    which saves their memory in between."""
    hybrid: bool = False
    """Cut within a host and replicate over hosts, when the network between them is slow."""
    shard_frozen: bool = False
    """Cut frozen parts too, instead of holding them whole in every process."""
    cpu_offload: bool = False
    """Keep masters and optimizer states in the memory of the host."""
    deepspeed: str | None = None
    """DeepSpeed's JSON file for zero2 and zero3; none: train/deepspeed/zero2.json or zero3.json."""


class TrainConfig(Config):
    """One run of one stage."""

    output: Free[str]
    """Folder of the run: config, log, checkpoints, export."""
    model: ModelConfig
    """Encoder, connector, language model, chat template, image settings."""
    train: tuple[str, ...]
    """What trains: module names, globs or re:<expression>; all else is frozen."""
    data: DataConfig
    """Sources and order."""
    batch: BatchConfig
    """Batch sizes."""
    optim: OptimConfig
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over time."""
    epochs: Positive[int | None] = 1
    """Passes over the data."""
    max_steps: Positive[int | None] = None
    """Optimizer steps at most; with epochs none, exactly."""
    lora: LoRAConfig | None = None
    """Adapters on layers that do not train themselves; none: no adapters."""
    ema: float | None = None
    """Decay of a running mean of what trains, exported beside the weights (export_ema); none: no mean."""
    evaluations: Free[tuple[EvaluationConfig, ...]] = ()
    """Functions called now and then during training; their numbers go to eval.jsonl."""
    init_from: str | None = None
    """Run, checkpoint or export folder, or connector.safetensors, whose weights to start from."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast, frozen parts held in bf16, trained parts in fp32. fp32: everything in fp32."""
    gradient_checkpointing: Free[bool] = False
    """Recompute the language model's activations in the backward pass."""
    checkpoint_every_nth: Free[Positive[int]] = 1
    """With gradient_checkpointing: recompute every so manieth block only; 1 is all of them."""
    compile: Free[tuple[str, ...]] = ()
    """Parts that torch.compile makes faster, on a GPU: vision_tower, multi_modal_projector."""
    grad_clip: Positive[float | None] = 1.0
    """Largest global gradient norm; none: no clipping."""
    seed: int = 42
    """Of initialisation, order and dropout."""
    device: Free[str] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    parallel: Free[str] = "auto"
    """How several processes work together: ddp, fsdp2, zero2, zero3; single is one process. auto: single when
    one was started, else fsdp2."""
    sharding: Free[ShardingConfig] = ShardingConfig()
    """What fsdp2, zero2 and zero3 cut and where they keep it."""
    log_every: Free[Positive[int]] = 1
    """Steps per log line."""
    save_every: Free[NotNegative[int]] = 500
    """Steps per checkpoint; one is always written at the end. 0: at the end only."""
    keep_last: Free[NotNegative[int]] = 2
    """Checkpoints kept; 0 keeps all."""
    keep_every: Free[NotNegative[int]] = 0
    """Besides them, keep those whose step is a multiple of this; 0: none."""
    save_async: Free[bool] = False
    """Go on training while a checkpoint is written; takes host memory for a copy of it."""
    max_nonfinite_steps: Free[NotNegative[int]] = 0
    """Steps in a row that may be skipped because loss or gradient is not finite; one more ends the run."""
    stall_seconds: Free[NotNegative[float]] = 1800.0
    """A step or checkpoint that takes longer is taken for hung: stacks are written down, the run ends. 0: off."""
    loggers: Free[tuple[str, ...]] = ("tensorboard",)
    """Besides log.jsonl: tensorboard, wandb, trackio. The last two send data to their services."""

    def code(self) -> list[str]:
        """See `Config.code`."""
        return [each.function for each in self.evaluations]

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("output: name the folder of the run.")
        if not self.train and self.lora is None:
            raise ConfigError("train: no pattern given, so nothing would train. Name at least one module.")
        if self.epochs is None and self.max_steps is None:
            raise ConfigError("set epochs or max_steps; both are none.")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ConfigError(f"ema is a decay between 0 and 1, or none, got {self.ema}.")
        if self.ema is not None and self.parallel.startswith("zero"):
            raise ConfigError(
                f"ema cannot be had with parallel {self.parallel}, whose optimizer is DeepSpeed's: use fsdp2."
            )
        unknown = sorted(set(self.compile) - {"vision_tower", "multi_modal_projector"})
        if unknown:
            raise ConfigError(
                f"compile: {unknown[0]!r} cannot be compiled; vision_tower and multi_modal_projector can. "
                "The language model's scan is a kernel already."
            )
        tokens, packed = self.batch.tokens_per_step, self.data.pack_length
        if tokens is not None and (packed is None or tokens < 1 or tokens % packed):
            raise ConfigError(
                f"batch.tokens_per_step {tokens} must be a multiple of data.pack_length, which is "
                f"{'none' if packed is None else packed}."
            )
        budget = self.batch.tokens_per_micro_batch
        if budget is not None and budget < self.data.max_length:
            raise ConfigError(
                f"batch.tokens_per_micro_batch {budget} is smaller than data.max_length "
                f"{self.data.max_length}: the "
                "longest samples would fit no micro-batch. Raise one or lower the other."
            )
        if len({s.annotations for s in self.data.sources}) != len(self.data.sources):
            raise ConfigError("data.sources: a file is named twice; use its weight to see it more often.")
