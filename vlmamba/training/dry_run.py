"""What a run would be, without weights, data or a GPU: the full-size model on the meta device and its
numbers.
"""

from __future__ import annotations

import math
from pathlib import Path

from vlmamba.data import build_source, missing_folders
from vlmamba.data.index import RowFile
from vlmamba.errors import CheckpointError, MissingFileError
from vlmamba.models.builder import build_meta_model
from vlmamba.training.config import SourceConfig, TrainConfig
from vlmamba.training.data import MOST_LISTED
from vlmamba.training.files import PLAYGROUND, MissingItem, format_missing, missing_files
from vlmamba.training.parts import PartRow, format_parts, parts_table
from vlmamba.training.run import set_trained_parts
from vlmamba.training.schedule import Schedule


def dry_run(config: TrainConfig) -> str:
    """The report of a dry run.

    Raises:
        ConfigError: A setting is wrong; a pattern of `train` matches nothing.
        DataError: An annotation file is no list of rows.
    """
    sections = [_model_section(config), _data_section(config), _files_section(config)]
    return "\n\n".join(sections)


def _model_section(config: TrainConfig) -> str:
    try:
        model = build_meta_model(config.model)
    except (MissingFileError, CheckpointError) as error:
        return f"model\n  sizes are not known without the files: {error}"
    set_trained_parts(model, config)
    rows = parts_table(model)
    tower, connector, text = model.vision_tower, model.multi_modal_projector, model.config.text_config
    trainable = sum(r.trainable for r in rows)
    total = sum(r.total for r in rows)
    adapters = [] if config.lora is None else [f"adapters of rank {config.lora.rank}"]
    lines = [
        "model",
        f"  encoder         {config.model.vision.family}, {tower.image_size} px, {tower.grid[0]} x "
        f"{tower.grid[1]} patches",
        f"  connector       {config.model.connector.name}: {connector.num_tokens} visual tokens an image",
        f"  language model  {text.model_type}, {_billions(rows, 'language_model')}: "
        f"{text.num_hidden_layers} layers of "
        f"width {text.hidden_size}, vocabulary {text.vocab_size}",
        f"  chat template   {config.model.chat}",
        f"  trains          {', '.join([*config.train, *adapters])}: {trainable:,} of {total:,} parameters "
        f"({trainable / total:.2%})",
        "",
        _indent(format_parts(rows)),
    ]
    return "\n".join(lines)


def _billions(rows: list[PartRow], name: str) -> str:
    total = sum(r.total for r in rows if r.name == name)
    return f"{total / 1e9:.2f}B parameters" if total >= 1e8 else f"{total:,} parameters"


def _data_section(config: TrainConfig) -> str:
    lines = ["data"]
    rows = 0
    known = True
    for source in config.data.sources:
        count, origin = rows_of(source)
        name = source.name or Path(source.annotations).stem
        if count is None:
            known = False
            lines.append(f"  {name}: number of rows not known (the file is missing)")
            continue
        weighted = max(1, round(count * source.weight))
        rows += weighted
        weight = f", weight {source.weight:g}: {weighted:,} an epoch" if source.weight != 1 else ""
        lines.append(f"  {name}: {count:,} rows{origin}{weight}")
    batch = config.batch
    if config.data.pack_length is not None:
        micro = f"packed rows of up to {config.data.pack_length:,} tokens"
    elif batch.micro_batch_size is not None:
        micro = f"micro-batches of {batch.micro_batch_size}"
    else:
        micro = f"micro-batches of {batch.tokens_per_micro_batch:,} tokens"
    order = f"order {config.data.order}, max_length {config.data.max_length}"
    lines.append(f"  steps of {batch.step} in {micro}, {order}")
    if not known:
        return "\n".join(lines)
    if batch.tokens_per_step is not None:
        return "\n".join([*lines, *_steps_of_tokens(config, rows)])
    per_epoch = math.ceil(rows / batch.global_batch_size)
    steps = per_epoch * config.epochs if config.epochs is not None else config.max_steps or 0
    steps = min(steps, config.max_steps) if config.max_steps is not None else steps
    lines.append(f"  {rows:,} samples and {per_epoch:,} steps an epoch; {steps:,} steps in all")
    lines.append(_optimizer(config, f"{Schedule(config.schedule, steps).warmup_steps} warm-up steps"))
    return "\n".join(lines)


def _steps_of_tokens(config: TrainConfig, rows: int) -> list[str]:
    """How many there are follows from the lengths of the rows, which a dry run does not measure."""
    limit = "" if config.max_steps is None else f"at most {config.max_steps:,} steps; "
    known = config.epochs is None or config.schedule.warmup_steps is not None
    warmup = f"{config.schedule.warmup_ratio:.0%} of the steps as warm-up"
    if known:
        warmup = f"{Schedule(config.schedule, config.max_steps or 1).warmup_steps} warm-up steps"
    if config.epochs is None:
        return [f"  {rows:,} samples an epoch; {config.max_steps:,} steps in all", _optimizer(config, warmup)]
    found = "their number follows from the lengths of the rows, estimated by vlmamba plan"
    return [
        f"  {rows:,} samples an epoch, {config.epochs} epoch(s); {limit}{found}",
        _optimizer(config, warmup),
    ]


def _optimizer(config: TrainConfig, warmup: str) -> str:
    return (
        f"  {config.optim.name}, lr {config.optim.lr:g}, {config.schedule.name} after {warmup}, "
        f"weight decay {config.optim.weight_decay:g}, clip {config.grad_clip}"
    )


def rows_of(source: SourceConfig) -> tuple[int | None, str]:
    """Rows of a source, None if not known, and where the number is from unless it was counted."""
    path = Path(source.annotations).expanduser()
    if source.kind == "llava" and path.is_file():
        return len(RowFile(path)), ""
    if source.expected_rows is not None:
        return source.expected_rows, " (as published; the file is missing)"
    return None, ""


def _files_section(config: TrainConfig) -> str:
    missing = [*missing_files(config), *_missing_image_folders(config)]
    if not missing:
        return "files\n  all there"
    return (
        f"files: {len(missing)} missing\n{format_missing(missing)}\n"
        f"  Without downloads, on the playground's small task: {PLAYGROUND}"
    )


def _missing_image_folders(config: TrainConfig) -> list[MissingItem]:
    """Folders named by the rows of the annotation files that are there."""
    items = []
    for source in config.data.sources:
        here = source.kind == "llava" and Path(source.annotations).expanduser().is_file()
        if here and source.root.expanduser().is_dir():
            opened = build_source("llava", annotations=source.annotations, image_root=source.root)
            for folder, hint in list(missing_folders(opened).items())[:MOST_LISTED]:
                items.append(MissingItem("images", str(folder), hint or source.hint))
    return items


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
