"""``vlmamba eval CHECKPOINT --tasks ...`` and ``vlmamba eval score TASK --predictions P``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    return _score(words[1:]) if words and words[0] == "score" else _measure(words)


def _measure(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlmamba eval",
        description="Ask a checkpoint the questions of some tasks and score the answers. An evaluation that was "
        "stopped goes on where it stood. To score an answer file: vlmamba eval score TASK --predictions FILE.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a finished run (runs/NAME) or an exported model directory")
    parser.add_argument(
        "--tasks", required=True, help="names or paths of task files (eval/NAME.py), comma-separated"
    )
    parser.add_argument("--output", help="folder for answers and results.json (default: CHECKPOINT/eval)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument(
        "--shuffle-images",
        action="store_true",
        help="ask again with the pictures shuffled among the questions",
    )
    parser.add_argument(
        "--conversations", type=int, default=0, help="also hold so many conversations, for the report"
    )
    parser.add_argument("--fresh", action="store_true", help="ask again what was already answered")
    arguments = parser.parse_args(words)
    from vlmamba.evaluation.cli import evaluate_checkpoint
    from vlmamba.evaluation.tables import format_results

    results = evaluate_checkpoint(
        arguments.checkpoint,
        arguments.tasks,
        output=arguments.output,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        shuffle_images=arguments.shuffle_images,
        conversations=arguments.conversations,
        fresh=arguments.fresh,
    )
    print(format_results(results))
    return 0


def _score(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlmamba eval score",
        description="Score an answer file of any model; needs no model. Prints one JSON object.",
        allow_abbrev=False,
    )
    parser.add_argument("task", help="name or path of a task file")
    parser.add_argument("--predictions", required=True, help="JSON lines with question_id and text")
    parser.add_argument("--annotations", help="the task's annotation file, when it is not in its usual place")
    parser.add_argument("--allow-missing", action="store_true", help="count unanswered questions as wrong")
    arguments = parser.parse_args(words)
    from vlmamba.evaluation.cli import score_predictions

    scored = score_predictions(
        arguments.task, arguments.predictions, arguments.annotations, allow_missing=arguments.allow_missing
    )
    print(json.dumps(scored, indent=2, ensure_ascii=False))
    return 0
