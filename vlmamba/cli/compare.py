"""``vlmamba eval compare RUN RUN...``: differences with intervals, and a page of the answers that changed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    parser = argparse.ArgumentParser(
        prog="vlmamba eval compare",
        description="Compare evaluations question by question, each with the first: differences with paired "
        "bootstrap intervals for every task and kind of question, and a page with the questions whose answers "
        "became right or wrong.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders that vlmamba eval wrote, or runs that hold one")
    add("--tasks", help="only these of their tasks, comma-separated")
    add("--common", action="store_true", help="compare the questions that all of them were asked")
    add("--output", default="compare.html", help="the page (default: compare.html)")
    add("--flips", type=int, default=40, help="flips shown of each task and direction (default: 40)")
    add("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args(words)
    from vlmamba.evaluation.compare import compare_runs, format_comparison
    from vlmamba.evaluation.compare_page import write_comparison

    comparison = compare_runs(
        arguments.runs,
        tasks=None if arguments.tasks is None else arguments.tasks.split(","),
        common=arguments.common,
    )
    page = write_comparison(arguments.output, comparison, flips=arguments.flips)
    if arguments.json:
        print(json.dumps(comparison.figures(), indent=2, ensure_ascii=False))
    else:
        print(f"{format_comparison(comparison)}\n\npage: {page}")
    return 0
