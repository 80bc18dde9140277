"""``vlmamba eval CHECKPOINT --tasks ...``, ``vlmamba eval score TASK --predictions P``, ``vlmamba eval compare``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from vlmamba.cli import compare, score


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    verbs = {"score": score.run, "compare": compare.run}
    return verbs[words[0]](words[1:]) if words and words[0] in verbs else _measure(words)


def _measure(words: Sequence[str]) -> int:
    arguments = _measure_parser().parse_args(words)
    from vlmamba.evaluation.cli import evaluate_checkpoint
    from vlmamba.evaluation.ranks import connect
    from vlmamba.evaluation.tables import format_results
    from vlmamba.training.parallel.launch import read_launch
    from vlmamba.training.parallel.spawn import is_launched, processes_here, spawn

    if not is_launched():
        count = processes_here() if arguments.nproc == "auto" else int(arguments.nproc)
        if count > 1:
            return spawn(without_option(words, "--nproc"), count, verb="eval")
    launch = read_launch()
    ranks = connect(launch)
    device = arguments.device
    if launch.world_size > 1 and device in ("auto", "cuda"):
        device = _device_of(launch.local_rank)
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
            device=device,
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
        type=_processes,
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


def without_option(words: Sequence[str], name: str) -> list[str]:
    """The words without an option and its value."""
    kept: list[str] = []
    for at, word in enumerate(words):
        if word != name and not word.startswith(f"{name}=") and (at == 0 or words[at - 1] != name):
            kept.append(word)
    return kept


def _processes(text: str) -> str:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"a number of processes or auto, got {text!r}")
    return text


def _batch_size(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"a number of questions or auto, got {text!r}")
    return text if text == "auto" else int(text)


def _device_of(local_rank: int) -> str:
    """The GPU of one of several processes on a host, where there are GPUs."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{local_rank % count}" if count else "cpu"
