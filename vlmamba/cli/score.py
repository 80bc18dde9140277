"""``vlmamba eval score TASK --predictions P --annotations A``: one JSON object, no model, no torch."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

from vlmamba.errors import ConfigError


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    parser = argparse.ArgumentParser(
        prog="vlmamba eval score",
        description="Score an answer file of any model; needs no model. Prints one JSON object.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("task", help="name or path of a task file")
    add(
        "--predictions",
        required=True,
        help="JSON lines with question_id and text (LLaVA's answers), or the benchmark's own layout",
    )
    add("--annotations", help="the task's data, when they are not in their usual place")
    add("--allow-missing", action="store_true", help="count unanswered questions as wrong")
    add("--submission", metavar="FILE", help="also write the file that the benchmark's server wants")
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the task's function, such as split=dev_seen; may be repeated",
    )
    add("--folder", default="eval", help="where task files given by name live (default: eval)")
    arguments = parser.parse_args(words)
    from vlmamba.evaluation.predictions import format_result, score_predictions

    collecting = gc.isenabled()
    gc.disable()  # annotations are millions of objects that all stay: looking for garbage takes a third of the time
    try:
        result = score_predictions(
            arguments.task,
            arguments.predictions,
            arguments.annotations,
            allow_missing=arguments.allow_missing,
            folder=arguments.folder,
            submission=arguments.submission,
            options=dict(option(text) for text in arguments.option),
        )
    finally:
        if collecting:
            gc.enable()
    print(format_result(result))
    return 0


def option(text: str) -> tuple[str, str]:
    """``NAME=VALUE`` as a pair."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--option {text!r} is not NAME=VALUE")
    return name, value
