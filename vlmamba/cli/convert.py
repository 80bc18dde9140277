"""``vlmamba convert SOURCE TARGET``: from one checkpoint layout to another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlmamba.checkpoints.convert import TARGETS, convert


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    parser = argparse.ArgumentParser(
        prog="vlmamba convert",
        description="Convert a checkpoint. Its layout is told by its content: state-spaces/mamba or transformers "
        "language models, Cobra runs, LLaVA's mm_projector.bin, vlmamba models.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="directory or file to read")
    parser.add_argument("target", help="directory to write")
    parser.add_argument(
        "--to", choices=TARGETS, default="transformers", help="layout to write (default: transformers)"
    )
    arguments = parser.parse_args(words)
    result = convert(arguments.source, arguments.target, to=arguments.to)
    print(f"{result.layout} -> {arguments.to}: {', '.join(result.files)} in {result.target}")
    for what, count in (("connector", result.connector), ("language model", result.language)):
        if count:
            print(f"  {what}: {count:,} weights")
    return 0
