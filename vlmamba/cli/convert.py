"""``vlmamba convert SOURCE TARGET``: from one checkpoint layout to another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmamba.checkpoints.convert import TARGETS, convert, new_directory


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    parser = argparse.ArgumentParser(
        prog="vlmamba convert",
        description="Convert a checkpoint. Its layout is told by its content: state-spaces/mamba or transformers "
        "language models, Cobra runs, LLaVA's mm_projector.bin, vlmamba models. A run of vlmamba train, finished or "
        "not, and a checkpoint of one are exported.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="directory or file to read")
    parser.add_argument("target", help="directory to write")
    parser.add_argument(
        "--to", choices=TARGETS, default="transformers", help="layout to write (default: transformers)"
    )
    parser.add_argument(
        "--recipe", help="whose encoders and tokenizer make a whole model of a Cobra run: cobra:finetune"
    )
    arguments = parser.parse_args(words)
    if arguments.recipe is not None:
        from vlmamba.checkpoints.assemble import assemble
        from vlmamba.config import load_recipe
        from vlmamba.training.export import export_model

        target = new_directory(arguments.target)
        model, processor = assemble(arguments.source, load_recipe(arguments.recipe).config.model)
        print(f"{arguments.source} -> {export_model(model, processor, target)}")
        return 0
    found = None if arguments.to != "transformers" else _checkpoint(Path(arguments.source))
    if found is not None:
        from vlmamba.training.run import export_checkpoint

        print(f"{found} -> {export_checkpoint(found, new_directory(arguments.target))}")
        return 0
    result = convert(arguments.source, arguments.target, to=arguments.to)
    print(f"{result.layout} -> {arguments.to}: {', '.join(result.files)} in {result.target}")
    for what, count in (("connector", result.connector), ("language model", result.language)):
        if count:
            print(f"  {what}: {count:,} weights")
    return 0


def _checkpoint(source: Path) -> Path | None:
    """The checkpoint that a run's folder or one of its checkpoints means."""
    from vlmamba.training.checkpoint import CHECKPOINTS, STATE, latest_checkpoint

    if (source / STATE).is_file():
        return source
    return latest_checkpoint(source) if (source / CHECKPOINTS).is_dir() else None
