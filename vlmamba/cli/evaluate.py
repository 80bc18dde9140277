"""``vlmamba eval CHECKPOINT --tasks ...``, ``vlmamba eval score TASK --predictions P``, ``vlmamba eval compare``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from vlmamba.cli import compare, score
from vlmamba.common.processes import Group, read_launch, spawn_asked

WAIT = timedelta(days=7)
"""How long a process that is done waits for the others; a launcher ends all when one fails."""


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    verbs = {"score": score.run, "compare": compare.run}
    return verbs[words[0]](words[1:]) if words and words[0] in verbs else _measure(words)


def _measure(words: Sequence[str]) -> int:
    arguments = _measure_parser().parse_args(words)
    if (code := spawn_asked(words, arguments.nproc, verb="eval")) is not None:
        return code
    from vlmamba.evaluation.cli import evaluate_checkpoint
    from vlmamba.evaluation.tables import format_results

    launch = read_launch()
    ranks = Group(launch if launch.world_size > 1 else None, wait=WAIT)
    try:
        results = evaluate_checkpoint(
            arguments.checkpoint,
            arguments.tasks,
            output=arguments.output,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            shuffle_images=arguments.shuffle_images,
            conversations=arguments.conversations,
            fresh=arguments.fresh,
            folder=arguments.folder,
            options=dict(score.option(text) for text in arguments.option),
            device=arguments.device,
            dtype=arguments.dtype,
            switches=chosen_switches(arguments),
            ranks=ranks,
        )
    finally:
        ranks.close()
    if ranks.is_main:
        print(format_results(results))
    return 0


def _measure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmamba eval",
        description="Ask a checkpoint the questions of some tasks and score the answers. An evaluation that was "
        "stopped goes on where it stood. Under torchrun the processes share the questions. To score an answer "
        "file: vlmamba eval score TASK --predictions FILE. To compare: vlmamba eval compare RUN RUN.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="a finished run (runs/NAME) or an exported model directory")
    add("--tasks", required=True, help="names or paths of task files (eval/NAME.py), comma-separated")
    add("--output", help="folder for answers and results.json (default: CHECKPOINT/eval)")
    add(
        "--batch-size",
        type=_batch_size,
        default="auto",
        help="questions at a time; auto (default) halves it when memory runs out. Answers do not depend on it",
    )
    add("--limit", type=int, help="only the first so many questions")
    add(
        "--shuffle-images",
        "--shuffle",
        action="store_true",
        help="ask again with the pictures shuffled among the questions",
    )
    add("--conversations", type=int, default=0, help="also hold so many conversations, for the report")
    add("--fresh", action="store_true", help="ask again what was already answered")
    add("--folder", default="eval", help="where task files given by name live (default: eval)")
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the tasks' functions, such as annotations=FILE or split=dev_seen; may be repeated",
    )
    add(
        "--nproc",
        metavar="N",
        default="1",
        help="processes on this host that share the questions, or auto: one a GPU (default: 1; torchrun works too)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", help="auto (bfloat16 on a GPU), float32, bfloat16 or float16")
    add_switches(parser)
    return parser


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Flags that change a trained connector before it is measured."""
    group = parser.add_argument_group("changes of the trained connector")
    group.add_argument("--scan", help="scan directions: bsm, csm, forward or backward")
    group.add_argument(
        "--num-queries", type=int, metavar="N", help="keep N of Q-Mamba's queries, evenly spaced"
    )


def chosen_switches(arguments: argparse.Namespace) -> dict[str, Any]:
    """The changes that were asked for (see `vlmamba.evaluation.switches`)."""
    given = {"scan": arguments.scan, "num_queries": arguments.num_queries}
    return {name: value for name, value in given.items() if value is not None}


def _batch_size(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"a number of questions or auto, got {text!r}")
    return text if text == "auto" else int(text)
