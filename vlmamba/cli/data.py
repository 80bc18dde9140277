"""``vlmamba data check ANNOTATIONS``: read every row, decode every picture, list what is wrong and where."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def run(words: Sequence[str]) -> int:
    """Run the verb; exit code 1 when something is wrong."""
    parser = argparse.ArgumentParser(
        prog="vlmamba data", description="Look after training data.", allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check_parser = actions.add_parser(
        "check", help="read every row and decode every picture", allow_abbrev=False
    )
    check_parser.add_argument("annotations", help="JSON list or JSON lines in LLaVA's format")
    check_parser.add_argument(
        "--images", help="folder the image paths start from (default: that of the file)"
    )
    check_parser.add_argument("--limit", type=int, help="only the first so many rows")
    check_parser.add_argument(
        "--no-decode", action="store_true", help="look for the pictures, do not read them"
    )
    arguments = parser.parse_args(words)
    from vlmamba.data import build_source, check

    root = arguments.images or Path(arguments.annotations).parent
    source = build_source("llava", annotations=arguments.annotations, image_root=root)
    report = check([source], decode=not arguments.no_decode, limit=arguments.limit, progress=True)
    print(report.text())
    return 0 if report.ok else 1
