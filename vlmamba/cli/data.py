"""``vlmamba data check | show | stats | convert``: what is wrong with data, what is learnt from it, how long it is."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmamba.common.files import replace_text
from vlmamba.errors import ConfigError

if TYPE_CHECKING:
    from vlmamba.data import VLDataset

EXAMPLES = """examples:
  vlmamba data check rows.json --images pictures --clean rows.clean.json
  vlmamba data show train/playground.py:finetune --number 5 --html samples.html
  vlmamba data show rows.json --images pictures --processor runs/quickstart/finetune
  vlmamba data stats train/vl_mamba.py:finetune --ranks 8 --pack 4096,8192
  vlmamba data convert lrv playground/data/lrv playground/data/lrv_instruct_400k.json
"""


def run(words: Sequence[str]) -> int:
    """Run the verb; `check` gives exit code 1 when something is wrong."""
    parser = argparse.ArgumentParser(
        prog="vlmamba data",
        description="Look after training data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _check_arguments(
        actions.add_parser("check", help="read every row and decode every picture", allow_abbrev=False)
    )
    show = actions.add_parser("show", help="samples with what is learnt marked", allow_abbrev=False)
    _target_arguments(show)
    show.add_argument("--rows", help="numbers of rows, 0,7,21")
    show.add_argument("--number", type=int, default=4, help="or so many rows at random (default: 4)")
    show.add_argument("--seed", type=int, default=0, help="which ones")
    show.add_argument("--html", type=Path, help="write a page with the pictures instead")
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    stats = actions.add_parser(
        "stats", help="lengths, and the padding of each way to batch", allow_abbrev=False
    )
    _target_arguments(stats)
    stats.add_argument("--ranks", type=int, default=1, help="processes to plan for")
    stats.add_argument(
        "--batch", type=int, help="samples of an optimizer step (default: the recipe's, or 128)"
    )
    stats.add_argument(
        "--micro", type=int, help="samples of a padded micro-batch (default: the recipe's, or 16)"
    )
    stats.add_argument("--pack", default="2048,4096,8192", help="lengths of packed rows to try")
    stats.add_argument("--html", type=Path, help="also write a page")
    stats.add_argument("--svg", type=Path, help="also write the histogram as a picture")
    stats.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that measure")
    convert = actions.add_parser("convert", help="other formats to LLaVA's", allow_abbrev=False)
    convert.add_argument("format", choices=("lrv",), help="lrv: LRV-Instruction, its charts included")
    convert.add_argument("folder", type=Path, help="with the files as they are published")
    convert.add_argument("output", type=Path, help="JSON file to write")
    arguments, overrides = parser.parse_known_args(words)
    if overrides and (arguments.action == "convert" or not _is_recipe(arguments.target)):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if arguments.action == "convert":
        from vlmamba.data.lrv import convert_lrv

        rows = convert_lrv(arguments.folder, arguments.output)
        print(f"{rows:,} rows are in {arguments.output}; images: {arguments.folder.resolve().parent}")
        return 0
    return {"check": _check, "show": _show, "stats": _stats}[arguments.action](arguments, overrides)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _target_arguments(parser)
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--no-decode", action="store_true", help="open no picture")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="write every problem as a JSON line")
    parser.add_argument(
        "--clean", type=Path, metavar="FILE", help="write the annotations without the bad rows"
    )


def _target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        help="a recipe (with overrides), a run's config.yaml, or LLaVA's JSON, a data set, tar shards",
    )
    parser.add_argument(
        "--kind", choices=("llava", "hf", "webdataset"), default="llava", help="of an annotation file"
    )
    parser.add_argument("--images", help="of an annotation file: folder the image paths start from")
    parser.add_argument("--processor", help="of an annotation file: a finished run or an exported model")
    parser.add_argument("--max-length", type=int, default=2048, help="of an annotation file: longest sample")


def _check(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from vlmamba.data import LLaVASource, check, write_clean

    dataset: Any = None
    if _is_recipe(arguments.target) or arguments.processor is not None:
        dataset, _ = _dataset(arguments, overrides)
    sources = [_source(arguments)] if dataset is None else dataset.mixture.sources
    whole = len(sources) == 1 and isinstance(sources[0], LLaVASource) and arguments.limit is None
    if arguments.clean is not None and not whole:
        raise ConfigError("--clean rewrites one whole file of kind llava; leave out --limit and --kind")
    report = check(
        sources,
        encoder=dataset,
        decode=not arguments.no_decode,
        limit=arguments.limit,
        num_workers=0 if arguments.workers < 2 else arguments.workers,
        progress=True,
    )
    print(report.text())
    if dataset is None:
        print("lengths and the chat template were not looked at: that takes --processor RUN, or a recipe")
    if arguments.list is not None:
        lines = "".join(json.dumps(asdict(problem)) + "\n" for problem in report.problems)
        replace_text(arguments.list, lines)
        print(f"{len(report.problems)} problems are listed in {arguments.list}")
    if arguments.clean is not None:
        print(f"{write_clean(sources[0], report, arguments.clean):,} rows are in {arguments.clean}")
    return 0 if report.ok else 1


def _is_recipe(target: str) -> bool:
    name = target.partition(":")[0]
    return name.endswith((".py", ".yaml", ".yml")) or (":" in target and not Path(target).exists())


def _source(arguments: argparse.Namespace) -> Any:
    from vlmamba.data import build_source

    beside = str(Path(arguments.target).parent) if arguments.kind == "llava" else None
    return build_source(arguments.kind, annotations=arguments.target, image_root=arguments.images or beside)


def _dataset(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[VLDataset, Any]:
    """The data set of a target, and the recipe's config if it is one."""
    from vlmamba.data import Mixture, VLDataset

    if _is_recipe(arguments.target):
        from vlmamba.config import load_recipe
        from vlmamba.training.data import open_sources

        config: Any = load_recipe(arguments.target, list(overrides)).config
        if config.data.stream:
            raise ConfigError("rows of a stream have no numbers: look at them with --data.stream false")
        mixture = Mixture(open_sources(config), [s.weight for s in config.data.sources], seed=config.seed)
        data = config.data
        dataset = VLDataset(
            mixture, _recipe_processor(config), max_length=data.max_length, image_position=data.image_position
        )
        return dataset, config
    if arguments.processor is None:
        raise ConfigError(
            "tokens depend on the model: give --processor RUN (a finished run or an exported model), or a recipe in "
            "place of the annotation file"
        )
    from vlmamba.common.load import load_processor

    processor = load_processor(arguments.processor)
    return VLDataset(_source(arguments), processor, max_length=arguments.max_length), None


def _recipe_processor(config: Any) -> Any:
    """The processor of a recipe, made without its weights."""
    from vlmamba.models import VLMambaImageProcessor, VLMambaProcessor
    from vlmamba.models.builder import build_meta_model
    from vlmamba.models.chat import load_template
    from vlmamba.models.language import load_tokenizer

    language = config.model.language
    model = build_meta_model(config.model)
    return VLMambaProcessor(
        VLMambaImageProcessor(size=model.vision_tower.image_size, mode=config.model.image.mode or "resize"),
        load_tokenizer(language.tokenizer or language.path),
        chat_template=load_template(config.model.chat),
        num_image_tokens=model.multi_modal_projector.num_tokens,
    )


def _show(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import numpy as np

    from vlmamba.data.show import as_html, as_text, look_at

    dataset, _ = _dataset(arguments, overrides)
    if arguments.rows is not None:
        rows = _numbers("--rows", arguments.rows)
    else:
        count = min(arguments.number, len(dataset))
        rows = np.random.default_rng(arguments.seed).choice(len(dataset), count, replace=False).tolist()
    outside = [row for row in rows if not 0 <= row < len(dataset)]
    if outside:
        raise ConfigError(f"--rows {outside[0]}: the data has rows 0 to {len(dataset) - 1}")
    samples = [look_at(dataset, row) for row in rows]
    if arguments.html is not None:
        replace_text(arguments.html, as_html(samples, title=f"Samples of {arguments.target}"))
        print(f"{len(samples)} samples are in {arguments.html}")
        return 0
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    color = arguments.color == "always" or (arguments.color == "auto" and colored)
    print("\n\n".join(as_text(sample, color=color) for sample in samples))
    return 0


def _numbers(option: str, words: str) -> list[int]:
    found = [word.strip() for word in words.split(",") if word.strip()]
    if not all(word.isdecimal() for word in found):
        raise ConfigError(f"{option} is {words!r}; it takes numbers with commas between them, as 0,7,21")
    return [int(word) for word in found]


def _stats(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from vlmamba.common.files import cache_folder
    from vlmamba.data import compute_lengths
    from vlmamba.data.stats import layouts, stats_chart, stats_html, stats_text
    from vlmamba.pages.charts import write_chart
    from vlmamba.training.data import processor_fingerprint

    dataset, config = _dataset(arguments, overrides)
    table = compute_lengths(
        dataset,
        cache_dir=cache_folder(),
        processor_fingerprint=processor_fingerprint(dataset.processor),
        num_workers=0 if arguments.workers < 2 else arguments.workers,
    )
    usable = table.lengths > 0
    if not usable.any():
        raise ConfigError(
            f"none of the {len(table)} rows of {arguments.target} can be used; see vlmamba data check"
        )
    batch = config.batch if config is not None else None
    found = layouts(
        table.lengths[usable].astype("int64"),
        table.num_images[usable].astype("int64"),
        step_samples=arguments.batch or (batch.global_batch_size if batch else 128),
        micro_samples=arguments.micro or (batch and batch.micro_batch_size) or 16,
        pack_lengths=_numbers("--pack", arguments.pack),
        ranks=arguments.ranks,
    )
    title = f"Rows of {arguments.target}"
    text = stats_text(table, found, title=title, ranks=arguments.ranks)
    print(text)
    if arguments.html is not None:
        replace_text(arguments.html, stats_html(table, text, title=title))
        print(f"written to {arguments.html}")
    if arguments.svg is not None:
        write_chart(arguments.svg, stats_chart(table))
        print(f"written to {arguments.svg}")
    return 0
